"""What one training step takes: the real step on random tokens, by shape or as a config has it, and beside a peer.

  python scripts/bench_step.py 12,768,12,50304,1024,32 [SHAPE ...] [--config FILE.py[:arg]] [--config.a.b=v ...]
  python scripts/bench_step.py 16,2048,16,8,5632,32000,4096 --rows 2 4 8 --config configs/llama2.py --peer

A shape takes the place of the config's: layers, width, heads, vocabulary, tokens a row and rows a step over all devices, or
layers, width, heads, key and value heads, MLP width, vocabulary, tokens and rows; no rows where --rows tries several. The
rest is as the config has it (configs/gpt2.py:124m), in one microbatch. Steps follow one another as in training; a round is
waited for once, at its end.
Prints a JSON line a case: step_ms (median of the rounds), its spread, tokens/s of all devices, TFLOP/s and MFU of each by
both conventions, compile seconds, bytes a device, the first loss; or "error". --profile N adds the N longest kernels by name,
ms a step. --peer trains the same models first in PyTorch, on all visible GPUs (scripts/torch_peer.py, in processes of their
own), and prints a line a shape with ours over theirs in tokens/s: at the same rows, and each at its best.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer import PEER, compared, job, run_peer

from jaxlm.compiled import memory_bytes
from jaxlm.config import Config, Problem, UserError
from jaxlm.data.loader import Batch
from jaxlm.feed import abstract_batch, put_batch
from jaxlm.metrics.throughput import flops_per_token, peak_flops_per_s
from jaxlm.models.presets import PRESETS
from jaxlm.session import open_program, use_device_settings
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import abstract_state, compile_step, init_state, num_params


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


GPT = _keys("model", "num_layers embed_dim num_heads vocab_size max_seq_len")
LLAMA = _keys("model", "num_layers embed_dim num_heads num_kv_heads mlp_dim vocab_size max_seq_len")
SHAPES = {len(names): names for kind in (GPT, LLAMA) for names in (kind, (*kind, "train.batch_size"))}


@dataclass(frozen=True)
class Case:
    """A shape as it was written (or the config's name), with as many rows a step."""

    shape: str
    config: Config

    @property
    def name(self) -> dict[str, Any]:
        return {"shape": self.shape, "rows": self.config.train.batch_size}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE")
    parser.add_argument("--config", default="configs/gpt2.py:124m")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="of a step, to try with each shape")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-command", default=f"{sys.executable} {PEER}", help="what takes jobs and prints lines")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    all_cases = cases(args.shapes, args.rows, args.config, overrides)
    theirs = measure_peer(all_cases, args) if args.peer else []  # before jax takes the memory of the devices
    use_device_settings(all_cases[0].config)
    ours = []
    for case in all_cases:
        ours.append(measure_or_not(case.config, args))
        print(json.dumps(case.name | ours[-1]), flush=True)
    for shape in dict.fromkeys(case.shape for case in all_cases) if args.peer else ():
        speeds = [by_rows(all_cases, found, shape) for found in (ours, theirs)]
        print(json.dumps({"shape": shape} | compared(*speeds)), flush=True)
    return 0


def by_rows(all_cases: Sequence[Case], found: Sequence[dict], shape: str) -> dict[int, float]:
    """{rows: tokens/s} of a shape, where they fit."""
    mine = [(case, line) for case, line in zip(all_cases, found, strict=True) if case.shape == shape]
    return {case.config.train.batch_size: line["tokens_per_s"] for case, line in mine if "error" not in line}


def measure_peer(all_cases: Sequence[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The peer's line for each case, printed as it comes."""
    found = []
    jobs = [job(case.config) | dict(steps=args.steps, rounds=args.rounds) for case in all_cases]
    for case, line in zip(all_cases, run_peer(args.peer_command, jobs), strict=True):
        found.append(line if "error" in line else line | utilisation(case.config, line))
        print(json.dumps(case.name | found[-1]), flush=True)
    return found


def cases(shapes: Sequence[str], rows: Sequence[int], file: str, overrides: dict[str, str]) -> list[Case]:
    """Every shape (none: the config's own) with each of `rows` (none: its own)."""
    tree, made = load_file(file), []
    for shape in shapes or [""]:
        for batch in rows or [0]:
            said = settings(shape) | ({"train.batch_size": str(batch)} if batch else {})
            config = resolve(tree, overrides=said | overrides, presets=PRESETS, file=file).config
            made.append(Case(shape or file, config))
    return made


def settings(shape: str) -> dict[str, str]:
    """What a shape says, as overrides. The data are never opened, so their name is any."""
    own = {"data.path": "unread", "train.accumulate": "1", "train.eval_every": "0"}
    if not shape:
        return own
    numbers = shape.split(",")
    names = SHAPES.get(len(numbers))
    if names is None:
        remedy = f"write {' or '.join(','.join(names) for names in SHAPES.values())}"
        raise UserError(Problem(shape, f"{len(numbers)} numbers are no shape", remedy))
    # a preset's own would stay
    return own | {"model.num_kv_heads": "0", "model.mlp_dim": "0", "model.head_dim": "0"} | dict(zip(names, numbers))


def measure_or_not(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    try:
        return measure(config, args)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {"error": "out of memory"}


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
        counted_params=num_params(program, positions=False, padding=False),
    )  # fmt: skip
    found |= utilisation(config, found)
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):  # a round: after a rest the clocks are higher than power allows for long
                for i in range(args.steps):
                    state, metrics = step(state, batches[i % 4])
                float(metrics.loss)
            found["kernels_ms"] = kernel_times_ms(Path(folder), args.steps, args.profile)
    return found


def utilisation(config: Config, found: dict[str, Any]) -> dict[str, float | None]:
    """TFLOP/s of a device and the share of its peak, by the convention of metrics/throughput.py and its causal form."""
    model, peak = config.model, peak_flops_per_s(found["device"])
    per_token = dict(
        num_nonpositional_params=found["counted_params"], num_layers=model.num_layers, num_heads=model.num_heads,
        head_dim=model.head_dim, seq_len=config.train.seq_len,
    )  # fmt: skip
    tokens_per_s = found["tokens_per_s"] / found["devices"]
    rate, causal = (flops_per_token(**per_token, causal=c) * tokens_per_s for c in (False, True))
    return dict(tflops=rate / 1e12, mfu=peak and rate / peak, mfu_causal=peak and causal / peak)


def kernel_times_ms(trace: Path, steps: int, top: int) -> dict[str, float]:
    """{kernel: ms a step} of all GPUs in a profiler's trace of so many steps, the longest first, numbers in names left out;
    "all" is the sum of all there are."""
    (file,) = trace.rglob("*.xplane.pb")
    sums = collections.Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if "GPU" in plane.name:
            for line in (line for line in plane.lines if line.name.startswith("Stream")):
                for event in line.events:
                    sums[re.sub(r"[._]?\d+", "#", event.name)[:80]] += event.duration_ns
    ms = {name: ns / 1e6 / steps for name, ns in sums.most_common()}
    return {"all": sum(ms.values())} | dict(list(ms.items())[:top])


if __name__ == "__main__":
    run_main(main)
