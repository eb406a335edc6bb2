"""Text named in a config, tokenized once into the workdir and never changed under a checkpoint afterwards.

The folder holds `corpus.bin`, `corpus.idx`, `chars.json` where the tokenizer is `chars`, and `manifest.json`, written
last: what the set was made of. Without a manifest there is no set, so a process killed at any moment leaves either
the former state or a folder that the next run fills anew, to the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.atomic import open_exclusive, sync_folder, write_whole
from jaxlm.data.documents import Chunk, expand, parse, read_chunks
from jaxlm.data.encode import write_documents
from jaxlm.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from jaxlm.data.progress import Progress
from jaxlm.data.tokenizer import CharTokenizer, Tokenizer, build_chars, load_tokenizer, mark_codes

FORMAT = 1  # of the manifest; raised when the same sources would give other tokens


@dataclass(frozen=True)
class Prepared:
    """A token set ready to be opened by `IndexedDataset(prefix)`, and the tokenizer that made it."""

    prefix: str
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Request:
    """What the caller asks for and where it goes."""

    paths: tuple[str, ...]
    spec: str
    text_key: str
    folder: Path

    @property
    def prefix(self) -> str:
        return str(self.folder / "corpus")

    @property
    def chars_file(self) -> Path:
        return self.folder / "chars.json"


def prepare(
    paths: tuple[str, ...],
    *,
    tokenizer_spec: str,
    text_key: str,
    folder: str | os.PathLike[str],
    log: Callable[[str], object],
) -> Prepared:
    """Tokenize the files that `paths` (files or globs) match into `folder`, or reuse what is there.

    Documents follow each other in the order of `paths`, sorted within a glob, each ended by the end-of-document token
    if the tokenizer has one. The set is reused, without reading a source, if the settings are those it was made with
    and no source has another size or time of change; sources that are gone do not matter. With other settings it is
    made anew, and `log` is told why. Processes that share the folder take turns: one builds, the others reuse.
    Raises: UserError if nothing matches, a source cannot be read, or a source changed since the set was made.
    """
    request = _Request(tuple(paths), tokenizer_spec, text_key, Path(folder))
    if not request.paths:
        remedy = "set data.path to text files, or data.train to token sets"
        raise UserError(Problem("data.path", "names no file", remedy))
    tokenizer = None if tokenizer_spec == "chars" else load_tokenizer(tokenizer_spec)
    settings = _settings(request, tokenizer)
    request.folder.mkdir(parents=True, exist_ok=True)
    lock = open_exclusive(request.folder / "lock", wait=False)
    if lock is None:
        log(f"data: waiting for another process that prepares {request.folder}")
        lock = open_exclusive(request.folder / "lock", wait=True)
    assert lock is not None
    with lock:
        tokenizer = _reuse(request, settings, tokenizer, log) or _build(request, settings, tokenizer, log)
    return Prepared(request.prefix, tokenizer)


def _settings(request: _Request, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything but the sources that decides the tokens, as JSON."""
    files = tokenizer.files if tokenizer else ()
    return {
        "format": FORMAT,
        "data.path": list(request.paths),
        "data.tokenizer": request.spec,
        "tokenizer files": {path: _sha256(path) for path in files},
        "data.text_key": request.text_key,
    }


def _reuse(
    request: _Request, settings: dict[str, Any], tokenizer: Tokenizer | None, log: Callable[[str], object]
) -> Tokenizer | None:
    """The tokenizer of the set that is there, or None if no set there answers the request."""
    manifest = _read_manifest(request.folder / "manifest.json", log)
    if manifest is None:
        return None
    made_with = manifest["settings"]
    differing = [name for name in settings if made_with.get(name) != settings[name]]
    changes = [f"{name} was {made_with.get(name)}, is {settings[name]}" for name in differing]
    if changes:
        log(f"data: tokenizing again: {'; '.join(changes)}")
        return None
    _check_sources(request, manifest)
    try:
        num_tokens = IndexedDataset(request.prefix).num_tokens
        tokenizer = tokenizer or load_tokenizer(f"chars:{request.chars_file}")
    except UserError as error:
        log(f"data: tokenizing again: {error.problems[0].where}: {error.problems[0].rule}")
        return None
    if num_tokens != manifest["set"]["tokens"]:
        expected = manifest["set"]["tokens"]
        log(f"data: tokenizing again: {request.prefix} holds {num_tokens} tokens, its manifest says {expected}")
        return None
    log(f"data: {num_tokens:,} tokens in {request.prefix}.bin, made earlier")
    return tokenizer


def _read_manifest(path: Path, log: Callable[[str], object]) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_bytes())
        complete = all({"path", "bytes", "mtime_ns", "sha256"} <= source.keys() for source in manifest["sources"])
        if complete and isinstance(manifest["settings"], dict) and isinstance(manifest["set"]["tokens"], int):
            return manifest
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    log(f"data: tokenizing again: {path} is damaged")
    return None


