"""Nightly: a run that is killed or moved goes on as the run that stayed, on every mesh axis, and leaks nothing on the way."""

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from runs import assert_bitwise, command, final_state, make_folder, numbers, settings, start, stop_at

from jaxlm import train
from jaxlm.config import UserError
from jaxlm.metrics.ledger import read_account
from jaxlm.metrics.writer import read_metrics

pytestmark = pytest.mark.nightly

MESHES = {
    "data": ("mesh.data=8", "mesh.fsdp=1"),
    "fsdp": ("mesh.data=1", "mesh.fsdp=8"),
    "model": ("mesh.data=2", "mesh.fsdp=2", "mesh.model=2"),
    "context": ("mesh.data=4", "mesh.fsdp=1", "mesh.context=2"),
    "pipeline": ("mesh.data=2", "mesh.fsdp=2", "mesh.pipeline=2", "pipeline.microbatches=2", "train.accumulate=1"),
}
TWENTY = settings(
    "train.num_steps=20",
    "train.eval_every=0",
    "checkpoint.every_steps=2",
    "log.sample_tokens=0",
    "optim.peak_lr=1e-3",
    "model.vocab_multiple=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(folder):
    """Of an axis: the workdir of its unbroken run."""
    done = {}

    def run(axis: str) -> Path:
        if axis not in done:
            assert train.main(command(folder, axis, *TWENTY, *settings(*MESHES[axis]))) == 0
            done[axis] = folder / axis
        return done[axis]

    return run


@pytest.mark.parametrize("axis", MESHES)
def test_killed_and_rerun_on_each_axis_20_losses_and_all_leaves_are_bitwise_equal(folder, whole, axis):
    want, name, mesh = whole(axis), f"{axis}-killed", settings(*MESHES[axis])
    child = start(folder, name, *TWENTY, *mesh)
    for line in child.stdout:
        if line.startswith("step 6: checkpoint committed"):
            child.kill()
    assert child.wait() == -signal.SIGKILL
    assert train.main(command(folder, name, *TWENTY, *mesh)) == 0
    losses = [record["loss"] for record in numbers(folder / name) if "loss" in record]
    assert len(losses) == 20 and numbers(folder / name) == numbers(want)
    assert_bitwise(final_state(folder / name), final_state(want))
    account = read_account(folder / name)
    print(
        f"{axis}: 20 losses equal as float hex, {len(jax.tree.leaves(final_state(want)))} leaves bitwise; time: {account}"
    )
    assert account.starts == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data", "fsdp"),
        ("data", "model"),
        ("data", "context"),
        ("data", "pipeline"),
        ("pipeline", "data"),
        ("fsdp", "model"),
    ],
)
def test_stopped_on_one_mesh_and_resumed_on_another_losses_stay_within_1e_5(folder, whole, before, after):
    name = f"{before}-{after}"
    for stop, axis in ((10, before), (20, after)):
        stop_at(folder, name, stop, *TWENTY, *settings(*MESHES[axis]), of=20)
    got, want = (
        [r["loss"] for r in read_metrics(workdir) if "loss" in r] for workdir in (folder / name, whole(before))
    )
    off = np.abs(np.array(got) / np.array(want) - 1)
    print(f"{before} to {after}: largest relative difference of 20 losses {off.max():.1e}")
    assert len(got) == 20 and off[:10].max() == 0 and off.max() <= 1e-5


def test_spikes_are_judged_after_a_resume_as_without_one(folder):
    # hardly above the mean is a spike here, so that there is something to judge
    guard = settings("train.skip_spikes=0.01", "train.max_nonfinite_steps=100", "optim.peak_lr=1e-2")
    more = (*TWENTY, *settings(*MESHES["data"], "train.num_steps=160", "checkpoint.every_steps=50"), *guard)
    assert train.main(command(folder, "spikes", *more)) == 0
    for stop in (150, 160):
        stop_at(folder, "spikes-stopped", stop, *more, of=160)
    assert numbers(folder / "spikes-stopped") == numbers(folder / "spikes")
    skipped = [r.get("skipped", 0) for r in read_metrics(folder / "spikes")]
    print(f"updates skipped by step 128, 150, 160: {skipped[127]}, {skipped[149]}, {skipped[159]}")
    assert skipped[127] == 0 and skipped[149] < skipped[159]  # judged by a window that came through the checkpoint


