"""How many samples a step takes: a function of the step alone, so nothing needs saving."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ramp:
    """Batches that grow from `start` by `increment` to `final` while `samples` samples pass, an equal share at each
    size: Megatron's --rampup-batch-size START INCREMENT SAMPLES. Start 0: always `final`.

    Source: Megatron-LM, core/num_microbatches_calculator.py.
    """

    final: int
    start: int = 0
    increment: int = 0
    samples: int = 0

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """(first step, samples before it, batch size) of each size, in order."""
        rows, step, before = [], 0, 0
        if self.start:
            num = (self.final - self.start) // self.increment
            for k in range(num):
                size = self.start + k * self.increment
                rows.append((step, before, size))
                # this size holds while before < (k + 1) * samples / num
                steps = max(-(-((k + 1) * self.samples - before * num) // (size * num)), 0)
                step, before = step + steps, before + steps * size
        return (*rows, (step, before, self.final))

    def size(self, step: int) -> int:
        """Samples in a step."""
        return self._stage(step)[2]

    def before(self, step: int) -> int:
        """Samples in all steps before it."""
        first, before, size = self._stage(step)
        return before + (step - first) * size

    def _stage(self, step: int) -> tuple[int, int, int]:
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1]


def in_force(table: Sequence[tuple[int, T]], step: int, before: T) -> T:
    """The value of the last row (first step, value) of a rising table that a step has reached; `before` them all."""
    return next((value for first, value in reversed(table) if step >= first), before)
