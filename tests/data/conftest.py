"""Small token sets and tokenizers, made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import jaxlm.config
from jaxlm.data.indexed import IndexedDataset, IndexedWriter

ROOT = Path(jaxlm.config.__file__).parents[1]


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """write_set(documents, name=..., dtype=...): a set on disk, opened."""

    def write(documents: Sequence[Sequence[int]], *, name: str = "set", dtype: str = "u2") -> IndexedDataset:
        with IndexedWriter(tmp_path / name, dtype=dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document, np.int64))
        return IndexedDataset(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's files, with a vocabulary of the 256 bytes, a few merges and the end of document.

    Some merges join what pretokenisation keeps apart, so that a wrong cut shows in the ids.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    merges = [
        "h e",
        "l l",
        "he ll",
        "hell o",
        "Ġ w",
        "o r",
        "Ġw or",
        "Ġ Ġ",
        "o Ġ",
        "s '",
        "' s",
        "0 a",
        ". '",
        "Ċ Ċ",
        "Ċ b",
    ]
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.fixture
def run_module(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_module("jaxlm.data.verify", ...): the command, run from tmp_path."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment in which a subprocess finds this jaxlm, and what stands beside these tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
