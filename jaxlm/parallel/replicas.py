"""Are values that should be equal equal to the last bit: on every replica, and computed twice?

Devices fail in silence: a core that multiplies wrongly, a cell of memory that flips. Both checks wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxlm.config import Problem, UserError


def differing_replicas(tree: Any) -> list[str]:
    """Names of the leaves of `tree` of which two devices hold the same part with different bits."""
    return _names(_replicas_differ, tree)


def differing_leaves(one: Any, other: Any) -> list[str]:
    """Names of the leaves in which two trees of the same shape and layout differ in a bit, on whatever device."""
    return _names(_bits_differ, one, other)


def rehearse(state: Any) -> None:
    """Compiles what `step_twice` compares with, for states like this one."""
    differing_replicas(state.params)
    differing_leaves(state, jax.tree.map(jnp.copy, state))


def _replicas_differ(copied: tuple[str, ...], bits: jax.Array) -> jax.Array:
    total = bits.sum(dtype=jnp.uint32)  # a flipped bit moves it by a power of two below 2^32: it cannot be missed
    return jax.lax.pmax(total, copied) != jax.lax.pmin(total, copied) if copied else jnp.zeros((), bool)


def _bits_differ(copied: tuple[str, ...], bits: jax.Array, others: jax.Array) -> jax.Array:
    return (bits != others).any()


def _names(differs: Callable[..., jax.Array], *trees: Any) -> list[str]:
    """Names of the leaves for which differs(axes it is copied on, bits u32 of this device's part in each tree) somewhere."""
    paths, leaves = zip(*jax.tree.leaves_with_path(trees[0]))
    mesh, specs = leaves[0].sharding.mesh, tuple(leaf.sharding.spec for leaf in leaves)
    found = jax.device_get(_somewhere(differs, mesh, specs, *(tuple(jax.tree.leaves(tree)) for tree in trees)))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, yes in zip(paths, found) if yes]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _somewhere(differs: Callable[..., jax.Array], mesh: Mesh, specs: tuple[Spec, ...], *trees: Any) -> jax.Array:
    def local(*parts: tuple[jax.Array, ...]) -> jax.Array:
        found = []
        for spec, *ones in zip(specs, *parts, strict=True):
            split = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
            copied = tuple(axis for axis in mesh.axis_names if axis not in split)
            bits = [jax.lax.bitcast_convert_type(one, jnp.uint32) for one in ones]
            found.append(jax.lax.pmax(differs(copied, *bits).astype(jnp.int32), mesh.axis_names))
        return jnp.stack(found) > 0

    return jax.shard_map(local, mesh=mesh, in_specs=(specs,) * len(trees), out_specs=Spec(), check_vma=False)(*trees)


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
