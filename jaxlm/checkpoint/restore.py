"""Reads checkpoints, whole or their parameters alone, onto the shardings that the caller asks for. Never writes.

What is loaded is compared with the checksums of what was saved, computed again on the devices. A step that fails is damage,
and the one before it is tried; a step that is sound and does not fit the caller's shapes is the caller's error.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.checksum import checksums
from jaxlm.checkpoint.layout import ITEM, committed_steps, junk, name_leaves
from jaxlm.checkpoint.manifest import Damage, Leaf, Manifest
from jaxlm.config import Exit, Problem, UserError
from jaxlm.guards import first_line
from jaxlm.parallel.gang import SOLO, Gang
from jaxlm.settings import columns

log = logging.getLogger("jaxlm.checkpoint")

TABLE_ROWS = 20  # of a mismatch table; the rest is counted


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory: its step, the state in the asked-for tree and shardings, what was saved beside it, and the
    later steps that were passed over, with what is wrong with each."""

    step: int
    state: Any
    metadata: dict[str, Any]
    passed_over: dict[int, Damage] = field(default_factory=dict)


def restore_latest_good(directory: str | Path, abstract: Any, *, part: str = "", gang: Gang = SOLO) -> Restored | None:
    """The newest sound step of `directory`, or None where there is no step at all.

    A step that is truncated, unreadable or not what was saved is warned of, with its file and the reason, and left where it
    is. What is no checkpoint is skipped.

    gang: the processes that restore together, each its own parts of one step.
    Raises: UserError (exit code 3) with a list of what is wrong if there are steps and none is sound. UserError with a table
      of (path, saved, now) if names, shapes or dtypes of the newest sound step differ.
    """
    directory = Path(directory).absolute()
    if skipped := junk(directory):
        log.warning("no checkpoints, skipped: %s", ", ".join(map(str, skipped)))
    passed: dict[int, Damage] = {}
    for step in reversed(committed_steps(directory)):
        try:
            found = _load(directory / str(step), abstract, part, gang)
        except Damage as damage:
            log.warning("the checkpoint of step %d is passed over\n  %s\n  %s", step, damage.path, damage.reason)
            passed[step] = damage
        else:
            return replace(found, passed_over=passed)
    if passed:
        rule = "\n    ".join(["none of its checkpoints is sound:", *map(str, passed.values())])
        remedy = "mend the disk and rerun, restore a copy, or move them elsewhere to start anew"
        raise UserError(Problem(str(directory), rule, remedy), exit_code=Exit.UNUSABLE)
    return None


def restore(directory: str | Path, abstract: Any, *, step: int | None, part: str = "") -> Restored:
    """Loads `step` of `directory` and no other; None: the newest sound one.

    Args:
      abstract: a tree with a `jax.ShapeDtypeStruct` that has a sharding at each leaf.
      part: name of the subtree of the saved state that `abstract` describes, "params" say; other arrays are not read, and
        floats that were exported in a narrower type are widened. Empty means the whole state, with these leaves and no others.

    Raises: UserError (exit code 3) if there is no such step or it is damaged; UserError with a table if it does not fit.
    """
    directory = Path(directory).absolute()
    if step is None and (found := restore_latest_good(directory, abstract, part=part)) is not None:
        return found
    path = step_path(directory, step)
    try:
        return _load(path, abstract, part)
    except Damage as damage:
        steps = ", ".join(map(str, committed_steps(directory)))
        remedy = f"it has steps {steps}; python -m jaxlm.checkpoint verify says which are sound"
        raise UserError(Problem(str(damage.path), damage.reason, remedy), exit_code=Exit.UNUSABLE) from damage


def step_path(directory: Path, step: int | None) -> Path:
    """Where a step of `directory` lies.   Raises: UserError (exit code 3) naming those it has if it has not this one."""
    steps = committed_steps(directory)
    if step not in steps:
        rule = "holds no checkpoint" if step is None else f"holds no checkpoint of step {step}"
        remedy = f"it has steps {', '.join(map(str, steps))}" if steps else "train first, or point to another --workdir"
        raise UserError(Problem(str(directory), rule, remedy), exit_code=Exit.UNUSABLE)
    return directory / str(step)


