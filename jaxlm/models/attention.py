# Dims: B batch, T query position, S key position, D model width, N heads, K kv heads, H head width.
"""Causal self-attention with grouped key/value heads."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.kernels import choose_attention
from jaxlm.models.params import add_bias, products, vector, weight
from jaxlm.models.position import alibi_slopes, rotate
from jaxlm.parallel.context import attend, choose_context
from jaxlm.parallel.random import keep_mask
from jaxlm.parallel.rules import Layout


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H) + positions) v, projected back to the residual's width."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
        kq, kk, kv, ko = jax.random.split(key, 4)
        std = model.init_std
        self.model, self.layout, self.products = model, layout, products(model, layout)
        self.query = weight(kq, (D, N, H), "embed heads head", std=std)
        self.key = weight(kk, (D, K, H), "embed kv_heads head", std=std)
        self.value = weight(kv, (D, K, H), "embed kv_heads head", std=std)
        self.out = weight(ko, (N, H, D), "heads head embed", std=std / (2 * model.num_layers) ** 0.5)
        self.query_bias = vector((N, H), "heads head", role="bias") if model.use_bias else None
        self.key_bias = vector((K, H), "kv_heads head", role="bias") if model.use_bias else None
        self.value_bias = vector((K, H), "kv_heads head", role="bias") if model.use_bias else None
        self.out_bias = vector((D,), "channel", role="bias") if model.use_bias else None

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None, starts_BT: jax.Array | None = None) -> jax.Array:
        """The branch's output before out_bias, [B, T, D]. With a key, dropout on the attention weights is on; with the place
        where each token's document starts in its row, a query sees keys of its own document only."""
        q_BTNH, k_BSKH, v_BSKH = self.products.columns(x_BTD, self.query, self.key, self.value)
        q_BTNH = add_bias(q_BTNH, self.query_bias)
        v_BSKH = checkpoint_name(add_bias(v_BSKH, self.value_bias), "value")
        layout, model, T = self.layout, self.model, q_BTNH.shape[1]
        row_len = layout.whole("seq", T)
        if model.position == "rope":
            # angles matter by their differences: the same in a document wherever it starts
            turn = partial(rotate, theta=model.rope_theta, first=layout.first("seq", T), row_len=row_len)
            q_BTNH, k_BSKH = turn(q_BTNH), turn(add_bias(k_BSKH, self.key_bias))
        # else softmax does not see what is added to all keys: key_bias has no gradient rather than one of rounding alone
        q_BTNH, k_BSKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BSKH, "key")
        kernel = choose_attention(model, layout.platform, documents=starts_BT is not None).kernel
        method = choose_context(layout, model, row_len).method
        slopes_N = jnp.asarray(alibi_slopes(model.num_heads)) if model.position == "alibi" else None
        keep_BNTS = None if key is None else self._keep(q_BTNH.shape, key)
        context_BTNH = attend(layout, kernel, method, q_BTNH, k_BSKH, v_BSKH, slopes_N, keep_BNTS, starts_BT)
        return self.products.rows(context_BTNH, self.out)

    def _keep(self, shape_BTNH: tuple[int, ...], key: jax.Array) -> jax.Array | None:
        """f32[B, N, T, S], what dropout multiplies the attention weights by; None without dropout.

        Laid out as attention sees it: whole rows, heads split over the axes of heads and of positions.
        """
        layout, rate = self.layout, self.model.dropout
        if rate == 0:
            return None
        (rows, seq, heads), (B, T, N) = layout.axes(("batch", "seq", "heads")), shape_BTNH[:3]
        parts = layout.whole("seq", 1)
        shape = (B, N // parts, T * parts, T * parts)
        return keep_mask(layout, key, shape, (rows, (*heads, *seq), (), ()), 1 - rate).astype("float32") / (1 - rate)
