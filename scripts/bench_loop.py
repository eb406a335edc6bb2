"""What the loop costs over the bare compiled step: the same steps, bare and through `train.Loop`, in one process.

  python scripts/bench_loop.py --config configs/quickstart.py [--config.a.b=v ...] [--steps 60] [--rounds 5]

Bare: the compiled step over batches that are on the device already, read once at the end. Loop: the real loop, with its
loader, prefetch thread, metrics file, TensorBoard and progress. Rounds alternate; prints one JSON object of medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm import train
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.feed import put_batch
from jaxlm.metrics.progress import Progress
from jaxlm.metrics.writer import MetricsLog
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.gang import SOLO
from jaxlm.parallel.votes import Asked
from jaxlm.session import open_program, with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import init_state


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_loop.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=60, help="steps in one round")
    parser.add_argument("--rounds", type=int, default=5)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    own = {"train.eval_every": "0", "checkpoint.every_steps": "0"}
    config = resolve(load_file(args.config), overrides=overrides | own, presets=PRESETS).config
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=args.steps))
        print(json.dumps(measure(config, corpus, Path(folder), args.rounds)))
    return 0


class WithoutSaves(train.Loop):
    """The loop, less the save that ends it: saving is measured by itself."""

    def _save(self, step: int, state: object) -> None:
        self.log.flush()


def measure(config, corpus, folder: Path, rounds: int) -> dict:
    """Median seconds of a step over rounds of train.num_steps steps, bare and looped, and the share the loop adds."""
    program = open_program(config)
    loader = training_loader(config, corpus)
    state = init_state(program)
    compiled = train.build(program, state, loader)
    facts = train.describe(program, corpus, compiled.memory_bytes)
    batches = [put_batch(program, loader.batch(i)) for i in range(8)]
    steps = config.train.num_steps
    bare_s, loop_s = [], []
    for i in range(rounds + 1):  # the first round warms up
        begin = time.perf_counter()
        for k in range(steps):
            state, metrics = compiled.step(state, batches[k % 8])
        jax.block_until_ready((state, metrics))
        bare_s.append((time.perf_counter() - begin) / steps)
        with (
            CheckpointStore(folder / f"checkpoints-{i}") as store,
            MetricsLog(folder / f"round-{i}", tensorboard=True, resume_step=0) as log,
            Progress(num_steps=steps, stream=io.StringIO()) as progress,
            train.Ledger(folder / f"round-{i}") as ledger,
        ):
            loop = WithoutSaves(
                program=program, compiled=compiled, loader=loader, held_out={}, store=store, log=log,
                progress=progress, asked=Asked(lambda: None, SOLO), meter=train.make_meter(facts), ledger=ledger,
            )  # fmt: skip
            begin = time.perf_counter()
            state, _ = loop.run(state, 0)
            jax.block_until_ready(state)
            loop_s.append((time.perf_counter() - begin) / steps)
    bare, looped = statistics.median(bare_s[1:]), statistics.median(loop_s[1:])
    return dict(
        device=jax.devices()[0].device_kind, jax=jax.__version__, steps=steps, rounds=rounds, bare_ms=bare * 1e3,
        loop_ms=looped * 1e3, added_frac=looped / bare - 1, bare_spread=max(bare_s[1:]) / min(bare_s[1:]) - 1,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
