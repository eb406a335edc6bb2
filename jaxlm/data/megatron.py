"""Megatron's GPTDataset, sample for sample: a run that moves here sees the rows it would have seen there.

One stream of numpy's RandomState(seed), whose numbers never change, shuffles first the documents of all epochs and then
the samples cut from their concatenation. Where sample j begins is not stored but looked up in the running sum of lengths.
Source: Megatron-LM, core/datasets/gpt_dataset.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.data.samples import Span, TokenRange, refuse_short

SEPARATE_BELOW = 0.80  # of an epoch's samples: a last epoch that gives fewer is shuffled by itself


class MegatronSamples:
    """The samples of some sequences of a set ("documents" in Megatron's words): at least `num_samples`, or with None those
    of one epoch. A number beyond what there is starts again from the first.

    Attributes: `num_samples` there are; `document_index`, int32, sequences in the order they are read; `shuffle_index`,
    which cut of that order a sample is.   Raises: UserError if there are not seq_len + 1 tokens.
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
