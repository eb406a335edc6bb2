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
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.data.atomic import open_exclusive, publish, sync_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floating point, and which is which depends on the Megatron fork: never tokens.
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1
_BLOCK = 1 << 20  # entries checked or written at a time
_ENDS = 1 << 16  # bytes of each end of a file that its fingerprint covers
_REMEDY = "restore the file from where it came, or write the set again with python -m jaxlm.data.preprocess"


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron's writer stores token ids below `vocab_size`: uint16 under 65,500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def set_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of a set: `prefix.bin` and `prefix.idx`."""
    return Path(f"{os.fspath(prefix)}.bin"), Path(f"{os.fspath(prefix)}.idx")


class IndexedDataset:
    """A token set on disk, mapped into memory; reading touches only the pages asked for.

    Attributes: `prefix`; `dtype` of the stored tokens; `tokens`, all of them in file order, dtype[num_tokens];
    `lengths`, int32[S]; `document_indices`, int64[D]. Arrays are read-only views of the files.
    Opening reads the whole .idx (20 bytes a document) and the size of the .bin; `jaxlm.data.verify` reads tokens too.
    Can be pickled: the copy opens the files anew.
    Raises: UserError naming file, offset and expectation if anything in the .idx contradicts the format or the .bin.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = os.fspath(prefix)
        bin_path, idx_path = set_paths(prefix)
        for path in (idx_path, bin_path):
            if not path.is_file():
                _refuse_missing(self.prefix, path)
        raw = _map(idx_path)
        self.dtype, num_sequences, num_entries = _read_header(idx_path, raw)
        pointers_at = HEADER.size + 4 * num_sequences
        documents_at = pointers_at + 8 * num_sequences
        self.lengths = raw[HEADER.size : pointers_at].view("<i4")
        self._pointers = raw[pointers_at:documents_at].view("<i8")
        self.document_indices = raw[documents_at : documents_at + 8 * num_entries].view("<i8")
        self.num_tokens = _check_sequences(idx_path, self.lengths, self._pointers, self.dtype.itemsize)
        _check_documents(idx_path, self.document_indices, num_sequences, documents_at)
        expected_bytes = self.num_tokens * self.dtype.itemsize
        if (found_bytes := bin_path.stat().st_size) != expected_bytes:
            rule = f"has {found_bytes} bytes; {self.num_tokens} {self.dtype.name} tokens in {idx_path.name} take"
            raise UserError(Problem(f"{bin_path}", f"{rule} {expected_bytes}", _REMEDY))
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

    def fingerprint(self) -> str:
        """Tokens, dtype and a digest that another set of the name would not have, in O(1): sizes, both ends of both files."""
        digest = hashlib.sha256()
        for path in set_paths(self.prefix):
            raw = _map(path)
            digest.update(len(raw).to_bytes(8, "little") + raw[:_ENDS].tobytes() + raw[-_ENDS:].tobytes())
        return f"{self.num_tokens} {self.dtype.name} tokens, {digest.hexdigest()[:16]}"

    def __reduce__(self):
        return IndexedDataset, (self.prefix,)


def _refuse_missing(prefix: str, path: Path) -> NoReturn:
    remedy = "check the path; a set is a pair PREFIX.bin and PREFIX.idx, and a killed writer leaves no .idx"
    if prefix.endswith((".bin", ".idx")):
        remedy = f"give the prefix without its ending: {prefix[:-4]}"
    elif near := sorted(
        str(found)[:-4] for found in Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}*.idx")
    ):
        remedy = f"did you mean {', '.join(near[:3])}?"
    raise UserError(Problem(f"token set {prefix}", f"{path} is not a file", remedy))


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, uint8[size], mapped read-only."""
    try:
        if path.stat().st_size == 0:  # cannot be mapped
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)  # slicing a plain array is 10 times cheaper
    except OSError as error:
        raise UserError(Problem(f"{path}", f"cannot be read: {error.strerror}", "check its permissions")) from error


def _refuse(path: Path, offset: int, rule: str, remedy: str = _REMEDY) -> NoReturn:
    raise UserError(Problem(f"{path}, byte {offset}", rule, remedy))


