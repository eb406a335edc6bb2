from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizer_module
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer

NASTY = [
    "",
    " ",
    "hello world",
    "  two  spaces\tand\r\nlines\n\n ",
    "naïve café — “quotes” …",
    "日本語テキスト、한국어, עברית, العربية",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \U0001f468\U0001f3ff",
    "combining: e\u0301 \u0327\u0301, \ufeff bom, \u200b zero width, \u2028 separator",
    "\x00\x01\x7f\x80\xff\u0378\ue000\uffff\U0010ffff",
    "I've they'll we'd it's 'S 'Ve 12345 a1b2",
    "<|endoftext|></s><s>[EOS]",
    "Ġ Ċ â Ħ",
]


@pytest.fixture
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return load_tokenizer(f"gpt2:{gpt2_folder}")


@pytest.fixture(scope="session")
def hf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with special tokens, truncation and padding, as published files have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there, the other world"] * 5, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def assert_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eod not in ids.tolist()
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@pytest.mark.parametrize("text", NASTY)
def test_decode_undoes_encode_on_nasty_text(text: str, gpt2: Tokenizer, hf_file: Path) -> None:
    for tokenizer in (load_tokenizer("bytes"), gpt2, load_tokenizer(f"hf:{hf_file}")):
        assert_round_trip(tokenizer, text)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_decode_undoes_encode_on_any_text(text: str, gpt2_folder: Path, hf_file: Path) -> None:
    for spec in ("bytes", f"gpt2:{gpt2_folder}", f"hf:{hf_file}"):
        assert_round_trip(load_tokenizer(spec), text)


