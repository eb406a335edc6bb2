# Dims: P stages, M microbatches, R repeats; K ticks kept.
"""A pipeline inside one program: losses and gradients of M microbatches over the stages of a mesh axis.

Knows no model: it is given three functions for one device's share and runs them by a Schedule, fully manual, inside a
shard_map over the whole mesh. Every stage runs the same program; who has no work at a tick computes on what is there and its
result is masked, so no stage branches and collectives over other axes are safe anywhere. Three static scans (forwards,
both, backwards) leave out the half of a tick that no stage needs.

What a forward keeps for its backward are the residuals of jax.vjp that are not weights, in Schedule.num_slots slots that go
round (ring.py): nothing is computed twice unless the stage's own rematerialisation says so. Both halves of a tick send
while the other half computes.

`first` (embedding) and `last` (head and loss) run on all stages at once, on the microbatch of the first, or the last,
stage: their weights are split over the pipeline axis too, so that the work is shared instead of repeated or waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.parallel.ring import ring, switch
from jaxlm.parallel.schedule import Item, Schedule
from jaxlm.parallel.working import gradients


@dataclass(frozen=True)
class Parts:
    """The model in three functions of local arrays; m is the microbatch, an i32[].

    first: (ends, m) -> x.   stage: (weights of one repeat, x, m, repeat) -> y, shaped as x.
    last: (ends, y, m) -> (objective, report): sums over the microbatch's tokens; the objective's gradient is taken.
    """

    first: Callable[[Any, Any], jax.Array]
    stage: Callable[[Any, jax.Array, Any, Any], jax.Array]
    last: Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]


def loss_and_grads(schedule: Schedule, axis: str, parts: Parts, weights: Any, ends: Any) -> tuple[jax.Array, tuple]:
    """(sum of reports, (d weights, d ends)) of this device: gradients as the parts leave them, summed over microbatches.

    Args:
      weights: this stage's, each leaf [R, ...].   ends: parameters of `first` and `last`. Both may hold working copies.
    """
    run = _Run(schedule, axis, parts, _by_repeat(schedule, weights), ends)
    carry = run.start()
    for start, stop, forwards, backwards in schedule.phases:
        tick = partial(run.tick, forwards=forwards, backwards=backwards)
        carry = jax.lax.scan(tick, carry, jnp.arange(start, stop))[0]
    report, dweights, dends = carry.sums
    return report, (jax.tree.map(lambda *repeats: jnp.stack(repeats), *dweights), dends)


def loss(schedule: Schedule, axis: str, parts: Parts, weights: Any, ends: Any) -> jax.Array:
    """The sum of reports alone: forwards, nothing kept."""
    run = _Run(schedule, axis, parts, _by_repeat(schedule, weights), ends)

    def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        y, report = carry
        item, x = run.enter(t, y, run.newest(t, y))
        branches = [partial(run.forward, item.microbatch, r) for r in range(schedule.repeats)]
        y = switch(item.repeat, branches, x)
        left = schedule.forward(schedule.stages - 1, t)
        done = left.on & (left.repeat == schedule.repeats - 1)

        def top(report: jax.Array, y: jax.Array) -> jax.Array:
            return report + jnp.where(done, parts.last(ends, run.from_stage(-1, y), left.microbatch)[1], 0)

        return (run.send(y, 1), run.when(done, top, report, y)), None

    zero = jnp.zeros(jax.eval_shape(parts.first, ends, 0).shape, jax.eval_shape(parts.first, ends, 0).dtype)
    return jax.lax.scan(tick, (zero, jnp.zeros((), jnp.float32)), jnp.arange(schedule.forward_ticks))[0][1]


@partial(jax.tree_util.register_dataclass, data_fields=["new", "y", "dx", "slots", "sums"], meta_fields=[])
@dataclass(frozen=True)
class _Carry:
    """new: the first stage's input, of `first`.   y, dx: what arrived from the stages before and after.
    slots: output and residuals of the last K forwards, as the ring keeps them.   sums: (report, d weights, d ends)."""

    new: jax.Array
    y: jax.Array
    dx: jax.Array
    slots: Any
    sums: tuple


@dataclass(frozen=True)
class _Run:
    schedule: Schedule
    axis: str
    parts: Parts
    weights: list  # of each repeat
    ends: Any

    def start(self) -> _Carry:
        x = self._like(jax.eval_shape(self.parts.first, self.ends, 0))
        kept = jax.eval_shape(lambda w, x: self.linear(w, x, jnp.int32(0), 0)[0], self.weights[0], x)
        zeros = jax.tree.map(jnp.zeros_like, gradients((self.weights, self.ends)))
        return _Carry(self.newest(0, x), x, x, ring(self.schedule).start(kept), (jnp.zeros((), jnp.float32), *zeros))

    def tick(self, carry: _Carry, t: jax.Array, *, forwards: bool, backwards: bool) -> tuple[_Carry, None]:
        new, y, dx, slots, sums = carry.new, carry.y, carry.dx, carry.slots, carry.sums
        if forwards:
            item, x = self.enter(t, y, new)
            slot = (t - self.stage) % self.schedule.num_slots
            slots, y = ring(self.schedule).forward(slots, slot, partial(self.up, item.microbatch), x)
            new, y = self.newest(t + 1, y), self.send(y, 1)
        if backwards:
            dx, sums = self.backward(t, carry, slots)
            dx = self.send(dx, -1)
        return _Carry(new, y, dx, slots, sums), None

    def newest(self, t: jax.Array | int, like: jax.Array) -> jax.Array:
        """What the first stage takes in at tick t where that is a microbatch's first repeat."""
        item = self.schedule.forward(0, jnp.int32(t))
        return self.when(item.repeat == 0, lambda _: self.parts.first(self.ends, item.microbatch), like)

    def enter(self, t: jax.Array, y: jax.Array, new: jax.Array) -> tuple[Item, jax.Array]:
        """This stage's forward item at tick t, and its input: the first stage's from `first`, else what arrived."""
        item = self.schedule.forward(self.stage, t)
        return item, jnp.where((self.stage == 0) & (item.repeat == 0), new, y)

    def backward(self, t: jax.Array, carry: _Carry, slots: Any) -> tuple[jax.Array, tuple]:
        """The backward half of tick t: (d input, sums with this item's gradients added)."""
        schedule, parts, last_stage = self.schedule, self.parts, self.schedule.stages - 1
        (report, dweights, dends), dy = carry.sums, carry.dx
        item, leaving = schedule.backward(self.stage, t), schedule.backward(last_stage, t)
        slot = schedule.forward_index(item) % schedule.num_slots

        def top(sums: tuple) -> tuple:
            report, dends, dy = sums
            just_left = schedule.first_backward == schedule.repeats * schedule.stages
            if just_left:  # and came round to the first stage
                y = self.from_stage(0, carry.y)
            else:
                y = self.from_stage(-1, jax.lax.dynamic_index_in_dim(slots[0], slot, 0, keepdims=False))
            (objective, more), back = jax.vjp(lambda ends, y: parts.last(ends, y, leaving.microbatch), self.ends, y)
            on = leaving.on.astype(objective.dtype)
            more_dends, dy_top = gradients(back((on, jnp.zeros_like(more))))
            return report + more * on, _add(dends, more_dends), jnp.where(self.stage == last_stage, dy_top, dy)

        report, dends, dy = self.when(leaving.repeat == schedule.repeats - 1, top, (report, dends, dy))

        def down(r: int, kept: list, dweights: list, dy: jax.Array) -> tuple[list, jax.Array]:
            pull = self.linear(self.weights[r], jnp.zeros_like(dy), item.microbatch, r)[1]
            dw, dx = pull(kept, dy)
            return [*dweights[:r], _add(dweights[r], gradients(dw)), *dweights[r + 1 :]], dx

        dweights, dx = ring(schedule).backward(slots, slot, down, dweights, jnp.where(item.on, dy, 0))
        entered = schedule.backward(0, t)

        def bottom(dends: Any, dx: jax.Array) -> Any:
            dx = self.from_stage(0, jnp.where(entered.on, dx, 0))
            back = jax.vjp(lambda ends: parts.first(ends, entered.microbatch), self.ends)[1]
            return _add(dends, gradients(back(dx)[0]))

        return dx, (report, dweights, self.when(entered.repeat == 0, bottom, dends, dx))

    def forward(self, microbatch: Any, repeat: int, x: jax.Array) -> jax.Array:
        return self.parts.stage(self.weights[repeat], x, microbatch, repeat)

    def up(self, microbatch: Any, repeat: int, x: jax.Array) -> list:
        return self.linear(self.weights[repeat], x, microbatch, repeat)[0]

    def linear(self, weights: Any, x: jax.Array, microbatch: Any, repeat: Any) -> tuple[list, Callable]:
        """A stage's forward: ([output, residuals that are not weights ...], (those, dy) -> (d weights, dx))."""
        y, back = jax.vjp(lambda w, x: self.parts.stage(w, x, microbatch, repeat), weights, x)
        leaves, tree = jax.tree.flatten(back)
        own = {id(leaf) for leaf in jax.tree.leaves(weights)}
        kept = {id(leaf): leaf for leaf in leaves if id(leaf) not in own}  # each once, however many readers it has

        def pull(saved: list, dy: jax.Array) -> Any:
            found = dict(zip(kept, saved[1:], strict=True))
            return jax.tree.unflatten(tree, [found.get(id(leaf), leaf) for leaf in leaves])(dy)

        return [y, *kept.values()], pull

    @property
    def stage(self) -> jax.Array:
        return jax.lax.axis_index(self.axis)

    def send(self, x: jax.Array, step: int) -> jax.Array:
        """x of the stage `step` before this one, in a ring."""
        P = self.schedule.stages
        return jax.lax.ppermute(x, self.axis, [(s, (s + step) % P) for s in range(P)])

    def from_stage(self, stage: int, x: jax.Array) -> jax.Array:
        """x of one stage, on all of them."""
        return jax.lax.psum(jnp.where(self.stage == stage % self.schedule.stages, x, 0), self.axis)

    def when(self, needed: jax.Array, function: Callable, *args: Any) -> Any:
        """function(*args), whose result is as its first argument; that argument where the tick does not need it: the same on
        every stage. With R = 1 few ticks do not, and it is done in all."""
        if self.schedule.repeats == 1:
            return function(*args)
        return jax.lax.cond(needed, function, lambda *args: args[0], *args)

    def _like(self, shapes: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)


def _by_repeat(schedule: Schedule, weights: Any) -> list:
    """Weights whose leaves are [R, ...], a tree for each repeat."""
    return [jax.tree.map(lambda leaf, r=r: leaf[r], weights) for r in range(schedule.repeats)]
