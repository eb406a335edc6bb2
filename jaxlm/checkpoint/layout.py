"""What lies in a checkpoint directory: the names of entries, and the names of arrays inside one.

    checkpoints/
      500/                             a committed step
      1000.orbax-checkpoint-tmp/       a save in flight, or what a killed one left
      250.pruned/                      a step on its way out
      750.aside/                       something that was in a step's way and is no checkpoint

A step holds one flat dict from name to array, `params.layers.0.attn.query`, whatever containers the state is made of:
nothing about the mesh, the sharding or the class of a node is kept, so none of them has to match when it is read.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Problem, UserError

log = logging.getLogger("jaxlm.checkpoint")

ITEM = "state"  # the one Orbax item of a step
COMMIT_FILE = "_CHECKPOINT_METADATA"  # Orbax writes it last, before the rename that commits a step
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's mark of a save in flight
PRUNED = ".pruned"
ASIDE = ".aside"
STEP_NAME = re.compile(r"0|[1-9][0-9]*")


def name_leaves(tree: Any, *, part: str = "") -> dict[str, Any]:
    """Leaves of `tree` by name, in the order of `jax.tree.leaves`: keys on the way to a leaf, joined by dots.

    part: the name of `tree` itself inside a larger one.   Raises: ValueError if two leaves get one name.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    prefix = [part] if part else []
    named = [(".".join([*prefix, *(jax.tree_util.keystr((key,), simple=True) for key in path)]), x) for path, x in flat]
    if len(dict(named)) < len(named):
        raise ValueError(f"two leaves of the state have one name: {sorted(name for name, _ in named)}")
    return dict(named)


def committed_steps(directory: Path) -> list[int]:
    """Steps with a whole checkpoint in `directory`, ascending; anything else there is left out."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if _is_step(entry) and _is_committed(entry))


def junk(directory: Path) -> list[Path]:
    """Entries of `directory` named like a step that hold no checkpoint: an empty directory, a file."""
    if not directory.is_dir():
        return []
    return sorted(entry for entry in directory.iterdir() if _is_step(entry) and not _is_committed(entry))


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed saves and killed deletions left. Only for the one process that writes in `directory`."""
    for entry in directory.iterdir():
        if TEMPORARY in entry.name or entry.name.endswith(PRUNED):
            shutil.rmtree(entry, ignore_errors=True)


def remove_temporary(directory: Path, step: int) -> None:
    """Deletes what a failed save of `step` left, so that a full disk has room for the next one."""
    for entry in directory.glob(f"{step}{TEMPORARY}*"):
        shutil.rmtree(entry, ignore_errors=True)


def prune(directory: Path, *, keep: int) -> None:
    """Deletes all but the newest `keep` committed steps. A step leaves by one rename: it is never there in half."""
    for step in committed_steps(directory)[:-keep]:
        try:
            doomed = (directory / str(step)).rename(directory / f"{step}{PRUNED}")
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("checkpoint of step %d could not be deleted: %s", step, error)


def clear_the_way(directory: Path, step: int) -> None:
    """Renames an entry that is no checkpoint but stands where one of `step` will go; nothing is deleted.

    Raises: UserError if it is a checkpoint.
    """
    entry = directory / str(step)
    if not entry.exists():
        return
    if _is_committed(entry):
        raise UserError(Problem(str(entry), "was saved by another run while this one trains", "give each a --workdir"))
    taken = len(list(directory.glob(f"{step}{ASIDE}*")))
    aside = entry.rename(directory / (f"{step}{ASIDE}" + (f"-{taken}" if taken else "")))
    log.warning("%s is no checkpoint and stood in the way of one; it is now %s", entry, aside.name)


def _is_step(entry: Path) -> bool:
    return STEP_NAME.fullmatch(entry.name) is not None


def _is_committed(entry: Path) -> bool:
    return (entry / COMMIT_FILE).is_file()
