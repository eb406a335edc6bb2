"""A run that is stopped at any moment and started again is the run that never stopped."""

import contextlib
import dataclasses
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import STEPS, TIMES, assert_bitwise, command, final_state, make_folder, numbers, settings, start, stop_at

from jaxlm import evaluate, generate, train
from jaxlm.checkpoint import __main__ as checkpoint
from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.restore import restore_latest_good
from jaxlm.config import UserError
from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.metrics.ledger import read_account
from jaxlm.metrics.writer import read_metrics
from jaxlm.session import load_config, open_program
from jaxlm.step import abstract_state, init_state, make_program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unbroken(folder):
    assert train.main(command(folder, "unbroken")) == 0
    return folder / "unbroken"


def test_a_run_learns_and_leaves_what_its_user_reads(unbroken, capsys):
    records = read_metrics(unbroken)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert set(steps[0]) >= {"step", "loss", "grad_norm", "lr", "tokens", "mfu"} | TIMES
    assert all(r["data_wait_s"] <= r["step_time_s"] for r in steps)  # a wait counts where it happens
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert [r["step"] for r in records if "eval_loss" in r] == [6, 12, 18, 24]
    saved = json.loads((unbroken / "config.json").read_text())
    assert saved["from"]["model.vocab_size"] == "derived" and saved["config"]["model"]["vocab_size"] == 257
    layout = (unbroken / "layout.txt").read_text()
    assert "all-gather fsdp" in " ".join(layout.split()) and "layers.*.attn.query x2" in layout
    for name in ("report.md", "loss.png", "summary.json"):
        assert (unbroken / name).stat().st_size > 500
    assert sorted(int(p.name) for p in (unbroken / "checkpoints").iterdir()) == [18, 21, 24]
    kept = manifest.read(unbroken / "checkpoints" / "24").metadata
    assert kept["metrics"] == {"eval_loss": records[-1]["eval_loss"]} and kept["mesh"] == {"data": 4, "fsdp": 2}
    assert kept["config"]["model"]["vocab_size"] == 257 and kept["versions"]["jax"] == jax.__version__
    assert manifest.read(unbroken / "checkpoints" / "21").metrics == {}


