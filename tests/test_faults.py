"""What a run does when something breaks under it: rows, numbers, devices, disks, rights, patience."""

import contextlib
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import command, final_checkpoint, make_folder, settings, start

from jaxlm import train
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.lock import RunLock
from jaxlm.config import UserError
from jaxlm.data.loader import Loader
from jaxlm.guards import Watchdog
from jaxlm.metrics.ledger import read_account
from jaxlm.metrics.writer import read_metrics
from jaxlm.session import AHEAD

TESTS = Path(__file__).parent
# Eight steps of a smaller model, one compiled program for the whole file.
SHORT = settings(
    "train.num_steps=8", "train.eval_every=0", "checkpoint.every_steps=4", "log.sample_tokens=0", "optim.warmup_steps=0",
    "model.num_layers=1", "model.dropout=0", "train.accumulate=1", "mesh.data=2", "mesh.fsdp=-1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("faults"))


def poisoned(monkeypatch, *steps):
    """The rows of these steps, numbered as logs do, count for a number that is none."""
    batch = Loader.batch

    def poison(self, step, **rows):
        made = batch(self, step, **rows)
        return made._replace(weights=made.weights * np.float32(np.nan)) if step + 1 in steps else made

    monkeypatch.setattr(Loader, "batch", poison)


def test_a_poisoned_batch_is_dropped_counted_and_named(folder, monkeypatch, capsys):
    poisoned(monkeypatch, 3)
    assert train.main(command(folder, "poisoned", *SHORT)) == 0
    said = capsys.readouterr().out
    assert "step 3: not finite: loss nan, gradient norm nan; update dropped (1 in a row)" in said
    assert "  it read samples 32..47: corpus token" in said
    records = [r for r in read_metrics(folder / "poisoned") if "loss" in r]
    assert [r.get("skipped") for r in records] == [None, None, 1, 1, 1, 1, 1, 1] and records[2]["first_sample"] == 32
    saved = final_checkpoint(folder / "poisoned")
    assert int(saved.state.skipped) == 1 and saved.step == 8


def test_parameters_that_an_update_made_infinite_are_not_saved(folder):
    wild = settings("optim.peak_lr=3e38", "optim.weight_decay=1e4", "checkpoint.every_steps=1")
    with pytest.raises(UserError, match="infinite or not a number") as caught:
        train.main(command(folder, "wild", *SHORT, *wild))
    assert caught.value.exit_code == 4 and committed_steps(folder / "wild" / "checkpoints") == []


def test_a_run_that_lost_its_folder_leaves_before_it_writes_another_line(folder, monkeypatch):
    step, workdir = train.Loop._step, folder / "taken"
    with contextlib.ExitStack() as other:

        def losing(self, number, state, batch):
            if number == 4:
                other.enter_context(RunLock(workdir, force=True))
                (workdir / "metrics.jsonl").write_text('{"step": 1, "of": "the other run"}\n')
            return step(self, number, state, batch)

        monkeypatch.setattr(train.Loop, "_step", losing)
        with pytest.raises(UserError, match="was taken over by .*: this run writes nothing more") as caught:
            train.main(command(folder, "taken", *SHORT))
        assert caught.value.exit_code == 3 and committed_steps(workdir / "checkpoints") == []
        assert read_metrics(workdir) == [{"step": 1, "of": "the other run"}]
        assert not (workdir / "report.md").exists()


def test_once_it_steps_a_run_compiles_nothing_more(folder, monkeypatch):
    compiled, where, run = Counter(), ["start"], train.Loop.run
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **more: compiled.update([where[-1]] if "backend_compile" in event else [])
    )

    def looped(self, *args, **more):
        where.append("loop")
        ended = run(self, *args, **more)
        where.append("end")
        return ended

    monkeypatch.setattr(train.Loop, "run", looped)
    checks = settings(
        "train.deterministic=true", "train.sdc_check_every=3", "train.eval_every=4", "train.skip_spikes=6"
    )
    assert train.main(command(folder, "steady", *SHORT, *checks)) == 0
    assert compiled["start"] > 0 == compiled["loop"]  # of saves, evaluations, two runs of a step compared


