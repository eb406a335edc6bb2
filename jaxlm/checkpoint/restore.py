"""Reads checkpoints, whole or their parameters alone, onto the shardings that the caller asks for. Never writes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoint.layout import ITEM, committed_steps, junk, name_leaves
from jaxlm.checkpoint.quiet import silence_details
from jaxlm.config import Problem, UserError

log = logging.getLogger("jaxlm.checkpoint")

TABLE_ROWS = 20  # of a mismatch table; the rest is counted


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory: its step, the state in the asked-for tree and shardings, and what was saved beside it."""

    step: int
    state: Any
    metadata: dict[str, Any]


def restore_latest(directory: str | Path, abstract_state: Any) -> Restored | None:
    """The newest committed step of `directory`, or None where there is none; what is no checkpoint is skipped.

    Args:
      abstract_state: the state's tree with a `jax.ShapeDtypeStruct` that has a sharding at each leaf.

    Raises: UserError with a table of (path, saved, now) if names, shapes or dtypes differ, before anything is loaded.
    """
    directory = Path(directory).absolute()
    if skipped := junk(directory):
        log.warning("no checkpoints, skipped: %s", ", ".join(map(str, skipped)))
    steps = committed_steps(directory)
    return restore(directory, abstract_state, step=steps[-1]) if steps else None


def restore_params(directory: str | Path, abstract_params: Any, *, step: int | None = None) -> Restored:
    """The parameters alone, as `Restored.state`; optimizer state is not read. step: None takes the newest.

    Raises: UserError (exit code 3) without such a step, UserError with a table if the parameters differ.
    """
    directory = Path(directory).absolute()
    if step is None:
        step = (committed_steps(directory) or [None])[-1]
    return restore(directory, abstract_params, step=step, part="params")


def restore(directory: str | Path, abstract: Any, *, step: int | None, part: str = "") -> Restored:
    """Loads `step` of `directory`.

    Args:
      abstract: a tree with a `jax.ShapeDtypeStruct` that has a sharding at each leaf.
      part: name of the subtree of the saved state that `abstract` describes; other arrays are not read. Empty means
        the whole state, which must then have the leaves of `abstract` and no others.

    Raises: UserError as `restore_params`.
    """
    directory = Path(directory).absolute()
    steps = committed_steps(directory)
    if step is None or step not in steps:
        rule = "holds no checkpoint" if step is None else f"holds no checkpoint of step {step}"
        remedy = f"it has steps {', '.join(map(str, steps))}" if steps else "train first, or point to another --workdir"
        raise UserError(Problem(str(directory), rule, remedy), exit_code=3)
    path = directory / str(step)
    wanted = name_leaves(abstract, part=part)
    # The loop runs under transfer_guard("disallow"); reading a checkpoint is a transfer that is meant.
    with _reading(), jax.transfer_guard("allow"):
        found = ocp.checkpointables_metadata(str(path))
        check_fits(path, saved=found.metadata[ITEM], wanted=wanted, part=part)
        loaded = ocp.load_checkpointables(str(path), {ITEM: wanted})[ITEM]
    state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])
    return Restored(step, state, cast(dict[str, Any], found.custom_metadata or {}))


def check_fits(path: Path, *, saved: dict[str, Any], wanted: dict[str, Any], part: str) -> None:
    """Raises UserError with one row for each leaf that differs between what is `saved` and what is `wanted`.

    Orbax itself casts another dtype without a word and reports another shape leaf by leaf.
    """
    for name, leaf in wanted.items():
        assert leaf.sharding is not None, f"{name} has no sharding: say where it shall lie"
    names = list(wanted) + ([] if part else [name for name in saved if name not in wanted])
    rows = [(name, _describe(saved.get(name)), _describe(wanted.get(name))) for name in names]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return
    shown = [("path", "saved", "now"), *rows[:TABLE_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    table = [f"    {name:<{widths[0]}}  {was:<{widths[1]}}  {now}" for name, was, now in shown]
    if len(rows) > TABLE_ROWS:
        table.append(f"    ... and {len(rows) - TABLE_ROWS} more")
    rule = "\n".join([f"does not fit the model and optimizer of this run: {len(rows)} arrays differ", *table])
    raise UserError(Problem(str(path), rule, "restore with the settings it was saved with, or use a new --workdir"))


def _describe(leaf: Any) -> str:
    return "-" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _reading() -> ocp.Context:
    silence_details()
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # the names asked for, not all that are there
    return context
