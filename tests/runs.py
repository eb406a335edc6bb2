"""Whole runs of a tiny model through `jaxlm.train`, in this process or in one of their own, for tests of what survives."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import train
from jaxlm.checkpoint.restore import Restored, restore_latest_good
from jaxlm.metrics.writer import read_metrics
from jaxlm.pipelined import to_layers
from jaxlm.session import load_config, open_program
from jaxlm.step import abstract_state, without_recent

STEPS = 24
TINY = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(dict(
        model=dict(num_layers=2, embed_dim=32, num_heads=2, max_seq_len=32, dropout=0.1, vocab_multiple=1),
        train=dict(num_steps={steps}, batch_size=16, eval_every=6, accumulate=2),
        mesh=dict(data=4, fsdp=2),
        optim=dict(peak_lr=1e-2, warmup_steps=4),
        data=dict(path=({text!r},)),
        checkpoint=dict(every_steps=3),
        log=dict(tensorboard=False, sample_tokens=8, sample_prompt="the "),
    ))
"""
TIMES = {"step_time_s", "tokens_per_s", "mfu", "data_wait_s"}


def make_folder(folder: Path) -> Path:
    """A folder with a text and the config of a run on it."""
    vocabulary = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs\n"]
    words = random.Random(0).choices(vocabulary, k=4000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "tiny.py").write_text(TINY.format(steps=STEPS, text=str(folder / "text.txt")))
    return folder


def command(folder: Path, workdir: str, *more: str) -> list[str]:
    return ["--config", str(folder / "tiny.py"), "--workdir", str(folder / workdir), *more]


def start(folder: Path, workdir: str, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    args = [sys.executable, "-m", "jaxlm.train", *command(folder, workdir, *more)]
    environment = (environment or dict(os.environ)) | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def numbers(workdir: Path) -> list[dict]:
    """Every record without its times, floats as hex: equal means equal to the last bit."""
    rows = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(workdir)]
    return [{k: v.hex() if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def settings(*texts: str) -> list[str]:
    """`a.b=v` as the command line has it."""
    return [f"--config.{text}" for text in texts]


def final_checkpoint(workdir: Path) -> Restored:
    """The newest checkpoint, on the mesh of the run; with a pipeline, a leaf a layer."""
    program = open_program(load_config(workdir))
    like, _ = without_recent(abstract_state(program))
    restored = restore_latest_good(workdir / "checkpoints", to_layers(program.pipe, like))
    assert restored is not None
    return restored


def final_state(workdir: Path) -> Any:
    return final_checkpoint(workdir).state


def assert_bitwise(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def stop_at(folder: Path, workdir: str, stop: int, *more: str, of: int) -> None:
    """Trains until step `stop`, a step that saves, and leaves as on SIGTERM, in this process; `of`: the steps of the run."""

    def stopping(self, step, state):
        save(self, step, state)
        if step == stop and stop < of:
            signal.raise_signal(signal.SIGTERM)

    save = train.Loop._save
    train.Loop._save = stopping
    try:
        code = train.main(command(folder, workdir, *more))
    finally:
        train.Loop._save = save
    assert code == (0 if stop == of else 75)
