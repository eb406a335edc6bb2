"""Source files to documents: a JSONL file has one a line, any other file is one; .gz and .zst are opened on the way.

Reading and parsing are apart, so that one process reads chunks and any number of them parse.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from jaxlm.config import Problem, UserError
from jaxlm.data.tokenizer import LONE_SURROGATE

CHUNK_BYTES = 1 << 20  # of text read before it is handed on; a longer line or plain file is handed on whole
_READ_BYTES = 1 << 16
_LINE_SUFFIXES = {".jsonl", ".ndjson", ".json"}
# Each gives an object with decompress, eof and unused_data. 31: gzip's header; 2^31: the window of zstd --long=31.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}


class Chunk(NamedTuple):
    """Whole lines of a JSONL file, the first numbered `first_line` from 1; or a whole plain file, first_line 0."""

    path: str
    first_line: int
    data: bytes


class Parsed(NamedTuple):
    """The documents of a chunk: `texts[k][d]` is the text of key k in document d; and each line that has none."""

    texts: list[list[str]]
    bad_lines: list[tuple[str, str]]  # where, what is wrong


def expand(patterns: tuple[str, ...], *, setting: str) -> list[str]:
    """Files that the patterns of `setting` match: in the order of the patterns, sorted within each, each file once.

    Raises: UserError for each pattern that matches nothing or a folder.
    """
    files: dict[str, None] = {}
    problems = []
    for pattern in map(os.path.expanduser, patterns):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in matches if not os.path.isdir(path)]  # a pipe is as good as a file
        files.update(dict.fromkeys(found))
        if not found:
            rule = "is a folder" if matches else f"matches no file from {os.getcwd()}"
            problems.append(Problem(f"{setting}: {pattern}", rule, "name files, or a pattern such as FOLDER/*.txt"))
    if problems:
        raise UserError(*problems)
    return list(files)


def read_chunks(path: str, *, on_read: Callable[[int], object] = lambda _: None) -> Iterator[Chunk]:
    """The chunks of a file, in order; `on_read` is told how many bytes are read as they lie on disk.

    Raises: UserError if the file cannot be read, or is compressed and damaged.
    """
    name = Path(path)
    suffix = name.with_suffix("").suffix if name.suffix in _DECOMPRESSORS else name.suffix
    try:
        blocks = _blocks(path, on_read)
        if suffix in _LINE_SUFFIXES:
            yield from _line_chunks(path, blocks)
        else:
            yield Chunk(path, 0, b"".join(blocks))
    except OSError as error:
        raise UserError(Problem(path, f"cannot be read: {error.strerror}", "check its permissions")) from error
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise UserError(Problem(path, f"is damaged: {error}", "copy it anew from where it came")) from error


def _blocks(path: str, on_read: Callable[[int], object]) -> Iterator[bytes]:
    """The content of a file, decompressed; concatenated members or frames are one content."""
    make = _DECOMPRESSORS.get(Path(path).suffix)
    decompressor = None
    with open(path, "rb") as file:
        while raw := file.read(_READ_BYTES):
            on_read(len(raw))
            if make is None:
                yield raw
                continue
            while raw:
                decompressor = decompressor or make()
                yield decompressor.decompress(raw)
                if not decompressor.eof:
                    break
                raw, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise EOFError("the compressed stream is cut short")


def _line_chunks(path: str, blocks: Iterator[bytes]) -> Iterator[Chunk]:
    """Blocks gathered into chunks that end with a line."""
    first_line, parts, num_bytes = 1, [], 0
    for block in blocks:
        parts.append(block)
        num_bytes += len(block)
        end = block.rfind(b"\n") + 1
        if num_bytes >= CHUNK_BYTES and end:
            data = b"".join([*parts[:-1], block[:end]])
            yield Chunk(path, first_line, data)
            first_line += data.count(b"\n")
            parts = [block[end:]]
            num_bytes = len(parts[0])
    if num_bytes:
        yield Chunk(path, first_line, b"".join(parts))


def parse(chunk: Chunk, *, keys: tuple[str, ...]) -> Parsed:
    """The documents of a chunk. A plain file gives its text to every key; a blank line is no document.

    Raises: UserError for a plain file that is not UTF-8.
    """
    if chunk.first_line == 0:
        try:
            text = chunk.data.decode()
        except UnicodeDecodeError as error:
            remedy = "convert it to UTF-8 (iconv -f LATIN1 -t UTF-8), or leave it out"
            raise UserError(Problem(f"{chunk.path}, byte {error.start}", "is not UTF-8 text", remedy)) from error
        return Parsed([[text] for _ in keys], [])
    parsed = Parsed([[] for _ in keys], [])
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first_line):
        if not line.strip():
            continue
        try:
            for texts, text in zip(parsed.texts, _fields(line, keys), strict=True):
                texts.append(text)
        except ValueError as error:
            parsed.bad_lines.append((f"{chunk.path}, line {number}", str(error)))
    return parsed


def _fields(line: bytes, keys: tuple[str, ...]) -> list[str]:
    """The text of each key in a line of JSON. Raises: ValueError saying why there is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # not json.loads(line), which lets surrogates through
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, not an object")
    for key in keys:
        if key not in record:
            raise ValueError(f"has no key {key!r}; its keys: {', '.join(map(repr, list(record)[:8])) or 'none'}")
        if not isinstance(text := record[key], str):
            raise ValueError(f"holds a {type(text).__name__} under {key!r}, not a string")
        if b"\\u" in line and (lone := LONE_SURROGATE.search(text)):
            raise ValueError(f"holds under {key!r} {lone[0]!r}, half of a surrogate pair, which is not a character")
    return [record[key] for key in keys]
