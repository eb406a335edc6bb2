# Dims: B batch, T query position, S key position, N heads, K kv heads, H head width.
"""Kernels an operation can run on, in order of preference; each says whether it serves a call, and if not, why.

A kernel named in the config is used or refused with its reason; `auto` takes the first that serves and reports the
reasons of those it passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxlm.config import ModelConfig, Problem, UserError


@dataclass(frozen=True)
class Kernel:
    """An implementation of causal attention.

    run: (q_BTNH, k_BSKH, v_BSKH, bias f32[1, N, T, S] or None) -> context_BTNH, scaled by 1/sqrt(H).
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


def _dot_product(implementation: Any, q_BTNH, k_BSKH, v_BSKH, bias_1NTS) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias=bias_1NTS, is_causal=True, implementation=implementation
    )  # fmt: skip


def _cudnn_refuses(model: ModelConfig, platform: str) -> str | None:
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, not {platform}"
    if model.dtype != "bfloat16":
        return f"it takes bfloat16, not {model.dtype}"
    if model.head_dim % 8:
        return f"head width {model.head_dim} is not a multiple of 8"
    if model.position == "alibi":
        return "its backward writes a full-size gradient of the ALiBi bias"
    return None


ATTENTION = (
    Kernel("cudnn", partial(_dot_product, "cudnn"), _cudnn_refuses),
    Kernel("xla", partial(_dot_product, "xla"), lambda model, platform: None),
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