def test_a_pipeline_saves_samples_and_goes_on_without_one(folder, capsys):
    """With repeats, moments in host memory, and a width that fsdp could not split over the stages' devices as well."""
    shape = ("model.num_layers=4", "model.embed_dim=36", "model.vocab_multiple=4", "checkpoint.every_steps=2")
    more = [
        f"--config.{key}" for key in (*shape, "optim.schedule=constant", "optim.warmup_steps=0", "optim.peak_lr=2e-3")
    ]
    pipe = ("mesh.pipeline=-1", "pipeline.microbatches=4", "pipeline.repeats=2", "train.accumulate=1")
    staged = [f"--config.{key}" for key in ("mesh.data=1", "mesh.fsdp=4", *pipe, "optim.offload=true")]
    plain = [f"--config.{key}" for key in ("mesh.data=2", "mesh.fsdp=2", "mesh.model=2", "train.accumulate=4")]
    for steps, mesh in (("4", staged), ("8", plain)):
        assert train.main(command(folder, "staged", *more, *mesh, f"--config.train.num_steps={steps}")) == 0
    out = capsys.readouterr().out
    assert "1f1b, 2 stages, 2 repeats of 1 layers, 4 microbatches" in out and out.count("the model's writing") == 2
    assert (
        train.main(
            command(folder, "plain", *more, *plain, "--config.train.num_steps=8", "--config.log.sample_tokens=0")
        )
        == 0
    )
    losses = [[r["loss"] for r in read_metrics(folder / name) if "loss" in r] for name in ("staged", "plain")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)  # dropout and all: masks do not depend on the mesh
    # tools run on whatever devices there are: three, for a run of eight
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_backend_optimization_level=0"}
    args = [sys.executable, "-m", "jaxlm.evaluate", "--workdir", str(folder / "staged"), "--json"]
    found = json.loads(subprocess.run(args, env=env, capture_output=True, check=True, text=True).stdout)
    evaluated = [r["eval_loss"] for r in read_metrics(folder / "staged") if "eval_loss" in r]
    assert found["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-5)


@pytest.mark.parametrize(
    "moment", [0.3, pytest.param(0.0, marks=pytest.mark.nightly), pytest.param(0.7, marks=pytest.mark.nightly)]
)
def test_killed_at_a_random_moment_and_rerun_equals_the_unbroken_run_to_the_last_bit(folder, unbroken, moment):
    name = f"killed-{moment}"
    child = start(folder, name)
    for line in child.stdout:
        if "checkpoint committed" in line:
            break
    time.sleep(moment * random.random())
    child.kill()
    child.wait()
    assert 0 < len(read_metrics(folder / name)) < len(read_metrics(unbroken))
    assert train.main(command(folder, name)) == 0
    assert numbers(folder / name) == numbers(unbroken)
    assert_bitwise(final_state(folder / name), final_state(unbroken))


def test_a_run_whose_newest_checkpoint_rotted_goes_back_one_and_ends_as_the_unbroken_run(folder, unbroken, capsys):
    shutil.copytree(unbroken, folder / "rotten")
    newest = folder / "rotten" / "checkpoints" / str(STEPS)
    file = max((entry for entry in newest.rglob("*") if entry.is_file()), key=lambda entry: entry.stat().st_size)
    rotten = bytearray(file.read_bytes())
    rotten[len(rotten) // 2] ^= 4
    file.write_bytes(rotten)
    assert train.main(command(folder, "rotten")) == 0
    said = capsys.readouterr().out
    assert f"resumes after step {STEPS - 3}" in said
    assert f"step {STEPS}: eval loss {np.float32(read_metrics(unbroken)[-1]['eval_loss'])!s} on " in said
    assert (
        f"\nWARNING: the checkpoint of step {STEPS} is passed over\n  {newest}/" in said
    )  # as the program's other lines
    assert numbers(folder / "rotten") == numbers(unbroken)
    assert_bitwise(final_state(folder / "rotten"), final_state(unbroken))
    assert (folder / "rotten" / "checkpoints" / "abandoned" / str(STEPS)).is_dir()


@pytest.mark.nightly
def test_the_quickstart_killed_at_a_random_moment_equals_its_unbroken_run_to_the_last_bit(tmp_path):
    config = ["--config", str(Path(__file__).parents[1] / "configs" / "quickstart.py"), "--config.train.num_steps=200"]
    config += ["--config.train.eval_every=40", "--config.checkpoint.every_steps=20", "--config.mesh.data=1"]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for name, patience_s in (("whole", None), ("killed", 20 * random.random()), ("killed", None)):
        args = [sys.executable, "-m", "jaxlm.train", *config, "--workdir", str(tmp_path / name)]
        child = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if patience_s is None:
            said, _ = child.communicate()
            assert child.returncode == 0, said
        else:
            time.sleep(8 + patience_s)
            child.kill()
            child.wait()
            assert 0 < len(read_metrics(tmp_path / name)) < 205
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_sigterm_saves_within_two_steps_and_the_rerun_loses_none(folder, unbroken):
    child = start(folder, "terminated", "--config.checkpoint.every_steps=0")
    seen = []
    for line in child.stdout:
        seen.append(line)
        if line.startswith("step 2/"):
            child.send_signal(signal.SIGTERM)
    assert child.wait() == 75, "".join(seen)
    last = read_metrics(folder / "terminated")[-1]["step"]
    asked = next(i for i, line in enumerate(seen) if line.startswith("SIGTERM: saving"))
    assert sum(line.startswith("step ") and "/" in line for line in seen[asked:]) <= 2
    assert 2 <= last < STEPS and any(f"step {last}: checkpoint committed" in line for line in seen)
    assert train.main(command(folder, "terminated", "--config.checkpoint.every_steps=0")) == 0
    assert numbers(folder / "terminated") == numbers(unbroken)


def test_ctrl_c_on_a_terminal_saves_and_leaves_with_130_and_no_traceback(folder, unbroken):
    terminal, screen = pty.openpty()
    login = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    args = ["-m", "jaxlm.train", *command(folder, "interrupted", "--config.checkpoint.every_steps=0")]
    child = subprocess.Popen([sys.executable, "-c", login, *args], stdin=screen, stdout=screen, stderr=screen)
    os.close(screen)
    seen, pressed = b"", False
    with contextlib.suppress(OSError):  # how a terminal says that its last process is gone
        while part := os.read(terminal, 4096):
            seen += part
            if re.search(rb" ([2-9]|1\d)/24 ", seen) and not pressed:
                pressed = os.write(terminal, b"\x03") == 1
    os.close(terminal)
    assert child.wait() == 130 and b"SIGINT: saving after this step" in seen and b"Traceback" not in seen, seen.decode()
    last = read_metrics(folder / "interrupted")[-1]["step"]
    assert 2 <= last < STEPS and f"step {last}: checkpoint committed".encode() in seen
    assert train.main(command(folder, "interrupted", "--config.checkpoint.every_steps=0")) == 0
    assert numbers(folder / "interrupted") == numbers(unbroken)


def test_a_checkpoint_restores_bitwise_under_the_other_layer_layout(folder, unbroken):
    program = open_program(tiny.replace(load_config(unbroken), model=dict(scan_layers=True)))
    restored = restore_latest_good(unbroken / "checkpoints", abstract_state(program))
    assert_bitwise(restored.state, final_state(unbroken))
    # two halves, the second scanned: whole and killed-and-resumed are the same run
    for name, stops in (("whole", [12, STEPS]), ("broken", [12, 18, STEPS])):
        for stop in stops:
            scan = [] if stop == 12 else ["--config.model.scan_layers=true"]
            stop_at(folder, name, stop, *scan, of=STEPS)
    assert numbers(folder / "whole") == numbers(folder / "broken")
    assert_bitwise(final_state(folder / "whole"), final_state(folder / "broken"))
    a, b = ([r["loss"] for r in read_metrics(w) if "loss" in r] for w in (folder / "whole", unbroken))
    np.testing.assert_allclose(a, b, rtol=1e-4)  # f32 reordering, grown over 12 steps at a rate of about 2 a step


def test_five_bad_steps_in_a_row_end_the_run_with_exit_4_and_no_bad_state(folder):
    child = start(
        folder,
        "diverged",
        "--config.optim.peak_lr=1e38",
        "--config.optim.warmup_steps=0",
        "--config.checkpoint.every_steps=1",
    )
    out, _ = child.communicate()
    assert (
        child.returncode == 4
        and "Traceback" not in out
        and "5 updates in a row" in out
        and "it read samples 80..95: corpus token" in out
    ), out
    state = final_state(folder / "diverged")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_metrics_of_a_step_are_read_after_the_next_is_dispatched(folder, monkeypatch):
    order = []
    get, build = jax.device_get, train.build

    def recording_build(program, state, loader, **more):
        with pytest.MonkeyPatch.context() as patch:  # compiling needs the shapes of batches, and reads none
            patch.setattr(loader, "batch", lambda *_, **__: order.append("read"))
            compiled = build(program, state, loader, **more)

        def step(state, batch):
            order.append("dispatch")
            with pytest.raises(Exception, match="Disallowed"):  # the loop runs where silent transfers are errors
                jnp.add(jnp.ones(2), np.ones(2))
            return compiled.step(state, batch)

        return dataclasses.replace(compiled, step=step)

    monkeypatch.setattr(train, "build", recording_build)
    monkeypatch.setattr(
        jax, "device_get", lambda x: (order.append("read") if isinstance(x, train.StepMetrics) else None, get(x))[1]
    )
    quiet = [
        "--config.train.num_steps=5",
        "--config.checkpoint.every_steps=0",
        "--config.train.eval_every=0",
        "--config.log.sample_tokens=0",
    ]
    assert train.main(command(folder, "order", *quiet)) == 0
    assert order == ["dispatch", *["dispatch", "read"] * 4, "read"]


def test_evaluate_and_generate_read_a_workdir(folder, unbroken, capsys):
    assert evaluate.main(["--workdir", str(unbroken), "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert held_out["step"] == STEPS and held_out["eval_loss"] == read_metrics(unbroken)[-1]["eval_loss"] < 3
    assert evaluate.main(["--workdir", str(unbroken), "--input", str(folder / "text.txt"), "--step", "18"]) == 0
    assert re.match(r"step 18: eval loss \d\.\d{1,8} nats a token", capsys.readouterr().out)
    half = str(folder / "half")
    assert checkpoint.main(["export", str(unbroken), "--output", half, "--step", "18"]) == 0
    capsys.readouterr()
    losses = []
    for workdir in (str(unbroken), half):
        evaluate.main(["--workdir", workdir, "--input", str(folder / "text.txt"), "--json", "--step", "18"])
        losses.append(json.loads(capsys.readouterr().out)["eval_loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=2**-8)  # bfloat16 keeps 8 bits of a parameter
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            generate.main(["--workdir", str(unbroken), "--prompt", "the ", "--max-new-tokens", "60", "--seed", seed])
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("the ")


def test_greedy_generation_takes_the_likeliest_token_of_the_context_it_has():
    program = make_program(tiny.config("gpt2"), tiny.layout())  # context 16; large random weights: varied predictions
    params, prompt = init_state(program).params, [5, 17, 3]
    ids = prompt + generate.generate(program, params, prompt, max_new_tokens=40, temperature=0)
    logits = jax.jit(lambda params, tokens: program.model(params).logits(program.model(params).hidden(tokens)))
    assert len(set(ids)) > 5
    for i in range(len(prompt), len(ids)):
        seen = ids[max(0, i - 16) : i]
        context = np.zeros((1, 16), np.int32)
        context[0, : len(seen)] = seen
        assert int(np.argmax(logits(params, context)[0, len(seen) - 1, :61])) == ids[i]
    split = make_program(tiny.config("gpt2"), tiny.layout(8, data=2, context=2, model=2))
    params = init_state(split).params
    assert prompt + generate.generate(split, params, prompt, max_new_tokens=40, temperature=0) == ids


def test_relative_workdirs_work_everywhere(unbroken, monkeypatch, capsys):
    monkeypatch.chdir(unbroken.parent)
    (unbroken / "report.md").unlink()  # as if killed between the last save and the report
    assert evaluate.main(["--workdir", "unbroken", "--json"]) == 0
    assert generate.main(["--workdir", "unbroken", "--prompt", "the", "--max-new-tokens", "2"]) == 0
    assert train.main(["--config", "tiny.py", "--workdir", "unbroken"]) == 0
    assert f"already at step {STEPS}" in capsys.readouterr().out
    assert (unbroken / "report.md").is_file()


@pytest.mark.parametrize(
    ("overrides", "row", "remedy"),
    [
        (["model.embed_dim=64"], "model.embed_dim  32     64", "another --workdir"),
        (["optim.name=lion"], "optim.name  adamw  lion", "another --workdir"),
        (["model.num_layers=3"], "model.num_layers  2      3", "another --workdir"),
        (["model.vocab_size=300"], "model.vocab_size  257    300", "another --workdir"),
        (["train.accumulate=1"], "train.accumulate  2      1", "resume.allow=train.accumulate"),  # and dropout
        (["train.batch_size=32"], "train.batch_size  16     32", "resume.allow=train.batch_size"),
        (["train.seed=1"], "train.seed  0      1", "resume.allow=train.seed"),
        (["optim.peak_lr=1", "optim.beta1=0"], "optim.peak_lr  0.01   1.0", "resume.allow=optim.peak_lr,optim.beta1"),
        (["train.num_steps=30"], "train.num_steps  24     30", "resume.allow=train.num_steps"),
        (["data.skip_steps=20:20"], "data.skip_steps  nothing  20:20", "resume.allow=data.skip_steps"),
        (["optim.clip_norm=2", "resume.allow=optim.peak_lr"], "optim.clip_norm", "allow=optim.peak_lr,optim.clip_norm"),
        (["data.path=OTHER"], "data.path", "resume.allow=data.path"),
    ],
)
def test_a_changed_run_is_refused_by_table_before_anything_changes(folder, unbroken, overrides, row, remedy):
    (folder / "other.txt").write_text("something else entirely, " * 200)
    before = {
        p: p.read_bytes() for p in (*(unbroken / "data").iterdir(), unbroken / "metrics.jsonl", unbroken / "time.jsonl")
    }
    more = settings(*(text.replace("OTHER", str(folder / "other.txt")) for text in overrides))
    (unbroken / "config.json").rename(folder / "config.json")  # what counts is what the checkpoint says
    try:
        with pytest.raises(UserError, match="its checkpoint of step 24 was made with") as caught:
            train.main(command(folder, "unbroken", *more))
    finally:
        (folder / "config.json").rename(unbroken / "config.json")
    assert "setting" in str(caught.value) and row in str(caught.value) and remedy in str(caught.value)
    assert before == {p: p.read_bytes() for p in before}


def test_a_signal_after_the_loop_has_looked_still_saves(folder, monkeypatch):
    announce = train.Loop._announce_commits

    def late(self):
        announce(self)
        if self._pending and self._pending[0] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Loop, "_announce_commits", late)
    assert train.main(command(folder, "late", "--config.checkpoint.every_steps=0")) == 75
    assert [entry.name for entry in (folder / "late" / "checkpoints").iterdir()] == ["4"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.peak_lr=1", "resume.allow=optim.peak_lr"],  # insisted on
        ["data.skip_steps=25:30"],  # batches that are still to come
        ["log.every_steps=2", "train.skip_spikes=6", "checkpoint.keep=4"],  # changes no number of a step
    ],
)
def test_what_is_allowed_or_changes_nothing_is_noted_and_goes_on(folder, unbroken, overrides, capsys):
    assert train.main(command(folder, "unbroken", *settings(*overrides))) == 0
    said = capsys.readouterr().out
    for text in overrides:
        key = text.partition("=")[0]
        assert (f"changed since step 24: {key} " in said) == (key != "resume.allow")
    assert f"already at step {STEPS}" in said and read_account(unbroken).starts == 1


def test_a_token_set_that_changed_under_its_name_is_refused(folder, unbroken, capsys):
    corpus = unbroken / "data" / "corpus.bin"
    whole = corpus.read_bytes()
    try:
        corpus.write_bytes(whole[:-2] + b"\x07\x00")
        with pytest.raises(UserError, match="the token sets are not those") as caught:
            train.main(command(folder, "unbroken"))
        assert "0:corpus" in str(caught.value) and "resume.allow=data.path" in str(caught.value)
        assert train.main(command(folder, "unbroken", *settings("resume.allow=data.path"))) == 0
        assert "the token sets are not those of step 24:" in capsys.readouterr().out
    finally:
        corpus.write_bytes(whole)
    assert train.main(command(folder, "unbroken")) == 0


def test_a_signal_before_the_first_step_leaves_with_its_code(folder, monkeypatch):
    make = train.make_meter
    monkeypatch.setattr(train, "make_meter", lambda facts: (signal.raise_signal(signal.SIGTERM), make(facts))[1])
    assert train.main(command(folder, "early")) == 75
    assert not read_metrics(folder / "early")


def test_two_runs_can_not_share_a_workdir(folder, unbroken):
    with RunLock(unbroken), pytest.raises(UserError, match="another process") as caught:
        train.main(command(folder, "unbroken"))
    assert caught.value.exit_code == 3


def test_a_bad_token_keeps_what_was_trained_and_names_its_place(folder, capsys):
    set_prefix = folder / "set"
    with IndexedWriter(set_prefix, dtype=np.uint16) as writer:
        writer.add_document(np.r_[np.random.default_rng(0).integers(0, 257, 5000), 999, [7] * 200].astype(np.uint16))
    more = [
        "--config.data.path=",
        f"--config.data.train={set_prefix}",
        "--config.data.split=1,0",
        "--config.train.eval_every=0",
    ]
    with pytest.raises(UserError, match="token 5000"):
        train.main(command(folder, "bad", *more, "--config.checkpoint.every_steps=0"))
    last = read_metrics(folder / "bad")[-1]["step"]
    assert 0 < last < STEPS and f"step {last}: checkpoint committed" in capsys.readouterr().out
    assert (folder / "bad" / "report.md").is_file()


@pytest.mark.parametrize(
    ("tool", "argv", "part", "code"),
    [
        (train, ["--confg", "x.py"], "--config", 2),
        (train, ["--config", "configs/none.py"], "no file", 2),
        (generate, ["--workdir", "/nowhere"], "not a run", 2),
        (evaluate, ["--workdir", "/", "--json"], "has no checkpoint", 3),
    ],
)
def test_mistakes_are_three_lines(tool, argv, part, code):
    with pytest.raises(UserError, match=part) as caught:
        tool.main(argv)
    assert caught.value.exit_code == code


def test_a_run_told_to_leave_saves_before_it_evaluates_and_its_next_start_makes_that_up(folder, unbroken, monkeypatch):
    order, evaluate_, save = [], train.Loop._evaluate, train.Loop._save
    monkeypatch.setattr(
        train.Loop, "_evaluate", lambda self, *a: (order.append(("evaluate", a[0])), evaluate_(self, *a))
    )
    monkeypatch.setattr(train.Loop, "_save", lambda self, *a: (order.append(("save", a[0])), save(self, *a)))
    step = train.Loop._step

    def stopping(self, number, state, batch):
        if number == 6:  # an evaluation is due after it
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, state, batch)

    monkeypatch.setattr(train.Loop, "_step", stopping)
    assert train.main(command(folder, "leaving", "--config.checkpoint.every_steps=0")) == 75 and order == [("save", 6)]
    monkeypatch.setattr(train.Loop, "_step", step)
    assert train.main(command(folder, "leaving", "--config.checkpoint.every_steps=0")) == 0
    assert order[1] == ("evaluate", 6) and numbers(folder / "leaving") == numbers(unbroken)


def test_token_sets_are_known_by_what_they_hold_and_not_by_where_they_lie(folder, unbroken, capsys):
    prefix, few = unbroken / "data" / "corpus", ["data.path=", "data.tokenizer=bytes", "train.num_steps=3"]
    few += ["log.sample_tokens=0", "optim.schedule=constant", "optim.warmup_steps=0", "train.eval_every=0"]

    def run(*more):
        return train.main(command(folder, "cut", *settings(*few, *more)))

    assert run(f"data.train={prefix}") == 0
    for ending in (".bin", ".idx"):
        shutil.copy(f"{prefix}{ending}", folder / f"moved{ending}")
    capsys.readouterr()
    assert run(f"data.train={folder}/moved") == 0
    assert "already at step 3" in (said := capsys.readouterr().out) and "not those" not in said
    with IndexedWriter(folder / "grown", dtype=np.uint16) as writer:
        writer.add_document(IndexedDataset(str(prefix)).tokens)
        writer.add_document(np.array([1, 2, 3], np.uint16))
    for other in (f"{folder}/grown", f"{prefix},{folder}/grown", f"2:{prefix}"):
        with pytest.raises(UserError, match="the token sets are not those that its checkpoint of step 3") as caught:
            run(f"data.train={other}")
        assert "resume.allow=data.train" in str(caught.value) and other in str(caught.value)
    with pytest.raises(UserError, match="data.eval"):  # then all of the set would be trained on
        run(f"data.train={prefix}", "train.num_steps=6", f"data.eval={prefix}")


def test_what_does_not_fit_the_mesh_is_said_before_data_are_read(tmp_path):
    folder = make_folder(tmp_path)
    heads = ("mesh.model=4", "mesh.fsdp=2", "mesh.data=1", "model.num_heads=4", "model.num_kv_heads=2")
    layers = ("mesh.pipeline=2", "mesh.data=4", "mesh.fsdp=1", "pipeline.stage_layers=1,7")
    for wrong, said in ((heads, "model.num_kv_heads"), (layers, "does not add up")):
        with pytest.raises(UserError, match=said):
            train.main(command(folder, "refused", *settings(*wrong)))
    assert not (folder / "refused" / "data").exists()
