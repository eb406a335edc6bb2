"""model.remat=auto: what the backward reuses, chosen by compiling a step each way and timing those that fit.

The choice is remembered in the checkpoints of the run, whose resume has the same numbers to the bit, and in the user's cache
folder, for any run of the same step on the same kind of devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlm
from jaxlm.checkpoint.restore import newest_manifest
from jaxlm.compiled import memory_bytes
from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.feed import abstract_batch, put_batch, row_share
from jaxlm.files import write_whole
from jaxlm.models.pieces import KEPT
from jaxlm.parallel.gang import Gang
from jaxlm.step import (
    Program,
    TrainState,
    abstract_state,
    chosen_kernels,
    compile_step,
    init_state,
    make_program,
    step_options,
)

STEPS = 3  # timed, after one that is not
SETTINGS = ("batch_size", "seq_len", "accumulate", "z_loss", "loss_chunk_tokens", "skip_spikes", "deterministic")


@dataclass(frozen=True)
class Tuned:
    """program: with what was chosen.   facts: the choice and what each way took, empty where the config names one.
    steps: {(rows, tokens): the compiled step}, where it was measured just now."""

    program: Program
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[tuple[int, int], Callable] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """What config.json and the header have of it: nothing where the config names a way."""
        return {"remat": self.facts, "remat_choice": str(self)} if self.facts else {}

    def __str__(self) -> str:
        """One line for the header."""
        tried = []
        for remat, way in self.facts["tried"].items():
            needs = f"{way['memory_bytes'] / 2**30:.2f} GiB" if way["memory_bytes"] else "memory unknown"
            took = "does not fit" if way["step_s"] is None else f"{1e3 * way['step_s']:.1f} ms"
            tried.append(f"{_short(remat)} {took}, {needs}")
        how = "measured" if self.steps else "remembered"
        return f"{self.facts['chosen']}, {how} ({'; '.join(tried)})"


def _short(remat: str) -> str:
    return remat if "," not in remat else f"{remat.count('=')} names kept"


def tune(
    gang: Gang, program: Program, workdir: Path, note: Callable[[str], None] = lambda _: None,
    *, ways: Sequence[str] = (), limit_bytes: int | None = None,
) -> Tuned:  # fmt: skip
    """`program` with a model.remat of auto replaced by the fastest way that fits, in all processes alike.

    ways: to try, the last the one that needs least memory (none: `candidates`).
    limit_bytes: memory of a device (None: what the device says, if it does).
    """
    if program.config.model.remat != "auto":
        return Tuned(program)
    limit_bytes = limit_bytes or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    key, config = fingerprint(program, limit_bytes), program.config
    file = cache_folder(config) / f"remat-{key}.json"
    facts = gang.settle("what is remembered of model.remat", remembered(workdir, file, key), lambda found: found[0])
    if facts is not None and facts["chosen"] in facts["tried"]:
        return Tuned(with_remat(program, facts["chosen"]), facts)
    ways = ways or candidates(config)
    note(f"remat: compiling and timing a step in {len(ways)} ways: {', '.join(map(_short, ways))}")
    tried, compiled = measure(gang, program, ways, limit_bytes)
    chosen = min(reversed(tried), key=lambda remat: tried[remat]["step_s"] or float("inf"))  # the last if none fits
    facts = {"key": key, "chosen": chosen, "tried": tried}
    if gang.process == 0:
        with contextlib.suppress(OSError):  # then the run's checkpoints alone remember it
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(facts, indent=1).encode())
    shape = (config.train.batch_size, config.train.seq_len)
    return Tuned(with_remat(program, chosen), facts, {shape: compiled[chosen]} if chosen in compiled else {})


def candidates(config: Config) -> list[str]:
    """Ways to try, from the one that keeps most: all; what matmuls and attention made, which is a pipeline's "none" already;
    attention's output alone; nothing."""
    made = ",".join(part for part in KEPT.split(",") if config.model.activation == "swiglu" or "gate" not in part)
    return ["none", *([made] if config.mesh.pipeline == 1 else []), "attn_context=keep", "full"]


