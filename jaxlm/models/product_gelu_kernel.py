# Dims: R rows of one device (positions of all its sequences), D model width, F its share of the hidden width.
"""The product that gives d activation, and GELU's backward, in one kernel for Hopper GPUs (Pallas, Mosaic GPU).

One program a multiprocessor, of three warpgroups: one loads, and two make every second tile each, so that one multiplies
while the other turns its tile of d activation, which is never in memory, into derivatives. It knows no mesh.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PROGRAMS = 132  # an H100's multiprocessors
ROWS, COLUMNS = 128, 128  # of the result, a warpgroup at a time
DEPTH = 64  # of one step of a product: 128 bytes of bfloat16, the widest swizzle
STAGES = 4  # steps of loads in flight
GROUP = 16  # tiles of rows that run through all columns together, so that what they read stays in the cache
CHUNK = 64  # columns finished at a time, for want of registers
SCRATCH = 2048  # numbers that a warpgroup adds columns up through
COMPUTE, LOADING = 232, 40  # registers of a thread
SWIZZLE = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))


def refuses(D: int, F: int) -> str | None:
    """Why it does not serve a weight [F, D], or None."""
    if F % COLUMNS or D % DEPTH:
        return f"a device's share of the hidden width, {F}, or the width {D} is not a multiple of {COLUMNS} or {DEPTH}"
    return None


def product_gelu_backward(
    up_RF: jax.Array, dy_RD: jax.Array, weight_FD: jax.Array, *, biased: bool, interpret: Any = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(d up of gelu(up) @ weight given dy, as up; that added up over rows, f32[F], where biased) of bfloat16 arrays.

    Rows that do not fill a tile are copied to arrays of zeros that do: sums of zeros, of which no gradient comes.
    interpret: None, or plgpu.InterpretGPUParams.
    """
    (R, D), F = dy_RD.shape, weight_FD.shape[0]
    assert not refuses(D, F), refuses(D, F)
    up_RF, dy_RD = (jnp.pad(a, ((0, -R % ROWS), (0, 0))) for a in (up_RF, dy_RD))
    down, dtype = pl.cdiv(R, ROWS), dy_RD.dtype
    outs = [jax.ShapeDtypeStruct(up_RF.shape, dtype), *[jax.ShapeDtypeStruct((down, F), jnp.float32)] * biased]
    scratch = dict(
        dy_smem=plgpu.SMEM((STAGES, ROWS, DEPTH), dtype, transforms=SWIZZLE),
        weight_smem=plgpu.SMEM((STAGES, COLUMNS, DEPTH), dtype, transforms=SWIZZLE),
        up_smem=plgpu.SMEM((2, ROWS, COLUMNS), dtype, transforms=SWIZZLE),
        totals_smem=plgpu.SMEM((2, SCRATCH), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=2 * STAGES),
        empty=plgpu.Barrier(num_barriers=2 * STAGES),
        up_here=plgpu.Barrier(num_barriers=2),
    )
    call: dict[str, Any] = dict(
        grid=(PROGRAMS,), grid_names=("program",), num_threads=3, thread_name="warpgroup", interpret=interpret,
        kernel_name="product_gelu_backward", compiler_params=plgpu.CompilerParams(approx_math=True),
    )  # fmt: skip
    total = _total if interpret is None else lambda d, scratch: d.sum(0)
    kernel = plgpu.kernel(partial(_kernel, total=total), out_type=outs, scratch_types=scratch, **call)
    dup_RF, *totals = kernel(dy_RD, weight_FD, up_RF)
    return dup_RF[:R], tuple(t.sum(0) for t in totals)


