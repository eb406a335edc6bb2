"""A config's data section, opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.checks import check, ignored
from jaxlm.config import Config, DataConfig, ModelConfig, Problem, TrainConfig, UserError, derived
from jaxlm.data.blend import Blend
from jaxlm.data.corpus import evaluation_loader, open_corpus, parse_train, sets_read, training_loader
from jaxlm.data.packing import Packed
from jaxlm.data.samples import MegatronSamples, Windows

EOD = 256


@pytest.fixture
def sets(write_set: Callable) -> list[str]:
    """Two sets of 40 documents; tokens of the second are above 100."""
    return [write_set([[*range(a + k, a + k + 20), EOD] for k in range(40)], name=f"set{a}").prefix for a in (0, 100)]


def config(data: dict[str, Any], **train: Any) -> Config:
    train = dict(batch_size=4, seq_len=16, num_steps=20) | train
    return derived(
        Config(model=ModelConfig(vocab_size=300, max_seq_len=16), data=DataConfig(**data), train=TrainConfig(**train))
    )


def problems(data: dict[str, Any], **train: Any) -> list[Problem]:
    chosen = [f"data.{key}" for key in data]
    return [*check(config(data, **train)), *ignored(config(data, **train), chosen)]


@pytest.mark.parametrize(
    ("entry", "prefix", "weights"),
    [
        ("sets/a", "sets/a", ()),
        ("0.7:sets/a", "sets/a", ((0, 0.7),)),
        ("2/1e-1@100/0@2000:a:b", "a:b", ((0, 2.0), (100, 0.1), (2000, 0.0))),
        ("3@50:a", "a", ((50, 3.0),)),
        ("s3://bucket/a", "s3://bucket/a", ()),
        ("c:a", "c:a", ()),
    ],
)
def test_an_entry_is_a_prefix_and_its_weights(entry: str, prefix: str, weights: tuple) -> None:
    assert parse_train(entry) == (prefix, weights)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (dict(), Windows),
        (dict(packing="best_fit"), Packed),
        (dict(order="megatron"), MegatronSamples),
        (dict(order="megatron", weights=("1:",)), Blend),
        (dict(weights=("0.7:", "0.3:")), Blend),
        (dict(order="megatron", weights=("", "")), Blend),
    ],
)
def test_settings_choose_the_order(sets: list[str], tmp_path: Path, data: dict[str, Any], kind: type) -> None:
    weights = data.pop("weights", ("",))
    c = config(data | dict(train=tuple(w + prefix for w, prefix in zip(weights, sets, strict=False))))
    corpus = open_corpus(c, tmp_path, print)
    loader = training_loader(c, corpus)
    assert type(loader.samples) is kind and check(c) == []
    batches = [loader.batch(step) for step in range(20)]
    assert all(batch.tokens.shape == (4, 16) for batch in batches)
    for hosts in (2, 4):  # the same global batch, each reading its rows
        for step in (0, 13):
            parts = [loader.batch(step, host=host, hosts=hosts) for host in range(hosts)]
            for whole, *mine in zip(batches[step], *parts, strict=True):
                assert whole is None or np.array_equal(whole, np.concatenate(mine))
    held_out = evaluation_loader(c, corpus.held_out, corpus.tokenizer).batch(0)
    assert (batches[0].starts is None) == (held_out.starts is None) == (kind is not Packed)


def test_megatrons_mixture_has_its_sizes(sets: list[str], tmp_path: Path) -> None:
    """840 tokens a set, of which 0.95 of 40 documents train: 38 * 21 = 798, 49 samples of 16 an epoch."""
    c = config(dict(train=(f"3:{sets[0]}", f"1:{sets[1]}"), order="megatron"), num_steps=100)
    samples = training_loader(c, open_corpus(c, tmp_path, print)).samples
    assert isinstance(samples, Blend)
    wanted = [-(-round(400 * share) * 1005 // 1000) for share in (0.75, 0.25)]  # 302 and 101: whole epochs more
    epochs = [-(-(n * 16 + 1) // 798) for n in wanted]
    assert [s.num_samples for s in samples.sources] == [(e * 798 - 1) // 16 for e in epochs]
    c = config(dict(train=tuple(sets), order="megatron"), num_steps=100)
    samples = training_loader(c, open_corpus(c, tmp_path, print)).samples
    assert [s.num_samples for s in samples.sources] == [49, 49] and samples._rules[0].weights == [0.5, 0.5]


def test_weights_change_at_their_step(sets: list[str], tmp_path: Path) -> None:
    c = config(dict(train=(f"1/0@10:{sets[0]}", f"0/1@10:{sets[1]}")), batch_ramp=(2, 2, 12))
    loader = training_loader(c, open_corpus(c, tmp_path, print))
    for step in range(20):
        tokens = loader.batch(step).tokens
        second = ((tokens >= 100) & (tokens != EOD)).any(axis=1)
        assert second.all() if step >= 10 else not second.any()


def test_skipped_batches_move_no_step_at_which_a_setting_changes(sets: list[str], tmp_path: Path) -> None:
    data = dict(train=(f"1/0@10:{sets[0]}", f"0/1@10:{sets[1]}"), seq_lens=("8@6",))
    for skip in ((), ("3:5",), ("1:2", "11:11", "15:40")):
        c = config(data | dict(skip_steps=skip))
        loader = training_loader(c, open_corpus(c, tmp_path, print))
        for step in range(20):
            tokens = loader.batch(step).tokens
            assert tokens.shape == loader.shape(step) == ((8, 8) if step >= 6 else (4, 16))
            assert ((tokens >= 100) & (tokens != EOD)).any() == (step >= 10)


def test_megatron_shuffles_as_one_all_that_a_run_with_skipped_batches_reads(sets: list[str], tmp_path: Path) -> None:
    """Its --train-iters counts skipped iterations: 48 of them, of which 5 are skipped, are 43 steps."""
    rows = []
    for steps, skip in ((48, ()), (43, ("3:7",))):  # 49 rows an epoch, 4 a step: the shuffle is of 4 epochs
        c = config(dict(train=(sets[0],), order="megatron", skip_steps=skip), num_steps=steps)
        loader = training_loader(c, open_corpus(c, tmp_path, print))
        rows.append([loader.batch(step).tokens.tolist() for step in range(steps)])
        assert loader.ramp.before(steps - 1) + 4 <= loader.samples.num_samples  # none comes from beyond the end
    assert rows[1] == rows[0][:2] + rows[0][7:]


@pytest.mark.parametrize(("num_steps", "wanted"), [(28, (49, 49, 18)), (231, (399, 399, 134))])
def test_weights_are_normalised_before_they_are_multiplied(
    sets: list[str], tmp_path: Path, num_steps: int, wanted: tuple[int, ...]
) -> None:
    """112 samples of 0.3 : 0.3 : 0.1 are 48 of the first if the doubles are divided first, and 49 if last; 798 tokens are
    49 samples, so that a set that is asked for 50 has another epoch."""
    train = tuple(f"{weight}:{prefix}" for weight, prefix in zip((0.3, 0.3, 0.1), (*sets, sets[0]), strict=True))
    c = config(dict(train=train, order="megatron"), num_steps=num_steps)
    samples = training_loader(c, open_corpus(c, tmp_path, print)).samples
    assert isinstance(samples, Blend)
    shares = np.array([0.3, 0.3, 0.1]) / np.sum(np.array([0.3, 0.3, 0.1]))
    assert tuple(ceil(ceil(4 * num_steps * share) * 1.005) for share in shares) == wanted
    assert [s.num_samples for s in samples.sources] == [(-(-(n * 16 + 1) // 798) * 798 - 1) // 16 for n in wanted]


def test_a_long_mixture_is_counted_no_further_than_it_is_read(sets: list[str], tmp_path: Path) -> None:
    c = config(dict(train=(f"0.7:{sets[0]}", f"0.3:{sets[1]}"), order="megatron"), num_steps=50_000)
    loader = training_loader(c, open_corpus(c, tmp_path, print))
    assert loader.shape(49_999) == loader.batch(0).tokens.shape
    assert isinstance(loader.samples, Blend) and len(loader.samples._rules[0]._counts) == 1  # of four blocks
    loader.batch(49_999)
    assert len(loader.samples._rules[0]._counts) == 4


ORDERS = [
    dict(order="megatron"),
    dict(order="megatron", weights=("0.7:", "0.3:")),
    dict(packing="best_fit", weights=("0.7/0.1@9:", "0.3:")),
    dict(reset_at_eod=True, seq_lens=("8@5", "16@11"), weights=("0.7:", "0.3/0.9@7:")),
    dict(fim_rate=0.7, fim_tokens=(297, 298, 299), skip_steps=("4:6",)),
]


@pytest.mark.parametrize("data", ORDERS)
def test_every_order_on_a_growing_batch_goes_on_where_any_step_left_it(
    sets: list[str], tmp_path: Path, data: dict[str, Any]
) -> None:
    """The loader has no state: one that is opened anew, or asked out of order, gives the batch of the one that went on."""
    weights = data.get("weights", ("",))
    data = {key: value for key, value in data.items() if key != "weights"}
    c = config(data | dict(train=tuple(w + p for w, p in zip(weights, sets, strict=False))), batch_ramp=(2, 2, 12))
    assert problems(data | dict(train=c.data.train), batch_ramp=(2, 2, 12)) == []
    corpus = open_corpus(c, tmp_path, print)
    loader = training_loader(c, corpus)
    went_on = [loader.batch(step) for step in range(20)]
    assert len({batch.tokens.size for batch in went_on}) == 2
    for step in (19, 7, 0):
        resumed = training_loader(c, open_corpus(c, tmp_path, print))
        for ours, theirs in zip(resumed.batch(step), went_on[step], strict=True):
            assert np.array_equal(ours, theirs) if ours is not None else theirs is None
        assert resumed.tokens_before(step) == sum(batch.tokens.size for batch in went_on[:step])


@pytest.mark.parametrize("data", [dict(packing="best_fit"), dict(reset_at_eod=True, mask_eod_loss=True)])
def test_evaluation_counts_no_label_across_documents_where_training_counts_none(
    sets: list[str], tmp_path: Path, data: dict[str, Any]
) -> None:
    c = config(data | dict(train=(sets[0],), eval=(sets[1],)))
    corpus = open_corpus(c, tmp_path, print)
    loader = evaluation_loader(c, corpus.held_out, corpus.tokenizer)
    batches = [loader.batch(k) for k in range(loader.num_batches or 0)]
    tokens, labels, weights, starts = (np.concatenate(column) for column in zip(*batches, strict=True))
    counted = weights > 0
    assert counted.sum() == 40 * 20 and sorted(labels[counted].tolist()) == sorted(
        token for k in range(40) for token in [*range(101 + k, 120 + k), EOD]
    )
    assert (tokens[counted] != EOD).all()
    first = np.arange(16) == starts
    inside = counted & ~first
    assert np.array_equal(tokens[:, 1:][inside[:, 1:]], labels[:, :-1][inside[:, 1:]])


def test_a_set_shorter_than_a_row_is_evaluated(write_set: Callable, sets: list[str], tmp_path: Path) -> None:
    short = write_set([[1, 2, EOD]], name="short").prefix
    c = config(dict(train=(sets[0],), eval=(f"short={short}",)))
    corpus = open_corpus(c, tmp_path, print)
    batch = evaluation_loader(c, corpus.held_out, corpus.tokenizer).batch(0)
    assert batch.weights.sum() == 2 and batch.labels[batch.weights > 0].tolist() == [2, EOD]


def test_evaluation_sets_have_names(sets: list[str], tmp_path: Path) -> None:
    c = config(dict(train=(sets[0],), eval=(f"web={sets[0]}", f"books={sets[1]}", f"web={sets[1]}", sets[0])))
    corpus = open_corpus(c, tmp_path, print)
    assert {name: len(parts) for name, parts in corpus.evaluation.items()} == {"web": 2, "books": 1, "": 1}
    assert len(corpus.held_out) == 4 and corpus.num_tokens == 840
    loader = evaluation_loader(c, corpus.evaluation["books"], corpus.tokenizer)
    assert loader.num_batches == 14 and sum(loader.batch(k).weights.sum() for k in range(14)) == 839


def test_whole_documents_are_held_out_where_documents_count(sets: list[str], tmp_path: Path) -> None:
    c = config(dict(train=(sets[0],), split=(0.9, 0.1), packing="best_fit"))
    corpus = open_corpus(c, tmp_path, print)
    assert corpus.training[0].sequences == range(36) and corpus.training[0].stop == 36 * 21 == corpus.held_out[0].start


def test_lengths_and_infill_reach_the_rows(sets: list[str], tmp_path: Path) -> None:
    data = dict(
        train=(sets[1],), seq_lens=("4@0", "16@10"), fim_rate=1.0, fim_tokens=(297, 298, 299), reset_at_eod=True
    )
    c = config(data)
    loader = training_loader(c, open_corpus(c, tmp_path, print))
    assert [loader.batch(step).tokens.shape for step in (0, 9, 10)] == [(16, 4), (16, 4), (4, 16)]
    tokens = np.concatenate([loader.batch(step).tokens for step in range(10, 20)])
    assert (tokens == 297).any() and check(c) == []
    batch = loader.batch(10)
    for row, starts in zip(batch.tokens, batch.starts, strict=True):
        ends = [0, *(np.flatnonzero(row[:-1] == EOD) + 1).tolist()]
        assert starts.tolist() == [max(end for end in ends if end <= t) for t in range(16)]


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (("0.7:a", "0.3:b"), ("0.7/0.1@50:a", "0.3:b"), True),
        (("0.7:a", "0.3:b"), ("0.7/0.1@49:a", "0.3:b"), False),
        (("0.7:a", "0.3:b"), ("0.7:a", "0.3:b", "1@80:c"), True),
        (("0.7:a", "0.3:b"), ("0.3:b", "0.7:a"), False),
        (("a",), ("a", "b"), False),
        (("a",), ("moved/a",), True),
        (("a",), ("b",), False),
    ],
)
def test_what_was_read_is_sets_wherever_they_lie_and_their_weights_until_then(
    before: tuple, after: tuple, same: bool
) -> None:
    one, other = (sets_read(entries, [entry[-1] for entry in entries], steps=50) for entries in (before, after))
    assert (one == other) == same


def test_one_text_has_one_set() -> None:
    assert sets_read((), ["x"], steps=50) == [("x", [])] != sets_read((), ["y"], steps=50)


@pytest.mark.parametrize(
    ("data", "train", "where"),
    [
        (dict(order="megatron", packing="best_fit"), {}, "data.packing"),
        (dict(packing="best_fit", reset_at_eod=True), {}, "data.reset_at_eod"),
        (dict(order="megatron", train=("1/2@5:a",)), {}, "data.train"),
        (dict(order="megatron"), dict(seed=2**32), "train.seed"),
        (dict(fim_tokens=(1, 2, 3)), {}, "data.fim_tokens"),
        (dict(fim_rate=0.5), {}, "data.fim_tokens"),
        (dict(fim_rate=0.5, fim_tokens=(1, 2, 3), packing="best_fit"), {}, "data.fim_rate"),
        (dict(seq_lens=("5@0",)), {}, "data.seq_lens"),
        (dict(seq_lens=("4@9", "8@9")), {}, "data.seq_lens"),
        (dict(seq_lens=("4",)), {}, "data.seq_lens"),
        ({}, dict(batch_ramp=(2, 3, 10)), "train.batch_ramp"),
        ({}, dict(batch_ramp=(2, 1)), "train.batch_ramp"),
        ({}, dict(batch_ramp=(2, 1, 10), accumulate=2), "train.batch_ramp"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(data: dict, train: dict, where: str) -> None:
    assert [p.where.partition("=")[0] for p in problems(dict(train=("a",)) | data, **train)] == [where]


def test_a_sentinel_outside_the_vocabulary_is_refused(sets: list[str], tmp_path: Path) -> None:
    c = config(dict(train=(sets[0],), fim_rate=0.5, fim_tokens=(298, 299, 300)))
    with pytest.raises(UserError, match="300\n.*not below the vocabulary size, 300"):
        training_loader(c, open_corpus(c, tmp_path, print))


def test_a_set_without_a_weight_beside_one_with_is_refused(sets: list[str], tmp_path: Path) -> None:
    cases = (
        ((f"1:{sets[0]}", sets[1]), "has no weight"),
        ((f"1/0@5:{sets[0]}",), "every weight is 0"),
        ((f"1/2@9/3@5:{sets[0]}",), "do not rise"),
    )
    for entries, rule in cases:
        c = dataclasses.replace(config(dict(train=entries)))
        with pytest.raises(UserError, match=rule):
            training_loader(c, open_corpus(c, tmp_path, print))
