# Dims: B batch, T position, D model width, V padded vocabulary, N tokens of one device, C chunks of them,
# S shards of the vocabulary.
"""Cross entropy whose gradient is formed in the forward pass, a chunk of tokens at a time: no other logits exist.

Each device sees its rows, its positions and its shard of the vocabulary; what must be summed is summed once, after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.models.kernels import Choice, choose, triton_refuses
from jaxlm.models.softmax_kernel import softmax_terms
from jaxlm.parallel.dense import gather_positions, gather_weight, reduce_gradient, scatter_positions
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.working import Value, gradient_of, lies

HEAD = ("vocab", "embed")


class Settings(NamedTuple):
    """What stays fixed in a run; see `cross_entropy_sums`."""

    layout: Layout
    vocab_size: int
    z_loss: float
    chunk_tokens: int
    kernel: LossKernel


@dataclass(frozen=True)
class LossKernel:
    """chunk_bytes: of the logits that exist at one time, where the config does not say how many: each chunk more reads and
      writes the head's gradient once more.
    terms: (logits_NV, labels_N, weights_N, Settings, gradient: bool) -> (z_N, label_N, d objective / d logits in their
      dtype or None): f32 log sum exp of a row and the logit of its label, of whole rows whichever share of V is here.
    refuses: (model config, layout) -> None if it serves, else the reason."""

    name: str
    chunk_bytes: int
    terms: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]]
    refuses: Callable[[ModelConfig, Layout], str | None]


def cross_entropy_sums(
    x_BTD: jax.Array,
    head_VD: Value,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    layout: Layout,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_tokens: int = 0,
    kernel: LossKernel | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed (not averaged) loss over weighted tokens: (objective, nats), both f32[].

    With l = logits, z = log sum exp l:  nats = sum w (z - l[label]),  objective = nats + z_loss * sum w z^2.
    Only `objective` has a gradient; `nats` is for reports. Logits of rows >= vocab_size (padding) count as -inf.
    Logits are made in x's dtype, everything after in f32; the head's gradient accumulates in f32 over chunks.

    Args:
      x_BTD: what the head reads, in the compute dtype, as dense.RESIDUAL.   head_VD: the head as a step holds it.
      labels_BT: i32 in [0, vocab_size).   weights_BT: f32, 0 where a token does not count.
      chunk_tokens: about how many tokens' logits exist at a time on a device; 0: as many as have the kernel's chunk_bytes.
      kernel: of LOSS; None is XLA's.

    Source: z-loss, Chowdhery et al., arXiv:2204.02311, section 5.
    """
    settings = Settings(layout, vocab_size, z_loss, chunk_tokens, kernel or XLA)
    return _sums(x_BTD, head_VD, labels_BT, weights_BT, settings)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(x_BTD, head_VD, labels_BT, weights_BT, settings):
    return _sums_and_gradients(settings, False, x_BTD, head_VD, labels_BT, weights_BT)[:2]


def _sums_forward(x_BTD, head_VD, labels_BT, weights_BT, settings):
    objective, nats, dx_BTD, dhead_VD = _sums_and_gradients(settings, True, x_BTD, head_VD, labels_BT, weights_BT)
    return (objective, nats), (dx_BTD, gradient_of(head_VD, dhead_VD))


def _sums_backward(settings, saved, cotangents):
    dx_BTD, dhead = saved
    scale = cotangents[0]
    return dx_BTD * scale.astype(dx_BTD.dtype), jax.tree.map(lambda leaf: leaf * scale, dhead), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _sums_and_gradients(settings: Settings, gradient: bool, x_BTD, head_VD, labels_BT, weights_BT) -> tuple:
    """(objective, nats, dx, dhead), the first two of the whole mesh; without `gradient` the last two are None."""
    layout = settings.layout
    at, head_VD = lies(head_VD), gather_weight(layout, head_VD, HEAD, x_BTD.dtype)
    x_BTD = gather_positions(layout, x_BTD)
    C = num_chunks(labels_BT.size, settings.chunk_tokens or fitting_tokens(settings.kernel, head_VD))
    chunks = (x_BTD.reshape(C, -1, x_BTD.shape[-1]), labels_BT.reshape(C, -1), weights_BT.reshape(C, -1))

    def add(sums, chunk):
        x_ND, labels_N, weights_N = chunk
        logits_NV = jnp.einsum("nd,vd->nv", x_ND, head_VD)
        z_N, label_N, dlogits_NV = settings.kernel.terms(logits_NV, labels_N, weights_N, settings, gradient)
        nats_N = weights_N * (z_N - label_N)
        objective = (nats_N + settings.z_loss * weights_N * jnp.square(z_N)).sum()
        sums, dx_ND = [sums[0] + objective, sums[1] + nats_N.sum(), sums[2]], None
        if gradient:
            dx_ND = jnp.einsum("nv,vd->nd", dlogits_NV, head_VD)
            sums[2] = sums[2] + jnp.einsum("nv,nd->vd", dlogits_NV, x_ND, preferred_element_type=jnp.float32)
        return tuple(sums), dx_ND

    zero = jnp.zeros((), jnp.float32)
    dhead_VD = jnp.zeros(head_VD.shape, jnp.float32) if gradient else None
    (objective, nats, dhead_VD), dx_CND = jax.lax.scan(add, (zero, zero, dhead_VD), chunks)
    objective, nats = jax.lax.psum((objective, nats), layout.split("batch", "seq"))
    if dhead_VD is None or dx_CND is None:
        return objective, nats, None, None
    dx_BTD = scatter_positions(layout, dx_CND.reshape(x_BTD.shape), layout.split("vocab"))
    return objective, nats, dx_BTD, reduce_gradient(layout, dhead_VD, HEAD, at=at)


