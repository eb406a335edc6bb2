# Dims: B batch, T query position, S key position, N heads, K kv heads, H head width, C devices that share a row.
"""Causal attention over a mesh: rows and heads stay where they are; the positions of a row, split over `seq`, meet for it.

Three ways to meet, one differentiable function. `alltoall` trades positions for heads before the kernel and back after
it, so each device sees whole rows of its share of the heads (Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509, section
3). `ring` and `allgather` leave heads alone and bring keys to queries (zigzag.py). All collectives are explicit, forward
and backward; a kernel sees local arrays only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig, Problem, UserError
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.zigzag import Gather, Ring, Walk, alibi

AUTO = ("alltoall", "allgather")  # in order of preference
WALKS = {"ring": Ring, "allgather": Gather}


class Kernel(Protocol):
    """Attention on one device: see jaxlm.models.kernels.Kernel."""

    @property
    def forward(self) -> Callable[..., tuple[jax.Array, jax.Array]]: ...
    @property
    def backward(self) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]: ...


@dataclass(frozen=True)
class Choice:
    """A method of context parallelism, and why not those that `auto` would rather take."""

    method: str
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.method + (f" ({'; '.join(self.passed_over)})" if self.passed_over else "")


def choose_context(layout: Layout, model: ModelConfig, seq_len: int) -> Choice:
    """The method that layout.context_method names, or for `auto` the first of AUTO that serves rows of seq_len.

    Raises: UserError if a named method, or for `auto` each of them, refuses.
    """
    named, reasons = layout.context_method, []
    for method in AUTO if named == "auto" else (named,):
        reason = _refuses(method, layout, model, seq_len)
        if reason is None:
            return Choice(method, tuple(reasons))
        reasons.append(f"not {method}: {reason}")
    remedy = (
        "use a smaller mesh.context" if named == "auto" else "use mesh.context_method=auto, or a smaller mesh.context"
    )
    raise UserError(Problem(f"mesh.context_method={named}", "; ".join(reasons), remedy))


def _refuses(method: str, layout: Layout, model: ModelConfig, seq_len: int) -> str | None:
    """None if `method` serves, else the reason."""
    context, C = _degree(layout, "seq")
    if C == 1:
        return None
    if method == "alltoall":
        for name, count in (("heads", model.num_heads), ("kv heads", model.num_kv_heads)):
            over, parts = _degree(layout, name.replace(" ", "_"))
            if count % (parts * C):
                return f"{count} {name} / {over} do not split over {context}"
        return None
    if model.dropout > 0:
        return "it has no dropout of attention weights"
    return f"a row of {seq_len} positions does not split into 2 * {context} chunks" if seq_len % (2 * C) else None


def _degree(layout: Layout, dim: str) -> tuple[str, int]:
    """("axis*axis=parts", parts): over what `dim` is split when computing."""
    axes = layout.axes((dim,))[0]
    parts = math.prod(layout.mesh.shape[axis] for axis in axes)
    return f"{'*'.join(axes) or 'nothing'}={parts}", parts


def attend(
    layout: Layout, kernel: Kernel, method: str, q_BTNH, k_BSKH, v_BSKH, slopes_N, keep_BNTS, documents_BT=None
) -> jax.Array:
    """Causal attention of whole rows, as if on one device: context_BTNH of this device's positions and heads, as q.

    The kernel's output and log-normaliser are both named attn_context: a backward that keeps that name runs no forward
    kernel again.

    Args:
      method: alltoall | allgather | ring, of no account where no row is split.
      slopes_N: f32, ALiBi, of all heads: slope * (t - s) is taken from the logits; or None. Gets no gradient.
      keep_BNTS: f32, multiplies the attention weights (dropout), alltoall only; or None. Gets no gradient.
      documents_BT: i32, a number of each position's document: attention stays inside; or None.
    """
    return _attend(layout, kernel, method, q_BTNH, k_BSKH, v_BSKH, slopes_N, keep_BNTS, documents_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(layout: Layout, kernel: Kernel, method: str, q, k, v, slopes, keep, documents) -> jax.Array:
    return _forward(layout, kernel, method, q, k, v, slopes, keep, documents)[0]


def _forward(layout: Layout, kernel: Kernel, method: str, q, k, v, slopes, keep, documents) -> tuple[jax.Array, tuple]:
    meeting, slopes = _meeting(layout, method), _share(layout, method, slopes)
    # what backward reads, in the layout that attention ran in: no operand meets twice
    q, k, v = (checkpoint_name(meeting.enter(x), name) for x, name in zip((q, k, v), ("query", "key", "value")))
    out, lse = (checkpoint_name(x, "attn_context") for x in meeting.forward(kernel, q, k, v, slopes, keep, documents))
    return meeting.leave(out), (q, k, v, out, lse, slopes, keep, documents)


def _backward(layout: Layout, kernel: Kernel, method: str, saved: tuple, dcontext_BTNH: jax.Array) -> tuple:
    meeting, (q, k, v, out, lse, *masks) = _meeting(layout, method), saved
    grads = meeting.backward(kernel, q, k, v, out, lse, meeting.enter(dcontext_BTNH), *masks)
    return (*map(meeting.leave, grads), None, None, None)


_attend.defvjp(_forward, _backward)


@dataclass(frozen=True)
class Heads:
    """Whole rows of a share of the heads on each device: positions and heads change places over `axes`, if any."""

    axes: tuple[str, ...]

    def enter(self, x_BTNH: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x_BTNH, self.axes, 2, 1, tiled=True) if self.axes else x_BTNH

    def leave(self, x_BTNH: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x_BTNH, self.axes, 1, 2, tiled=True) if self.axes else x_BTNH

    def forward(self, kernel: Kernel, q, k, v, slopes, keep, documents) -> tuple[jax.Array, jax.Array]:
        return kernel.forward(q, k, v, **self._masks(slopes, keep, documents, q))

    def backward(self, kernel: Kernel, q, k, v, out, lse, dout, slopes, keep, documents) -> tuple:
        return kernel.backward(q, k, v, out, lse, dout, **self._masks(slopes, keep, documents, q))

    def _masks(self, slopes, keep, documents_BT, q_BTNH: jax.Array) -> dict[str, Any]:
        if documents_BT is not None and self.axes:
            documents_BT = jax.lax.all_gather(documents_BT, self.axes, axis=1, tiled=True)
        t_T = jnp.arange(q_BTNH.shape[1], dtype=jnp.float32)
        pair = None if documents_BT is None else (documents_BT, documents_BT)
        return dict(bias=alibi(slopes, t_T, t_T), keep=keep, documents=pair, causal=True)


def _share(layout: Layout, method: str, slopes_N: jax.Array | None) -> jax.Array | None:
    """The slopes of the heads that this device attends for."""
    axes = layout.split("heads") + (layout.split("seq") if method == "alltoall" else ())
    if slopes_N is None or not axes:
        return slopes_N
    heads = slopes_N.shape[0] // layout.num_parts(axes)
    return jax.lax.dynamic_slice_in_dim(slopes_N, jax.lax.axis_index(axes) * heads, heads)


def _meeting(layout: Layout, method: str) -> Heads | Walk:
    axes, (_, C) = layout.split("seq"), _degree(layout, "seq")
    return Heads(axes) if method == "alltoall" or C == 1 else WALKS[method](axes, C)
