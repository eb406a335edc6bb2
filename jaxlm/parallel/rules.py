"""THE sharding table: each logical dim of an array, and the mesh axes that split it when computing and when at rest.

Layers name logical dims and never mesh axes. A parallelism is a degree in the mesh plus its rows here; `mesh.rules`
replaces rows, and `mesh.zero` says when a weight lies by the storage column.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import MESH_AXES, Problem, UserError

# Where a weight is: multiplied, in a step between products, as its gradient, between steps beside the optimizer's state
At = Literal["compute", "step", "grads", "rest"]
Dims = tuple[str, ...]
STORED: dict[At, int] = {"compute": 4, "step": 3, "grads": 2, "rest": 1}  # least mesh.zero to lie by the storage column


@dataclass(frozen=True)
class Rule:
    dim: str
    compute: tuple[str, ...]
    storage: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dim}={'+'.join(self.compute)}/{'+'.join(self.storage)}"


#         logical dim  compute            storage            what it is
RULES = (
    Rule("batch",     ("data", "fsdp"),  ("data", "fsdp")),  # rows of the global batch
    Rule("seq",       ("context",),      ("context",)),      # positions inside a branch
    Rule("residual",  ("context", "model"), ("context", "model")),  # positions between branches: norms, dropout, adds
    Rule("channel",   (),                ()),                # vectors of the model width: too small to gather
    Rule("embed",     (),                ("fsdp",)),         # model width: gathered to compute, split at rest
    Rule("vocab",     ("model", "pipeline"), ("model", "pipeline")),  # rows of the token table and the head
    Rule("position",  (),                ()),                # rows of the learned position table
    Rule("heads",     ("model",),        ("model",)),        # query heads
    Rule("kv_heads",  ("model",),        ("model",)),        # key and value heads
    Rule("head",      (),                ()),                # width of one head
    Rule("mlp",       ("model",),        ("model",)),        # hidden width of the MLP
    Rule("stage",     ("pipeline",),     ("pipeline",)),     # stages of a pipeline
    Rule("repeat",    (),                ()),                # passes through one stage
)  # fmt: skip


KEYS = {  # the setting that decides a dim's size
    "embed": "model.embed_dim", "vocab": "model.vocab_multiple", "position": "model.max_seq_len", "mlp": "model.mlp_dim",
    "heads": "model.num_heads", "kv_heads": "model.num_kv_heads (or num_heads)", "head": "model.head_dim",
    "channel": "model.embed_dim",
    "residual": "train.seq_len", "seq": "train.seq_len", "batch": "train.batch_size",
}  # fmt: skip


def with_rows(rows: Iterable[str], rules: tuple[Rule, ...] = RULES) -> tuple[Rule, ...]:
    """`rules` with rows replaced by those given as `dim=axes/axes` (computing/at rest), axes joined by +.

    >>> with_rows(["embed=/data+fsdp"])[4]
    Rule(dim='embed', compute=(), storage=('data', 'fsdp'))

    Raises: UserError on a row that is not of this form, or whose dim or axis does not exist.
    """
    table, problems, seen = {rule.dim: rule for rule in rules}, [], set()
    for row in rows:
        dim, _, columns = row.partition("=")
        compute, slash, storage = (part.strip() for part in columns.partition("/"))
        new = Rule(dim.strip(), *(tuple(filter(None, map(str.strip, part.split("+")))) for part in (compute, storage)))
        unknown = [axis for axis in (*new.compute, *new.storage) if axis not in MESH_AXES]
        where = f"mesh.rules: {row}"
        if not slash:
            problems.append(
                Problem(where, "is not dim=axes/axes, computing and at rest", "for example embed=/data+fsdp")
            )
        elif new.dim not in table:
            near = difflib.get_close_matches(new.dim, table, 1)
            problems.append(
                Problem(
                    where,
                    f"no dim is called {new.dim!r}",
                    f"did you mean {near[0]}?" if near else f"dims: {', '.join(table)}",
                )
            )
        elif unknown:
            problems.append(Problem(where, f"no axis is called {unknown[0]!r}", f"axes: {', '.join(MESH_AXES)}"))
        elif new.dim in seen:
            problems.append(Problem(where, f"{new.dim} has a row before this one", "give one row for each dim"))
        else:
            table[new.dim] = new
            seen.add(new.dim)
    if problems:
        raise UserError(*problems)
    return tuple(table.values())


@dataclass(frozen=True)
class Layout:
    """A mesh with its rules: turns logical dims into shardings.

    zero: what lies by the storage column: 1 parameters and optimizer's state between steps, 2 gradients too, 3 weights
      during a step too; below, a step begins by gathering them all.
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES
    zero: int = 3
    context_method: str = "auto"  # mesh.context_method, which parallel/context.py resolves

    def axes(self, dims: Sequence[str], *, at: At = "compute") -> tuple[tuple[str, ...], ...]:
        """Mesh axes of each of `dims`. Raises ValueError on an unknown dim or an axis used twice."""
        stored = self.zero >= STORED[at]
        table = {rule.dim: rule.storage if stored else rule.compute for rule in self.rules}
        unknown = [dim for dim in dims if dim not in table]
        used = [axis for dim in dims for axis in table.get(dim, ())]
        if unknown or len(set(used)) != len(used):
            raise ValueError(
                f"dims {list(dims)}: " + (f"no rule for {unknown}" if unknown else f"a mesh axis twice in {used}")
            )
        return tuple(table[dim] for dim in dims)

    def spec(self, dims: Sequence[str], *, at: At = "compute") -> PartitionSpec:
        return PartitionSpec(*(axes or None for axes in self.axes(dims, at=at)))

    def sharding(self, dims: Sequence[str], *, at: At = "compute") -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(dims, at=at))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def num_row_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.num_parts(self.axes(("batch",))[0])

    def num_parts(self, axes: Iterable[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def platform(self) -> str:
        """cpu | gpu | tpu."""
        kind = self.mesh.devices.flat[0].platform
        return "gpu" if kind in ("cuda", "rocm") else kind

    def split(self, *dims: str) -> tuple[str, ...]:
        """Mesh axes above 1 that split `dims` when computing, in order: what a sum over those dims is summed over."""
        return tuple(axis for axes in self.axes(dims) for axis in axes if self.mesh.shape[axis] > 1)

    def first(self, dim: str, size: int) -> jax.Array | int:
        """Local: where this device's share of `size` along `dim` begins in the whole."""
        axes = self.split(dim)
        return jax.lax.axis_index(axes) * size if axes else 0

    def whole(self, dim: str, size: int) -> int:
        """The size of the whole along `dim`, of which a device's share is `size`."""
        return size * self.num_parts(self.split(dim))

    @property
    def residual_axes(self) -> tuple[str, ...]:
        """Mesh axes above 1 that split positions between branches and not inside them."""
        inside = self.split("seq")
        return tuple(axis for axis in self.split("residual") if axis not in inside)

    def gathered(self, dims: Sequence[str], *, at: At = "step") -> tuple[tuple[str, ...], ...]:
        """For each dim the mesh axes above 1 that split it `at` and not in compute."""
        columns = zip(self.axes(dims, at=at), self.axes(dims))
        return tuple(tuple(a for a in rest if a not in use and self.mesh.shape[a] > 1) for rest, use in columns)

    def split_further(self, dims: Sequence[str], *, than: At, at: At) -> tuple[tuple[str, ...], ...]:
        """For each dim the mesh axes above 1 that split it `at` and not `than`."""
        pairs = zip(self.gathered(dims, at=than), self.gathered(dims, at=at))
        return tuple(tuple(axis for axis in there if axis not in here) for here, there in pairs)

    def on_mesh(self, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`local`, written for one device's share with its own collectives, as a function of whole arrays.

        The one way from code that sees whole arrays (step.py, generate.py) to the model's, which is local, as are its loss and
        the gradients of both. It is not differentiated: gradients are taken on the inside.
        """
        if self.mesh.size == 1:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def check_divides(self, name: str, shape: Sequence[int], dims: Sequence[str]) -> None:
        """Raises UserError where a dim at rest does not split evenly over its mesh axes."""
        for size, dim, axes in zip(shape, dims, self.axes(dims, at="rest"), strict=True):
            parts = self.num_parts(axes)
            if size % parts:
                over = "*".join(f"mesh.{axis}" for axis in axes)
                text = f"dim {dim!r} of {name} has {size} entries"
                remedy = f"set {KEYS[dim]} to a multiple of {parts}, or lower {over}"
                if dim == "vocab" and "pipeline" in axes:  # another multiple is a table that a checkpoint does not have
                    remedy += "; to keep a checkpoint's table: mesh.rules='vocab=model/model'"
                raise UserError(Problem(text, f"does not split over {over} = {parts}", remedy))


def is_vector(dims: Sequence[str]) -> bool:
    """Whether a parameter of these dims is a scale or a bias: no product's weight, no table."""
    return "embed" not in dims


def by_dims(function: Callable, dims: Any, *trees: Any) -> Any:
    """`function` of the dims of each parameter, and of the leaves of `trees`: a tree like theirs."""
    return jax.tree.map(function, dims, *trees, is_leaf=lambda leaf: isinstance(leaf, tuple))
