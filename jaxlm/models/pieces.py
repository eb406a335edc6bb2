# Dims: B batch, T position, D model width, M microbatches.
"""The GPT in the three pieces a pipeline runs, for one device's share: embedding, a stage of blocks, head and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.models.embed import Embedding, dropout
from jaxlm.models.gpt import Block, rematerialised
from jaxlm.models.norm import Norm, Stream
from jaxlm.parallel.pipeline import Parts
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.stages import Stages

# What a stage keeps where rematerialisation is none: what matmuls and attention made. Norms and activations are formed again
# from that, which costs less than to carry them through the ring, and a slot holds 10 units a layer instead of 16.
KEPT = ",".join(
    f"{name}=keep" for name in ("query", "key", "value", "attn_context", "attn_residual", "mlp_up", "mlp_gate")
)


@dataclass(frozen=True)
class Pieces:
    """What the pieces share. loss: (x_BTD, head_VD, labels_BT, weights_BT) -> (objective, nats)."""

    model: ModelConfig
    layout: Layout
    stages: Stages
    loss: Callable[..., tuple[jax.Array, jax.Array]]

    def parts(self, batch_MBT: tuple, keys_M: jax.Array | None) -> Parts:
        """The pieces over M microbatches of tokens, labels, weights and starts; with keys, dropout is on."""
        tokens_MBT, labels_MBT, weights_MBT, starts_MBT = batch_MBT
        return Parts(
            first=partial(self._first, tokens_MBT, starts_MBT, keys_M),
            stage=partial(self._stage, starts_MBT, keys_M),
            last=partial(self._last, labels_MBT, weights_MBT),
        )

    def _first(
        self, tokens_MBT: jax.Array, starts_MBT: jax.Array | None, keys_M: jax.Array | None, ends: dict, m: jax.Array
    ) -> jax.Array:
        graph = _graph(lambda: Embedding(self.model, jax.random.key(0), self.layout))
        x_BTD = nnx.merge(graph, ends["embed"])(tokens_MBT[m], None if starts_MBT is None else starts_MBT[m])
        key = None if keys_M is None else jax.random.fold_in(keys_M[m], self.model.num_layers)
        return dropout(x_BTD, rate=self.model.dropout, key=key, layout=self.layout)

    def _stage(
        self, starts_MBT: jax.Array | None, keys_M: jax.Array | None,
        slots: dict, x_BTD: jax.Array, m: jax.Array, repeat: jax.Array,
    ) -> jax.Array:  # fmt: skip
        starts_BT = None if starts_MBT is None else starts_MBT[m]
        graph = _graph(lambda: Block(self.model, jax.random.key(0), self.layout))
        remat = KEPT if self.model.remat == "none" else self.model.remat
        block = rematerialised(lambda params, x, k: nnx.merge(graph, params)(x, k, starts_BT), remat, prevent_cse=False)
        mine = jnp.asarray(self.stages.layers())[:, jax.lax.axis_index(self.layout.split("stage")), repeat]
        for j in range(self.stages.num_slots):
            key = None if keys_M is None else jax.random.fold_in(keys_M[m], mine[j])
            y_BTD = block(slots[j], Stream(x_BTD), key).sum
            x_BTD = y_BTD if self.stages.is_even else jnp.where(mine[j] >= 0, y_BTD, x_BTD)
        return x_BTD

    def _last(self, labels_MBT: jax.Array, weights_MBT: jax.Array, ends: dict, x_BTD: jax.Array, m: jax.Array) -> tuple:
        x_BTD = nnx.merge(_graph(lambda: Norm(self.model, self.layout)), ends["final_norm"])(Stream(x_BTD))[1]
        head_VD = ends["head"] if "head" in ends else ends["embed"]["tokens"]
        return self.loss(x_BTD, head_VD, labels_MBT[m], weights_MBT[m])


def _graph(make: Callable[[], Any]) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(make))[0]
