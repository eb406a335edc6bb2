# Dims: B rows, T positions, D model width, V padded vocabulary; F stands for all dims of a weight but the model width.
"""Products with the model's weights over a mesh, every collective placed by hand.

Each function stands for the plain product of whole arrays; forward and backward see one device's share:

  columns   x [B, T, D] times weights [D, F]: positions gathered over the axes that split F, each device its share of F
  rows      y [B, T, F] times a weight [F, D]: partial sums added over the axes that split F and split over positions again;
            of y = f(sums), entry by entry, the backward goes on to d sums, which a kernel may form together with dy
  lookup    rows of a table [V, D] by token: no device ever holds more of the table than a step does

A weight rests split further than it computes (the table's two columns): it is cast, gathered for the product, dropped, and
gathered again for the backward, unless a step holds it whole. Its gradient is formed in float32 and scattered to lie where
gradients do; the sum over other axes comes later (gradients.py).
Sources: Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5; Korthikanti et al., arXiv:2205.05198, section 4.2 (positions
split between tensor-parallel products).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint

from jaxlm.parallel.gradients import scatter
from jaxlm.parallel.rules import At, Dims, Layout
from jaxlm.parallel.working import Value, cast, gradient_of, lies

RESIDUAL = ("batch", "residual", "embed")


class Weight(Protocol):
    """A parameter: its array, or working copy, by `[...]`, and the logical dims of that array."""

    dims: Dims

    def __getitem__(self, index: Any, /) -> Value: ...


class Made(Protocol):
    """How what `rows` multiplies is made, entry by entry, of sums [B, T, F...] and their biases [F...], if they have any.

    It is hashable.
    """

    def forward(self, sums: tuple[jax.Array, ...], biases: tuple[jax.Array, ...], /) -> tuple[jax.Array, tuple]:
        """(y, the sums as the backward reads them)."""
        ...

    def backward(self, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array, /) -> tuple[tuple, tuple]:
        """(d sums, d biases: f32[F...] a bias, added up over these rows and positions) given d(y times w [F..., D])."""
        ...


@dataclass(frozen=True)
class Given:
    """A single array as it is."""

    def forward(self, sums: tuple, biases: tuple) -> tuple[jax.Array, tuple]:
        return sums[0], sums

    def backward(self, sums: tuple, dx_BTD: jax.Array, w_FD: jax.Array) -> tuple[tuple, tuple]:
        return (input_gradient(dx_BTD, w_FD),), ()


@dataclass(frozen=True)
class Products:
    """Where and in which dtype products run. regather: gather weights again for the backward instead of keeping them;
    under rematerialisation the recomputed forward already does."""

    layout: Layout
    dtype: str
    regather: bool = True

    def columns(self, x_BTD: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
        """x times each weight [D, F...], in ("batch", "seq", F...). x lies as RESIDUAL: gathered once for all of them."""
        return _columns(x_BTD, tuple(w[...] for w in weights), self, tuple(tuple(w.dims) for w in weights))

    def rows(self, y_BTF: jax.Array, weight: Weight) -> jax.Array:
        """y [B, T, F...] times a weight [F..., D], as RESIDUAL."""
        return self.rows_of(Given(), (y_BTF,), (), weight)

    def rows_of(self, made: Made, sums: tuple, biases: tuple, weight: Weight) -> jax.Array:
        """What is made of sums [B, T, F...] and their biases [F...], times a weight [F..., D], as RESIDUAL."""
        return _rows(sums, biases, weight[...], self, tuple(weight.dims), made)

    def lookup(self, table: Weight, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the table [V, D], cast to the compute dtype, as RESIDUAL. The gradient adds up in float32."""
        return _lookup(table[...], tokens_BT, self, tuple(table.dims))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _columns(x_BTD, weights, p: Products, dims):
    x_BTD = gather_positions(p.layout, x_BTD)
    return tuple(jnp.tensordot(x_BTD, gather_weight(p.layout, w, d, p.dtype), 1) for w, d in zip(weights, dims))


