"""What a layout costs, as text: a step's collectives by mesh axis, and how each parameter lies on the devices."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.parallel.hlo import KINDS, Collective
from jaxlm.parallel.rules import At, Layout
from jaxlm.settings import columns


def communication_bytes(found: Iterable[Collective]) -> int:
    """Payload bytes of a step on one device."""
    return sum(c.bytes * c.times for c in found)


def _grouped(found: Iterable[Collective]) -> list[tuple[str, str, str, int]]:
    """(kind, axes, executions a step, payload bytes of them all), by kind and axes; a + marks a count from below."""
    groups: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, "+".join(c.axes)].append(c)
    rows = []
    for (kind, over), members in sorted(groups.items(), key=lambda row: (KINDS.index(row[0][0]), row[0][1])):
        more = "" if all(c.is_counted for c in members) else "+"
        rows.append((kind, over, f"{sum(c.times for c in members):,}{more}", communication_bytes(members)))
    return rows


def collectives_table(found: Iterable[Collective]) -> str:
    """Plain text: executions and payload of a step on one device, by kind and mesh axes."""
    found = list(found)
    total = ("all", "", f"{sum(c.times for c in found):,}", communication_bytes(found))
    rows = [(*names, bytes_text(size)) for *names, size in (*_grouped(found), total)]
    text = _aligned([("collective", "over", "times a step", "bytes a device"), *rows])
    known = all(c.is_counted for c in found)
    return text + ("" if known else "\n+: in a loop whose trip count is not known; one trip is counted")


def communication_summary(found: Iterable[Collective], *, shown: int = 3) -> str:
    """One line: payload a device and step, and the `shown` largest parts of it."""
    found = list(found)
    rows = sorted(_grouped(found), key=lambda row: -row[3])
    parts = [f"{count} {kind} over {over}" for kind, over, count, _ in rows[:shown]]
    more = [f"{len(rows) - shown} more"] if len(rows) > shown else []
    return f"{bytes_text(communication_bytes(found))} a device and step: " + (", ".join(parts + more) or "nothing")


@dataclass(frozen=True)
class Parameter:
    """name: dotted path.   shape: global.   dims: a logical dim for each entry of shape.   dtype: at rest."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: Any = np.float32


def parameter_table(parameters: Sequence[Parameter], layout: Layout, *, optimizer_bytes: int) -> str:
    """Plain text: how each parameter lies when computing and at rest, and its bytes on one device at rest.

    Layers with equal rows share one: `layers.*.attn.query x24`, with the bytes of all 24.
    optimizer_bytes: of the optimizer's state on one device.
    """
    folds: dict[str, list[Parameter]] = defaultdict(list)
    for p in parameters:
        folds[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", p.name)].append(p)
    rows = [("parameter", "computing", "at rest", "bytes a device")]
    for fold, members in folds.items():
        same = len({(p.shape, p.dims, p.dtype) for p in members}) == 1 and len(members) > 1
        for p in members[:1] if same else members:
            name, count = (f"{fold} x{len(members)}", len(members)) if same else (p.name, 1)
            compute, storage = _layout_text(p, layout, at="compute"), _layout_text(p, layout, at="params")
            rows.append((name, compute, storage, bytes_text(count * _bytes_at_rest(p, layout))))
    held = sum(_bytes_at_rest(p, layout) for p in parameters)
    total = sum(math.prod(p.shape) for p in parameters)
    sums = f"{total:,} parameters: {bytes_text(held)} a device; optimizer state: {bytes_text(optimizer_bytes)} a device"
    return f"{_aligned(rows)}\n{sums}"


def _split(p: Parameter, layout: Layout, *, at: At) -> list[tuple[str, ...]]:
    """Mesh axes above 1 of each dim of `p`: the one place that asks the layout."""
    axes = layout.axes(p.dims, at=at)
    return [tuple(axis for axis in names if layout.mesh.shape[axis] > 1) for names in axes]


def _layout_text(p: Parameter, layout: Layout, *, at: At) -> str:
    """Example: [1024@model, 768] computing, f32[1024@model, 768@fsdp] at rest; the model casts as it computes."""
    dims = zip(p.shape, _split(p, layout, at=at), strict=True)
    parts = [f"{size}@{'+'.join(axes)}" if axes else str(size) for size, axes in dims]
    dtype = np.dtype(p.dtype).name.replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{dtype if at != 'compute' else ''}[{', '.join(parts)}]"


def _bytes_at_rest(p: Parameter, layout: Layout) -> int:
    axes = _split(p, layout, at="params")
    sizes = (-(-size // math.prod(layout.mesh.shape[a] for a in names)) for size, names in zip(p.shape, axes))
    return math.prod(sizes) * np.dtype(p.dtype).itemsize


def bytes_a_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_text(size: int) -> str:
    """Three digits in powers of 1024. Example: 12_900_000 -> 12.3 MiB."""
    if size < 1024:
        return f"{size} B"
    power = min(4, (size.bit_length() - 1) // 10)
    scaled = size / 1024**power
    return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {'KMGT'[power - 1]}iB"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under one another, the last one to the right."""
    width = max(len(row[-1]) for row in rows)
    return "\n".join(columns([(*row[:-1], row[-1].rjust(width)) for row in rows]))
