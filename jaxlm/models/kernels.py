# Dims: B batch, T query position, S key position, N heads, K kv heads, G heads of one kv head, H head width.
"""Kernels an operation can run on, in order of preference; each says whether it serves a call, and if not, why.

A kernel named in the config is used or refused with its reason; `auto` takes the first that serves and reports the
reasons of those it passed over. Attention's are here, norm.py has its own. A kernel sees one device's arrays and knows no
mesh: parallel/context.py brings rows together, whole or a block of keys at a time, and is where attention is differentiated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # public jax runs its forward again under remat

from jaxlm.config import ModelConfig, Problem, UserError
from jaxlm.parallel.rules import Layout


@dataclass(frozen=True)
class Kernel:
    """Attention of queries over one block of keys: out = softmax(q k^T / sqrt(H) + bias) v, and its derivative.

    forward: (q_BTNH, k_BSKH, v_BSKH, *, bias, keep, documents, causal) -> (out_BTNH in q's dtype, lse_BNT f32), with lse
      the natural log of the sum over S of exp(logits); of a query that sees no key, out is 0 and lse -inf.
    backward: (q, k, v, out, lse, dout_BTNH, *, bias, keep, documents, causal) -> (dq, dk, dv), each in its operand's
      dtype. It reads the softmax from lse, so with the out and lse of a whole row it gives one block's exact share.
    bias: f32[1, N, T, S] or None, added to the logits; gets no gradient.
    keep: f32[B, N, T, S] or None, multiplies the attention weights (dropout).
    documents: (i32[B, T], i32[B, S]), a number of each position's document: query t sees keys of its own; or None.
    causal: query t sees keys s <= t; needs T == S.
    refuses: (model config, platform, documents: bool, deterministic: bool) -> None if it serves, else the reason.

    Source: Dao, FlashAttention-2, arXiv:2307.08691, section 3.1 (lse, and the backward that starts from it).
    """

    name: str
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    refuses: Callable[[ModelConfig, str, bool, bool], str | None]


@dataclass(frozen=True)
class Choice:
    """A kernel, and why not those that `auto` would rather take."""

    kernel: Any
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        return self.kernel.name + (f" ({'; '.join(self.passed_over)})" if self.passed_over else "")


def choose(setting: str, named: str, kernels: Sequence[Any], *call: Any) -> Choice:
    """The kernel called `named`, or for `auto` the first of `kernels` whose `refuses(*call)` gives no reason.

    Raises: UserError if a named kernel refuses.
    """
    reasons = []
    for kernel in (kernel for kernel in kernels if named in ("auto", kernel.name)):
        reason = kernel.refuses(*call)
        if reason is None:
            return Choice(kernel, tuple(reasons))
        reasons.append(f"not {kernel.name}: {reason}")
    raise UserError(Problem(f"{setting}={named}", "; ".join(reasons), f"use {setting}=auto"))


def capability(layout: Layout) -> int:
    """The major number of its NVIDIA GPUs' compute capability; 0 of other devices."""
    major = str(getattr(layout.mesh.devices.flat[0], "compute_capability", None)).partition(".")[0]
    return int(major) if major.isdigit() else 0


def triton_refuses(layout: Layout, named: str) -> str | None:
    """Why a Pallas kernel that compiles by Triton does not serve here, or None. named: the setting that asks for it."""
    if layout.platform == "gpu" and capability(layout) < 8:
        kind = layout.mesh.devices.flat[0].device_kind
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not a {kind}"
    if layout.platform != "gpu" and named == "auto":
        return f"it is for NVIDIA GPUs; a {layout.platform} runs it interpreted, very slowly, where it is named"
    return None


def _grouped(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, G, H]: query heads beside the kv head they share."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def _xla_logits(q_BTNH, k_BSKH, bias_1NTS, documents, causal: bool) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = _grouped(q_BTNH, K)
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    if bias_1NTS is not None:
        logits_BKGTS += bias_1NTS.reshape(1, K, N // K, T, S)
    if causal:
        assert T == S, "which keys come before a query is known only where both are the same positions"
        logits_BKGTS = jnp.where(jnp.tri(T, dtype=bool), logits_BKGTS, -jnp.inf)
    if documents is not None:
        t_BT, s_BS = documents
        logits_BKGTS = jnp.where((t_BT[:, :, None] == s_BS[:, None])[:, None, None], logits_BKGTS, -jnp.inf)
    return logits_BKGTS


def _xla_forward(q_BTNH, k_BSKH, v_BSKH, *, bias, keep, documents=None, causal: bool) -> tuple[jax.Array, jax.Array]:
    logits_BKGTS = _xla_logits(q_BTNH, k_BSKH, bias, documents, causal)
    top_BKGT = logits_BKGTS.max(-1)
    if documents is not None:  # a query may see no key of this block
        top_BKGT = jnp.maximum(top_BKGT, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jnp.exp(logits_BKGTS - top_BKGT[..., None])
    sum_BKGT = weights_BKGTS.sum(-1)
    weights_BKGTS /= sum_BKGT[..., None] if documents is None else jnp.where(sum_BKGT > 0, sum_BKGT, 1)[..., None]
    if keep is not None:
        weights_BKGTS *= keep.reshape(weights_BKGTS.shape)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    B, T, N, _ = q_BTNH.shape
    return out_BTKGH.reshape(q_BTNH.shape), (top_BKGT + jnp.log(sum_BKGT)).reshape(B, N, T)


def _xla_backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, dout_BTNH, *, bias, keep, documents=None, causal: bool):
    """With P = exp(logits - lse): dlogits = P (dP - delta), where delta = sum_h dout out is sum_s P dP of whole rows."""
    K, f32 = k_BSKH.shape[2], jnp.float32
    logits_BKGTS = _xla_logits(q_BTNH, k_BSKH, bias, documents, causal)
    weights_BKGTS = jnp.exp(logits_BKGTS - lse_BNT.reshape(*logits_BKGTS.shape[:4], 1))
    dout_BTKGH = _grouped(dout_BTNH, K)
    dweights_BKGTS = jnp.einsum("btkgh,bskh->bkgts", dout_BTKGH, v_BSKH, preferred_element_type=f32)
    kept_BKGTS = weights_BKGTS
    if keep is not None:
        kept_BKGTS = weights_BKGTS * keep.reshape(weights_BKGTS.shape)
        dweights_BKGTS *= keep.reshape(weights_BKGTS.shape)
    delta_BKGT = (dout_BTKGH.astype(f32) * _grouped(out_BTNH, K)).sum(-1).transpose(0, 2, 3, 1)
    dlogits_BKGTS = weights_BKGTS * (dweights_BKGTS - delta_BKGT[..., None]) * q_BTNH.shape[-1] ** -0.5
    dlogits_BKGTS = dlogits_BKGTS.astype(q_BTNH.dtype)
    dq_BTKGH = jnp.einsum("bkgts,bskh->btkgh", dlogits_BKGTS, k_BSKH)
    dk_BSKH = jnp.einsum("bkgts,btkgh->bskh", dlogits_BKGTS, _grouped(q_BTNH, K))
    dv_BSKH = jnp.einsum("bkgts,btkgh->bskh", kept_BKGTS.astype(dout_BTNH.dtype), dout_BTKGH)
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BSKH, dv_BSKH


# jax 0.12 added score_mod to the primitives; 0.10 and 0.11 would reject it
_SCORE_MOD = {"score_mod": None} if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters else {}
_LAYOUT = cudnn.AttentionLayout.BTNH


def _cudnn_settings(q_BTNH, bias, causal: bool) -> dict[str, Any]:
    mask = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    reads_bias_without_gradient = (bias is not None, False)
    return _SCORE_MOD | dict(
        scale=q_BTNH.shape[-1] ** -0.5, seed=0, dropout_rate=0.0, variadic_args=reads_bias_without_gradient,
        mask_type=mask, layout=_LAYOUT.value, sliding_window_length=None,
    )  # fmt: skip


def _cudnn_operands(q_BTNH, k_BSKH, v_BSKH, bias) -> tuple[jax.Array, ...]:
    """q, k, v, bias, and the primitives' six places for lengths, offsets and pages of ragged rows, left empty.

    The bias is read rounded to bfloat16, which puts a penalty b off by up to 2^-8 |b|, 2^-9 |b| in the two-norm. Where weights
    fall with their penalties, as e^b, |b| is 1/sqrt(2) over them in the two-norm: less than one more rounding of the weights.
    Logits that outweigh large penalties see more of it: 5.5 roundings where a query attends by its slightest slope, 2^-8, to
    keys 1,024 to 2,047 positions back alone. Unless layers are scanned or rematerialised XLA forms one array of it for all.
    """
    empty = jnp.zeros(0, q_BTNH.dtype)
    if bias is None:
        return (q_BTNH, k_BSKH, v_BSKH, *(empty,) * 7)
    bias = _even(_even(bias.astype(q_BTNH.dtype), 2), 3, -1e9)
    return (*(_even(x, 1) for x in (q_BTNH, k_BSKH, v_BSKH)), bias, *(empty,) * 6)


def _even(x: jax.Array, dim: int, fill: float = 0.0) -> jax.Array:
    """cuDNN takes a bias over even lengths: an odd one gets a query without cotangent, and a key that no query sees."""
    return jnp.pad(x, [(0, n % 2 * (i == dim)) for i, n in enumerate(x.shape)], constant_values=fill)


def _cudnn_forward(q_BTNH, k_BSKH, v_BSKH, *, bias, keep, documents=None, causal: bool) -> tuple[jax.Array, jax.Array]:
    assert keep is None and documents is None
    operands, settings = _cudnn_operands(q_BTNH, k_BSKH, v_BSKH, bias), _cudnn_settings(q_BTNH, bias, causal)
    cudnn.check_layout(q_BTNH, k_BSKH, v_BSKH, bias, *(None,) * 6, _LAYOUT)
    has_bias, version, T = bias is not None, cudnn.check_cudnn_version(), q_BTNH.shape[1]
    cudnn.check_is_flash_attention(*operands[:3], _LAYOUT.value, version, has_bias, True)
    out_BTNH, lse_BNT = cudnn._dot_product_attention_fwd_p_wrapper.bind(*operands, is_training=True, **settings)
    return out_BTNH[:, :T], lse_BNT[..., :T]


def _cudnn_backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, dout_BTNH, *, bias, keep, documents=None, causal: bool):
    assert keep is None and documents is None
    operands, settings = _cudnn_operands(q_BTNH, k_BSKH, v_BSKH, bias), _cudnn_settings(q_BTNH, bias, causal)
    saved, T, S = (lse_BNT, out_BTNH, dout_BTNH), q_BTNH.shape[1], k_BSKH.shape[1]
    if bias is not None:
        saved = (_even(lse_BNT, 2), _even(out_BTNH, 1), _even(dout_BTNH, 1))
    dq_BTNH, dk_BSKH, dv_BSKH = cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, *saved, **settings)
    return dq_BTNH[:, :T], dk_BSKH[:, :S], dv_BSKH[:, :S]


