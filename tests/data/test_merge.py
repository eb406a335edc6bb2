from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data import inspect, merge
from jaxlm.data.indexed import IndexedDataset, IndexedWriter
from jaxlm.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("block", [1, 2, 1 << 12])
def test_a_merged_set_is_the_sets_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(merge, "_BLOCK_DOCUMENTS", block)
    parts = [[[[1, 2], [3]], [], [[4, 5, 6]]], [], [[[7]], [[], [8, 9]]]]
    for name, groups in (*zip("abc", parts, strict=True), ("whole", [document for part in parts for document in part])):
        with IndexedWriter(tmp_path / name, dtype="u2") as writer:
            for document in groups:
                tokens = np.array([token for sequence in document for token in sequence], np.int64)
                lengths = np.array([*map(len, document)], np.int64)
                writer.add_documents(tokens, lengths=lengths, ends=np.array([len(document)]))
    assert merge.main([*(str(tmp_path / name) for name in "abc"), "--output-prefix", str(tmp_path / "made")]) == 0
    for ending in ("bin", "idx"):
        assert (tmp_path / f"made.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    with pytest.raises(UserError, match="exists"):
        merge.main([str(tmp_path / "a"), "--output-prefix", str(tmp_path / "made")])


def test_sets_of_two_dtypes_do_not_merge(write_set: Callable, tmp_path: Path) -> None:
    for name, dtype in (("a", "u2"), ("b", "i4")):
        write_set([[1, 2]], name=name, dtype=dtype)
    with pytest.raises(UserError, match="holds int32, and .*a uint16"):
        merge.merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "made"))


def test_documents_are_shown_as_text(
    tmp_path: Path, run_module: Callable[..., subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_ = load_tokenizer("bytes")
    with IndexedWriter(tmp_path / "set", dtype="u2") as writer:
        for text in ("naïve", "second", "third"):
            tokens = np.array([*bytes_.encode(text), 256])
            writer.add_documents(tokens, lengths=np.array([len(tokens) - 1, 1]), ends=np.array([2]))
    done = run_module("jaxlm.data.inspect", "set", 2, "--tokenizer", "bytes", "--start", 1)
    assert (
        done.stdout == "--- document 1: 7 tokens\nsecond<|endoftext|>\n--- document 2: 6 tokens\nthird<|endoftext|>\n"
    )
    assert inspect.main([str(tmp_path / "set")]) == 0
    assert capsys.readouterr().out == "--- document 0: 7 tokens\n110 97 195 175 118 101 256\n"
    assert inspect.document(IndexedDataset(tmp_path / "set"), 2).tolist() == [*b"third", 256]
    with pytest.raises(UserError, match="there are 3 documents"):
        inspect.main([str(tmp_path / "set"), "1", "--start", "3"])
