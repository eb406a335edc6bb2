"""Checkpoints looked at without the run that wrote them: verified, compared, exported, in bounded memory.

Arrays are read by the names, shapes and dtypes that a step's manifest has, a gigabyte at a time, onto one device.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.layout import committed_steps, is_committed
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.manifest import Damage, Leaf
from jaxlm.checkpoint.restore import changed, check_sums, read_leaves, read_manifest
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Exit, Problem, UserError

BATCH_BYTES = 2**30
PARAMS = "params."

Advance = Callable[[int], Any]  # told the bytes read so far, piece by piece


def size_bytes(leaves: Mapping[str, Leaf]) -> int:
    return sum(_bytes(leaf) for leaf in leaves.values())


def verify(path: Path, advance: Advance) -> list[Damage]:
    """Everything that is wrong with the step in `path`.   Raises: Damage if a run deleted it meanwhile."""
    try:
        saved = read_manifest(path).leaves
    except Damage as damage:
        return [damage]
    found: list[Damage] = []
    batches = deque(_batches(saved))
    while batches:
        batch = batches.popleft()
        try:
            wrong = changed(batch, _read(path, batch))
            found += [Damage(path, f"checksum of {name} differs from what was saved") for name in wrong]
        except Damage as damage:
            if len(batch) > 1:  # which of them?
                batches.extendleft({name: leaf} for name, leaf in reversed(batch.items()))
                continue
            found.append(Damage(path, f"{next(iter(batch))} can't be read: {damage.reason}"))
        advance(size_bytes(batch))
    if not is_committed(path):
        raise Damage(path, "was deleted while it was read")
    return found


@dataclass(frozen=True)
class Difference:
    """One array in two steps. largest, relative: of the absolute difference, and that over the first's largest value; None
    where shapes or dtypes differ or one has no such array."""

    name: str
    one: str
    other: str
    largest: float | None
    relative: float | None


def differences(one: Path, other: Path, advance: Advance) -> list[Difference]:
    """Arrays that differ between two steps, in the first's order. Equal checksums are equal arrays and are not read."""
    a, b = read_manifest(one).leaves, read_manifest(other).leaves
    found = []
    for name in [*a, *(name for name in b if name not in a)]:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or str(x) != str(y):
            found.append(Difference(name, str(x or "-"), str(y or "-"), None, None))
        elif x != y:
            first, second = (np.asarray(_read(path, {name: x})[name], np.float64) for path in (one, other))
            largest, scale = (float(np.abs(values).max()) for values in (first - second, first))
            if largest != 0:
                found.append(Difference(name, str(x), str(y), largest, largest / scale if scale else math.inf))
        advance(_bytes(x or y))
    return found


def export(path: Path, workdir: Path, output: Path, *, dtype: str, advance: Advance) -> Path:
    """Writes the parameters alone of the step in `path` of the run in `workdir`, floats in `dtype`, as the run `output`.

    Evaluation and generation read it as they read any run; training does not go on from it. The host holds what is written.
    Raises: Damage of the step; UserError (exit code 3) if the export can't be written.
    """
    source = read_manifest(path)
    if there := committed_steps(output / "checkpoints"):
        rule = f"holds checkpoints already, of steps {', '.join(map(str, there))}"
        raise UserError(Problem(f"--output={output}", rule, "name an empty folder"), exit_code=Exit.UNUSABLE)
    cast: dict[str, jax.Array] = {}
    for batch in _batches({name: leaf for name, leaf in source.leaves.items() if name.startswith(PARAMS)}):
        loaded = _read(path, batch)
        check_sums(path, batch, loaded)
        floating = {name: jnp.issubdtype(x.dtype, jnp.floating) for name, x in loaded.items()}
        cast |= {name: x.astype(dtype) if floating[name] else x for name, x in loaded.items()}
        advance(size_bytes(batch))
    output.mkdir(parents=True, exist_ok=True)
    with RunLock(output) as lock, CheckpointStore(output / "checkpoints", lock=lock) as store:
        metadata = source.metadata | {"export": {"dtype": dtype, "from": str(path)}}
        store.save(source.step, cast, metadata=metadata)
        outcomes = store.close()
    for reason in (outcome.error for outcome in outcomes if outcome.error):
        remedy = "name an empty folder on a disk with room"
        raise UserError(Problem(f"--output={output}", reason, remedy), exit_code=Exit.UNUSABLE)
    made = Path("data/chars.json")  # a tokenizer that the run made for itself
    if (workdir / made).is_file():
        (output / made).parent.mkdir(exist_ok=True)
        shutil.copy(workdir / made, output / made)
    return output / "checkpoints" / str(source.step)


def _batches(leaves: Mapping[str, Leaf]) -> Iterator[dict[str, Leaf]]:
    """`leaves` in order, as many at a time as fit into BATCH_BYTES, one at least."""
    batch: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        if batch and size_bytes(batch) + _bytes(leaf) > BATCH_BYTES:
            yield batch
            batch = {}
        batch[name] = leaf
    if batch:
        yield batch


def _read(path: Path, leaves: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=here) for name, x in leaves.items()}
    return read_leaves(path, like)


def _bytes(leaf: Leaf | None) -> int:
    return 0 if leaf is None else math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
