"""Step number to batch, as a pure function: any host computes any rows of any step, and a run resumes by its step."""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.samples import Samples, Span
from jaxlm.data.stored import Stored

T = TypeVar("T")
CLOSE_S = 5.0


def batch_of(step: int, skip: Sequence[tuple[int, int]]) -> int:
    """The batch that a step reads, both from 0, where those in `skip`, sorted [start, stop), are never read."""
    for start, stop in skip:
        step += stop - start if step >= start else 0
    return step


@dataclass(frozen=True)
class Ramp:
    """Batches that grow from `start` by `increment` to `final` while `samples` samples pass, an equal share at each
    size: Megatron's --rampup-batch-size START INCREMENT SAMPLES. Start 0: always `final`. A step reads the batch
    `batch_of(step, skip)`; samples of batches in `skip` pass too.

    Source: Megatron-LM, core/num_microbatches_calculator.py.
    """

    final: int
    start: int = 0
    increment: int = 0
    samples: int = 0
    skip: Sequence[tuple[int, int]] = ()

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """(first batch, samples before it, batch size) of each size, in order."""
        rows, batch, before = [], 0, 0
        if self.start:
            num = (self.final - self.start) // self.increment
            for k in range(num):
                size = self.start + k * self.increment
                rows.append((batch, before, size))
                # this size holds while before < (k + 1) * samples / num
                batches = max(-(-((k + 1) * self.samples - before * num) // (size * num)), 0)
                batch, before = batch + batches, before + batches * size
        return (*rows, (batch, before, self.final))

    def size(self, step: int) -> int:
        """Samples in a step."""
        return self._stage(batch_of(step, self.skip))[2]

    def before(self, step: int) -> int:
        """The first sample of a step, whose others follow it."""
        return self._before(batch_of(step, self.skip))

    def read_before(self, step: int) -> int:
        """Samples that are read in all steps before it."""
        batch = batch_of(step, self.skip)
        left_out = sum(self._before(stop) - self._before(start) for start, stop in self.skip if start < batch)
        return self._before(batch) - left_out

    def _before(self, batch: int) -> int:
        first, before, size = self._stage(batch)
        return before + (batch - first) * size

    def _stage(self, batch: int) -> tuple[int, int, int]:
        return self.stages[bisect.bisect_right(self.stages, batch, key=lambda stage: stage[0]) - 1]


def in_force(table: Sequence[tuple[int, T]], step: int, before: T) -> T:
    """The value of the last row (first step, value) of a rising table that a step has reached; `before` them all."""
    return next((value for first, value in reversed(table) if step >= first), before)


# Dims: B rows, T positions.
class Batch(NamedTuple):
    """What a model reads and is asked to predict."""

    tokens: Any  # int32[B, T]
    labels: Any  # int32[B, T], the token after each
    weights: Any  # float32[B, T], 1 where the label counts and 0 where not
    starts: Any = None  # int32[B, T], where in its row the document of each token starts; None: a row is one document


@dataclass(eq=False)
class Loader:
    """The batches of `samples`: a step takes `ramp.size(step)` of them, from number `ramp.before(step)` on.

    A sample is a row, or several shorter ones: `lengths` has (first step, tokens of a row). Samples that are not endless
    fill `num_batches` steps, the last filled up with rows of token 0 and weight 0; for others `num_batches` is None.
    With `mask_eod_loss`, a position whose input is `eod` has weight 0. With `separates`, batches have `starts`: a document
    starts after each `eod`, and with each span of separate ones. `rewrite` gets a sample's tokens and number.
    Raises: UserError if the end of documents is asked for and there is no `eod`.
    """

    samples: Samples
    ramp: Ramp
    _: KW_ONLY
    eod: int | None
    vocab_size: int
    mask_eod_loss: bool = False
    separates: bool = False
    lengths: Sequence[tuple[int, int]] = ()
    rewrite: Callable[[np.ndarray, int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if (self.mask_eod_loss or self.separates) and self.eod is None:
            where = "data.mask_eod_loss" if self.mask_eod_loss else "data.reset_at_eod, data.packing"
            remedy = "leave it out, or use another tokenizer"
            raise UserError(Problem(where, "the tokenizer has no end-of-document token", remedy))
        assert self.separates or not self.samples.separate
        self.num_batches = None if self.samples.endless else -(-self.samples.num_samples // self.ramp.final)

    def tokens_before(self, step: int) -> int:
        """Tokens in all steps before it."""
        return self.ramp.read_before(step) * self.samples.seq_len

    def places(self, step: int) -> str:
        """Where the rows of a step come from, as people look it up: its samples, and set and first token of four."""
        first, size = self.ramp.before(step), self.ramp.size(step)
        spans = self.samples.spans(range(first, first + min(size, 4)))
        named = ", ".join(f"{Path(row[0].dataset.prefix).name} token {row[0].start}" for row in spans)
        return f"samples {first}..{first + size - 1}: {named}" + (", ..." if size > 4 else "")

    def shape(self, step: int) -> tuple[int, int]:
        """(rows, tokens of a row) of a step's batch."""
        T = in_force(self.lengths, step, self.samples.seq_len)
        return self.ramp.size(step) * (self.samples.seq_len // T), T

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        """The batch of a step, or the rows of it that one of several hosts feeds: an even share, in order.

        Raises: UserError naming file and offset of a token id that is not below `vocab_size`.
        """
        assert step >= 0 and (self.num_batches is None or step < self.num_batches)
        size, first = self.ramp.size(step), self.ramp.before(step)
        assert size % hosts == 0, "rows split evenly over hosts"
        indices = np.arange(first + size * host // hosts, first + size * (host + 1) // hosts)
        spans = self.samples.spans(indices if self.samples.endless else indices[indices < self.samples.num_samples])
        for dataset, start, stop in itertools.chain(*spans):
            if isinstance(dataset.tokens, Stored):
                dataset.tokens.expect(start, stop)
        rows = self._rows(spans, indices)
        for x in rows[:2]:
            if x.size and x.view(np.uint32).max() >= self.vocab_size:  # as unsigned, negative ids are large
                self._refuse_token(spans)
        rows = Batch(*(x.reshape(-1, self.shape(step)[1]) for x in rows))
        if self.mask_eod_loss:
            rows.weights[rows.tokens == self.eod] = 0
        return rows._replace(starts=self._starts(rows) if self.separates else None)

    def _rows(self, spans: list[list[Span]], indices: np.ndarray) -> Batch:
        """A row a sample: each stretch of tokens inputs and labels of its own; what is left is one more, of weight 0."""
        shape = (len(indices), self.samples.seq_len)
        tokens, labels, starts = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for row, (parts, index) in enumerate(zip(spans, indices.tolist())):
            at = 0
            for stretch in ([part] for part in parts) if self.samples.separate else (parts,):
                values = _read(*stretch[0]) if len(stretch) == 1 else np.concatenate([_read(*part) for part in stretch])
                if self.rewrite is not None:
                    values = self.rewrite(values, index)
                here = slice(at, at + len(values) - 1)
                tokens[row, here], labels[row, here] = values[:-1], values[1:]
                weights[row, here], starts[row, here] = 1, at
                at = here.stop
            starts[row, at:] = at
        return Batch(tokens, labels, weights, starts)

    def _starts(self, rows: Batch) -> np.ndarray:
        """Where each position's document starts: after the last `eod` before it, or where its span does."""
        B, T = rows.tokens.shape
        starts_BT = rows.starts
        if self.samples.seq_len > T:  # they are counted in a sample; where a row begins within one, so does a document
            starts_BT = np.maximum(starts_BT - (np.arange(B, dtype=np.int32) * T % self.samples.seq_len)[:, None], 0)
        after = np.where(rows.tokens[:, :-1] == self.eod, np.arange(1, T, dtype=np.int32), 0)
        starts_BT[:, 1:] = np.maximum(starts_BT[:, 1:], np.maximum.accumulate(after, axis=1))
        return starts_BT

    def _refuse_token(self, spans: list[list[Span]]) -> NoReturn:
        for dataset, start, stop in (span for row in spans for span in row):
            tokens = dataset.tokens[start:stop]
            wrong = (tokens < 0) | (tokens >= self.vocab_size)
            if wrong.any():
                at = int(np.argmax(wrong))
                position = start + at
                where = f"{dataset.prefix}.bin, token {position} (byte {position * dataset.dtype.itemsize})"
                rule = f"token id {int(tokens[at])} is not below the vocabulary size, {self.vocab_size}"
                remedy = "set model.vocab_size and data.tokenizer to those the set was made with, or tokenize it anew"
                raise UserError(Problem(where, rule, remedy))
        raise AssertionError("only what a set holds can be out of range")


def _read(dataset: IndexedDataset, start: int, stop: int) -> np.ndarray:
    """Tokens of a set; ids beyond int32 come out as -1 or 2^31 - 1, which no vocabulary has."""
    tokens = dataset.tokens[start:stop]
    return tokens if tokens.itemsize < 8 else np.clip(tokens, -1, 2**31 - 1)


class Prefetch(Generic[T]):
    """`make(start)` ... `make(stop - 1)` in order, made up to `depth` ahead in a thread; each with the seconds its caller
    waited for it.

    An exception of `make` comes out where its value would have. `close`, or leaving the `with` block, waits CLOSE_S for the
    value in the making, no longer: a file system that never answers holds up neither the error on its way out nor the end
    of the process. Afterwards the iterator is exhausted.
    """

    def __init__(self, make: Callable[[int], T], *, start: int, stop: int, depth: int):
        steps = range(start, stop)
        self._left, self._room = len(steps), threading.Semaphore(depth)
        self._made: SimpleQueue[Future[T]] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(make, steps), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], T], steps: range) -> None:
        for step in steps:
            self._room.acquire()
            if not self._left:  # closed
                return
            made: Future[T] = Future()
            try:
                made.set_result(make(step))
            except BaseException as error:
                made.set_exception(error)
            self._made.put(made)

    def __iter__(self) -> Iterator[tuple[T, float]]:
        return self

    def __next__(self) -> tuple[T, float]:
        start_s = time.perf_counter()
        try:
            if not self._left:
                raise StopIteration
            value = self._made.get().result()
        except BaseException:
            self.close()
            raise
        self._left -= 1
        self._room.release()
        return value, time.perf_counter() - start_s

    def close(self) -> None:
        """End the thread; values that were made and not taken are dropped."""
        self._left = 0
        self._room.release()
        self._thread.join(CLOSE_S)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
