"""How a parameter is declared: shape, logical dims, role and initial values in one line."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.parallel.rules import Layout

Role = Literal["kernel", "embedding", "scale", "bias"]


def weight(key: jax.Array, shape: tuple[int, ...], dims: str, *, std: float, role: Role = "kernel") -> nnx.Param:
    """A matrix drawn from N(0, std^2), float32. `dims`: logical dims separated by spaces, one for each of `shape`."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), dims=tuple(dims.split()), role=role)


def vector(shape: tuple[int, ...], dims: str, *, role: Literal["scale", "bias"]) -> nnx.Param:
    """A scale of ones or a bias of zeros, float32."""
    return nnx.Param(
        (jnp.ones if role == "scale" else jnp.zeros)(shape, jnp.float32), dims=tuple(dims.split()), role=role
    )


def use(param: nnx.Param, dtype: str, layout: Layout) -> jax.Array:
    """The parameter as compute wants it: cast where it rests, then gathered, so that links carry the compute dtype."""
    at_rest = layout.constrain(param[...].astype(dtype), param.dims, storage=True)  # or the gather moves above the cast
    return layout.constrain(at_rest, param.dims)
