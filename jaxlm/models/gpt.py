# Dims: B batch, T position, D model width, V padded vocabulary, L layers.
"""The GPT: embedding, blocks, final norm, head. Scanned and unrolled blocks hold the same parameters, a leaf a layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig, remat_actions
from jaxlm.models.attention import Attention
from jaxlm.models.embed import Embedding, dropout, padded_vocab
from jaxlm.models.mlp import MLP
from jaxlm.models.norm import Norm, Stream, choose_norm
from jaxlm.models.params import Parameter, add_bias, array, use, weight
from jaxlm.parallel.rules import Layout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each sum is formed by the norm that reads it, if that can."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        ka, km = jax.random.split(key)
        self.rate, self.layout = model.dropout, layout
        self.attn_norm, self.mlp_norm = (Norm(model, layout) for _ in range(2))
        self.attn, self.mlp = Attention(model, ka, layout), MLP(model, km, layout)
        # what is kept, carried round a loop or sent to another stage is one array: the sum
        whole = model.remat != "none" or model.scan_layers or bool(layout.split("stage"))
        self.waits = choose_norm(model, layout).kernel.adds and not whole

    def __call__(self, stream: Stream, key: jax.Array | None, starts_BT: jax.Array | None = None) -> Stream:
        kw, ka, km = (None, None, None) if key is None else jax.random.split(key, 3)
        x_BTD, normed_BTD = self.attn_norm(stream)
        y_BTD = self.attn(checkpoint_name(normed_BTD, "attn_norm"), kw, starts_BT)
        stream = self._plus(x_BTD, y_BTD, self.attn.out_bias, ka)
        stream = stream._replace(x_BTD=checkpoint_name(stream.x_BTD, "attn_residual"))
        x_BTD, normed_BTD = self.mlp_norm(stream)
        return self._plus(x_BTD, self.mlp(checkpoint_name(normed_BTD, "mlp_norm")), self.mlp.down_bias, km)

    def _plus(self, x_BTD: jax.Array, y_BTD: jax.Array, bias: Parameter | None, key: jax.Array | None) -> Stream:
        """x + dropout(y + bias); the addition waits for the norm that follows where that does it in its own pass."""
        stream = Stream(x_BTD, y_BTD, array(bias))
        if key is not None and self.rate:
            stream = Stream(x_BTD, dropout(add_bias(y_BTD, bias), rate=self.rate, key=key, layout=self.layout))
        return stream if self.waits else Stream(stream.sum)


class GPT(nnx.Module):
    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        ke, kh, _ = jax.random.split(key, 3)
        self.model = model
        self.layout = layout
        self.embed = Embedding(model, ke, layout)
        self.layers = nnx.List([Block(model, block_key(key, i), layout) for i in range(model.num_layers)])
        self.final_norm = Norm(model, layout)
        shape = (padded_vocab(model), model.embed_dim)
        self.head = (
            None if model.tie_embeddings else weight(kh, shape, "vocab embed", std=model.init_std, role="kernel")
        )

    def hidden(
        self, tokens_BT: jax.Array, key: jax.Array | None = None, starts_BT: jax.Array | None = None
    ) -> jax.Array:
        """What the head reads, [B, T, D] in the compute dtype, as RESIDUAL. With a key, dropout is on: a key a layer.

        starts_BT: where in its row the document of each token starts: positions count from there and attention stays
          inside. None: a row is one document.
        """
        ke = None if key is None else jax.random.fold_in(key, self.model.num_layers)
        x_BTD = dropout(self.embed(tokens_BT, starts_BT), rate=self.model.dropout, key=ke, layout=self.layout)
        graph = nnx.split(self.layers[0])[0]
        block = rematerialised(lambda params, x, k: nnx.merge(graph, params)(x, k, starts_BT), self.model.remat)
        layers = [nnx.to_pure_dict(nnx.split(layer)[1]) for layer in self.layers]
        run = _scan if self.model.scan_layers else _unroll
        return self.final_norm(run(block, layers, Stream(x_BTD), key))[1]

    @property
    def head_table(self) -> Parameter:
        """[V, D]: the head's own, or the token table."""
        return self.embed.tokens if self.head is None else self.head

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """f32[B, T, V], of this device's share of the padded vocabulary: for sampling and scoring.

        Training goes through loss.py, a chunk of tokens at a time.
        """
        head_VD = use(self.head_table, self.model.dtype, self.layout)
        return jnp.einsum("btd,vd->btv", x_BTD, head_VD, preferred_element_type=jnp.float32)


def block_key(key: jax.Array, i: int | jax.Array) -> jax.Array:
    """The key that block i of a GPT made with `key` draws its weights from."""
    return jax.random.fold_in(jax.random.split(key, 3)[2], i)


def init_block(model: ModelConfig, key: jax.Array, i: int | jax.Array, layout: Layout) -> dict:
    """Parameters of block i of GPT(model, key, layout), alone."""
    return nnx.to_pure_dict(nnx.split(Block(model, block_key(key, i), layout))[1])


def _unroll(block: Callable, layers: list, stream: Stream, key: jax.Array | None) -> Stream:
    for i, params in enumerate(layers):
        stream = block(params, stream, None if key is None else jax.random.fold_in(key, i))
    return stream


def _scan(block: Callable, layers: list, stream: Stream, key: jax.Array | None) -> Stream:
    def body(stream: Stream, layer: tuple) -> tuple[Stream, None]:
        params, i = layer
        return block(params, stream, None if key is None else jax.random.fold_in(key, i)), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return jax.lax.scan(body, stream, (stacked, jnp.arange(len(layers))))[0]


def rematerialised(block: Callable, remat: str, *, prevent_cse: bool = True) -> Callable:
    """`block` with its backward reusing what `remat` says: all (none), nothing (full), or the named tensors.

    prevent_cse: False where the compiler can not merge what is formed again with the forward: between loops.
    """
    if remat == "none":
        return block
    actions = remat_actions(remat)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name, action in actions.items() if action == "keep"],
        names_which_can_be_offloaded=[name for name, action in actions.items() if action == "offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)
