"""Where a save waits for nothing but the links: the state, copied once into the host's pinned memory.

The compiled step donates its state, so a save must hold the values before the next step overwrites them. A second copy on
the device would cost as much memory as the state; pinned host memory is there, and DMA fills it at the speed of the link.
What the run waits for is this copy alone: turning it into files is left to a background thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

KIND = "pinned_host"


def stage(named: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Copies of arrays in pinned host memory, each part once a process, however many devices hold it. Returns when made.

    An array that rests in host memory already is copied too: it may be donated like any other.
    """
    shardings = {name: one_replica(array.sharding) for name, array in named.items()}
    parts = {
        name: [shard.data for shard in array.addressable_shards if shard.device in shardings[name].device_set]
        for name, array in named.items()
    }
    places = jax.tree.map(lambda part: _pinned(part.device), parts)
    pieces = jax.block_until_ready(jax.device_put(parts, places, may_alias=False))
    if jax.process_count() > 1:
        shardings = _seen_by_all(shardings)
        blank = cache(lambda shape, dtype, device: jax.device_put(np.zeros(shape, dtype), _pinned(device)))
        for name, sharding in shardings.items():
            shape, dtype = sharding.shard_shape(named[name].shape), named[name].dtype
            pieces[name] = pieces[name] or [blank(shape, dtype, device) for device in sharding.addressable_devices]
    return {
        name: jax.make_array_from_single_device_arrays(array.shape, shardings[name], pieces[name], dtype=array.dtype)
        for name, array in named.items()
    }


def _pinned(device: Any) -> Sharding:
    return SingleDeviceSharding(device, memory_kind=KIND)


def one_replica(sharding: Sharding) -> Sharding:
    """How an array lies in pinned host memory with each of its parts there once a process: of a mesh axis that repeats it,
    only as much is left as it takes to reach every process."""
    if not isinstance(sharding, NamedSharding):
        return sharding.with_memory_kind(KIND)
    mesh = sharding.mesh
    splits = {axis for axes in split_axes(sharding.spec) for axis in axes}
    devices = np.asarray(mesh.devices)
    owners = np.vectorize(lambda device: device.process_index)(devices)
    for number, axis in enumerate(mesh.axis_names):
        if axis not in splits:
            rows = np.moveaxis(owners, number, 0)
            kept = [i for i in range(len(rows)) if i == 0 or (rows[i] != rows[i - 1]).any()]
            devices, owners = devices.take(kept, number), owners.take(kept, number)
    part = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(part, sharding.spec, memory_kind=KIND)


def _seen_by_all(shardings: dict[str, Sharding]) -> dict[str, Any]:
    """The same shardings, those on some processes alone repeated on the others: Orbax takes an array that every process has
    a part of, and writes its first replica. A layer of a pipeline lies on the devices of its stage; what stands for it
    elsewhere is blank, one piece of memory for all arrays of a shape."""
    meshes = {id(mesh): mesh for mesh in (sharding.mesh for sharding in shardings.values())}  # pyright: ignore
    processes = [{device.process_index for device in mesh.devices.flat} for mesh in meshes.values()]

    def everywhere(own: Mesh) -> Mesh:
        seen, copies = {device.process_index for device in own.devices.flat}, [own.devices]
        for mesh, there in zip(meshes.values(), processes):
            if mesh.devices.shape == own.devices.shape and not there & seen:
                seen, copies = seen | there, [*copies, mesh.devices]
        assert len(seen) == jax.process_count(), "the stages of a pipeline take all processes"
        types = (AxisType.Auto, *own.axis_types)
        return Mesh(np.stack(copies), ("copies", *own.axis_names), axis_types=types)

    wider = {key: everywhere(mesh) for key, mesh in meshes.items()}
    return {name: NamedSharding(wider[id(s.mesh)], s.spec, memory_kind=KIND) for name, s in shardings.items()}  # pyright: ignore


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
