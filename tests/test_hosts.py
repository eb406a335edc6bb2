"""Runs of several processes: the same numbers on any number of them, and their ends when one fails or is told to go."""

import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from hosts import Hosts
from runs import command, make_folder, settings

from jaxlm import train
from jaxlm.checkpoint.__main__ import main as checkpoint_command
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.metrics.writer import read_metrics

# The same program in every test of this file, on 8 devices. A constant learning rate: the first steps of a run do not
# depend on how many will follow.
SHORT = settings(
    "train.eval_every=0", "log.sample_tokens=0", "optim.warmup_steps=0", "optim.peak_lr=2e-3",
    "model.num_layers=1", "model.dropout=0", "train.accumulate=1", "mesh.data=2", "mesh.fsdp=-1", "optim.schedule=constant",
)  # fmt: skip
TOLERANCE = 1e-6  # sums over devices of several processes take another order: roundings of float32 in a few updates
ENDLESS = settings("train.num_steps=100000", "checkpoint.every_steps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hosts"))


def alone(folder, workdir, steps):
    """Trains `workdir` until step `steps` in this process, on 8 devices."""
    assert train.main(command(folder, workdir, *SHORT, *settings(f"train.num_steps={steps}"))) == 0
    return losses(folder, workdir)


def losses(folder, workdir):
    return {r["step"]: r["loss"] for r in read_metrics(folder / workdir) if "loss" in r}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    assert max(abs(found[k] - wanted[k]) / wanted[k] for k in wanted) < TOLERANCE


def test_two_processes_told_to_leave_save_one_step_which_one_process_goes_on_from(folder):
    hosts = Hosts(folder, "pair", *SHORT, *ENDLESS, count=2, devices=4)
    hosts.wait_for(r"step 3/")
    hosts.processes[1].send_signal(signal.SIGTERM)
    assert hosts.ends() == [75, 75], hosts.everything()
    assert "SIGTERM: saving after this step" in hosts.said(1) and "step 3/" not in hosts.said(1)
    last = committed_steps(folder / "pair" / "checkpoints")[-1]
    assert last == max(losses(folder, "pair")) and "the same command goes on from here" in hosts.said(0)
    assert_close(alone(folder, "pair", last + 2), alone(folder, "one", last + 2))


