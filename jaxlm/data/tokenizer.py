"""Text to token ids and back: one protocol, six kinds, named by a spec such as `gpt2:DIR`.

Text is text: a document that spells out `<|endoftext|>` gets the ids of those characters, never the special id, so
that no document can end itself. Nothing is added at the start or the end; who writes documents appends `eod`.
"""

from __future__ import annotations

import abc
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxlm.config import Problem, UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a pair is one character in a str
EOD_TEXT = "<|endoftext|>"
# End-of-document tokens of published tokenizer.json files; the first one present is taken.
EOD_NAMES = (EOD_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")


class Tokenizer(abc.ABC):
    """Ids are int32 in [0, vocab_size); `eod` marks the end of a document; `files` are what it was read from.

    `load_tokenizer(spec)` gives an equal tokenizer, in any process with the same working directory.
    """

    def __init__(self, spec: str, vocab_size: int, eod: int | None, files: tuple[str, ...] = ()):
        self.spec, self.vocab_size, self.eod, self.files = spec, vocab_size, eod, files

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32[n]. Raises: UserError if the text has an unpaired surrogate."""
        if lone := LONE_SURROGATE.search(text):
            rule = f"holds {lone[0]!r}, half of a surrogate pair, which is not a character"
            raise UserError(Problem(f"text, character {lone.start()}", rule, "remove it, or replace it by U+FFFD"))
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32[n]; the texts must be encodable as UTF-8."""
        return [np.array(ids, np.int32) for ids in self._encode_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids; bytes that are not UTF-8 become U+FFFD, ids that do not exist become that or nothing."""
        return self._decode(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).astype(np.int64).tolist())

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str]) -> Iterable[Sequence[int] | np.ndarray]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 are the ids; 256 ends a document."""

    def __init__(self) -> None:
        super().__init__("bytes", 257, 256)

    def _encode_batch(self, texts: list[str]) -> Iterable[np.ndarray]:
        return (np.frombuffer(text.encode(), np.uint8) for text in texts)

    def _decode(self, ids: list[int]) -> str:
        symbols = {256: EOD_TEXT.encode(), **{byte: bytes((byte,)) for byte in range(256)}}
        return b"".join(symbols.get(i, b"\xff") for i in ids).decode(errors="replace")


class CharTokenizer(Tokenizer):
    """Each character of a fixed vocabulary is an id; nothing ends a document."""

    def __init__(self, chars: str, spec: str, files: tuple[str, ...]):
        super().__init__(spec, len(chars), None, files)
        self.chars = chars
        codes = _codepoints(chars)
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # by code point; the last stands for all above
        self._ids[codes] = np.arange(len(chars), dtype=np.int32)

    def _encode_batch(self, texts: list[str]) -> Iterable[np.ndarray]:
        for text in texts:
            ids = self._ids[np.minimum(_codepoints(text), len(self._ids) - 1)]
            if (ids < 0).any():
                char = text[int(np.argmax(ids < 0))]
                remedy = "leave the character out, or build the vocabulary from text that has it"
                spec = f"{self.spec} of {self.vocab_size} characters"
                _refuse(spec, f"does not know {char!r} (U+{ord(char):04X})", remedy)
            yield ids

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] if 0 <= i < self.vocab_size else "\ufffd" for i in ids)

    def to_json(self) -> bytes:
        """The content of FILE in `chars:FILE`."""
        return (json.dumps({"chars": list(self.chars)}) + "\n").encode()


class FastTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers` library; its threads obey TOKENIZERS_PARALLELISM."""

    def __init__(self, tokenizer: Any, spec: str, eod: int, files: tuple[str, ...]):
        super().__init__(spec, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, eod, files)
        tokenizer.no_truncation()  # published tokenizer.json files may cut at 512 tokens
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # the library's name for: special tokens in the text are ordinary text
        self._tokenizer = tokenizer

    def _encode_batch(self, texts: list[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False)


_MOST_SPACE = 100_000  # characters in a row; tiktoken's matcher panics over a million
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # what white space is to it
_LONG_SPACE = re.compile(rf"(?<!{_SPACE})({_SPACE}{{{_MOST_SPACE},}}(?={_SPACE}|\Z))")


class TiktokenTokenizer(Tokenizer):
    """An encoding of the tiktoken library; its threads obey TOKENIZERS_PARALLELISM too."""

    def __init__(self, encoding: Any, spec: str, files: tuple[str, ...] = ()):
        # eot_token is the same as this eod and raises KeyError
        super().__init__(spec, encoding.n_vocab, encoding._special_tokens.get(EOD_TEXT), files)
        self._encoding = encoding
        self._known = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        threads = (os.cpu_count() or 1) if os.environ.get("TOKENIZERS_PARALLELISM") == "true" else 1
        if not any(len(text) > _MOST_SPACE and _LONG_SPACE.search(text) for text in texts):
            return self._encoding.encode_ordinary_batch(texts, num_threads=threads)
        return [list(itertools.chain(*map(self._encode_piece, _LONG_SPACE.split(text)))) for text in texts]

    def _encode_piece(self, text: str) -> list[int]:
        """What `_LONG_SPACE` splits a text into: a run is one word, all but its last character, which goes to the next."""
        encode = self._encoding._encode_single_piece if _LONG_SPACE.match(text) else self._encoding.encode_ordinary
        return encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i in self._known], errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file; its end-of-sentence piece ends a document, if it has one."""

    def __init__(self, processor: Any, spec: str, files: tuple[str, ...]):
        eod = processor.eos_id()
        super().__init__(spec, processor.vocab_size(), eod if eod >= 0 else None, files)
        self._processor = processor

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if 0 <= i < self.vocab_size])


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a spec names.

    Raises: UserError for an unknown spec, a file that is missing or malformed, a library that is not installed.
    """
    kind, colon, argument = spec.partition(":")
    if kind not in _LOADERS:
        near = difflib.get_close_matches(kind, _LOADERS, n=3, cutoff=0.4)
        meant = f"did you mean {' or '.join(_LOADERS[name][0] for name in near)}? " if near else ""
        raise UserError(Problem(f"tokenizer {spec!r}", "is of no known kind", f"{meant}write one of {KINDS}"))
    usage, load = _LOADERS[kind]
    if spec != "chars" and (bool(argument) != (":" in usage) or (colon and not argument)):
        raise UserError(Problem(f"tokenizer {spec!r}", f"is not of the form {usage}", f"write {usage}"))
    return load(spec, argument)


def build_chars(texts: Iterable[str], *, file: str) -> CharTokenizer:
    """The sorted characters of a corpus, as what `file` is going to hold."""
    seen = np.zeros(0x110000, bool)
    for text in texts:
        seen[_codepoints(text)] = True
    chars = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le")
    return CharTokenizer(chars, f"chars:{file}", (file,))


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _refuse(spec: str, rule: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(Problem(f"tokenizer {spec}", rule, remedy)) from cause


def _require_file(spec: str, path: Path, remedy: str) -> str:
    if not path.is_file():
        _refuse(spec, f"{path} is not a file", remedy)
    return str(path)


def _load_chars(spec: str, argument: str) -> Tokenizer:
    remedy = "a run with data.tokenizer=chars builds one: WORKDIR/data/chars.json"
    if not argument:
        _refuse(spec, "names no vocabulary: plain chars is built from the corpus by a training run", remedy)
    path = _require_file(spec, Path(argument), remedy)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        chars = json.loads(Path(path).read_bytes())["chars"]
        if all(isinstance(char, str) and len(char) == 1 for char in chars) and len(set(chars)) == len(chars) > 0:
            return CharTokenizer("".join(chars), spec, (path,))
    _refuse(spec, 'the file is not {"chars": [...]} with distinct single characters', remedy)


def _load_gpt2(spec: str, argument: str) -> Tokenizer:
    import tokenizers

    remedy = "give the folder that holds GPT-2's vocab.json and merges.txt"
    vocab, merges = (_require_file(spec, Path(argument) / name, remedy) for name in ("vocab.json", "merges.txt"))
    if (encoding := _published_gpt2(vocab, merges)) is not None:
        return TiktokenTokenizer(encoding, spec, (vocab, merges))
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    except Exception as error:  # the library raises bare Exception
        _refuse(spec, f"cannot be read: {error}", remedy, error)
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    missing = [symbol for symbol in symbols if tokenizer.token_to_id(symbol) is None]
    if missing:  # the library would drop those bytes without a word
        _refuse(spec, f"vocab.json lacks {len(missing)} of the 256 byte symbols, such as {missing[0]!r}", remedy)
    if (eod := tokenizer.token_to_id(EOD_TEXT)) is None:
        _refuse(spec, f"vocab.json has no {EOD_TEXT}", remedy)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return FastTokenizer(tokenizer, spec, eod, (vocab, merges))


def _published_gpt2(vocab: str, merges: str) -> Any:
    """GPT-2's own files as an encoding of tiktoken, which gives the same ids four times as fast; None for other files,
    whose merges need not be told by their results as tiktoken wants them."""
    if any(hashlib.sha256(Path(path).read_bytes()).hexdigest() not in _GPT2_SHA256 for path in (vocab, merges)):
        return None
    import tiktoken
    import tokenizers

    # the file spells bytes that are printable characters as those, and the others by the code points from 256 on
    in_order = sorted(range(256), key=lambda byte: byte == ord(" ") or not chr(byte).isprintable())
    spelled = dict(zip(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), in_order, strict=True))
    ids = json.loads(Path(vocab).read_bytes())
    special = {EOD_TEXT: ids.pop(EOD_TEXT)}
    ranks = {bytes(spelled[symbol] for symbol in word): number for word, number in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)


# vocab.json and merges.txt as they were published
_GPT2_SHA256 = (
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _load_hf(spec: str, argument: str) -> Tokenizer:
    import tokenizers

    remedy = "give the tokenizer.json of a Hugging Face fast tokenizer"
    path = _require_file(spec, Path(argument), remedy)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        _refuse(spec, f"cannot be read: {error}", remedy, error)
    eod = next((i for name in EOD_NAMES if (i := tokenizer.token_to_id(name)) is not None), None)
    if eod is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        rule = f"has no end-of-document token under a usual name; its special tokens: {', '.join(special) or 'none'}"
        _refuse(spec, rule, f"add one of {' '.join(EOD_NAMES)} to the file's added_tokens")
    return FastTokenizer(tokenizer, spec, eod, (path,))


def _load_tiktoken(spec: str, argument: str) -> Tokenizer:
    import tiktoken

    names = tiktoken.list_encoding_names()
    if argument not in names:
        near = difflib.get_close_matches(argument, names, n=3, cutoff=0.4) or names
        _refuse(spec, f"tiktoken has no encoding {argument!r}", f"write one of {', '.join(near)}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(argument), spec)
    except Exception as error:  # whatever its download raises
        remedy = "connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        _refuse(spec, f"tiktoken could not load it: {error}", remedy, error)


def _load_sentencepiece(spec: str, argument: str) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        _refuse(spec, "the library sentencepiece is not installed", "run: pip install sentencepiece", error)
    remedy = "give a sentencepiece model, usually tokenizer.model"
    path = _require_file(spec, Path(argument), remedy)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(path)
    except (RuntimeError, OSError) as error:
        _refuse(spec, f"cannot be read: {error}", remedy, error)
    return SentencePieceTokenizer(processor, spec, (path,))


_LOADERS: dict[str, tuple[str, Callable[[str, str], Tokenizer]]] = {
    "bytes": ("bytes", lambda *_: ByteTokenizer()),
    "chars": ("chars:FILE", _load_chars),
    "gpt2": ("gpt2:DIR", _load_gpt2),
    "hf": ("hf:FILE.json", _load_hf),
    "tiktoken": ("tiktoken:NAME", _load_tiktoken),
    "sentencepiece": ("sentencepiece:FILE", _load_sentencepiece),
}
KINDS = " | ".join(usage for usage, _ in _LOADERS.values())
