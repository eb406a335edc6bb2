"""Muon for the matrices of a model and AdamW for everything else, in one optimizer state shaped like the parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

UPDATE_RMS = 0.2  # of a Muon direction, so that peak_lr and weight_decay mean what they mean for AdamW


class MuonState(NamedTuple):
    """count: i32[], updates applied.   first: f32, like the parameters: momentum, or AdamW's first moment.
    second: AdamW's second moment, like the parameter; f32[1] and unused where Muon serves the parameter."""

    count: jax.Array
    first: Any
    second: Any


def matrix_dims(role: str, dims: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """How a parameter is a matrix from its inputs to its outputs, or None: then AdamW serves it.

    A kernel with the model width `embed` as its first dim reads the residual stream: the other dims are its outputs,
    taken together (a query kernel [D, N, H] is one D x (N H) matrix). With `embed` as its last dim it writes to the
    stream. Biases, scales, embeddings and whatever touches `vocab` (the head of an untied model) are AdamW's, as the
    authors advise.   Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/

    Raises: ValueError if a kernel has `embed` neither first nor last.
    """
    if role != "kernel" or "vocab" in dims:
        return None
    first = dims.index("repeat") + 1 if "repeat" in dims else 0  # layers of a pipeline are stacked [stage, repeat, ...]
    rest = tuple(range(first, len(dims)))
    if len(dims) > 1 and dims[first] == "embed":
        return MuonDimensionNumbers(reduction_axis=rest[:1], output_axis=rest[1:])
    if len(dims) > 1 and dims[-1] == "embed":
        return MuonDimensionNumbers(reduction_axis=rest[:-1], output_axis=rest[-1:])
    raise ValueError(f"optim.name=muon: a kernel of dims {dims} does not say which are inputs; put embed first or last")


def scale_by_muon_or_adam(matrices: Any, *, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Directions of descent: orthogonalised Nesterov momentum where `matrices` says how, AdamW's elsewhere.

    A Muon direction is scaled by 0.2 sqrt(max(inputs, outputs)), which gives it the RMS that AdamW's usually has.
    optax.contrib.muon does the same with a partitioned state; here every moment is a tree like the parameters', so
    that `optax.tree_map_params` can lay it out as they are laid out.

    Args:
      matrices: the parameters' tree with `matrix_dims` of each leaf.
      beta1: momentum of both.   beta2, eps: AdamW's.

    Source: Liu et al., arXiv:2502.16982, section 2.2, for the scale.
    """
    served = jax.tree.map(lambda dims: dims is not None, matrices, is_leaf=_is_dims)
    others = jax.tree.map(lambda muon: not muon, served)
    muon: Any = scale_by_muon(beta=beta1, mu_dtype=jnp.float32, weight_dimension_numbers=matrices)
    adam: Any = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.float32)

    def init(params: Any) -> MuonState:
        count = jnp.zeros((), jnp.int32)
        if not jax.tree.leaves(params):  # the empty stand-in with which optax.tree_map_params asks for the structure
            return MuonState(count, params, params)
        first = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        second = jax.tree.map(lambda p, muon: jnp.zeros((1,) if muon else p.shape, jnp.float32), params, served)
        return MuonState(count, first, second)

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        coefficients = muon.init({})._replace(count=state.count, mu=_only(state.first, served))
        steep, next_muon = muon.update(_only(grads, served), coefficients)
        steep = jax.tree.map(_scale, steep, matrices)
        moments = optax.ScaleByAdamState(state.count, _only(state.first, others), _only(state.second, others))
        plain, next_adam = adam.update(_only(grads, others), moments)
        first, second = _either(next_muon.mu, next_adam.mu), _either(_only(state.second, served), next_adam.nu)
        return _either(steep, plain), MuonState(next_adam.count, first, second)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _scale(direction: jax.Array, dims: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    sides = [math.prod(direction.shape[dim] for dim in side) for side in dims]
    return direction * (UPDATE_RMS * math.sqrt(max(sides)))


def _is_dims(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def _only(tree: Any, keep: Any) -> Any:
    """`tree` with None, which JAX takes for no leaf at all, where `keep` is false."""
    return jax.tree.map(lambda leaf, kept: leaf if kept else None, tree, keep)


def _either(one: Any, other: Any) -> Any:
    """The tree whose leaves are those of `one`, and of `other` where `one` has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)
