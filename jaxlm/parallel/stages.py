# Dims: P stages, R repeats, L layers, J layers of one virtual stage (slots).
"""Which layer is where in a pipeline, and arrays a leaf a layer against arrays a leaf a slot [P, R, ...].

A run without a pipeline, and every checkpoint, keeps a leaf a layer. A pipeline keeps, for each of J slots, the layers that
all stages have in it, stacked [P, R, ...] and split over the stages: a device holds its own stage's and nothing else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

NAME = re.compile(r"^((?:.*\.)?layers)\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class Stages:
    """counts: layers of each virtual stage, in the order of the layers; virtual stage r * P + s is stage s at repeat r."""

    stages: int
    repeats: int
    counts: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        return max(self.counts)

    @property
    def is_even(self) -> bool:
        return len(set(self.counts)) == 1

    def stacks(self, leaf: Any) -> bool:
        """Whether a slot's leaf holds a layer for each stage and repeat; an optimizer's stand-in for nothing does not."""
        return leaf.shape[:2] == (self.stages, self.repeats)

    def layers(self) -> np.ndarray:
        """i32[J, P, R]: the layer in each slot, -1 where there is none."""
        firsts = [0, *itertools.accumulate(self.counts)]
        table = np.full((self.num_slots, self.stages, self.repeats), -1, np.int32)
        for v, (first, count) in enumerate(zip(firsts, self.counts)):
            table[:count, v % self.stages, v // self.stages] = range(first, first + count)
        return table


def cut(num_layers: int, *, stages: int, repeats: int) -> tuple[int, ...]:
    """Layers of each virtual stage, as even as can be: the first ones have one more where they do not divide."""
    each, more = divmod(num_layers, stages * repeats)
    return tuple(each + (v < more) for v in range(stages * repeats))


def by_layer(stages: Stages, named: Mapping[str, Any]) -> dict[str, Any]:
    """{name: leaf} with slots taken apart into layers: each array lies on its stage's devices. Copies nothing but on
    the device. Abstract leaves (jax.ShapeDtypeStruct) give abstract leaves."""
    out: dict[str, Any] = {}
    table = stages.layers()
    for name, leaf in named.items():
        match = NAME.match(name)
        if match is None:
            out[name] = leaf
            continue
        layers = table[int(match[2])]
        for s, r in np.argwhere(layers >= 0):
            out[f"{match[1]}.{layers[s, r]}.{match[3]}"] = _layer_of(leaf, s, r) if stages.stacks(leaf) else leaf
    return out


def by_slot(stages: Stages, named: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """What `by_layer` took apart, put together as the abstract leaves of `like`; empty slots are zeros."""
    out: dict[str, Any] = {}
    table = stages.layers()
    for name, want in like.items():
        match = NAME.match(name)
        if match is None:
            out[name] = named[name]
            continue
        layers = table[int(match[2])]
        leaves = {(s, r): named[f"{match[1]}.{layers[s, r]}.{match[3]}"] for s, r in np.argwhere(layers >= 0)}
        out[name] = _slot_of(leaves, want) if stages.stacks(want) else next(iter(leaves.values()))
    return out


def _axis(sharding: NamedSharding) -> str:
    """The mesh axis that splits the stages of a leaf [P, R, ...]."""
    first = sharding.spec[0]
    return first if isinstance(first, str) else first[0]


def _submesh(sharding: NamedSharding, stage: int) -> NamedSharding:
    """Where one stage keeps a layer of a leaf [P, R, ...] that rests by `sharding`."""
    mesh, axis = sharding.mesh, sharding.mesh.axis_names.index(_axis(sharding))
    devices = np.expand_dims(np.take(np.asarray(mesh.devices), stage, axis), axis)
    submesh = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(submesh, PartitionSpec(*sharding.spec[2:]), memory_kind=sharding.memory_kind)


def _layer_of(leaf: Any, stage: int, repeat: int) -> Any:
    sharding = _submesh(leaf.sharding, stage)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype, sharding=sharding)
    mine = {shard.device: shard.data for shard in leaf.addressable_shards if shard.index[0].start in (stage, None)}
    # slices with indices the program knows: nothing is sent to the device for them
    parts = [_at(_at(mine[device], 0), repeat) for device in sharding.addressable_devices if device in mine]
    kind = sharding.memory_kind
    parts = [jax.device_put(part, SingleDeviceSharding(next(iter(part.devices())), memory_kind=kind)) for part in parts]
    return jax.make_array_from_single_device_arrays(leaf.shape[2:], sharding, parts, dtype=leaf.dtype)


def _at(x: jax.Array, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index, 0, keepdims=False)


def _slot_of(leaves: Mapping[tuple[int, int], jax.Array], want: jax.ShapeDtypeStruct) -> jax.Array:
    R = want.shape[1]
    shards = {key: {s.device: s.data for s in leaf.addressable_shards} for key, leaf in leaves.items()}
    parts = []
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        assert index is not None
        stage = index[0].start or 0
        shape = want.sharding.shard_shape(want.shape)[2:]
        with jax.default_device(device):
            rows = [shards[stage, r][device] if (stage, r) in shards else np.zeros(shape, want.dtype) for r in range(R)]
            stacked = jax.numpy.stack(
                [jax.device_put(row, SingleDeviceSharding(device, memory_kind="device")) for row in rows]
            )[None]
        parts.append(jax.device_put(stacked, SingleDeviceSharding(device, memory_kind=want.sharding.memory_kind)))
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, parts)
