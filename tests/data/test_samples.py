from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.data.loader import Loader, Ramp
from jaxlm.data.samples import Samples, TokenRange, Windows, permute, random_words, split

QUICK = settings(deadline=None, max_examples=60)


def rows_of(samples: Samples, indices: np.ndarray) -> np.ndarray:
    """Tokens of each sample, [n, seq_len + 1]."""
    rows = [np.concatenate([d.tokens[start:stop] for d, start, stop in spans]) for spans in samples.spans(indices)]
    return np.array(rows, np.int32).reshape(len(indices), samples.seq_len + 1)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65537, 100_003])
def test_permute_is_a_bijection(size: int) -> None:
    images = permute(np.arange(size), size=size, keys=random_words(6, size))
    assert np.array_equal(np.sort(images), np.arange(size))


@QUICK
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_any_keys(size: int, seed: int) -> None:
    images = permute(np.arange(size), size=size, keys=random_words(6, seed))
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [1000, 1024, 33_000])
def test_permuted_positions_look_drawn_at_random(size: int) -> None:
    """Tolerances are 5 standard deviations of a uniform permutation, over 20 keys (all fixed, so never flaky).

    |p(i+1) - p(i)| has mean (n+1)/3 and standard deviation n/sqrt(18); neighbouring differences correlate little.
    The number of i with p(i) = i is Poisson(1). The rank correlation with i has standard deviation 1/sqrt(n-1).
    """
    keys = [random_words(6, 7, k) for k in range(20)]
    perms = np.array([permute(np.arange(size), size=size, keys=key) for key in keys])
    count = 20 * size
    assert abs(np.abs(np.diff(perms)).mean() / ((size + 1) / 3) - 1) < 5 * 3 / np.sqrt(18) / np.sqrt(count)
    assert (perms == np.arange(size)).sum() < 20 + 5 * np.sqrt(20)
    correlations = [np.corrcoef(p, np.arange(size))[0, 1] for p in perms]
    assert np.abs(correlations).max() < 5 / np.sqrt(size - 1)
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(perms, perms[1:], strict=False)]
    assert np.abs(pairs).max() < 5 / np.sqrt(size - 1)
    # 10 x 10 cells of (i, p(i)): chi squared of 81 degrees of freedom has mean 81 and variance 162
    cells = np.zeros((10, 10))
    np.add.at(cells, (np.tile(np.arange(size) * 10 // size, 20), perms.ravel() * 10 // size), 1)
    chi2 = ((cells - count / 100) ** 2 / (count / 100)).sum()
    assert abs(chi2 - 81) < 5 * np.sqrt(162)


def test_permute_at_a_trillion_costs_no_memory_and_stays_in_range() -> None:
    size = 10**12 + 39
    images = permute(np.arange(size - 1000, size), size=size, keys=random_words(6, 1))
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0 and images.max() < size
    assert 0.3 * size < images.mean() < 0.7 * size


def test_a_seed_and_epoch_always_give_the_same_numbers(write_set: Callable) -> None:
    """These numbers decide the data order of every run: a change here breaks every resume."""
    # splitmix64 of state 0, as published with its reference implementation
    assert random_words(2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert permute(np.arange(10), size=10, keys=random_words(6, 0, 0, 1)).tolist() == [3, 6, 0, 5, 2, 7, 8, 4, 9, 1]
    samples = make_samples(write_set, [70], seq_len=7, seed=11, shuffle=True)
    assert rows_of(samples, np.arange(9, 27))[:, 0].tolist() == [
        46,
        25,
        53,
        11,
        18,
        32,
        60,
        4,
        39,
        33,
        5,
        19,
        40,
        54,
        61,
        47,
        12,
        26,
    ]


@QUICK
@given(num_tokens=st.integers(0, 10**13), shares=st.lists(st.floats(0, 1e3), min_size=1, max_size=5))
def test_split_is_a_partition_in_file_order(num_tokens: int, shares: list[float]) -> None:
    if sum(shares) == 0:
        shares[0] = 1.0
    ranges = [(part.start, part.stop) for part in split(num_tokens, shares=shares)]
    assert [ranges[0][0], ranges[-1][1]] == [0, num_tokens]
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    for (start, stop), share in zip(ranges, shares, strict=True):
        # two roundings to whole tokens, and the error of a few doubles
        assert abs(stop - start - num_tokens * share / sum(shares)) <= 1 + 1e-14 * num_tokens


SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=4)


def make_samples(write_set: Callable, sizes: list[int], **options: object) -> Windows:
    """Ranges inside one set whose token at position p is p, with a gap of 3 tokens between ranges."""
    dataset = write_set([range(sum(sizes) + 3 * len(sizes))], name=f"sizes{'-'.join(map(str, sizes))}")
    starts = [sum(sizes[:k]) + 3 * k for k in range(len(sizes))]
    return Windows([TokenRange(dataset, a, a + n) for a, n in zip(starts, sizes, strict=True)], **options)


@settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, seq_len=st.integers(1, 12))
def test_not_shuffled_every_label_of_every_range_comes_once_in_file_order(
    write_set: Callable, sizes: list[int], seq_len: int
) -> None:
    if max(sizes) < 2:
        with pytest.raises(UserError, match="seq_len \\+ 1 = 2"):
            make_samples(write_set, sizes, seq_len=seq_len, seed=0, shuffle=False)
        return
    samples = make_samples(write_set, sizes, seq_len=seq_len, seed=0, shuffle=False)
    batches = [Loader(samples, Ramp(3), eod=None, vocab_size=999).batch(k) for k in range(-(-samples.num_samples // 3))]
    tokens, labels, weights = (np.concatenate(column) for column in zip(*(batch[:3] for batch in batches), strict=True))
    assert labels[weights > 0].tolist() == [p for r in samples.ranges for p in range(r.start + 1, r.stop)]
    assert np.array_equal(tokens[weights > 0], labels[weights > 0] - 1)


@settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, seq_len=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_windows_tile_their_ranges_in_every_epoch(
    write_set: Callable, sizes: list[int], seq_len: int, seed: int
) -> None:
    if max(sizes) < seq_len + 1:
        with pytest.raises(UserError, match=f"seq_len \\+ 1 = {seq_len + 1}"):
            make_samples(write_set, sizes, seq_len=seq_len, seed=seed, shuffle=True)
        return
    samples = make_samples(write_set, sizes, seq_len=seq_len, seed=seed, shuffle=True)
    n = samples.num_samples
    for epoch in range(3):
        rows = rows_of(samples, np.arange(epoch * n, (epoch + 1) * n))
        assert rows.dtype == np.int32 and rows.shape == (n, seq_len + 1)
        assert (np.diff(rows) == 1).all()  # contiguous
        starts = np.sort(rows[:, 0])
        for token_range, windows in zip(samples.ranges, samples.windows, strict=True):
            mine = starts[(starts >= token_range.start) & (starts < token_range.stop)]
            assert len(mine) == windows
            assert len(mine) == 0 or mine[-1] + seq_len < token_range.stop  # never across a range's end
            assert (np.diff(mine) == seq_len).all()  # no gap, no overlap but the shared token
            spare = token_range.num_tokens - 1 - windows * seq_len
            assert windows == 0 or (mine[0] - token_range.start) <= spare < 2 * seq_len
            assert windows < 2 or spare + 1 >= seq_len  # room for an offset at each place of a window
            assert windows > 0 or token_range.num_tokens <= seq_len


def test_every_token_is_an_input_in_some_epoch(write_set: Callable) -> None:
    samples = make_samples(write_set, [47, 9], seq_len=5, seed=3, shuffle=True)
    seen = np.unique(rows_of(samples, np.arange(60 * samples.num_samples))[:, :-1])
    assert set(range(46)) | set(range(50, 58)) == set(seen.tolist())


def test_epochs_and_seeds_have_different_orders_and_offsets(write_set: Callable) -> None:
    def epoch_starts(seed: int, epoch: int) -> tuple[int, ...]:
        samples = make_samples(write_set, [2000], seq_len=10, seed=seed, shuffle=True)
        n = samples.num_samples
        return tuple(rows_of(samples, np.arange(epoch * n, (epoch + 1) * n))[:, 0].tolist())

    orders = [epoch_starts(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert len({min(order) for order in orders}) > 5  # 16 draws of about 10 offsets
    windows = {tuple(np.argsort(order).tolist()) for order in orders}
    assert len(windows) == 16


@QUICK
@given(indices=st.lists(st.integers(0, 10**15), max_size=20))
def test_rows_do_not_depend_on_how_they_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int]
) -> None:
    prefix = tmp_path_factory.mktemp("set") / "set"
    with IndexedWriter(prefix, dtype="i4") as writer:
        writer.add_document(np.arange(500))
    dataset = IndexedDataset(prefix)
    samples = Windows([TokenRange(dataset, 0, 300), TokenRange(dataset, 300, 500)], seq_len=7, seed=1, shuffle=True)
    together = rows_of(samples, np.array(indices, np.int64))
    assert together.tolist() == [rows_of(samples, np.array([i]))[0].tolist() for i in indices]
    assert together[:, 0].tolist() == [samples.spans([i])[0][0].start for i in indices]


def test_ids_beyond_int32_do_not_wrap_around(write_set: Callable) -> None:
    dataset = write_set([[1, 2**32 + 1, -(2**40), 2]], dtype="i8")
    samples = Windows([TokenRange(dataset, 0, 4)], seq_len=3, seed=0, shuffle=False)
    with pytest.raises(UserError, match="token id 4294967297 is not below"):
        Loader(samples, Ramp(1), eod=None, vocab_size=10).batch(0)
