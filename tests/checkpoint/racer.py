"""Child of test_lock.py: waits for the gun, tries for the lock, says how it went, holds what it won until killed."""

import logging
import sys
import time
from pathlib import Path

from jaxlm.checkpoint.lock import RunLock
from jaxlm.config import UserError


def main(workdir: Path, gun: Path) -> int:
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    print("ready", flush=True)
    while not gun.exists():
        time.sleep(0.001)
    start = time.monotonic()
    try:
        with RunLock(workdir):
            print("won", flush=True)
            time.sleep(600)
    except UserError as error:
        print(f"lost after {time.monotonic() - start:.3f} s:", str(error).replace("\n", ";"), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
