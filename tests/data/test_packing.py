from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.loader import Loader, Ramp
from jaxlm.data.packing import Packed, best_fit
from jaxlm.data.samples import whole

EOD = 99


def one_by_one(sizes: list[int], room: int) -> list[int]:
    """Places left in each row when pieces, longest first, each go to the fullest row with place for them."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [k for k in range(len(left)) if left[k] >= size]
        if fits:
            left[min(fits, key=lambda k: left[k])] -= size
        else:
            left.append(room - size)
    return sorted(left)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), room=st.integers(1, 30))
def test_pieces_go_where_best_fit_puts_them(data: st.DataObject, room: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, room), min_size=1, max_size=60))
    rows, num_rows = best_fit(np.array(sizes, np.int32), room=room)
    used = np.bincount(rows, weights=sizes, minlength=num_rows).astype(int)
    assert len(used) == num_rows and used.min() > 0
    assert sorted((room - used).tolist()) == one_by_one(sizes, room)


def test_time_does_not_go_with_the_width_of_a_row() -> None:
    sizes = np.minimum(np.random.default_rng(0).lognormal(6, 1.5, 50_000).astype(np.int32) + 1, 1 << 17)
    begin = time.process_time()
    rows, num_rows = best_fit(sizes, room=1 << 17)
    assert time.process_time() - begin < 2  # 0.1 s; a look at every width for every length takes minutes
    used = np.bincount(rows, weights=sizes, minlength=num_rows)
    assert used.max() <= 1 << 17 and used.sum() / (num_rows << 17) > 0.99


@pytest.fixture
def documents() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        [*(100 * k + rng.permutation(100)[:n]).tolist(), EOD] for k, n in enumerate((3, 25, 0, 7, 1, 12, 40, 5, 9), 1)
    ]


def test_every_pair_of_neighbours_in_a_document_is_an_input_and_its_label_once(
    write_set: Callable, documents: list[list[int]]
) -> None:
    samples = Packed([whole(write_set(documents))], seq_len=16, seed=3, shuffle=True)
    loader = Loader(samples, Ramp(samples.num_samples), eod=EOD, vocab_size=5000, separates=True)
    for epoch in (0, 1):
        batch = loader.batch(epoch)
        real = batch.weights > 0
        pairs = sorted(zip(batch.tokens[real].tolist(), batch.labels[real].tolist(), strict=True))
        assert pairs == sorted(pair for document in documents for pair in zip(document, document[1:], strict=False))
    t_BT = np.arange(16) - batch.starts
    for tokens, labels, starts, weights, t in zip(*batch[:2], batch.starts, batch.weights, t_BT, strict=True):
        for position in np.flatnonzero((t > 0) & (weights > 0)):  # inside a piece the input is the label before it
            assert tokens[position] == labels[position - 1] and starts[position] == starts[position - 1]
    orders = [
        [tuple(span[1:] for span in row) for row in samples.spans(np.arange(samples.num_samples) + e)] for e in (0, 50)
    ]
    assert orders[0] != orders[1]


def test_shorter_rows_of_packed_samples_keep_documents_apart(write_set: Callable, documents: list[list[int]]) -> None:
    samples = Packed([whole(write_set(documents))], seq_len=16, seed=3, shuffle=True)
    long, short = (
        Loader(samples, Ramp(4), eod=EOD, vocab_size=5000, separates=True, lengths=table).batch(0)
        for table in ((), ((0, 4),))
    )
    assert short.tokens.shape == (16, 4) and np.array_equal(short.tokens.ravel(), long.tokens.ravel())
    cut = long.starts.reshape(4, 4, 4) - np.arange(0, 16, 4)[:, None]
    assert np.array_equal(short.starts, np.maximum(cut, 0).reshape(16, 4))


def test_nothing_to_pack_is_refused(write_set: Callable) -> None:
    with pytest.raises(UserError, match="seq_len \\+ 1 = 2 tokens"):
        Packed([whole(write_set([[EOD], [], [1]]))], seq_len=16, seed=3, shuffle=True)
