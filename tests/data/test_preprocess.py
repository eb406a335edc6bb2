from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import documents
from jaxlm.data.documents import expand, parse, read_chunks
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.preprocess import main
from jaxlm.data.tokenizer import load_tokenizer

TEXTS = ["hello world", "", "naïve 日本 🙂", "x" * 5000, "\n", "a\\u2028b"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def documents_of(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer("bytes")
    return [tokenizer.decode(dataset[k]) for k in range(len(dataset))]


def preprocess(tmp_path: Path, *arguments: object) -> int:
    """The command's exit code; what it refuses is on stderr."""
    options = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "1"]
    try:
        return main([*options, *map(str, arguments)])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def test_the_command_says_error_and_exits_with_2(
    tmp_path: Path, run_module: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_module("jaxlm.data.preprocess", "--input", "no.txt", "--output-prefix", "o", "--tokenizer", "bytes")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 3
    assert done.stderr.startswith("error: --input: no.txt\n  matches no file from ")


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst"])
def test_every_kind_of_json_lines_gives_its_documents_in_order(tmp_path: Path, ending: str) -> None:
    halves = [jsonl(TEXTS[:3]), b"\n  \n" + jsonl(TEXTS[3:]).rstrip(b"\n")]
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(ending[-3:].lstrip("."), bytes)
    path = tmp_path / f"in.{ending}"
    path.write_bytes(b"".join(map(compress, halves)))  # compressed files may be several streams end to end
    assert preprocess(tmp_path, "--input", path) == 0
    assert documents_of(tmp_path / "out_text_document") == [text for text in TEXTS if text]


def test_a_plain_file_is_one_document_and_files_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "a.py").write_bytes("print('é')\n".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    (tmp_path / "empty.txt").write_bytes(b"")
    files = [tmp_path / name for name in ("b.txt", "a.py", "empty.txt", "c.txt.gz")]
    assert preprocess(tmp_path, "--append-eod", "--input", *files) == 0
    end = "<|endoftext|>"
    assert documents_of(tmp_path / "out_text_document") == [f"one\r\ntwo{end}", f"print('é')\n{end}", f"zipped{end}"]


def test_each_key_gets_its_own_set(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"title": "t1", "text": "one"}\n{"text": "two", "title": ""}\n')
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--json-keys", "title", "text") == 0
    assert documents_of(tmp_path / "out_title_document") == ["t1"]
    assert documents_of(tmp_path / "out_text_document") == ["one", "two"]


def test_the_set_is_the_same_for_any_number_of_workers(
    tmp_path: Path, gpt2_folder: Path, run_module: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    lengths = np.random.default_rng(0).integers(0, 4000, 2500)
    texts = [("hello world naïve 日本 " * 200)[: int(n)] for n in lengths]
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    assert (tmp_path / "in.jsonl").stat().st_size > 4 * documents.CHUNK_BYTES
    (tmp_path / "plain.txt").write_text("hello")
    for workers in (1, 3):
        command = ["--input", "in.jsonl", "plain.txt", "--output-prefix", f"w{workers}", "--append-eod"]
        done = run_module("jaxlm.data.preprocess", *command, "--tokenizer", f"gpt2:{gpt2_folder}", "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert f"{sum(map(bool, texts)) + 1:,} documents" in done.stdout
    for ending in ("bin", "idx"):
        ours, theirs = (tmp_path / f"w{workers}_text_document.{ending}" for workers in (1, 3))
        assert ours.read_bytes() == theirs.read_bytes()


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=9)), sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_chunks_are_the_file_cut_at_lines_with_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes], sizes: tuple[int, int]
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", sizes[0])
    monkeypatch.setattr(documents, "_READ_BYTES", sizes[1])
    content = b"\n".join(lines)
    (tmp_path / "in.jsonl").write_bytes(content)
    seen: list[int] = []
    chunks = list(read_chunks(str(tmp_path / "in.jsonl"), on_read=seen.append))
    assert b"".join(chunk.data for chunk in chunks) == content and sum(seen) == len(content)
    for before, chunk in zip(chunks, chunks[1:], strict=False):
        assert before.data.endswith(b"\n")
        assert chunk.first_line == before.first_line + before.data.count(b"\n")


BAD = [
    (b"{nonsense", "is not JSON"),
    (b'{"text": "caf\xe9"}', "is not JSON"),
    (b'{"text": "\xed\xa0\x80"}', "is not JSON"),
    (b"[1]", "is a JSON list, not an object"),
    (b'{"content": "x"}', "has no key 'text'; its keys: 'content'"),
    (b'{"text": 5}', "holds a int under 'text', not a string"),
    (b'{"text": "a\\ud800b"}', "holds under 'text' '\\ud800', half of a surrogate pair"),
    (b"[" * 100_000, "is not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_an_error_with_its_number_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["good", "too"]) + b"\n" + line + b"\n" + jsonl(["more"]))
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl") == 2
    error = capsys.readouterr().err
    assert f"in.jsonl, line 4\n  {reason}" in error
    assert error.count("\n") == 3 and "--max-bad-lines" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_bad_lines_up_to_the_threshold_are_skipped_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"".join(line + b"\n" + jsonl([f"good{k}"]) for k, (line, _) in enumerate(BAD))
    (tmp_path / "in.jsonl").write_bytes(lines)
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", len(BAD) - 1) == 2
    assert f"line {2 * len(BAD) - 1}\n" in capsys.readouterr().err
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", len(BAD)) == 0
    report = capsys.readouterr().out
    for k, (_, reason) in enumerate(BAD):
        assert f"line {2 * k + 1}: " in report and reason in report
    assert documents_of(tmp_path / "out_text_document") == [f"good{k}" for k in range(len(BAD))]


def test_existing_sets_are_replaced_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("first")
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt") == 0
    (tmp_path / "in.txt").write_text("second")
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert documents_of(tmp_path / "out_text_document") == ["first"]
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt", "--overwrite") == 0
    assert documents_of(tmp_path / "out_text_document") == ["second"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("latin.txt", b"caf\xe9", "latin.txt, byte 3\n  is not UTF-8"),
        (
            "short.jsonl.gz",
            gzip.compress(jsonl(["x" * 99]), mtime=0)[:-9],
            "is damaged: the compressed stream is cut short",
        ),
        (
            "short.jsonl.zst",
            zstandard.compress(jsonl(["x" * 99]))[:-3],
            "is damaged: the compressed stream is cut short",
        ),
        ("wrong.jsonl.gz", b"not gzip", "is damaged"),
        ("wrong.jsonl.zst", b"not zstd", "is damaged"),
        ("empty.txt", b"", "holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert preprocess(tmp_path, "--input", tmp_path / name) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--max-bad-lines", "-1"], "--max-bad-lines -1"),
        (["--json-keys", "a/b"], "--json-keys ['a/b']"),
        (["--json-keys", "a", "a"], "names a key twice"),
        (["--tokenizer", "bites"], "did you mean bytes"),
        (["--input", "nowhere.txt"], "matches no file"),
    ],
)
def test_wrong_options_get_exit_code_2_and_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    (tmp_path / "in.txt").write_text("x")
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt", *arguments) == 2
    assert expected in capsys.readouterr().err


def test_eod_cannot_be_appended_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "chars.json").write_text('{"chars": ["x"]}')
    chars = f"chars:{tmp_path / 'chars.json'}"
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt", "--tokenizer", chars, "--append-eod") == 2
    assert "has no end-of-document token" in capsys.readouterr().err


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = [
        "input",
        "output-prefix",
        "tokenizer",
        "json-keys",
        "append-eod",
        "workers",
        "max-bad-lines",
        "overwrite",
    ]
    assert all(f"--{option}" in text for option in options) and "Exit codes" in text


