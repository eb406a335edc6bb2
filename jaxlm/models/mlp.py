# Dims: B batch, T position, D model width, F hidden width.
"""The feed-forward branch: GELU, or SiLU-gated (SwiGLU)."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.params import add_bias, products, vector, weight
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
        if self.gate is None:
            (up_BTF,) = self.products.columns(x_BTD, self.up)
            up_BTF = checkpoint_name(add_bias(up_BTF, self.up_bias), "mlp_up")
            act_BTF = _gelu(up_BTF)
        else:
            up_BTF, gate_BTF = self.products.columns(x_BTD, self.up, self.gate)
            up_BTF = checkpoint_name(add_bias(up_BTF, self.up_bias), "mlp_up")
            gate_BTF = checkpoint_name(add_bias(gate_BTF, self.gate_bias), "mlp_gate")
            act_BTF = _swiglu(up_BTF, gate_BTF)
        return add_bias(self.products.rows(checkpoint_name(act_BTF, "mlp_act"), self.down), self.down_bias)


# the backward forms these again from their inputs, which are kept anyway
_gelu = jax.checkpoint(partial(jax.nn.gelu, approximate=True), prevent_cse=False)
_swiglu = jax.checkpoint(lambda up, gate: jax.nn.silu(gate) * up, prevent_cse=False)
