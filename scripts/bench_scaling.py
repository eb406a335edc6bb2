"""Steps on 1, 2, 4 and 8 GPUs: models and meshes of one table, measured where the GPUs are there, else compiled and predicted.

  python scripts/bench_scaling.py [--only WORD ...] [--out scaling.jsonl]      every row that this machine's GPUs can take
  python scripts/bench_scaling.py --compile [--only WORD ...]                  every row, for H100s; needs jax[cuda13], no GPU
  python scripts/bench_scaling.py --table                                      what --out has, as Markdown

A row is a model, a mesh and rows a step; it runs in a process of its own, measured by scripts/bench_step.py on as many GPUs
as its mesh has. Its line goes to --out as soon as it is there, and a row that has one is not run again unless it is an error:
interrupted, the same command goes on. --only takes rows whose name has all the words. --seconds is for a machine that
one has for so long.

A compiled row has bytes a GPU and the payload of its collectives. Its speed is predicted from the measured row of the same
model on the fewest GPUs: the same compute a token, longer by a pipeline's bubble, with exchanges at LINK_BYTES_PER_S all
hidden behind it (the upper figure) and all on top (the lower).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from bench_step import cases
from jax.experimental import topologies

from jaxlm.compiled import memory_bytes
from jaxlm.config import MESH_AXES, Problem, UserError
from jaxlm.feed import abstract_batch
from jaxlm.models.pieces import KEPT
from jaxlm.parallel.hlo import Collective, collectives
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.multihost import visible_gpus
from jaxlm.settings import Parser, run_main
from jaxlm.step import abstract_state, compile_step, make_program

HERE = Path(__file__).parent
TARGET = HERE / "h100-80gb.txtpb"
LINK_BYTES_PER_S = 170e9  # a direction, assumed of NCCL beside products, as in the simulations of docs/experiments.md
LATENCY_S = 12e-6  # of an exchange, likewise


@dataclass(frozen=True)
class Row:
    """One step to take: `model` on `mesh`, with `rows` of tokens a step, `settings` beside."""

    model: str
    config: str
    mesh: Mapping[str, int]
    rows: int
    settings: Mapping[str, str]

    @property
    def gpus(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def name(self) -> str:
        mesh = ",".join(f"{axis}={degree}" for axis, degree in self.mesh.items())
        return f"{self.model} {mesh} {self.rows} rows"

    @property
    def overrides(self) -> dict[str, str]:
        degrees = {f"mesh.{axis}": str(degree) for axis, degree in ({"data": 1} | dict(self.mesh)).items()}
        return degrees | {"train.batch_size": str(self.rows)} | dict(self.settings)

    @property
    def bubble(self) -> float:
        """Time that stages stand idle, over that in which they work."""
        stages = self.mesh.get("pipeline", 1)
        return (stages - 1) / int(self.settings["pipeline.microbatches"]) if stages > 1 else 0.0


def _sharded(model: str, config: str, rows: Mapping[str, int], remat: Mapping[str, str]) -> list[Row]:
    """A row for each of `rows`, {mesh: rows a GPU}; remat: of those that would not fit without."""
    made = []
    for text, each in rows.items():
        mesh = {axis: int(degree) for axis, degree in (part.split("=") for part in text.split(","))}
        total = each * math.prod(mesh.values())
        settings = {"model.remat": remat.get(text, "none")}
        if "pipeline" in mesh:
            settings |= {"pipeline.microbatches": str(total // mesh.get("fsdp", 1))}
        if "pipeline" in mesh and "fsdp" in mesh:
            settings |= {"mesh.zero": "2"}  # or every microbatch gathers the weights and scatters their gradients
        made.append(Row(model, config, mesh, total, settings))
    return made


def _replicas(model: str, config: str, rows: int) -> list[Row]:
    """Weak scaling, `rows` a GPU, and strong, as many as eight GPUs have, in microbatches of `rows`."""
    weak = [Row(model, config, {"data": n}, rows * n, {}) for n in (1, 2, 4, 8)]
    strong = [Row(model, config, {"data": n}, rows * 8, {"train.accumulate": str(8 // n)}) for n in (1, 2, 4)]
    return [*weak, *strong]


TABLE = [
    *_sharded(
        "llama2-7b",
        "configs/llama2.py:7b",
        {
            "fsdp=2": 2, "model=2": 2, "fsdp=4": 2, "data=2,fsdp=2": 2, "fsdp=2,model=2": 2, "fsdp=8": 2, "data=2,fsdp=4": 2,
            "fsdp=4,model=2": 2, "pipeline=2,fsdp=4": 8, "pipeline=4,model=2": 8,
        },
        remat=dict.fromkeys(("fsdp=2", "model=2", "data=2,fsdp=2"), KEPT),
    ),
    *_sharded(
        "llama3-8b",
        "configs/llama3.py:8b",
        {"fsdp=4": 1, "fsdp=8": 1, "data=2,fsdp=4": 1, "fsdp=4,model=2": 1, "pipeline=2,fsdp=4": 4, "pipeline=4,model=2": 4},
        remat={"pipeline=2,fsdp=4": "full"},
    ),
    *_replicas("gpt2-124m", "configs/gpt2.py:124m", 32),
    *_replicas("gpt2-355m", "configs/gpt2.py:355m", 16),
]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--out", type=Path, default=Path("scaling.jsonl"))
    parser.add_argument("--gpus", type=int, default=len(visible_gpus()), help="of this machine's, to use")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row that could end later")
    parser.add_argument("--row-seconds", type=float, default=300.0, help="a row that takes longer is given up")
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--compile-row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_row:
        print(json.dumps(compiled(next(row for row in TABLE if row.name == args.compile_row))))
        return 0
    chosen = [row for row in TABLE if all(word in row.name.split() for word in args.only)]
    if not chosen:
        names = "\n  ".join(row.name for row in TABLE)
        raise UserError(Problem(f"--only {' '.join(args.only)}", "is in no row's name", f"words of these:\n  {names}"))
    if not args.table:
        run(chosen, args)
    print(markdown(chosen, read(args.out)))
    return 0


def run(chosen: Sequence[Row], args: argparse.Namespace) -> None:
    """Adds to args.out what is missing there: compiled, or measured where there are the GPUs."""
    end_s, kind = time.monotonic() + args.seconds, "compiled" if args.compile else "measured"
    done = {key for key, line in read(args.out).items() if "error" not in line}
    missing = [row for row in chosen if (row.name, kind) not in done and (args.compile or row.gpus <= args.gpus)]
    for number, row in enumerate(missing, 1):
        left_s = min(end_s - time.monotonic(), args.row_seconds)
        say = f"{number} of {len(missing)}: {row.name}, {kind}"
        if left_s < min(args.row_seconds, 60):
            print(f"{say}: no time left", file=sys.stderr, flush=True)
            return
        print(f"{say} ...", file=sys.stderr, flush=True)
        found = _child(*(_compile_words(row) if args.compile else _measure_words(row, args.steps)), left_s)
        with args.out.open("a") as out:
            out.write(json.dumps({"row": row.name, "kind": kind} | found) + "\n")


def _measure_words(row: Row, steps: int) -> tuple[list[str], dict[str, str]]:
    """A command that prints the row's line, and what it needs in its environment."""
    words = [sys.executable, str(HERE / "bench_step.py"), f"--config={row.config}", f"--steps={steps}", "--rounds=2"]
    words += [f"--config.{key}={value}" for key, value in row.overrides.items()]
    return words, {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: row.gpus])}


