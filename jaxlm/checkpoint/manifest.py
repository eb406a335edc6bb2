"""step.json: what a checkpoint says of itself, written last, so that what is wrong with it can be told.

It names every array with dtype, shape and checksum, every file with its size (and the digest of small ones), and keeps the
caller's metadata; its own digest covers it all. Reading one needs neither JAX nor Orbax.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxlm.files import flush

FILE = "step.json"
DIGEST_BELOW_BYTES = 8 * 2**20  # arrays have checksums; the small files say where they are and need digests


class Damage(Exception):
    """A checkpoint that cannot be trusted: the file or directory, and why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Leaf:
    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True)
class File:
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """saved_at: seconds since 1970.   metadata: the caller's.   files: by path inside the step's directory."""

    step: int
    saved_at: float
    leaves: dict[str, Leaf]
    metadata: dict[str, Any]
    files: dict[str, File]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    @property
    def metrics(self) -> dict[str, float]:
        return self.metadata.get("metrics", {})


def seal(path: Path, *, step: int, leaves: Mapping[str, Leaf], metadata: dict[str, Any]) -> None:
    """Writes the manifest of the step in `path`, whose files are all there, and flushes everything to the disk."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(path))] = _facts(file, digest=file.stat().st_size < DIGEST_BELOW_BYTES)
            flush(file)
    content = asdict(Manifest(step, time.time(), dict(leaves), metadata, files))
    (path / FILE).write_text(json.dumps({"sha256": _digest(content), "content": content}))
    for entry in (path / FILE, path, *(folder for folder in path.rglob("*") if folder.is_dir())):
        flush(entry)


def read(path: Path, *, whole: bool = True) -> Manifest:
    """The manifest of the step in `path`.

    Raises: Damage if it is missing or not what was written or, where the step shall be `whole`, at the first of its files
      that is missing, has another size or, if small, other bytes.
    """
    try:
        tree = json.loads((path / FILE).read_bytes())
        content = tree["content"]
        if tree["sha256"] != _digest(content):
            raise ValueError("is not what was written")
        leaves = {name: Leaf(x["dtype"], tuple(x["shape"]), x["checksum"]) for name, x in content["leaves"].items()}
        files = {name: File(**file) for name, file in content["files"].items()}
        found = Manifest(content["step"], content["saved_at"], leaves, content["metadata"], files)
    except FileNotFoundError as error:
        raise Damage(path / FILE, "missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(path / FILE, f"unreadable: {error}") from error
    if whole:
        _check_files(path, files)
    return found


def _check_files(path: Path, files: Mapping[str, File]) -> None:
    for name, expected in files.items():
        try:
            found = _facts(path / name, digest=expected.sha256 is not None)
        except OSError as error:
            raise Damage(path / name, "missing" if isinstance(error, FileNotFoundError) else str(error)) from error
        if found.size_bytes != expected.size_bytes:
            raise Damage(path / name, f"has {found.size_bytes:,} bytes of {expected.size_bytes:,}")
        if found != expected:
            raise Damage(path / name, "is not what was written")


def described(array: Any) -> str:
    """float32[2,8] of anything with dtype and shape; - of None."""
    return "-" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _facts(path: Path, *, digest: bool) -> File:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return File(size, hashlib.file_digest(file, "sha256").hexdigest() if digest else None)


def _digest(content: Any) -> str:
    """Of the parsed JSON: tuples and lists, and the order of keys, make no difference."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
