"""Text named in a config, tokenized once into the workdir and never changed under a checkpoint afterwards.

The folder holds `corpus.bin`, `corpus.idx`, `chars.json` where the tokenizer is `chars`, and `manifest.json`, written
last: what the set was made of. Without a manifest there is no set, so a process killed at any moment leaves either
the former state or a folder that the next run fills anew, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import Problem, UserError
from jaxlm.data.atomic import open_exclusive, sync_folder, write_whole
from jaxlm.data.documents import expand, parse, read_chunks
from jaxlm.data.encode import Reader, Totals, write_documents
from jaxlm.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from jaxlm.data.tokenizer import CharTokenizer, Tokenizer, build_chars, load_tokenizer

FORMAT = 1  # of the manifest; raised when the same sources would give other tokens


@dataclass(frozen=True)
class Prepared:
    """A token set ready to be opened by `IndexedDataset(prefix)`, and the tokenizer that made it."""

    prefix: str
    tokenizer: Tokenizer


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
    if not paths:
        remedy = "set data.path to text files, or data.train to token sets"
        raise UserError(Problem("data.path", "names no file", remedy))
    tokenizer = None if tokenizer_spec == "chars" else load_tokenizer(tokenizer_spec)
    job = _Job(paths, tokenizer_spec, text_key, Path(folder), log, tokenizer)
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = open_exclusive(job.folder / "lock", wait=False)
    if lock is None:
        log(f"data: waiting for another process that prepares {job.folder}")
        lock = open_exclusive(job.folder / "lock", wait=True)
    assert lock is not None
    with lock:
        return Prepared(job.prefix, job.reuse() or job.build())


@dataclass
class _Job:
    """What the caller asks for, and where it goes; `tokenizer` is None where the corpus makes it."""

    paths: tuple[str, ...]
    spec: str
    text_key: str
    folder: Path
    log: Callable[[str], object]
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        self.prefix = str(self.folder / "corpus")
        self.chars_file = str(self.folder / "chars.json")
        self.manifest_file = self.folder / "manifest.json"
        # everything but the sources that decides the tokens, as JSON
        self.settings = {
            "format": FORMAT,
            "data.path": list(self.paths),
            "data.tokenizer": self.spec,
            "tokenizer files": {path: _sha256(path) for path in (self.tokenizer.files if self.tokenizer else ())},
            "data.text_key": self.text_key,
        }

    def reuse(self) -> Tokenizer | None:
        """The tokenizer of the set that is there, or None if no set there answers the request."""
        if not self.manifest_file.exists():
            return None
        try:
            manifest = _read_manifest(self.manifest_file)
            made_with, expected = manifest["settings"], manifest["set"]["tokens"]
            differing = [name for name, value in self.settings.items() if made_with.get(name) != value]
            if differing:
                changes = [f"{name} was {made_with.get(name)}, is {self.settings[name]}" for name in differing]
                raise _Unusable("; ".join(changes))
            self._check_sources(manifest)
            try:
                num_tokens = IndexedDataset(self.prefix).num_tokens
                tokenizer = self.tokenizer or load_tokenizer(f"chars:{self.chars_file}")
            except UserError as error:
                raise _Unusable(f"{error.problems[0].where}: {error.problems[0].rule}") from error
            if num_tokens != expected:
                raise _Unusable(f"{self.prefix} holds {num_tokens} tokens, its manifest says {expected}")
        except _Unusable as reason:
            self.log(f"data: tokenizing again: {reason}")
            return None
        self.log(f"data: {num_tokens:,} tokens in {self.prefix}.bin, made earlier")
        return tokenizer

    def _check_sources(self, manifest: dict[str, Any]) -> None:
        """Refuse sources that are not what the set was made of; note new times of change of those that are."""
        known, problems, touched = {source["path"]: source for source in manifest["sources"]}, [], False
        present: list[str] = []
        for pattern in self.paths:
            with suppress(UserError):  # what is gone does not matter
                present += expand((pattern,), setting="data.path")
        for path in present:
            source, stat, rule = known.get(path), os.stat(path), ""
            if source is None:
                rule = "was not there when the training data was tokenized, and data.path matches it now"
            elif stat.st_size != source["bytes"]:
                rule = f"has {stat.st_size} bytes; it had {source['bytes']} when the training data was tokenized"
            elif stat.st_mtime_ns != source["mtime_ns"]:
                if _sha256(path) != source["sha256"]:
                    rule = "has other content than when the training data was tokenized"
                source["mtime_ns"], touched = stat.st_mtime_ns, True
            if rule:
                remedy = f"restore what was there, or train with a fresh workdir (this set is in {self.folder})"
                problems.append(Problem(path, rule, remedy))
        if problems:
            raise UserError(*problems)
        if touched:
            self._write_manifest(manifest)

    def build(self) -> Tokenizer:
        """Tokenize every source; then replace what an earlier run left, its manifest first and the new one last."""
        files = expand(self.paths, setting="data.path")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # its own threads; no processes beside a trainer
        records = [
            {
                "path": path,
                "bytes": (stat := os.stat(path)).st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": _sha256(path),
            }
            for path in files
        ]
        tokenizer, totals = self.tokenizer or self._chars_of(files), Totals()
        reader = Reader(files, log=lambda line: self.log(f"data: {line}"), bar=False)
        with IndexedWriter(self.prefix, dtype=optimal_dtype(tokenizer.vocab_size)) as writer:
            write_documents(
                reader,
                writers={self.text_key: writer},
                tokenizer=tokenizer,
                append_eod=tokenizer.eod is not None,
                totals=totals,
            )
            self.manifest_file.unlink(missing_ok=True)  # from here until the new one there is no set
            sync_folder(self.folder)
            if isinstance(tokenizer, CharTokenizer) and self.tokenizer is None:
                write_whole(Path(self.chars_file), tokenizer.to_json())
        made = {"tokens": totals.tokens, "documents": totals.documents}
        self._write_manifest({"settings": self.settings, "set": made, "sources": records})
        tokens = f"{len(files)} files into {totals.tokens:,} tokens"
        self.log(f"data: tokenized {tokens} ({reader.speed(totals)}): {self.prefix}.bin")
        return tokenizer

    def _chars_of(self, files: list[str]) -> CharTokenizer:
        chunks = (chunk for path in files for chunk in read_chunks(path))
        texts = (text for chunk in chunks for text in parse(chunk, keys=(self.text_key,)).texts[0])
        return build_chars(texts, file=self.chars_file)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_whole(self.manifest_file, (json.dumps(manifest, indent=1) + "\n").encode())


class _Unusable(Exception):
    """Why a set is made again."""


def _read_manifest(path: Path) -> dict[str, Any]:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        manifest = json.loads(path.read_bytes())
        complete = all({"path", "bytes", "mtime_ns", "sha256"} <= source.keys() for source in manifest["sources"])
        if complete and isinstance(manifest["settings"], dict) and isinstance(manifest["set"]["tokens"], int):
            return manifest
    raise _Unusable(f"{path} is damaged")


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
