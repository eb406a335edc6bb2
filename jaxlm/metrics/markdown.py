"""Foreign text in Markdown: shown as it is, able to break nothing.

A sample is whatever a model writes, a path whatever a user types; both may hold backticks, HTML, table bars, control
characters. Output is GitHub-flavoured Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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
    return f"{_fence(text)} {text} {_fence(text)}" if "`" in text else f"`{text}`"


def fenced(text: str) -> str:
    """A fenced block of text that only its own end ends."""
    fence = _fence(text).rjust(3, "`")
    return f"{fence}text\n{_visible(text)}\n{fence}"


def _fence(text: str) -> str:
    """More backticks than stand together anywhere in the text."""
    return max(re.findall("`+", text), default="") + "`"


def _visible(text: str) -> str:
    """Control characters, unpaired surrogates and bidirectional overrides as escapes; newline and tab as they are."""
    return _HIDDEN.sub(lambda character: ascii(character[0])[1:-1], text)
