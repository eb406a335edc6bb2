from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.data import documents
from jaxlm.data import prepare as prepare_module
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.prepare import Prepared, prepare

TEXTS = {"a.txt": "hello\n", "b.txt": "naïve 日本\n", "c.txt": "world"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(sources: Path, tmp_path: Path) -> Callable[..., tuple[Prepared, list[str]]]:
    """run(spec="bytes", text_key="text", pattern="*.txt"): prepare, and what it logged."""

    def call(
        spec: str = "bytes", *, text_key: str = "text", pattern: str = "*.txt", folder: str = "data"
    ) -> tuple[Prepared, list[str]]:
        lines: list[str] = []
        paths = (f"{sources}/{pattern}",)
        where = tmp_path / folder
        return prepare(paths, tokenizer_spec=spec, text_key=text_key, folder=where, log=lines.append), lines

    return call


def text_of(prepared: Prepared) -> str:
    return prepared.tokenizer.decode(IndexedDataset(prepared.prefix).tokens)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, reading a source fails."""

    def forbid() -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("a source was read")

        monkeypatch.setattr(prepare_module, "read_chunks", fail)
        monkeypatch.setattr(documents, "read_chunks", fail)
        monkeypatch.setattr(prepare_module, "_sha256", fail)

    return forbid


def test_documents_lie_in_sorted_order_each_ended(run: Callable) -> None:
    prepared, lines = run()
    assert text_of(prepared) == "".join(TEXTS[name] + "<|endoftext|>" for name in sorted(TEXTS))
    assert len(lines) == 1 and "tokenized 3 files" in lines[0]


def test_a_rerun_reads_no_source(run: Callable, no_reading: Callable[[], None]) -> None:
    first, _ = run()
    no_reading()
    second, lines = run()
    assert (first.prefix, text_of(first)) == (second.prefix, text_of(second))
    assert len(lines) == 1 and "made earlier" in lines[0]


def test_chars_are_the_sorted_characters_of_the_corpus(run: Callable, no_reading: Callable[[], None]) -> None:
    first, _ = run("chars")
    assert text_of(first) == "".join(TEXTS.values())
    assert first.tokenizer.chars == "".join(sorted(set("".join(TEXTS.values()))))
    assert first.tokenizer.eod is None
    no_reading()
    second, _ = run("chars")
    assert text_of(second) == text_of(first)


@pytest.mark.parametrize("file", ["chars.json", "corpus.bin", "corpus.idx"])
def test_a_set_that_lost_a_file_is_made_again_to_the_same_bytes(run: Callable, tmp_path: Path, file: str) -> None:
    run("chars")
    before = files_of(tmp_path / "data")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:5])):
        damage(tmp_path / "data" / file)
        _, lines = run("chars")
        assert "tokenizing again" in lines[0] and file in lines[0]
        assert files_of(tmp_path / "data") == before


def test_other_settings_make_the_set_again_and_say_why(
    run: Callable, sources: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    (sources / "d.jsonl").write_text('{"text": "one", "body": "two"}\n')
    run(pattern="d.jsonl")
    again, lines = run(pattern="d.jsonl", text_key="body")
    assert "data.text_key was text, is body" in lines[0]
    assert text_of(again) == "two<|endoftext|>"
    _, lines = run("chars", pattern="d.jsonl", text_key="body")
    assert "data.tokenizer was bytes, is chars" in lines[0]
    again, lines = run("chars")
    assert "data.path was" in lines[0]
    assert text_of(again) == "".join(TEXTS.values())
    mine = tmp_path / "gpt2"
    mine.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (mine / name).write_bytes((gpt2_folder / name).read_bytes())
    run(f"gpt2:{mine}")
    (mine / "merges.txt").write_text("#version: 0.2\nh e\n")
    again, lines = run(f"gpt2:{mine}")
    assert "tokenizer files was" in lines[0]
    assert IndexedDataset(again.prefix).num_tokens == sum(len(t.encode()) + 1 for t in TEXTS.values()) - 1


def test_a_source_that_changed_is_refused_until_it_is_restored(run: Callable, sources: Path, tmp_path: Path) -> None:
    run()
    before = files_of(tmp_path / "data")
    changed = sources / "b.txt"
    original = changed.read_text()
    for text in (original + "!", original.replace("n", "m")):  # another size; the same size
        changed.write_text(text)
        with pytest.raises(UserError) as refusal:
            run()
        assert "b.txt" in str(refusal.value) and "fresh workdir" in str(refusal.value)
        assert "a.txt" not in str(refusal.value)
        assert files_of(tmp_path / "data") == before
    changed.write_text(original)
    prepared, lines = run()
    assert "made earlier" in lines[0] and "naïve" in text_of(prepared)


def test_a_source_that_was_only_touched_is_read_once(
    run: Callable, sources: Path, no_reading: Callable[[], None]
) -> None:
    run()
    os.utime(sources / "a.txt", ns=(0, 123_456_789))
    _, lines = run()
    assert "made earlier" in lines[0]
    no_reading()
    run()


def test_a_source_that_came_later_is_refused(run: Callable, sources: Path) -> None:
    run()
    (sources / "aa.txt").write_text("new")
    with pytest.raises(UserError, match=r"aa\.txt\n  was not there"):
        run()


def test_sources_that_are_gone_do_not_matter(run: Callable, sources: Path) -> None:
    first, _ = run()
    (sources / "a.txt").unlink()
    assert text_of(run()[0]) == text_of(first)
    for path in sources.iterdir():
        path.unlink()
    assert text_of(run()[0]) == text_of(first)


def test_what_cannot_be_prepared_is_refused_and_leaves_the_old_set(
    run: Callable, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="matches no file"):
        run(pattern="*.md")
    with pytest.raises(UserError, match=r"data\.path\n  names no file"):
        prepare((), tokenizer_spec="bytes", text_key="text", folder=tmp_path / "data", log=print)
    run()
    before = files_of(tmp_path / "data")
    (sources / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    (sources / "latin.txt2").write_bytes(b"caf\xe9")
    (sources / "empty.txt2").write_bytes(b"")
    for pattern, expected in (("*.jsonl", "line 2"), ("latin*", "UTF-8"), ("empty*", "holds no text")):
        for spec in ("bytes", "chars"):
            with pytest.raises(UserError, match=expected):
                run(spec, pattern=pattern)
            assert files_of(tmp_path / "data") == before
    assert "made earlier" in run()[1][0]


def test_a_damaged_manifest_is_no_manifest(run: Callable, tmp_path: Path) -> None:
    run()
    before = files_of(tmp_path / "data")
    for content in (b"", b"{", b"[]", b"{}", b'{"settings": 1, "sources": [], "set": {}}', b'{"sources": [3]}'):
        (tmp_path / "data" / "manifest.json").write_bytes(content)
        _, lines = run()
        assert "damaged" in lines[0]
        assert files_of(tmp_path / "data") == before


# Prepares in a process for each change of the file system, which is killed before or after that change.
KILLED = """
import itertools, os, sys
from deadly import arm, changes_kill
from jaxlm.data.prepare import prepare

sources, when, before_spec = sys.argv[1:]

def make(spec, folder):
    prepare((sources + "/*.txt",), tokenizer_spec=spec, text_key="text", folder=folder, log=print)

for moment in itertools.count(1):
    if before_spec:
        make(before_spec, f"killed{moment}")
    child = os.fork()
    if not child:
        changes_kill(before=when == "before")
        arm(moment)
        make("chars", f"killed{moment}")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize(("before_spec", "when"), [("", "after"), ("bytes", "before")])
def test_a_kill_at_any_moment_leaves_the_rerun_to_give_the_same_bytes(
    run: Callable, sources: Path, tmp_path: Path, before_spec: str, when: str, environment: dict[str, str]
) -> None:
    run("chars", folder="clean")
    clean = files_of(tmp_path / "clean")
    command = [sys.executable, "-c", KILLED, str(sources), when, before_spec]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    folders = [path for path in tmp_path.iterdir() if path.name.startswith("killed")]
    assert len(folders) > 10
    for folder in folders:
        if (folder / "manifest.json").exists():  # then the set it tells of is there, whole
            manifest = json.loads((folder / "manifest.json").read_bytes())
            assert IndexedDataset(folder / "corpus").num_tokens == manifest["set"]["tokens"]
            made_with = manifest["settings"]["data.tokenizer"]
            assert "made earlier" in run(made_with, folder=folder.name)[1][0]
        run("chars", folder=folder.name)
        assert files_of(folder) == clean


def test_processes_that_share_a_folder_build_once(sources: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    script = (
        "import sys; from jaxlm.data.prepare import prepare\n"
        "prepare((sys.argv[1],), tokenizer_spec='chars', text_key='text', folder='data', log=print)"
    )
    command = [sys.executable, "-c", script, f"{sources}/*.txt"]
    racers = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sum("tokenized 3 files" in output for output in outputs) == 1
    assert sum("made earlier" in output for output in outputs) == 3
