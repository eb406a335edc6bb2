"""What a table of rules must hold for the layers and their products to be right, and what it must not leave replicated.

Every rule here is one that `dense.py`, `context.py` or the loss relies on: a table that breaks one would train, and train
something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from jaxlm.config import MESH_AXES, Problem, UserError
from jaxlm.parallel.rules import RULES, Layout, Rule

ACTIVATIONS = (  # dims that meet in one array, and so cannot share an axis
    ("batch", "residual", "embed"),
    ("batch", "seq", "heads", "head"),
    ("batch", "seq", "mlp"),
    ("batch", "seq", "vocab"),
)
SMALL_BYTES = 2**20  # replicated parameters of no more than this cost nobody anything


@dataclass(frozen=True)
class Declared:
    """A parameter: its shape, its logical dims and its bytes."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    num_bytes: int


def check_layout(layout: Layout, params: Mapping[str, Declared], *, max_replicated_frac: float) -> None:
    """Raises UserError with every problem of this table on this mesh for these parameters (by name)."""
    problems = check_rules(layout) + _unused(layout, {dim for p in params.values() for dim in p.dims})
    problems = problems or _twice(layout, params)
    if not problems:
        problems = _replicated(layout, params, max_replicated_frac)
    if problems:
        raise UserError(*problems)
    for name, param in params.items():
        layout.check_divides(name, param.shape, param.dims)


def check_rules(layout: Layout) -> list[Problem]:
    """Axes used twice, and rows that contradict one another; axes of degree 1 split nothing and are left out."""
    written, problems = {rule.dim: rule for rule in layout.rules}, []
    above = [axis for axis, degree in layout.mesh.shape.items() if degree > 1]
    rules = {
        dim: Rule(dim, *(tuple(a for a in column if a in above) for column in (rule.compute, rule.storage)))
        for dim, rule in written.items()
    }

    def need(holds: bool, dim: str, text: str, remedy: str) -> None:
        if not holds:
            problems.append(Problem(f"mesh.rules: {written[dim]}", text, remedy))

    for dim, rule in written.items():
        for column in (rule.compute, rule.storage):
            need(len(set(column)) == len(column), dim, "uses a mesh axis twice", "name each axis once")
        text = "what splits it in compute does not come first at rest"
        first = rule.storage[: len(rule.compute)]
        need(first == rule.compute, dim, text, "begin the second column with the first")
    for dims, axis in itertools.product(ACTIVATIONS, MESH_AXES):
        meet = [dim for dim in dims if axis in written[dim].compute]
        need(len(meet) < 2, (meet or dims)[-1], f"{axis} also splits {meet[:1]}", "use it once")
    batch, seq, residual, heads = (rules[dim].compute for dim in ("batch", "seq", "residual", "heads"))
    begins = residual[: len(seq)] == seq
    need(begins, "residual", f"must begin as {written['seq']}", "add axes after it")
    wider = [axis for axis in residual if axis not in seq]
    for dim in ("heads", "mlp", "vocab"):
        text = f"residual is split over {'+'.join(wider)} as well, and {dim} is not"
        need(set(wider) <= set(rules[dim].compute), dim, text, "split both over it, or neither")
    equal = heads == rules["kv_heads"].compute
    need(equal, "kv_heads", f"differs from {written['heads']}", "keep both equal")
    for dim in ("embed", "head", "channel", "position"):
        need(not rules[dim].compute, dim, "products need it whole", "leave the first column empty")
    for dim, rule in rules.items():
        only_stored = set(rule.storage) - set(rule.compute)
        gathered, odd = dim in ("embed", "position"), only_stored - {*batch, *seq}
        text = "only embed and position rest split further than they compute: nothing gathers the others"
        need(gathered or rule.storage == rule.compute, dim, text, "make both columns equal")
        text = f"at rest it is split over {sorted(odd)}, which splits neither batch nor seq"
        need(not odd, dim, text, "use axes that split batch or seq")
        staged = "pipeline" in rule.compute + rule.storage and dim not in ("stage", "vocab")
        need(not staged, dim, "stages work on different rows", "leave pipeline out")
    text = "a lookup trades rows for channels, over axes that do not split batch"
    need(set(rules["embed"].storage) <= set(batch), "embed", text, "use axes that split batch")
    return problems


def _unused(layout: Layout, dims: set[str]) -> list[Problem]:
    """Axes that split nothing, and replaced rows whose dim this model does not have."""
    dims = dims | {dim for names in ACTIVATIONS for dim in names} | {"stage"}
    used = {axis for rule in layout.rules if rule.dim in dims for axis in (*rule.compute, *rule.storage)}
    problems = [
        Problem(f"mesh.{axis}={degree}", "no row of the table uses it", "set it to 1, or give it a row in mesh.rules")
        for axis, degree in layout.mesh.shape.items()
        if degree > 1 and axis not in used
    ]
    for rule in layout.rules:
        if rule not in RULES and rule.dim not in dims:
            problems.append(Problem(f"mesh.rules: {rule}", f"this model has no dim {rule.dim}", "leave the row out"))
    return problems


def _twice(layout: Layout, params: Mapping[str, Declared]) -> list[Problem]:
    """Parameters two of whose dims use one axis."""
    problems = []
    for name, param in params.items():
        try:
            layout.axes(param.dims, at="optimizer")
        except ValueError:
            rows = ", ".join(str(rule) for rule in layout.rules if rule.dim in param.dims and rule.storage)
            text = f"use a mesh axis twice in {name}"
            problems.append(Problem(f"mesh.rules: {rows}", text, "use each axis in one row"))
    return problems[:3]


def _replicated(layout: Layout, params: Mapping[str, Declared], most: float) -> list[Problem]:
    """A problem for each of fsdp and model above 1 that leaves too many bytes whole on all its devices."""
    problems, total = [], sum(param.num_bytes for param in params.values())
    for axis in ("fsdp", "model"):
        split = {name for name, p in params.items() if axis in sum(layout.axes(p.dims, at="optimizer"), ())}
        whole = {name: param.num_bytes for name, param in params.items() if name not in split}
        frac = sum(whole.values()) / total
        if layout.mesh.shape[axis] > 1 and frac > most and sum(whole.values()) > SMALL_BYTES:
            names = sorted(whole, key=lambda name: -whole[name])
            largest = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            text = f"{frac:.1%} of the parameters' bytes lie whole on every device of {axis}: {largest}"
            remedy = "split them with a row in mesh.rules, or raise mesh.max_replicated_frac"
            problems.append(Problem(f"mesh.max_replicated_frac={most}", text, remedy))
    return problems
