# Dims: B batch, T position, D model width, F hidden width.
"""The feed-forward branch: GELU, or SiLU-gated (SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.activation_kernel import activation_backward
from jaxlm.models.kernels import Choice, capability, choose, triton_refuses
from jaxlm.models.params import add_bias, products, vector, weight
from jaxlm.models.product_gelu_kernel import product_gelu_backward, refuses
from jaxlm.parallel.dense import input_gradient
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
            function, sums = gelu, (up_BTF,)
        else:
            up_BTF, gate_BTF = self.products.columns(x_BTD, self.up, self.gate)
            function, sums = swiglu, (up_BTF, gate_BTF)
        activation = Activation(function, kernel, self.layout, self.model.use_bias)
        return self.products.rows_of(activation, sums, biases, self.down)


def gelu(up: jax.Array) -> jax.Array:
    return jax.nn.gelu(up, approximate=True)


def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class ActivationKernel:
    """backward: as dense.Made's, its first argument the Activation.
    refuses: (model config, layout) -> None if it serves, else the reason."""

    name: str
    backward: Callable[..., tuple[tuple, tuple]]
    refuses: Callable[[ModelConfig, Layout], str | None]


@dataclass(frozen=True)
class Activation:
    """What the product with `down` multiplies (dense.Made).

    function: of the sums with their biases added, if biased: then each has one.   kernel: what the backward runs on.
    """

    function: Callable[..., jax.Array]
    kernel: ActivationKernel
    layout: Layout
    biased: bool

    def forward(self, sums: tuple, biases: tuple) -> tuple[jax.Array, tuple]:
        # cuBLAS adds the bias, forms GELU and writes both before the product leaves its registers (BIAS_GELU_AUX)
        sums = tuple(map(add_bias, sums, biases)) if self.biased else sums
        sums = tuple(map(checkpoint_name, sums, ("mlp_up", "mlp_gate")))
        return checkpoint_name(self.function(*sums), "mlp_act"), sums

    def backward(self, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array) -> tuple[tuple, tuple]:
        return self.kernel.backward(self, sums, dx_BTD, w_FD)


def _xla_backward(of: Activation, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array) -> tuple[tuple, tuple]:
    sums = jax.lax.optimization_barrier(sums)  # or what the forward formed in between is kept for it
    dsums = jax.vjp(of.function, *sums)[1](input_gradient(dx_BTD, w_FD))
    dsums = jax.lax.optimization_barrier(dsums)  # or the compiler writes them in float32, for the sums below
    return dsums, tuple(d.astype(jnp.float32).sum((0, 1)) for d in dsums) if of.biased else ()


def _pallas_backward(of: Activation, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array) -> tuple[tuple, tuple]:
    assert of.biased
    interpret = of.layout.platform != "gpu"
    return activation_backward(of.function, sums, input_gradient(dx_BTD, w_FD), interpret=interpret)


def _pallas_refuses(model: ModelConfig, layout: Layout) -> str | None:
    if not model.use_bias:
        return "without biases to sum for, XLA's backward is one pass as well"
    return triton_refuses(layout, model.activation_kernel)


def _hopper_backward(of: Activation, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array) -> tuple[tuple, tuple]:
    assert of.function is gelu
    (up_BTF,) = sums
    up_RF, dx_RD = (a.reshape(-1, a.shape[-1]) for a in (up_BTF, dx_BTD))
    dup_RF, dbiases = product_gelu_backward(up_RF, dx_RD, w_FD, biased=of.biased)
    return (dup_RF.reshape(up_BTF.shape),), dbiases


def _hopper_refuses(model: ModelConfig, layout: Layout) -> str | None:
    if capability(layout) != 9:
        return f"it needs an NVIDIA GPU of compute capability 9, not a {layout.mesh.devices.flat[0].device_kind}"
    if model.activation != "gelu" or model.dtype != "bfloat16":
        return f"it is for gelu in bfloat16, not {model.activation} in {model.dtype}"
    if layout.mesh.size > 1 and model.activation_kernel == "auto":
        return "it has been held to float32 and timed on one GPU alone; name it to have it on several"
    return refuses(model.embed_dim, model.mlp_dim // layout.num_parts(layout.split("mlp")))


ACTIVATION = (
    ActivationKernel("hopper", _hopper_backward, _hopper_refuses),
    ActivationKernel("pallas", _pallas_backward, _pallas_refuses),
    ActivationKernel("xla", _xla_backward, lambda *call: None),
)


def choose_activation(model: ModelConfig, layout: Layout) -> Choice:
    """The kernel that model.activation_kernel names, or for `auto` the first of ACTIVATION that serves."""
    return choose("model.activation_kernel", model.activation_kernel, ACTIVATION, model, layout)
