# Dims: B batch, T query position, S key position, D model width, N heads, K kv heads, H head width.
"""Causal self-attention with grouped key/value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.embed import dropout
from jaxlm.models.kernels import choose_attention
from jaxlm.models.params import use, vector, weight
from jaxlm.models.position import alibi_slopes, rotate
from jaxlm.parallel.context import attend, choose_context
from jaxlm.parallel.rules import Layout


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H) + positions) v, projected back to the residual's width."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
        kq, kk, kv, ko = jax.random.split(key, 4)
        std = model.init_std
        self.model, self.layout = model, layout
        self.query = weight(kq, (D, N, H), "embed heads head", std=std)
        self.key = weight(kk, (D, K, H), "embed kv_heads head", std=std)
        self.value = weight(kv, (D, K, H), "embed kv_heads head", std=std)
        self.out = weight(ko, (N, H, D), "heads head embed", std=std / (2 * model.num_layers) ** 0.5)
        self.query_bias = vector((N, H), "heads head", role="bias") if model.use_bias else None
        self.key_bias = vector((K, H), "kv_heads head", role="bias") if model.use_bias else None
        self.value_bias = vector((K, H), "kv_heads head", role="bias") if model.use_bias else None
        self.out_bias = vector((D,), "channel", role="bias") if model.use_bias else None

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The branch's output, [B, T, D]. With a key, dropout on the attention weights is on."""
        q_BTNH = self._heads(x_BTD, self.query, self.query_bias, "heads")
        k_BSKH = self._heads(x_BTD, self.key, self.key_bias, "kv_heads")
        v_BSKH = checkpoint_name(self._heads(x_BTD, self.value, self.value_bias, "kv_heads"), "value")
        if self.model.position == "rope":
            q_BTNH, k_BSKH = (rotate(x, theta=self.model.rope_theta) for x in (q_BTNH, k_BSKH))
        q_BTNH, k_BSKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BSKH, "key")
        B, T, N, _ = q_BTNH.shape
        kernel = choose_attention(self.model, self.layout.platform).kernel
        method = choose_context(self.layout, self.model, T).method
        slopes_N = jnp.asarray(alibi_slopes(N)) if self.model.position == "alibi" else None
        keep_BNTS = None if key is None else dropout(jnp.ones((B, N, T, T)), rate=self.model.dropout, key=key)
        context_BTNH = attend(self.layout, kernel, method, q_BTNH, k_BSKH, v_BSKH, slopes_N, keep_BNTS)
        y_BTD = jnp.einsum("btnh,nhd->btd", context_BTNH, use(self.out, self.model.dtype, self.layout))
        return y_BTD if self.out_bias is None else y_BTD + self.out_bias[...].astype(y_BTD.dtype)

    def _heads(self, x_BTD: jax.Array, kernel: nnx.Param, bias: nnx.Param | None, dim: str) -> jax.Array:
        y_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, use(kernel, self.model.dtype, self.layout))
        y_BTNH = y_BTNH if bias is None else y_BTNH + bias[...].astype(y_BTNH.dtype)
        return self.layout.constrain(y_BTNH, ("batch", "seq", dim, "head"))
