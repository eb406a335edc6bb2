"""A checksum of an array's bits, computed where the array lies: one pass over its memory, the same on every mesh.

With w_i the array's 32-bit words in row-major order (16- and 8-bit elements widened, 64-bit ones split in two),

    checksum = sum over i of mix(w_i ^ i * 0x9E3779B1)   mod 2^32

where `mix` is a bijection of 32-bit words. Any change of one word changes one term, so it is always found; any other
change goes unnoticed with probability 2^-32. Words must be mixed before they are summed: with plain odd weights two flipped
sign bits cancel. Each device sums its own words at their global positions, and the sums meet on the host: nothing is gathered
and devices wait for no one.

Source of `mix`: the finalizer of MurmurHash3, A. Appleby.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxlm.checkpoint.staging import split_axes

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(named: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array, in [0, 2^32); 0 for one without elements. Waits for all processes."""
    found = own_sums(named)
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found).sum(0, dtype=np.uint32)
    return {name: int(total) for name, total in zip(named, found)}


def own_sums(named: Mapping[str, jax.Array]) -> np.ndarray:
    """u32[len(named)]: what this process's devices add to each checksum. Waits for no other process.

    One small program for each shape, dtype and sharding, not one for the whole state: a state has a thousand arrays of twenty
    kinds, on as many sets of devices as a pipeline has stages, and its moments may rest in host memory, from where they visit
    the device one at a time.
    """
    tables: dict[Mesh, dict[str, jax.Array]] = defaultdict(dict)
    for name, x in named.items():
        if not x.sharding.addressable_devices:  # a layer of a stage on other hosts: their sum is all of it
            continue
        mesh, spec = _mesh_and_spec(x.sharding)
        tables[mesh][name] = _sums(x, mesh, spec)
    totals = {}
    for sums in tables.values():  # one array comes to the host for each mesh, not one for each name
        table = _stack(list(sums.values()))
        parts = [np.asarray(shard.data) for shard in table.addressable_shards]
        totals |= zip(sums, np.concatenate(parts, axis=1).sum(1, dtype=np.uint32))
    return np.array([totals.get(name, 0) for name in named], np.uint32)


@jax.jit
def _stack(sums: list[jax.Array]) -> jax.Array:
    return jnp.stack(sums)


@partial(jax.jit, static_argnums=(1, 2))
def _sums(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """u32[devices]: the sum over the words of each device's part of `x`; 0 where another device has the same part."""
    x = jax.device_put(x, jax.memory.Space.Device)
    split = split_axes(spec)
    split += [()] * (x.ndim - len(split))
    copies = tuple(axis for axis in mesh.axis_names if axis not in {axis for axes in split for axis in axes})

    def local(part: jax.Array) -> jax.Array:
        starts = [jax.lax.axis_index(axes) * size if axes else 0 for axes, size in zip(split, part.shape)]
        first = jax.lax.axis_index(copies) == 0 if copies else True
        return jnp.where(first, _sum_of_part(part, starts, x.shape), 0)[None]

    every = PartitionSpec(mesh.axis_names)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=every, check_vma=False)(x)


def _sum_of_part(x: jax.Array, starts: Sequence[Any], whole: Sequence[int]) -> jax.Array:
    """Sum over the words of `x`, the part from `starts` on of an array of shape `whole`."""
    words = _words(x)
    starts, whole = [*starts, 0][: words.ndim], [*whole, 2][: words.ndim]
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) + jnp.uint32(starts[dim])
        position, stride = position + index * np.uint32(stride % 2**32), stride * whole[dim]
    return _mix(words ^ (position * np.uint32(0x9E3779B1))).sum(dtype=jnp.uint32)


def _mesh_and_spec(sharding: Sharding) -> tuple[Any, PartitionSpec]:
    """How arrays of `sharding` are split; one device is a mesh of one."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh, sharding.spec
    (device,) = sharding.device_set
    return Mesh([device], ("device",)), PartitionSpec()


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as u32, with a last dim of 2 where its elements have 64 bits."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    return jax.lax.bitcast_convert_type(bits, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
