# Dims: R rows of one device (positions of all its sequences), D model width.
"""A branch added to the residual and the sum normalised in one pass over memory, and the same backward (Pallas, Triton).

A program holds whole rows, as `_Tile` says. It sees one device's arrays and knows no mesh; norm.py differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

WIDEST = 8192  # wider rows and their gradients do not stay in the registers of one program
WARPS = 2112  # of a whole backward: those that an H100's 132 multiprocessors have registers for at one time
BY_CHANNEL = ("scale", "bias", "y_bias")  # vectors [D]; any other is one number a row, [R]


def forward(
    x: jax.Array, y: jax.Array | None, y_bias_D: jax.Array | None, scale_D: jax.Array, bias_D: jax.Array | None,
    *, kind: str, eps: float, interpret: bool,
) -> tuple:  # fmt: skip
    """(s = x + y + y_bias and its norm, both as x; float32 mean, None for rmsnorm, and 1 / deviation of each row of s).

    The sum is formed in float32 and rounded once, and what is rounded is normalised. Without y, s is x itself.
    """
    x_RD = x.reshape(-1, x.shape[-1])
    like, row = jax.ShapeDtypeStruct(x_RD.shape, x.dtype), jax.ShapeDtypeStruct(x_RD.shape[:1], jnp.float32)
    ins = dict(x=x_RD, y=None if y is None else y.reshape(x_RD.shape), y_bias=y_bias_D, scale=scale_D, bias=bias_D)
    outs = dict(s=None if y is None else like, normed=like, mean=row if kind == "layernorm" else None, rstd=row)
    tile = _Tile.of(*x_RD.shape)
    out = _run("add_norm", partial(_forward, tile=tile, eps=eps), tile, ins, outs, interpret)
    s, normed, mean, rstd = (a if a is None else a.reshape(x.shape[: x.ndim - 2 + a.ndim]) for a in map(out.get, outs))
    return x if s is None else s, normed, mean, rstd


def backward(
    ds: jax.Array, dnormed: jax.Array, s: jax.Array, mean: jax.Array | None, rstd: jax.Array, scale_D: jax.Array,
    *, wanted: tuple[str, ...], interpret: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """(dx, which is dy too; {name: its gradient, f32[D]} of the vectors `wanted`, among BY_CHANNEL).

    ds, dnormed: gradients of the sum and of its norm.   The others: as `forward` made them.
    """
    s_RD = s.reshape(-1, s.shape[-1])
    tile = _Tile.of(*s_RD.shape, warps=WARPS)
    ins = dict(ds=ds.reshape(s_RD.shape), dnormed=dnormed.reshape(s_RD.shape), s=s_RD, scale=scale_D)
    ins |= dict(mean=None if mean is None else mean.reshape(-1), rstd=rstd.reshape(-1))
    outs = dict(dx=jax.ShapeDtypeStruct(s_RD.shape, s.dtype))
    outs |= dict(sums=jax.ShapeDtypeStruct((tile.programs, len(wanted), tile.D), jnp.float32))
    out = _run("add_norm_backward", partial(_backward, tile=tile, wanted=wanted), tile, ins, outs, interpret)
    return out["dx"].reshape(s.shape), dict(zip(wanted, out["sums"].sum(0)))


class _Tile(NamedTuple):
    """R, D: of the arrays.   rows, width: of the block that a program holds at a time, both powers of two, so that blocks
    reach beyond the arrays where these do not fill them.   steps: blocks of a program, one after another."""

    R: int
    D: int
    rows: int
    width: int
    steps: int

    @classmethod
    def of(cls, R: int, D: int, *, warps: int | None = None) -> _Tile:
        """A program for each block, or where each leaves something behind as many programs as have about `warps` in all."""
        width = pl.next_power_of_2(D)
        one = cls(R, D, 2 if width <= 4096 else 1, width, 1)
        return one if warps is None else one._replace(steps=pl.cdiv(one.programs, max(1, warps // one.warps)))

    @property
    def programs(self) -> int:
        return pl.cdiv(self.R, self.rows * self.steps)

    @property
    def warps(self) -> int:
        """Of a program: at most 16 entries of a block for each thread, and three such blocks in its registers."""
        return min(max(4, self.width // 256), 16)

    def spec(self, name: str, a: Any) -> pl.BlockSpec:
        """What one program sees of the array of that name."""
        if name == "sums":
            return pl.BlockSpec((None, a.shape[1], self.width), lambda i: (i, 0, 0))
        if name in BY_CHANNEL:
            return pl.BlockSpec((self.width,), lambda i: (0,))
        rows = self.rows * self.steps
        return (
            pl.BlockSpec((rows, self.width), lambda i: (i, 0)) if a.ndim == 2 else pl.BlockSpec((rows,), lambda i: (i,))
        )

    def masks(self, first: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which rows and channels of the block that begins with row `first` are within the arrays, and both together."""
        rows, channels = first + jnp.arange(self.rows) < self.R, jnp.arange(self.width) < self.D
        return rows, channels, rows[:, None] & channels[None]


