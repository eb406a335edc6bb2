"""Step number to batch, as a pure function: any host computes any rows of any step, and a run resumes by its step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.samples import Samples

T = TypeVar("T")


# Dims: B rows, T positions.
class Batch(NamedTuple):
    """What a model reads and is asked to predict."""

    tokens: Any  # int32[B, T]
    labels: Any  # int32[B, T], the token after each
    weights: Any  # float32[B, T], 1 where the label counts and 0 where not


def batch_of(step: int, skip: Sequence[tuple[int, int]]) -> int:
    """The batch that a step reads, both from 0, where those in `skip`, sorted [start, stop), are never read."""
    for start, stop in skip:
        step += stop - start if step >= start else 0
    return step


class Loader:
    """The batches of `samples`: row r of step s is sample batch_of(s, skip) * batch_size + r.

    Unshuffled samples are one epoch in `num_batches` steps, the last filled up with rows of token 0 and weight 0;
    shuffled ones go on for ever and `num_batches` is None.
    With `mask_eod_loss`, a position whose input is `eod` has weight 0: what follows a document's end is a new document.
    Raises: UserError if `mask_eod_loss` is asked for and there is no `eod`.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        eod: int | None,
        mask_eod_loss: bool,
        vocab_size: int,
        skip: Sequence[tuple[int, int]] = (),
    ):
        if mask_eod_loss and eod is None:
            rule = "the tokenizer has no end-of-document token"
            raise UserError(Problem("data.mask_eod_loss=True", rule, "set it to False, or use another tokenizer"))
        assert batch_size > 0 and vocab_size > 0 and (samples.shuffle or not skip)
        self.samples = samples
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.skip = skip
        self._masked_token = eod if mask_eod_loss else None
        self.num_batches = None if samples.shuffle else -(-samples.samples_per_epoch // batch_size)

    def batch(self, step: int, *, rows: range | None = None) -> Batch:
        """The batch of a step, or those of its rows that `rows` names: a host that reads rows 4..7 passes range(4, 8).

        Raises: UserError naming file and offset of a token id that is not below `vocab_size`.
        """
        rows = range(self.batch_size) if rows is None else rows
        assert step >= 0 and (self.num_batches is None or step < self.num_batches)
        assert len(rows) == 0 or (min(rows) >= 0 and max(rows) < self.batch_size)
        first = self.first_sample(step)
        indices = first + np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
        num_real = len(indices)
        real = np.ones(num_real, bool) if self.samples.shuffle else indices < self.samples.samples_per_epoch
        x_BT1 = np.zeros((num_real, self.samples.seq_len + 1), np.int32)
        x_BT1[real] = self.samples.rows(indices[real])
        if x_BT1.size and x_BT1.view(np.uint32).max() >= self.vocab_size:  # as unsigned, negative ids are large
            self._refuse_token(x_BT1, indices)
        weights = np.broadcast_to(real[:, None], (num_real, self.samples.seq_len)).astype(np.float32)
        if self._masked_token is not None:
            weights[x_BT1[:, :-1] == self._masked_token] = 0
        return Batch(np.ascontiguousarray(x_BT1[:, :-1]), np.ascontiguousarray(x_BT1[:, 1:]), weights)

    def first_sample(self, step: int) -> int:
        """The sample that is row 0 of a step; the other rows follow it."""
        return batch_of(step, self.skip) * self.batch_size

    def places(self, step: int, *, most: int = 4) -> str:
        """Where the rows of a step come from, as people look it up: its samples, and set and first token of some."""
        first = self.first_sample(step)
        rows = [self.samples.locate(index) for index in range(first, first + min(most, self.batch_size))]
        named = ", ".join(f"{Path(dataset.prefix).name} token {position}" for dataset, position in rows)
        return f"samples {first}..{first + self.batch_size - 1}: {named}" + (", ..." if self.batch_size > most else "")

    def _refuse_token(self, x_BT1: np.ndarray, indices: np.ndarray) -> NoReturn:
        row, column = np.argwhere(x_BT1.view(np.uint32) >= self.vocab_size)[0].tolist()
        dataset, first = self.samples.locate(int(indices[row]))
        position = first + column
        where = f"{dataset.prefix}.bin, token {position} (byte {position * dataset.dtype.itemsize})"
        rule = f"token id {int(dataset.tokens[position])} is not below the vocabulary size, {self.vocab_size}"
        remedy = "set model.vocab_size and data.tokenizer to those the set was made with, or tokenize it anew"
        raise UserError(Problem(where, rule, remedy))


def prefetch(make: Callable[[int], T], *, start: int, stop: int, depth: int) -> Prefetch[T]:
    """`make(start)` ... `make(stop - 1)` in order, made up to `depth` ahead in a thread; see `Prefetch`.

    Example: with prefetch(loader.batch, start=0, stop=1000, depth=2) as batches:
                 for batch, wait_s in batches: ...
    """
    return Prefetch(make, start=start, stop=stop, depth=depth)


class Prefetch(Generic[T]):
    """An iterator of (value, wait_s): a value and the seconds the caller waited for it.

    The thread starts at once. Depth 0 makes each value when it is asked for, without a thread. An exception of `make`
    comes out where its value would have. `close`, or leaving the `with` block, waits for the value in the making
    and ends the thread; afterwards the iterator is exhausted.
    """

    def __init__(self, make: Callable[[int], T], *, start: int, stop: int, depth: int):
        assert depth >= 0
        self._make = make
        self._steps = iter(range(start, stop))
        self._ready: queue.SimpleQueue[tuple[bool, T | BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def _work(self) -> None:
        try:
            for step in self._steps:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put((True, self._make(step)))
            self._ready.put((False, None))
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._ready.put((False, error))

    def __iter__(self) -> Iterator[tuple[T, float]]:
        return self

    def __next__(self) -> tuple[T, float]:
        start_s = time.perf_counter()
        if self._closed:
            raise StopIteration
        if self._thread is None:
            try:
                return self._make(next(self._steps)), time.perf_counter() - start_s
            except BaseException:  # the end of the steps included
                self.close()
                raise
        there, value = self._ready.get()
        if not there:
            self.close()
            raise value if isinstance(value, BaseException) else StopIteration
        self._room.release()
        return value, time.perf_counter() - start_s  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; values that were made and not taken are dropped."""
        self._closed = True
        self._room.release()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
