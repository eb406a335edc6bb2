from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxlm.config import UserError, skipped_batches
from jaxlm.data.loader import Batch, Loader, Prefetch, Ramp, batch_of
from jaxlm.data.samples import TokenRange, Windows, whole

EOD = 99


def make_loader(
    write_set: Callable, *, shuffle: bool, batch_size: int = 8, skip: Sequence[tuple] = (), **options: object
) -> Loader:
    dataset = write_set([[*range(k, k + 13), EOD] for k in range(40)])
    samples = Windows([whole(dataset)], seq_len=6, seed=5, shuffle=shuffle)
    return Loader(samples, Ramp(batch_size, skip=skip), **{"eod": EOD, "vocab_size": 100, **options})


def assert_equal(a: Batch, b: Batch) -> None:
    assert (a.starts is None) == (b.starts is None)
    for x, y in zip(*(filter(lambda part: part is not None, batch) for batch in (a, b)), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.array_equal(x, y)


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_number_of_hosts_reads_the_same_rows(write_set: Callable, shuffle: bool) -> None:
    loader = make_loader(write_set, shuffle=shuffle, separates=True)
    for step in (0, 3, 11):
        all_rows = loader.batch(step)
        for hosts in (1, 2, 4):
            parts = [loader.batch(step, host=host, hosts=hosts) for host in range(hosts)]
            assert {len(part.tokens) for part in parts} == {8 // hosts}
            assert_equal(all_rows, Batch(*(np.concatenate(part) for part in zip(*parts, strict=True))))


def test_row_r_of_step_s_is_sample_s_times_b_plus_r(write_set: Callable) -> None:
    loader = make_loader(write_set, shuffle=True)
    batch = loader.batch(17)  # in the second epoch and on
    spans = [row[0] for row in loader.samples.spans(np.arange(17 * 8, 18 * 8))]
    rows = np.array([dataset.tokens[start:stop] for dataset, start, stop in spans], np.int32)
    assert np.array_equal(batch.tokens, rows[:, :-1]) and np.array_equal(batch.labels, rows[:, 1:])
    assert (batch.weights == 1).all()
    assert [x.dtype for x in batch[:3]] == [np.int32, np.int32, np.float32]
    assert all(x.flags.c_contiguous for x in batch[:3])


def test_skipped_batches_are_never_read_and_all_others_are_in_order(write_set: Callable) -> None:
    skip = skipped_batches(("21:23", "3:3", "5:8", "7:9", "22:22"))
    assert skip == [(2, 3), (4, 9), (20, 23)]
    read = [batch_of(step, skip) for step in range(30)]
    assert read == [i for i in range(60) if not any(start <= i < stop for start, stop in skip)][:30]
    plain, skipping = make_loader(write_set, shuffle=True), make_loader(write_set, shuffle=True, skip=skip)
    for step in (0, 2, 3, 11, 29):
        assert_equal(skipping.batch(step), plain.batch(read[step]))
        assert skipping.ramp.before(step) == 8 * read[step]


def test_the_places_of_a_step_lead_to_its_rows(write_set: Callable) -> None:
    loader = make_loader(write_set, shuffle=True)
    text, batch = loader.places(3), loader.batch(3)
    assert text.startswith("samples 24..31: ") and text.endswith(", ...")
    for row, position in enumerate(map(int, re.findall(r" token (\d+)", text))):
        assert np.array_equal(loader.samples.ranges[0].dataset.tokens[position : position + 6], batch.tokens[row])


def test_an_evaluation_reads_each_label_once_and_pads_with_weight_0(write_set: Callable) -> None:
    loader = make_loader(write_set, shuffle=False, batch_size=7)
    stream, n = loader.samples.ranges[0].dataset.tokens, loader.samples.num_samples
    assert (len(stream), n, loader.num_batches) == (560, 94, 14)  # 559 labels: 93 rows of 6 and one of 1
    batches = [loader.batch(step) for step in range(14)]
    assert all(batch.tokens.shape == loader.shape(0) == (7, 6) for batch in batches)
    tokens, labels, weights = (np.concatenate(column).ravel() for column in list(zip(*batches, strict=True))[:3])
    assert (weights[:559] == 1).all() and (weights[559:] == 0).all()
    assert np.array_equal(tokens[:559], stream[:-1]) and np.array_equal(labels[:559], stream[1:])
    assert (labels[559:] == 0).all() and (tokens[560:] == 0).all()
    with pytest.raises(AssertionError):
        loader.batch(14)


def test_masking_takes_exactly_the_positions_whose_input_ends_a_document(write_set: Callable) -> None:
    batch = make_loader(write_set, shuffle=True, mask_eod_loss=True).batch(2)
    assert (batch.tokens == EOD).any()
    assert np.array_equal(batch.weights, (batch.tokens != EOD).astype(np.float32))
    with pytest.raises(UserError, match=r"data\.mask_eod_loss"):
        make_loader(write_set, shuffle=True, mask_eod_loss=True, eod=None)


@pytest.mark.parametrize(("dtype", "stranger"), [("u2", 100), ("i4", -1), ("i8", 2**40), ("i8", -(2**40))])
def test_a_token_outside_the_vocabulary_is_named_by_file_and_offset(
    write_set: Callable, dtype: str, stranger: int
) -> None:
    dataset = write_set([[1] * 30, [2] * 7 + [stranger] + [2] * 30], dtype=dtype)
    for seed in range(4):  # windows that have it at different places
        samples = Windows([TokenRange(dataset, 10, dataset.num_tokens)], seq_len=4, seed=seed, shuffle=True)
        loader = Loader(samples, Ramp(100), eod=None, vocab_size=100)
        with pytest.raises(UserError) as refusal:
            loader.batch(0)
        assert f"{dataset.prefix}.bin, token 37 (byte {37 * dataset.dtype.itemsize})" in str(refusal.value)
        assert f"token id {stranger} is not below the vocabulary size, 100" in str(refusal.value)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_gives_every_value_in_order(depth: int) -> None:
    with Prefetch(lambda step: step * step, start=3, stop=40, depth=depth) as values:
        got = list(values)
    assert [value for value, _ in got] == [step * step for step in range(3, 40)]
    assert all(0 <= wait_s < 10 for _, wait_s in got)
    assert not leaked()


def test_prefetch_stays_within_its_depth() -> None:
    made = itertools.count()
    latest = [-1]

    def make(step: int) -> int:
        latest[0] = next(made)
        return step

    with Prefetch(make, start=0, stop=100, depth=3) as values:
        for taken in range(1, 20):
            next(values)
            time.sleep(0.002)
            assert latest[0] < taken + 3
        time.sleep(0.05)
        assert latest[0] == 19 + 3 - 1


@pytest.mark.parametrize("depth", [1, 2])
def test_an_exception_comes_out_where_its_value_would(depth: int) -> None:
    def make(step: int) -> int:
        if step == 4:
            raise UserError
        return step

    values = Prefetch(make, start=0, stop=10, depth=depth)
    assert [next(values)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError):
        next(values)
    assert not leaked()


def test_closing_early_ends_the_thread() -> None:
    for taken in (0, 1, 5):
        values = Prefetch(lambda step: step, start=0, stop=10**9, depth=2)
        for _ in range(taken):
            next(values)
        assert leaked()
        values.close()
        values.close()
        assert not leaked()
        assert list(values) == []


def test_wait_is_the_time_the_consumer_stood_still() -> None:
    def make(step: int) -> int:
        time.sleep(0.05)
        return step

    with Prefetch(make, start=0, stop=3, depth=3) as values:
        assert next(values)[1] > 0.02
        time.sleep(0.3)  # the other two are made meanwhile
        assert next(values)[1] < 0.02


def test_a_value_that_is_never_made_holds_up_no_error_and_no_exit() -> None:
    child = (
        "import sys, threading, time; from jaxlm.data import loader; loader.CLOSE_S = 0.2\n"
        "with loader.Prefetch(lambda step: threading.Event().wait(), start=0, stop=9, depth=2):\n"
        "    time.sleep(0.1); raise RuntimeError('first')\n"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: first\n")


def leaked() -> bool:
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())
