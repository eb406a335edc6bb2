"""The same steps on one device and on several meshes: do the losses agree, and what does a step take?

  python scripts/bench_meshes.py --config configs/gpt2.py:355m [--config.a.b=v ...] --meshes one data=2 fsdp=2,model=2

A mesh is degrees separated by commas, with context_method=NAME if need be; "one" is a single device. Each trains from the
same seed on the same batches. Prints a JSON line a mesh: device, step_ms (median of the second half), tokens/s, compile
seconds, bytes a device by the compiler's count, the largest relative difference of a loss from the first mesh's, and the
losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.config import MESH_AXES, Config, MeshConfig, Problem, UserError
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.rules import Layout
from jaxlm.session import make_loader, open_corpus, with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import init_state, make_program, put_batch
from jaxlm.train import build


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="bench_meshes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--meshes", nargs="+", default=["one"])
    parser.add_argument("--steps", type=int, default=50)
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    config = resolve(load_file(args.config), overrides=overrides, presets=PRESETS).config
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(config, Path(folder), lambda _: None)
        config = with_vocabulary(config, corpus.tokenizer)
        for text in args.meshes:
            result = measure(config, corpus, text, args.steps)
            losses = np.array(result["losses"])
            reference = losses if reference is None else reference
            worst = float(np.max(np.abs(losses / reference - 1)))
            print(json.dumps(result | {"worst_relative_difference": worst}), flush=True)
    return 0


def layout_of(text: str) -> Layout:
    parts = {} if text == "one" else dict(part.split("=") for part in text.split(","))
    unknown = sorted(parts.keys() - {field.name for field in dataclasses.fields(MeshConfig)})
    if unknown:
        raise UserError(Problem(f"--meshes {text}", f"no axis {', '.join(unknown)}", f"axes: {', '.join(MESH_AXES)}"))
    mesh: dict[str, Any] = {"data": 1} | {k: int(v) if v.isdigit() else v for k, v in parts.items()}
    config = MeshConfig(**mesh)
    return make_layout(config, jax.devices()[: math.prod(config.degrees.values())])


def measure(config: Config, corpus, text: str, steps: int) -> dict:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps))
    program = make_program(config, layout_of(text))
    loader = make_loader(config, corpus.training, corpus.tokenizer, shuffle=True)
    state = init_state(program)
    compiled = build(program, state, loader)
    losses, times_s = [], []
    for i in range(steps):
        batch = jax.block_until_ready(put_batch(program, loader.batch(i)))
        begin = time.perf_counter()
        state, metrics = compiled.step(state, batch)
        losses.append(float(metrics.loss))
        times_s.append(time.perf_counter() - begin)
    step_s = statistics.median(times_s[steps // 2 :])
    tokens = config.train.batch_size * config.train.seq_len
    return dict(
        mesh=text, device=jax.devices()[0].device_kind, devices=program.layout.mesh.size, step_ms=step_s * 1e3,
        tokens_per_s=tokens / step_s, compile_s=compiled.seconds, memory_bytes=compiled.memory_bytes, losses=losses,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
