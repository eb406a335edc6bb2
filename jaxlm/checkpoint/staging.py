"""Where a save waits for nothing but the links: the state, copied once into the host's pinned memory.

The compiled step donates its state, so a save must hold the values before the next step overwrites them. A second copy on
the device would cost as much memory as the state; pinned host memory is there, and DMA fills it at the speed of the link.
What the run waits for is this copy alone: turning it into files is left to a background thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

KIND = "pinned_host"


def stage(named: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Copies of arrays in pinned host memory, each part once, however many devices hold it. Returns when they are made.

    An array that rests in host memory already is copied too: it may be donated like any other.
    """
    shardings = {name: one_replica(array.sharding) for name, array in named.items()}
    parts = {
        name: [shard.data for shard in array.addressable_shards if shard.device in shardings[name].device_set]
        for name, array in named.items()
    }
    flat = [part for pieces in parts.values() for part in pieces]
    places = [SingleDeviceSharding(part.device, memory_kind=KIND) for part in flat]
    copies = iter(jax.block_until_ready(jax.device_put(flat, places, may_alias=False)))
    return {
        name: jax.make_array_from_single_device_arrays(
            array.shape, shardings[name], [next(copies) for _ in parts[name]], dtype=array.dtype
        )
        for name, array in named.items()
    }


def one_replica(sharding: Sharding) -> Sharding:
    """How an array lies in pinned host memory with each of its parts there once: mesh axes that repeat it are left out."""
    if not isinstance(sharding, NamedSharding):
        return sharding.with_memory_kind(KIND)
    mesh = sharding.mesh
    splits = {axis for axes in split_axes(sharding.spec) for axis in axes}
    some = tuple(slice(None) if axis in splits else slice(1) for axis in mesh.axis_names)
    part = Mesh(np.asarray(mesh.devices)[some], mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(part, sharding.spec, memory_kind=KIND)


def split_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim, of those that `spec` mentions."""
    return [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec]


def staged_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of this host's memory that `stage` takes for arrays like `leaves` (anything with shape, dtype, sharding)."""
    total = 0
    for leaf in leaves:
        sharding = one_replica(leaf.sharding)
        elements = math.prod(sharding.shard_shape(leaf.shape)) * len(sharding.addressable_devices)
        total += elements * leaf.dtype.itemsize
    return total
