"""Losses, counts and durations as people read them."""

from __future__ import annotations

import math

import numpy as np


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
