"""Which checkpoints a run keeps: the newest, one every so many steps, the best by held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.manifest import Damage
from jaxlm.checkpoint.restore import read_manifest

METRIC = "eval_loss"


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
        kept: dict[int, list[str]] = {}
        for reason, steps in rules.items():
            for step in steps:
                kept.setdefault(step, []).append(reason)
        return kept


def superseded(directory: Path, retention: Retention) -> list[int]:
    """Steps of `directory` that `retention` does not keep. A step that is damaged counts as none and is not among them:
    it keeps no good one from being kept, and stays where it is."""
    losses = {}
    for step in committed_steps(directory):
        with suppress(Damage):
            losses[step] = read_manifest(directory / str(step)).metrics.get(METRIC)
    kept = retention.reasons(losses)
    return [step for step in losses if step not in kept]
