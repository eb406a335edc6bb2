# Dims: B batch, T position, D model width, V padded vocabulary.
"""Token table, learned positions, and dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint

from jaxlm.config import ModelConfig
from jaxlm.models.norm import Norm, Stream
from jaxlm.models.params import products, use, weight
from jaxlm.parallel.dense import RESIDUAL
from jaxlm.parallel.random import keep_mask
from jaxlm.parallel.rules import Layout

# The gradient of learned positions, a sum over rows, makes XLA lay the whole residual stream out with rows innermost: on an
# H100 that cost 6.4 of 76.3 ms a step at 124M in transposes.
ROW_MAJOR = MemoryLayout((0, 1, 2))


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
        self.norm = Norm(model, layout, kind="layernorm") if model.embed_norm else None

    def __call__(self, tokens_BT: jax.Array, starts_BT: jax.Array | None = None) -> jax.Array:
        """RESIDUAL. A token's position is counted from where its document starts in the row; with None, the row."""
        x_BTD = products(self.model, self.layout).lookup(self.tokens, tokens_BT)
        if self.positions is not None:
            layout, T = self.layout, x_BTD.shape[1]
            first = layout.first("residual", T)
            table_TD = use(self.positions, "float32", layout)
            if starts_BT is None:
                positions_TD = jax.lax.dynamic_slice_in_dim(table_TD, first, T)
            else:
                starts_BT = jax.lax.dynamic_slice_in_dim(
                    starts_BT, first - layout.first("seq", starts_BT.shape[1]), T, axis=1
                )
                positions_TD = table_TD[first + jnp.arange(T) - starts_BT]
            x_BTD = (x_BTD + positions_TD).astype(x_BTD.dtype)
        x_BTD = with_layout_constraint(x_BTD, ROW_MAJOR)
        return x_BTD if self.norm is None else self.norm(Stream(x_BTD))[1]


def dropout(
    x: jax.Array, *, rate: float, key: jax.Array | None, layout: Layout, dims: tuple[str, ...] = RESIDUAL
) -> jax.Array:
    """`x` with entries zeroed at `rate` and the rest scaled by 1/(1-rate); `x` itself without a key."""
    if key is None or rate == 0:
        return x
    keep = keep_mask(layout, key, x.shape, layout.axes(dims), 1 - rate)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
