"""Child of test_kill.py: resumes, checks what it resumed, then saves every step until it is killed."""

import sys
import time

from closed_form import abstract, make_state, next_state, same

from jaxlm.checkpoint.layout import Retention
from jaxlm.checkpoint.store import CheckpointStore

WIDTH = 2**20  # 16 MiB of state: most of the time a save is in flight


def main(directory: str) -> None:
    state = make_state(0, width=WIDTH)
    with CheckpointStore(directory, retention=Retention(2)) as store:
        restored = store.restore_latest_good(abstract(state))
        if restored is not None:
            assert same(restored.state, make_state(restored.step, width=WIDTH)) and restored.metadata == {
                "step": restored.step
            }
            state = restored.state
        print("resumed", int(state["step"]), flush=True)
        for step in range(int(state["step"]) + 1, 10**6):
            state = next_state(state)
            print("saving", step, flush=True)
            store.save(step, state, metadata={"step": step})
            while store._in_flight is not None and not store._in_flight.done():  # as many training steps go by
                time.sleep(0.002)
            for outcome in store.poll():
                assert outcome.error is None, outcome
                print("committed", outcome.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
