"""How a parameter is declared: shape, logical dims, role and initial values in one line."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.parallel.dense import Products, gather_weight
from jaxlm.parallel.rules import Layout

Role = Literal["kernel", "embedding", "scale", "bias"]


class Parameter(nnx.Param):
    """An array with its logical dims and its role in the optimizer."""

    dims: tuple[str, ...]
    role: Role


def weight(key: jax.Array, shape: tuple[int, ...], dims: str, *, std: float, role: Role = "kernel") -> Parameter:
    """A matrix drawn from N(0, std^2), float32. `dims`: logical dims separated by spaces, one for each of `shape`."""
    return Parameter(std * jax.random.normal(key, shape, jnp.float32), dims=tuple(dims.split()), role=role)


def vector(shape: tuple[int, ...], dims: str, *, role: Literal["scale", "bias"]) -> Parameter:
    """A scale of ones or a bias of zeros, float32."""
    return Parameter(
        (jnp.ones if role == "scale" else jnp.zeros)(shape, jnp.float32), dims=tuple(dims.split()), role=role
    )


def array(param: Parameter | None) -> jax.Array | None:
    return None if param is None else param[...]


def use(param: Parameter, dtype: str, layout: Layout) -> jax.Array:
    """The parameter as compute wants it: cast as a step holds it, then gathered, so that links carry the compute dtype."""
    return gather_weight(layout, param[...], param.dims, dtype)


def products(model: ModelConfig, layout: Layout) -> Products:
    """How a block of `model` multiplies with its weights."""
    return Products(layout, model.dtype, regather=model.remat == "none")


def add_bias(y: jax.Array, bias: Parameter | jax.Array | None) -> jax.Array:
    """y [B, T, F...] + bias [F...] in y's dtype; the bias' gradient is summed over rows in float32."""
    return y if bias is None else _add(y, bias[...])


@jax.custom_vjp
def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    """As matrix and vector in the product's dtype: so cuBLAS adds it before it writes the product."""
    return (y.reshape(-1, bias.size) + bias.astype(y.dtype).reshape(-1)).reshape(y.shape)


def _add_backward(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy, dy.astype(jnp.float32).sum((0, 1))


_add.defvjp(lambda y, bias: (_add(y, bias), None), _add_backward)
