"""How many samples a step takes, and how long its rows are: functions of the step alone, so nothing needs saving."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Lengths:
    """Tokens in a row from some steps on: (step, length), steps rising; before the first, and with none, whole samples.

    A step of shorter rows holds the same tokens, each sample cut into rows one after the other.
    """

    table: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """The length of a step's rows; 0 for whole samples."""
        return next((length for first, length in reversed(self.table) if step >= first), 0)


WHOLE = Lengths()
