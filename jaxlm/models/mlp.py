# Dims: B batch, T position, D model width, F hidden width.
"""The feed-forward branch: GELU, or SiLU-gated (SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.activation_kernel import activation_backward
from jaxlm.models.kernels import Choice, choose, triton_refuses
from jaxlm.models.params import add_bias, products, vector, weight
from jaxlm.parallel.rules import Layout


class MLP(nnx.Module):
    """gelu: down(gelu(up(x))), tanh-approximated.  swiglu: down(silu(gate(x)) * up(x)), Shazeer, arXiv:2002.05202."""

    def __init__(self, model: ModelConfig, key: jax.Array, layout: Layout):
        D, F = model.embed_dim, model.mlp_dim
        ku, kg, kd = jax.random.split(key, 3)
        gated = model.activation == "swiglu"
        self.model, self.layout, self.products = model, layout, products(model, layout)
        self.up = weight(ku, (D, F), "embed mlp", std=model.init_std)
        self.gate = weight(kg, (D, F), "embed mlp", std=model.init_std) if gated else None
        self.down = weight(kd, (F, D), "mlp embed", std=model.init_std / (2 * model.num_layers) ** 0.5)
        self.up_bias = vector((F,), "mlp", role="bias") if model.use_bias else None
        self.gate_bias = vector((F,), "mlp", role="bias") if model.use_bias and gated else None
        self.down_bias = vector((D,), "channel", role="bias") if model.use_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The branch's output before down_bias, [B, T, D]."""
        kernel = choose_activation(self.model, self.layout).kernel
        biases = tuple(bias[...] for bias in (self.up_bias, self.gate_bias) if bias is not None)
        if self.gate is None:
            (up_BTF,) = self.products.columns(x_BTD, self.up)
            function, sums = gelu, (checkpoint_name(up_BTF, "mlp_up"),)
        else:
            up_BTF, gate_BTF = self.products.columns(x_BTD, self.up, self.gate)
            function, sums = swiglu, (checkpoint_name(up_BTF, "mlp_up"), checkpoint_name(gate_BTF, "mlp_gate"))
        act_BTF = activate(How(function, kernel, self.layout, self.model.use_bias), sums, biases)
        return self.products.rows(checkpoint_name(act_BTF, "mlp_act"), self.down)


def gelu(up: jax.Array) -> jax.Array:
    return jax.nn.gelu(up, approximate=True)


def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class ActivationKernel:
    """backward: (How, sums with their biases added, d activation) -> (d sums, their sums over rows and positions in float32
      where How.biased, else none), over whole arrays.
    refuses: (model config, layout) -> None if it serves, else the reason."""

    name: str
    backward: Callable[..., tuple[tuple, tuple]]
    refuses: Callable[[ModelConfig, Layout], str | None]


class How(NamedTuple):
    """What an activation is of its sums, on what its backward runs, and whether the sums have biases."""

    function: Callable[..., jax.Array]
    kernel: ActivationKernel
    layout: Layout
    biased: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(how: How, sums: tuple[jax.Array, ...], biases: tuple[jax.Array, ...]) -> jax.Array:
    """The activation of sums [B, T, F] plus their biases [F], a bias a sum or none at all; its backward keeps the sums."""
    return _activate_forward(how, sums, biases)[0]


def _activate_forward(how: How, sums: tuple, biases: tuple) -> tuple:
    # cuBLAS adds the bias, forms GELU and writes both before the product leaves its registers (BIAS_GELU_AUX)
    sums = tuple(map(add_bias, sums, biases)) if how.biased else sums
    return how.function(*sums), sums


def _activate_backward(how: How, sums: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
    return how.kernel.backward(how, sums, dact_BTF)


activate.defvjp(_activate_forward, _activate_backward)


def _xla_backward(how: How, sums: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
    sums = jax.lax.optimization_barrier(sums)  # or what the forward formed in between is kept for it
    dsums = jax.vjp(how.function, *sums)[1](dact_BTF)
    dsums = jax.lax.optimization_barrier(dsums)  # or the compiler writes them in float32, for the sums below
    return dsums, tuple(d.astype(jnp.float32).sum((0, 1)) for d in dsums) if how.biased else ()


def _pallas_backward(how: How, sums: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
    assert how.biased
    layout = how.layout
    over = () if layout.inside else layout.split("batch", "seq")  # inside, finish_gradient adds them up

    def local(sums: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
        dsums, dbiases = activation_backward(how.function, sums, dact_BTF, interpret=layout.platform != "gpu")
        return dsums, jax.lax.psum(dbiases, over) if over else dbiases

    whole, vector = layout.spec(("batch", "seq", "mlp")), layout.spec(("mlp",))
    return layout.on_mesh(local, (whole, whole), (whole, vector))(sums, dact_BTF)


def _pallas_refuses(model: ModelConfig, layout: Layout) -> str | None:
    if not model.use_bias:
        return "without biases to sum for, XLA's backward is one pass as well"
    return triton_refuses(layout, model.activation_kernel)


ACTIVATION = (
    ActivationKernel("pallas", _pallas_backward, _pallas_refuses),
    ActivationKernel("xla", _xla_backward, lambda *call: None),
)


def choose_activation(model: ModelConfig, layout: Layout) -> Choice:
    """The kernel that model.activation_kernel names, or for `auto` the first of ACTIVATION that serves."""
    return choose("model.activation_kernel", model.activation_kernel, ACTIVATION, model, layout)
