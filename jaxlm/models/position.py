# Dims: B batch, T query position, S key position, N heads, H head width.
"""Positions without parameters: rotary angles and ALiBi penalties."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x_BTNH: jax.Array, *, theta: float, first: jax.Array | int = 0, row_len: int = 0) -> jax.Array:
    """Turns channel pairs (i, i + H/2) of position t by t * theta^(-2i/H) radians, in float32.

    x holds the T positions from `first` on, of rows of `row_len` (0: T).
    The pairing is that of Llama's published weights in Hugging Face form. Source: Su et al., arXiv:2104.09864, section 3.4.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    rate_H = theta ** (-np.arange(0, H, 2) / H)
    angle_T1H = (np.arange(row_len or T)[:, None] * rate_H)[:, None, :]
    cos, sin = (jnp.asarray(turn(angle_T1H), jnp.float32) for turn in (np.cos, np.sin))
    cos, sin = (jax.lax.dynamic_slice_in_dim(table, first, T) for table in (cos, sin))
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slope of each head's penalty, f32[N], in logits per token of distance (> 0).

    With N a power of two the slopes are 2^(-8/N), 2^(-16/N), ..., 2^-8. Any other N takes those of the next lower power
    of two, then every other one of the next higher, which is the order of BLOOM's heads.
    Raises: ValueError if num_heads < 1.   Source: Press et al., arXiv:2108.12409, section 3 and its released code.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    low = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 / low * np.arange(1, low + 1))
    between = 2.0 ** (-8 / (2 * low) * np.arange(1, 2 * low + 1, 2))[: num_heads - low]
    return np.concatenate((slopes, between)).astype(np.float32)
