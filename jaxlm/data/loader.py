"""Step number to batch, as a pure function: any host computes any rows of any step, and a run resumes by its step."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.ramp import Ramp, in_force
from jaxlm.data.samples import Samples, Span
from jaxlm.data.stored import Stored

T = TypeVar("T")
CLOSE_S = 5.0


# Dims: B rows, T positions.
class Batch(NamedTuple):
    """What a model reads and is asked to predict."""

    tokens: Any  # int32[B, T]
    labels: Any  # int32[B, T], the token after each
    weights: Any  # float32[B, T], 1 where the label counts and 0 where not
    starts: Any = None  # int32[B, T], where in its row the document of each token starts; None: a row is one document


def batch_of(step: int, skip: Sequence[tuple[int, int]]) -> int:
    """The batch that a step reads, both from 0, where those in `skip`, sorted [start, stop), are never read."""
    for start, stop in skip:
        step += stop - start if step >= start else 0
    return step


@dataclass(eq=False)
class Loader:
    """The batches of `samples`: batch i takes `ramp.size(i)` of them, from number `ramp.before(i)` on, and a step reads
    batch `batch_of(step, skip)`. The ramp counts samples, so those in `skip` too; `lengths` counts steps.

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
    skip: Sequence[tuple[int, int]] = ()
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
        passed, before = batch_of(step, self.skip), self.ramp.before
        left_out = sum(before(stop) - before(start) for start, stop in self.skip if start < passed)
        return (before(passed) - left_out) * self.samples.seq_len

    def first_sample(self, step: int) -> int:
        """The first sample of a step; the others follow it."""
        return self.ramp.before(batch_of(step, self.skip))

    def places(self, step: int, *, most: int = 4) -> str:
        """Where the rows of a step come from, as people look it up: its samples, and set and first token of some."""
        first, size = self.first_sample(step), self.ramp.size(batch_of(step, self.skip))
        spans = self.samples.spans(range(first, first + min(most, size)))
        named = ", ".join(f"{Path(row[0].dataset.prefix).name} token {row[0].start}" for row in spans)
        return f"samples {first}..{first + size - 1}: {named}" + (", ..." if size > most else "")

    def shape(self, step: int) -> tuple[int, int]:
        """(rows, tokens of a row) of a step's batch."""
        T = in_force(self.lengths, step, self.samples.seq_len)
        return self.ramp.size(batch_of(step, self.skip)) * (self.samples.seq_len // T), T

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        """The batch of a step, or the rows of it that one of several hosts feeds: an even share, in order.

        Raises: UserError naming file and offset of a token id that is not below `vocab_size`.
        """
        assert step >= 0 and (self.num_batches is None or step < self.num_batches)
        number = batch_of(step, self.skip)
        size, first = self.ramp.size(number), self.ramp.before(number)
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

    Depth 0 makes each value when it is asked for. An exception of `make` comes out where its value would have. `close`,
    or leaving the `with` block, waits CLOSE_S for the value in the making, no longer: a file system that never answers
    holds up neither the error on its way out nor the end of the process. Afterwards the iterator is exhausted.
    """

    def __init__(self, make: Callable[[int], T], *, start: int, stop: int, depth: int):
        self._make, self._steps = make, iter(range(start, stop))
        self._asked: SimpleQueue[tuple[int, Future[T]] | None] = SimpleQueue()
        self._ahead: deque[Future[T]] = deque()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()
        self._submit(depth)

    def _submit(self, count: int) -> None:
        for step in itertools.islice(self._steps, count):
            self._ahead.append(Future())
            self._asked.put((step, self._ahead[-1]))

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            step, made = asked
            if made.set_running_or_notify_cancel():
                try:
                    made.set_result(self._make(step))
                except BaseException as error:
                    made.set_exception(error)

    def __iter__(self) -> Iterator[tuple[T, float]]:
        return self

    def __next__(self) -> tuple[T, float]:
        start_s = time.perf_counter()
        try:
            if not self._ahead:  # depth 0, or the end of the steps
                return self._make(next(self._steps)), time.perf_counter() - start_s
            value = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit(1)
        return value, time.perf_counter() - start_s

    def close(self) -> None:
        """End the thread; values that were made and not taken are dropped."""
        self._steps = iter(())
        for made in self._ahead:
            made.cancel()
        self._ahead.clear()
        self._asked.put(None)
        self._thread.join(CLOSE_S)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
