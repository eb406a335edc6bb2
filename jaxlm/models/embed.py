# Dims: B batch, T position, D model width, V padded vocabulary.
"""Token table, learned positions, and dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.models.norm import Norm
from jaxlm.models.params import weight
from jaxlm.parallel.rules import Layout


def padded_vocab(model: ModelConfig) -> int:
    """Rows of the token table: vocab_size rounded up to vocab_multiple, so that the head's matmul fills its tiles."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple


class Embedding(nnx.Module):
    """tokens -> residual stream: the table's rows, plus positions where learned, through a norm where BLOOM has one."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        kt, kp = jax.random.split(key)
        D, std = model.embed_dim, model.init_std
        self.model, self.layout = model, layout
        self.tokens = weight(kt, (padded_vocab(model), D), "vocab embed", std=std, role="embedding")
        learned = model.position == "learned"
        self.positions = (
            weight(kp, (model.max_seq_len, D), "position embed", std=std, role="embedding") if learned else None
        )
        self.norm = Norm(D, kind="layernorm", eps=model.norm_eps, bias=model.use_bias) if model.embed_norm else None

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # the table is gathered whole but for its vocab shards; rows are cast after the lookup: its gradient sums in f32
        table_VD = self.layout.constrain(self.tokens[...], self.tokens.dims)
        x_BTD = self.layout.constrain(jnp.take(table_VD, tokens_BT, axis=0), ("batch", "seq", "embed"))
        if self.positions is not None:
            x_BTD = x_BTD + self.layout.constrain(self.positions[...], self.positions.dims)[: tokens_BT.shape[1]]
        x_BTD = self.layout.constrain(x_BTD.astype(self.model.dtype), ("batch", "seq", "embed"))
        return x_BTD if self.norm is None else self.norm(x_BTD)


def dropout(x: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with entries zeroed at `rate` and the rest scaled by 1/(1-rate); `x` itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
