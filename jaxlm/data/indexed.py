"""Megatron's .bin/.idx token sets: a memory-mapped reader and a streaming writer.

`prefix.bin` is the tokens of all sequences end to end, in one dtype, with no header and no padding. `prefix.idx` is
little-endian and packed, S sequences in D - 1 documents:

    offset         bytes  field
    0                  9  magic b"MMIDIDX\\0\\0"
    9                  8  version, uint64, 1
    17                 1  dtype code, uint8 (`DTYPES`)
    18                 8  S, uint64
    26                 8  D, uint64
    34                4S  tokens in each sequence, int32
    34 + 4S           8S  byte offset of each sequence in .bin, int64
    34 + 12S          8D  first sequence of each document, int64; the last entry is S

A document is a run of sequences, usually one, perhaps none. Source: Megatron-LM, core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.stored import Stored, read_whole
from jaxlm.files import open_exclusive, publish

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floating point, and which is which depends on the Megatron fork: never tokens.
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1
_BLOCK = 1 << 18  # entries checked or written at a time
_ENDS = 1 << 16  # bytes of each end of a file that its fingerprint covers
_REMEDY = "restore the file from where it came, or write the set again with python -m jaxlm.data.preprocess"


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron's writer stores token ids below `vocab_size`: uint16 under 65,500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def set_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of a set: `prefix.bin` and `prefix.idx`, or what they are called where a writer was killed between
    making them a set and giving them these names."""
    tokens, index, new_tokens, new_index = (Path(f"{prefix}{e}") for e in (".bin", ".idx", ".bin.tmp", ".idx.new"))
    return (new_tokens if new_tokens.exists() else tokens, new_index) if new_index.exists() else (tokens, index)


def refuse_existing(output_prefix: str, prefixes: Iterable[str]) -> None:
    """Raises UserError, of --output-prefix, for the first file of the sets `prefixes` that is there."""
    for path in (path for prefix in prefixes for path in set_paths(prefix) if path.exists()):
        remedy = "choose another --output-prefix, or pass --overwrite to replace it"
        raise UserError(Problem(f"--output-prefix {output_prefix}", f"{path} exists", remedy))


