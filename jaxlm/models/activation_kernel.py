# Dims: R rows of one device (positions of all its sequences), F its share of the hidden width.
"""An activation's backward and the gradients of its sums' biases in one pass over memory (Pallas, Triton).

A program walks down a strip of columns and keeps their sums. It sees one device's arrays and knows no mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS, COLUMNS, WARPS = 8, 256, 4  # of a block: 16 entries a thread; a warp reads 512 bytes of a row
PROGRAMS = 792  # six for each of an H100's multiprocessors


def activation_backward(
    function: Callable, sums: tuple[jax.Array, ...], dact: jax.Array, *, interpret: bool
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """(d sums, each as its sum; these added up over all but their last dim, f32[F]) of function(*sums), in float32.

    function: of one array a sum, entry by entry.   sums, dact: [..., F].
    """
    F = dact.shape[-1]
    dact_RF, *sums_RF = (a.reshape(-1, F) for a in (dact, *sums))
    R, strips = dact_RF.shape[0], pl.cdiv(F, COLUMNS)
    steps = pl.cdiv(R * strips, ROWS * PROGRAMS)
    programs = pl.cdiv(R, ROWS * steps)
    partial_sums = pl.BlockSpec((None, COLUMNS), lambda strip, i: (i, strip))
    rows = pl.BlockSpec((ROWS * steps, COLUMNS), lambda strip, i: (i, strip))
    dsums_RF, partials = pl.pallas_call(
        partial(_backward, function=function, R=R, F=F, steps=steps),
        grid=(strips, programs),
        in_specs=(rows, [rows for _ in sums]),
        out_specs=([rows for _ in sums], [partial_sums for _ in sums]),
        out_shape=(
            [jax.ShapeDtypeStruct((R, F), a.dtype) for a in sums],
            [jax.ShapeDtypeStruct((programs, F), jnp.float32) for _ in sums],
        ),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="activation_backward",
    )(dact_RF, sums_RF)
    return tuple(d.reshape(dact.shape) for d in dsums_RF), tuple(p.sum(0) for p in partials)


def _backward(
    dact: Any, sums: list, dsums: list, partials: list, *, function: Callable, R: int, F: int, steps: int,
) -> None:  # fmt: skip
    columns = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS) < F
    first = pl.program_id(1) * ROWS * steps

    def step(i: Any, totals: list[jax.Array]) -> list[jax.Array]:
        here = pl.ds(i * ROWS, ROWS)
        inside = (first + i * ROWS + jnp.arange(ROWS) < R)[:, None] & columns[None]
        grads = jax.vjp(function, *(_read(ref.at[here, :], inside) for ref in sums))[1](_read(dact.at[here, :], inside))
        for ref, d in zip(dsums, grads):
            plgpu.store(ref.at[here, :], d.astype(ref.dtype), mask=inside)
        return [total + d for total, d in zip(totals, grads)]  # entry by entry: threads meet once, at the end

    totals = jax.lax.fori_loop(0, steps, step, [jnp.zeros((ROWS, COLUMNS)) for _ in sums])
    for ref, total in zip(partials, totals):
        plgpu.store(ref, total.sum(0), mask=columns)


def _read(ref: Any, mask: jax.Array) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)
