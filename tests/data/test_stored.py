"""Sets in a bucket, through tensorstore's own store of files: what a bucket would serve is served from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data import merge, verify
from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.data.loader import Loader, Ramp
from jaxlm.data.packing import Packed
from jaxlm.data.samples import MegatronSamples, Windows, whole


@pytest.fixture
def both(write_set: Callable) -> tuple[IndexedDataset, IndexedDataset]:
    """A set on disk, and the same in a bucket."""
    mine = write_set([[*range(k, k + 11), 99] for k in range(40)])
    return mine, IndexedDataset(f"file://{mine.prefix}")


def test_a_set_in_a_bucket_is_the_set(both: tuple[IndexedDataset, IndexedDataset], tmp_path: Path) -> None:
    mine, stored = both
    assert stored.fingerprint() == mine.fingerprint() and stored.num_tokens == 480
    assert all(np.array_equal(mine[k], stored[k]) for k in (0, 7, 39))
    for order in (Windows, Packed, MegatronSamples):
        batches = []
        for dataset in both:
            sized, part = dict(seq_len=16, seed=3), whole(dataset)
            samples = (
                order(part, num_samples=50, **sized)
                if order is MegatronSamples
                else order([part], shuffle=True, **sized)
            )
            batches.append(Loader(samples, Ramp(8), eod=99, vocab_size=100, separates=True).batch(5))
        assert all(np.array_equal(x, y) for x, y in zip(*batches, strict=True))
    assert verify.verify(stored.prefix).splitlines()[1:] == verify.verify(mine.prefix).splitlines()[1:]
    merge.merge([stored.prefix], str(tmp_path / "copy"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"copy.{ending}").read_bytes() == Path(f"{mine.prefix}.{ending}").read_bytes()


def test_what_a_batch_needs_is_asked_for_before_the_first_answer_is_waited_for(
    both: tuple[IndexedDataset, IndexedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, asked = both[1], []
    expect, take = type(stored.tokens).expect, type(stored.tokens).__getitem__
    monkeypatch.setattr(type(stored.tokens), "expect", lambda *span: (asked.append(span[1:]), expect(*span))[1])
    monkeypatch.setattr(
        type(stored.tokens), "__getitem__", lambda self, part: (asked.append(part), take(self, part))[1]
    )
    samples = Windows([whole(stored)], seq_len=16, seed=3, shuffle=True)
    Loader(samples, Ramp(8), eod=99, vocab_size=100).batch(0)
    assert [(part.start, part.stop) for part in asked[8:]] == asked[:8] and not stored.tokens._asked


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda bin_, idx: idx.unlink(), r"set\.idx\n  does not exist"),
        (lambda bin_, idx: bin_.unlink(), r"set\.bin\n  does not exist"),
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes()[:-1]), r"set\.bin\n  cannot be read: .*959, 960"),
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes() + b"x"), r"set\.bin\n  has more than the 960 bytes"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:-3]), r"set\.idx, byte 839\n  file has 839 bytes"),
        (lambda bin_, idx: idx.write_bytes(b"MMIDIDY" + idx.read_bytes()[7:]), r"set\.idx, byte 0\n"),
        (
            lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:38] + b"\1" * 4 + idx.read_bytes()[42:]),
            r"set\.idx, byte",
        ),
    ],
)
def test_what_is_wrong_in_a_bucket_is_named(
    both: tuple[IndexedDataset, IndexedDataset], change: Callable, rule: str
) -> None:
    mine, stored = both
    change(Path(f"{mine.prefix}.bin"), Path(f"{mine.prefix}.idx"))
    with pytest.raises(UserError, match=rule) as refusal:
        IndexedDataset(stored.prefix)
    assert str(refusal.value).startswith(stored.prefix)


def test_a_bucket_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is in a bucket"):
        IndexedWriter(f"gs://bucket/{tmp_path}/set", dtype="u2")


def test_an_empty_set_may_lie_in_a_bucket(write_set: Callable) -> None:
    assert IndexedDataset(f"file://{write_set([]).prefix}").num_tokens == 0
