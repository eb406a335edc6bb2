# Dims: B batch, T position, D model width.
"""The residual stream, and LayerNorm and RMSNorm over it, with statistics in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.models import norm_kernel
from jaxlm.models.kernels import Choice, choose, triton_refuses
from jaxlm.models.params import add_bias, array, vector
from jaxlm.parallel.rules import Layout


class Stream(NamedTuple):
    """The residual stream, x + (y + bias): what the last branch made, and its bias, may not be added yet."""

    x_BTD: jax.Array
    y_BTD: jax.Array | None = None
    bias_D: jax.Array | None = None

    @property
    def sum(self) -> jax.Array:
        return self.x_BTD if self.y_BTD is None else self.x_BTD + add_bias(self.y_BTD, self.bias_D)


class Norm(nnx.Module):
    """x / root-mean-square (after subtracting the mean: layernorm), times a scale, plus a bias if it has one."""

    def __init__(self, model: ModelConfig, layout: Layout, *, kind: str | None = None):
        self.model, self.layout, self.kind = model, layout, kind or model.norm
        self.scale = vector((model.embed_dim,), "channel", role="scale")
        biased = model.use_bias and self.kind == "layernorm"
        self.bias = vector((model.embed_dim,), "channel", role="bias") if biased else None

    def __call__(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
        """(the stream's sum, its norm), both as RESIDUAL."""
        kernel = choose_norm(self.model, self.layout).kernel
        settings = Settings(self.layout.platform != "gpu", self.kind, self.model.norm_eps, stream.y_BTD is not None)
        return kernel.run(stream, self.scale[...], array(self.bias), settings)


class Settings(NamedTuple):
    """What stays fixed in a run. interpret: no GPU is there.   adds: whether the stream has something to add."""

    interpret: bool
    kind: str
    eps: float
    adds: bool


@dataclass(frozen=True)
class NormKernel:
    """run: (Stream, scale_D, bias_D, Settings) -> (the stream's sum, its norm), differentiable.
    adds: whether it adds and normalises in one pass, so that additions had better wait for it.
    refuses: (model config, layout) -> None if it serves, else the reason."""

    name: str
    run: Callable[[Stream, jax.Array, jax.Array | None, Settings], Any]
    adds: bool
    refuses: Callable[[ModelConfig, Layout], str | None]


def _xla(stream: Stream, scale_D: jax.Array, bias_D: jax.Array | None, at: Settings) -> tuple[jax.Array, jax.Array]:
    x_BTD = stream.sum
    return x_BTD, _normalised(x_BTD, scale_D, bias_D, at.kind, at.eps)


# of its own input alone the backward forms everything again: what it reads is x, not float32 copies of it
@partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def _normalised(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, kind: str, eps: float) -> jax.Array:
    y_BTD = x_BTD.astype(jnp.float32)
    if kind == "layernorm":
        y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
    y_BTD = y_BTD * jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + eps) * scale_D
    return (y_BTD if bias_D is None else y_BTD + bias_D).astype(x_BTD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pallas(stream: Stream, scale_D: jax.Array, bias_D: jax.Array | None, at: Settings) -> tuple[jax.Array, jax.Array]:
    return _pallas_forward(stream, scale_D, bias_D, at)[0]


def _pallas_forward(stream: Stream, scale_D: jax.Array, bias_D: jax.Array | None, at: Settings) -> tuple[tuple, tuple]:
    run = partial(norm_kernel.forward, kind=at.kind, eps=at.eps, interpret=at.interpret)
    s_BTD, normed_BTD, mean_BT, rstd_BT = run(*stream, scale_D, bias_D)
    return (s_BTD, normed_BTD), (s_BTD, mean_BT, rstd_BT, scale_D, bias_D, stream.bias_D)


def _pallas_backward(at: Settings, saved: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    *read, scale_D, bias_D, y_bias_D = saved
    vectors = dict(scale=scale_D, bias=bias_D, y_bias=y_bias_D)
    wanted = tuple(name for name, leaf in vectors.items() if leaf is not None)
    dx_BTD, sums = norm_kernel.backward(*cotangents, *read, scale_D, wanted=wanted, interpret=at.interpret)
    dstream = Stream(dx_BTD, dx_BTD if at.adds else None, sums.get("y_bias"))
    return dstream, sums["scale"], sums.get("bias")


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _pallas_refuses(model: ModelConfig, layout: Layout) -> str | None:
    if model.embed_dim > norm_kernel.WIDEST:
        return f"width {model.embed_dim} is above {norm_kernel.WIDEST}: a row would not fit one program's registers"
    return triton_refuses(layout, model.norm_kernel)


NORM = (NormKernel("pallas", _pallas, True, _pallas_refuses), NormKernel("xla", _xla, False, lambda *call: None))


def choose_norm(model: ModelConfig, layout: Layout) -> Choice:
    """The kernel that model.norm_kernel names, or for `auto` the first of NORM that serves.

    Raises: UserError if a named kernel refuses.
    """
    return choose("model.norm_kernel", model.norm_kernel, NORM, model, layout)
