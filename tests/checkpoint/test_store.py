"""What a save promises: nothing lost, nothing blocked, failures told, the newest kept."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from closed_form import abstract, make_state, next_state, same

from jaxlm.checkpoint import checksum, store
from jaxlm.checkpoint.layout import Retention, committed_steps
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Exit, UserError
from jaxlm.parallel.gang import free_port

HERE = Path(__file__).resolve().parent
WIDTH = 64
small = partial(make_state, width=WIDTH)


@pytest.fixture
def checkpoints(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", retention=Retention(2)) as opened:
        yield opened


def hold_saves(monkeypatch, error: Exception | None = None) -> threading.Event:
    """Saves end only once the event is set, well or with `error`."""
    go, start = threading.Event(), store.ocp.save_checkpointables_async

    class Held:
        def __init__(self, *args, **more):
            self.response = start(*args, **more)

        def result(self) -> None:
            self.response.result()
            assert go.wait(timeout=10), "nobody let this save end"
            if error is not None:
                raise error

    monkeypatch.setattr(store.ocp, "save_checkpointables_async", Held)
    return go


def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    before = make_state(0)
    state = next_state(before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "next_state must really donate"
    for step in range(1, 13):
        checkpoints.save(step, state)
        state = next_state(next_state(next_state(state)))
        checkpoints.wait()
        restored = checkpoints.restore_latest_good(abstract(state))
        assert restored.step == step and same(restored.state, make_state(3 * step - 2))


def test_a_first_save_that_was_rehearsed_compiles_nothing(checkpoints):
    programs = []
    for step, width in ((0, 96), (1, 96), (2, 97)):
        if step == 0:
            checkpoints.warm_up(small(0, width=width))
        else:
            checkpoints.save(step, small(step, width=width))
        checkpoints.wait()
        programs.append(checksum._sums._cache_size())
    assert programs[0] == programs[1] < programs[2] and committed_steps(checkpoints.directory) == [1, 2]


def test_a_step_counts_as_committed_only_once_its_save_has_ended(checkpoints, monkeypatch):
    go = hold_saves(monkeypatch)
    assert checkpoints.save(5, small(5))
    assert (
        checkpoints.poll() == [] and checkpoints.committed_step is None and committed_steps(checkpoints.directory) == []
    )
    go.set()
    checkpoints.wait()
    (outcome,) = checkpoints.poll()
    assert (outcome.step, outcome.error) == (5, None) and outcome.duration_s > outcome.blocked_s > 0
    assert checkpoints.committed_step == 5 and checkpoints.poll() == []


def test_a_failed_save_is_told_and_the_same_step_can_be_tried_again(checkpoints, monkeypatch):
    with monkeypatch.context() as patched:
        hold_saves(patched, OSError("No space left on device")).set()
        for _ in range(2):
            assert checkpoints.save(5, small(5))
            checkpoints.wait()
            assert checkpoints.committed_step is None and list(checkpoints.directory.iterdir()) == []
    assert checkpoints.save(5, small(5))
    *failed, committed = checkpoints.close()
    assert [(f.step, f.error, f.failures) for f in failed] == [
        (5, "OSError: No space left on device", 1),
        (5, "OSError: No space left on device", 2),
    ]
    assert (committed.step, committed.error, committed.failures) == (5, None, 0)
    assert committed_steps(checkpoints.directory) == [5]


def test_in_a_gang_a_part_that_was_not_staged_is_everybodys_failure_and_one_not_written_ends_them_all(tmp_path):
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE / "saver.py"), str(process), str(port), str(tmp_path / str(process))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [Exit.UNUSABLE] * 2, said
    saves = ["1 ['process 1 (n1): OSError: no room']", "2 [None]"]
    why = "checkpoint of step 3\n  was not saved: OSError: No space left on device\n"
    assert said[0].splitlines()[:2] == saves and f"error: process 1 (n1) left: {why}" in said[0], said[0]
    assert said[1].splitlines()[:2] == saves and f"\n{why}" in said[1], said[1]
    # process 0 may or may not have written its own before it was ended
    assert committed_steps(tmp_path / "0")[:1] == committed_steps(tmp_path / "1") == [2]


def test_a_failure_that_nobody_polled_is_logged_at_the_end(tmp_path, monkeypatch, caplog):
    hold_saves(monkeypatch, OSError("No space left on device")).set()
    with CheckpointStore(tmp_path, retention=Retention(1)) as opened:
        opened.save(5, small(5))
    assert "checkpoint of step 5 was not saved: OSError: No space left on device" in caplog.text


def test_a_removed_directory_is_made_again(checkpoints):
    checkpoints.save(1, small(1))
    checkpoints.wait()
    shutil.rmtree(checkpoints.directory)
    checkpoints.save(2, small(2))
    assert [outcome.error for outcome in checkpoints.close()] == [None, None]
    assert committed_steps(checkpoints.directory) == [2]


def test_the_newest_the_round_and_the_best_are_kept(tmp_path):
    losses = {3: 2.0, 10: 1.5, 20: None, 100: float("nan"), 110: 1.5, 120: 1.9, 130: None}
    with CheckpointStore(tmp_path, retention=Retention(2, every=50, best=2)) as opened:
        for step, loss in losses.items():
            opened.save(step, small(step), metadata={"metrics": {} if loss is None else {"eval_loss": loss}})
    # among equals the later is the better; 10 was the second best until the end, 3 and 20 were pushed out
    assert committed_steps(opened.directory) == [10, 100, 110, 120, 130]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(map(str, committed_steps(opened.directory)))
    assert Retention(1).reasons({1: None, 2: None}) == {2: ["newest"]} and Retention(1).reasons({}) == {}


def test_the_same_step_again_does_nothing_and_an_earlier_one_is_refused(checkpoints):
    assert checkpoints.save(7, small(7))
    assert not checkpoints.save(7, small(8))
    assert same(checkpoints.restore_latest_good(abstract(small(0))).state, small(7))
    with pytest.raises(UserError, match="step 6 would be saved behind step 7"):
        checkpoints.save(6, small(6))
    assert len(checkpoints.close()) == 1


def test_another_runs_checkpoint_is_not_overwritten(checkpoints):
    with CheckpointStore(checkpoints.directory, retention=Retention(2)) as other:
        other.save(3, small(3))
    with pytest.raises(UserError, match="saved by another run"):
        checkpoints.save(3, small(4))
    assert same(checkpoints.restore_latest_good(abstract(small(0))).state, small(3))


def test_what_stands_in_the_way_of_a_save_is_moved_aside(checkpoints, caplog):
    (checkpoints.directory / "7").mkdir()
    (checkpoints.directory / "8").write_text("precious")
    for step in (7, 8):
        assert checkpoints.save(step, small(step))
    assert [outcome.error for outcome in checkpoints.close()] == [None, None]
    assert committed_steps(checkpoints.directory) == [7, 8]
    assert (checkpoints.directory / "abandoned" / "8").read_text() == "precious"
    assert caplog.text.count("stood in the way") == 2
    assert (checkpoints.directory / "abandoned" / "notes.txt").read_text().count("stood in the way") == 2


def test_leftovers_of_killed_saves_are_removed_at_the_start(tmp_path):
    for name in (
        "7.writing",
        "8.writing.orbax-checkpoint-tmp",
        "9.orbax-checkpoint-tmp",
        "3.pruned",
        "my",
        "abandoned",
    ):
        (tmp_path / name / "state").mkdir(parents=True)
    with CheckpointStore(tmp_path, retention=Retention(2)):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["abandoned", "my"]


def test_many_saves_leave_no_thread_and_no_open_file(tmp_path):
    open_files = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    with CheckpointStore(tmp_path, retention=Retention(1)) as opened:
        counts: list[tuple[int, int]] = []
        for step in range(12):
            opened.save(step, small(step))
            opened.wait()
            counts.append((threading.active_count(), open_files()))
    assert counts[-1] == counts[2], counts
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    with pytest.raises(AssertionError, match="after close"):
        opened.save(99, small(99))


def test_orbax_does_not_fill_the_log(checkpoints, caplog, monkeypatch):
    absl_logging.set_verbosity(absl_logging.INFO)
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    try:
        with caplog.at_level(logging.INFO):
            checkpoints.save(1, small(1))
            checkpoints.wait()
            monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
            checkpoints.restore_latest_good(abstract(small(0)))
            absl_logging.info("someone else's line")
    finally:
        absl_logging.set_verbosity(absl_logging.WARNING)
    assert [record.getMessage() for record in caplog.records] == ["someone else's line"]


def test_saving_and_restoring_work_where_transfers_are_forbidden(checkpoints):
    state = small(1)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed"):
            jnp.ones(2) + np.ones(2)
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore_latest_good(abstract(state))
    assert same(restored.state, state)


def test_metadata_is_copied_when_save_is_called(checkpoints):
    metadata = {"tokens": 5, "nested": {"loss": 0.1, "none": None}}
    checkpoints.save(1, small(1), metadata=metadata)
    metadata["nested"]["loss"] = 9.0
    checkpoints.wait()
    assert checkpoints.restore_latest_good(abstract(small(0))).metadata == {
        "tokens": 5,
        "nested": {"loss": 0.1, "none": None},
    }
    with pytest.raises(TypeError):
        checkpoints.save(2, small(2), metadata={"array": jnp.zeros(2)})
