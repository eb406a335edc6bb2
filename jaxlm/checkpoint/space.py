"""What a run's saves will need of the disk and of the host's memory, against what is there."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.staging import staged_bytes

MEMINFO = Path("/proc/meminfo")


def shortages(directory: Path, abstract: Any) -> list[str]:
    """A sentence for each thing that saves of a state like `abstract` may run out of; empty if all is well."""
    leaves = jax.tree.leaves(abstract)
    save, staged = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves), staged_bytes(leaves)
    free, memory = shutil.disk_usage(directory).free, available_memory_bytes()
    found = []
    if free < 2 * save:
        found.append(f"{directory} has {bytes_text(free)} free, two checkpoints take {bytes_text(2 * save)}")
    if memory is not None and memory < staged:
        found.append(f"a save copies {bytes_text(staged)} to this host's memory, which has {bytes_text(memory)} left")
    return found


def available_memory_bytes() -> int | None:
    """Memory that this host can still give without swapping; None where the kernel does not say."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def bytes_text(count: float) -> str:
    """Three digits and a unit. Example: 15_800_000_000 -> 15.8 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