def _xla_terms(logits_NV, labels_N, weights_N, settings: Settings, gradient: bool):
    vocab, dtype = settings.layout.split("vocab"), logits_NV.dtype
    index_V = jnp.arange(logits_NV.shape[1])
    index_V = index_V + (jax.lax.axis_index(vocab) * logits_NV.shape[1] if vocab else 0)
    logits_NV = jnp.where(index_V < settings.vocab_size, logits_NV.astype(jnp.float32), -jnp.inf)
    hit_NV = index_V == labels_N[:, None]
    top_N = jnp.maximum(logits_NV.max(-1), jnp.finfo(jnp.float32).min)  # finite, should these rows be padding alone
    sum_N = jnp.exp(logits_NV - top_N[:, None]).sum(-1)
    label_N = jnp.where(hit_NV, logits_NV, 0.0).sum(-1)
    if vocab:
        tops_SN, sums_SN, labels_SN = jax.lax.all_gather(jnp.stack([top_N, sum_N, label_N]), vocab, axis=1)
        top_N, label_N = tops_SN.max(0), labels_SN.sum(0)
        sum_N = (sums_SN * jnp.exp(tops_SN - top_N)).sum(0)
    z_N = top_N + jnp.log(sum_N)
    if not gradient:
        return z_N, label_N, None
    slope_N = 1 + 2 * settings.z_loss * z_N
    dlogits_NV = weights_N[:, None] * (jnp.exp(logits_NV - z_N[:, None]) * slope_N[:, None] - hit_NV)
    return z_N, label_N, dlogits_NV.astype(dtype)


def _pallas_terms(logits_NV, labels_N, weights_N, settings: Settings, gradient: bool):
    return softmax_terms(
        logits_NV, labels_N, weights_N, vocab_size=settings.vocab_size, z_loss=settings.z_loss, gradient=gradient,
        interpret=settings.layout.platform != "gpu",
    )  # fmt: skip


def _pallas_refuses(model: ModelConfig, layout: Layout) -> str | None:
    vocab = "*".join(layout.split("vocab"))
    return f"the vocabulary is split over {vocab}" if vocab else triton_refuses(layout, model.loss_kernel)


# XLA's gradient is an array beside the logits, Pallas' takes their place
XLA = LossKernel("xla", 3 * 2**28, _xla_terms, lambda *call: None)
LOSS = (LossKernel("pallas", 7 * 2**29, _pallas_terms, _pallas_refuses), XLA)


def choose_loss(model: ModelConfig, layout: Layout) -> Choice:
    """The kernel that model.loss_kernel names, or for `auto` the first of LOSS that serves.

    Raises: UserError if a named kernel refuses.
    """
    return choose("model.loss_kernel", model.loss_kernel, LOSS, model, layout)


def fitting_tokens(kernel: LossKernel, head_VD: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Tokens whose logits, of this head and in its dtype, have chunk_bytes; at least one."""
    return max(1, kernel.chunk_bytes // (head_VD.shape[0] * head_VD.dtype.itemsize))


def num_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Into how many equal chunks to cut: the fewest of at most chunk_tokens tokens, unless the divisors of num_tokens
    make those smaller than an eighth of it; then the most of at least chunk_tokens."""
    divisors = [c for c in range(1, num_tokens + 1) if num_tokens % c == 0]
    fewest = next(c for c in divisors if num_tokens // c <= chunk_tokens)
    if 8 * (num_tokens // fewest) >= min(chunk_tokens, num_tokens):
        return fewest
    return max(c for c in divisors if num_tokens // c >= chunk_tokens)
