"""What a pipeline's bubble costs: step times by schedule and microbatches, against the ideal.

  python scripts/bench_pipeline.py --config FILE.py[:arg] [--config.a.b=v ...] --stages 2 --rows 1 --microbatches 4 8 16 32

The ideal step of M microbatches on P stages is that of M microbatches one after the other on one device, divided by P; one
device is timed at the two smallest M, and its time is the line through them. A step should take ideal x (1 + bubble),
where bubble = (P - 1) / (M R). Prints a JSON line a case: step_ms (median), ideal_ms, bubble, excess (step over ideal x
(1 + bubble), minus 1), tokens/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from bench_meshes import apply

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus, open_corpus, training_loader
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.mesh import make_layout
from jaxlm.session import with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import compile_step, init_state, make_program, put_batch


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_pipeline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "gpipe", "circular"])
    parser.add_argument("--repeats", type=int, default=2, help="of circular")
    parser.add_argument("--steps", type=int, default=6)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)

        def run(text: str, M: int) -> float:
            return step_s(apply(config, f"{text},batch_size={M * args.rows}"), corpus, args.steps)

        few, many = (2 * sorted(args.microbatches))[:2]
        alone = {M: run(f"data=1,accumulate={M}", M) for M in (few, many)}
        print(json.dumps({"one_device_ms": {M: 1e3 * s for M, s in alone.items()}}), flush=True)
        slope = (alone[many] - alone[few]) / max(many - few, 1)
        for schedule in args.schedules:
            for M in args.microbatches:
                R = args.repeats if schedule == "circular" else 1
                took = run(f"pipeline={args.stages},schedule={schedule},microbatches={M},repeats={R}", M)
                ideal = (alone[few] + slope * (M - few)) / args.stages
                bubble = (args.stages - 1) / (M * R)
                print(
                    json.dumps(
                        dict(
                            schedule=schedule, microbatches=M, repeats=R, device=jax.devices()[0].device_kind,
                            step_ms=1e3 * took, ideal_ms=1e3 * ideal, bubble=bubble,
                            excess=took / (ideal * (1 + bubble)) - 1,
                            tokens_per_s=M * args.rows * config.train.seq_len / took,
                        )
                    ),
                    flush=True,
                )  # fmt: skip
    return 0


def step_s(config: Config, corpus: Corpus, steps: int) -> float:
    """Median seconds of a step after the first, every step waited for."""
    devices = 1
    for degree in config.mesh.degrees.values():
        devices *= degree
    program = make_program(config, make_layout(config.mesh, jax.devices()[:devices]))
    state, run = init_state(program), compile_step(program)
    loader = training_loader(config, corpus)
    batch, times_s = put_batch(program, loader.batch(0)), []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = run(state, batch)
        float(metrics.loss)
        times_s.append(time.perf_counter() - begin)
    return statistics.median(times_s[1:])


if __name__ == "__main__":
    run_main(main)
