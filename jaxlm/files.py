"""Files that appear whole or not at all, and locks that die with their holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxlm.config import Problem, UserError


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
    flush(temporary)
    os.replace(temporary, final)
    flush(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: a reader, or a crash, sees the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    publish(temporary, path)


def flush(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def mendable(where: str, what: str, remedy: str) -> Iterator[None]:
    """A failure to write `what` becomes an error for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(Problem(where, f"{what} cannot be written: {error.strerror or error}", remedy)) from error