def test_workers_die_with_a_killed_parent_and_leave_no_set(tmp_path: Path, environment: dict[str, str]) -> None:
    os.mkfifo(tmp_path / "in.jsonl")  # never ends, so that the command is alive when it is killed
    command = [sys.executable, "-m", "jaxlm.data.preprocess", "--input", "in.jsonl", "--output-prefix", "out"]
    parent = subprocess.Popen(
        [*command, "--tokenizer", "bytes", "--workers", "2"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    )
    pipe = os.open(tmp_path / "in.jsonl", os.O_RDWR)  # does not wait for a reader
    threading.Thread(target=os.write, args=(pipe, jsonl(["x" * 1000] * 3000)), daemon=True).start()
    children = wait_for(lambda: found if len(found := children_of(parent.pid)) >= 2 else None)
    time.sleep(0.2)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children) or None)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".jsonl", ".tmp"}


KILLED = """
import os, signal, sys
from jaxlm.data import documents, preprocess
from jaxlm.settings import run_main
documents.CHUNK_BYTES, documents._READ_BYTES, documents.SHARD_CHUNKS, left = 5000, 1000, 4, int(sys.argv[1])
write = preprocess.Journal.write

def deadly(self, totals, marks):
    global left
    write(self, totals, marks)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

preprocess.Journal.write = deadly
sys.argv[1:] = sys.argv[2:]
run_main(preprocess.main)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_command_goes_on_from_its_last_shard_to_the_same_bytes(
    tmp_path: Path, environment: dict[str, str], workers: int
) -> None:
    texts = [f"document {k} " + "naïve 日本 " * (k % 50) for k in range(600)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:400]) + b"{bad\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[400:]), mtime=0))

    def run(prefix: str, moment: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(moment), "--input", "a.jsonl", "b.jsonl.gz", "--append-eod"]
        options = ["--tokenizer", "bytes", "--workers", str(workers), "--output-prefix", prefix, "--max-bad-lines", "1"]
        return subprocess.run(
            [*command, *options, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert run("whole", 0).returncode == 0
    for moment in (1, 3):  # the second counts from where the first left
        assert run("out", moment).returncode == -signal.SIGKILL
    done = run("out", 0)
    assert done.returncode == 0 and "going on after" in done.stderr and "1 allowed" not in done.stderr
    assert "skipped: a.jsonl, line 401" in done.stdout and "600 documents" in done.stdout
    for ending in ("bin", "idx"):
        assert (tmp_path / f"out_text_document.{ending}").read_bytes() == (
            tmp_path / f"whole_text_document.{ending}"
        ).read_bytes()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.json"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(documents, "_READ_BYTES", 1000)
    monkeypatch.setattr(documents, "SHARD_CHUNKS", 4)


def test_an_error_keeps_the_shards_before_it_and_its_remedy_goes_on_from_them(
    tmp_path: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"document {k} " + "naïve 日本 " * 50 for k in range(900)]
    (tmp_path / "in.jsonl").write_bytes(b"{bad\n" + jsonl(texts[:600]) + b"{bad\n" + jsonl(texts[600:]))
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", 1) == 2
    error = capsys.readouterr().err
    assert "bad line 2, 1 allowed" in error and "MB of text are done: the same command goes on from there" in error
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl") == 2  # fewer than were skipped already
    error = capsys.readouterr().err
    assert "--max-bad-lines 0\n  1 lines were skipped" in error and "in.jsonl, line 1: is not JSON" in error
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", 2) == 0
    out, error = capsys.readouterr()
    assert "going on after" in error and "in.jsonl, line 1:" in out and "in.jsonl, line 602:" in out
    done_megabytes = float(error.split("going on after ")[1].split()[0])
    assert float(out.splitlines()[-1].split()[0]) < (tmp_path / "in.jsonl").stat().st_size / 1e6 - done_megabytes + 0.1
    assert documents_of(tmp_path / "out_text_document") == texts
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".jsonl"]


def test_a_set_that_is_to_be_replaced_stands_until_the_end(tmp_path: Path, small_shards: None) -> None:
    (tmp_path / "in.txt").write_text("older")
    assert preprocess(tmp_path, "--input", tmp_path / "in.txt") == 0
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 100] * 400) + b"{bad\n")
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--overwrite") == 2
    assert documents_of(tmp_path / "out_text_document") == ["older"]
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", 1) == 2  # without --overwrite
    assert documents_of(tmp_path / "out_text_document") == ["older"]
    assert preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--max-bad-lines", 1, "--overwrite") == 0
    assert len(documents_of(tmp_path / "out_text_document")) == 400


# Runs the command in a process for each change of a name, killed after it, and once more to the end.
KILLED_AT_THE_END = """
import itertools, os, pathlib, signal, sys
from jaxlm.data import documents, indexed, preprocess
documents.CHUNK_BYTES, documents._READ_BYTES, documents.SHARD_CHUNKS = 2000, 1000, 4

