"""Gradients on their way from the products that form them to the optimizer, and their norm. Everything here is local.

A device's part of a gradient, of its rows and positions, is scattered over the axes that split its parameter: at once over
those that split it in a step or as a gradient (in a pipeline: after each microbatch), over the others that split it at rest
when the step ends. There it is summed over the axes left: once a step, however many microbatches, and between groups of
devices (hybrid shard) a shard at a time.
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

from jaxlm.parallel.rules import At, Dims, Layout, by_dims, is_vector


def lay_gradient(layout: Layout, dims: Dims, dw: jax.Array, *, came: At, goes: At) -> jax.Array:
    """From how it lies at `came` to how it lies at `goes`: summed over the axes that split only there."""
    return scatter(dw, layout.split_further(dims, than=came, at=goes))


def finish_gradients(layout: Layout, dims: Any, grads: Any, factor: jax.Array | float = 1.0) -> Any:
    """This device's parts of all gradients, as they added up, to its shares at rest of their sums times `factor`.

    Vectors of one kind become one array here: a message or a kernel for each costs more than their numbers.
    """
    laid = by_dims(partial(lay_gradient, layout, came="grads", goes="rest"), dims, grads)
    sums, tree = jax.tree.flatten(laid)
    kinds: dict[tuple, list[int]] = {}
    for i, (of, dw) in enumerate(zip(_leaves(dims), sums, strict=True)):
        own = [axis for axes in layout.axes(of, at="rest") for axis in axes]
        over = tuple(axis for axis in layout.split("batch", "residual") if axis not in own)
        if is_vector(of):
            kinds.setdefault((over, dw.shape), []).append(i)
        else:
            sums[i] = factor * (jax.lax.psum(dw, over) if over else dw)
    for (over, _), members in kinds.items():
        stacked = jax.lax.optimization_barrier(jnp.stack([sums[i] for i in members]))  # or the compiler takes it apart
        for i, dw in zip(members, factor * (jax.lax.psum(stacked, over) if over else stacked)):
            sums[i] = dw
    return jax.tree.unflatten(tree, sums)


def global_norm(layout: Layout, dims: Any, grads: Any) -> jax.Array:
    """Root of the sum of all squares of gradients at rest, f32[].

    Rows are summed for each array, and then all rows' sums at once: a kernel for each array's would take longer than its sum.
    So too vectors of one kind are squared as one array.
    """
    groups: dict[Any, list] = {}
    for i, (of, g) in enumerate(zip(_leaves(dims), jax.tree.leaves(grads), strict=True)):
        groups.setdefault((of, g.shape if is_vector(of) else i), []).append(g)
    squares: dict[tuple[str, ...], list] = {}
    for (of, _), group in groups.items():
        own = tuple(axis for axes in layout.axes(of, at="rest") for axis in axes if layout.mesh.shape[axis] > 1)
        squares.setdefault(own, []).append(jnp.square(jnp.stack(group)).sum(-1).ravel())
    total = jnp.float32(0)
    for own, rows in squares.items():
        square = jax.lax.optimization_barrier(jnp.concatenate(rows)).sum()  # or the compiler sums each by itself
        total = total + (jax.lax.psum(square, own) if own else square)
    return jnp.sqrt(total)


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
