"""The collectives of a compiled step, from the optimized HLO that XLA prints: what will run, not what the rules ask for."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
UNKNOWN = "?"


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a step, as one device sees it.

    axes: mesh axes above 1 that it runs over, in mesh order; ("?",) where its groups are no grid of whole axes.
    bytes: payload of one execution: the larger of all operands and all results, so an all-gather counts what it
      makes and a reduce-scatter what it takes.   times: executions a step; every branch of a conditional counts.
    is_counted: false if it lies in a loop whose trip count XLA does not tell; `times` then holds one trip of that loop.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    is_counted: bool = True


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # from the first operand to the end of the line


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)")
_CALLEES = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives(hlo_text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text; those over one device are left out.

    Args:
      hlo_text: `compiled.as_text()` of a program partitioned over all of `mesh`: its ids are positions in mesh.devices.

    Raises: ValueError on text without an entry computation.
    """
    computations, entry = _parse(hlo_text)
    found = []
    for name, (times, is_counted) in _executions(computations, entry).items():
        shapes = {i.name: i.shape for i in computations[name]}
        results = {start: i.shape for i in computations[name] if i.opcode.endswith("-done") for start in _operands(i)}
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS and (axes := _axes(kind, i.rest, mesh)):
                # what an asynchronous start returns holds operands and contexts too: its end tells the result
                result = results.get(i.name, i.shape)
                sent = sum(_shape_bytes(shapes.get(operand, "")) for operand in _operands(i))
                found.append(Collective(kind, axes, max(sent, _shape_bytes(result)), times, is_counted))
    return found


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(instructions of each computation, name of the entry)."""
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            body.append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError("HLO text without an ENTRY computation")
    return computations, entry


def _executions(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation that is reached runs in one run of `entry`, and whether that is known."""
    runs: dict[str, tuple[int, bool]] = {name: (0, True) for name in computations}

    def visit(name: str, times: int, is_counted: bool) -> None:
        before = runs[name]
        runs[name] = before[0] + times, before[1] and is_counted
        for i in computations[name]:
            if i.opcode.endswith(("-done", "-update")):  # they name again what their start runs
                continue
            trips = _TRIPS.search(i.rest) if i.opcode == "while" else None
            known = is_counted and (i.opcode != "while" or trips is not None)
            for several, one in _CALLEES.findall(i.rest):
                for callee in re.findall(r"[\w.\-]+", several) or [one]:
                    if callee in computations:
                        visit(callee, times * (int(trips[1]) if trips else 1), known)

    visit(entry, 1, True)
    return {name: run for name, run in runs.items() if run[0]}


def _operands(instruction: _Instruction) -> list[str]:
    depth = 1
    for end, character in enumerate(instruction.rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", instruction.rest[:end])
    return []


def _shape_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape. Example: (f32[2,8]{1,0}, bf16[2]{0}) -> 68."""
    total = 0
    for kind, bits, dims in re.findall(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\]", shape):
        width = int(bits or (8 if kind == "pred" else 0))  # tokens have none
        total += -(-width * math.prod(_numbers(dims)) // 8)
    return total


def _axes(kind: str, rest: str, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes a collective runs over; empty if nothing leaves a device."""
    is_permute = kind == "collective-permute"
    groups = _pairs(rest) if is_permute else _groups(kind, rest, mesh.size)
    if groups is not None and (groups.size == 0 or groups.shape[1] == 1):
        return ()
    if groups is None or groups.max() >= mesh.size:
        return (UNKNOWN,)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))  # [axis, group, member]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, varies in zip(mesh.axis_names, differs) if varies)
    covers = np.array_equal(np.sort(groups.ravel()), np.arange(mesh.size))
    is_grid = covers and groups.shape[1] == math.prod(mesh.shape[axis] for axis in axes)
    return axes if is_permute or is_grid else (UNKNOWN,)


def _pairs(rest: str) -> np.ndarray:
    """Source and target of each message of a collective-permute, i64[message, 2]; one that stays at home crosses no axis."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+, ?\d+\}(?:, ?)?)*)\}", rest)
    return np.asarray(_numbers(pairs[1]) if pairs else []).reshape(-1, 2)


def _groups(kind: str, rest: str, num_devices: int) -> np.ndarray | None:
    """Who talks to whom, i64[group, member] of positions in the mesh; None if they differ in size or the notation is new.

    A collective that reduces or gathers and has a channel takes replica ids, unless it says they are global; a program
    of one replica then means all devices. All-to-all takes partition ids.
    """
    attributes = rest[rest.find("replica_groups=") :] if "replica_groups=" in rest else "replica_groups={}"
    is_global = "use_global_device_ids=true" in rest or kind == "all-to-all" or "channel_id=" not in rest
    if not is_global or attributes.startswith("replica_groups={}"):
        return np.arange(num_devices)[None]
    if match := re.match(r"replica_groups=\{(\{[\d, ]*\}(?:, ?\{[\d, ]*\})*)\}", attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", match[1])]
        return np.asarray(groups) if len({len(group) for group in groups}) == 1 else None
    if match := re.match(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[2]).reshape(_numbers(match[1]))
    if match := re.match(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        return _mesh_groups(*match.groups())
    return None


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> np.ndarray:
    """Groups in the notation mesh['a'=4,'b'=2], device_ids=(..) {'a':(2)2,'b'}: the ids of the mesh, grouped `over`
    its axes or parts of them; 'a':(2)2 is the factor 2 of a that follows its leading factor 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", over):
        parts[name].append((int(before), int(size)) if size else (1, sizes[name]))
    factors, grouped = [], []
    for name, whole in sizes.items():
        cuts = sorted({1, whole, *(cut for before, size in parts[name] for cut in (before, before * size))})
        for start, end in zip(cuts, cuts[1:]):
            if any(before <= start and end <= before * size for before, size in parts[name]):
                grouped.append(len(factors))
            factors.append(end // start)
    total = math.prod(sizes.values())
    ids = np.arange(total) if device_ids is None else _iota(device_ids)
    together = math.prod(factors[i] for i in grouped)
    return np.moveaxis(ids.reshape(factors), grouped, range(-len(grouped), 0)).reshape(-1, together)


def _iota(text: str) -> np.ndarray:
    """Ids in the notation [4,2]T(1,0), an iota of that shape transposed, or listed as they are: 0,2,1,3."""
    if not text.startswith("["):
        return np.asarray(_numbers(text))
    shape, order = map(_numbers, text.partition("T")[::2])
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape))).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