class Loads(NamedTuple):
    """What steps multiply, STAGES of them in flight, with barriers for either warpgroup. g counts steps on over tiles."""

    dy: Any
    weight: Any
    full: Any
    empty: Any
    steps: int  # of a tile

    def wait(self, g: Any) -> None:
        """Until what step g has loaded is free again."""
        user = lax.rem(lax.div(g, self.steps), 2)
        plgpu.barrier_wait(self.empty.at[user * STAGES + lax.rem(g, STAGES)])

    def load(self, t: Any, dy: Any, weight: Any) -> None:
        """All steps of the t-th tile, of these rows and columns."""

        def step(k: Any, _: None) -> None:
            g = t * self.steps + k
            slot = lax.rem(g, STAGES)
            pl.when(g >= STAGES)(lambda: self.wait(g - STAGES))
            ready, depth = self.full.at[lax.rem(t, 2) * STAGES + slot], pl.ds(k * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(dy.at[:, depth], self.dy.at[slot], ready)
            plgpu.copy_gmem_to_smem(weight.at[:, depth], self.weight.at[slot], ready)

        lax.fori_loop(0, self.steps, step, None)

    def product(self, t: Any, warpgroup: Any, acc: Any) -> jax.Array:
        """d activation of the t-th tile."""

        def free(g: Any) -> None:
            plgpu.barrier_arrive(self.empty.at[warpgroup * STAGES + lax.rem(g, STAGES)])

        def step(k: Any, _: None) -> None:
            g = t * self.steps + k
            slot = lax.rem(g, STAGES)
            plgpu.barrier_wait(self.full.at[warpgroup * STAGES + slot])
            plgpu.wgmma(acc, self.dy.at[slot], self.weight.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: free(g - 1))

        lax.fori_loop(0, self.steps, step, None)
        plgpu.wgmma_wait(0)
        free(t * self.steps + self.steps - 1)
        return acc[...]


def _kernel(
    dy: Any, weight: Any, up: Any, dup: Any, *totals: Any, total: Any, dy_smem: Any, weight_smem: Any, up_smem: Any,
    totals_smem: Any, full: Any, empty: Any, up_here: Any,
) -> None:  # fmt: skip
    warpgroup, first, programs = lax.axis_index("warpgroup"), lax.axis_index("program"), lax.axis_size("program")
    down, across = dy.shape[0] // ROWS, weight.shape[0] // COLUMNS
    count = (down * across - first + programs - 1) // programs
    loads = Loads(dy_smem, weight_smem, full, empty, dy.shape[1] // DEPTH)

    def at(t: Any) -> tuple[Any, Any]:
        """Rows and columns of this program's t-th tile."""
        i = first + t * programs
        band, within = i // (GROUP * across), i % (GROUP * across)
        tall = jnp.minimum(down - band * GROUP, GROUP)
        return pl.ds((band * GROUP + within % tall) * ROWS, ROWS), pl.ds(within // tall * COLUMNS, COLUMNS)

    def load() -> None:
        plgpu.set_max_registers(LOADING, action="decrease")

        def one(t: Any, _: None) -> None:
            rows, columns = at(t)
            loads.load(t, dy.at[rows], weight.at[columns])

        lax.fori_loop(0, count, one, None)
        num = count * loads.steps  # a barrier that nobody has waited for is an error where it is interpreted
        lax.fori_loop(jnp.maximum(num - STAGES, 0), num, lambda g, _: loads.wait(g), None)

    def compute() -> None:
        plgpu.set_max_registers(COMPUTE, action="increase")
        mine = up_smem.at[warpgroup]

        def one(j: Any, _: None) -> None:
            t = 2 * j + warpgroup
            rows, columns = at(t)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.copy_gmem_to_smem(up.at[rows, columns], mine, up_here.at[warpgroup])
            dact = pl.run_scoped(partial(loads.product, t, warpgroup), plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            plgpu.barrier_wait(up_here.at[warpgroup])
            for c in range(0, COLUMNS, CHUNK):
                part = slice(c, c + CHUNK)
                d = dact[:, part] * _derivative(mine.at[:, part][...].astype(jnp.float32))
                mine.at[:, part][...] = d.astype(mine.dtype)
                for ref in totals:
                    here = ref.at[rows.start // ROWS, pl.ds(columns.start + c, CHUNK)]
                    here[...] = total(d, totals_smem.at[warpgroup])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, dup.at[rows, columns])

        lax.fori_loop(0, (count - warpgroup + 1) // 2, one, None)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == 2, load, compute)


def _derivative(x: jax.Array) -> jax.Array:
    """Of gelu(x) = x (1 + t) / 2 with t = tanh(a x + b x^3)."""
    a = (2 / jnp.pi) ** 0.5
    b = 0.044715 * a
    x2 = x * x
    t = jnp.tanh(x * (a + b * x2))
    return 0.5 + 0.5 * t + (0.5 - 0.5 * t * t) * x * (a + 3 * b * x2)


def _total(d: jax.Array, scratch: Any) -> jax.Array:
    """The sum over rows, through shared memory that is this warpgroup's alone."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((d.shape[1],), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0)),
    )
    def total(ctx: Any, d: Any, scratch: Any) -> Any:
        return d.reduce("add", 0, scratch)

    return total(d, scratch)
