"""Working copies: weights in the compute dtype, cast once a step, whose gradients are float32 all the same.

Where a step holds all weights (mesh.zero below 3) they are gathered here, once a step, in the compute dtype.

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

from jaxlm.parallel.rules import At, Dims, Layout, by_dims, is_vector


@partial(jax.tree_util.register_dataclass, data_fields=["value", "hook"], meta_fields=["at"])
@dataclass(frozen=True)
class Working:
    """value: the weight in the compute dtype.   hook: zeros, float32, read by nobody; its cotangent is the gradient, which lies
    as one does `at`."""

    value: jax.Array
    hook: jax.Array
    at: At = "step"

    def __getitem__(self, index: Any) -> Working:
        assert index is ..., "a working copy is read whole"
        return self


Value = jax.Array | Working  # of a weight: as it rests, or as a step reads it


def has_copy(dims: Dims) -> bool:
    """Whether parameters of these dims get a working copy: weights of products and tables that are looked up in, not positions,
    which are added in float32."""
    return not is_vector(dims) and "position" not in dims


def working_copies(params: Any, dims: Any, dtype: str, layout: Layout, *, at: At = "step") -> Any:
    """Of `params` at rest, as a step holds them: a working copy of each that has one, its gradient to lie as one does `at`."""

    def held(param: jax.Array, of: Dims) -> jax.Array:
        for i, axes in enumerate(layout.split_further(of, than="step", at="rest")):
            param = jax.lax.all_gather(param, axes, axis=i, tiled=True) if axes else param
        return param

    def copy(of: Dims, param: jax.Array) -> Value:
        if not has_copy(of):
            return held(param, of)
        value = held(param.astype(dtype), of)
        parts = map(layout.num_parts, layout.split_further(of, than="step", at=at))
        shape = tuple(size // n for size, n in zip(value.shape, parts))
        return Working(value, jnp.zeros(shape, param.dtype), at)

    return by_dims(copy, dims, params)


def cast(weight: Value, dtype: Any) -> jax.Array:
    """The weight in `dtype`: a working copy's value, a parameter cast here and now."""
    return weight.value if isinstance(weight, Working) else weight.astype(dtype)


def lies(weight: Value) -> At:
    """How the gradient of `weight` lies that its backward gives."""
    return weight.at if isinstance(weight, Working) else "step"


def gradient_of(weight: Value, grad: jax.Array) -> Any:
    """`grad`, float32, as the cotangent of `weight`."""
    if isinstance(weight, Working):
        return Working(None, grad, weight.at)  # pyright: ignore
    return grad.astype(weight.dtype)


def gradients(tree: Any) -> Any:
    """The cotangent of a tree with working copies, or the tree itself, with one leaf a parameter: the hooks."""

    def is_working(leaf: Any) -> bool:
        return isinstance(leaf, Working)

    return jax.tree.map(lambda leaf: leaf.hook if is_working(leaf) else leaf, tree, is_leaf=is_working)
