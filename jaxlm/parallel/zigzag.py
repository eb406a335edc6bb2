# Dims: B batch, T query position, S key position, N heads, K kv heads, H head width, C devices that share a row.
"""Causal attention over a row that C devices share, a block of keys at a time: the keys come round a ring, or all at once.

A row is 2C chunks. Device i keeps chunks 2i and 2i+1 between layers; for attention it trades the second with device
C-1-i, and then holds 2i and 2C-1-2i: `lo`, the smaller, which is below C, and `hi`, its mirror. Of the keys of any other
device, lo and hi, its queries see exactly two blocks whole and two not at all, so every device does the same work at
every step and nothing is masked but the block at home:

  keys from a smaller lo: q.lo x k.lo and q.hi x k.lo        keys from a larger lo: q.hi x k.lo and q.hi x k.hi

Everything here is one device's program. Blocks are merged by (out, lse) in f32; backward walks the same way with the
final out and lse, so that each block's gradient is exact by itself.

Source: blocks of keys round a ring, Liu et al., arXiv:2310.01889, section 3; that contiguous chunks leave causal work
uneven, Brandon et al., arXiv:2311.09431, section 3 (their remedy is stripes); 2C chunks of which device i takes i and
2C-1-i, and keys gathered before attention, Llama 3, arXiv:2407.21783, section 3.3.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

UNROLLED = 4  # devices; see Walk.travel


@dataclass(frozen=True)
class Walk(ABC):
    """The C = `size` devices that share a row, in the order of `axes`. A subclass is a way for keys to travel."""

    axes: tuple[str, ...]
    size: int

    @abstractmethod
    def load(self, own: Any) -> Any:
        """The cargo that travels, from this device's (k, v, documents)."""

    @abstractmethod
    def advance(self, cargo: Any) -> Any:
        """The cargo one step on."""

    @abstractmethod
    def read(self, cargo: Any, source: jax.Array) -> Any:
        """What device `source`, whose turn it is, loaded."""

    @abstractmethod
    def first(self, dkv: Any) -> Any:
        """Sums of gradients, f32, begun with this device's own share for its own keys."""

    @abstractmethod
    def add(self, sums: Any, dkv: Any, source: jax.Array) -> Any:
        """The sums with a share for the keys of `source`, one step on."""

    @abstractmethod
    def home(self, sums: Any) -> Any:
        """This device's (dk, dv), after the last share."""

    @property
    def me(self) -> jax.Array:
        """This device's place in the group."""
        return jax.lax.axis_index(self.axes)

    def lo(self, device: jax.Array) -> jax.Array:
        """Which chunk is the lo of `device`; its hi is chunk 2C - 1 - lo."""
        return jnp.minimum(2 * device, 2 * self.size - 1 - 2 * device)

    def positions(self, device: jax.Array, num: int) -> jax.Array:
        """f32[num], the positions in the row of the lo, then hi, of `device`."""
        lo, within = self.lo(device), jnp.arange(num // 2)
        starts = jnp.stack((lo, 2 * self.size - 1 - lo)) * (num // 2)
        return (starts[:, None] + within).reshape(num).astype(jnp.float32)

    def enter(self, x_BTNH: jax.Array) -> jax.Array:
        """Neighbouring chunks (2i, 2i+1) -> (lo, hi)."""
        first, second = jnp.split(x_BTNH, 2, axis=1)
        return jnp.concatenate(_swap_if(2 * self.me >= self.size, first, self._mirror(second)), axis=1)

    def leave(self, x_BTNH: jax.Array) -> jax.Array:
        """(lo, hi) -> neighbouring chunks (2i, 2i+1)."""
        first, other = _swap_if(2 * self.me >= self.size, *jnp.split(x_BTNH, 2, axis=1))
        return jnp.concatenate((first, self._mirror(other)), axis=1)

    def _mirror(self, x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, self.axes, [(i, self.size - 1 - i) for i in range(self.size)])

    def travel(self, step: Callable, state: Any, coming: Any) -> Any:
        """state after step(state, cargo, source) for each other device, the nearest behind first.

        `coming` has made its first move. Each next move is sent for before the step that it can overlap. A loop, so
        that the program holds five kernels whatever C: laid out flat, 2C - 1 of them, a layer took 3.1 s instead of
        0.5 s to compile for 8 CPU devices. Up to UNROLLED devices it is flat all the same (0.9 s instead of 0.5 s for
        4): the compiler may then overlap across steps and copies no cargo between them.
        """

        def move(carry: tuple, j: jax.Array) -> tuple:
            state, cargo = carry
            after = self.advance(cargo)
            return (step(state, cargo, (self.me - j) % self.size), after), None

        steps = jnp.arange(1, self.size - 1)
        (state, cargo), _ = jax.lax.scan(move, (state, coming), steps, unroll=self.size <= UNROLLED)
        return step(state, cargo, (self.me + 1) % self.size)

    def forward(
        self, kernel: Any, q_BTNH, k_BSKH, v_BSKH, slopes_N, keep: None, documents_BT
    ) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH in q's dtype, lse_BNT) of this device's lo and hi queries over the whole row; operands entered, but
        not documents, which come as they lie between layers."""
        masks, num = partial(_masks, slopes_N), q_BTNH.shape[1]
        documents_BT = None if documents_BT is None else self.enter(documents_BT)
        cargo = self.load((k_BSKH, v_BSKH, documents_BT))
        coming = self.advance(cargo)
        here = self.positions(self.me, num), documents_BT
        own = kernel.forward(q_BTNH, k_BSKH, v_BSKH, **masks(here, here), causal=True)
        rows_lo, rows_hi = _halves((q_BTNH, here))

        def step(state: tuple, cargo: Any, source: jax.Array) -> tuple:
            lo, hi = state
            keys_lo, keys_hi = _halves(self._keys(cargo, source, num))
            earlier = self.lo(source) < self.lo(self.me)

            def block(sums: tuple, rows: tuple, keys: tuple) -> tuple:
                (q, t), (k, v, s) = rows, keys
                return _merge(sums, kernel.forward(q, k, v, **masks(t, s), causal=False))

            hi = block(hi, rows_hi, keys_lo)
            either = _either(earlier, (lo, rows_lo, keys_lo), (hi, rows_hi, keys_hi))
            merged = block(*either)
            return _either(earlier, merged, lo), _either(earlier, hi, merged)

        out, lse = own
        start = tuple(zip(_halves(out.astype(jnp.float32)), jnp.split(lse, 2, axis=2)))
        (out_lo, lse_lo), (out_hi, lse_hi) = self.travel(step, start, coming)
        return _join(out_lo, out_hi).astype(q_BTNH.dtype), jnp.concatenate((lse_lo, lse_hi), axis=2)

    def _keys(self, cargo: Any, source: jax.Array, num: int) -> tuple:
        """(k, v, (positions, documents)) of `source`, whose turn it is."""
        k_BSKH, v_BSKH, documents_BS = self.read(cargo, source)
        return k_BSKH, v_BSKH, (self.positions(source, num), documents_BS)

    def backward(
        self, kernel: Any, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, dout_BTNH, slopes_N, keep: None, documents_BT
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) in the operands' dtypes, summed in f32, from the final out and lse; all entered."""
        masks, num = partial(_masks, slopes_N), q_BTNH.shape[1]
        documents_BT = None if documents_BT is None else self.enter(documents_BT)
        cargo = self.load((k_BSKH, v_BSKH, documents_BT))
        coming = self.advance(cargo)
        here = self.positions(self.me, num), documents_BT
        rows = (q_BTNH, out_BTNH, dout_BTNH, here)
        rows_lo, rows_hi = ((*half, lse) for half, lse in zip(_halves(rows), jnp.split(lse_BNT, 2, axis=2)))

        def block(rows: tuple, keys: tuple, causal: bool = False) -> tuple:
            (q, out, dout, t, lse), (k, v, s) = rows, keys
            grads = kernel.backward(q, k, v, out, lse, dout, **masks(t, s), causal=causal)
            return tuple(grad.astype(jnp.float32) for grad in grads)

        def step(state: tuple, cargo: Any, source: jax.Array) -> tuple:
            (dq_lo, dq_hi), sums = state
            keys_lo, keys_hi = _halves(self._keys(cargo, source, num))
            earlier = self.lo(source) < self.lo(self.me)
            dq_always, *dkv_always = block(rows_hi, keys_lo)
            dq_either, *dkv_either = block(*_either(earlier, (rows_lo, keys_lo), (rows_hi, keys_hi)))
            dq = dq_lo + jnp.where(earlier, dq_either, 0), dq_hi + dq_always + jnp.where(earlier, 0, dq_either)
            dkv = tuple(
                _join(always + jnp.where(earlier, either, 0), jnp.where(earlier, 0, either))
                for always, either in zip(dkv_always, dkv_either)
            )
            return dq, self.add(sums, dkv, source)

        dq, *dkv = block((*rows, lse_BNT), (k_BSKH, v_BSKH, here), causal=True)
        dq, sums = self.travel(step, (_halves(dq), self.first(tuple(dkv))), coming)
        dk, dv = self.home(sums)
        return _join(*dq).astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)


class Ring(Walk):
    """Each device hands on what it has to the next one; gradients follow the keys they belong to, a step behind."""

    def load(self, own: Any) -> Any:
        return own

    def advance(self, cargo: Any) -> Any:
        return jax.lax.ppermute(cargo, self.axes, [(i, (i + 1) % self.size) for i in range(self.size)])

    def read(self, cargo: Any, source: jax.Array) -> Any:
        return cargo

    def first(self, dkv: Any) -> Any:
        return dkv

    def add(self, sums: Any, dkv: Any, source: jax.Array) -> Any:
        return jax.tree.map(jnp.add, self.advance(sums), dkv)

    def home(self, sums: Any) -> Any:
        return self.advance(sums)


class Gather(Walk):
    """Every device holds all keys of its heads, gathered once; gradients meet in one reduce-scatter."""

    def load(self, own: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes), own)

    def advance(self, cargo: Any) -> Any:
        return cargo

    def read(self, cargo: Any, source: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, source, keepdims=False), cargo)

    def first(self, dkv: Any) -> Any:
        return self.add(jax.tree.map(lambda x: jnp.zeros((self.size, *x.shape), x.dtype), dkv), dkv, self.me)

    def add(self, sums: Any, dkv: Any, source: jax.Array) -> Any:
        return jax.tree.map(lambda all, x: all.at[source].add(x), sums, dkv)

    def home(self, sums: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.psum_scatter(x, self.axes), sums)


