"""Source files to documents to token sets. A JSONL file has a document a line, any other file is one; .gz and .zst are
opened on the way.

One process reads files in chunks; each chunk is parsed and encoded on its own, here or in worker processes, and what comes
of it is written in order.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedWriter
from jaxlm.data.tokenizer import LONE_SURROGATE, Tokenizer, load_tokenizer
from jaxlm.settings import progress_bar

CHUNK_BYTES = 1 << 20  # of text read before it is handed on; a longer line or plain file is handed on whole
SHARD_CHUNKS = 64  # written between two marks from which a killed command goes on
CHUNKS_PER_WORKER = 3  # read ahead of the writer; bounds memory
BAD_LINES_KEPT = 20
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


def parse(chunk: Chunk, *, keys: tuple[str, ...]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """The documents of a chunk: [k][d] is the text of key k in document d; and of each line that has none, (where, why).

    A plain file gives its text to every key; a blank line is no document.
    Raises: UserError for a plain file that is not UTF-8.
    """
    if chunk.first_line == 0:
        try:
            text = chunk.data.decode()
        except UnicodeDecodeError as error:
            remedy = "convert it to UTF-8 (iconv -f LATIN1 -t UTF-8), or leave it out"
            raise UserError(Problem(f"{chunk.path}, byte {error.start}", "is not UTF-8 text", remedy)) from error
        return [[text] for _ in keys], []
    documents: list[list[str]] = [[] for _ in keys]
    bad_lines: list[tuple[str, str]] = []
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first_line):
        if not line.strip():
            continue
        try:
            for texts, text in zip(documents, _fields(line, keys), strict=True):
                texts.append(text)
        except ValueError as error:
            bad_lines.append((f"{chunk.path}, line {number}", str(error)))
    return documents, bad_lines


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


class Encoded(NamedTuple):
    """A chunk's documents, for each key: tokens end to end, int32[n], and their counts, int64[documents], none 0."""

    text_bytes: int
    tokens: list[np.ndarray]
    lengths: list[np.ndarray]
    num_empty: int
    bad_lines: list[tuple[str, str]]  # where, why


@dataclass
class Totals:
    """What went into the sets; documents, tokens and empty ones are counted over all keys."""

    chunks: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # of uncompressed input
    empty: int = 0  # documents without a token, dropped
    bad: int = 0
    bad_lines: list[str] = field(default_factory=list)  # the first of them


def write_documents(
    files: Sequence[str],
    *,
    writers: dict[str, IndexedWriter],
    tokenizer: Tokenizer,
    append_eod: bool,
    totals: Totals,
    max_bad_lines: int = 0,
    workers: int = 1,
    on_shard: Callable[[], object] = lambda: None,
) -> str:
    """Encode the documents of files, append each to the writer of its key, and count in `totals`, whose chunks, read by a
    run that ended, are passed over; the result does not depend on `workers`. `on_shard` is called where a killed command
    may go on, the end included. Stderr shows how far it is.

    Returns: how much text it was, in what time.
    Raises: UserError past `max_bad_lines` lines without text, or if there is no text.
    """
    bytes_before = totals.text_bytes
    encode = functools.partial(encode_chunk, keys=tuple(writers), append_eod=append_eod)

    def speed() -> str:
        took_s = max(time.perf_counter() - start_s, 1e-9)
        megabytes = (totals.text_bytes - bytes_before) / 1e6
        return f"{megabytes:.1f} MB of text in {took_s:.1f} s, {megabytes / took_s:.2f} MB/s"

    with progress_bar(sum(map(os.path.getsize, files)), "read", "B", unit_scale=True) as bar:
        chunks = (chunk for path in files for chunk in read_chunks(path, on_read=bar.update))
        for _ in itertools.islice(chunks, totals.chunks):
            pass
        bar.initial, bar.start_t, start_s = bar.n, time.time(), time.perf_counter()
        for encoded in _encode_all(chunks, encode, tokenizer, workers):
            _append(encoded, writers, totals, max_bad_lines)
            bar.set_postfix_str(f"{speed()}, {totals.documents:,} documents, {totals.tokens:,} tokens", refresh=False)
            if totals.chunks % SHARD_CHUNKS == 0:
                on_shard()
    if not totals.tokens:
        raise UserError(Problem(" ".join(files[:3]), "holds no text", "name files with text in them"))
    on_shard()
    return speed()


def _append(encoded: Encoded, writers: dict[str, IndexedWriter], totals: Totals, max_bad_lines: int) -> None:
    for where, reason in encoded.bad_lines:
        totals.bad += 1
        if totals.bad > max_bad_lines:
            rule = f"{reason} (bad line {totals.bad}, {max_bad_lines} allowed)"
            remedy = "mend the line, or skip such lines: python -m jaxlm.data.preprocess --max-bad-lines N"
            raise UserError(Problem(where, rule, remedy))
        if totals.bad <= BAD_LINES_KEPT:
            totals.bad_lines.append(f"{where}: {reason}")
    for writer, tokens, lengths in zip(writers.values(), encoded.tokens, encoded.lengths, strict=True):
        writer.add_documents(tokens, lengths=lengths)
        totals.documents += len(lengths)
        totals.tokens += len(tokens)
    totals.empty += encoded.num_empty
    totals.text_bytes += encoded.text_bytes
    totals.chunks += 1


def encode_chunk(chunk: Chunk, *, tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool) -> Encoded:
    """Parse and tokenize one chunk. Raises: UserError for a plain file that is not UTF-8."""
    texts_of_keys, bad_lines = parse(chunk, keys=keys)
    end = [np.array([tokenizer.eod], np.int32)] if append_eod else []
    tokens, lengths, num_empty = [], [], 0
    for texts in texts_of_keys:
        documents = [ids for ids in tokenizer.encode_batch(texts) if len(ids)]
        num_empty += len(texts) - len(documents)
        parts = [part for ids in documents for part in (ids, *end)]
        tokens.append(np.concatenate([np.zeros(0, np.int32), *parts]))
        lengths.append(np.array([len(ids) + len(end) for ids in documents], np.int64))
    return Encoded(len(chunk.data), tokens, lengths, num_empty, bad_lines)


def _encode_all(
    chunks: Iterable[Chunk], encode: Callable[..., Encoded], tokenizer: Tokenizer, workers: int
) -> Iterator[Encoded]:
    """Encoded chunks in the order of the chunks. One worker is this process."""
    if workers == 1:
        yield from (encode(chunk, tokenizer=tokenizer) for chunk in chunks)
        return
    # spawn: a forked child would inherit locks of this process's threads in whatever state they are
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, encode, chunk, tokenizer.spec))
            if len(pending) >= workers * CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        rule = "a worker process died; the kernel kills where memory runs out"
        remedy = "use fewer --workers, or split very long documents"
        raise UserError(Problem(f"{workers} workers", rule, remedy)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End with the parent, even if it is killed; leave Ctrl-C to it; use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_load_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode_in_worker(encode: Callable[..., Encoded], chunk: Chunk, spec: str) -> Encoded:
    return encode(chunk, tokenizer=_load_once(spec))
