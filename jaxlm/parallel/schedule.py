# Dims: P stages, M microbatches. R repeats: times a microbatch passes each stage, one virtual stage of layers each time.
"""Which stage works on which microbatch at which tick: gpipe, circular and 1f1b as arithmetic.

Work is cut into M*R items, in groups of P microbatches: all of a group pass a repeat before its next one. Forward, item k
is at stage s at tick k + s; what leaves the last stage enters the first one for its next repeat on the very next tick.
Backward, items walk the repeats in falling order, and item k is at stage s at tick first_backward + k + (P - 1 - s).
The schedules differ in `first_backward` alone:

  gpipe, circular   all forward ticks first; every microbatch's activations are kept            (circular: R > 1)
  1f1b              the tick after the first item left the last stage; 2RP ticks' activations are kept, whatever M

That tick in between costs no time, for as many ticks do one half alone as before; it lets what a tick sends travel while
stages compute.

Source: Narayanan et al., arXiv:2104.04473, section 2.2, for 1F1B and its interleaving; here both halves of a tick are
taken by different microbatches, so that every stage runs one program without branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Item:
    """A microbatch at a repeat; fields are integers or arrays of them. on: whether the tick has work at this stage at all.
    index: its place in the order of items of its direction."""

    on: Any
    repeat: Any
    microbatch: Any
    index: Any


@dataclass(frozen=True)
class Schedule:
    name: Literal["gpipe", "circular", "1f1b"]
    stages: int
    microbatches: int
    repeats: int = 1
    in_place: bool = False  # how slots are kept (ring.py)

    @property
    def num_items(self) -> int:
        return self.microbatches * self.repeats

    @property
    def forward_ticks(self) -> int:
        """Ticks from the first forward of any stage to the last; the backward takes as many."""
        return self.num_items + self.stages - 1

    @property
    def first_backward(self) -> int:
        """The tick at which the last stage does its first backward."""
        return min(self.repeats * self.stages, self.forward_ticks) if self.name == "1f1b" else self.forward_ticks

    @property
    def num_ticks(self) -> int:
        return self.first_backward + self.forward_ticks

    @property
    def num_slots(self) -> int:
        """Ticks whose activations a stage must keep."""
        return min(2 * self.repeats * self.stages, self.forward_ticks) if self.name == "1f1b" else self.forward_ticks

    @property
    def bubble_frac(self) -> float:
        """Share of a stage's forward and backward ticks without work: (P-1) / (MR + P-1)."""
        return (self.stages - 1) / self.forward_ticks

    @property
    def phases(self) -> tuple[tuple[int, int, bool, bool], ...]:
        """(first tick, past the last, whether stages do forwards, whether backwards), in order, none empty."""
        cuts = sorted(
            {
                0,
                min(self.first_backward, self.forward_ticks),
                max(self.first_backward, self.forward_ticks),
                self.num_ticks,
            }
        )
        return tuple((a, b, a < self.forward_ticks, a >= self.first_backward) for a, b in zip(cuts, cuts[1:]))

    def forward(self, stage: Any, tick: Any) -> Item:
        """The item whose forward `stage` does at `tick`; clipped into range where it is not on."""
        k = tick - stage
        index = _clip(k, self.num_items - 1)
        return self._item(k == index, index, self.repeat_in(index))

    def backward(self, stage: Any, tick: Any) -> Item:
        k = tick - self.first_backward - (self.stages - 1 - stage)
        index = _clip(k, self.num_items - 1)
        return self._item(k == index, index, self.repeats - 1 - index % (self.stages * self.repeats) // self.stages)

    def forward_index(self, item: Item) -> Any:
        """The place in the order of forwards of what `item` is now."""
        group = self.stages * self.repeats
        return item.index // group * group + item.repeat * self.stages + item.index % self.stages

    def repeat_in(self, slot: Any) -> Any:
        """The repeat of the forward at hand in a slot: place in the order of forwards modulo num_slots."""
        return slot % (self.stages * self.repeats) // self.stages

    def _item(self, on: Any, index: Any, repeat: Any) -> Item:
        group = index // (self.stages * self.repeats)
        return Item(on, repeat, group * self.stages + index % self.stages, index)


def _clip(k: Any, last: int) -> Any:
    """k held to 0..last; by numpy unless k is jax's, so that whoever only draws a schedule touches no device."""
    return np.clip(k, 0, last) if isinstance(k, int | np.integer | np.ndarray) else jnp.clip(k, 0, last)
