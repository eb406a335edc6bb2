"""Child of test_store.py: a process that may write no file above a limit, as on a full disk, then may again."""

import json
import resource
import sys

from closed_form import abstract, make_state, same

from jaxlm.checkpoint.layout import Retention
from jaxlm.checkpoint.store import CheckpointStore


def main(directory: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = CheckpointStore(directory, retention=Retention(3))
    for step, limit in ((1, hard), (2, 2**16), (3, hard)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        store.save(step, make_state(step))
        store.wait()
    left = sorted(entry.name for entry in store.directory.iterdir())
    outcomes = store.close()
    restored = store.restore_latest_good(abstract(make_state(0)))
    whole = restored is not None and same(restored.state, make_state(3))
    print(json.dumps({"errors": [outcome.error for outcome in outcomes], "left": left, "whole": whole}))


if __name__ == "__main__":
    main(sys.argv[1])