def read_leaves(path: Path, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays of the step in `path` by name. leaves: shape, dtype and sharding of each.

    Hosts that hold copies of the same arrays each read them. Orbax can read once and broadcast, but adds zeros to do so: -0.0
    comes out as 0.0, and the checksum differs (docs/experiments.md).
    Raises: Damage if they cannot be read.
    """
    where = str(path.absolute())  # Orbax takes no other
    here = {name: leaf for name, leaf in leaves.items() if leaf.sharding.addressable_devices}
    try:
        with _reading():
            loaded = ocp.load_checkpointables(where, {ITEM: here})[ITEM]
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of memory: no word against the files
    except Exception as error:
        raise Damage(path, first_line(error)) from error
    make = jax.make_array_from_single_device_arrays  # of a stage on other hosts this one has nothing
    return {
        name: loaded[name] if name in here else make(leaf.shape, leaf.sharding, [], dtype=leaf.dtype)
        for name, leaf in leaves.items()
    }


def check_sums(path: Path, saved: Mapping[str, Leaf], loaded: Mapping[str, jax.Array]) -> None:
    """Raises Damage if an array of `loaded` has not the bits that were saved."""
    if wrong := changed(saved, loaded):
        more = f" and {len(wrong) - 3} more arrays" if len(wrong) > 3 else ""
        raise Damage(path, f"checksum differs from what was saved: {', '.join(wrong[:3])}{more}")


def changed(saved: Mapping[str, Leaf], loaded: Mapping[str, jax.Array]) -> list[str]:
    """Names of arrays of `loaded` that have not the bits that were saved."""
    return [name for name, value in checksums(loaded).items() if saved[name].checksum != value]


def newest_manifest(directory: Path) -> Manifest | None:
    """What the newest step that can be asked says of itself; whether its files are there is not looked at."""
    for step in reversed(committed_steps(directory)):
        with contextlib.suppress(Damage):
            return manifest.read(directory / str(step), whole=False)
    return None


def _load(path: Path, abstract: Any, part: str, gang: Gang = SOLO) -> Restored:
    wanted = name_leaves(abstract, part=part)
    # The loop runs under transfer_guard("disallow"); reading a checkpoint is a transfer that is meant.
    with jax.transfer_guard("allow"):
        found = _everywhere(gang, path, lambda: manifest.read(path))
        stored = {name: _as_exported(leaf, found.leaves.get(name)) if part else leaf for name, leaf in wanted.items()}
        check_fits(path, saved=found.leaves, wanted=stored, part=part)
        loaded = _everywhere(gang, path, lambda: read_leaves(path, stored))
        check_sums(path, found.leaves, loaded)
        leaves = [loaded[name].astype(leaf.dtype) for name, leaf in wanted.items()]
    return Restored(int(path.name), jax.tree.unflatten(jax.tree.structure(abstract), leaves), found.metadata)


def _everywhere(gang: Gang, path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives. Damage in every process where it is Damage in one, so that all of them pass over the same steps."""
    result, damage = None, None
    try:
        result = read()
    except Damage as found:
        damage = found
    damaged = gang.settle(f"reading {path}", damage is not None, lambda each: [i for i, bad in enumerate(each) if bad])
    if damaged:
        raise damage or Damage(path, f"process {damaged[0]} ({gang.names[damaged[0]]}) found it damaged")
    return result


def _as_exported(wanted: Any, saved: Any) -> Any:
    """`wanted`, in the dtype it was saved in if that is a float that widens to the one asked for without loss."""
    if saved is None or not all(jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating) for leaf in (saved, wanted)):
        return wanted
    widens = jnp.promote_types(saved.dtype, wanted.dtype) == wanted.dtype
    return jax.ShapeDtypeStruct(wanted.shape, jnp.dtype(saved.dtype), sharding=wanted.sharding) if widens else wanted


def check_fits(path: Path, *, saved: Mapping[str, Any], wanted: Mapping[str, Any], part: str) -> None:
    """Raises UserError with one row for each leaf that differs between what is `saved` and what is `wanted`.

    Orbax itself casts another dtype without a word and reports another shape leaf by leaf.
    """
    for name, leaf in wanted.items():
        assert leaf.sharding is not None, f"{name} has no sharding: say where it shall lie"
    names = list(wanted) + ([] if part else [name for name in saved if name not in wanted])
    rows = [(name, manifest.described(saved.get(name)), manifest.described(wanted.get(name))) for name in names]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return
    table = columns([("path", "saved", "now"), *rows[:TABLE_ROWS]])
    more = [f"... and {len(rows) - TABLE_ROWS} more"] if len(rows) > TABLE_ROWS else []
    head = f"does not fit the model and optimizer of this run: {len(rows)} arrays differ"
    remedy = "restore with the settings it was saved with, or use a new --workdir"
    raise UserError(Problem(str(path), "\n    ".join([head, *table, *more]), remedy))


def _reading() -> ocp.Context:
    silence_details()
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # the names asked for, not all that are there
    if jax.process_count() > 1:  # each reads for itself: where Orbax would wait for another, nobody would say for whom
        own = context.multiprocessing
        own.primary_host = jax.process_index()
        own.active_processes = {own.primary_host}
        own.barrier_sync_key_prefix = f"process {own.primary_host}"
    return context


def silence_details() -> None:
    """Keeps Orbax's account of its work, dozens of lines a save, and the traceback of a failed one out of a run's log."""
    logging.getLogger("absl").addFilter(_is_no_detail)  # Orbax logs through absl; adding a filter twice adds it once


def _is_no_detail(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING or "/orbax/checkpoint/" not in record.pathname