def _read_header(path: Path, raw: np.ndarray) -> tuple[np.dtype, int, int]:
    """Token dtype, S and D, checked against each other and the file's size."""
    start = raw[: HEADER.size].tobytes()
    if start.startswith(b"TNTIDX\x00\x00"):
        _refuse(path, 0, "is in fairseq's old TNTIDX format", "tokenize again, to Megatron's MMIDIDX format")
    if start[:9] != MAGIC[: len(start)] or not start:
        _refuse(path, 0, f"starts with {start[:9]!r}; a Megatron index starts with {MAGIC!r}")
    if len(start) < HEADER.size:
        _refuse(path, len(start), f"ends within the header, which has {HEADER.size} bytes")
    _, version, code, num_sequences, num_entries = HEADER.unpack(start)
    if version != 1:
        _refuse(path, 9, f"version is {version}; the only one is 1")
    if code not in DTYPES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        _refuse(path, 17, f"dtype code is {code}; tokens have one of: {known}")
    if num_entries < 1:
        _refuse(path, 26, "document index has 0 entries; even an empty set has one")
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if len(raw) == expected + num_sequences and num_sequences:
        _refuse(path, expected, "holds sequence modes: the set is multimodal", "use a set of text only")
    if len(raw) != expected:
        sizes = f"{num_sequences} sequences and {num_entries} document entries take {expected}"
        _refuse(path, min(len(raw), expected), f"file has {len(raw)} bytes; {sizes}")
    return DTYPES[code], num_sequences, num_entries


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Tokens in all sequences; refuses a negative length or a pointer that is not the sum of the lengths before it."""
    num_tokens = 0
    for start in range(0, len(lengths), _BLOCK):
        length = lengths[start : start + _BLOCK].astype(np.int64)
        ends = num_tokens + np.cumsum(length)
        if (length < 0).any():
            k = start + int(np.argmax(length < 0))
            _refuse(path, HEADER.size + 4 * k, f"length of sequence {k} is {lengths[k]}; it cannot be negative")
        expected = (ends - length) * itemsize
        wrong = pointers[start : start + _BLOCK] != expected
        if wrong.any():
            k = int(np.argmax(wrong))
            offset = HEADER.size + 4 * len(lengths) + 8 * (start + k)
            rule = f"pointer of sequence {start + k} is {pointers[start + k]}, not {expected[k]}"
            _refuse(path, offset, f"{rule}, the bytes of the sequences before it")
        num_tokens = int(ends[-1])
    return num_tokens


def _check_documents(path: Path, entries: np.ndarray, num_sequences: int, offset: int) -> None:
    """Refuses a document index that does not start at 0, ever falls, or does not end at the number of sequences."""
    if entries[0] != 0:
        _refuse(path, offset, f"document index starts with {entries[0]}, not 0")
    for start in range(0, len(entries) - 1, _BLOCK):
        block = entries[start : start + _BLOCK + 1]
        falls = block[1:] < block[:-1]
        if falls.any():
            k = start + 1 + int(np.argmax(falls))
            _refuse(path, offset + 8 * k, f"document index falls from {entries[k - 1]} to {entries[k]} at entry {k}")
    if entries[-1] != num_sequences:
        last = offset + 8 * (len(entries) - 1)
        _refuse(path, last, f"document index ends with {entries[-1]}; there are {num_sequences} sequences")


class IndexedWriter:
    """Writes a token set as it comes; memory holds 12 bytes a document and no tokens.

    Files appear under their names only in `close`, an older set of that name being replaced whole; a writer that is
    killed or leaves its `with` block by an exception leaves the older set, or none, never half of one.
    Raises: UserError if another process writes this prefix, if a token does not fit `dtype`, or if a sequence has
    2^31 tokens or more.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, dtype: np.dtype | type | str):
        self.prefix = os.fspath(prefix)
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = {known: code for code, known in DTYPES.items()}[self.dtype]
        self._paths = set_paths(prefix)
        self._temporary = tuple(path.with_name(path.name + ".tmp") for path in self._paths)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self.num_tokens = 0
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        file = open_exclusive(self._temporary[0], wait=False)
        if file is None:
            remedy = "wait for it to end, or choose another prefix"
            raise UserError(Problem(f"token set {self.prefix}", "another process is writing it", remedy))
        file.truncate(0)
        self._file: BinaryIO = file

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def add_document(self, tokens: np.ndarray | Iterable[int]) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def add_documents(self, tokens: np.ndarray, *, lengths: np.ndarray) -> None:
        """Append `len(lengths)` documents of one sequence each, whose tokens lie end to end in `tokens`."""
        assert int(np.sum(lengths, dtype=np.int64)) == len(tokens)
        self._append(tokens, lengths)
        first = self._documents[-1]
        assert first + len(lengths) == len(self._lengths), "end_document was not called after the last sequence"
        self._documents.frombytes(np.arange(first + 1, first + 1 + len(lengths), dtype=np.int64).tobytes())

    def add_sequence(self, tokens: np.ndarray | Iterable[int]) -> None:
        """Append one sequence to the document that is being written."""
        values = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        self._append(values, np.array([len(values)]))

    def end_document(self) -> None:
        """Close the document that is being written; one without sequences is allowed."""
        self._documents.append(len(self._lengths))

    def _append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        if len(tokens) and not (limits.min <= int(tokens.min()) and int(tokens.max()) <= limits.max):
            stranger = tokens[(tokens < limits.min) | (tokens > limits.max)][0]
            rule = f"token {stranger} does not fit {self.dtype.name} ({limits.min}..{limits.max})"
            remedy = "the tokenizer gives ids outside its vocab_size: check its files"
            raise UserError(Problem(f"token set {self.prefix}, document {self.num_documents}", rule, remedy))
        if len(lengths) and int(lengths.max()) > MAX_SEQUENCE_TOKENS:
            rule = f"has {int(lengths.max())} tokens; the format counts up to {MAX_SEQUENCE_TOKENS}"
            where = f"token set {self.prefix}, document {self.num_documents}"
            raise UserError(Problem(where, rule, "split the document"))
        self._file.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        self._lengths.frombytes(np.asarray(lengths, np.int32).tobytes())
        self.num_tokens += len(tokens)

    def close(self) -> None:
        """Write the index and give both files their names."""
        assert self._documents[-1] == len(self._lengths), "end_document was not called after the last sequence"
        bin_path, idx_path = self._paths
        with open(self._temporary[1], "wb") as file:
            self._write_index(file)
        self._file.flush()
        idx_path.unlink(missing_ok=True)  # a new .bin must never stand beside an old .idx
        sync_folder(idx_path.parent)
        publish(self._temporary[0], bin_path)
        publish(self._temporary[1], idx_path)
        self._file.close()

    def _write_index(self, file: BinaryIO) -> None:
        file.write(HEADER.pack(MAGIC, 1, self._code, len(self._lengths), len(self._documents)))
        lengths = np.frombuffer(self._lengths, np.int32)
        file.write(lengths.astype("<i4", copy=False).data)
        offset = 0
        for start in range(0, len(lengths), _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8", copy=False).data)
            offset = int(ends[-1])
        file.write(np.frombuffer(self._documents, np.int64).astype("<i8", copy=False).data)

    def abandon(self) -> None:
        """Drop what was written."""
        for path in self._temporary:
            path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._file.closed:
                self.abandon()
