"""Child of test_store.py: one of two processes that save steps 1 to 3 together, each into a directory of its own.

In process 1 staging fails at step 1 and writing at step 3. Prints how each save ended, then why the process did.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from closed_form import make_state

from jaxlm.checkpoint import store
from jaxlm.config import UserError
from jaxlm.parallel.gang import Gang, Limits

FAILS = {1: (store, "stage", "no room"), 3: (store.ocp, "save_checkpointables_async", "No space left on device")}


def fail(error: str, *_: Any) -> NoReturn:
    raise OSError(error)


def main(process: int, port: int, directory: Path) -> int:
    gang = Gang(process, 2, f"127.0.0.1:{port}", name=f"n{process}", limits=Limits(join_s=90, wait_s=90))
    try:
        with gang, store.CheckpointStore(directory, gang=gang) as opened:
            for step in (1, 2, 3):
                owner, name, error = FAILS.get(step, (store, "stage", ""))
                right = getattr(owner, name)
                if process == 1 and error:
                    setattr(owner, name, partial(fail, error))
                opened.save(step, make_state(step, width=64))
                opened.wait()
                opened.check()
                setattr(owner, name, right)
                print(step, [outcome.error for outcome in opened.poll()], flush=True)
            gang.settle("step 4")
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
