# Dims: R rows of one device (positions of all its sequences), D model width, F its share of the hidden width.
"""The product that gives d activation and the activation's backward in one kernel (Pallas, Triton).

A program makes one tile of d activation in registers and writes the tile's derivatives from there: d activation itself is
never in memory. It sees one device's arrays and knows no mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Tile(NamedTuple):
    """rows, columns: of the result, a program.   depth: of one step of its product.   group: tiles of rows that run
    through all columns together, so that what they read stays in the cache.   stages: steps loaded ahead."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 8

    def refuses(self, R: int, D: int, F: int) -> str | None:
        """Why it does not serve dy [R, D] and a weight [F, D], or None: no tile is masked."""
        for size, part, what in ((R, self.rows, "rows"), (F, self.columns, "columns"), (D, self.depth, "depth")):
            if size % part:
                return f"{what} {size} are not a multiple of {part}"
        return None


TILE = Tile()


def product_activation_backward(
    function: Callable, sums: tuple[jax.Array, ...], dy_RD: jax.Array, weight_FD: jax.Array,
    *, biased: bool, interpret: bool, tile: Tile = TILE,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """(d sums of function(*sums) @ weight_FD given dy, each [R, F] as its sum; these added up over rows, f32[F], if biased).

    function: of one array a sum, entry by entry, in float32.   sums: [R, F].
    """
    (R, D), F = dy_RD.shape, weight_FD.shape[0]
    refused = tile.refuses(R, D, F)
    assert not refused, refused
    down, across = R // tile.rows, F // tile.columns

    def at(i: Any) -> tuple[Any, Any]:
        band, within = i // (tile.group * across), i % (tile.group * across)
        tall = jnp.minimum(down - band * tile.group, tile.group)
        return band * tile.group + within % tall, within // tall

    results = pl.BlockSpec((tile.rows, tile.columns), at)
    partials = pl.BlockSpec((None, tile.columns), at)
    dsums, totals = pl.pallas_call(
        partial(_kernel, function=function, depth=tile.depth),
        grid=(down * across,),
        in_specs=(
            pl.BlockSpec((tile.rows, D), lambda i: (at(i)[0], 0)),
            pl.BlockSpec((tile.columns, D), lambda i: (at(i)[1], 0)),
            [results for _ in sums],
        ),
        out_specs=([results for _ in sums], [partials for _ in sums if biased]),
        out_shape=(
            [jax.ShapeDtypeStruct((R, F), a.dtype) for a in sums],
            [jax.ShapeDtypeStruct((down, F), jnp.float32) for _ in sums if biased],
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="product_activation_backward",
    )(dy_RD, weight_FD, list(sums))
    return tuple(dsums), tuple(total.sum(0) for total in totals)


def _kernel(dy: Any, weight: Any, sums: list, dsums: list, totals: list, *, function: Callable, depth: int) -> None:
    def step(k: Any, dact: jax.Array) -> jax.Array:
        here = pl.ds(k * depth, depth)
        a, b = plgpu.load(dy.at[:, here]), plgpu.load(weight.at[:, here])
        return dact + jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    zeros = jnp.zeros((dy.shape[0], weight.shape[0]), jnp.float32)
    dact = jax.lax.fori_loop(0, dy.shape[1] // depth, step, zeros)
    grads = jax.vjp(function, *(plgpu.load(ref).astype(jnp.float32) for ref in sums))[1](dact)
    for ref, d in zip(dsums, grads):
        plgpu.store(ref, d.astype(ref.dtype))
    for ref, d in zip(totals, grads):
        plgpu.store(ref, d.sum(0))
