"""What one training step takes: the real step on random tokens, by shape or as a config has it.

  python scripts/bench_step.py 12,768,12,50304,1024,32 [L,D,H,V,T,B ...] [--config FILE.py[:arg]] [--config.a.b=v ...]

A shape is layers, width, heads, vocabulary, tokens a row, rows a step over all devices, in place of the config's
(configs/gpt2.py:124m; with no shape, the config as it is). Steps follow one another as in training; a round is waited for
once, at its end.
Prints a JSON line a shape: step_ms (median of the rounds), its spread, tokens/s of all devices, TFLOP/s and MFU of each by
both conventions, compile seconds, bytes a device, the first loss. --profile N adds the N longest kernels by name of one step.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.compiled import memory_bytes
from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.feed import abstract_batch, put_batch
from jaxlm.metrics.chips import peak_flops_per_s
from jaxlm.metrics.flops import flops_per_token
from jaxlm.models.presets import PRESETS
from jaxlm.session import open_program
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import Program, abstract_state, compile_step, init_state, num_params


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="L,D,H,V,T,B")
    parser.add_argument("--config", default="configs/gpt2.py:124m")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    for shape in args.shapes or [""]:
        config = resolve(load_file(args.config), overrides=settings(shape) | overrides, presets=PRESETS).config
        print(json.dumps({"shape": shape or args.config} | measure(config, args)), flush=True)
    return 0


def settings(shape: str) -> dict[str, str]:
    """What a shape says, as overrides. The data are never opened, so their name is any."""
    own = {"data.path": "unread", "train.accumulate": "1", "train.eval_every": "0"}
    names = ("num_layers", "embed_dim", "num_heads", "vocab_size", "max_seq_len", "batch_size")
    if shape:
        own |= {"model.preset": "none"} | dict(zip((f"model.{name}" for name in names[:5]), shape.split(",")))
        own["train.batch_size"] = shape.split(",")[5]
    return own


def measure(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    program, train = open_program(config), config.train
    shape = (train.batch_size, train.seq_len)
    begin = time.perf_counter()
    step = compile_step(program).lower(abstract_state(program), abstract_batch(program, shape)).compile()
    compile_s, state = time.perf_counter() - begin, init_state(program)
    rng = np.random.default_rng(0)
    rows = [rng.integers(config.model.vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32) for _ in range(4)]
    batches = [put_batch(program, Batch(x[:, :-1], x[:, 1:], np.ones(shape, np.float32), None)) for x in rows]
    state, metrics = step(state, batches[0])
    first_loss = float(metrics.loss)
    times_s = []
    for _ in range(args.rounds + 1):  # the first round warms up
        begin = time.perf_counter()
        for i in range(args.steps):
            state, metrics = step(state, batches[i % 4])
        assert math.isfinite(float(metrics.loss))
        times_s.append((time.perf_counter() - begin) / args.steps)
    took, tokens = statistics.median(times_s[1:]), shape[0] * shape[1]
    found: dict[str, Any] = dict(
        device=jax.devices()[0].device_kind, devices=program.layout.mesh.size, step_ms=1e3 * took,
        spread=max(times_s[1:]) / min(times_s[1:]) - 1, tokens_per_s=tokens / took, compile_s=compile_s,
        memory_bytes=memory_bytes(step), first_loss=first_loss,
    )  # fmt: skip
    found |= utilisation(program, tokens / took / program.layout.mesh.size)
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                _, metrics = step(state, batches[0])
                float(metrics.loss)
            found["kernels_ms"] = kernel_times_ms(Path(folder), args.profile)
    return found


def utilisation(program: Program, tokens_per_s: float) -> dict[str, float | None]:
    """TFLOP/s of a device and the share of its peak, by the convention of metrics/flops.py and its causal form."""
    model, train, peak = program.config.model, program.config.train, peak_flops_per_s(jax.devices()[0].device_kind)
    counted = num_params(program, positions=False, padding=False)
    per_token = dict(
        num_nonpositional_params=counted, num_layers=model.num_layers, num_heads=model.num_heads,
        head_dim=model.head_dim, seq_len=train.seq_len,
    )  # fmt: skip
    rate, causal = (flops_per_token(**per_token, causal=c) * tokens_per_s for c in (False, True))
    return dict(tflops=rate / 1e12, mfu=peak and rate / peak, mfu_causal=peak and causal / peak)


def kernel_times_ms(trace: Path, top: int) -> dict[str, float]:
    """{kernel: ms} of all GPUs in a profiler's trace, the longest first, numbers in names left out; "all" is their sum."""
    (file,) = trace.rglob("*.xplane.pb")
    sums = collections.Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if "GPU" in plane.name:
            for line in (line for line in plane.lines if line.name.startswith("Stream")):
                for event in line.events:
                    sums[re.sub(r"[._]?\d+", "#", event.name)[:80]] += event.duration_ns
    return {"all": sum(sums.values()) / 1e6} | {name: ns / 1e6 for name, ns in sums.most_common(top)}


if __name__ == "__main__":
    run_main(main)
