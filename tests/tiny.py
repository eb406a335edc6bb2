"""Tiny models of the three families, and batches with ragged masks, for every test that needs one."""

import dataclasses

import jax
import numpy as np

from jaxlm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, derived
from jaxlm.data.loader import Batch
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.rules import Layout

SHAPE = dict(vocab_size=61, vocab_multiple=16, num_layers=3, embed_dim=24, num_heads=6, max_seq_len=16, init_std=0.2)
FAMILIES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu"),
    "bloom": dict(position="alibi", norm="layernorm", activation="gelu", embed_norm=True),
    "llama": dict(
        position="rope", norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False, num_kv_heads=2, mlp_dim=40
    ),
}  # fmt: skip


def config(family: str = "gpt2", *, train: dict | None = None, optim: dict | None = None, **model) -> Config:
    return derived(
        Config(
            model=ModelConfig(**(SHAPE | FAMILIES[family] | model)),
            mesh=MeshConfig(),
            train=TrainConfig(**(dict(num_steps=20, batch_size=8, loss_chunk_tokens=32) | (train or {}))),
            optim=OptimConfig(**(dict(peak_lr=1e-2) | (optim or {}))),
            data=DataConfig(train=("none",)),
        )
    )


def layout(devices: int = 1, **mesh) -> Layout:
    return make_layout(MeshConfig(**mesh), jax.devices()[:devices])


def batch(config: Config, seed: int = 0) -> Batch:
    """Random tokens; each row counts a random share of its positions, one row none at all."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens, labels = (rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
    weights = (rng.random(shape) < rng.random((shape[0], 1))).astype(np.float32)
    weights[3 % shape[0]] = 0
    return Batch(tokens, labels, weights)


def replace(config: Config, **sections: dict) -> Config:
    """`config` with keys of sections replaced: replace(config, model=dict(remat="full"))."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def flipped(leaf: jax.Array, *, device: int, bit: int = 3) -> jax.Array:
    """`leaf` with one bit of the part on one device turned over."""
    parts = [np.array(shard.data) for shard in leaf.addressable_shards]
    parts[device].view(np.uint32).flat[parts[device].size // 2] ^= np.uint32(1 << bit)
    made = [jax.device_put(part, shard.device) for part, shard in zip(parts, leaf.addressable_shards)]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, made)