def gpt2_words(text: str) -> list[str]:
    """GPT-2's pretokenisation, written from its published pattern without a regular expression engine.

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+   (Radford et al. 2019, encoder.py)
    """

    def kind(char: str) -> str:
        return "space" if char.isspace() else {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "other")

    words, at = [], 0
    while at < len(text):
        suffix = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, at)), None)
        body = at + (text[at] == " " and at + 1 < len(text) and kind(text[at + 1]) != "space")
        end = body + 1
        while end < len(text) and kind(text[end]) == kind(text[body]):
            end += 1
        if suffix:
            end = at + len(suffix)
        elif kind(text[body]) == "space" and end < len(text) and end - body > 1:
            end -= 1  # the last space goes to the next word
        words.append(text[at:end])
        at = end
    return words


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("abszlveréдש日0７²' \t\n\u00a0.,!-'<|_🙂"), max_size=30))
def test_gpt2_ids_are_those_of_the_published_algorithm(text: str, gpt2_folder: Path) -> None:
    text = "hell hello " + text + " world"
    vocab = json.loads((gpt2_folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (gpt2_folder / "merges.txt").read_text().splitlines()[1:]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol_of = {**{b: chr(b) for b in printable}, **{b: chr(256 + k) for k, b in enumerate(others)}}
    expected = []
    for word in gpt2_words(text):
        parts = [symbol_of[byte] for byte in word.encode()]
        while ranks := [(merges.index(p), k) for k, p in enumerate(zip(parts, parts[1:], strict=False)) if p in merges]:
            k = min(ranks)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        expected += [vocab[part] for part in parts]
    assert load_tokenizer(f"gpt2:{gpt2_folder}").encode(text).tolist() == expected


def test_published_files_give_the_same_ids_through_tiktoken(
    gpt2: Tokenizer, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [hashlib.sha256((gpt2_folder / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")]
    monkeypatch.setattr(tokenizer_module, "_GPT2_SHA256", digests)
    fast = load_tokenizer(f"gpt2:{gpt2_folder}")
    assert type(fast) is not type(gpt2) and (fast.eod, fast.vocab_size, fast.files) == (
        gpt2.eod,
        gpt2.vocab_size,
        gpt2.files,
    )
    texts = [*NASTY, "it's  we'll  \n\n x\t 12,345 ''s", " " * 300, "a\u00a0b \u3000c", "hello<|endoftext|>" * 3]
    for ours, theirs in zip(fast.encode_batch(texts), gpt2.encode_batch(texts), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_million_spaces_in_a_row_have_the_ids_of_the_published_algorithm(
    gpt2: Tokenizer, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [hashlib.sha256((gpt2_folder / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")]
    monkeypatch.setattr(tokenizer_module, "_GPT2_SHA256", digests)
    fast, million = load_tokenizer(f"gpt2:{gpt2_folder}"), 1_000_001
    texts = ["o" + " " * million + "wor", " " * million, "a" + "\n" * 100_000 + "b", "hello\n" + "\u3000 \n" * 50_000]
    texts += ["x\x1c" + " " * 100_001 + "\x1cy" + "  wor" + " " * 100_002 + "\u200bz ", "y" * 100_001 + " wor"]
    for ours, theirs in zip(fast.encode_batch(texts), gpt2.encode_batch(texts), strict=True):
        assert np.array_equal(ours, theirs)


def test_documents_cannot_end_themselves(gpt2: Tokenizer, hf_file: Path) -> None:
    hf = load_tokenizer(f"hf:{hf_file}")
    assert (gpt2.eod, hf.eod) == (271, 1)
    assert gpt2.eod not in gpt2.encode("a<|endoftext|>b")
    assert hf.eod not in hf.encode("a</s>b")
    assert gpt2.decode([gpt2.eod]) == "<|endoftext|>"


def test_an_hf_file_neither_truncates_nor_adds_tokens(hf_file: Path) -> None:
    tokenizer = load_tokenizer(f"hf:{hf_file}")
    assert tokenizer.decode(tokenizer.encode("hello world, hello there")) == "hello world, hello there"
    assert len(tokenizer.encode("x")) == 1


def test_batches_and_single_texts_have_the_same_ids(gpt2: Tokenizer, hf_file: Path) -> None:
    for tokenizer in (load_tokenizer("bytes"), gpt2, load_tokenizer(f"hf:{hf_file}")):
        for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY), strict=True):
            assert ids.tolist() == tokenizer.encode(text).tolist()


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(-5, 400)))
def test_decode_takes_any_ids(ids: list[int], gpt2_folder: Path, hf_file: Path) -> None:
    for spec in ("bytes", f"gpt2:{gpt2_folder}", f"hf:{hf_file}"):
        assert isinstance(load_tokenizer(spec).decode(ids), str)


def test_invalid_bytes_become_replacement_characters(gpt2: Tokenizer) -> None:
    assert load_tokenizer("bytes").decode([0xC3, 0x28, 256]) == "\ufffd(<|endoftext|>"
    assert gpt2.decode(gpt2.encode("é")[:1]) == "\ufffd"


def test_chars_keep_their_file_and_refuse_strangers(tmp_path: Path) -> None:
    path = tmp_path / "chars.json"
    path.write_text(json.dumps({"chars": ["\n", "a", "é", "日", "🙂"]}))
    tokenizer = load_tokenizer(f"chars:{path}")
    assert (tokenizer.vocab_size, tokenizer.eod) == (5, None)
    assert tokenizer.encode("é🙂\na日").tolist() == [2, 4, 0, 1, 3]
    assert_round_trip(tokenizer, "日é\na🙂a")
    assert tokenizer.decode([1, -1, 5]) == "a\ufffd\ufffd"
    for stranger in "bß\U0010ffff\x00":
        with pytest.raises(UserError, match="U\\+"):
            tokenizer.encode(f"a{stranger}")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"chars": []}', '{"chars": ["ab"]}', '{"chars": ["a", "a"]}', '{"chars": 3}']
)
def test_a_malformed_chars_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "chars.json").write_text(content)
    with pytest.raises(UserError, match="distinct single characters"):
        load_tokenizer(f"chars:{tmp_path / 'chars.json'}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("byte", "did you mean bytes"),
        ("gtp2:x", "did you mean gpt2:DIR"),
        ("sentencpiece:x", "did you mean sentencepiece:FILE"),
        ("", "write one of bytes | chars:FILE"),
        ("qqq", "write one of bytes | chars:FILE"),
        ("bytes:x", "is not of the form bytes"),
        ("gpt2", "is not of the form gpt2:DIR"),
        ("gpt2:", "is not of the form gpt2:DIR"),
        ("chars", "data.tokenizer=chars"),
        ("gpt2:nowhere", "nowhere/vocab.json is not a file"),
        ("hf:nowhere.json", "nowhere.json is not a file"),
    ],
)
def test_a_wrong_spec_gets_three_lines_and_the_remedy(spec: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_tokenizer(spec)
    assert expected in str(refusal.value)
    assert str(refusal.value).count("\n") == 2


def test_a_vocabulary_that_would_drop_bytes_is_refused(tmp_path: Path, gpt2_folder: Path) -> None:
    vocab = json.loads((gpt2_folder / "vocab.json").read_text())
    del vocab["Ń"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="lacks 1 of the 256 byte symbols"):
        load_tokenizer(f"gpt2:{tmp_path}")


def test_an_hf_file_without_an_end_lists_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"special tokens: \[CLS\], \[SEP\]"):
        load_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(f"hf:{tmp_path / 'bad.json'}")


def test_half_a_surrogate_pair_is_refused(gpt2: Tokenizer) -> None:
    for tokenizer in (load_tokenizer("bytes"), gpt2):
        with pytest.raises(UserError, match="character 2"):
            tokenizer.encode("ab\ud800")


def test_a_missing_library_gets_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer("sentencepiece:x")


def test_a_tiktoken_encoding_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes((byte,)): byte for byte in range(256)} | {b"he": 256, b"ll": 257}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["tiny"])
    monkeypatch.setattr(tiktoken, "get_encoding", {"tiny": encoding}.__getitem__)
    tokenizer = load_tokenizer("tiktoken:tiny")
    assert (tokenizer.eod, tokenizer.vocab_size) == (300, 301)
    for text in NASTY:
        assert_round_trip(tokenizer, text)
    assert tokenizer.decode([0xC3, 290, -1, 1000]) == "\ufffd"
    with pytest.raises(UserError, match="write one of tiny"):
        load_tokenizer("tiktoken:tony")


def test_a_sentencepiece_model_round_trips(tmp_path: Path) -> None:
    text = "hello world hello there other worlds"
    (tmp_path / "text").write_text((text + "\n") * 20)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    tokenizer = load_tokenizer(f"sentencepiece:{tmp_path / 'm.model'}")
    assert tokenizer.eod == 2
    assert_round_trip(tokenizer, text)
    assert_round_trip(tokenizer, "日本 🙂")
    assert isinstance(tokenizer.decode([0xC3, -1, 10**6]), str)
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(f"sentencepiece:{tmp_path / 'bad.model'}")
