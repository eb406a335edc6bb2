"""THE sharding table: each logical dim of an array, and the mesh axes that split it when computing and when at rest.

Layers name logical dims and never mesh axes. A parallelism is a degree in the mesh plus its rows here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Problem, UserError


@dataclass(frozen=True)
class Rule:
    dim: str
    compute: tuple[str, ...]
    storage: tuple[str, ...]


#         logical dim  compute            storage            what it is
RULES = (
    Rule("batch",     ("data", "fsdp"),  ("data", "fsdp")),  # rows of the global batch
    Rule("seq",       ("context",),      ("context",)),      # positions inside a branch
    Rule("residual",  ("context", "model"), ("context", "model")),  # positions between branches: norms, dropout, adds
    Rule("channel",   (),                ()),                # vectors of the model width: too small to gather
    Rule("embed",     (),                ("fsdp",)),         # model width: gathered to compute, split at rest
    Rule("vocab",     ("model",),        ("model",)),        # rows of the token table and the head
    Rule("position",  (),                ()),                # rows of the learned position table
    Rule("heads",     ("model",),        ("model",)),        # query heads
    Rule("kv_heads",  ("model",),        ("model",)),        # key and value heads
    Rule("head",      (),                ()),                # width of one head
    Rule("mlp",       ("model",),        ("model",)),        # hidden width of the MLP
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A mesh with its rules: turns logical dims into shardings."""

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES
    context_method: str = "auto"  # mesh.context_method, which parallel/context.py resolves

    def axes(self, dims: Sequence[str], *, storage: bool = False) -> tuple[tuple[str, ...], ...]:
        """Mesh axes of each of `dims`. Raises ValueError on an unknown dim or an axis used twice."""
        table = {rule.dim: rule.storage if storage else rule.compute for rule in self.rules}
        unknown = [dim for dim in dims if dim not in table]
        used = [axis for dim in dims for axis in table.get(dim, ())]
        if unknown or len(set(used)) != len(used):
            raise ValueError(
                f"dims {list(dims)}: " + (f"no rule for {unknown}" if unknown else f"a mesh axis twice in {used}")
            )
        return tuple(table[dim] for dim in dims)

    def spec(self, dims: Sequence[str], *, storage: bool = False) -> PartitionSpec:
        return PartitionSpec(*(axes or None for axes in self.axes(dims, storage=storage)))

    def sharding(self, dims: Sequence[str], *, storage: bool = False) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(dims, storage=storage))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def num_row_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(("batch",))[0])

    @property
    def platform(self) -> str:
        """cpu | gpu | tpu."""
        kind = self.mesh.devices.flat[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind

    def split(self, *dims: str) -> tuple[str, ...]:
        """Mesh axes above 1 that split `dims` when computing, in order: what a sum over those dims is summed over."""
        return tuple(axis for axes in self.axes(dims) for axis in axes if self.mesh.shape[axis] > 1)

    def on_mesh(self, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`local`, written for one device's share with its own collectives, as a function of whole arrays.

        It is not differentiated: what calls it has a custom_vjp whose forward and backward both go through here.
        """
        if self.mesh.size == 1:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def constrain(self, x: jax.Array, dims: Sequence[str], *, storage: bool = False) -> jax.Array:
        """`x` held to its compute layout, or its storage layout; nothing on a single device."""
        return x if self.mesh.size == 1 else jax.lax.with_sharding_constraint(x, self.sharding(dims, storage=storage))

    def check_divides(self, name: str, shape: Sequence[int], dims: Sequence[str]) -> None:
        """Raises UserError where a dim at rest does not split evenly over its mesh axes."""
        for size, dim, axes in zip(shape, dims, self.axes(dims, storage=True), strict=True):
            parts = math.prod(self.mesh.shape[axis] for axis in axes)
            if size % parts:
                over = "*".join(f"mesh.{axis}" for axis in axes)
                text = f"dim {dim!r} of {name} has {size} entries"
                raise UserError(Problem(text, f"does not split over {over} = {parts}", f"use a multiple of {parts}"))
