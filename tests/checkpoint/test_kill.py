"""kill -9 of a real process at random moments: what it called committed is there, and the next start finds it."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from closed_form import abstract, make_state, same
from killer import WIDTH

from jaxlm.checkpoint.layout import LEFTOVER, Retention, committed_steps
from jaxlm.checkpoint.restore import restore
from jaxlm.checkpoint.store import CheckpointStore

HERE = Path(__file__).resolve().parent


def run_and_kill(directory: Path, delay_s: float) -> list[tuple[str, int]]:
    """Starts the child, waits for its first commit and `delay_s` more, kills it: what it said."""
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(HERE / "killer.py"), str(directory)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    lines = [child.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("committed"):
        lines.append(child.stdout.readline())
    time.sleep(delay_s)
    child.kill()
    rest, errors = (
        child.stdout.read(),
        child.stderr.read(),
    )  # `communicate` knows nothing of what readline has read ahead
    assert child.wait() == -9, errors
    # The kill may cut the last line short; a line that the reader did not get whole was never reported.
    words = [line.split() for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]
    assert words and words[0][0] == "resumed", errors
    return [(word, int(step)) for word, step in words]


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_every_step_reported_committed_survives_kill_9(tmp_path, kills):
    directory, rng = tmp_path / "checkpoints", random.Random(kills)
    newest, in_flight, torn, reported = 0, 0, 0, 0
    for _ in range(kills):
        said = run_and_kill(directory, rng.uniform(0, 0.3))
        assert said[0][1] >= newest, "a restart must find the newest step that was reported"
        committed = [step for word, step in said if word == "committed"]
        newest, reported = committed[-1], reported + len(committed)
        in_flight += said[-1][0] == "saving"
        torn += any(LEFTOVER.fullmatch(entry.name) for entry in directory.iterdir())
        steps = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]
        # A later one may be there, committed but not reported yet. Every directory with a step's name must be whole.
        assert max(steps) >= newest
        for step in steps:
            expected = make_state(step, width=WIDTH)
            assert same(restore(directory, abstract(expected), step=step).state, expected)
    print(f"{kills} kills, {in_flight} in the middle of a save, {torn} left files of one; 0 of {reported} commits lost")
    share = 0.75 if kills >= 100 else 0.5  # seven of eight are expected; of a few kills chance takes more
    assert in_flight >= share * kills and torn, "the kills must fall into saves to mean anything"
    with CheckpointStore(directory, retention=Retention(2)) as store:
        assert committed_steps(store.directory)[-1] >= newest
        assert sorted(entry.name for entry in directory.iterdir()) == sorted(map(str, committed_steps(store.directory)))