def _columns_forward(x_BTD, weights, p, dims):
    return _columns(x_BTD, weights, p, dims), (x_BTD, weights)


def _columns_backward(p, dims, saved, dys):
    x_BTD, weights, dys = _again(p, dims, (*saved, dys))
    x_BTD, dxs_BTD, dweights = gather_positions(p.layout, x_BTD), [], []
    for w, d, dy_BTF in zip(weights, dims, dys):
        w_DF, F = gather_weight(p.layout, w, d, p.dtype), dy_BTF.ndim - 2
        dxs_BTD.append(jnp.tensordot(dy_BTF, w_DF, (tuple(range(2, 2 + F)), tuple(range(1, 1 + F)))))
        dw_DF = jnp.tensordot(x_BTD, dy_BTF, ((0, 1), (0, 1)), preferred_element_type=jnp.float32)
        dweights.append(dw_DF)
    dx_BTD = reduce(lambda total, dx_BTD: dx_BTD + total, dxs_BTD)  # in this order cuBLAS adds as it writes
    dx_BTD = scatter_positions(p.layout, dx_BTD, p.layout.split(*dims[0][1:]))
    dx_BTD, dweights = _beside(p, (dx_BTD, dweights))
    sums = (reduce_gradient(p.layout, dw_DF, d, at=lies(w)) for dw_DF, d, w in zip(dweights, dims, weights))
    return dx_BTD, tuple(map(gradient_of, weights, sums))


