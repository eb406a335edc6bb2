from __future__ import annotations

import numpy as np

from jaxlm.data.infill import Infill
from jaxlm.data.tokenizer import load_tokenizer

PRE, MID, SUF, EOD = 300, 301, 302, 256
TEXTS = [
    "def f(x): return x + 1",
    "naïve 日本 and more text here",
    "",
    "short",
    "another document that goes on a while",
]


def row() -> np.ndarray:
    tokenizer = load_tokenizer("bytes")
    return np.concatenate([[*tokenizer.encode(text), EOD] for text in TEXTS])[:-1].astype(np.int32)


def infill(*, rate: float = 1.0, spm_rate: float = 0.5, seed: int = 1) -> Infill:
    return Infill(load_tokenizer("bytes"), seed, rate, spm_rate, (PRE, MID, SUF))


def segments(tokens: np.ndarray) -> list[list[int]]:
    ends = [*np.flatnonzero(tokens == EOD).tolist(), len(tokens)]
    return [tokens[a:b].tolist() for a, b in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def test_a_rewritten_document_is_its_three_parts_with_the_end_of_the_suffix_cut_off() -> None:
    tokenizer, kinds = load_tokenizer("bytes"), set()
    for index in range(40):
        made = infill()(row(), index)
        assert len(made) == len(row()) and np.array_equal(made == EOD, row() == EOD)
        for text, tokens in zip(TEXTS, segments(made), strict=True):
            if PRE not in tokens:
                assert tokenizer.decode(tokens) == text
                kinds.add("as it was")
                continue
            suffix_first = tokens[1] == SUF
            marks = sorted((tokens.index(mark), mark) for mark in (PRE, SUF, MID))
            parts = {
                mark: tokens[at + 1 : end]
                for (at, mark), end in zip(marks, [a for a, _ in marks[1:]] + [len(tokens)], strict=True)
            }
            if suffix_first:  # PRE SUF suffix MID prefix middle
                assert [mark for _, mark in marks] == [PRE, SUF, MID] and parts[PRE] == []
                known = tokenizer.decode(parts[MID])
            else:
                assert [mark for _, mark in marks] == [PRE, SUF, MID]
                known = tokenizer.decode(parts[PRE] + parts[MID])
            assert text.startswith(known)
            rest = text[len(known) :].encode()
            assert bytes(parts[SUF]) == rest[: len(rest) - 3]
            kinds.add(suffix_first)
    assert kinds == {True, False, "as it was"}


def test_what_is_rewritten_depends_on_the_seed_and_the_sample_alone() -> None:
    rows = [infill()(row(), index).tolist() for index in (3, 4, 3)]
    assert rows[0] == rows[2] != rows[1]
    assert infill(seed=2)(row(), 3).tolist() != rows[0]
    assert infill(rate=0.0)(row(), 3).tolist() == row().tolist()


def test_rates_are_rates() -> None:
    text = np.concatenate([[*load_tokenizer("bytes").encode("a longer text " * 4), EOD]] * 50).astype(np.int32)
    made = np.concatenate([infill(rate=0.3, spm_rate=0.9)(text, index) for index in range(40)])
    count = (made == PRE).sum() / 2000
    assert abs(count - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5  # five standard deviations of 2,000 draws
    first = (made[1:][made[:-1] == PRE] == SUF).mean()
    assert abs(first - 0.9) < 5 * (0.9 * 0.1 / 600) ** 0.5 + 1 / 50  # and an empty prefix looks the same


def test_a_row_that_begins_within_a_character_is_left_alone() -> None:
    tokens = load_tokenizer("bytes").encode("日本 and a tail that is long enough")[1:]
    assert np.array_equal(infill()(tokens, 0), tokens)
