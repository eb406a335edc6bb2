"""Sample number to stretches of tokens, as a pure function of the seed: nothing to save.

A sample is a list of `Span`s, tokens to read one after the other. `Windows` is the order of new runs, `MegatronSamples`
that of runs that come from Megatron.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset

FEISTEL_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_PERMUTATION, _OFFSETS = 1, 2  # independent random streams of an epoch
SEPARATE_BELOW = 0.80  # of an epoch's samples: a last epoch of Megatron's that gives fewer is shuffled by itself


class Span(NamedTuple):
    """Tokens [start, stop) of a set."""

    dataset: IndexedDataset
    start: int
    stop: int


class Samples(Protocol):
    """Rows of `seq_len` inputs and as many labels, numbered from 0.

    num_samples: in one pass over the data.   endless: sample numbers go on after that.
    separate: each span is inputs and labels of its own, one token shorter than it; else the spans of a sample are one
    stretch of seq_len + 1 tokens, or fewer where samples end.
    """

    seq_len: int
    num_samples: int
    endless: bool
    separate: bool

    def spans(self, indices: Sequence[int] | np.ndarray) -> list[list[Span]]:
        """What each sample reads, in order."""
        ...


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of a set in file order, from the beginning of one sequence to the end of another where
    `sequences` names them.

    weights: (step, weight) from which step on which share of samples comes from here; none: as large as it is.
    """

    dataset: IndexedDataset
    start: int
    stop: int
    sequences: range = range(0)
    weights: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.dataset.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


def whole(dataset: IndexedDataset) -> TokenRange:
    """All tokens of a set."""
    return TokenRange(dataset, 0, dataset.num_tokens, range(len(dataset)))


def split(count: int, *, shares: Sequence[float]) -> list[range]:
    """The numbers below `count` that each share gets, in order; together they are all. Rounded as Megatron's --split is.

    Example: split(1000, shares=(0.95, 0.05)) is [range(0, 950), range(950, 1000)]; shares (19, 1) give the same.
    """
    bounds = [0, *(round(end * count) for end in np.cumsum(normalised(shares)).tolist())]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def normalised(weights: Sequence[float]) -> list[float]:
    """Shares of 1, rounded as Megatron rounds them."""
    given = np.array(weights, np.float64)
    return (given / np.sum(given)).tolist()


