from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.data import verify as verify_module
from jaxlm.data.verify import main


def test_a_sound_set_is_told_with_its_checksums(
    write_set: Callable, tmp_path: Path, run_module: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    write_set([[1, 2, 3], [99]])
    done = run_module("jaxlm.data.verify", "set", "--vocab-size", 100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 documents, 2 sequences, 4 tokens of uint16, largest id 99" in done.stdout
    for ending in ("bin", "idx"):
        assert hashlib.sha256((tmp_path / f"set.{ending}").read_bytes()).hexdigest() in done.stdout


@pytest.mark.parametrize("block", [3, 1 << 22])
def test_a_bad_token_is_named_and_the_other_sets_are_still_checked(
    write_set: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    block: int,
) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK_TOKENS", block)
    write_set([[1, 2, 3, 4, 100, 5]], name="large", dtype="u2")
    write_set([[1, 2, 3, 4, -1, 5]], name="negative", dtype="i4")
    write_set([[1, 2]], name="sound")
    names = [str(tmp_path / name) for name in ("large", "negative", "nowhere", "sound")]
    with pytest.raises(UserError) as refusal:
        main([*names, "--vocab-size", "100"])
    out, err = capsys.readouterr().out, str(refusal.value)
    assert f"{names[0]}.bin, token 4 (byte 8)\n  token id 100 is not in [0, 100)" in err
    assert f"{names[1]}.bin, token 4 (byte 16)\n  token id -1 is not in [0, 100)" in err
    assert "nowhere.idx is not a file" in err
    assert out.startswith(f"{names[3]}: sound")
    assert main([names[0], names[3]]) == 0


def test_an_empty_set_is_sound(write_set: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set([])
    assert main([str(tmp_path / "set")]) == 0
    assert "0 documents, 0 sequences, 0 tokens" in capsys.readouterr().out
