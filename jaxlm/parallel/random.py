"""Random masks that do not depend on the mesh: every entry's bits are a function of the key and its place in the whole."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from jaxlm.parallel.rules import Layout


def keep_mask(
    layout: Layout, key: jax.Array, shape: Sequence[int], axes: Sequence[tuple[str, ...]], keep: float
) -> jax.Array:
    """bool of `shape`, true with probability `keep`: this device's share of jax.random.bernoulli's whole array.

    Args:
      key: of the threefry kind, whose bits for entry i are a hash of (key, i): so a share can be drawn by itself.
      shape: of this device's share.   axes: mesh axes of each dim.
    """
    if layout.mesh.size == 1:
        return jax.random.bernoulli(key, keep, tuple(shape))
    hi, lo = jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32)
    for dim, (size, names) in enumerate(zip(shape, axes, strict=True)):
        names = tuple(name for name in names if layout.mesh.shape[name] > 1)
        first = jax.lax.axis_index(names).astype(jnp.uint32) * size if names else jnp.uint32(0)
        hi, lo = _times(hi, lo, size * layout.num_parts(names))
        index = first + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        hi, lo = hi + (lo + index < lo), lo + index
    bits = threefry_2x32(jax.random.key_data(key), jnp.concatenate([hi.ravel(), lo.ravel()]))
    bits_hi, bits_lo = jnp.split(bits, 2)
    uniform = ((bits_hi ^ bits_lo) >> 9).astype(jnp.float32) * 2.0**-23  # jax.random.uniform's 23 bits
    return (uniform < keep).reshape(shape)


def _times(hi: jax.Array, lo: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """(hi, lo) * factor as two 32-bit words; factor < 2^32."""
    f0, f1 = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    l0, l1 = lo & 0xFFFF, lo >> 16
    low, mid, cross, high = l0 * f0, l1 * f0, l0 * f1, l1 * f1
    carry = (low >> 16) + (mid & 0xFFFF) + (cross & 0xFFFF)
    top = high + (mid >> 16) + (cross >> 16) + (carry >> 16)
    return hi * jnp.uint32(factor) + top, (low & 0xFFFF) | (carry << 16)