def test_sigterm_to_exit_takes_two_steps_and_a_save(folder):
    child = start(
        folder, "sigterm", *TWENTY, *settings(*MESHES["data"], "train.num_steps=2000", "checkpoint.every_steps=0")
    )
    asked_s = 0.0
    for line in child.stdout:
        if line.startswith("step 9/"):
            asked_s = time.monotonic()
            child.send_signal(signal.SIGTERM)
        if found := re.search(r"checkpoint committed in (\S+) s", line):
            save_s = float(found[1])
    assert child.wait() == 75
    took_s = time.monotonic() - asked_s
    step_s = np.median([r["step_time_s"] for r in read_metrics(folder / "sigterm")])
    print(f"SIGTERM to exit: {took_s:.2f} s; a step takes {step_s:.3f} s, the save took {save_s:.2f} s")
    assert took_s < 2 * step_s + save_s + 2  # two seconds for Python's own end on a machine with other work


def test_a_flipped_bit_in_a_running_model_stops_it(folder, monkeypatch, capsys):
    step = train.Loop._step

    def flipping(self, number, state, batch):
        if number == 5:
            state.params["final_norm"]["scale"] = tiny.flipped(state.params["final_norm"]["scale"], device=3)
        return step(self, number, state, batch)

    monkeypatch.setattr(train.Loop, "_step", flipping)
    more = settings(*MESHES["data"], "train.deterministic=true", "train.sdc_check_every=3", "checkpoint.every_steps=0")
    with pytest.raises(UserError, match="step 6: train.sdc_check_every") as caught:
        train.main(command(folder, "flipped", *TWENTY, *more))
    assert "replicas of final_norm.scale" in str(caught.value)
    assert "numbers    the same bits in every run\nxla        xla_gpu_deterministic_ops=True" in capsys.readouterr().out


def usage(process: int) -> tuple[int, int, int]:
    """(resident bytes, open files, threads) of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    found = re.search(r"Threads:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{process}/fd")), int(found[1])


def test_two_thousand_steps_and_a_hundred_saves_leak_nothing(folder):
    small = settings("model.num_layers=1", "train.accumulate=1", "mesh.data=1", "mesh.fsdp=2", "model.dropout=0")
    small += settings("train.batch_size=64")  # steps slow enough for a save to end before the next one begins
    more = settings("train.num_steps=2000", "checkpoint.every_steps=20", "log.tensorboard=true", "train.eval_every=100")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment |= {
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is free goes back: what stays is held
    child = start(folder, "soak", *TWENTY, *small, *more, environment=environment)
    seen: dict[int, list[tuple[int, ...]]] = {}  # step of the last save -> what is used, every few milliseconds
    step, child_ended = 0, threading.Event()

    def watch() -> None:
        while not child_ended.wait(0.01):
            with contextlib.suppress(OSError, TypeError):
                seen.setdefault(step, []).append(usage(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for line in child.stdout:
        if found := re.match(r"step (\d+): checkpoint committed", line):
            step = int(found[1])
    child_ended.set()
    watcher.join()
    assert child.wait() == 0 and step == 2000
    # the least between two saves, which have memory, files and threads of their own
    steps = np.array([step for step in sorted(seen) if 200 <= step < 2000])
    rss, files, threads = np.array([np.min(seen[step], axis=0) for step in steps]).T
    late, last = steps >= 1000, steps >= 1500  # by then programs, caches, buffers and pools of threads have their size
    per_step, _ = np.polyfit(steps[late], rss[late], 1)
    growth = 2000 * per_step / np.median(rss[late])
    mean = [np.mean(rss[(steps >= first) & (steps < first + 400)]) / 2**20 for first in range(200, 2000, 400)]
    print(f"soak: RSS {', '.join(f'{mib:.0f}' for mib in mean)} MiB by 400 steps; {growth:+.1%} in 2,000 steps")
    held = [(used[late & ~last].min(), used[last].min()) for used in (files, threads)]
    print("open files {} -> {}, threads {} -> {}, between two saves".format(*held[0], *held[1]))
    assert growth < 0.05 and len(steps) > 80 and all(after <= before for before, after in held)
