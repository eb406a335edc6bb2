"""Gradients on their way from the products that form them to the optimizer, and their norm. Everything here is local.

A device's part of a gradient, of its rows and positions, is scattered over the axes that split its parameter: as a step holds
it at once, as gradients lie after each microbatch, as it rests at the step's end. There it is summed over the axes left: once
a step, however many microbatches, and between groups of devices (hybrid shard) a shard at a time.
Source: Zhang et al., MiCS, arXiv:2205.00119, section 3.4 (two-hop sums).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint

from jaxlm.parallel.rules import At, Layout, by_dims, is_vector

Dims = tuple[str, ...]


def lay_gradient(layout: Layout, dims: Dims, dw: jax.Array, *, came: At, goes: At) -> jax.Array:
    """From how it lies at `came` to how it lies at `goes`: summed over the axes that split only there."""
    pairs = zip(layout.gathered(dims, at=came), layout.gathered(dims, at=goes))
    return scatter(dw, [tuple(axis for axis in new if axis not in old) for old, new in pairs])


def finish_gradients(layout: Layout, dims: Any, grads: Any) -> Any:
    """This device's parts of all gradients, as they added up, to its shares at rest of their sums.

    Vectors of one kind are summed as one array: a message for each, or a copy there and back, costs more than their numbers.
    """
    laid = by_dims(partial(lay_gradient, layout, came="grads", goes="rest"), dims, grads)
    sums, tree = jax.tree.flatten(laid)
    kinds: dict[tuple, list[int]] = {}
    for i, (of, dw) in enumerate(zip(_leaves(dims), sums, strict=True)):
        own = [axis for axes in layout.axes(of, at="rest") for axis in axes]
        over = tuple(axis for axis in layout.split("batch", "residual") if axis not in own)
        if over:
            kinds.setdefault((over, dw.shape if is_vector(of) else i), []).append(i)
    for (over, _), members in kinds.items():
        if len(members) == 1:
            sums[members[0]] = jax.lax.psum(sums[members[0]], over)
            continue
        for i, dw in zip(members, jax.lax.psum(jnp.stack([sums[i] for i in members]), over)):
            sums[i] = dw
    return jax.tree.unflatten(tree, sums)


def global_norm(layout: Layout, dims: Any, grads: Any) -> jax.Array:
    """Root of the sum of all squares of gradients at rest, f32[].

    Vectors of one kind are squared as one array: a kernel or two for each would take longer than their sums.
    """
    groups: dict[Any, list] = {}
    for i, (of, g) in enumerate(zip(_leaves(dims), jax.tree.leaves(grads), strict=True)):
        groups.setdefault((of, g.shape if is_vector(of) else i), []).append(g)
    squares: dict[tuple[str, ...], Any] = {}
    for (of, _), group in groups.items():
        own = tuple(axis for axes in layout.axes(of, at="rest") for axis in axes if layout.mesh.shape[axis] > 1)
        squares[own] = squares.get(own, 0.0) + jnp.square(jnp.stack(group)).sum()
    return jnp.sqrt(sum(jax.lax.psum(square, own) if own else square for own, square in squares.items()))


def scatter(dw: jax.Array, split: Iterable[tuple[str, ...]]) -> jax.Array:
    """The sum of `dw` over the axes given for each of its dims, split over them."""
    for i, axes in enumerate(split):
        if axes:
            dw = jax.lax.psum_scatter(dw, axes, scatter_dimension=i, tiled=True)
            # the dim that is split is the outer one in memory then: else parameter and moments would turn to it and back
            dw = with_layout_constraint(dw, MemoryLayout(tuple(range(dw.ndim))))
    return dw


def _leaves(dims: Any) -> list[Dims]:
    return jax.tree.leaves(dims, is_leaf=lambda leaf: isinstance(leaf, tuple))
