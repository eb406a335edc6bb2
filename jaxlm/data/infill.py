"""Fill-in-the-middle: documents rewritten so that a model learns to write what is missing between two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.samples import random_words
from jaxlm.data.tokenizer import Tokenizer

_STREAM = 3  # of the random words of a seed; samples.py has 1 and 2


@dataclass(frozen=True)
class Infill:
    """Rewrites some documents of a row; which, and how, is a function of the seed and the sample's number alone.

    rate: share of documents rewritten.   spm_rate: of those, share with the suffix first.
    sentinels: ids that come before prefix, middle and suffix.
    A document keeps its length: what the sentinels take is cut off the end of the suffix. One that is too short for it, or
    begins or ends within a character, stays as it is.
    Source: Bavarian et al., arXiv:2207.14255, section 3 (character level; PSM, and SPM in its second variant).
    """

    tokenizer: Tokenizer
    seed: int
    rate: float
    spm_rate: float
    sentinels: Sequence[int]

    def __call__(self, row: np.ndarray, index: int) -> np.ndarray:
        """The row of sample `index`, rewritten: as many tokens."""
        ends = np.flatnonzero(row == self.tokenizer.eod) if self.tokenizer.eod is not None else []
        bounds = [0, *(int(end) + 1 for end in ends), len(row)]
        draws = random_words(4 * len(bounds), self.seed, _STREAM, index).reshape(-1, 4) / 2.0**64  # in [0, 1]
        return np.concatenate([self._rewrite(row[a:b], *draw) for a, b, draw in zip(bounds, bounds[1:], draws)])

    def _rewrite(self, tokens: np.ndarray, chosen: float, suffix_first: float, *cuts: float) -> np.ndarray:
        if chosen >= self.rate:
            return tokens
        end = tokens[-1:] if len(tokens) and tokens[-1] == self.tokenizer.eod else tokens[:0]
        text = self.tokenizer.decode(tokens[: len(tokens) - len(end)])
        if not text or "\ufffd" in text:
            return tokens
        a, b = sorted(int(cut * (len(text) + 1)) for cut in cuts)
        prefix, middle, suffix = self.tokenizer.encode_batch([text[:a], text[a:b], text[b:]])
        suffix = suffix[: max(len(tokens) - len(end) - 3 - len(prefix) - len(middle), 0)]
        pre, mid, suf = (np.array([sentinel], np.int32) for sentinel in self.sentinels)
        if suffix_first < self.spm_rate:
            made = (pre, suf, suffix, mid, prefix, middle, end)
        else:
            made = (pre, prefix, suf, suffix, mid, middle, end)
        rewritten = np.concatenate(made)
        return rewritten if len(rewritten) == len(tokens) else tokens