class IndexedDataset:
    """A token set on disk, mapped into memory, or in a bucket (PREFIX is gs://..., s3://...), whose .idx memory holds;
    reading touches only the pages or ranges asked for.

    Attributes: `tokens`, all of them in file order, dtype[num_tokens], which give slices; `lengths`, int32[S];
    `document_indices`, int64[D]; `index_bytes`, the .idx.
    Opening reads the whole .idx (20 bytes a document) and the size of the .bin; `jaxlm.data.verify` reads tokens too.
    Raises: UserError naming file, offset and expectation if anything in the .idx contradicts the format or the .bin.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = os.fspath(prefix)
        stored = "://" in self.prefix
        bin_path, idx_path = (f"{prefix}.bin", f"{prefix}.idx") if stored else _files(self.prefix)
        self.index_bytes = raw = read_whole(idx_path) if stored else _map(idx_path)
        self.dtype, num_sequences, num_entries = _read_header(idx_path, raw)
        lengths, pointers, documents = np.split(raw[HEADER.size :], (4 * num_sequences, 12 * num_sequences))
        self.lengths, self._pointers = lengths.view("<i4"), pointers.view("<i8")
        self.document_indices = documents.view("<i8")
        source = (idx_path, raw if stored else idx_path)
        self.num_tokens = _check_sequences(*source, num_sequences, self.dtype.itemsize)
        _check_documents(*source, num_entries, num_sequences)
        if stored:
            self.tokens = Stored(bin_path, self.num_tokens, self.dtype)
            return
        expected_bytes = self.num_tokens * self.dtype.itemsize
        if (found_bytes := os.path.getsize(bin_path)) != expected_bytes:
            rule = f"has {found_bytes} bytes; {self.num_tokens} {self.dtype.name} tokens in {Path(idx_path).name} take"
            raise UserError(Problem(bin_path, f"{rule} {expected_bytes}", _REMEDY))
        self.tokens = _map(bin_path).view(self.dtype)

    def __len__(self) -> int:
        """Sequences in the set."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def __getitem__(self, sequence: int) -> np.ndarray:
        """The tokens of one sequence, dtype[length]. Raises: IndexError outside [-S, S)."""
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sequence])]

    def first_tokens(self, sequences: np.ndarray) -> np.ndarray:
        """Position in `tokens` of the first token of each sequence, int64; for sequence S, the end."""
        known = self._pointers[np.minimum(sequences, len(self) - 1)] // self.dtype.itemsize if len(self) else 0
        return np.where(np.asarray(sequences) < len(self), known, self.num_tokens)

    def fingerprint(self) -> str:
        """Tokens, dtype and a digest that another set of the name would not have, in O(1): sizes, both ends of both files."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.index_bytes):
            size, ends = values.dtype.itemsize, min(_ENDS // values.dtype.itemsize, len(values))
            digest.update((len(values) * size).to_bytes(8, "little"))
            digest.update(values[:ends].tobytes() + values[len(values) - ends :].tobytes())
        return f"{self.num_tokens} {self.dtype.name} tokens, {digest.hexdigest()[:16]}"

    def __reduce__(self):
        return IndexedDataset, (self.prefix,)


def _files(prefix: str) -> tuple[str, str]:
    """The two files of a set. Raises: UserError if one is missing."""
    bin_path, idx_path = set_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            near = sorted(Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}*.idx"))
            remedy = "check the path; a set is a pair PREFIX.bin and PREFIX.idx"
            if prefix.endswith((".bin", ".idx")):
                remedy = f"give the prefix without its ending: {prefix[:-4]}"
            elif near:
                remedy = f"did you mean {', '.join(str(index)[:-4] for index in near[:3])}?"
            raise UserError(Problem(f"token set {prefix}", f"{path} is not a file", remedy))
    return str(bin_path), str(idx_path)


def _map(path: str) -> np.ndarray:
    """The bytes of a file, uint8[size], mapped read-only."""
    try:
        if os.path.getsize(path) == 0:  # cannot be mapped
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)  # slicing a plain array is 10 times cheaper
    except OSError as error:
        raise UserError(Problem(f"{path}", f"cannot be read: {error.strerror}", "check its permissions")) from error


def _refuse(path: str, offset: int, rule: str, remedy: str = _REMEDY) -> NoReturn:
    raise UserError(Problem(f"{path}, byte {offset}", rule, remedy))


def _read_header(path: str, raw: np.ndarray) -> tuple[np.dtype, int, int]:
    """Token dtype, S and D, checked against each other and the file's size."""
    start = raw[: HEADER.size].tobytes()
    if start.startswith(b"TNTIDX\x00\x00"):
        _refuse(path, 0, "is in fairseq's old TNTIDX format", "tokenize again, to Megatron's MMIDIDX format")
    if start[:9] != MAGIC[: len(start)] or not start:
        _refuse(path, 0, f"starts with {start[:9]!r}; a Megatron index starts with {MAGIC!r}")
    if len(start) < HEADER.size:
        _refuse(path, len(start), f"ends within the header, which has {HEADER.size} bytes")
    _, version, code, num_sequences, num_entries = HEADER.unpack(start)
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
    sizes = f"{num_sequences} sequences and {num_entries} document entries take {expected}"
    modes = len(raw) == expected + num_sequences and num_sequences
    for wrong, offset, rule in (
        (version != 1, 9, f"version is {version}; the only one is 1"),
        (code not in DTYPES, 17, f"dtype code is {code}; tokens have one of: {known}"),
        (num_entries < 1, 26, "document index has 0 entries; even an empty set has one"),
        (modes, expected, "holds sequence modes: the set is multimodal, and only text can be read"),
        (len(raw) != expected, min(len(raw), expected), f"file has {len(raw)} bytes; {sizes}"),
    ):
        if wrong:
            _refuse(path, offset, rule)
    return DTYPES[code], num_sequences, num_entries


def _read_blocks(source: str | np.ndarray, offset: int, dtype: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, entries) of `count` entries from `offset` on, a block at a time. A file is read rather than
    mapped: an .idx may be as large as memory, and pages of a map that were touched count as this process's own."""
    size = np.dtype(dtype).itemsize
    for start in range(0, count, _BLOCK):
        at, num = offset + start * size, min(_BLOCK, count - start)
        if isinstance(source, np.ndarray):
            yield start, source[at : at + num * size].view(dtype)
        else:
            yield start, np.fromfile(source, dtype, num, offset=at)


