"""Child of test_space.py: how much memory a save takes beside a state of a gigabyte, and how much it keeps."""

import ctypes
import json
import sys
import threading
import time
from pathlib import Path

import jax
from closed_form import make_state

from jaxlm.checkpoint.store import CheckpointStore


def rss_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def main(directory: str) -> None:
    with CheckpointStore(directory) as store:
        store.save(1, make_state(1))  # what every save needs once: programs, threads
        store.wait()
        state = jax.block_until_ready(make_state(2, width=2**26 + 2**22))
        ctypes.CDLL(None).malloc_trim(0)  # what making it took
        peak, done, before = 0.0, threading.Event(), rss_gb()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, rss_gb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        store.save(2, state)
        store.wait()
        done.set()
        watcher.join()
        time.sleep(0.5)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
        print(json.dumps({"state_gb": size, "grown_gb": peak - before, "left_gb": rss_gb() - before}))


if __name__ == "__main__":
    main(sys.argv[1])