class Windows:
    """Windows of all ranges together, in an order without state.

    Sample i is window `permutation_e(i mod n)` of epoch e = i // n, with n = num_samples; any costs the same. A window
    starts at a multiple of seq_len after its range's start offset and never leaves its range; neighbours share one token.
    Each epoch has its own permutation and its own start offset in each range, drawn evenly from all that leave room for
    the range's windows, so that no token is left out for ever. Not shuffled: file order, offset 0, one epoch, and the last
    window of a range as short as what is left: every token but the first of a range is a label once.

    Attributes: `windows`, int64[ranges], their number in each range, the same in every epoch.
    Raises: UserError if no range has a window.
    """

    separate = False

    def __init__(self, ranges: Sequence[TokenRange], *, seq_len: int, seed: int, shuffle: bool):
        assert seq_len > 0
        self.ranges, self.seq_len, self.seed, self.endless = tuple(ranges), seq_len, seed, shuffle
        sizes = np.array([r.num_tokens for r in self.ranges], np.int64)
        if shuffle:  # an offset up to seq_len - 1 costs a range one window, unless it has only one
            windows = np.maximum((sizes - 1) // seq_len, 0)
            self.windows = np.where(windows > 1, sizes // seq_len - 1, windows)
            self._num_offsets = np.where(self.windows > 0, sizes - self.windows * seq_len, 1).astype(np.uint64)
        else:
            self.windows = np.maximum(-(-(sizes - 1) // seq_len), 0)
        self._starts, self._ends = np.array([r.start for r in self.ranges], np.int64), np.cumsum(self.windows)
        self.num_samples = int(self.windows.sum())
        if self.num_samples == 0:
            refuse_short(self.ranges, seq_len if shuffle else 1)

    def spans(self, indices: Sequence[int] | np.ndarray) -> list[list[Span]]:
        windows = np.asarray(indices, np.int64)
        epochs = np.zeros_like(windows)
        if self.endless:
            epochs, windows = shuffled(windows, size=self.num_samples, seed=self.seed)
        which = np.searchsorted(self._ends, windows, side="right")
        first = self._starts[which] + (windows - (self._ends - self.windows)[which]) * self.seq_len
        for epoch in np.unique(epochs).tolist() if self.endless else ():
            here = epochs == epoch
            offsets = random_words(len(self.ranges), self.seed, epoch, _OFFSETS) % self._num_offsets
            first[here] += offsets.astype(np.int64)[which[here]]
        parts, length = (self.ranges[k] for k in which.tolist()), self.seq_len + 1
        return [[Span(part.dataset, a, min(a + length, part.stop))] for part, a in zip(parts, first.tolist())]


class MegatronSamples:
    """Megatron's GPTDataset, sample for sample: a run that moves here sees the rows it would have seen there.

    The samples of some sequences of a set ("documents" in Megatron's words): at least `num_samples`, or with None those
    of one epoch. A number beyond what there is starts again from the first. One stream of numpy's RandomState(seed), whose
    numbers never change, shuffles first the documents of all epochs and then the samples cut from their concatenation.
    Where sample j begins is not stored but looked up in the running sum of lengths.

    Attributes: `num_samples` there are; `document_index`, int32, sequences in the order they are read; `shuffle_index`,
    which cut of that order a sample is.   Raises: UserError if there are not seq_len + 1 tokens.
    Source: Megatron-LM, core/datasets/gpt_dataset.py.
    """

    separate = False
    endless = True

    def __init__(self, part: TokenRange, *, seq_len: int, seed: int, num_samples: int | None):
        self.dataset, self.seq_len, per_epoch = part.dataset, seq_len, part.num_tokens
        if per_epoch < seq_len + 1:
            refuse_short([part], seq_len)
        epochs = 1 if num_samples is None else max(-(-(num_samples * seq_len + 1) // per_epoch), 1)
        self.num_samples = (epochs * per_epoch - 1) // seq_len
        before_last = ((epochs - 1) * per_epoch - 1) // seq_len
        share = int(SEPARATE_BELOW * ((per_epoch - 1) // seq_len))
        alone = epochs > 1 and num_samples is not None and num_samples - before_last < share
        random = np.random.RandomState(seed)
        self.document_index = np.tile(np.arange(part.sequences.start, part.sequences.stop, dtype=np.int32), epochs)
        last_epoch = (epochs - 1) * len(part.sequences) if alone else 0
        self._shuffle(random, self.document_index, last_epoch)
        self._ends = np.cumsum(self.dataset.lengths[self.document_index], dtype=np.int64)
        dtype = np.uint32 if self.num_samples < 2**32 - 2 else np.int64
        self.shuffle_index = np.arange(self.num_samples, dtype=dtype)
        self._shuffle(random, self.shuffle_index, before_last if alone else 0)

    @staticmethod
    def _shuffle(random: np.random.RandomState, values: np.ndarray, cut: int) -> None:
        """Shuffles values[:cut], then values[cut:]; of no numbers, it draws none."""
        for part in (values[:cut], values[cut:]):
            random.shuffle(part)

    def sample_index(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where cut j begins: its place in `document_index`, and the token within that document."""
        position = np.minimum(np.asarray(cuts, np.int64) * self.seq_len, int(self._ends[-1]) - 1)
        place = np.searchsorted(self._ends, position, side="right")
        return place, position - (self._ends[place] - self.dataset.lengths[self.document_index[place]])

    def spans(self, indices: Sequence[int] | np.ndarray) -> list[list[Span]]:
        cuts = self.shuffle_index[np.asarray(indices, np.int64) % self.num_samples]
        return [self._spans(*start) for start in zip(*(column.tolist() for column in self.sample_index(cuts)))]

    def _spans(self, place: int, offset: int) -> list[Span]:
        spans, missing = [], self.seq_len + 1
        while missing:
            document = self.document_index[place : place + 1]
            length = min(int(self.dataset.lengths[document[0]]) - offset, missing)
            start = int(self.dataset.first_tokens(document)[0]) + offset
            if length:
                spans.append(Span(self.dataset, start, start + length))
            place, offset, missing = place + 1, 0, missing - length
        return spans


def refuse_short(ranges: Sequence[TokenRange], seq_len: int) -> NoReturn:
    names = ", ".join(f"{part.dataset.prefix}[{part.start}:{part.stop}]" for part in ranges)
    rule = f"no range has the seq_len + 1 = {seq_len + 1} tokens of one row"
    raise UserError(Problem(names, rule, "use more text, a smaller train.seq_len or another data.split"))


def shuffled(indices: np.ndarray, *, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample number, int64[n]: its epoch, and which of `size` samples it is, each epoch in an order of its own."""
    epochs, chosen = np.divmod(indices, size)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        chosen[here] = permute(chosen[here], size=size, keys=random_words(FEISTEL_ROUNDS, seed, epoch, _PERMUTATION))
    return epochs, chosen


def random_words(count: int, *stream: int) -> np.ndarray:
    """`count` random words that depend on every number of `stream`, uint64[count].

    Source: splitmix64, Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = np.zeros(1, np.uint64)
    for number in stream:
        state = _mix((state ^ np.uint64(number % 2**64)) + np.uint64(_GOLDEN))
    return _mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, *, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of positions in [0, size) under a bijection of [0, size) that the keys choose, int64[n].

    A Feistel network permutes the next power of two: each round xors a keyed hash of one half of the bits into the
    other half, which undoes itself, so any hash gives a bijection. An image outside [0, size) is mapped again until it
    falls inside (cycle walking), which is a bijection too and takes under 2 rounds on average, since over half of the
    power of two is inside. Halves differ by a bit where the number of bits is odd.
    Source: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002, sections 3 and 5.
    """
    num_bits = (size - 1).bit_length()
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64(2 ** (num_bits // 2) - 1)
    high_mask = np.uint64(2 ** (num_bits - num_bits // 2) - 1)

    def network(x: np.ndarray) -> np.ndarray:
        low, high = x & low_mask, x >> low_bits
        for step, key in enumerate(keys):
            if step % 2 == 0:
                high = high ^ (_mix(low ^ key) & high_mask)
            else:
                low = low ^ (_mix(high ^ key) & low_mask)
        return high << low_bits | low

    images = network(np.asarray(positions).astype(np.uint64))
    while (outside := np.flatnonzero(images >= size)).size:
        images[outside] = network(images[outside])
    return images.astype(np.int64)
