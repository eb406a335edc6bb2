"""A mixture of samples by weight: which source a sample comes from, and its number there."""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Sequence

import numpy as np

from jaxlm.data.samples import Samples, Span, normalised

BLOCK = 1 << 16  # samples picked at a time


class Greedy:
    """Sample i goes to the source that lags its weight most: argmax of weight * max(i, 1) - samples so far, in float64,
    the first of equals.

    exact: the rule runs on without end as Megatron's does, and reaching sample i takes time in proportion to i, once: a
      third of a second for a million. Else it begins anew every BLOCK samples: any sample costs the same, and a
      source's share is off by less than a sample a block.
    Source: Megatron-LM, core/datasets/helpers.cpp, build_blending_indices.
    """

    def __init__(self, weights: Sequence[float], *, exact: bool):
        self.weights = normalised(weights)
        self._exact = exact
        self._counts = [np.zeros(len(weights), np.int64)]  # before each block, as far as they were needed
        self._counting = threading.RLock()
        self.block = functools.lru_cache(maxsize=4)(self._block)

    def pick(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number there."""
        rounds, block, place = self._place(index)
        picks, numbers = self.block(block)
        k = picks[place]
        return k, numbers[place] + (rounds * self._before(1)[k] if rounds else 0)

    def before(self, index: int) -> np.ndarray:
        """Samples of each source before sample `index`, int64[sources]."""
        rounds, block, place = self._place(index)
        begun = np.bincount(self.block(block)[0][:place], minlength=len(self.weights))
        return self._before(block) + begun + (rounds * self._before(1) if rounds else 0)

    def _place(self, index: int) -> tuple[int, int, int]:
        """(how often the rule began anew, block since then, place in the block) of a sample."""
        block, place = divmod(index, BLOCK)
        return (0, block, place) if self._exact else (block, 0, place)

    def _before(self, block: int) -> np.ndarray:
        """Samples of each source before a block, int64[sources]."""
        with self._counting:
            while len(self._counts) <= block:
                picks, _ = self.block(len(self._counts) - 1)
                self._counts.append(self._counts[-1] + np.bincount(picks, minlength=len(self.weights)))
        return self._counts[block]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample in a block since the rule began: its source and its number there, int64[BLOCK] each."""
        counts, first = self._before(block).tolist(), block * BLOCK
        weights = [(k, weight) for k, weight in enumerate(self.weights) if weight > 0 or self._exact]
        picks, numbers = np.empty((2, BLOCK), np.int64)
        for i in range(BLOCK):
            at, best, most = float(max(first + i, 1)), 0, float("-inf")
            for k, weight in weights:
                lag = weight * at - counts[k]
                if lag > most:
                    best, most = k, lag
            picks[i], numbers[i] = best, counts[best]
            counts[best] += 1
        return picks, numbers


class Blend:
    """The samples of several sources, mixed by weights that may change from some sample on; each source goes on.

    phases: (first sample, weight of each source), in order, the first from sample 0.
    """

    endless = True

    def __init__(self, sources: Sequence[Samples], phases: Sequence[tuple[int, Sequence[float]]], *, exact: bool):
        self.sources = tuple(sources)
        self.seq_len, self.separate = sources[0].seq_len, sources[0].separate
        self.num_samples = sum(source.num_samples for source in sources)
        self._firsts = [first for first, _ in phases]
        self._rules = [Greedy(weights, exact=exact) for _, weights in phases]
        self._before = [np.zeros(len(sources), np.int64)]  # samples of each source before each phase
        for rule, start, stop in zip(self._rules, self._firsts, self._firsts[1:]):
            self._before.append(self._before[-1] + rule.before(stop - start))

    def pick(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample and its number there, int64[n] each."""
        which, numbers = np.empty((2, len(indices)), np.int64)
        for row, index in enumerate(np.asarray(indices).tolist()):
            phase = bisect.bisect_right(self._firsts, index) - 1
            which[row], number = self._rules[phase].pick(index - self._firsts[phase])
            numbers[row] = self._before[phase][which[row]] + number
        return which, numbers

    def spans(self, indices: Sequence[int] | np.ndarray) -> list[list[Span]]:
        which, numbers = self.pick(indices)
        found: list[list[Span]] = [[]] * len(which)
        for k in np.unique(which).tolist():
            places = np.flatnonzero(which == k)
            for place, spans in zip(places.tolist(), self.sources[k].spans(numbers[places])):
                found[place] = spans
        return found