def _cudnn_refuses(model: ModelConfig, platform: str, documents: bool, deterministic: bool) -> str | None:
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, not {platform}"
    if model.dtype != "bfloat16":
        return f"it takes bfloat16, not {model.dtype}"
    if model.head_dim % 8:
        return f"head width {model.head_dim} is not a multiple of 8"
    widest = 256 if cudnn.check_compute_capability("9.0") else 128
    if model.head_dim > widest:
        return f"head width {model.head_dim} is above this GPU's {widest}"
    if model.dropout > 0:
        return "jax gives it no dropout of attention weights"
    if documents:
        return "it would need the mask of documents as an array of every pair of positions"
    if deterministic:
        return "XLA loses it where it is to be deterministic (openxla/xla, pull request 46500)"
    return None


ATTENTION = (
    Kernel("cudnn", _cudnn_forward, _cudnn_backward, _cudnn_refuses),
    Kernel("xla", _xla_forward, _xla_backward, lambda *call: None),
)


def choose_attention(model: ModelConfig, platform: str, *, documents: bool, deterministic: bool = False) -> Choice:
    """The kernel that model.attention names, or for `auto` the first of ATTENTION that serves.

    documents: whether attention stays inside the documents of a row.   deterministic: train.deterministic.

    Raises: UserError if a named kernel refuses.
    """
    return choose("model.attention", model.attention, ATTENTION, model, platform, documents, deterministic)