def alibi(slopes_N, t_T, s_S) -> jax.Array | None:
    """-slope * (t - s) in logits, f32[1, N, T, S], for global positions t and s; None without slopes."""
    return None if slopes_N is None else -(slopes_N[:, None, None] * (t_T[:, None] - s_S))[None]


def _masks(slopes_N, rows: tuple, keys: tuple) -> dict[str, Any]:
    """What a kernel is told of a block, from the (positions, documents) of its queries and its keys."""
    (t_T, t_BT), (s_S, s_BS) = rows, keys
    documents = None if t_BT is None else (t_BT, s_BS)
    return dict(bias=alibi(slopes_N, t_T, s_S), keep=None, documents=documents)


def _merge(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
    """(out, lse) over the keys of both: each out weighs exp(its lse - the lse of both)."""
    lse_BNT = jnp.logaddexp(one[1], other[1])
    mine, theirs = (out * jnp.exp(lse - lse_BNT).swapaxes(1, 2)[..., None] for out, lse in (one, other))
    return mine + theirs, lse_BNT


def _halves(tree: Any) -> tuple[Any, Any]:
    """(lo, hi): positions are dim 1 of an array, or all there is."""
    num = {x.shape[min(1, x.ndim - 1)] // 2 for x in jax.tree.leaves(tree)}.pop()
    return (
        jax.tree.map(lambda x: x[:num] if x.ndim == 1 else x[:, :num], tree),
        jax.tree.map(lambda x: x[num:] if x.ndim == 1 else x[:, num:], tree),
    )


def _join(lo: jax.Array, hi: jax.Array) -> jax.Array:
    return jnp.concatenate((lo, hi), axis=1)


def _either(first: jax.Array, this: Any, that: Any) -> Any:
    """`this` where `first` holds, else `that`: a choice between values, so every device runs one program."""
    return jax.tree.map(partial(jnp.where, first), this, that)


def _swap_if(swap: jax.Array, this: jax.Array, that: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(swap, that, this), jnp.where(swap, this, that)