def _check_sources(request: _Request, manifest: dict[str, Any]) -> None:
    """Refuse sources that are not what the set was made of; note new times of change of those that are."""
    known = {source["path"]: source for source in manifest["sources"]}
    remedy = f"restore what was there, or train with a fresh workdir (this set is in {request.folder})"
    problems, touched = [], False
    for path in _present(request.paths):
        source, stat = known.get(path), os.stat(path)
        if source is None:
            rule = "was not there when the training data was tokenized, and data.path matches it now"
            problems.append(Problem(path, rule, remedy))
        elif stat.st_size != source["bytes"]:
            rule = f"has {stat.st_size} bytes; it had {source['bytes']} when the training data was tokenized"
            problems.append(Problem(path, rule, remedy))
        elif stat.st_mtime_ns != source["mtime_ns"]:
            if _sha256(path) != source["sha256"]:
                problems.append(Problem(path, "has other content than when the training data was tokenized", remedy))
            source["mtime_ns"], touched = stat.st_mtime_ns, True
    if problems:
        raise UserError(*problems)
    if touched:
        _write_manifest(request.folder, manifest)


def _present(patterns: tuple[str, ...]) -> list[str]:
    """Files that the patterns match now, which may be none."""
    files: list[str] = []
    for pattern in patterns:
        try:
            files += expand((pattern,), setting="data.path")
        except UserError:
            continue
    return files


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


class _Source:
    """A source while it is read: what the manifest will say of it."""

    def __init__(self, path: str, *, progress: Progress):
        stat = os.stat(path)
        self.path, self.size, self.mtime_ns = path, stat.st_size, stat.st_mtime_ns
        self._sha256 = hashlib.sha256()
        self._progress = progress

    def chunks(self) -> Iterator[Chunk]:
        return read_chunks(self.path, on_read=self._note)

    def _note(self, raw: bytes) -> None:
        self._sha256.update(raw)
        self._progress.read(raw)

    def record(self) -> dict[str, Any]:
        """For the manifest, once read."""
        return {"path": self.path, "bytes": self.size, "mtime_ns": self.mtime_ns, "sha256": self._sha256.hexdigest()}


def _build(
    request: _Request, settings: dict[str, Any], tokenizer: Tokenizer | None, log: Callable[[str], object]
) -> Tokenizer:
    """Tokenize every source; then replace what an earlier run left, its manifest first and the new one last."""
    files = expand(request.paths, setting="data.path")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # its own threads; no processes beside a trainer
    total_bytes = sum(os.path.getsize(path) for path in files)
    progress = Progress(total_bytes=total_bytes, log=lambda line: log(f"data: {line}"), bar=False)
    chars = _chars_of(request, files) if tokenizer is None else None
    tokenizer = tokenizer or chars
    assert tokenizer is not None
    sources = [_Source(path, progress=progress) for path in files]
    with IndexedWriter(request.prefix, dtype=optimal_dtype(tokenizer.vocab_size)) as writer:
        totals = write_documents(
            (chunk for source in sources for chunk in source.chunks()),
            writers={request.text_key: writer},
            tokenizer=tokenizer,
            append_eod=tokenizer.eod is not None,
            workers=1,
            max_bad_lines=0,
            bad_lines_remedy="mend the line, or tokenize with python -m jaxlm.data.preprocess --max-bad-lines N",
            on_progress=lambda t: progress.written(documents=t.documents, tokens=t.tokens, text_bytes=t.text_bytes),
        )
        if totals.tokens == 0:
            where = f"data.path {' '.join(request.paths)}"
            raise UserError(Problem(where, "holds no text", "name files with text in them"))
        (request.folder / "manifest.json").unlink(missing_ok=True)  # from here until the new one there is no set
        sync_folder(request.folder)
        if chars is not None:
            write_whole(request.chars_file, chars.to_json())
    made = {"tokens": totals.tokens, "documents": totals.documents}
    records = [source.record() for source in sources]
    _write_manifest(request.folder, {"settings": settings, "set": made, "sources": records, "versions": _versions()})
    speed = f"{totals.text_bytes / 1e6:.1f} MB in {progress.elapsed_s:.1f} s"
    log(f"data: tokenized {len(files)} files into {totals.tokens:,} tokens ({speed}): {request.prefix}.bin")
    return tokenizer


def _chars_of(request: _Request, files: list[str]) -> CharTokenizer:
    """The tokenizer of the sorted characters of the corpus."""
    seen = np.zeros(0x110000, bool)
    for path in files:
        for chunk in read_chunks(path, on_read=lambda _: None):
            for text in parse(chunk, keys=(request.text_key,)).texts[0]:
                mark_codes(seen, text)
    path = str(request.chars_file)
    return build_chars(seen, spec=f"chars:{path}", files=(path,))


def _versions() -> dict[str, str]:
    """What made the set, for whoever looks into a difference; no part of the settings."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("tokenizers", "tiktoken", "sentencepiece"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
