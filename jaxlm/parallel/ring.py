# Dims: K slots, R repeats.
"""Where a stage keeps what its forwards made until their backwards: in slots that go round, by copies or in place.

Which slot a tick uses depends on the stage, so the program can not know it. Copies: each leaf is [K, ...], and a slot is
written and read at an index, which for products and attention means a copy each way. In place: a slot is an array of its
own and the program has a branch for each, which makes its results there and reads them there. That is a branch of code
for each slot, 2 R P times a stage's layers: about twice the layers of the whole model, whatever P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.parallel.schedule import Schedule


def ring(schedule: Schedule) -> Copies | InPlace:
    """start: (arrays) -> slots of zeros shaped as these.   forward: (slots, slot, up, x) -> (slots with up(repeat, x) put
    into `slot`, the first array of that).   backward: (slots, slot, down, *args) -> down(repeat, what is in `slot`, *args)."""
    return InPlace(schedule) if schedule.in_place else Copies(schedule)


@dataclass(frozen=True)
class Copies:
    schedule: Schedule

    def start(self, kept: list) -> list:
        return [jnp.zeros((self.schedule.num_slots, *leaf.shape), leaf.dtype) for leaf in kept]

    def forward(self, slots: list, slot: Any, up: Callable, x: jax.Array) -> tuple[list, jax.Array]:
        kept = switch(self.schedule.repeat_in(slot), [partial(up, r) for r in range(self.schedule.repeats)], x)
        return [jax.lax.dynamic_update_index_in_dim(all_, one, slot, 0) for all_, one in zip(slots, kept)], kept[0]

    def backward(self, slots: list, slot: Any, down: Callable, *args: Any) -> Any:
        kept = [jax.lax.dynamic_index_in_dim(leaf, slot, 0, keepdims=False) for leaf in slots]
        branches = [partial(down, r) for r in range(self.schedule.repeats)]
        return switch(self.schedule.repeat_in(slot), branches, kept, *args)


@dataclass(frozen=True)
class InPlace:
    schedule: Schedule

    def start(self, kept: list) -> list[list]:
        return [[jnp.zeros(leaf.shape, leaf.dtype) for leaf in kept] for _ in range(self.schedule.num_slots)]

    def forward(self, slots: list[list], slot: Any, up: Callable, x: jax.Array) -> tuple[list[list], jax.Array]:
        def branch(k: int, slots: list[list], x: jax.Array) -> tuple[list[list], jax.Array]:
            kept = up(self.schedule.repeat_in(k), x)
            return [*slots[:k], kept, *slots[k + 1 :]], kept[0]

        return switch(slot, [partial(branch, k) for k in range(len(slots))], slots, x)

    def backward(self, slots: list[list], slot: Any, down: Callable, *args: Any) -> Any:
        def branch(k: int, slots: list[list], *args: Any) -> Any:
            return down(self.schedule.repeat_in(k), slots[k], *args)

        return switch(slot, [partial(branch, k) for k in range(len(slots))], slots, *args)


def switch(index: Any, branches: list[Callable], *args: Any) -> Any:
    """branches[index](*args), without a switch where there is one. Stages take different branches, the devices of one
    stage the same: collectives over other axes are safe inside."""
    return branches[0](*args) if len(branches) == 1 else jax.lax.switch(index, branches, *args)
