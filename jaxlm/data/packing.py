"""Rows of whole documents: each is cut only where it is longer than a row, and the pieces fill rows by best fit."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from jaxlm.data.samples import Span, TokenRange, refuse_short, shuffled


class Packed:
    """Rows packed by best fit, longest piece first, in an order without state, or not shuffled: once, as they were packed.
    At the start it reads all lengths.

    A document of n tokens has n - 1 inputs with a label; those are cut into pieces of at most seq_len. A piece goes into
    the fullest row that has room for it.

    Raises: UserError if no document has two tokens.
    Source: Ding et al., Fewer truncations improve language modeling, arXiv:2404.10830, section 3.
    """

    separate = True

    def __init__(self, parts: Sequence[TokenRange], *, seq_len: int, seed: int, shuffle: bool):
        self.parts, self.seq_len, self.seed, self.endless = tuple(parts), seq_len, seed, shuffle
        cut = [_pieces(part, seq_len) for part in parts]
        part = np.concatenate([np.full(len(sizes), k, np.int32) for k, (_, sizes) in enumerate(cut)])
        first, size = (np.concatenate(column) for column in zip(*cut))
        if not len(size):
            refuse_short(self.parts, 1)
        row, self.num_samples = best_fit(size, room=seq_len)
        order = np.argsort(row, kind="stable")
        self._part, self._first, self._size = part[order], first[order], size[order]
        self._bounds = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=self.num_samples))))

    def spans(self, indices: Sequence[int] | np.ndarray) -> list[list[Span]]:
        rows = np.asarray(indices, np.int64)
        if self.endless:
            _, rows = shuffled(rows, size=self.num_samples, seed=self.seed)
        return [self._row(slice(self._bounds[row], self._bounds[row + 1])) for row in rows.tolist()]

    def _row(self, pieces: slice) -> list[Span]:
        columns = (column[pieces].tolist() for column in (self._part, self._first, self._size))
        return [Span(self.parts[k].dataset, first, first + size + 1) for k, first, size in zip(*columns)]


def _pieces(part: TokenRange, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(first token, inputs) of each piece of the documents of a part, int64 and int32."""
    sequences = np.arange(part.sequences.start, part.sequences.stop)
    inputs = np.maximum(part.dataset.lengths[sequences].astype(np.int64) - 1, 0)
    counts = -(-inputs // seq_len)
    document = np.repeat(np.arange(len(sequences)), counts)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    sizes = np.minimum(inputs[document] - within, seq_len).astype(np.int32)
    return part.dataset.first_tokens(sequences)[document] + within, sizes


def best_fit(sizes: np.ndarray, *, room: int) -> tuple[np.ndarray, int]:
    """(row of each piece, number of rows) when pieces, longest first, each go to the fullest row with place for them.

    Pieces of one length are placed together, so time goes with the number of lengths and not of pieces.
    """
    row_of, num_rows = np.empty(len(sizes), np.int64), 0
    free: dict[int, list[np.ndarray]] = {}  # rows by the places they have left
    lefts: list[int] = []  # its keys, rising

    def keep(rows: np.ndarray, left: int) -> None:
        if len(rows) and left:
            if left not in free:
                bisect.insort(lefts, left)
            free.setdefault(left, []).append(rows)

    def place(pieces: np.ndarray, size: int, rows: np.ndarray, left: int) -> np.ndarray:
        """The pieces that remain once `rows` with `left` places took what they can."""
        each = left // size
        used, spare = np.split(rows, [-(-len(pieces) // each)])
        count = min(len(pieces), len(used) * each)
        row_of[pieces[:count]] = np.repeat(used, each)[:count]
        full, rest = divmod(count, each)
        keep(spare, left)
        keep(used[:full], left - each * size)
        keep(used[full:], left - rest * size)
        return pieces[count:]

    order = np.argsort(-sizes, kind="stable")
    for pieces in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        size = int(sizes[pieces[0]])
        while len(pieces) and (at := bisect.bisect_left(lefts, size)) < len(lefts):
            left = lefts[at]
            rows = free[left].pop()
            if not free[left]:
                del free[left], lefts[at]
            pieces = place(pieces, size, rows, left)
        if len(pieces):
            new = np.arange(num_rows, num_rows - (-len(pieces) // (room // size)))
            num_rows += len(new)
            place(pieces, size, new, room)
    return row_of, num_rows
