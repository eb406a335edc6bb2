"""Settings say where they came from, and everything wrong is said at once, before a device is touched."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import generate
from jaxlm.checkpoint.manifest import Manifest
from jaxlm.config import UserError
from jaxlm.models.presets import PRESETS
from jaxlm.session import made_with
from jaxlm.settings import SCHEMA, flatten, from_values, keys_help, load_file, parsed, resolve, split_overrides, to_json

ROOT = Path(__file__).resolve().parent.parent
TEXT = {"data.path": "x.txt"}


def problems(tree=None, **overrides):
    with pytest.raises(UserError) as caught:
        resolve(tree or {}, overrides=TEXT | {k.replace("__", "."): v for k, v in overrides.items()}, presets=PRESETS)
    return {p.where: p for p in caught.value.problems}


def test_layers_are_default_preset_file_command_line_and_each_value_says_which():
    tree = {"model": {"preset": "gpt2-355m", "num_layers": 5}, "train": {"batch_size": 6}}
    r = resolve(
        tree, overrides=TEXT | {"train.batch_size": "4", "model.dtype": "bfloat16"}, presets=PRESETS, file="f.py"
    )
    assert (r.config.model.embed_dim, r.config.model.num_layers, r.config.train.batch_size) == (1024, 5, 4)
    want = {
        "model.embed_dim": "preset gpt2-355m",
        "model.num_layers": "file f.py",
        "train.batch_size": "command line",
        "model.mlp_dim": "derived",
        "model.norm_eps": "default",
    }
    assert {key: r.origin[key] for key in want} == want
    assert r.config.model.mlp_dim == 4096 and r.config.train.seq_len == 1024
    kept = json.loads(to_json(r, {"devices": 1}))["config"]
    assert from_values(dict(flatten(kept)), "a checkpoint") == r.config


def test_every_problem_is_listed_at_once_with_its_remedy():
    found = problems(
        {"model": {"num_headz": 3, "num_layers": 2.5}, "modle": {"x": 1}, "train": 7},
        optim__peak_lr="fast",
        model__preset="gpt2-125m",
        model__num_heads="7",
        train__accumulate="3",
        model__remat="attn_residul=keep",
        mesh__pipeline="0",
    )
    assert "model.num_heads" in found["model.num_headz=3"].remedy
    assert "is not int" in found["model.num_layers=2.5"].rule
    assert "no such setting" in found["modle.x=1"].rule and "no such setting" in found["train=7"].rule
    assert "is not float" in found["optim.peak_lr=fast"].rule
    assert "gpt2-124m" in found["model.preset=gpt2-125m"].remedy
    assert "6, 8" in found["model.num_heads=7"].remedy
    assert "train.batch_size=8" in found
    assert "attn_residual" in found["model.remat=attn_residul=keep"].remedy
    assert "mesh.pipeline=0" in found
    assert all(str(p).count("\n") == 2 for p in found.values())


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train.sed", "did you mean train.seed?"),
        ("optim.seed", "did you mean train.seed?"),
        ("optim.lr", "did you mean optim.peak_lr, optim.final_lr_frac?"),
        ("optim.flux", "see --help for every name"),
        ("model.x", "see --help for every name"),
    ],
)
def test_an_unknown_setting_is_told_of_those_that_are_near_and_of_no_other(key, remedy):
    assert problems(**{key.replace(".", "__"): "1"})[f"{key}=1"].remedy == remedy


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"model.rope_theta": "500"}, "model.rope_theta=500.0"),
        ({"optim.schedule": "constant", "optim.final_lr_frac": "0.2"}, "optim.final_lr_frac=0.2"),
        ({"optim.decay_steps": "10"}, "optim.decay_steps=10"),
        ({"optim.name": "lion", "optim.eps": "1e-6"}, "optim.eps=1e-06"),
        ({"data.eval": "held_out", "data.split": "0.9,0.1"}, "data.split=(0.9, 0.1)"),
        ({"model.remat": "mlp_gate=keep"}, "model.remat=mlp_gate=keep"),
        ({"train.sdc_check_every": "10"}, "train.sdc_check_every=10"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(overrides, where):
    assert where in problems(**{k.replace(".", "__"): v for k, v in overrides.items()})


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"data.path": ""}, "data.path=()"),
        ({"data.train": "set"}, "data.path=('x.txt',)"),
        ({"train.seq_len": "2048"}, "train.seq_len=2048"),
        ({"model.position": "rope", "model.head_dim": "7"}, "model.head_dim=7"),
        ({"model.num_kv_heads": "5"}, "model.num_kv_heads=5"),
        ({"optim.peak_lr": "inf"}, "optim.peak_lr=inf"),
        ({"model.norm_eps": "-1"}, "model.norm_eps=-1.0"),
        ({"train.seed": str(2**63)}, f"train.seed={2**63}"),
        ({"optim.final_lr_frac": "1.01"}, "optim.final_lr_frac=1.01"),
        ({"model.dropout": "1"}, "model.dropout=1.0"),
        ({"mesh.fsdp": "-1"}, "mesh.fsdp=-1"),
        ({"mesh.context_method": "ring"}, "mesh.context_method=ring"),
        ({"optim.schedule": "inverse_sqrt"}, "optim.warmup_steps=0"),
        ({"optim.decay_roles": "kernels"}, "optim.decay_roles=('kernels',)"),
        ({"data.split": "1"}, "data.split=(1.0,)"),
        ({"data.split": "1,0", "train.eval_every": "5"}, "train.eval_every=5"),
        ({"train.num_steps": "0"}, "train.num_steps=0"),
        ({"data.skip_steps": "7:3"}, "data.skip_steps=('7:3',)"),
        ({"data.skip_steps": "12"}, "data.skip_steps=('12',)"),
        ({"resume.allow": "optim.lr"}, "resume.allow=('optim.lr',)"),
        ({"train.watchdog_s": "-2"}, "train.watchdog_s=-2.0"),
    ],
)
def test_settings_that_can_not_be_are_refused(overrides, where):
    assert where in problems(**{k.replace(".", "__"): v for k, v in overrides.items()})


def test_the_command_line_is_parsed_by_type_and_never_run():
    assert parsed("1e6", int) == 10**6 and parsed("a, b", tuple[str, ...]) == ("a", "b")
    assert parsed("(0.5, 1)", tuple[float, ...]) == (0.5, 1.0) and parsed("no", bool) is False
    for text, kind in (("1.5", int), ("maybe", bool), ("(__import__('os'),)", tuple[str, ...])):
        with pytest.raises((ValueError, KeyError, TypeError)):
            parsed(text, kind)
    argv = ["--config", "f.py", "--config.log.tensorboard", "--config.train.seed", "3", "--config.a.b=x=y"]
    assert split_overrides(argv) == ({"log.tensorboard": "true", "train.seed": "3", "a.b": "x=y"}, ["--config", "f.py"])


def test_help_has_every_key_with_type_default_and_a_line():
    text = keys_help()
    for key, (_, field) in SCHEMA.items():
        assert f"--config.{key}=" in text and field.metadata["doc"] in text
    assert len(SCHEMA) < 120


def test_help_of_a_tool_has_every_default(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for flag, default in (("--max-new-tokens", "200"), ("--temperature", "0.8"), ("--top-k", "50"), ("--seed", "0")):
        assert re.search(rf"{flag} [A-Z_]+ [^-]*default: {default}\)", said.partition("options:")[2]), flag


def test_broken_config_files_are_explained(tmp_path):
    (tmp_path / "bad.py").write_text("def get_config(): return 1/0")
    (tmp_path / "none.py").write_text("x = 1")
    (tmp_path / "number.py").write_text("def get_config(): return 3")
    for name, part in (
        ("bad", "ZeroDivisionError"),
        ("none", "get_config"),
        ("number", "int"),
        ("badd", "did you mean"),
    ):
        with pytest.raises(UserError, match=part):
            load_file(f"{tmp_path}/{name}.py")
    with pytest.raises(UserError, match="cpu or gpu"):
        load_file(f"{ROOT}/configs/shakespeare.py:tpu")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_resolves_in_every_size(path):
    names = runpy.run_path(str(path))
    sizes = (
        names.get("MICROBATCH")
        or names.get("TABLE")
        or names.get("PEAK_LR")
        or {"shakespeare": ["cpu", "gpu"]}.get(path.stem)
    )
    for size in sizes or [""]:
        overrides = {} if path.stem == "quickstart" else TEXT
        r = resolve(load_file(f"{path}:{size}" if size else str(path)), overrides=overrides, presets=PRESETS)
        assert r.config.model.preset is None or size in r.config.model.preset


def test_config_errors_exit_2_before_a_device_is_touched():
    # a platform that does not exist: any use of jax's devices would fail with another message and code
    command = [sys.executable, "-m", "jaxlm.train", "--config", f"{ROOT}/configs/quickstart.py", "--config.train.sed=1"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "none"}, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean train.seed" in done.stderr and "Traceback" not in done.stderr


def test_a_setting_that_there_is_no_more_is_said_and_the_others_are_read():
    said, config = [], {"train": {"seed": 5, "old_name": 1}, "optim": {"decay_roles": ["kernel"]}}
    found = made_with(Manifest(3, 0.0, {}, {"config": config}, {}), said.append)
    assert found.train.seed == 5 and found.optim.decay_roles == ("kernel",)
    assert said == ["step 3 was made with train.old_name=1, which is no setting any more"]
