"""Is a run that was stopped and resumed the run that was not, to the last bit, on this machine?

  python scripts/check_resume.py --config configs/gpt2.py:124m [--config.train.deterministic=true] [--steps 20]

Three real processes: an unbroken run of --steps steps; one that gets SIGTERM in its middle step; the same command again, which
resumes it. Compares every loss as float hex and every array of the last checkpoints, prints one JSON object with tokens/s
and the share of a step that waited for data, and exits 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxlm.checkpoint.restore import restore_latest_good
from jaxlm.metrics.writer import read_metrics
from jaxlm.pipelined import to_layers
from jaxlm.session import load_config, open_program
from jaxlm.settings import Parser, run_main, split_overrides
from jaxlm.step import abstract_state, without_recent


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="check_resume.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    own = {"train.num_steps": args.steps, "checkpoint.every_steps": 0, "train.eval_every": 0, "log.every_steps": 1}
    texts = overrides | {key: str(value) for key, value in own.items()} | {"log.sample_tokens": "0"}
    flags = [f"--config.{key}={value}" for key, value in texts.items()]
    with tempfile.TemporaryDirectory() as folder:
        codes = [
            train(args.config, flags, Path(folder) / name, stop)
            for name, stop in (("whole", 0), ("stopped", args.steps // 2), ("stopped", 0))
        ]
        assert codes == [0, 75, 0], codes
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        losses = [
            [float(r["loss"]).hex() for r in read_metrics(workdir) if "loss" in r] for workdir in (whole, stopped)
        ]
        arrays = [leaves(workdir) for workdir in (whole, stopped)]
        steps = [r for r in read_metrics(whole) if "loss" in r][args.steps // 2 :]
    differ = [i + 1 for i, (a, b) in enumerate(zip(*losses, strict=True)) if a != b]
    bad = sum(a.tobytes() != b.tobytes() for a, b in zip(*arrays, strict=True))
    found = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, steps=args.steps, leaves=len(arrays[0]))
    found |= dict(losses_that_differ=len(differ), first=differ[:1], leaves_that_differ=bad)
    speed = dict(
        tokens_per_s=statistics.median(r["tokens_per_s"] for r in steps),
        data_wait_frac=sum(r["data_wait_s"] for r in steps) / sum(r["step_time_s"] for r in steps),
    )
    print(json.dumps(found | speed))
    return 1 if differ or bad else 0


STOPPING = """
import signal, sys
from jaxlm import train
from jaxlm.settings import run_main

stop, step = int(sys.argv.pop(1)), train.Loop._step

def stopping(self, number, state, batch):
    if number == stop:
        signal.raise_signal(signal.SIGTERM)
    return step(self, number, state, batch)

train.Loop._step = stopping
run_main(train.main)
"""


def train(config: str, flags: Sequence[str], workdir: Path, stop: int) -> int:
    """Exit code of a run that gets SIGTERM in step `stop` (0: never)."""
    args = [sys.executable, "-c", STOPPING, str(stop), "--config", config, "--workdir", str(workdir), *flags]
    # without preallocation the next process, and this one, find memory that is free
    return subprocess.run(
        args, stdout=sys.stderr, env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ).returncode


def leaves(workdir: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint."""
    program = open_program(load_config(workdir))
    like, _ = without_recent(abstract_state(program))
    restored = restore_latest_good(workdir / "checkpoints", to_layers(program.pipe, like))
    assert restored is not None
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]


if __name__ == "__main__":
    run_main(main)
