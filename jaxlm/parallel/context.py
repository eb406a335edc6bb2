# Dims: B batch, T query position, S key position, N heads, K kv heads, H head width.
"""Causal attention over a mesh: rows and heads stay where they are; positions split over `context` meet for it.

Fully manual (`jax.shard_map` over every axis): each device runs the kernel on whole rows and its share of the heads, so a
kernel needs to know no mesh. With context > 1, an all-to-all trades positions for heads before it and back after it.
Source: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from jaxlm.parallel.rules import Layout

ROWS = ("batch", "seq")
QUERY, KEY = (*ROWS, "heads", "head"), (*ROWS, "kv_heads", "head")


def attend(layout: Layout, kernel: Callable, q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS) -> jax.Array:
    """`kernel` on every device's share, as if on one: context_BTNH in q's layout.

    Args:
      kernel: (q, k, v, bias, keep) -> context, on local arrays with whole rows.
      bias_1NTS: f32, added to the logits, or None.   keep_BNTS: f32, multiplies the attention weights, or None.
    """
    if layout.mesh.size == 1 or layout.inside:
        return kernel(q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS)
    rows, heads = layout.axes(("batch", "heads_of_rows"))
    bias_spec = None if bias_1NTS is None else jax.P(None, heads, None, None)
    keep_spec = None if keep_BNTS is None else jax.P(rows, heads, None, None)
    run = jax.shard_map(
        partial(_local, kernel, layout.mesh.shape["context"]),
        mesh=layout.mesh,
        in_specs=(layout.spec(QUERY), layout.spec(KEY), layout.spec(KEY), bias_spec, keep_spec),
        out_specs=layout.spec(QUERY),
        check_vma=False,
    )
    return run(q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS)


def _local(kernel: Callable, context: int, q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS) -> jax.Array:
    if context == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, bias_1NTS, keep_BNTS)
    swap = partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q_BTNH, k_BSKH, v_BSKH))
    return swap(kernel(q, k, v, bias_1NTS, keep_BNTS), split_axis=1, concat_axis=2)