def with_remat(program: Program, remat: str) -> Program:
    model = dataclasses.replace(program.config.model, remat=remat)
    return make_program(dataclasses.replace(program.config, model=model), program.layout)


def measure(
    gang: Gang, program: Program, ways: Sequence[str], limit_bytes: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable]]:
    """({way: {memory_bytes, step_s: None where it does not fit}}, {way: compiled step}). States and batches are made for it
    and thrown away."""
    config = program.config
    shape = (config.train.batch_size, config.train.seq_len)

    def compiled(remat: str) -> Any:
        own = with_remat(program, remat)
        return unless_full(lambda: compile_step(own).lower(abstract_state(own), abstract_batch(own, shape)).compile())

    with ThreadPoolExecutor() as pool:
        steps = {remat: step for remat, step in zip(ways, pool.map(compiled, ways)) if step is not None}
    needs = {remat: memory_bytes(steps[remat]) if remat in steps else None for remat in ways}
    fits = [remat for remat in steps if (needs[remat] or 0) <= (limit_bytes or float("inf"))]
    fits = gang.settle("which ways fit", fits, lambda each: [way for way in ways if all(way in own for own in each)])
    state, batch, seconds = None, random_batch(program, shape), {}
    for remat in fits:
        state = state or init_state(program)
        if found := unless_full(partial(timed, steps[remat], state, batch)):
            seconds[remat], state = found
        else:  # it was donated
            state = None
    seconds = gang.settle("what each model.remat took", seconds, lambda each: each[0])
    return {remat: dict(memory_bytes=needs[remat], step_s=seconds.get(remat)) for remat in ways}, steps


def unless_full(make: Callable[[], Any]) -> Any:
    """What `make` gives; None where a device ran out of memory."""
    try:
        return make()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
    return None


def timed(step: Callable, state: TrainState, batch: Batch) -> tuple[float, TrainState]:
    """Seconds of a step after the first, and the state after them."""
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    begin = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - begin) / STEPS, state


def random_batch(program: Program, shape: tuple[int, int]) -> Batch:
    host, hosts = row_share(program)
    own = (shape[0] // hosts, shape[1])
    tokens = np.random.default_rng(0).integers(program.config.model.vocab_size, size=own, dtype=np.int32)
    starts = np.zeros(own, np.int32) if program.config.data.separates else None
    return put_batch(program, Batch(tokens, tokens, np.ones(own, np.float32), starts), host=host, hosts=hosts)


def fingerprint(program: Program, limit_bytes: int | None) -> str:
    """Of all that decides what a step takes."""
    config, layout = program.config, program.layout
    told = dict(
        model=dataclasses.asdict(config.model), mesh=dataclasses.asdict(config.mesh), degrees=dict(layout.mesh.shape),
        pipeline=dataclasses.asdict(config.pipeline), optim=[config.optim.name, config.optim.offload],
        train={name: getattr(config.train, name) for name in SETTINGS}, documents=config.data.separates,
        device=jax.devices()[0].device_kind, limit_gib=limit_bytes and limit_bytes >> 30, flags=os.environ.get("XLA_FLAGS", ""),
        kernels={key: choice.kernel.name for key, choice in chosen_kernels(config, layout).items()},
        options=step_options(program), versions=[jax.__version__, jaxlm.__version__],
    )  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: Config) -> Path:
    """train.compilation_cache, or jaxlm's folder in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxlm"
    return (Path(config.train.compilation_cache) if config.train.compilation_cache else user).expanduser()


def remembered(workdir: Path, file: Path, key: str) -> dict[str, Any] | None:
    """What the newest checkpoint, or else the cache, says of a step with this fingerprint."""
    saved = newest_manifest(workdir / "checkpoints")
    found = [saved.metadata.get("remat") if saved else None]
    with contextlib.suppress(OSError, ValueError):
        found.append(json.loads(file.read_text()))
    return next((facts for facts in found if facts and facts["key"] == key), None)
