"""python -m jaxlm.checkpoint says what there is, finds what is bad, and changes only what it was asked to change."""

import json
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import abstract
from test_damage import flip, kinds, offset_of

from jaxlm.checkpoint import __main__ as commands
from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.__main__ import COMMANDS, main
from jaxlm.checkpoint.layout import Retention
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.restore import restore, restore_latest_good
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import UserError

restore_params = partial(restore, step=None, part="params")

SAVED = {10: 3.0, 20: 2.5, 30: None, 40: 2.75}  # step: evaluation loss


def state(step):
    kernel = (jnp.arange(4096.0) * step).reshape(64, 64)
    return {
        "params": {"kernel": kernel, "ids": jnp.arange(8)},
        "mu": jnp.arange(1, 2049.0) * step,
        "step": jnp.int32(step),
    }


def metadata(step):
    config = {"optim": {"peak_lr": 0.1 / step}, "checkpoint": {"keep": 2, "keep_every": 0, "keep_best": 1}}
    metrics = {} if SAVED[step] is None else {"eval_loss": SAVED[step]}
    return {"config": config, "mesh": {"data": 2}, "versions": {"jaxlm": "0.1", "jax": "0.10"}, "metrics": metrics}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("commands") / "run"
    patched = pytest.MonkeyPatch()
    patched.setattr(manifest, "DIGEST_BELOW_BYTES", 4096)
    with CheckpointStore(workdir / "checkpoints", retention=Retention(9)) as store:
        for step in SAVED:
            store.save(step, state(step), metadata=metadata(step))
            store.wait()
    patched.undo()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def run(capsys, command, workdir, *more):
    code = main([command, str(workdir), *map(str, more)])
    return code, capsys.readouterr().out


def spoil(workdir, step, array="params"):
    path = workdir / "checkpoints" / str(step)
    file = kinds(path)["state/ocdbt.process_0/d/*"]
    flip(file, 8 * offset_of(state(step)["params"]["kernel"] if array == "params" else state(step)["mu"], file) + 30)
    return path


def test_list_says_what_there_is_and_why_it_is_kept(workdir, capsys):
    code, out = run(capsys, "list", workdir, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["step"] for row in rows] == [10, 20, 30, 40]
    assert [row["kept"] for row in rows] == [[], ["best"], ["newest"], ["newest"]]
    assert rows[1]["metrics"] == {"eval_loss": 2.5} and rows[1]["mesh"] == {"data": 2} and rows[1]["size_bytes"] > 16384
    (workdir / "checkpoints" / "30" / "step.json").write_text("{")
    capsys.readouterr()
    code, out = run(capsys, "list", workdir)
    lines = out.splitlines()
    assert code == 3 and lines[0].split() == [
        "step",
        "saved",
        "size",
        "metrics",
        "mesh",
        "versions",
        "kept",
    ]
    assert "eval_loss=2.5" in lines[2] and lines[2].endswith("jaxlm 0.1 jax 0.10  newest, best")
    assert lines[3].split() == ["30", "DAMAGED"] and "step.json: unreadable" in lines[5]


def test_verify_names_the_array_and_the_file_that_are_bad(workdir, capsys, monkeypatch):
    monkeypatch.setattr(commands, "BATCH_BYTES", 8192)  # the kernel alone has 16 kB: more than one batch
    assert run(capsys, "verify", workdir, "--json") == (
        0,
        json.dumps({str(step): [] for step in SAVED}, indent=1) + "\n",
    )
    path = spoil(workdir, 20)
    spoil(workdir, 20, "mu")
    (workdir / "checkpoints" / "30" / "state" / "manifest.ocdbt").unlink()
    code, out = run(capsys, "verify", workdir)
    assert code == 3 and out.splitlines() == [
        "step 10: sound",
        "step 20: DAMAGED",
        f"  {path}: checksum of mu differs from what was saved",
        f"  {path}: checksum of params.kernel differs from what was saved",
        "step 30: DAMAGED",
        f"  {workdir}/checkpoints/30/state/manifest.ocdbt: missing",
        "step 40: sound",
    ]
    monkeypatch.undo()
    array = next(file for kind, file in kinds(workdir / "checkpoints" / "40").items() if kind.endswith("process_0/d/*"))
    array.write_bytes(bytes(array.stat().st_size))  # the two that are small lie elsewhere
    said = run(capsys, "verify", workdir, "--steps", 40)[1].splitlines()
    assert [line.split(": ")[1].split(" can't")[0] for line in said[1:]] == ["mu", "params.kernel"], said


def test_diff_is_a_table_of_settings_and_arrays(workdir, capsys):
    code, out = run(capsys, "diff", workdir, "--steps", 10, 20, "--json")
    found = json.loads(out)
    assert code == 1 and found["settings"]["optim.peak_lr"] == [0.01, 0.005]
    kernel = {
        "name": "params.kernel",
        "one": "float32[64,64]",
        "other": "float32[64,64]",
        "largest": 40950.0,
        "relative": 1.0,
    }
    assert kernel in found["arrays"] and {array["name"] for array in found["arrays"]} == {"mu", "params.kernel", "step"}
    other = workdir.parent / "other"
    with CheckpointStore(other / "checkpoints") as store:
        store.save(40, state(40) | {"params": {"kernel": jnp.ones(3)}}, metadata=metadata(40))
    code, out = run(capsys, "diff", workdir, other)
    assert code == 1 and "0 settings and facts differ, 2 arrays" in out
    assert "params.kernel  float32[64,64]  float32[3]  -        -" in out and "params.ids     int32[8]        -" in out
    assert run(capsys, "diff", workdir, workdir)[0] == 0
    many = workdir.parent / "many"
    for seed in (1, 2):
        with CheckpointStore(many / "checkpoints") as store:
            store.save(seed, {f"{i}": jnp.full(2, 100.0 + seed * i) for i in range(30)}, metadata=metadata(40))
    lines = run(capsys, "diff", many)[1].splitlines()
    assert lines[-2] == "... and 9 arrays that differ less; --json has all" and lines[2].split()[0] == "29"


