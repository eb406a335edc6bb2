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
from jaxlm.models.params import add_bias, array, products, vector, weight
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
        kernel, biases = choose_activation(self.model, self.layout).kernel, (array(self.up_bias),)
        if self.gate is None:
            (up_BTF,) = self.products.columns(x_BTD, self.up)
            how, sums = How(gelu, kernel, self.layout), (checkpoint_name(up_BTF, "mlp_up"),)
        else:
            up_BTF, gate_BTF = self.products.columns(x_BTD, self.up, self.gate)
            how, biases = How(swiglu, kernel, self.layout), (*biases, array(self.gate_bias))
            sums = checkpoint_name(up_BTF, "mlp_up"), checkpoint_name(gate_BTF, "mlp_gate")
        return self.products.rows(checkpoint_name(activate(how, sums, biases), "mlp_act"), self.down)


def gelu(up: jax.Array) -> jax.Array:
    return jax.nn.gelu(up, approximate=True)


def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class ActivationKernel:
    """backward: (How, sums, biases, d activation) -> (d sums, d biases in float32), over whole arrays.
    refuses: (model config, layout) -> None if it serves, else the reason."""

    name: str
    backward: Callable[..., tuple[tuple, tuple]]
    refuses: Callable[[ModelConfig, Layout], str | None]


class How(NamedTuple):
    """What an activation is of its sums, and on what its backward runs."""

    function: Callable[..., jax.Array]
    kernel: ActivationKernel
    layout: Layout


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(how: How, sums: tuple[jax.Array, ...], biases: tuple[jax.Array | None, ...]) -> jax.Array:
    """The activation of sums [B, T, F] plus their biases: one pass over memory, and the backward keeps the sums alone."""
    return how.function(*map(add_bias, sums, biases))


def _activate_forward(how: How, sums: tuple, biases: tuple) -> tuple:
    return activate(how, sums, biases), (sums, biases)


def _activate_backward(how: How, saved: tuple, dact_BTF: jax.Array) -> tuple:
    return how.kernel.backward(how, *saved, dact_BTF)


activate.defvjp(_activate_forward, _activate_backward)


def _xla_backward(how: How, sums: tuple, biases: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
    sums, biases = jax.lax.optimization_barrier((sums, biases))  # or what the forward formed in between is kept for it
    dsums = jax.vjp(how.function, *map(add_bias, sums, biases))[1](dact_BTF)
    dsums = jax.lax.optimization_barrier(dsums)  # or the compiler writes them in float32, for the sums below
    dbiases = [None if b is None else d.astype(jnp.float32).sum((0, 1)) for d, b in zip(dsums, biases)]
    return tuple(dsums), tuple(dbiases)


def _pallas_backward(how: How, sums: tuple, biases: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
    layout = how.layout
    over = () if layout.inside else layout.split("batch", "seq")  # inside, finish_gradient adds them up

    def local(sums: tuple, biases: tuple, dact_BTF: jax.Array) -> tuple[tuple, tuple]:
        interpret = layout.platform != "gpu"
        dsums, dbiases = activation_backward(how.function, sums, biases, dact_BTF, interpret=interpret)
        return dsums, jax.lax.psum(dbiases, over) if over else dbiases

    whole, vector = layout.spec(("batch", "seq", "mlp")), layout.spec(("mlp",))
    return layout.on_mesh(local, (whole, vector, whole), (whole, vector))(sums, biases, dact_BTF)


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
