"""Full, small and read-only disks, and little memory: the run goes on, is told, and loses nothing that was committed."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import abstract, make_state, same
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.checkpoint import space
from jaxlm.checkpoint.layout import Retention, committed_steps
from jaxlm.checkpoint.restore import restore
from jaxlm.checkpoint.space import shortages
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import UserError
from jaxlm.session import preflight

HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]), "XLA_FLAGS": ""}


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path):
    command = [sys.executable, str(HERE / "disk_full.py"), str(tmp_path / "checkpoints")]
    child = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["errors"][0] is None and told["errors"][2] is None
    assert "File too large" in told["errors"][1]
    assert told["left"] == ["1", "3"], "the failed save must give its space back"
    assert told["whole"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 MB. Mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.nightly
def test_twenty_saves_on_a_disk_that_fills_and_empties_lose_no_commit(small_disk):
    """16 MB a save: two fit beside ballast of 20 MB, the third does not, until the ballast is gone."""
    width, told = 2**20, []
    with CheckpointStore(small_disk / "checkpoints", retention=Retention(2)) as store:
        for step in range(1, 21):
            full = step % 4 in (2, 3)
            ballast = small_disk / "ballast"
            if full:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
                ballast.write_bytes(
                    bytes(max(free - 8 * 2**20, 0) + (ballast.stat().st_size if ballast.exists() else 0))
                )
            else:
                ballast.unlink(missing_ok=True)
            before = committed_steps(store.directory)
            store.save(step, make_state(step, width=width))
            store.wait()
            (outcome,) = store.poll()
            told.append(outcome.error is None)
            assert told[-1] != full, outcome
            after = committed_steps(store.directory)
            assert set(before) <= set(after) if full else after[-1] == step
            for kept in after:
                assert same(
                    restore(store.directory, abstract(make_state(0, width=width)), step=kept).state,
                    make_state(kept, width=width),
                )
    print(
        f"{told.count(False)} saves met a full disk, {told.count(True)} did not and were committed; every commit read back"
    )


@pytest.mark.nightly
@pytest.mark.parametrize("relieved", [True, False])
def test_a_run_on_a_full_disk_goes_on_and_its_exit_code_says_how_it_ended(small_disk, tmp_path, relieved):
    (tmp_path / "text.txt").write_text("so it goes, and on it goes. " * 2000)
    (tmp_path / "tiny.py").write_text(f"""
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(dict(model=dict(num_layers=2, embed_dim=160, num_heads=2, max_seq_len=32),
        train=dict(num_steps=400, batch_size=8), data=dict(path=({str(tmp_path / "text.txt")!r},)),
        checkpoint=dict(every_steps=40, keep=1), log=dict(tensorboard=False, sample_tokens=0)))
""")
    command = [
        sys.executable,
        "-u",
        "-m",
        "jaxlm.train",
        "--config",
        str(tmp_path / "tiny.py"),
        "--workdir",
        str(small_disk),
    ]
    child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, ballast = [], small_disk / "ballast"
    for line in child.stdout:
        said.append(line)
        if "step 40: checkpoint committed" in line:
            ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 2**20))
        if "ERROR, checkpoint not saved (2 in a row)" in line and relieved:
            ballast.unlink()
    out = "".join(said)
    assert child.wait() == (0 if relieved else 3), out
    assert out.count("ERROR, checkpoint not saved") >= 2 and "Traceback" not in out, out
    assert "step 400/400" in out
    steps = sorted(int(p.name) for p in (small_disk / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == ([400] if relieved else [40])


def test_what_a_save_needs_is_told_before_the_first_step(tmp_path, monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    huge = 10**15  # elements: no disk and no memory has as much
    like = {"a": jax.ShapeDtypeStruct((huge,), jnp.float32, sharding=place(P("fsdp")))}
    disk, memory = shortages(tmp_path, like)
    assert disk.startswith(f"{tmp_path} has ") and disk.endswith("two checkpoints take 8e+03 TB")
    assert "copies 4e+03 TB to this host's memory" in memory, "what data repeats is copied once"
    assert shortages(tmp_path, {"a": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place(P()))}) == []
    monkeypatch.setattr(space, "MEMINFO", tmp_path / "none")
    assert len(shortages(tmp_path, like)) == 1


@pytest.mark.nightly
def test_a_save_takes_the_memory_of_one_copy(tmp_path):
    command = [sys.executable, str(HERE / "memory.py"), str(tmp_path / "checkpoints")]
    child = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    print(told)
    assert told["state_gb"] > 1 and told["grown_gb"] < 1.25 * told["state_gb"]
    assert told["left_gb"] < 0.1 * told["state_gb"], "the copy is given back"


@contextmanager
def as_nobody():
    """Root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_takes_no_files_is_an_error_for_the_user(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with as_nobody(), pytest.raises(UserError, match="Permission denied") as error:
            preflight(Path(folder))
        assert error.value.exit_code == 2
        with as_nobody(), pytest.raises(UserError, match=r"Permission denied: .*\n  use another --workdir"):
            CheckpointStore(Path(folder) / "checkpoints")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="use another --workdir"):
        CheckpointStore(tmp_path / "file" / "checkpoints")
