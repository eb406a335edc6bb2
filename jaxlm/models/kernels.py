# Dims: B batch, T query position, S key position, N heads, K kv heads, G heads of one kv head, H head width.
"""Kernels an operation can run on, in order of preference; each says whether it serves a call, and if not, why.

A kernel named in the config is used or refused with its reason; `auto` takes the first that serves and reports the
reasons of those it passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig, Problem, UserError


@dataclass(frozen=True)
class Kernel:
    """An implementation of causal attention.

    run: (q_BTNH, k_BSKH, v_BSKH, bias_1NTS or None, keep_BNTS or None) -> context_BTNH, logits scaled by 1/sqrt(H).
      bias, f32: added to the logits.   keep, f32: multiplies the attention weights (dropout).
    refuses: (model config, platform) -> None if it serves, else the reason.
    """

    name: str
    run: Callable[..., jax.Array]
    refuses: Callable[[ModelConfig, str], str | None]


@dataclass(frozen=True)
class Choice:
    kernel: Kernel
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        return self.kernel.name + (f" ({'; '.join(self.passed_over)})" if self.passed_over else "")


def _cudnn(q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS) -> jax.Array:
    assert bias_1NTS is None and keep_BNTS is None
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")


def _xla(q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS) -> jax.Array:
    if keep_BNTS is None:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, bias=bias_1NTS, is_causal=True, implementation="xla"
        )  # fmt: skip
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    if bias_1NTS is not None:
        logits_BKGTS += bias_1NTS.reshape(1, K, N // K, T, T)
    logits_BKGTS = jnp.where(jnp.tri(T, dtype=bool), logits_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1) * keep_BNTS.reshape(logits_BKGTS.shape)
    return jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH).reshape(q_BTNH.shape)


def _cudnn_refuses(model: ModelConfig, platform: str) -> str | None:
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, not {platform}"
    if model.dtype != "bfloat16":
        return f"it takes bfloat16, not {model.dtype}"
    if model.head_dim % 8:
        return f"head width {model.head_dim} is not a multiple of 8"
    if model.position == "alibi":
        return "its backward writes a full-size gradient of the ALiBi bias"
    if model.dropout > 0:
        return "jax gives it no dropout of attention weights"
    return None


ATTENTION = (
    Kernel("cudnn", _cudnn, _cudnn_refuses),
    Kernel("xla", _xla, lambda model, platform: None),
)


def choose_attention(model: ModelConfig, platform: str) -> Choice:
    """The kernel that model.attention names, or for `auto` the first of ATTENTION that serves.

    Raises: UserError if a named kernel refuses.
    """
    reasons = []
    for kernel in ATTENTION:
        if model.attention not in ("auto", kernel.name):
            continue
        reason = kernel.refuses(model, platform)
        if reason is None:
            return Choice(kernel, tuple(reasons))
        reasons.append(f"not {kernel.name}: {reason}")
    raise UserError(Problem(f"model.attention={model.attention}", "; ".join(reasons), "use model.attention=auto"))
