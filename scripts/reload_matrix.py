"""A checkpoint written on each mesh, read on every other one: are the parameters and the loss the same?

  python scripts/reload_matrix.py --config configs/gpt2.py:355m [--config.a.b=v ...] --meshes model=2 pipeline=2 data=2

Meshes are written as for bench_meshes.py. Each trains two steps from the same seed and saves. Then each reads every checkpoint,
the whole state, and evaluates one batch: prints a table of losses, a row for each mesh that wrote and a column for each that
read, and the largest difference in a row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from bench_meshes import apply

from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.data.loader import Loader
from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.mesh import make_layout
from jaxlm.pipelined import from_layers, to_layers
from jaxlm.session import with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import Program, abstract_state, compile_eval, compile_step, init_state, make_program


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="reload_matrix.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--meshes", nargs="+", required=True)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    losses = np.zeros((len(args.meshes), len(args.meshes)))
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)
        loader = training_loader(config, corpus)
        programs = []
        for text in args.meshes:
            case = apply(config, text)
            devices = jax.devices()[: int(np.prod(list(case.mesh.degrees.values())))]
            programs.append(make_program(case, make_layout(case.mesh, devices)))
        with ThreadPoolExecutor() as pool:  # side by side: compiling is what takes the time
            compiled = list(pool.map(partial(prepare, loader), programs))
        for text, program, (step, _) in zip(args.meshes, programs, compiled):
            state = init_state(program)
            for i in range(2):
                state, _ = step(state, put_batch(program, loader.batch(i)))
            with CheckpointStore(Path(folder) / text) as store:
                store.save(2, to_layers(program.pipe, state))
            print(f"{text} written", file=sys.stderr, flush=True)
            del state
        for column, program in enumerate(programs):
            like, (_, evaluate) = abstract_state(program), compiled[column]
            batch = put_batch(program, loader.batch(2))
            for row, text in enumerate(args.meshes):
                with CheckpointStore(Path(folder) / text) as store:
                    restored = store.restore_latest_good(to_layers(program.pipe, like))
                assert restored is not None
                state = from_layers(program.pipe, restored.state, like)
                nats, tokens = evaluate(state.params, batch)
                losses[row, column] = float(nats) / float(tokens)
                print(f"{text} read on {args.meshes[column]}: {losses[row, column]:.7f}", file=sys.stderr, flush=True)
                del restored, state
    print("written on      " + "".join(f"{text:>24}" for text in args.meshes))
    for text, row in zip(args.meshes, losses):
        print(f"{text:<16}" + "".join(f"{loss:24.7f}" for loss in row) + f"   spread {np.ptp(row):.1e}")
    return 0


def prepare(loader: Loader, program: Program) -> tuple[Callable, Callable]:
    """The step and the evaluation, compiled."""
    state, batch = abstract_state(program), put_batch(program, loader.batch(0))
    step, evaluate = compile_step(program).lower(state, batch), compile_eval(program).lower(state.params, batch)
    return step.compile(), evaluate.compile()


if __name__ == "__main__":
    run_main(main)