def _check_sequences(path: str, source: str | np.ndarray, num_sequences: int, itemsize: int) -> int:
    """Tokens in all sequences; refuses a negative length or a pointer that is not the sum of the lengths before it."""
    num_tokens, pointers_at = 0, HEADER.size + 4 * num_sequences
    lengths = _read_blocks(source, HEADER.size, "<i4", num_sequences)
    for (start, length), (_, pointer) in zip(lengths, _read_blocks(source, pointers_at, "<i8", num_sequences)):
        if int(length.min()) < 0:
            k = int(np.argmax(length < 0))
            rule = f"length of sequence {start + k} is {length[k]}; it cannot be negative"
            _refuse(path, HEADER.size + 4 * (start + k), rule)
        ends = num_tokens + np.cumsum(length, dtype=np.int64)
        expected = (ends - length) * itemsize
        if not np.array_equal(pointer, expected):
            k = int(np.argmax(pointer != expected))
            rule = f"pointer of sequence {start + k} is {pointer[k]}, not {expected[k]}"
            _refuse(path, pointers_at + 8 * (start + k), f"{rule}, the bytes of the sequences before it")
        num_tokens = int(ends[-1])
    return num_tokens


def _check_documents(path: str, source: str | np.ndarray, num_entries: int, num_sequences: int) -> None:
    """Refuses a document index that does not start at 0, ever falls, or does not end at the number of sequences."""
    offset, last = HEADER.size + 12 * num_sequences, 0
    for start, block in _read_blocks(source, offset, "<i8", num_entries):
        if start == 0 and block[0] != 0:
            _refuse(path, offset, f"document index starts with {block[0]}, not 0")
        if block[0] < last or (block[1:] < block[:-1]).any():
            before = np.concatenate(([last], block[:-1]))
            k = int(np.argmax(block < before))
            rule = f"document index falls from {before[k]} to {block[k]} at entry {start + k}"
            _refuse(path, offset + 8 * (start + k), rule)
        last = int(block[-1])
    if last != num_sequences:
        at = offset + 8 * (num_entries - 1)
        _refuse(path, at, f"document index ends with {last}; there are {num_sequences} sequences")


