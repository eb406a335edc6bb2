"""The same steps on one device and on several meshes: do the losses agree, and what does a step take?

  python scripts/bench_meshes.py --config configs/gpt2.py:355m [--config.a.b=v ...] --meshes one data=2 fsdp=2,model=2

A mesh is degrees separated by commas, with other keys of mesh, pipeline, train or model where need be, for example
pipeline=2,microbatches=16,batch_size=64; "one" is a single device. Each trains from the same seed on the same batches.
Prints a JSON line a mesh: device, step_ms (median of the second half), tokens/s, compile seconds, bytes a device by the
compiler's count and the process's peak by the device's (run a mesh alone for its own), collectives, the largest relative
difference of a loss from the first mesh's, and the losses.
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

from jaxlm.checks import check, ignored
from jaxlm.config import MESH_AXES, Config, MeshConfig, Problem, UserError
from jaxlm.data.corpus import open_corpus, training_loader
from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.describe import communication_summary
from jaxlm.parallel.mesh import make_layout
from jaxlm.session import with_vocabulary
from jaxlm.settings import Parser, load_file, resolve, run_main, split_overrides
from jaxlm.step import init_state, make_program
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
            same = losses.shape == reference.shape
            worst = float(np.max(np.abs(losses / reference - 1))) if same else None
            print(json.dumps(result | {"worst_relative_difference": worst}), flush=True)
    return 0


def apply(config: Config, text: str) -> Config:
    """`config` with what `text` says of its mesh, its pipeline and its batch. Raises UserError as resolving does."""
    parts = {} if text == "one" else dict(part.split("=") for part in text.split(","))
    sections: dict[str, Any] = dict(
        mesh=MeshConfig(data=1), pipeline=config.pipeline, train=config.train, model=config.model
    )
    said = {"true": True, "false": False}
    for key, value in parts.items():
        homes = _homes(sections, key)
        if not homes:
            raise UserError(Problem(f"--meshes {text}", f"no axis or setting {key}", f"axes: {', '.join(MESH_AXES)}"))
        home = homes[0]
        sections[home] = dataclasses.replace(
            sections[home], **{key: int(value) if value.isdigit() else said.get(value, value)}
        )
    made = dataclasses.replace(config, **sections)
    if problems := [*check(made), *ignored(made, [f"{home}.{key}" for key in parts for home in _homes(sections, key)])]:
        raise UserError(*problems)
    return made


def _homes(sections: dict[str, Any], key: str) -> list[str]:
    return [name for name, section in sections.items() if key in {f.name for f in dataclasses.fields(section)}]


def measure(config: Config, corpus, text: str, steps: int) -> dict:
    config = apply(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps)), text)
    layout = make_layout(config.mesh, jax.devices()[: math.prod(config.mesh.degrees.values())])
    program = make_program(config, layout)
    loader = training_loader(config, corpus)
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
    peak = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in layout.mesh.devices.flat]
    return dict(
        mesh=text, device=jax.devices()[0].device_kind, devices=layout.mesh.size, step_ms=step_s * 1e3,
        tokens_per_s=tokens / step_s, rows_per_s=config.train.batch_size / step_s, compile_s=compiled.seconds,
        memory_bytes=compiled.memory_bytes, peak_bytes=peak, pipeline=str(program.pipe or ""),
        sent=communication_summary(compiled.collectives, shown=9), losses=losses,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
