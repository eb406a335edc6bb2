"""Sample number to window of tokens, as a pure function of the seed: nothing to save, nothing to build.

An epoch is a permutation of the windows of all ranges. It is not stored: a Feistel network maps the position in the
epoch to a window, so any sample costs the same, whatever the size of the data, and resuming needs only a number.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.indexed import IndexedDataset

FEISTEL_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_PERMUTATION, _OFFSETS = 1, 2  # independent random streams of an epoch


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of a set, in file order."""

    dataset: IndexedDataset
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.dataset.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


def split_ranges(num_tokens: int, *, shares: Sequence[float]) -> list[tuple[int, int]]:
    """[start, stop) of each share of `num_tokens` in file order; together they are all of it.

    Example: split_ranges(1000, shares=(0.95, 0.05)) is [(0, 950), (950, 1000)]; shares (19, 1) give the same.
    Raises: UserError unless every share is at least 0 and one is positive.
    """
    if not shares or not all(0 <= share < float("inf") for share in shares) or sum(shares) <= 0:
        remedy = "write shares such as (0.95, 0.05)"
        raise UserError(Problem(f"data.split={tuple(shares)}", "shares must be at least 0 and not all 0", remedy))
    bounds = [0, *(round(num_tokens * (sum(shares[: k + 1]) / sum(shares))) for k in range(len(shares)))]
    return list(itertools.pairwise(bounds))


class Samples:
    """Rows of seq_len + 1 tokens, numbered from 0.

    Sample i is window `permutation_e(i mod n)` of epoch e = i // n, with n = samples_per_epoch. A window starts at a
    multiple of seq_len after its range's start offset and never leaves its range; neighbours share one token, the
    last label of one being the first input of the next. Each epoch has its own permutation and its own start offset
    in each range, drawn evenly from all that leave room for the range's windows, so that no token is left out for ever.
    Not shuffled: file order, offset 0, one epoch.

    Attributes: `samples_per_epoch`; `windows`, int64[ranges], their number in each range: the same in every epoch,
    and 0 for a range shorter than seq_len + 1.
    Raises: UserError if no range has a window.
    """

    def __init__(self, ranges: Sequence[TokenRange], *, seq_len: int, seed: int, shuffle: bool):
        assert seq_len > 0
        self.ranges = tuple(ranges)
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        sizes = np.array([r.num_tokens for r in self.ranges], np.int64)
        # An offset up to seq_len - 1 costs a shuffled range one window, unless it has only one.
        windows = np.maximum((sizes - 1) // seq_len, 0)
        self.windows = np.where(windows > 1, sizes // seq_len - 1, windows) if shuffle else windows
        self._num_offsets = np.where(self.windows > 0, sizes - self.windows * seq_len, 1)
        self._ends = np.cumsum(self.windows)
        self.samples_per_epoch = int(self.windows.sum())
        if self.samples_per_epoch == 0:
            names = ", ".join(f"{r.dataset.prefix}[{r.start}:{r.stop}]" for r in self.ranges) or "no token set"
            rule = f"no range has the seq_len + 1 = {seq_len + 1} tokens of one row"
            raise UserError(Problem(names, rule, "use more text, a smaller train.seq_len or another data.split"))

    def starts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which range each sample lies in, int64[n], and its first token's position in that range's set, int64[n]."""
        indices = np.asarray(indices, np.int64)
        epochs, positions = np.divmod(indices, self.samples_per_epoch)
        assert len(indices) == 0 or (indices.min() >= 0 and (self.shuffle or int(epochs.max()) == 0))
        which = np.empty(len(indices), np.int64)
        first = np.empty(len(indices), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            which[here], first[here] = self._starts_in_epoch(epoch, positions[here])
        return which, first

    def _starts_in_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows, offsets = positions, np.zeros(len(self.ranges), np.int64)
        if self.shuffle:
            keys = random_words(FEISTEL_ROUNDS, self.seed, epoch, _PERMUTATION)
            windows = permute(positions, size=self.samples_per_epoch, keys=keys)
            words = random_words(len(self.ranges), self.seed, epoch, _OFFSETS)
            offsets = (words % self._num_offsets.astype(np.uint64)).astype(np.int64)
        which = np.searchsorted(self._ends, windows, side="right")
        within = windows - (self._ends - self.windows)[which]
        return which, self._range_starts[which] + offsets[which] + within * self.seq_len

    @functools.cached_property
    def _range_starts(self) -> np.ndarray:
        return np.array([r.start for r in self.ranges], np.int64)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each sample, int32[n, seq_len + 1]; ids beyond int32 come out as -1 or 2^31 - 1."""
        which, first = self.starts(indices)
        rows = np.empty((len(first), self.seq_len + 1), np.int32)
        for row, k, start in zip(rows, which.tolist(), first.tolist(), strict=True):
            tokens = self.ranges[k].dataset.tokens[start : start + self.seq_len + 1]
            row[:] = tokens if tokens.itemsize < 8 else np.clip(tokens, -1, 2**31 - 1)
        return rows

    def locate(self, index: int) -> tuple[IndexedDataset, int]:
        """The set that a sample comes from and the position of its first token in it."""
        which, first = self.starts(np.array([index]))
        return self.ranges[int(which[0])].dataset, int(first[0])


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
