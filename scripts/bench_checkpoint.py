"""What a checkpoint costs a run: how long a save blocks it, how long a commit takes, what the checksums cost.

  python scripts/bench_checkpoint.py --config configs/gpt2.py:1.3b [--config.a.b=v ...] [--folder DIR] [--saves 3] [--steps 3]

Trains random tokens. Before each save the state is waited for, so that what is timed is the save alone; after it the run goes
on at once and overwrites the state that is being written. Prints a JSON line for each save and one for the run. The bounds:
blocked <= max(one step, 50 ms + bytes / 20 GB/s), checksums <= 5 ms a GB. As in a run, a save is rehearsed before the first
step: warm_up_s compiles the checksums and pins host memory. At the end the newest save is restored and verified against the
checksums that were computed before it was overwritten.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.checksum import checksums
from jaxlm.checkpoint.layout import Retention, name_leaves
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.pipelined import to_layers
from jaxlm.session import open_program
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import abstract_state, compile_step, init_state
from jaxlm.train import use_device_settings


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="bench_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary one)")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="between saves")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    use_device_settings(config)
    measure(config, args.folder, saves=args.saves, steps=args.steps)
    return 0


def measure(config: Config, folder: Path | None, *, saves: int, steps: int) -> None:
    """Trains, saves and restores in a temporary folder below `folder`; says what each save and the whole run cost."""
    program = open_program(config)
    step, state = compile_step(program), init_state(program)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = put_batch(program, Batch(tokens, tokens, np.ones(shape, np.float32)))
    with (
        tempfile.TemporaryDirectory(dir=folder) as made,
        CheckpointStore(made, retention=Retention(1)) as store,
    ):
        clock, steps_s, blocked_s = time.perf_counter, [], 0.0
        begin = clock()
        store.warm_up(to_layers(program.pipe, state))
        store.wait()
        warm_up_s = clock() - begin
        for number in range(1, saves + 1):
            for _ in range(steps):
                begin = clock()
                state, _ = jax.block_until_ready(step(state, batch))
                steps_s.append(clock() - begin)
            saved = to_layers(program.pipe, state)
            size, marks = sum(leaf.nbytes for leaf in jax.tree.leaves(saved)), [clock()]
            checksums(name_leaves(saved))
            marks.append(clock())
            store.save(number, saved)
            marks.append(clock())
            state, _ = jax.block_until_ready(step(state, batch))
            marks.append(clock())
            store.wait()
            (outcome,) = store.poll()
            assert outcome.error is None, outcome
            checksum_s, blocked_s, beside_s = (after - before for before, after in itertools.pairwise(marks))
            bound_s = max(statistics.median(steps_s), 0.05 + size / 20e9)
            say(
                save=number, state_gb=size / 1e9, step_s=statistics.median(steps_s), blocked_s=blocked_s,
                blocked_bound_s=bound_s, blocked_holds=blocked_s <= bound_s, step_beside_save_s=beside_s,
                commit_s=outcome.duration_s, checksum_ms_a_gb=1e12 * checksum_s / size,
                checksum_holds=checksum_s <= 5e-12 * size,
                peak_rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            )  # fmt: skip
        like = to_layers(program.pipe, abstract_state(program))
        del state, saved
        begin = clock()
        restored = store.restore_latest_good(like)
        assert restored is not None and restored.step == saves and not restored.passed_over
        run_s = config.checkpoint.every_steps * statistics.median(steps_s)
        say(
            device=jax.devices()[0].device_kind, devices=jax.device_count(), jax=jax.__version__, verified=True,
            restore_s=clock() - begin, warm_up_s=warm_up_s, every_steps=config.checkpoint.every_steps,
            overhead_frac=blocked_s / run_s,
        )  # fmt: skip


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    run_main(main)
