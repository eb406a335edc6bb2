"""How the processes of a run open it: one holds the workdir, all hold the same settings, packages, data and devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.lock import STALE_S, RunLock
from jaxlm.data.corpus import Corpus, evaluation_loaders, open_corpus, training_loader
from jaxlm.data.loader import Loader
from jaxlm.guards import Closing
from jaxlm.header import versions
from jaxlm.parallel.gang import Gang
from jaxlm.parallel.multihost import agree, check_devices
from jaxlm.resume import last_made
from jaxlm.session import open_mesh, with_corpus
from jaxlm.settings import Resolved, flatten
from jaxlm.step import Program, make_program

DAY_S = 86400.0
T = TypeVar("T")


def take_lock(gang: Gang, stack: Closing, lock: RunLock) -> RunLock | None:
    """Process 0 holds the workdir for all of them; the others get None."""
    with gang.together("locking the workdir", limit_s=2 * STALE_S):  # another host's holder may have to grow old
        if gang.process != 0:
            return None
        gang.at_end.append(lock.__exit__)
        return stack.enter_context(lock)


@dataclass(frozen=True)
class Work:
    """What a run trains, and on what. resolved: settings, with those that the data decide."""

    resolved: Resolved
    corpus: Corpus
    program: Program
    loader: Loader
    held_out: dict[str, Loader]


def open_work(gang: Gang, resolved: Resolved, workdir: Path, note: Callable[[str], None]) -> Work:
    """Opens what settings name. Raises UserError, in all processes alike, where one has other settings, packages, data or
    devices than the others."""
    config = resolved.config
    with gang.together("comparing settings"):
        layout, made = open_mesh(config), last_made(workdir, note)
        if not config.model.vocab_size:
            # the data will say; what else does not fit the mesh is said before they are read
            any_size = dataclasses.replace(config.model, vocab_size=config.model.vocab_multiple * layout.mesh.size)
            make_program(dataclasses.replace(config, model=any_size), layout)
        if made is not None:
            made.compare_settings(config, layout.mesh.shape, note)
    settings = dict(flatten(dataclasses.asdict(config)))
    seen = {"checkpoints": committed_steps(workdir / "checkpoints"), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    agree(gang, settings | versions() | seen)
    check_devices(gang)
    corpus = in_turn(gang, lambda: open_corpus(config, workdir, note))
    with gang.together("opening data"):
        resolved = with_corpus(resolved, corpus, note)
        config = resolved.config
        if made is not None:
            made.compare_data(config, corpus.fingerprints, note)
        program = make_program(config, layout)
        loader, held_out = training_loader(config, corpus), evaluation_loaders(config, corpus, note)
    agree(gang, {"data": corpus.fingerprints, "mesh": dict(layout.mesh.shape)})
    return Work(resolved, corpus, program, loader, held_out)


def in_turn(gang: Gang, make: Callable[[], T]) -> T:
    """What `make` gives, made by process 0 first, however long that takes: the others find its files there."""
    made = None
    for turn, limit_s in (("preparing data", DAY_S), ("opening what process 0 prepared", 0.0)):
        with gang.together(turn, limit_s=limit_s):
            if (gang.process == 0) == (limit_s > 0):
                made = make()
    assert made is not None
    return made
