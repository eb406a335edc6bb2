"""The command that tokenizes files into Megatron's .bin/.idx sets, one set a JSON key.

    python -m jaxlm.data.preprocess --input corpus.jsonl.zst --output-prefix sets/corpus \\
        --tokenizer gpt2:gpt2 --append-eod --workers 8        writes sets/corpus_text_document.{bin,idx}
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from jaxlm.config import Problem, UserError
from jaxlm.data.documents import CHUNK_BYTES, Totals, expand, write_documents
from jaxlm.data.indexed import IndexedWriter, Mark, optimal_dtype, refuse_existing
from jaxlm.data.tokenizer import KINDS, load_tokenizer
from jaxlm.files import write_whole
from jaxlm.settings import Parser, run_main


def parser() -> Parser:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result = Parser(
        prog="python -m jaxlm.data.preprocess",
        description="Tokenize text into Megatron .bin/.idx sets: PREFIX_KEY_document.bin and .idx for each JSON key. "
        "A .jsonl, .ndjson or .json file holds one JSON object a line and a document in each; any other file is one "
        "document of UTF-8 text, held in memory. .gz and .zst are decompressed. Empty documents are dropped. Files "
        "appear only when complete. The result does not depend on --workers. A command that ended early, however it did, "
        "goes on from its last finished shard when it is run again; --workers and --max-bad-lines may differ then. "
        "Exit codes: 0 written; 2 bad input, options or environment; 130 interrupted.",
    )
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="source files or globs, in this order")
    add("--output-prefix", required=True, metavar="PREFIX", help="start of the paths to write; folders are made")
    add("--tokenizer", required=True, metavar="SPEC", help=KINDS)
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields to tokenize (default: text)")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    add("--workers", type=int, default=usable, metavar="N", help=f"processes that tokenize (default: CPUs, {usable})")
    skip = "lines without JSON or the keys that are skipped and listed; one more is an error (default: 0)"
    add("--max-bad-lines", type=int, default=0, metavar="N", help=skip)
    add("--overwrite", action="store_true", help="replace sets that exist")
    return result


def run(options: argparse.Namespace) -> list[str]:
    """Write the sets and return a report of them, in lines. Raises: UserError."""
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}
    _check(options)
    files = expand(tuple(options.input), setting="--input")
    tokenizer = load_tokenizer(options.tokenizer)
    if options.append_eod and tokenizer.eod is None:
        rule = f"tokenizer {tokenizer.spec} has no end-of-document token"
        raise UserError(Problem("--append-eod", rule, "leave the option out, or use another tokenizer"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers 1 means one CPU
    journal = Journal(options, files, tokenizer.files)
    totals, marks = journal.read()
    if totals.chunks:
        done = f"{totals.text_bytes / 1e6:.1f} MB of text, {totals.documents:,} documents"
        print(f"going on after {done}", file=sys.stderr)
    elif not options.overwrite:
        refuse_existing(options.output_prefix, prefixes.values())
    if totals.bad > options.max_bad_lines:
        rule = f"{totals.bad} lines were skipped before the command ended, the first: {totals.bad_lines[0]}"
        remedy = f"allow as many, or begin anew: remove {journal.path}"
        raise UserError(Problem(f"--max-bad-lines {options.max_bad_lines}", rule, remedy))
    dtype = optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        opened = ((key, IndexedWriter(prefix, dtype=dtype, resume=marks.get(key))) for key, prefix in prefixes.items())
        writers = {key: stack.enter_context(writer) for key, writer in opened}
        try:
            speed = write_documents(
                files, writers=writers, tokenizer=tokenizer, append_eod=options.append_eod,
                totals=totals, workers=options.workers, max_bad_lines=options.max_bad_lines,
                on_shard=lambda: journal.write(totals, {key: writer.flush() for key, writer in writers.items()}),
            )  # fmt: skip
        except BaseException:
            if (kept := journal.read()[0]).chunks:
                done = f"{kept.text_bytes / 1e6:.1f} MB of text are done"
                print(f"{done}: the same command goes on from there", file=sys.stderr)
            raise
    journal.path.unlink(missing_ok=True)
    return _report(totals, writers, speed)


class Journal:
    """How far a command is, in a file beside its sets until they are done; of use to the same command only."""

    def __init__(self, options: argparse.Namespace, files: list[str], tokenizer_files: tuple[str, ...]):
        self.path = Path(f"{options.output_prefix}.preprocess.json")
        stats = [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in files]
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in tokenizer_files]
        chosen = (options.tokenizer, options.json_keys, options.append_eod, options.overwrite)
        what: Any = (CHUNK_BYTES, stats, digests, chosen)
        self._command = hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def read(self) -> tuple[Totals, dict[str, Mark]]:
        """What an earlier, killed run had done, and where its writers were; nothing if there is none to go on from."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self.path.read_bytes())
            if record["command"] == self._command:
                return Totals(**record["totals"]), {key: Mark(*mark) for key, mark in record["marks"].items()}
        return Totals(), {}

    def write(self, totals: Totals, marks: dict[str, Mark]) -> None:
        record = {"command": self._command, "totals": dataclasses.asdict(totals), "marks": marks}
        write_whole(self.path, json.dumps(record).encode())


def _check(options: argparse.Namespace) -> None:
    keys, workers, bad = options.json_keys, options.workers, options.max_bad_lines
    names = all(key and "/" not in key for key in keys)
    rules = (
        (workers >= 1, f"--workers {workers}", "must be at least 1"),
        (bad >= 0, f"--max-bad-lines {bad}", "must be at least 0"),
        (names, f"--json-keys {keys}", "are parts of file names: no slash, none empty"),
        (len(set(keys)) == len(keys), f"--json-keys {keys}", "names a key twice"),
    )
    if problems := [Problem(where, rule, "mend the option") for holds, where, rule in rules if not holds]:
        raise UserError(*problems)


def _report(totals: Totals, writers: dict[str, IndexedWriter], speed: str) -> list[str]:
    lines = [f"skipped: {line}" for line in totals.bad_lines]
    if totals.bad > len(totals.bad_lines):
        lines.append(f"skipped: {totals.bad - len(totals.bad_lines):,} more bad lines")
    if totals.empty:
        lines.append(f"dropped {totals.empty:,} empty documents")
    for writer in writers.values():
        counts = f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens of {writer.dtype.name}"
        lines.append(f"wrote {writer.prefix}.bin and .idx: {counts}")
    return [*lines, speed]


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    try:
        print("\n".join(run(options)))
    except OSError as error:
        where = f"{error.filename or options.output_prefix}"
        raise UserError(Problem(where, f"{error.strerror}", "check the disk and permissions")) from error
    return 0


if __name__ == "__main__":
    run_main(main)
