"""One run a workdir: one winner of any race, whoever it was before, and nobody commits who has lost it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from closed_form import make_state

from jaxlm.checkpoint import lock
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import UserError

HERE = Path(__file__).resolve().parent


class Race:
    """Processes that all try for the lock of `workdir` at one moment."""

    def __init__(self, workdir: Path, *, runners: int):
        gun = workdir / "gun"
        gun.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "racer.py"), str(workdir), str(gun)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
        self.runners = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(runners)
        ]
        for runner in self.runners:
            assert runner.stdout.readline() == "ready\n"
        gun.touch()
        # what a runner says up to its verdict; a winner goes on holding the lock
        self.said = {runner: [] for runner in self.runners}
        for runner, lines in self.said.items():
            while not lines or not lines[-1].startswith(("won", "lost")):
                lines.append(runner.stdout.readline())
                assert lines[-1], lines

    @property
    def winners(self):
        return [runner for runner, lines in self.said.items() if lines[-1] == "won\n"]

    def kill(self):
        for runner in self.runners:
            runner.kill()
            runner.communicate()


@pytest.mark.parametrize("races", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_every_race_has_one_winner_and_a_killed_winner_is_taken_over(tmp_path, races):
    """Every race but the first is for the lock of a run that was killed -9 a moment ago."""
    slowest_s = 0.0
    for number in range(1, races + 1):
        race = Race(tmp_path, runners=4)
        try:
            (winner,) = race.winners
            for runner, lines in race.said.items():
                if runner is winner:
                    assert (number > 1) == any("taken over from" in line for line in lines), lines
                    continue
                assert f"pid {winner.pid}, last heartbeat" in lines[-1], lines
                assert runner.wait() == 3
                slowest_s = max(slowest_s, float(re.search(r"after (.*?) s:", lines[-1])[1]))
            assert [entry.name for entry in tmp_path.glob("*lock*")] == [f"lock.{number}"]
        finally:
            race.kill()
    print(f"{races} races, one winner each; the slowest loser left {slowest_s:.3f} s after the start")
    assert slowest_s < 5


def test_a_lock_that_was_given_back_is_free_and_who_holds_it_is_said(tmp_path):
    for number in (1, 2):
        with (
            RunLock(tmp_path) as held,
            pytest.raises(UserError, match=f"training here since .*, pid {os.getpid()}") as no,
        ):
            held.check()
            RunLock(tmp_path).__enter__()
        assert no.value.exit_code == 3
        assert json.loads((tmp_path / f"lock.{number}").read_text())["released"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock.2"]


def on_another_host(path: Path, silent_s: float) -> None:
    """As if the holder of the lock file `path` were a process of another machine that was last heard of `silent_s` ago."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "far", "machine": "another"}))
    then = time.time() - silent_s
    os.utime(path, (then, then))


def test_a_run_on_another_host_is_believed_until_its_heartbeat_is_five_minutes_old(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lock, "LOOK_S", 0.02)
    with RunLock(tmp_path) as held:
        on_another_host(tmp_path / "lock.1", silent_s=298.5)
        begin = time.monotonic()
        with RunLock(tmp_path) as taken:
            assert 1 < time.monotonic() - begin < 5, "its next heartbeat is waited for, as long as there may be one"
            assert re.search(
                r"held by far, pid \d+, last heartbeat 29\d s ago: waiting for its next, . s at", caplog.text
            )
            assert "taken over from far" in caplog.text
            taken.check()
            with pytest.raises(UserError, match="was taken over by .*: this run writes nothing more") as lost:
                held.check()
            assert lost.value.exit_code == 3
    assert not (tmp_path / "lock.1").exists(), "who lost a lock leaves the winner's alone"


def test_a_run_on_another_host_that_lives_is_told_by_its_next_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK_S", 0.02)
    with RunLock(tmp_path):
        on_another_host(tmp_path / "lock.1", silent_s=60)
        beat = threading.Timer(0.3, os.utime, [tmp_path / "lock.1"])
        beat.start()
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"training here since .*: far, pid \d+, last heartbeat 0 s ago") as no:
            RunLock(tmp_path).__enter__()
        assert no.value.exit_code == 3 and 0.2 < time.monotonic() - begin < 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock.1"]


def test_the_heartbeat_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.02)
    with RunLock(tmp_path):
        os.utime(tmp_path / "lock.1", (time.time() - 1000,) * 2)
        deadline = time.monotonic() + 5
        while time.time() - (tmp_path / "lock.1").stat().st_mtime > 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_file_that_somebody_removed_is_made_again_unless_another_run_was_faster(tmp_path, caplog):
    with RunLock(tmp_path) as held:
        (tmp_path / "lock.1").unlink()
        held.check()  # as before each line and each commit, and every heartbeat
        assert "lock.1 was removed, and is made again" in caplog.text and (tmp_path / "lock.1").is_file()
        with pytest.raises(UserError, match=f"training here since .*, pid {os.getpid()}"):
            RunLock(tmp_path).__enter__()
        held.check()
        (tmp_path / "lock.1").unlink()
        faster = Race(tmp_path, runners=1)
        try:
            assert faster.winners and (tmp_path / "lock.1").is_file()  # of the same name, and not ours
            with pytest.raises(UserError, match="was taken over by .*: this run writes nothing more") as lost:
                held.check()
            assert lost.value.exit_code == 3 and held.lost
        finally:
            faster.kill()


def test_whoever_insists_gets_it_and_the_other_commits_nothing_more(tmp_path):
    with RunLock(tmp_path) as mine, CheckpointStore(tmp_path / "checkpoints", lock=mine) as store:
        store.save(1, make_state(1, width=64))
        store.wait()
        with pytest.MonkeyPatch.context() as patched, RunLock(tmp_path, force=True):
            with pytest.raises(UserError, match="taken over by"):
                store.save(2, make_state(2, width=64))
            # between the start of a save and its commit
            patched.setattr(mine, "check", lambda checks=[mine.check, lambda: None]: checks.pop()())
            assert store.save(3, make_state(3, width=64))
            store.wait()
            assert [outcome.error is None for outcome in store.poll()] == [True, False]
            assert committed_steps(store.directory) == [1]
