"""Megatron's sampling, against arrays derived here from its description: a plain loop over documents, and a closed form."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import blend
from jaxlm.data.blend import Blend, Greedy
from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.data.samples import MegatronSamples, TokenRange, split

MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=25)


def build(folder: Path, lengths: list[int]) -> IndexedDataset:
    """Sequences of these lengths; token p of the file is p."""
    with IndexedWriter(folder / "set", dtype="i4") as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths=np.array(lengths))
    return IndexedDataset(folder / "set")


def megatron_indices(
    lengths: list[int], sequences: range, seq: int, num_samples: int | None, seed: int
) -> tuple[list[int], list[tuple[int, int]], list[int], list[int]]:
    """(document index, sample index by the loop, sample positions by the closed form, shuffle index); x = 1, drop last."""
    per_epoch = sum(lengths[k] for k in sequences)
    epochs = 1
    while num_samples is not None and epochs * per_epoch < num_samples * seq + 1:
        epochs += 1
    separate, sans_final = False, 0
    if epochs > 1:
        assert num_samples is not None
        sans_final = ((epochs - 1) * per_epoch - 1) // seq
        separate = num_samples - sans_final < int(0.80 * ((per_epoch - 1) // seq))
    random = np.random.RandomState(seed)
    documents = np.array(list(sequences) * epochs, np.int32)
    if separate:
        last = documents[-len(sequences) :].copy()
        documents = documents[: -len(sequences)].copy()
        random.shuffle(documents)
        random.shuffle(last)
        documents = np.concatenate([documents, last])
    else:
        random.shuffle(documents)
    total = (epochs * per_epoch - 1) // seq

    by_loop, place, offset = [(0, 0)], 0, 0
    for _ in range(total):
        remaining = seq + 1  # a sample takes seq + 1 tokens, and the next begins on its last
        while remaining:
            left = lengths[documents[place]] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                place, offset = place + 1, 0
        by_loop.append((place, offset))

    shuffle = np.arange(total, dtype=np.uint32)
    if separate:
        random.shuffle(shuffle[:sans_final])
        random.shuffle(shuffle[sans_final:])
    else:
        random.shuffle(shuffle)
    positions = [min(j * seq, epochs * per_epoch - 1) for j in range(total + 1)]
    return documents.tolist(), by_loop, positions, shuffle.tolist()


@MANY
@given(
    lengths=LENGTHS, cut=st.tuples(st.integers(0, 3), st.integers(0, 3)), seq=st.integers(1, 17),
    num_samples=st.none() | st.integers(1, 300), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_three_arrays_are_megatrons(
    tmp_path: Path, lengths: list[int], cut: tuple[int, int], seq: int, num_samples: int | None, seed: int
) -> None:
    sequences = range(min(cut[0], len(lengths)), max(len(lengths) - cut[1], min(cut[0], len(lengths))))
    per_epoch = sum(lengths[k] for k in sequences)
    assume(per_epoch > seq and -(-(num_samples or 1) * seq // per_epoch) < 40)
    dataset = build(tmp_path, lengths)
    first = int(dataset.first_tokens(np.array([sequences.start]))[0])
    part = TokenRange(dataset, first, first + per_epoch, sequences)
    samples = MegatronSamples(part, seq_len=seq, seed=seed, num_samples=num_samples)
    documents, by_loop, positions, shuffle = megatron_indices(lengths, sequences, seq, num_samples, seed)
    assert samples.document_index.dtype == np.int32 and samples.shuffle_index.dtype == np.uint32
    assert samples.document_index.tolist() == documents
    assert samples.shuffle_index.tolist() == shuffle
    assert samples.num_samples == len(shuffle) >= (num_samples or 0)
    stream = [p for d in documents for p in range(sum(lengths[:d]), sum(lengths[: d + 1]))]
    places, offsets = samples.sample_index(np.arange(len(by_loop)))
    for j, (place, offset) in enumerate(by_loop):
        assert stream[positions[j]] == sum(lengths[: documents[places[j]]]) + offsets[j]
        # the loop may stop at the end of a document, where the closed form stands at the start of the next that has tokens
        assert positions[j] == sum(lengths[d] for d in documents[:place]) + offset
    for k in range(len(shuffle)):
        row = np.concatenate([d.tokens[start:stop] for d, start, stop in samples.spans([k])[0]]).tolist()
        assert row == stream[shuffle[k] * seq : shuffle[k] * seq + seq + 1]
    again = samples.spans([len(shuffle)])[0]  # beyond its end a set starts again
    assert [span[1:] for span in again] == [span[1:] for span in samples.spans([0])[0]]


def test_both_kinds_of_last_epoch_are_drawn() -> None:
    """Of the cases above, some shuffle the last epoch apart and some do not; here is one of each, by its numbers."""
    lengths = [10] * 10
    for num_samples, apart in ((30, True), (39, False)):  # 20 samples an epoch at seq 5
        documents, *_ = megatron_indices(lengths, range(10), 5, num_samples, 1)
        assert (sorted(documents[:10]) == list(range(10))) == apart


@pytest.mark.parametrize(
    ("shares", "num", "bounds"),
    [
        ((969, 30, 1), 1000, [(0, 969), (969, 999), (999, 1000)]),
        ((0.5, 0.5), 5, [(0, 2), (2, 5)]),  # 2.5 rounds to even
        ((0.5, 0.5), 7, [(0, 4), (4, 7)]),  # 3.5 too
        ((1, 0, 0), 9, [(0, 9), (9, 9), (9, 9)]),
    ],
)
def test_splits_are_megatrons(shares: tuple, num: int, bounds: list) -> None:
    assert [(r.start, r.stop) for r in split(num, shares=shares)] == bounds


def test_a_set_too_short_for_a_row_is_refused(tmp_path: Path) -> None:
    part = TokenRange(build(tmp_path, [3, 2]), 0, 5, range(2))
    with pytest.raises(UserError, match="seq_len \\+ 1 = 6"):
        MegatronSamples(part, seq_len=5, seed=0, num_samples=3)


def greedy_by_definition(weights: list[float], size: int) -> list[tuple[int, int]]:
    """(source, number in it) of each sample: argmax of w max(i, 1) - count, the lowest of equals."""
    share = [w / math.fsum(weights) for w in weights]
    counts, picks = [0] * len(weights), []
    for i in range(size):
        lags = [w * float(max(i, 1)) - float(c) for w, c in zip(share, counts, strict=True)]
        d = lags.index(max(lags))
        picks.append((d, counts[d]))
        counts[d] += 1
    return picks


BLOCK = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "BLOCK", BLOCK)


class Numbers:
    """A source whose sample n reads token n of a set of its own."""

    seq_len, separate, endless, num_samples = 1, False, True, 10

    def __init__(self, name: int):
        self.name = name

    def spans(self, indices: np.ndarray) -> list:
        return [[(self.name, int(n), int(n) + 2)] for n in indices]


@settings(MANY, max_examples=20)
@given(weights=st.lists(st.integers(1, 100), min_size=1, max_size=6), exact=st.booleans())
def test_a_mixture_is_megatrons_greedy_rule(weights: list[int], exact: bool) -> None:
    size = 3 * BLOCK + 500 if exact else BLOCK  # a block boundary
    mixture = Blend([Numbers(k) for k in range(len(weights))], [(0, weights)], exact=exact)
    which, numbers = mixture.pick(np.arange(size))
    assert list(zip(which.tolist(), numbers.tolist(), strict=True)) == greedy_by_definition(
        [float(w) for w in weights], size
    )
    spans = mixture.spans([3, size - 1, 0])
    assert [s[0][:2] for s in spans] == [(which[i], numbers[i]) for i in (3, size - 1, 0)]


def test_threads_that_ask_at_once_get_the_same_counts() -> None:
    weights, places = (0.5, 0.2, 0.3), [(40 - k % 3) * BLOCK + k for k in range(24)]
    alone = Blend([Numbers(k) for k in range(3)], [(0, weights)], exact=True).pick(places)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3):
            mixture = Blend([Numbers(k) for k in range(3)], [(0, weights)], exact=True)
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(mixture.pick, [[place] for place in places]))
            assert np.array_equal(np.concatenate(found, axis=1), alone)
    finally:
        sys.setswitchinterval(interval)


def test_any_sample_of_a_stateless_mixture_costs_the_same_and_shares_hold() -> None:
    mixture = Blend([Numbers(k) for k in range(3)], [(0, (0.5, 0.2, 0.3))], exact=False)
    which, numbers = mixture.pick(np.arange(3 * BLOCK))
    for k, share in enumerate((0.5, 0.2, 0.3)):
        mine = numbers[which == k]
        assert np.array_equal(mine, np.arange(len(mine)))  # each source is read on, none twice
        assert abs(len(mine) - share * 3 * BLOCK) <= 3
    far = 10**12 + 7
    which, numbers = mixture.pick(np.array([far]))
    assert abs(numbers[0] / far - (0.5, 0.2, 0.3)[which[0]]) < 1 / BLOCK
    assert len(mixture._rules[0]._counts) == 1  # nothing was counted up to there


@pytest.mark.parametrize("exact", [True, False])
def test_weights_change_from_a_sample_on_and_every_source_goes_on(exact: bool) -> None:
    phases = [(0, (1.0, 0.0, 0.0)), (300, (1.0, 1.0, 0.0)), (3 * BLOCK, (0.0, 1.0, 3.0))]
    if exact:  # Megatron's rule gives even a set of weight 0 a turn where all are level
        phases = [(first, tuple(w + 0.01 for w in weights)) for first, weights in phases]
    mixture = Blend([Numbers(k) for k in range(3)], phases, exact=exact)
    which, numbers = mixture.pick(np.arange(8 * BLOCK))
    for k in range(3):
        mine = numbers[which == k]
        assert np.array_equal(mine, np.arange(len(mine)))
    for (start, weights), stop in zip(phases, (300, 3 * BLOCK, 8 * BLOCK), strict=True):
        counts = np.bincount(which[start:stop], minlength=3) / (stop - start)
        assert np.abs(counts - np.array(weights) / sum(weights)).max() < 3 / (stop - start)
    before = Blend([Numbers(k) for k in range(3)], phases[:2], exact=exact)
    assert np.array_equal(before.pick(np.arange(3 * BLOCK))[0], which[: 3 * BLOCK])


def test_a_set_of_no_weight_yet_changes_nothing() -> None:
    alone, beside = Greedy((0.3, 0.7), exact=False), Greedy((0.0, 0.3, 0.7), exact=False)
    assert np.array_equal(alone.block(0)[0] + 1, beside.block(0)[0])


def test_sequences_not_documents_are_shuffled(write_set: Callable) -> None:
    """A document of several sequences is as many entries of Megatron's document index."""
    dataset = write_set([[1, 2, 3], [4, 5]])
    part = TokenRange(dataset, 0, 5, range(2))
    assert sorted(MegatronSamples(part, seq_len=2, seed=0, num_samples=None).document_index.tolist()) == [0, 1]
