# Dims: R rows of one device (positions of all its sequences), D model width, F its share of the hidden width.
"""The product that gives d activation and the activation's backward in one kernel for Hopper GPUs (Pallas, Mosaic GPU).

One program a multiprocessor, of three warpgroups: one loads, and two make every second tile each, so that one multiplies
while the other turns its tile of d activation, which is never in memory, into derivatives. It knows no mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

DEPTH = 64  # of one step of a product: 128 bytes of bfloat16, the widest swizzle
SWIZZLE = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
PROGRAMS = 132  # an H100's multiprocessors
COMPUTE, LOADING = 232, 40  # registers of a thread


class Tile(NamedTuple):
    """rows, columns: of the result, a warpgroup at a time.   stages: steps of loads in flight.   group: tiles of rows that
    run through all columns together, so that what they read stays in the cache.   chunk: columns finished at a time.
    scratch: numbers of float32 that a warpgroup adds columns up through.   pair: two programs share what they load of the
    weight.   approximate: tanh and exp in one instruction."""

    rows: int = 128
    columns: int = 128
    stages: int = 5
    group: int = 16
    chunk: int = 64
    scratch: int = 256
    pair: bool = False
    approximate: bool = True

    def refuses(self, R: int, D: int, F: int) -> str | None:
        """Why it does not serve dy [R, D] and a weight [F, D], or None: no tile is masked."""
        for size, part, what in (
            (R, self.rows * (1 + self.pair), "rows"),
            (F, self.columns, "columns"),
            (D, DEPTH, "depth"),
        ):
            if size % part:
                return f"{what} {size} are not a multiple of {part}"
        return None


TILE = Tile()


def product_activation_backward(
    function: Callable, sums: tuple[jax.Array, ...], dy_RD: jax.Array, weight_FD: jax.Array,
    *, biased: bool, tile: Tile = TILE, interpret: Any = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """(d sums of function(*sums) @ weight_FD given dy, each [R, F] as its sum; these added up over rows, f32[F], if biased).

    function: of one array a sum, entry by entry, in float32.   sums: [R, F].
    """
    (R, D), F = dy_RD.shape, weight_FD.shape[0]
    refused = tile.refuses(R, D, F)
    assert not refused, refused
    num, stages = len(sums), tile.stages
    empty: Any = partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if tile.pair else plgpu.Barrier
    scratch = dict(
        dy_smem=plgpu.SMEM((stages, tile.rows, DEPTH), dy_RD.dtype, transforms=SWIZZLE),
        weight_smem=plgpu.SMEM((stages, tile.columns, DEPTH), dy_RD.dtype, transforms=SWIZZLE),
        sums_smem=plgpu.SMEM((2 * num, tile.rows, tile.columns), dy_RD.dtype, transforms=SWIZZLE),
        totals_smem=plgpu.SMEM((2, tile.scratch), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=2 * stages),
        empty=empty(num_barriers=2 * stages),
        sums_here=plgpu.Barrier(num_arrivals=num, num_barriers=2),
    )
    call: dict[str, Any] = dict(
        grid=(PROGRAMS // (1 + tile.pair),), grid_names=("program",), cluster=(1 + tile.pair,), cluster_names=("pair",),
        num_threads=3, thread_name="warpgroup", kernel_name="product_activation_backward",
        compiler_params=plgpu.CompilerParams(approx_math=tile.approximate),
    )  # fmt: skip
    outs = [jax.ShapeDtypeStruct((R, F), a.dtype) for a in sums]
    outs += [jax.ShapeDtypeStruct((R // tile.rows, F), jnp.float32) for _ in sums if biased]
    kernel = partial(_kernel, function=function, tile=tile, num=num, biased=biased)
    out = plgpu.kernel(kernel, out_type=outs, scratch_types=scratch, interpret=interpret, **call)(
        dy_RD, weight_FD, *sums
    )
    return tuple(out[:num]), tuple(total.sum(0) for total in out[num:])


def _kernel(
    dy: Any, weight: Any, *refs: Any, function: Callable, tile: Tile, num: int, biased: bool, dy_smem: Any,
    weight_smem: Any, sums_smem: Any, totals_smem: Any, full: Any, empty: Any, sums_here: Any,
) -> None:  # fmt: skip
    sums, dsums, totals = refs[:num], refs[num : 2 * num], refs[2 * num :]
    warpgroup, programs = lax.axis_index("warpgroup"), lax.axis_size("program")
    down, across, steps = dy.shape[0] // tile.rows, weight.shape[0] // tile.columns, dy.shape[1] // DEPTH
    pairs = down // (1 + tile.pair)
    first = lax.axis_index("program")
    count = (pairs * across - first + programs - 1) // programs

    def at(t: Any) -> tuple[Any, Any]:
        """Tile row and column of this program's t-th tile."""
        i = first + t * programs
        group = max(1, tile.group // (1 + tile.pair))
        band, within = i // (group * across), i % (group * across)
        tall = jnp.minimum(pairs - band * group, group)
        row = band * group + within % tall
        return (2 * row + lax.axis_index("pair") if tile.pair else row), within // tall

    def load() -> None:
        plgpu.set_max_registers(LOADING, action="decrease")

        def one(t: Any, _: None) -> None:
            row, column = at(t)

            def step(k: Any, _: None) -> None:
                g = t * steps + k
                slot = lax.rem(g, tile.stages)

                @pl.when(g >= tile.stages)
                def _wait() -> None:
                    user = lax.rem(lax.div(g - tile.stages, steps), 2)
                    plgpu.barrier_wait(empty.at[user * tile.stages + slot])

                ready, depth = full.at[lax.rem(t, 2) * tile.stages + slot], pl.ds(k * DEPTH, DEPTH)
                rows, columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)
                plgpu.copy_gmem_to_smem(dy.at[rows, depth], dy_smem.at[slot], ready)
                shared: dict[str, Any] = dict(collective_axes=("pair",)) if tile.pair else {}
                plgpu.copy_gmem_to_smem(weight.at[columns, depth], weight_smem.at[slot], ready, **shared)

            lax.fori_loop(0, steps, step, None)

        lax.fori_loop(0, count, one, None)

        def drain(g: Any, _: None) -> None:  # a program that is gone could not be told by its pair what is free
            user = lax.rem(lax.div(g, steps), 2)
            plgpu.barrier_wait(empty.at[user * tile.stages + lax.rem(g, tile.stages)])

        lax.fori_loop(jnp.maximum(count * steps - tile.stages, 0), count * steps, drain, None)

    def compute() -> None:
        plgpu.set_max_registers(COMPUTE, action="increase")

        def one(j: Any, _: None) -> None:
            t = 2 * j + warpgroup
            row, column = at(t)
            here = (pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns))
            mine = [sums_smem.at[warpgroup * num + i] for i in range(num)]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for ref, smem in zip(sums, mine):
                plgpu.copy_gmem_to_smem(ref.at[here], smem, sums_here.at[warpgroup])

            def product(acc: Any) -> jax.Array:
                def step(k: Any, _: None) -> None:
                    slot = lax.rem(t * steps + k, tile.stages)
                    plgpu.barrier_wait(full.at[warpgroup * tile.stages + slot])
                    plgpu.wgmma(acc, dy_smem.at[slot], plgpu.transpose_ref(weight_smem.at[slot], (1, 0)))
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _free() -> None:
                        before = lax.rem(t * steps + k - 1, tile.stages)
                        plgpu.barrier_arrive(empty.at[warpgroup * tile.stages + before])

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                last = lax.rem(t * steps + steps - 1, tile.stages)
                plgpu.barrier_arrive(empty.at[warpgroup * tile.stages + last])
                return acc[...]

            dact = pl.run_scoped(product, plgpu.ACC((tile.rows, tile.columns), jnp.float32))
            plgpu.barrier_wait(sums_here.at[warpgroup])
            for c in range(0, tile.columns, tile.chunk):
                part = slice(c, c + tile.chunk)
                values = [smem.at[:, part][...].astype(jnp.float32) for smem in mine]
                grads = jax.vjp(function, *values)[1](dact[:, part])
                for smem, d in zip(mine, grads):
                    smem.at[:, part][...] = d.astype(smem.dtype)
                for ref, d in zip(totals, grads):
                    ref.at[row, pl.ds(column * tile.columns + c, tile.chunk)][...] = _down(d, totals_smem.at[warpgroup])
            plgpu.commit_smem()
            for ref, smem in zip(dsums, mine):
                plgpu.copy_smem_to_gmem(smem, ref.at[here])

        lax.fori_loop(0, (count - warpgroup + 1) // 2, one, None)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == 2, load, compute)


def _down(d: jax.Array, scratch: Any) -> jax.Array:
    """The sum over rows, through shared memory that is this warpgroup's alone."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((d.shape[1],), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0)),
    )
    def total(ctx: Any, d: Any, scratch: Any) -> Any:
        return d.reduce("add", 0, scratch)

    return total(d, scratch)
