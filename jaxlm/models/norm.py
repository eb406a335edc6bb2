# Dims: B batch, T position, D model width.
"""LayerNorm and RMSNorm, with statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.params import vector


class Norm(nnx.Module):
    """x / root-mean-square (after subtracting the mean: layernorm), times a scale, plus a bias if it has one."""

    def __init__(self, width: int, *, kind: str, eps: float, bias: bool):
        self.kind, self.eps = kind, eps
        self.scale = vector((width,), "channel", role="scale")
        self.bias = vector((width,), "channel", role="bias") if bias and kind == "layernorm" else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = x_BTD.astype(jnp.float32)
        if self.kind == "layernorm":
            y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
        y_BTD = y_BTD * jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return (y_BTD if self.bias is None else y_BTD + self.bias[...]).astype(x_BTD.dtype)