class Mark(NamedTuple):
    """How far a writer is."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Writes a token set as it comes; memory holds nothing of it.

    Until it is closed, and wherever it is killed, readers find the older set, or none; from the one rename in `close` on
    they find the new one. What a killed writer had written stays in temporary files, and `resume` goes on from a mark that
    it had passed (`flush`). One that leaves its `with` block by an exception and had passed none removes them.
    Raises: UserError if another process writes this prefix, a token does not fit `dtype`, or a sequence has 2^31 tokens.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, dtype: np.dtype | type | str, resume: Mark | None = None):
        self.prefix = os.fspath(prefix)
        where = f"token set {self.prefix}"
        if "://" in self.prefix:
            raise UserError(Problem(where, "is in a bucket", "write it to a disk, then copy it there"))
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = {known: code for code, known in DTYPES.items()}[self.dtype]
        # until it is done: tokens; header and lengths; document index without its leading 0, which is also the lock
        self._temporary = [Path(f"{self.prefix}{ending}") for ending in (".bin.tmp", ".idx.tmp", ".doc.tmp")]
        mark, self._resumable = resume or Mark(), resume is not None
        self.num_tokens, self._num_sequences, self.num_documents = mark
        self._temporary[0].parent.mkdir(parents=True, exist_ok=True)
        lock = open_exclusive(self._temporary[2], wait=False)
        if lock is None:
            remedy = "wait for it to end, or choose another prefix"
            raise UserError(Problem(where, "another process is writing it", remedy))
        _give_names(self.prefix)
        self._files: list[BinaryIO] = [lock]
        if resume and set_paths(prefix)[1].exists() and not self._temporary[1].exists():
            return  # a former writer was killed when it had made this the set, and its command when it had others to close
        for path in self._temporary[:2]:
            path.touch()
        self._files = [*(open(path, "r+b") for path in self._temporary[:2]), lock]  # noqa: SIM115
        sizes = (self.num_tokens * self.dtype.itemsize, HEADER.size + 4 * mark.sequences, 8 * mark.documents)
        for file, size in zip(self._files, sizes, strict=True):
            if mark != Mark() and file.seek(0, os.SEEK_END) < size:
                rule = "is shorter than when the command that is to go on was ended"
                remedy = f"begin anew: remove {Path(self.prefix).parent}/*.preprocess.json"
                raise UserError(Problem(f"{where}, {file.name}", rule, remedy))
            file.truncate(size)
            file.seek(size)

    def add_document(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Append a document of one sequence."""
        self.add_documents(np.asarray(tokens), lengths=np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, *, lengths: np.ndarray, ends: np.ndarray | None = None) -> None:
        """Append sequences of `lengths`, whose tokens lie end to end in `tokens`, as whole documents: `ends` counts the
        sequences up to the end of each document; None: each is one."""
        assert int(np.sum(lengths, dtype=np.int64)) == len(tokens)
        limits, where = np.iinfo(self.dtype), f"token set {self.prefix}, document {self.num_documents}"
        if len(tokens) and not (limits.min <= int(tokens.min()) and int(tokens.max()) <= limits.max):
            stranger = tokens[(tokens < limits.min) | (tokens > limits.max)][0]
            rule = f"token {stranger} does not fit {self.dtype.name} ({limits.min}..{limits.max})"
            remedy = "the tokenizer gives ids outside its vocab_size: check its files"
            raise UserError(Problem(where, rule, remedy))
        if len(lengths) and int(lengths.max()) > MAX_SEQUENCE_TOKENS:
            rule = f"has {int(lengths.max())} tokens; the format counts up to {MAX_SEQUENCE_TOKENS}"
            raise UserError(Problem(where, rule, "split the document"))
        ends = np.arange(1, len(lengths) + 1) if ends is None else ends
        columns = (tokens, self.dtype), (lengths, "<i4"), (self._num_sequences + ends, "<i8")
        for file, (values, dtype) in zip(self._files, columns, strict=True):
            file.write(np.ascontiguousarray(values, dtype).data)
        self.num_tokens += len(tokens)
        self._num_sequences += len(lengths)
        self.num_documents += len(ends)

    def flush(self) -> Mark:
        """All that was appended, on the disk; the mark for `resume`."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._resumable = True
        return Mark(self.num_tokens, self._num_sequences, self.num_documents)

    def close(self) -> None:
        """Write the index, make both files the set and give them their names."""
        if len(self._files) > 1:
            self._files[0].flush()
            os.fsync(self._files[0].fileno())
            self._finish_index()
            publish(self._temporary[1], Path(f"{self.prefix}.idx.new"))
            self._resumable = True
            _give_names(self.prefix)
        self._temporary[2].unlink()
        self._end()

    def _finish_index(self) -> None:
        """Pointers and document index behind the lengths, then the header before them."""
        file, pointer = self._files[1], 0
        for kept in self._files[1:]:
            kept.flush()
        for _, lengths in _read_blocks(str(self._temporary[1]), HEADER.size, "<i4", self._num_sequences):
            sizes = lengths.astype(np.int64) * self.dtype.itemsize
            ends = pointer + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8", copy=False).tobytes())
            pointer = int(ends[-1])
        file.write(bytes(8))
        for _, entries in _read_blocks(str(self._temporary[2]), 0, "<i8", self.num_documents):
            file.write(entries.tobytes())
        file.seek(0)
        file.write(HEADER.pack(MAGIC, 1, self._code, self._num_sequences, self.num_documents + 1))
        file.flush()

    def _end(self) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk, of which whoever writes was told
                file.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # who is interrupted or has passed a mark goes on later; whoever fails drops what was written
            if not self._files[0].closed and not self._resumable and issubclass(kind or Exception, Exception):
                for path in self._temporary:
                    path.unlink(missing_ok=True)
            self._end()


def _give_names(prefix: str) -> None:
    """The last renames of a set that is whole, which its writer may have been killed before."""
    tokens, index = set_paths(prefix)
    if index.suffix == ".new":
        if tokens.suffix == ".tmp":
            publish(tokens, Path(f"{prefix}.bin"))
        publish(index, Path(f"{prefix}.idx"))
