# Dims: B batch, T position, D model width, F hidden width.
"""The feed-forward branch: GELU, or SiLU-gated (SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.params import add_bias, array, products, vector, weight
from jaxlm.parallel.rules import Layout


class MLP(nnx.Module):
    """gelu: down(gelu(up(x))), tanh-approximated.  swiglu: down(silu(gate(x)) * up(x)), Shazeer, arXiv:2002.05202."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        D, F = model.embed_dim, model.mlp_dim
        ku, kg, kd = jax.random.split(key, 3)
        gated = model.activation == "swiglu"
        self.products = products(model, layout)
        self.up = weight(ku, (D, F), "embed mlp", std=model.init_std)
        self.gate = weight(kg, (D, F), "embed mlp", std=model.init_std) if gated else None
        self.down = weight(kd, (F, D), "mlp embed", std=model.init_std / (2 * model.num_layers) ** 0.5)
        self.up_bias = vector((F,), "mlp", role="bias") if model.use_bias else None
        self.gate_bias = vector((F,), "mlp", role="bias") if model.use_bias and gated else None
        self.down_bias = vector((D,), "channel", role="bias") if model.use_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The branch's output before down_bias, [B, T, D]."""
        if self.gate is None:
            (up_BTF,) = self.products.columns(x_BTD, self.up)
            act_BTF = _activate(_gelu, (checkpoint_name(up_BTF, "mlp_up"),), (array(self.up_bias),))
        else:
            up_BTF, gate_BTF = self.products.columns(x_BTD, self.up, self.gate)
            sums = checkpoint_name(up_BTF, "mlp_up"), checkpoint_name(gate_BTF, "mlp_gate")
            act_BTF = _activate(_swiglu, sums, (array(self.up_bias), array(self.gate_bias)))
        return self.products.rows(checkpoint_name(act_BTF, "mlp_act"), self.down)


def _gelu(up: jax.Array) -> jax.Array:
    return jax.nn.gelu(up, approximate=True)


def _swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(function: Callable, sums: tuple[jax.Array, ...], biases: tuple[jax.Array | None, ...]) -> jax.Array:
    """function of sums [B, T, F] plus their biases: one pass over memory, and the backward keeps the sums alone."""
    return function(*map(add_bias, sums, biases))


def _activate_forward(function: Callable, sums: tuple, biases: tuple) -> tuple:
    return _activate(function, sums, biases), (sums, biases)


def _activate_backward(function: Callable, saved: tuple, dact_BTF: jax.Array) -> tuple:
    sums, biases = jax.lax.optimization_barrier(saved)  # or what the forward formed in between is kept for it
    dsums = jax.vjp(function, *map(add_bias, sums, biases))[1](dact_BTF)
    dsums = jax.lax.optimization_barrier(dsums)  # or the compiler writes them in float32, for the sums below
    dbiases = [None if b is None else d.astype(jnp.float32).sum((0, 1)) for d, b in zip(dsums, biases)]
    return tuple(dsums), tuple(dbiases)


_activate.defvjp(_activate_forward, _activate_backward)
