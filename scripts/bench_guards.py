"""What the guards of a step cost: the finite check, spike skipping and deterministic kernels, in one process.

  python scripts/bench_guards.py --config configs/gpt2.py:124m [--config.a.b=v ...] [--steps 30] [--rounds 5]

Compiles the step as it is, without its finite check, with train.skip_spikes=6 and with train.deterministic=true; each round
runs all of them on batches that are on the device already. Prints one JSON object: median milliseconds a step, tokens/s, the
change against the step as it is, and the spread of that one's rounds: a difference below the spread says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax

from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.session import open_program, with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import compile_step, init_state

# settings of train, and the attention kernel where it is not the config's: cuDNN's can not be deterministic
VARIANTS = {
    "as it is": ({}, None),
    "without the finite check": ({}, None),
    "skip_spikes=6": ({"skip_spikes": 6.0}, None),
    "attention=xla": ({}, "xla"),
    "deterministic, attention=xla": ({"deterministic": True}, "xla"),
}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_guards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=30, help="steps in one round")
    parser.add_argument("--rounds", type=int, default=5)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)
        print(json.dumps(measure(config, corpus, args.steps, args.rounds)))
    return 0


def measure(config, corpus, steps: int, rounds: int) -> dict:
    """{variant: ms, tokens_per_s, change}, the spread of the first, and where it ran."""
    compiled, batches, seconds = {}, [], {name: [] for name in VARIANTS}
    for name, (settings, attention) in VARIANTS.items():
        model = dataclasses.replace(config.model, attention=attention or config.model.attention)
        train = dataclasses.replace(config.train, **settings)
        program = open_program(dataclasses.replace(config, model=model, train=train))
        loader = training_loader(config, corpus)
        batches = batches or [put_batch(program, loader.batch(i)) for i in range(8)]
        # a predicate that is true when the step is traced leaves no check in the program
        unchecked = mock.patch("jaxlm.step.jnp.isfinite", lambda x: True)
        with unchecked if name.startswith("without") else contextlib.nullcontext():
            compiled[name] = (compile_step(program).lower(init_state(program), batches[0]).compile(), program)
    for _ in range(rounds + 1):  # the first round warms up
        for name, (step, program) in compiled.items():
            state, metrics = step(init_state(program), batches[0])
            jax.block_until_ready(state)
            begin = time.perf_counter()
            for k in range(steps):
                state, metrics = step(state, batches[k % 8])
            jax.block_until_ready((state, metrics))
            seconds[name].append((time.perf_counter() - begin) / steps)
            del state
    medians = {name: statistics.median(rounds_s[1:]) for name, rounds_s in seconds.items()}
    first, tokens = medians["as it is"], config.train.batch_size * config.train.seq_len
    spread = max(seconds["as it is"][1:]) / min(seconds["as it is"][1:]) - 1
    rows = {n: dict(ms=s * 1e3, tokens_per_s=tokens / s, change_frac=s / first - 1) for n, s in medians.items()}
    return (
        dict(device=jax.devices()[0].device_kind, jax=jax.__version__, steps=steps, rounds=rounds, spread=spread) | rows
    )


if __name__ == "__main__":
    run_main(main)