_columns.defvjp(_columns_forward, _columns_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rows(sums, biases, weight, p: Products, dims, made: Made):
    return _rows_forward(sums, biases, weight, p, dims, made)[0]


def _rows_forward(sums, biases, weight, p, dims, made):
    y_BTF, sums = made.forward(sums, biases)
    x_BTD = jnp.tensordot(y_BTF, gather_weight(p.layout, weight, dims, p.dtype), len(dims) - 1)
    return scatter_positions(p.layout, x_BTD, p.layout.split(*dims[:-1])), (sums, y_BTF, weight)


def _rows_backward(p, dims, made, saved, dx_BTD):
    sums, *operands = saved
    y_BTF, w, dx_BTD = _again(p, (dims,), (*operands, dx_BTD))
    dx_BTD = gather_positions(p.layout, dx_BTD)
    dsums, dbiases = made.backward(sums, dx_BTD, gather_weight(p.layout, w, dims, p.dtype))
    dw_FD = jnp.tensordot(y_BTF, dx_BTD, ((0, 1), (0, 1)), preferred_element_type=jnp.float32)
    dsums, dw_FD = _beside(p, (dsums, dw_FD))
    return dsums, dbiases, gradient_of(w, reduce_gradient(p.layout, dw_FD, dims, at=lies(w)))


_rows.defvjp(_rows_forward, _rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table, tokens_BT, p: Products, dims):
    at_rest, table_VD = p.layout.gathered(dims)[1], cast(table, p.dtype)
    index, hit = _local_rows(p.layout, table_VD, tokens_BT, at_rest)
    x_BTD = jnp.where(hit[..., None], table_VD[index], 0)
    if at_rest:  # each device found its channels of the whole group's rows: channels and rows change places
        x_BTD = jax.lax.all_to_all(x_BTD, at_rest, 0, 2, tiled=True)
    return scatter_positions(p.layout, x_BTD, p.layout.split("vocab"))


def _lookup_forward(table, tokens_BT, p, dims):
    return _lookup(table, tokens_BT, p, dims), (table, tokens_BT)


def _lookup_backward(p, dims, saved, dx_BTD):
    table, tokens_BT = saved
    at_rest, table_VD = p.layout.gathered(dims)[1], cast(table, p.dtype)
    index, hit = _local_rows(p.layout, table_VD, tokens_BT, at_rest)
    dx_BTD = gather_positions(p.layout, dx_BTD)
    if at_rest:
        dx_BTD = jax.lax.all_to_all(dx_BTD, at_rest, 2, 0, tiled=True)
    dx_BTD = jnp.where(hit[..., None], dx_BTD.astype(jnp.float32), 0)
    dtable_VD = jnp.zeros(table_VD.shape, jnp.float32).at[index].add(dx_BTD)
    if any(p.layout.gathered(dims, at="rest")):  # rows as in x, or a scatter over devices turns this: 1.1 ms at 355M
        dtable_VD = jax.lax.optimization_barrier(with_layout_constraint(dtable_VD, MemoryLayout((0, 1))))
    return gradient_of(table, reduce_gradient(p.layout, dtable_VD, dims, at=lies(table), done=at_rest)), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _local_rows(layout: Layout, table_VD, tokens_BT, group: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """(row of this device's share of the table, whether it has it) of each token of all rows of `group`."""
    if group:
        tokens_BT = jax.lax.all_gather(tokens_BT, group, axis=0, tiled=True)
    vocab = layout.split("vocab")
    index = tokens_BT - (jax.lax.axis_index(vocab) * table_VD.shape[0] if vocab else 0)
    hit = (index >= 0) & (index < table_VD.shape[0])
    return jnp.where(hit, index, 0), hit


def input_gradient(dx_BTD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """The gradient of y [B, T, F...] of x = y times w [F..., D]."""
    return jnp.tensordot(dx_BTD, w_FD, (2, w_FD.ndim - 1))


def gather_positions(layout: Layout, x_BTD: jax.Array) -> jax.Array:
    """From RESIDUAL to ("batch", "seq", "embed")."""
    axes = layout.residual_axes
    return jax.lax.all_gather(x_BTD, axes, axis=1, tiled=True) if axes else x_BTD


def scatter_positions(layout: Layout, x_BTD: jax.Array, partial_over: tuple[str, ...]) -> jax.Array:
    """Partial sums over the axes `partial_over`, in ("batch", "seq", "embed"), to their sum as RESIDUAL."""
    axes = layout.residual_axes
    if axes:
        x_BTD = jax.lax.psum_scatter(x_BTD, axes, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in partial_over if axis not in axes)
    return jax.lax.psum(x_BTD, rest) if rest else x_BTD


def gather_weight(layout: Layout, weight: Value, dims: Dims, dtype: Any) -> jax.Array:
    """From its share as a step holds it to its share in compute, cast before it travels."""
    w = cast(weight, dtype)
    for i, axes in enumerate(layout.gathered(dims)):
        w = jax.lax.all_gather(w, axes, axis=i, tiled=True) if axes else w
    return w


def reduce_gradient(layout: Layout, dw: jax.Array, dims: Dims, *, at: At, done: tuple[str, ...] = ()) -> jax.Array:
    """This device's part of a weight's gradient, scattered to lie `at`; over other axes a part still, which gradients.py sums.

    done: axes over which it is summed and split already.
    """
    return scatter(dw, [tuple(axis for axis in axes if axis not in done) for axes in layout.gathered(dims, at=at)])


def _again(p: Products, dims: tuple[Dims, ...], operands: Any) -> Any:
    """`operands` of a backward that gathers, made to differ from the forward's, or the compiler keeps what that gathered."""
    gathers = p.layout.residual_axes or any(axes for d in dims for axes in p.layout.gathered(d))
    return jax.lax.optimization_barrier(operands) if p.regather and gathers else operands


def _beside(p: Products, gradients: Any) -> Any:
    """`gradients` of a product's input and weights, none handed on before all are formed, where positions are split: a weight's
    hides the exchange of the input's. The compiler would put it off to the step's end, with all that it is formed from."""
    return jax.lax.optimization_barrier(gradients) if p.layout.residual_axes else gradients
