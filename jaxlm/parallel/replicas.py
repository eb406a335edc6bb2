"""Are values that should be equal equal to the last bit: on every replica, and computed twice?

Devices fail in silence: a core that multiplies wrongly, a cell of memory that flips. Both checks wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxlm.config import Problem, UserError


def differing_replicas(tree: Any) -> list[str]:
    """Names of the leaves of `tree` of which two devices hold the same part with different bits."""
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}
    leaves = list(named.values())
    mesh = leaves[0].sharding.mesh
    differ = jax.device_get(_compare(mesh, tuple(leaf.sharding for leaf in leaves))(leaves))
    return [name for name, found in zip(named, differ, strict=True) if found]


def _compare(mesh: Mesh, shardings: tuple[NamedSharding, ...]) -> Any:
    """A function of leaves -> bool[leaves]: a sum of each part's bits must be one number over the axes it is copied on.

    One flipped bit moves the sum by a power of two below 2^32, so it cannot be missed.
    """

    def check(leaves: list[jax.Array]) -> jax.Array:
        found = []
        for leaf, sharding in zip(leaves, shardings, strict=True):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).sum(dtype=jnp.uint32)
            split = {axis for part in sharding.spec for axis in (part if isinstance(part, tuple) else (part,))}
            copied = tuple(axis for axis in mesh.axis_names if axis not in split)
            differs = jax.lax.pmax(bits, copied) != jax.lax.pmin(bits, copied) if copied else jnp.zeros((), bool)
            found.append(jax.lax.pmax(differs.astype(jnp.int32), mesh.axis_names))
        return jnp.stack(found) > 0

    specs = [sharding.spec for sharding in shardings]
    return jax.jit(jax.shard_map(check, mesh=mesh, in_specs=(specs,), out_specs=Spec(), check_vma=False))


def step_twice(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any, *, number: int) -> tuple[Any, Any]:
    """step(state, batch), which donates the state, if all replicas of its parameters agree and a second run gives the same.

    Raises: UserError naming the leaves that differ in a bit.
    """
    differ = [f"replicas of {name}" for name in differing_replicas(state.params)]
    if not differ:
        other, _ = step(jax.tree.map(jnp.copy, state), batch)
        state, metrics = step(state, batch)
        differ = [f"two runs from one state in {name}" for name in differing_leaves(state, other)]
        if not differ:
            return state, metrics
    rule = f"bits differ between {', '.join(differ[:3])}" + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
    remedy = "a device or its memory fails: go on from the newest checkpoint, or an older one, on another machine"
    raise UserError(Problem(f"step {number}: train.sdc_check_every", rule, remedy))


@jax.jit
def _equal(one: Any, other: Any) -> list[jax.Array]:
    bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint32)
    return [(bits(a) == bits(b)).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]


def differing_leaves(one: Any, other: Any) -> list[str]:
    """Names of the leaves in which two trees of the same shape differ in a bit."""
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(one)]
    return [name for name, equal in zip(names, jax.device_get(_equal(one, other)), strict=True) if not equal]
