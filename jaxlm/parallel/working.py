"""Working copies: weights in the compute dtype, cast once a step, whose gradients are float32 all the same.

Where a step holds all weights (mesh.zero below 3) they are gathered here, once a step, in the compute dtype. Local, as all code
of a step but the optimizer.

A step that runs through many microbatches would cast every weight for each of them; the compiler does not take the cast out
of the loop. But the gradient of a bfloat16 array is bfloat16, and what it rounds is lost before the sum over
microbatches and devices begins. So a working copy brings a place for its gradient along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.parallel.rules import Layout, by_dims, is_vector


@partial(jax.tree_util.register_dataclass, data_fields=["value", "hook"], meta_fields=[])
@dataclass(frozen=True)
class Working:
    """value: the weight in the compute dtype.   hook: zeros, float32, read by nobody; its cotangent is the gradient."""

    value: jax.Array
    hook: jax.Array

    def __getitem__(self, index: Any) -> Working:
        assert index is ..., "a working copy is read whole"
        return self


Value = jax.Array | Working  # of a weight: as it rests, or as a step reads it


def working_copies(params: Any, dims: Any, dtype: str, layout: Layout) -> Any:
    """Of `params` at rest, as a step holds them: working copies of products' weights and of tables that are looked up in.

    These are the parameters with the model's width among their dims, but for the positions, which are added in float32.
    """

    def held(param: jax.Array, of: tuple[str, ...]) -> jax.Array:
        for i, (rest, step) in enumerate(zip(layout.gathered(of, at="rest"), layout.gathered(of))):
            axes = tuple(axis for axis in rest if axis not in step)
            param = jax.lax.all_gather(param, axes, axis=i, tiled=True) if axes else param
        return param

    def copy(of: tuple[str, ...], param: jax.Array) -> Value:
        if is_vector(of) or "position" in of:
            return held(param, of)
        value = held(param.astype(dtype), of)
        return Working(value, jnp.zeros(value.shape, param.dtype))

    return by_dims(copy, dims, params)


def cast(weight: Value, dtype: Any) -> jax.Array:
    """The weight in `dtype`: a working copy's value, a parameter cast here and now."""
    return weight.value if isinstance(weight, Working) else weight.astype(dtype)


def gradient_of(weight: Value, grad: jax.Array) -> Any:
    """`grad`, float32, as the cotangent of `weight`."""
    return Working(None, grad) if isinstance(weight, Working) else grad.astype(weight.dtype)  # pyright: ignore


def gradients(tree: Any) -> Any:
    """The cotangent of a tree with working copies, or the tree itself, with one leaf a parameter: the hooks."""

    def is_working(leaf: Any) -> bool:
        return isinstance(leaf, Working)

    return jax.tree.map(lambda leaf: leaf.hook if is_working(leaf) else leaf, tree, is_leaf=is_working)
