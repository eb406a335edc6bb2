"""Text named in a config, tokenized once into the workdir and never changed under a checkpoint afterwards.

The folder holds `corpus.bin`, `corpus.idx`, `chars.json` where the tokenizer is `chars`, and `manifest.json`, written
last: what the set was made of. Without a manifest there is no set, so a process killed at any moment leaves either
the former state or a folder that the next run fills anew, to the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import Problem, UserError
from jaxlm.data.documents import Totals, expand, parse, read_chunks, write_documents
from jaxlm.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from jaxlm.data.tokenizer import CharTokenizer, Tokenizer, build_chars, load_tokenizer
from jaxlm.files import flush, open_exclusive, write_whole

FORMAT = 1  # of the manifest; raised when the same sources would give other tokens


@dataclass(frozen=True)
class Prepared:
    """A token set ready to be opened by `IndexedDataset(prefix)`, and the tokenizer that made it."""

    prefix: str
    tokenizer: Tokenizer


def prepare(
    paths: tuple[str, ...], *, tokenizer_spec: str, text_key: str, folder: str | Path, log: Callable[[str], object]
) -> Prepared:
    """Tokenize the files that `paths` (files or globs) match into `folder`, or reuse what is there.

    Documents follow each other in the order of `paths`, sorted within a glob, each ended by the end-of-document token
    if the tokenizer has one. The set is reused, without reading a source, if the settings are those it was made with
    and no source has another size or time of change; sources that are gone do not matter. With other settings it is
    made anew, and `log` is told why. Processes that share the folder take turns: one builds, the others reuse.
    Raises: UserError if nothing matches, a source cannot be read, or a source changed since the set was made.
    """
    if not paths:
        raise UserError(Problem("data.path", "names no file", "set it to text files, or data.train to token sets"))
    tokenizer, where = None if tokenizer_spec == "chars" else load_tokenizer(tokenizer_spec), Path(folder)
    settings = {
        "format": FORMAT,
        "data.path": list(paths),
        "data.tokenizer": tokenizer_spec,
        "tokenizer files": {path: _sha256(path) for path in (tokenizer.files if tokenizer else ())},
        "data.text_key": text_key,
    }
    where.mkdir(parents=True, exist_ok=True)
    lock = open_exclusive(where / "lock", wait=False)
    if lock is None:
        log(f"data: waiting for another process that prepares {where}")
        lock = open_exclusive(where / "lock", wait=True)
    assert lock is not None
    with lock:
        made = _reuse(where, settings, tokenizer, log) if (where / "manifest.json").exists() else None
        return Prepared(str(where / "corpus"), made or _build(where, settings, tokenizer, log))


def _reuse(
    folder: Path, settings: dict[str, Any], tokenizer: Tokenizer | None, log: Callable[[str], object]
) -> Tokenizer | None:
    """The tokenizer of the set that is there, or None if no set there answers the request; then `log` is told why."""
    why, prefix = "", str(folder / "corpus")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        made_with, num_tokens = manifest["settings"], manifest["set"]["tokens"]
        known = {part["path"]: (part["bytes"], part["mtime_ns"], part["sha256"]) for part in manifest["sources"]}
        changed = [key for key, value in settings.items() if made_with.get(key) != value]
        why = "; ".join(f"{key} was {made_with.get(key)}, is {settings[key]}" for key in changed)
    except (ValueError, KeyError, TypeError, AttributeError):
        why, manifest, known, num_tokens = f"{folder / 'manifest.json'} is damaged", {}, {}, 0
    if not why and _refuse_changes(folder, settings["data.path"], known):
        for source in manifest["sources"]:
            with suppress(OSError):
                source["mtime_ns"] = os.stat(source["path"]).st_mtime_ns
        _write_manifest(folder, manifest)
    try:
        if not why and (found := IndexedDataset(prefix).num_tokens) != num_tokens:
            why = f"{prefix} holds {found} tokens, its manifest says {num_tokens}"
        tokenizer = tokenizer or (None if why else load_tokenizer(f"chars:{folder / 'chars.json'}"))
    except UserError as error:
        why = f"{error.problems[0].where}: {error.problems[0].rule}"
    log(f"data: tokenizing again: {why}" if why else f"data: {num_tokens:,} tokens in {prefix}.bin, made earlier")
    return None if why else tokenizer


def _refuse_changes(folder: Path, patterns: Sequence[str], known: dict[str, tuple[int, int, str]]) -> bool:
    """Raises UserError for sources that are not what the set was made of; whether some were touched and are the same."""
    problems, touched = [], False
    present: list[str] = []
    for pattern in patterns:
        with suppress(UserError):  # what is gone does not matter
            present += expand((pattern,), setting="data.path")
    for path in present:
        stat, rule = os.stat(path), ""
        num_bytes, mtime_ns, sha256 = known.get(path, (stat.st_size, stat.st_mtime_ns, ""))
        if path not in known:
            rule = "was not there when the training data was tokenized, and data.path matches it now"
        elif stat.st_size != num_bytes:
            rule = f"has {stat.st_size} bytes; it had {num_bytes} when the training data was tokenized"
        elif stat.st_mtime_ns != mtime_ns:
            touched = True
            rule = "" if _sha256(path) == sha256 else "has other content than when the training data was tokenized"
        if rule:
            remedy = f"restore what was there, or train with a fresh workdir (this set is in {folder})"
            problems.append(Problem(path, rule, remedy))
    if problems:
        raise UserError(*problems)
    return touched


def _build(
    folder: Path, settings: dict[str, Any], tokenizer: Tokenizer | None, log: Callable[[str], object]
) -> Tokenizer:
    """Tokenize every source; then replace what an earlier run left, its manifest first and the new one last."""
    files, key = expand(tuple(settings["data.path"]), setting="data.path"), settings["data.text_key"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # its own threads; no processes beside a trainer
    sources = [
        {"path": path, "bytes": (stat := os.stat(path)).st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
        for path in files
    ]
    if chars := tokenizer is None:
        chunks = itertools.chain.from_iterable(map(read_chunks, files))
        texts = (text for chunk in chunks for text in parse(chunk, keys=(key,))[0][0])
        tokenizer = build_chars(texts, file=str(folder / "chars.json"))
    totals = Totals()
    with IndexedWriter(folder / "corpus", dtype=optimal_dtype(tokenizer.vocab_size)) as writer:
        ends = tokenizer.eod is not None
        speed = write_documents(files, writers={key: writer}, tokenizer=tokenizer, append_eod=ends, totals=totals)
        (folder / "manifest.json").unlink(missing_ok=True)  # from here until the new one there is no set
        flush(folder)
        if chars and isinstance(tokenizer, CharTokenizer):
            write_whole(folder / "chars.json", tokenizer.to_json())
    made = {"tokens": totals.tokens, "documents": totals.documents}
    _write_manifest(folder, {"settings": settings, "set": made, "sources": sources})
    tokens = f"{len(files)} files into {totals.tokens:,} tokens"
    log(f"data: tokenized {tokens} ({speed}): {folder / 'corpus'}.bin")
    return tokenizer


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