@pytest.mark.nightly
def test_forty_gangs_lose_a_process_and_no_commit(folder):
    """N2 and N10: one of 1, 2 or 4 processes is killed at any moment; the others leave, and another number goes on."""
    dice, took_s, codes, before, restarts = random.Random(0), [], [], 0, 0
    for kill in range(40):
        count = dice.choice([1, 2, 4])
        often = settings("checkpoint.every_steps=2")
        hosts = Hosts(folder, "killed", *SHORT, *ENDLESS, *often, count=count, devices=8 // count)
        resumed = int(hosts.wait_for(r"resumes after step (\d+)|starts at step 0").group(1) or 0)
        assert resumed >= before, (kill, before, hosts.everything())
        hosts.wait_for("checkpoint committed")
        time.sleep(dice.uniform(0, 0.6))
        victim = dice.randrange(count)
        before = max(int(step) for step in re.findall(r"step (\d+): checkpoint committed", hosts.said(0)))
        begin = time.monotonic()
        hosts.processes[victim].kill()
        ended = hosts.ends()
        took_s.append(time.monotonic() - begin)
        assert ended[victim] == -9 and 0 not in ended, hosts.everything()
        others = [i for i in range(count) if i != victim]
        codes += [ended[i] for i in others]
        gone = [victim, *(i for i in others if ended[i] == -6)]  # aborted in C++: jax's service or gloo was faster
        told = "|".join(f"error: process {i} \\(" for i in gone)
        assert all(re.search(told, hosts.said(i)) or ended[i] != 3 for i in others), hosts.everything()
        restarts += resumed > 0
    assert checkpoint_command(["verify", str(folder / "killed")]) == 0
    print(f"\n40 kills, {restarts} resumed, last from step {before}; the others gone after {max(took_s):.1f} s at most")
    print(f"with {Counter(codes)}")
    assert max(took_s) < 10 + 5
    assert set(codes) <= {3, -6} and codes.count(-6) <= len(codes) / 8, codes


@pytest.mark.nightly
def test_the_quickstart_trains_the_same_on_any_number_of_processes(folder):
    quick = ["--config", str(Path(__file__).parents[1] / "configs" / "quickstart.py")]
    few = settings("train.num_steps=20", "optim.warmup_steps=5", "train.eval_batches=2", "log.sample_tokens=0")
    found = {}
    for count, devices in ((2, 4), (4, 2), (1, 8), (2, 2), (1, 4)):
        name = f"quick{count}x{devices}"
        hosts = Hosts(folder, name, *quick, *few, count=count, devices=devices)
        assert hosts.ends(limit_s=400) == [0] * count, hosts.everything()
        found[count, devices] = losses(folder, name)
    assert found[2, 4] == found[4, 2] and len(found[2, 4]) == 20
    for other in ((1, 8), (2, 2), (1, 4)):
        assert_close(found[other], found[2, 4])
        print(
            f"\n2 x 4 to {other[0]} x {other[1]}:", max(abs(found[other][k] / found[2, 4][k] - 1) for k in found[2, 4])
        )


@pytest.mark.nightly
def test_one_and_four_hosts_go_on_from_what_two_saved(folder):
    four, eight = settings("train.num_steps=4"), settings("train.num_steps=8")
    hosts = Hosts(folder, "two", *SHORT, *four, count=2, devices=4)
    assert hosts.ends() == [0, 0], hosts.everything()
    for name, count in (("one host", 1), ("four hosts", 4)):
        shutil.copytree(folder / "two", folder / name)
        hosts = Hosts(folder, name, *SHORT, *eight, count=count, devices=8 // count)
        assert hosts.ends() == [0] * count and "resumes after step 4" in hosts.said(0), hosts.everything()
    wanted = alone(folder, "never stopped", 8)
    for name in ("one host", "four hosts"):
        assert_close(losses(folder, name), wanted)


@pytest.mark.nightly
def test_hosts_that_differ_are_named_before_the_first_step(folder):
    odd = {2: settings("optim.peak_lr=3e-3", "data.split=0.9,0.1")}
    hosts = Hosts(folder, "odd", *SHORT, *ENDLESS, count=4, devices=2, each=odd)
    assert hosts.ends() == [3] * 4, hosts.everything()
    for i in range(4):
        assert re.search(r"optim.peak_lr: 0.003 on process 2 \(.*, pid \d+\), 0.002 on the others", hosts.said(i)), i
        assert re.search(r"data.split: \[0.9, 0.1\] on process 2 \(.*\), \[0.95, 0.05\] on the others", hosts.said(i))
        assert "step 1" not in hosts.said(i)
    hosts = Hosts(
        folder, "odd", *SHORT, *ENDLESS, count=2, devices=4, count_said=3, each={0: settings("hosts.join_s=15")}
    )
    assert hosts.ends() == [3, 3] and "process 2 of 3 did not come to: start" in hosts.said(0), hosts.everything()


SLOW_RESTORE = """
import os, sys, time
from jaxlm import checkpoint, train
from jaxlm.checkpoint import restore
from jaxlm.settings import run_main
read = restore.read_leaves
def slow(*args):
    if os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(600)
    return read(*args)
restore.read_leaves = slow
run_main(train.main)
"""


SLOW_DATA = """
import os, time
from jaxlm import train
from jaxlm.data.loader import Loader
from jaxlm.settings import run_main
batch = Loader.batch
def slow(self, step, **share):
    time.sleep(1.5 if os.environ["JAX_PROCESS_ID"] == "1" else 0)
    return batch(self, step, **share)
Loader.batch = slow
run_main(train.main)
"""


@pytest.mark.nightly
def test_a_slow_host_is_named_and_one_that_hangs_in_its_restore_ends_the_run(folder):
    few = settings("train.num_steps=12")
    hosts = Hosts(folder, "slow", *SHORT, *few, count=2, devices=4, program=("-c", SLOW_DATA))
    assert hosts.ends() == [0, 0], hosts.everything()
    said = r"the others wait for process 1 \(.*, pid \d+\), [12]\.?\d* s a step for its data and in Python, where half"
    assert re.search(said, hosts.said(0)), hosts.everything()
    records = [r for r in read_metrics(folder / "slow") if "loss" in r][1:]  # the other is held up now and then, too
    assert sum(r["slowest_process"] == 1 and r["slowest_process_s"] > 0.5 for r in records) > len(records) / 2, records
    limits = settings("train.num_steps=20", "hosts.wait_s=8")
    hosts = Hosts(folder, "slow", *SHORT, *limits, count=2, devices=4, program=("-c", SLOW_RESTORE))
    assert hosts.ends() == [3, 3], hosts.everything()
    assert re.search(r"process 1 \(.*, pid \d+\) of 2 did not come to: reading \S+/checkpoints/12", hosts.said(0))


FAILING_SAVES = """
import os
from jaxlm import train
from jaxlm.checkpoint import store
from jaxlm.settings import run_main
me, saves, stage, save = os.environ["JAX_PROCESS_ID"], [], store.stage, train.Loop._save
def stage_but_once(named):
    saves.append(named.keys())
    if me == "1" and len(saves) == 3:  # the second save, behind the rehearsal
        raise OSError("no memory to pin")
    return stage(named)
def save_without_room(self, step, state):
    ballast = self.store.directory.parent / "ballast"
    if me == "0" and step == 6 and not ballast.exists():
        with ballast.open("wb", buffering=0) as out:
            try:
                while out.write(bytes(4096)):
                    pass
            except OSError:
                pass
    save(self, step, state)
store.stage, train.Loop._save = stage_but_once, save_without_room
run_main(train.main)
"""


@pytest.mark.nightly
def test_a_save_that_one_process_cannot_stage_costs_a_step_and_a_full_disk_ends_all_at_once(folder):
    """Mounts a file system of 3 MB, which takes root."""
    disk, few = folder / "disk", settings("train.num_steps=8", "checkpoint.every_steps=2", "checkpoint.keep=1")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=True)
    try:
        hosts = Hosts(folder, "disk", *SHORT, *few, count=2, devices=4, program=("-c", FAILING_SAVES))
        hosts.wait_for("step 6/")
        begin = time.monotonic()
        assert hosts.ends() == [3, 3], hosts.everything()
        took_s = time.monotonic() - begin
        assert re.search(r"step 4: ERROR, checkpoint not saved: process 1 \(.*\): OSError: no memory", hosts.said(0))
        assert any("checkpoint of step 6\n  was not saved: OSError: [Errno 28]" in hosts.said(i) for i in (0, 1))
        assert committed_steps(disk / "checkpoints") == [2] and took_s < 15, (took_s, hosts.everything())
        (disk / "ballast").unlink()
        hosts = Hosts(folder, "disk", *SHORT, *few, count=2, devices=4)
        assert hosts.ends() == [0, 0] and "resumes after step 2" in hosts.said(0), hosts.everything()
        print(f"\nboth left {took_s:.1f} s after the step whose save met a full disk")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


FAILING_COMMIT = """
import os
from jaxlm import train
from jaxlm.checkpoint import layout
from jaxlm.parallel.votes import Votes
from jaxlm.settings import run_main
commit, cast, votes = layout.commit, Votes.cast, []
def failing(directory, step):
    if step == 4:
        raise OSError("no rename")
    commit(directory, step)
def counted(self, values):
    votes.append(values)
    print(f"vote {len(votes)}", flush=True)
    return cast(self, values)
layout.commit, Votes.cast = failing, counted
run_main(train.main)
"""


@pytest.mark.nightly
def test_a_last_commit_that_fails_in_process_0_ends_all_with_3_and_its_reason(folder):
    few = settings("train.num_steps=4", "checkpoint.every_steps=2")
    hosts = Hosts(folder, "last", *SHORT, *few, count=2, devices=4, program=("-c", FAILING_COMMIT))
    assert hosts.ends() == [3, 3], hosts.everything()
    assert "error: checkpoint of step 4\n  was not saved: OSError: no rename" in hosts.said(0), hosts.everything()
    assert re.search(r"error: process 0 \(.*\) left: checkpoint of step 4\n  was not saved", hosts.said(1))
    assert committed_steps(folder / "last" / "checkpoints") == [2]
    first, second = (re.findall(r"vote \d+", hosts.said(i)) for i in (0, 1))
    assert first == second, "a vote that one process does not cast holds up the devices of the others"


SLOW_SEAL = """
import time
from jaxlm import train
from jaxlm.checkpoint import manifest
from jaxlm.config import Exit, Problem, UserError
from jaxlm.settings import run_main
seal, read = manifest.seal, train.Loop._read_pending
def slow(*args, **more):
    time.sleep(5)
    seal(*args, **more)
def diverge(self):
    if self._pending and self._pending[0] == 3:
        raise UserError(Problem("step 3", "diverged", "lower it"), exit_code=Exit.DIVERGED)
    read(self)
manifest.seal, train.Loop._read_pending = slow, diverge
run_main(train.main)
"""


@pytest.mark.nightly
def test_an_error_of_all_lets_process_0_commit_what_is_in_flight_and_have_its_own_words(folder):
    every = settings("train.num_steps=50", "checkpoint.every_steps=2")
    hosts = Hosts(folder, "sealed", *SHORT, *every, count=2, devices=4, program=("-c", SLOW_SEAL))
    assert hosts.ends() == [4, 4], hosts.everything()
    assert committed_steps(folder / "sealed" / "checkpoints") == [2], hosts.everything()
    for i in (0, 1):
        assert "error: step 3\n  diverged\n  lower it" in hosts.said(i) and "left:" not in hosts.said(i), i


LATE_REHEARSAL = """
import os, threading, time
from jaxlm import compiled, train
from jaxlm.checkpoint import checksum
from jaxlm.settings import run_main
me, stack, rehearse = os.environ["JAX_PROCESS_ID"], checksum._stack, compiled.rehearse
def late_stack(sums):
    time.sleep(8 if me == "1" and threading.current_thread() is not threading.main_thread() else 0)
    return stack(sums)
def late_rehearsal(state):
    time.sleep(4 if me == "0" else 0)
    rehearse(state)
checksum._stack, compiled.rehearse = late_stack, late_rehearsal
run_main(train.main)
"""


@pytest.mark.nightly
def test_what_starts_in_the_background_meets_no_collective_of_the_start(folder):
    """One process sums its first checksums before it rehearses sdc_check_every, the other behind it."""
    few = settings("train.num_steps=2", "train.deterministic=true", "train.sdc_check_every=2")
    hosts = Hosts(folder, "order", *SHORT, *few, count=2, devices=4, program=("-c", LATE_REHEARSAL))
    assert hosts.ends(limit_s=90) == [0, 0], hosts.everything()


@pytest.mark.nightly
def test_a_pipeline_over_two_hosts_saves_what_one_host_resumes_on_any_mesh(folder):
    """Two hosts of two devices: model=2 inside a host, pipeline=2 across; then one host, without either."""
    layers = settings("model.num_layers=2", "model.vocab_multiple=4", "train.accumulate=2", "checkpoint.every_steps=4")
    across = settings("mesh.pipeline=2", "mesh.model=2", "mesh.data=1", "mesh.fsdp=1", "pipeline.microbatches=2")
    eight, twelve = settings("train.num_steps=8"), settings("train.num_steps=12")
    hosts = Hosts(folder, "across", *SHORT, *layers, *across, *eight, count=2, devices=2)
    assert hosts.ends() == [0, 0], hosts.everything()
    assert committed_steps(folder / "across" / "checkpoints") == [4, 8]
    assert checkpoint_command(["verify", str(folder / "across")]) == 0
    meshes = {
        "rows": ("data=-1", "fsdp=1"),
        "mixed": ("data=1", "fsdp=2", "model=2"),
        "unbroken": ("data=-1", "fsdp=1"),
    }
    for name, mesh in meshes.items():
        if name != "unbroken":
            shutil.copytree(folder / "across", folder / name)
        degrees = settings(*(f"mesh.{axis}" for axis in mesh))
        one = Hosts(folder, name, *SHORT, *layers, *twelve, *degrees, count=1, devices=4)
        assert one.ends() == [0] and ("resumes after step 8" in one.said(0)) == (name != "unbroken"), one.everything()
    hosts = Hosts(folder, "across", *SHORT, *layers, *across, *twelve, count=2, devices=2)
    assert hosts.ends() == [0, 0] and "resumes after step 8" in hosts.said(0), hosts.everything()
    wanted = losses(folder, "unbroken")
    for name in ("rows", "mixed", "across"):
        found = losses(folder, name)
        assert found.keys() == wanted.keys()
        assert max(abs(found[k] / wanted[k] - 1) for k in wanted) < 1e-5, name  # N5: another mesh