def test_an_export_is_the_parameters_alone_in_half_the_bytes_and_restores_as_parameters(workdir, capsys, tmp_path):
    (workdir / "data").mkdir()
    (workdir / "data" / "chars.json").write_text("{}")
    code, _ = run(capsys, "export", workdir, "--output", tmp_path / "out", "--step", 20)
    assert code == 0 and (tmp_path / "out" / "data" / "chars.json").read_text() == "{}"
    like = abstract(state(0)["params"])
    restored = restore_params(tmp_path / "out" / "checkpoints", like)
    kernel = state(20)["params"]["kernel"]
    assert restored.step == 20 and restored.metadata["export"]["dtype"] == "bfloat16"
    assert restored.state["kernel"].dtype == jnp.float32 and restored.state["ids"].tolist() == list(range(8))
    assert np.array_equal(restored.state["kernel"], kernel.astype(jnp.bfloat16).astype(jnp.float32))
    with pytest.raises(UserError, match=r"params.kernel  bfloat16\[64,64\]  float32\[64,64\]"):
        restore_latest_good(tmp_path / "out" / "checkpoints", abstract(state(0)))
    spoil(workdir, 10)
    with pytest.raises(UserError, match=r"checksum differs from what was saved: params.kernel"):
        main(["export", str(workdir), "--output", str(tmp_path / "bad"), "--step", "10"])


def test_prune_deletes_only_when_told_and_never_beside_a_run(workdir, capsys):
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert run(capsys, "prune", workdir) == (0, "would be deleted: 10 (--delete does)\n")
    assert run(capsys, "prune", workdir, "--keep", 1, "--keep-best", 0)[1].startswith("would be deleted: 10, 20, 30")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before
    with RunLock(workdir), pytest.raises(UserError, match="training here"):
        main(["prune", str(workdir), "--delete"])
    assert run(capsys, "prune", workdir, "--delete", "--keep-every", 20)[1] == "deleted: 10\n"
    assert run(capsys, "prune", workdir, "--delete", "--keep", 1)[1] == "deleted: 30\n"
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "40"]


def test_a_rewound_run_saves_the_later_steps_anew(workdir, capsys):
    directory = workdir / "checkpoints"
    with CheckpointStore(directory) as store, pytest.raises(UserError, match="jaxlm.checkpoint rewind"):
        store.save(30, state(30))
    assert run(capsys, "rewind", workdir, "--to", 20)[0] == 0
    with CheckpointStore(directory, retention=Retention(9)) as store:
        assert store.restore_latest_good(abstract(state(0))).step == 20
        assert store.save(30, state(31), metadata=metadata(30))
    assert restore_latest_good(directory, abstract(state(0))).state["step"] == 31
    moved = [
        restore_latest_good(directory / "abandoned", abstract(state(0))).step,
        (directory / "abandoned" / "30").is_dir(),
    ]
    assert moved == [40, True]
    assert (directory / "abandoned" / "notes.txt").read_text().count("rewound to step 20") == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_mistakes_are_three_lines_and_help_is_help(command, workdir, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "WORKDIR" in capsys.readouterr().out
    needs = {"export": ["--output", "x"], "rewind": ["--to", "1"]}.get(command, [])
    with pytest.raises(UserError, match="holds no checkpoint") as error:
        main([command, str(tmp_path / "nothing"), *needs])
    assert error.value.exit_code == 3


def test_an_export_never_lies_down_in_a_run(workdir, saved, capsys, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    with pytest.raises(UserError, match="holds checkpoints already, of steps 10, 20, 30, 40") as caught:
        run(capsys, "export", workdir, "--output", other)
    assert caught.value.exit_code == 3 and len(list((other / "checkpoints").iterdir())) == len(SAVED)
    (tmp_path / "held").mkdir()
    with RunLock(tmp_path / "held"), pytest.raises(UserError, match="training here"):
        run(capsys, "export", workdir, "--output", tmp_path / "held")
    assert run(capsys, "export", workdir, "--output", tmp_path / "once", "--step", 40)[0] == 0
    with pytest.raises(UserError, match="holds checkpoints already, of steps 40"):
        run(capsys, "export", workdir, "--output", tmp_path / "once", "--step", 40, "--dtype", "float32")


def test_folders_may_be_named_from_where_one_stands(workdir, capsys, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    assert main(["verify", "run", "--steps", "20"]) == 0 and "sound" in capsys.readouterr().out
    assert main(["diff", "run", "--steps", "20", "40"]) == 1
    assert main(["export", "run", "--output", "out"]) == 0
