"""What lies in a checkpoint directory: the names of entries, those of arrays inside one, and which steps stay.

    checkpoints/
      500/                             a committed step: Orbax's files and step.json (manifest.py)
      1000.writing.../                 a save in flight, or what a killed one left
      250.pruned/                      a step on its way out
      abandoned/750/                   what stood in the way of a save, with the reason in abandoned/notes.txt

A step holds one flat dict from name to array, `params.layers.0.attn.query`, whatever containers the state is made of:
nothing about the mesh, the sharding or the class of a node is kept, so none of them has to match when it is read.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint import manifest
from jaxlm.files import flush

log = logging.getLogger("jaxlm.checkpoint")

ITEM = "state"  # the one Orbax item of a step
ORBAX_FILE = "_CHECKPOINT_METADATA"  # tells a step that has lost its step.json from what is none
WRITING = ".writing"
PRUNED = ".pruned"
ABANDONED = "abandoned"
NOTES = "notes.txt"
LEFTOVER = re.compile(r"\d+(\.writing.*|\.pruned|\.orbax-checkpoint-tmp.*)")
STEP_NAME = re.compile(r"0|[1-9][0-9]*")
METRIC = "eval_loss"  # what the best checkpoints are the best by


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
    """Steps with a checkpoint in `directory`, ascending, sound or not; anything else there is left out."""
    return sorted(int(entry.name) for entry in _step_entries(directory) if is_committed(entry))


def junk(directory: Path) -> list[Path]:
    """Entries of `directory` named like a step that hold no checkpoint: an empty directory, a file."""
    return sorted(entry for entry in _step_entries(directory) if not is_committed(entry))


def is_committed(entry: Path) -> bool:
    return (entry / manifest.FILE).is_file() or (entry / ORBAX_FILE).is_file()


def writing_path(directory: Path, step: int) -> Path:
    return directory / f"{step}{WRITING}"


def commit(directory: Path, step: int) -> None:
    """Gives the sealed step its name: from here on it is restorable."""
    writing_path(directory, step).rename(directory / str(step))
    try:
        flush(directory)
    except OSError as error:  # the step is there; whether its name outlives a loss of power is all that is not known
        log.warning("%s: the name of step %d may not be on the disk yet: %s", directory, step, error)


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed saves and deletions left, and failed saves: a full disk has room for the next one. Only for the
    one process that writes in `directory`, while it saves nothing."""
    for entry in directory.glob("*"):
        if LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def remove(directory: Path, steps: Iterable[int]) -> None:
    """Deletes steps. Each leaves by one rename: it is never there in half."""
    for step in steps:
        try:
            doomed = (directory / str(step)).rename(directory / f"{step}{PRUNED}")
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("checkpoint of step %d could not be deleted: %s", step, error)


def abandon(entry: Path, reason: str) -> None:
    """Moves an entry of a checkpoint directory into abandoned/, out of the way of saves to come; nothing is deleted."""
    folder = entry.parent / ABANDONED
    folder.mkdir(exist_ok=True)
    names = itertools.chain([entry.name], (f"{entry.name}-{n}" for n in itertools.count(1)))
    target = entry.rename(next(folder / name for name in names if not (folder / name).exists()))
    log.warning("%s\n  moved to %s\n  %s", entry, target, reason)
    with contextlib.suppress(OSError), open(folder / NOTES, "a") as notes:  # a full disk keeps the move alone
        notes.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {target.name}: {reason}\n")


@dataclass(frozen=True)
class Retention:
    """newest: how many, >= 1.   every: steps divisible by it stay for ever (0: none).   best: how many with the
    smallest held-out loss stay (0: none)."""

    newest: int = 3
    every: int = 0
    best: int = 0

    def reasons(self, losses: Mapping[int, float | None]) -> dict[int, list[str]]:
        """Why each of the steps that are kept is kept.

        losses: the held-out loss of every step, None where there is none.
        """
        assert self.newest >= 1, self.newest
        scored = sorted((loss, -step) for step, loss in losses.items() if loss is not None and loss == loss)
        rules = {
            "newest": sorted(losses)[-self.newest :],
            f"every {self.every}": [step for step in losses if self.every and step % self.every == 0],
            "best": [-step for _, step in scored[: self.best]],
        }
        kept = {step: [reason for reason, steps in rules.items() if step in steps] for step in losses}
        return {step: reasons for step, reasons in kept.items() if reasons}


def superseded(directory: Path, retention: Retention) -> list[int]:
    """Steps of `directory` that `retention` does not keep. A step that is damaged counts as none and is not among them:
    it keeps no good one from being kept, and stays where it is."""
    losses = {}
    for step in committed_steps(directory):
        with contextlib.suppress(manifest.Damage):
            losses[step] = manifest.read(directory / str(step)).metrics.get(METRIC)
    kept = retention.reasons(losses)
    return [step for step in losses if step not in kept]


def _step_entries(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [entry for entry in directory.iterdir() if STEP_NAME.fullmatch(entry.name)]
