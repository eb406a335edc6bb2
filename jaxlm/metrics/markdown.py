"""Foreign text in Markdown: shown as it is, able to break nothing.

A sample is whatever a model writes, a path whatever a user types; both may hold backticks, HTML, table bars, control
characters. Output is GitHub-flavoured Markdown.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_OVERRIDES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Text within a line that is no Markdown and no HTML. An underscore inside a word is safe as it is."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w))", r"\\\1", _visible(text).replace("\n", " "))


def code(value: Any) -> str:
    """A value as a code span that also fits a table cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = _visible(text).replace("\n", " ").replace("|", "\\|")
    if not text.strip():
        return "(empty)"
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def fenced(text: str) -> str:
    """A fenced block of text, with a fence longer than any run of backticks in it: only its own end ends it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{_visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _visible(text: str) -> str:
    """Control characters, unpaired surrogates and bidirectional overrides as escapes; newline and tab as they are."""
    shown = []
    for character in text:
        is_override = unicodedata.bidirectional(character) in _OVERRIDES
        is_hidden = is_override or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        shown.append(ascii(character)[1:-1] if is_hidden and character not in "\n\t" else character)
    return "".join(shown)