for moment in itertools.count(1):
    command = ["--input", "in.jsonl", "--json-keys", "a", "b", "--tokenizer", "bytes", "--workers", "1"]
    command += ["--output-prefix", f"{moment}/out"]
    child = os.fork()
    if not child:
        left = moment
        def deadly(change):
            def call(*args, **kwargs):
                global left
                change(*args, **kwargs)
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call
        os.replace, pathlib.Path.unlink = deadly(os.replace), deadly(pathlib.Path.unlink)
        preprocess.main(command)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    if pathlib.Path(f"{moment}/out.preprocess.json").exists():  # else it had nothing left to do
        preprocess.main(command)
"""


def test_a_command_killed_while_it_closes_its_sets_goes_on_to_the_same_bytes(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    record = [{"a": f"first {k}" * 9, "b": f"second {k}" * 5} for k in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    command = [sys.executable, "-c", KILLED_AT_THE_END]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    folders = sorted((path for path in tmp_path.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    names = [f"out_{key}_document.{ending}" for key in "ab" for ending in ("bin", "idx")]
    contents = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in folders]
    assert all(sorted(path.name for path in folder.iterdir()) == names for folder in folders)
    assert len(folders) > 12 and all(content == contents[-1] for content in contents)


def test_another_command_does_not_go_on_from_what_a_killed_one_left(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 400] * 200))
    command = [
        sys.executable,
        "-c",
        KILLED,
        "1",
        "--input",
        "a.jsonl",
        "--tokenizer",
        "bytes",
        "--output-prefix",
        "out",
    ]
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == -signal.SIGKILL
    (tmp_path / "a.jsonl").write_bytes(jsonl(["y" * 400] * 200))
    assert preprocess(tmp_path, "--input", tmp_path / "a.jsonl") == 0
    assert set("".join(documents_of(tmp_path / "out_text_document"))) == {"y"}


MEASURED = """
import re, sys
from jaxlm.data.preprocess import main
code = main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)  # ru_maxrss has its parent's in it
sys.exit(code)
"""


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_input(tmp_path: Path, environment: dict[str, str]) -> None:
    peaks = []
    for megabytes in (20, 400):
        block = jsonl(["naïve 日本 and a line of text " * 30] * 100)
        with open(tmp_path / "in.jsonl", "wb") as file:
            for _ in range(megabytes * 10**6 // len(block)):
                file.write(block)
        command = [sys.executable, "-c", MEASURED, "--input", "in.jsonl", "--output-prefix", f"o{megabytes}"]
        options = ["--tokenizer", "bytes", "--append-eod", "--workers", "1"]
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    print(f"peak {peaks[0] / 1e6:.0f} MB for 20 MB of input, {peaks[1] / 1e6:.0f} MB for 400 MB")
    assert peaks[1] < 1.1 * peaks[0]


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_for(ready: Callable[[], object], *, timeout_s: float = 20) -> list:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (value := ready()) is not None:
            return value  # type: ignore[return-value]
        time.sleep(0.02)
    raise TimeoutError


def test_patterns_expand_sorted_once_and_literally(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "a[1].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [
        os.path.relpath(path, tmp_path)
        for path in expand(
            (f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", f"{tmp_path}/a[1].txt", f"{tmp_path}/**/c.txt"), setting="x"
        )
    ]
    assert names == ["b.txt", "a.txt", "a[1].txt", "sub/c.txt"]
    with pytest.raises(UserError) as refusal:
        expand((f"{tmp_path}/*.md", f"{tmp_path}/sub"), setting="data.path")
    assert "matches no file" in str(refusal.value) and "is a folder" in str(refusal.value)


def test_a_byte_order_mark_is_no_bad_line() -> None:
    assert parse(documents.Chunk("f", 1, b"\xef\xbb\xbf" + jsonl(["x"])), keys=("text",)) == ([["x"]], [])
