"""What a pipeline's bubble costs: step times by schedule and microbatches, against the ideal.

  python scripts/bench_pipeline.py --config FILE.py[:arg] [--config.a.b=v ...] --stages 2 --rows 1 --microbatches 4 8 16 32

The ideal step of M microbatches on P stages is that of M microbatches one after the other on one device, divided by P; one
device is timed at the two smallest M, and its time is the line through them. A step should take ideal x (1 + bubble),
where bubble = (P - 1) / (M R). Everything is compiled first, side by side, then timed one after the other. Prints a JSON
line a case: step_ms (median), ideal_ms, bubble, excess (step over ideal x (1 + bubble), minus 1), tokens/s; and one for
each of --beside, meshes as bench_meshes.py writes them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from bench_meshes import apply

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus, open_corpus, training_loader
from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.mesh import make_layout
from jaxlm.session import with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import Program, abstract_state, batch_sharding, compile_step, init_state, make_program


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_pipeline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--schedules", nargs="*", default=["1f1b", "gpipe", "circular"])
    parser.add_argument("--repeats", type=int, default=2, help="of circular")
    parser.add_argument("--beside", nargs="*", default=[], metavar="MESH")
    parser.add_argument("--steps", type=int, default=6)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    few, many = (2 * sorted(args.microbatches))[:2]
    alone = {M: f"data=1,accumulate={M},batch_size={M * args.rows}" for M in (few, many) if args.schedules}
    cases = {}
    for schedule in args.schedules:
        for M in args.microbatches:
            R = args.repeats if schedule == "circular" else 1
            rows = f"batch_size={M * args.rows},accumulate=1"
            mesh = f"pipeline={args.stages},schedule={schedule},microbatches={M},repeats={R},{rows}"
            cases[mesh] = dict(schedule=schedule, microbatches=M, repeats=R)
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)
        texts = [*alone.values(), *cases, *args.beside]
        with ThreadPoolExecutor() as pool:
            prepared = dict(zip(texts, pool.map(partial(prepare, config), texts)))

        def timed(text: str) -> tuple[float, dict]:
            took = step_s(*prepared.pop(text), corpus, args.steps)
            rows = apply(config, text).train.batch_size
            about = dict(device=jax.devices()[0].device_kind, step_ms=1e3 * took)
            return took, about | dict(tokens_per_s=rows * config.train.seq_len / took)

        if cases:
            alone_s = {M: timed(text)[0] for M, text in alone.items()}
            print(json.dumps({"one_device_ms": {M: 1e3 * s for M, s in alone_s.items()}}), flush=True)
            slope = (alone_s[many] - alone_s[few]) / max(many - few, 1)
        for mesh, case in cases.items():
            took, result = timed(mesh)
            ideal = (alone_s[few] + slope * (case["microbatches"] - few)) / args.stages
            bubble = (args.stages - 1) / (case["microbatches"] * case["repeats"])
            excess = took / (ideal * (1 + bubble)) - 1
            print(json.dumps(case | result | dict(ideal_ms=1e3 * ideal, bubble=bubble, excess=excess)), flush=True)
        for mesh in args.beside:
            print(json.dumps({"mesh": mesh} | timed(mesh)[1]), flush=True)
    return 0


def prepare(config: Config, text: str) -> tuple[Config, Program, Callable]:
    """(config, program, compiled step) of one mesh."""
    config = apply(config, text)
    program = make_program(config, make_layout(config.mesh, jax.devices()[: math.prod(config.mesh.degrees.values())]))
    sharding, shape = batch_sharding(program), (config.train.batch_size, config.train.seq_len)
    rows = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.int32, jnp.float32))
    return config, program, compile_step(program).lower(abstract_state(program), Batch(*rows)).compile()


def step_s(config: Config, program: Program, run: Callable, corpus: Corpus, steps: int) -> float:
    """Median seconds of a step after the first, every step waited for."""
    state, batch, times_s = init_state(program), put_batch(program, training_loader(config, corpus).batch(0)), []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = run(state, batch)
        float(metrics.loss)
        times_s.append(time.perf_counter() - begin)
    return statistics.median(times_s[1:])


if __name__ == "__main__":
    run_main(main)