def _compile_words(row: Row) -> tuple[list[str], dict[str, str]]:
    words = [sys.executable, __file__, "--compile-row", row.name]
    return words, {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def _child(words: list[str], environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """The JSON line that a process prints, or {"error": why not}."""
    env = os.environ | environment
    try:
        done = subprocess.run(words, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"no end in {limit_s:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr[-2000:], file=sys.stderr, flush=True)
    _, ours, said = done.stderr.rpartition("error: ")
    said = said if ours else done.stderr.rstrip().rpartition("\n")[2]
    return {"error": " ".join(said.split())[:200] or f"exit code {done.returncode}"}


def compiled(row: Row) -> dict[str, Any]:
    """A row compiled for H100s that need not be there: bytes a GPU, bytes sent by kind, seconds of its exchanges."""
    # kernels written in Pallas ask for the device that is not there
    kernels = {f"model.{kernel}_kernel": "xla" for kernel in ("activation", "norm", "loss")}
    (case,) = cases([], [], row.config, row.overrides | kernels | {"model.attention": "cudnn"})
    try:
        target, size = TARGET.read_text(), f"1x1x{row.gpus}"
        devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology=size).devices
    except NotImplementedError as error:
        problem = Problem("--compile", f"this jax has no compiler for GPUs: {error}", "pip install 'jax[cuda13]'")
        raise UserError(problem) from error
    program = make_program(case.config, make_layout(case.config.mesh, devices))
    begin = time.monotonic()
    shape = (case.config.train.batch_size, case.config.train.seq_len)
    step = compile_step(program).lower(abstract_state(program), abstract_batch(program, shape)).compile()
    found = collectives(step.as_text(), program.layout.mesh)
    kinds = dict.fromkeys(c.kind for c in found)
    return {
        "compile_s": time.monotonic() - begin,
        "memory_bytes": memory_bytes(step),
        "sent_bytes": {kind: sum(c.bytes * c.times for c in found if c.kind == kind) for kind in kinds},
        "exchange_s": sum(c.times * exchange_s(c, row.mesh) for c in found),
        "tokens": math.prod(shape),
        "jax": jax.__version__,
    }


def exchange_s(c: Collective, mesh: Mapping[str, int]) -> float:
    """Seconds of one collective alone on its links: of n devices each sends (n - 1) / n of the payload, twice for a sum
    that all get, and the whole of what is permuted."""
    known = all(axis in MESH_AXES for axis in c.axes)
    members = math.prod(mesh.get(axis, 1) for axis in (c.axes if known else mesh))
    share = 1.0 if c.kind == "collective-permute" else (members - 1) / members
    return LATENCY_S + c.bytes * share * (2 if c.kind == "all-reduce" else 1) / LINK_BYTES_PER_S


def read(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(row's name, kind): its last line}."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return {(line["row"], line["kind"]): line for line in lines}


def markdown(chosen: Iterable[Row], done: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """A line a row. weak and strong: speed of a GPU over that of the fewest GPUs with as many rows each, and in all."""
    lines = [
        "| row | GPUs | GiB a GPU | payload a GPU and step | predicted tokens/s a GPU | measured | weak | strong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in chosen:
        forecast, fact = done.get((row.name, "compiled"), {}), done.get((row.name, "measured"), {})
        memory = fact.get("memory_bytes") or forecast.get("memory_bytes")
        cells = [
            row.name,
            str(row.gpus),
            f"{memory / 2**30:.1f}" if memory else "",
            f"{sum(forecast['sent_bytes'].values()) / 1e9:.1f} GB" if "sent_bytes" in forecast else "",
            _predicted(row, forecast, done) or forecast.get("error", ""),
            f"{_speed(row, fact):,.0f}" if "tokens_per_s" in fact else fact.get("error", ""),
            _ratio(row, [r for r in TABLE if r.model == row.model and r.rows * row.gpus == row.rows * r.gpus], done),
            _ratio(row, [r for r in TABLE if r.model == row.model and r.rows == row.rows], done),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speed(row: Row, fact: Mapping[str, Any]) -> float:
    """Tokens/s of a GPU."""
    return fact["tokens_per_s"] / row.gpus


def _fewest(rows: Iterable[Row], done: Mapping[tuple[str, str], dict[str, Any]]) -> tuple[Row, float] | None:
    """The measured row on the fewest GPUs, and the tokens/s of one of them."""
    facts = [(row, done.get((row.name, "measured"), {})) for row in rows]
    speeds = [(row, _speed(row, fact)) for row, fact in facts if "tokens_per_s" in fact]
    return min(speeds, key=lambda pair: pair[0].gpus, default=None)


def _ratio(row: Row, alike: Sequence[Row], done: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    first, own = _fewest(alike, done), _fewest([row], done)
    return f"{own[1] / first[1]:.3f}" if own and first and first[0].gpus < row.gpus else ""


def _predicted(row: Row, forecast: Mapping[str, Any], done: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    base = _fewest((r for r in TABLE if r.model == row.model and not r.bubble), done)
    if base is None or base[0] == row or "exchange_s" not in forecast:
        return ""
    low, high = predicted(forecast["tokens"] / row.gpus, base[1], bubble=row.bubble, exchange_s=forecast["exchange_s"])
    return f"{low:,.0f} to {high:,.0f}"


def predicted(tokens: float, base_tokens_per_s: float, *, bubble: float, exchange_s: float) -> tuple[float, float]:
    """Tokens/s of a GPU that has so many a step, with exchanges on top of the compute, and hidden behind it.

    Example: predicted(100, 10, bubble=0, exchange_s=10) == (5, 10).
    """
    compute_s = tokens / base_tokens_per_s * (1 + bubble)
    return tokens / (compute_s + exchange_s), tokens / max(compute_s, exchange_s)


if __name__ == "__main__":
    run_main(main)
