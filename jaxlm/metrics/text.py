"""Text for people: losses, counts and durations as they read them, and foreign text in Markdown, able to break nothing.

A sample is whatever a model writes, a path whatever a user types; both may hold backticks, HTML, table bars, control
characters. Output is GitHub-flavoured Markdown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def loss_text(loss: float) -> str:
    """The shortest decimal that reads back as this loss: of its f32 if it is one exactly, else of the f64.

    Example: loss_text(float(np.float32(2.7))) == "2.7"; loss_text(0.1) == "0.1".
    """
    with np.errstate(over="ignore"):
        as_f32 = np.float32(loss)
    return str(as_f32) if float(as_f32) == loss or math.isnan(loss) else repr(float(loss))


def count_text(count: float) -> str:
    """Three significant digits with k, M, B or T from ten thousand up. Example: 1_234 -> 1,234; 12_345 -> 12.3k."""
    if not math.isfinite(count) or abs(count) < 9_999.5:
        return f"{count:,.0f}"
    for unit, letter in ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        scaled = count / unit
        if abs(scaled) < 999.5 or letter == "T":
            break
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:,.{digits}f}{letter}"


def duration_text(seconds: float) -> str:
    """h:mm:ss, hours unbounded. Example: 3_725 -> 1:02:05."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


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