def _run(name: str, kernel: Callable, tile: _Tile, ins: dict, outs: dict, interpret: bool) -> dict:
    """`kernel` of inputs and outputs by name; those that are None it does not get."""
    ins, outs = ({key: a for key, a in part.items() if a is not None} for part in (ins, outs))
    ins_at, outs_at = ({key: tile.spec(key, a) for key, a in part.items()} for part in (ins, outs))
    return pl.pallas_call(
        kernel, grid=(tile.programs,), in_specs=(ins_at,), out_specs=outs_at, out_shape=outs, interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps), name=name,
    )(ins)  # fmt: skip


def _read(ref: Any, mask: jax.Array) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)


def _forward(ins: dict, outs: dict, *, tile: _Tile, eps: float) -> None:
    rows, channels, inside = tile.masks(pl.program_id(0) * tile.rows)
    s = _read(ins["x"], inside)
    if "y" in ins:
        y = _read(ins["y"], inside)
        y = y + _read(ins["y_bias"], channels)[None] if "y_bias" in ins else y
        s = (s + y).astype(outs["s"].dtype)
        plgpu.store(outs["s"], s, mask=inside)
        s = s.astype(jnp.float32)
    if "mean" in outs:
        mean = s.sum(1) / tile.D
        plgpu.store(outs["mean"], mean, mask=rows)
        s = jnp.where(inside, s - mean[:, None], 0.0)
    rstd = jax.lax.rsqrt((s * s).sum(1) / tile.D + eps)
    plgpu.store(outs["rstd"], rstd, mask=rows)
    normed = s * rstd[:, None] * _read(ins["scale"], channels)[None]
    normed = normed + _read(ins["bias"], channels)[None] if "bias" in ins else normed
    plgpu.store(outs["normed"], normed.astype(outs["normed"].dtype), mask=inside)


def _backward(ins: dict, outs: dict, *, tile: _Tile, wanted: tuple[str, ...]) -> None:
    """With n the normalised row before scale and bias, w = scale dnormed:  dx = ds + rstd (w - mean(w) - n mean(w n)),
    without mean(w) where no mean was taken. Entries outside the arrays are read as 0 and add nothing to a sum."""
    first = pl.program_id(0) * tile.rows * tile.steps
    channels = tile.masks(first)[1]
    scale = _read(ins["scale"], channels)[None]

    def step(i: Any, sums: tuple) -> tuple:
        rows, _, inside = tile.masks(first + i * tile.rows)
        here = pl.ds(i * tile.rows, tile.rows)
        ds, dnormed, n = (_read(ins[name].at[here, :], inside) for name in ("ds", "dnormed", "s"))
        rstd = _read(ins["rstd"].at[here], rows)[:, None]
        w = scale * dnormed
        if "mean" in ins:
            n = n - _read(ins["mean"].at[here], rows)[:, None]
            w = w - (w.sum(1) / tile.D)[:, None]
        n = n * rstd
        dx = ds + rstd * (w - n * ((scale * dnormed * n).sum(1) / tile.D)[:, None])
        plgpu.store(outs["dx"].at[here, :], dx.astype(outs["dx"].dtype), mask=inside)
        terms = dict(scale=dnormed * n, bias=dnormed, y_bias=dx)
        return tuple(total + terms[name].sum(0) for name, total in zip(wanted, sums))

    sums = jax.lax.fori_loop(0, tile.steps, step, tuple(jnp.zeros(tile.width) for _ in wanted))
    for i, total in enumerate(sums):
        plgpu.store(outs["sums"].at[pl.ds(i, 1), :], total[None], mask=channels[None])