def test_a_checkpoint_says_what_it_was_made_with_and_an_evaluation_that_it_goes_on(folder, monkeypatch):
    heard, expect = [], Watchdog.expect
    monkeypatch.setattr(Watchdog, "expect", lambda self, phase: (heard.append(phase), expect(self, phase))[1])
    assert train.main(command(folder, "whole", *SHORT, *settings("data.split=0.5,0.5"))) == 0
    batches = 9414 // 32 // 16 + 1  # of the held-out half
    assert heard.count("evaluate") == 1 + batches - AHEAD  # the watchdog starts anew with each that was read
    made_with = final_checkpoint(folder / "whole").metadata
    assert made_with["config"]["optim"]["peak_lr"] == 1e-2 and made_with["tokens"] == 8 * 16 * 32
    assert set(made_with["versions"]) >= {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxlm"}
    assert made_with["mesh"] == {"data": 2, "fsdp": 4} and "uint16 tokens, " in made_with["data"]["0:corpus"]
    report = (folder / "whole" / "report.md").read_text()
    assert "## Where the time went" in report and "steps that count" in report
    account = read_account(folder / "whole")
    assert account.starts == 1 and 0 < account.spent_s["compile"] < account.wall_s and account.spent_s["save"] > 0
    assert account.spent_s["restore"] == 0  # there was nothing to restore


# A run whose device never answers after step 5, or fails in it.
CHILD = """
import dataclasses, sys, time
import jax
from jaxlm import train
from jaxlm.settings import run_main

build = train.build

def broken(*args, **more):
    compiled, calls = build(*args, **more), []
    def step(state, batch):
        calls.append(None)
        state, metrics = compiled.step(state, batch)
        if len(calls) == 5:
            with jax.transfer_guard("allow"):
                shape = jax.ShapeDtypeStruct((), "float32")
                metrics = metrics._replace(loss=jax.jit(lambda x: jax.pure_callback(answer, shape, x))(metrics.loss))
        return state, metrics
    return dataclasses.replace(compiled, step=step)

def answer(x):
    if sys.argv[1] == "hang":
        time.sleep(1000)
    raise RuntimeError("the chip is on fire")

how = sys.argv.pop(1)
sys.argv.insert(1, how)
train.build = broken
run_main(lambda argv: train.main(argv[1:]))
"""


def child(folder, how, workdir, *more):
    args = [sys.executable, "-c", CHILD, how, *command(folder, workdir, *SHORT, *more)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_device_that_never_answers_ends_the_run_with_124_and_stacks(folder):
    process = child(folder, "hang", "hung", *settings("train.watchdog_s=3"))
    _, errors = process.communicate(timeout=120)
    gone = time.time()
    assert process.returncode == 124, errors
    stacks = folder / "hung" / "stacks.txt"
    assert "_read_pending" in errors and "_read_pending" in stacks.read_text()
    (stuck_s,) = re.findall(r"no end of this step in (\d+) s", errors)
    assert 3 <= int(stuck_s) + gone - stacks.stat().st_mtime < 3 + 5  # the limit, and what is promised beyond it
    assert committed_steps(folder / "hung" / "checkpoints") == [4]


def test_the_first_error_is_printed_last_with_what_to_do(folder):
    process = child(folder, "fail", "failed")
    _, errors = process.communicate(timeout=120)
    lines = errors.rstrip().split("\n")
    assert process.returncode == 1 and "Traceback (most recent call last)" in errors
    assert (
        any("JaxRuntimeError" in line and "the chip is on fire" in line for line in lines)
        or "the chip is on fire" in lines[-3]
    )
    assert lines[-2].startswith("  steps that count, ") and lines[-2].endswith(" steps done")
    assert lines[-1] == "  the same command goes on from the newest checkpoint; if this comes again, report it"
    assert committed_steps(folder / "failed" / "checkpoints") == [4]  # the save in flight was waited for


def test_a_model_that_does_not_fit_is_told_what_to_lower(folder):
    huge = settings(
        "model.embed_dim=65536"
    )  # 64 GiB a matrix of the MLP; larger ones crash the CPU compiler of jax 0.12
    process = start(folder, "huge", *SHORT, *huge)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (2**36, 2**36))
    said, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in said, said
    error = said[said.index("error: ") :].rstrip().split("\n")
    assert len(error) == 3 and error[0].startswith("error: device memory, ") and "lower train.batch_size" in error[2]


NOBODY = """
import os, sys
from pathlib import Path
from jaxlm import train
from jaxlm.config import UserError
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for workdir in sys.argv[2:]:
    try:
        train.main(["--config", sys.argv[1], "--workdir", workdir])
    except UserError as e:
        print(e.exit_code, e)
"""


def test_a_folder_without_the_right_to_write_is_refused_before_anything_is_compiled():
    home = Path(tempfile.mkdtemp())  # where pytest's own folders are, nobody may look
    try:
        shutil.copy(Path(__file__).parents[1] / "configs" / "quickstart.py", home)
        for closed in ("a", "b/checkpoints"):
            (home / closed).mkdir(parents=True)
            (home / closed).chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.geteuid() == 0:
            for path in (home, *home.rglob("*")):
                os.chown(path, 65534, 65534)
        args = [sys.executable, "-c", NOBODY, f"{home}/quickstart.py", f"{home}/a", f"{home}/b"]
        done = subprocess.run(args, capture_output=True, text=True)
        errors = re.findall(r"^2 --workdir=(.*)\n  can't be written: \[Errno 13\] Permission denied", done.stdout, re.M)
        assert errors == [f"{home}/a", f"{home}/b"] and "compiled" not in done.stdout, done
    finally:
        for closed in home.rglob("*"):
            closed.chmod(0o700)
        shutil.rmtree(home)


def test_every_promise_of_the_documentation_names_tests_that_are_there():
    text = (TESTS.parent / "docs" / "reliability.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("|") and "`test" in row]
    assert len(rows) > 35
    for file, chosen in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)(?: -k (\w+|\"[^\"]+\"))?", "".join(rows)):
        (path,) = (p for p in (TESTS / file, TESTS / "checkpoint" / file) if p.is_file())
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.M)
        for part in chosen.strip('"').split(" or "):
            assert any(part in name for name in names), (file, part)
