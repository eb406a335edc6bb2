"""Death at the n-th change of a file's name or content, for processes that tests start."""

import os
import pathlib
import signal

_left = 0


def arm(moment: int) -> None:
    """The `moment`-th change from here on kills this process."""
    global _left
    _left = moment


def changes_kill(*, before: bool) -> None:
    """From here on changes count; the one that is due is made first, or not at all."""

    def deadly(change):
        def call(*args, **kwargs):
            global _left
            _left -= 1
            if _left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*args, **kwargs)
            if _left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.replace, os.fsync, os.open = deadly(os.replace), deadly(os.fsync), deadly(os.open)
    pathlib.Path.unlink, pathlib.Path.write_bytes = deadly(pathlib.Path.unlink), deadly(pathlib.Path.write_bytes)
