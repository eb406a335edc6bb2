# Dims: B batch, T position, D model width.
"""LayerNorm and RMSNorm, with statistics in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.models.params import vector


class Norm(nnx.Module):
    """x / root-mean-square (after subtracting the mean: layernorm), times a scale, plus a bias if it has one."""

    def __init__(self, model: ModelConfig, *, kind: str | None = None):
        self.kind, self.eps = kind or model.norm, model.norm_eps
        self.scale = vector((model.embed_dim,), "channel", role="scale")
        biased = model.use_bias and self.kind == "layernorm"
        self.bias = vector((model.embed_dim,), "channel", role="bias") if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        bias_D = None if self.bias is None else self.bias[...]
        return _normalised(x_BTD, self.scale[...], bias_D, self.kind, self.eps)


# of its own input alone the backward forms everything again: what it reads is x, not float32 copies of it
@partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def _normalised(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, kind: str, eps: float) -> jax.Array:
    y_BTD = x_BTD.astype(jnp.float32)
    if kind == "layernorm":
        y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
    y_BTD = y_BTD * jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + eps) * scale_D
    return (y_BTD if bias_D is None else y_BTD + bias_D).astype(x_BTD.dtype)
