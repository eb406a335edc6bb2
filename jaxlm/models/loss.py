# Dims: B batch, T position, D model width, V padded vocabulary, C chunks of positions.
"""Cross entropy whose gradient is formed in the forward pass, a chunk of positions at a time: no [B, T, V] array exists."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def cross_entropy_sums(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_tokens: int = 8192,
) -> tuple[jax.Array, jax.Array]:
    """Summed (not averaged) loss over weighted tokens: (objective, nats), both f32[].

    With l = logits, z = log sum exp l:  nats = sum w (z - l[label]),  objective = nats + z_loss * sum w z^2.
    Only `objective` has a gradient; `nats` is for reports. Logits of rows >= vocab_size (padding) count as -inf.
    Logits are made in x's dtype, everything after in f32; the head's gradient accumulates in f32 over chunks.

    Args:
      x_BTD: what the head reads, in the compute dtype.   head_VD: the head, same dtype.
      labels_BT: i32 in [0, vocab_size).   weights_BT: f32, 0 where a token does not count.
      chunk_tokens: about how many tokens' logits exist at a time.

    Source: z-loss, Chowdhery et al., arXiv:2204.02311, section 5.
    """
    return _sums(x_BTD, head_VD, labels_BT, weights_BT, (vocab_size, z_loss, chunk_tokens))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(x_BTD, head_VD, labels_BT, weights_BT, settings):
    def chunk(sums, xs):
        objective, nats, _ = _chunk_terms(*xs, head_VD, settings)
        return (sums[0] + objective, sums[1] + nats), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(chunk, (zero, zero), _chunked(x_BTD, labels_BT, weights_BT, settings[2]))[0]


def _sums_forward(x_BTD, head_VD, labels_BT, weights_BT, settings):
    def chunk(carry, xs):
        objective, nats, dlogits_BTV = _chunk_terms(*xs, head_VD, settings)
        dx_BTD = jnp.einsum("btv,vd->btd", dlogits_BTV, head_VD)
        dhead_VD = jnp.einsum("btv,btd->vd", dlogits_BTV, xs[0], preferred_element_type=jnp.float32)
        return (carry[0] + objective, carry[1] + nats, carry[2] + dhead_VD), dx_BTD

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(head_VD.shape, jnp.float32))
    (objective, nats, dhead_VD), dx_CBTD = jax.lax.scan(
        chunk, carry, _chunked(x_BTD, labels_BT, weights_BT, settings[2])
    )
    dx_BTD = jnp.moveaxis(dx_CBTD, 0, 2).reshape(x_BTD.shape)
    return (objective, nats), (dx_BTD, dhead_VD, head_VD)


def _sums_backward(settings, saved, cotangents):
    dx_BTD, dhead_VD, head_VD = saved
    scale = cotangents[0]
    return (dx_BTD * scale.astype(dx_BTD.dtype), (dhead_VD * scale).astype(head_VD.dtype), None, None)


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk_terms(x_BTD, labels_BT, weights_BT, head_VD, settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(objective, nats, d objective / d logits in x's dtype) of one chunk."""
    vocab_size, z_loss, _ = settings
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD).astype(jnp.float32)
    index_V = jnp.arange(head_VD.shape[0])
    if vocab_size < head_VD.shape[0]:
        logits_BTV = jnp.where(index_V < vocab_size, logits_BTV, -jnp.inf)
    z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    hit_BTV = index_V == labels_BT[..., None]
    nats_BT = weights_BT * (z_BT - jnp.where(hit_BTV, logits_BTV, 0.0).sum(-1))
    objective = (nats_BT + z_loss * weights_BT * jnp.square(z_BT)).sum()
    slope_BT = 1 + 2 * z_loss * z_BT
    dlogits_BTV = weights_BT[..., None] * (jnp.exp(logits_BTV - z_BT[..., None]) * slope_BT[..., None] - hit_BTV)
    return objective, nats_BT.sum(), dlogits_BTV.astype(x_BTD.dtype)


def num_chunks(batch: int, seq_len: int, chunk_tokens: int) -> int:
    """Smallest divisor of seq_len that leaves at most chunk_tokens tokens a chunk (seq_len if none does)."""
    divisors = (c for c in range(1, seq_len + 1) if seq_len % c == 0)
    return next((c for c in divisors if batch * seq_len // c <= chunk_tokens), seq_len)


def _chunked(x_BTD, labels_BT, weights_BT, chunk_tokens):
    """Each array as [C, B, T/C, ...], taking every C-th position: rows and blocks of positions stay on their device."""
    B, T = labels_BT.shape
    C = num_chunks(B, T, chunk_tokens)
    return tuple(jnp.moveaxis(a.reshape(B, T // C, C, *a.shape[2:]), 2, 0) for a in (x_BTD, labels_BT, weights_BT))
