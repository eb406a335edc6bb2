"""Documents to token sets: each chunk is encoded on its own, here or in worker processes, and written in order."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.documents import Chunk, parse, read_chunks
from jaxlm.data.indexed import IndexedWriter
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.settings import progress_bar

SHARD_CHUNKS = 64  # written between two marks from which a killed command goes on
CHUNKS_PER_WORKER = 3  # read ahead of the writer; bounds memory
BAD_LINES_KEPT = 20


class Encoded(NamedTuple):
    """A chunk's documents, for each key: tokens end to end, int32[n], and their counts, int64[documents], none 0."""

    text_bytes: int
    tokens: list[np.ndarray]
    lengths: list[np.ndarray]
    num_empty: int
    bad_lines: list[tuple[str, str]]  # where, what is wrong


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
    parsed = parse(chunk, keys=keys)
    end = [np.array([tokenizer.eod], np.int32)] if append_eod else []
    tokens, lengths, num_empty = [], [], 0
    for texts in parsed.texts:
        documents = [ids for ids in tokenizer.encode_batch(texts) if len(ids)]
        num_empty += len(texts) - len(documents)
        parts = [part for ids in documents for part in (ids, *end)]
        tokens.append(np.concatenate([np.zeros(0, np.int32), *parts]))
        lengths.append(np.array([len(ids) + len(end) for ids in documents], np.int64))
    return Encoded(len(chunk.data), tokens, lengths, num_empty, parsed.bad_lines)


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
