"""Files that appear whole or not at all, and locks that die with their holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO


def open_exclusive(path: Path, *, wait: bool) -> BinaryIO | None:
    """`path` open for reading and writing with nobody else in here; None if somebody is and `wait` is false.

    The lock is flock(2): the kernel drops it when the file is closed or its holder dies, kill -9 included. On a file
    system without locks the file is opened all the same.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=1 << 20)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # ENOLCK, ENOTSUP: some network file systems
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # the former holder renamed or removed it between our open and our lock


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name: readers see the old file or the new one, also after a power cut."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    sync_folder(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    publish(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
