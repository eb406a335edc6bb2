# Dims: N tokens, V vocabulary, W columns of a tile.
"""Cross entropy of logits and its gradient in one kernel: each row is read from memory once and its gradient written once.

A program has a row: tiles of W columns are read for the greatest logit and the sum of exponentials, kept as they run; then
read again, from the cache that still holds them, for the gradient, which takes the logits' place.

Source: Milakov and Gimelshein, arXiv:1805.02867, for the sum that runs with its maximum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

TILE, WARPS = 8192, 16


def softmax_terms(
    logits_NV: jax.Array,
    labels_N: jax.Array,
    weights_N: jax.Array,
    *,
    vocab_size: int,
    z_loss: float,
    gradient: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(z_N, label_N, dlogits_NV): log sum exp and the label's logit, f32, and the gradient of loss.py's objective, or None.

    dlogits = w (softmax (1 + 2 z_loss z) - one_hot), in the logits' dtype and place. Columns >= vocab_size count as -inf.
    """
    N, V = logits_NV.shape
    W = min(TILE, pl.next_power_of_2(V))
    row = jax.ShapeDtypeStruct((N,), jnp.float32)
    z_N, label_N, *dlogits = pl.pallas_call(
        partial(_row, V=V, W=W, vocab_size=vocab_size, z_loss=z_loss),
        grid=(N,),
        out_shape=(row, row, *(gradient * [jax.ShapeDtypeStruct((N, V), logits_NV.dtype)])),
        input_output_aliases={0: 2} if gradient else {},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="cross_entropy",
    )(logits_NV, labels_N, weights_N)
    return z_N, label_N, dlogits[0] if gradient else None


def _row(
    logits: Any, labels: Any, weights: Any, z_out: Any, label_out: Any, dlogits: Any = None,
    *, V: int, W: int, vocab_size: int, z_loss: float,
) -> None:  # fmt: skip
    n, full = pl.program_id(0), vocab_size // W  # tiles in which every column counts: a mask would part their loads

    def tile(i: jax.Array, whole: bool) -> tuple[jax.Array, jax.Array]:
        """(columns, their logits) of tile i; of one that is not whole, those that do not count are -inf."""
        columns_W, here = i * W + jnp.arange(W), logits.at[n, pl.ds(i * W, W)]
        if whole:
            return columns_W, plgpu.load(here).astype(jnp.float32)
        x_W = plgpu.load(here, mask=columns_W < V, other=0.0).astype(jnp.float32)
        return columns_W, jnp.where(columns_W < vocab_size, x_W, -jnp.inf)

    def add(i: jax.Array, running: tuple[jax.Array, jax.Array], whole: bool) -> tuple[jax.Array, jax.Array]:
        top, total = running
        _, x_W = tile(i, whole)
        higher = jnp.maximum(top, x_W.max())
        return higher, total * jnp.exp(top - higher) + jnp.exp(x_W - higher).sum()

    label, weight = plgpu.load(labels.at[n]), plgpu.load(weights.at[n])
    own = plgpu.load(logits.at[n, label]).astype(jnp.float32)  # before the loop, whose sums keep the warps together
    running = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    running = jax.lax.fori_loop(0, full, partial(add, whole=True), running)
    top, total = jax.lax.fori_loop(full, pl.cdiv(V, W), partial(add, whole=False), running)
    z = top + jnp.log(total)
    plgpu.store(z_out.at[n], z)
    plgpu.store(label_out.at[n], own)
    slope = 1 + 2 * z_loss * z

    if dlogits is None:
        return

    def write(i: jax.Array, _: None, whole: bool) -> None:
        columns_W, x_W = tile(i, whole)
        dx_W = weight * (jnp.exp(x_W - z) * slope - (columns_W == label).astype(jnp.float32))
        there, mask = dlogits.at[n, pl.ds(i * W, W)], None if whole else columns_W < V
        plgpu.store(there, dx_W.astype(dlogits.dtype), mask=mask)

    jax.lax.fori_loop(0, full, partial(write, whole=True), None)
    jax.lax.fori_loop(full, pl.cdiv(V, W), partial(write, whole=False), None)
