"""The results of a run from its metrics, and the smoothed loss that a picture shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Point:
    """A value of one field of metrics.jsonl and the step it belongs to."""

    step: int
    value: float


@dataclass(frozen=True)
class Summary:
    """Results of a run up to its last logged step. None: not measured.

    train_time_s is the sum of step times, without compilation, evaluation and saving; rates are medians over logged
    steps; data_wait_frac is the share of train_time_s spent without a batch; train_loss_smoothed is the end of
    `smoothed`.
    """

    step: int
    tokens: int | None
    train_loss_last: Point | None
    train_loss_best: Point | None
    train_loss_smoothed: Point | None
    eval_loss_last: Point | None
    eval_loss_best: Point | None
    train_time_s: float
    step_time_s_median: float | None
    tokens_per_s_median: float | None
    mfu_median: float | None
    data_wait_frac: float | None
    num_nonfinite_losses: int


def points(records: Sequence[Mapping[str, Any]], *, key: str, finite: bool = False) -> list[Point]:
    """The values of one field, `loss` or `eval_loss` say, in file order; records without it are passed over."""
    found = [Point(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [point for point in found if math.isfinite(point.value)] if finite else found


def summarize(records: Sequence[Mapping[str, Any]]) -> Summary:
    train, evaluated = points(records, key="loss"), points(records, key="eval_loss")
    finite, by_value = points(records, key="loss", finite=True), attrgetter("value")
    logged = [record for record in records if record.get("loss") is not None]
    num_steps = _steps_covered([record["step"] for record in logged])
    train_time_s, data_wait_s = (
        sum(n * (record.get(key) or 0.0) for n, record in zip(num_steps, logged, strict=True))
        for key in ("step_time_s", "data_wait_s")
    )
    end = smoothed(np.array([point.value for point in finite]))
    return Summary(
        step=max(record["step"] for record in records),
        tokens=max((record["tokens"] for record in logged if record.get("tokens") is not None), default=None),
        train_loss_last=train[-1] if train else None,
        train_loss_best=min(finite, key=by_value, default=None),
        train_loss_smoothed=Point(finite[-1].step, float(end[-1])) if finite else None,
        eval_loss_last=evaluated[-1] if evaluated else None,
        eval_loss_best=min(points(records, key="eval_loss", finite=True), key=by_value, default=None),
        train_time_s=train_time_s,
        step_time_s_median=_median(records, "step_time_s"),
        tokens_per_s_median=_median(records, "tokens_per_s"),
        mfu_median=_median(records, "mfu"),
        data_wait_frac=data_wait_s / train_time_s if train_time_s > 0 else None,
        num_nonfinite_losses=len(train) - len(finite),
    )


def _steps_covered(steps: Sequence[int]) -> list[int]:
    """Steps that each logged record averages over: those since the record before it.

    The first record of a file whose beginning was lost covers no more than the usual distance between two.
    """
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    return [min(steps[0], int(statistics.median(gaps or steps))), *gaps] if steps else []


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [point.value for point in points(records, key=key, finite=True)]
    return statistics.median(values) if values else None


def smoothed(values: np.ndarray) -> np.ndarray:
    """Two passes of a centred moving mean over finite values, f64[n] -> f64[n].

    The window reaches an eightieth of the run to each side, at least two points; less near the start, where the loss
    falls so fast that a wide window would bend the curve; and not past the end.
    """
    num_points = len(values)
    index = np.arange(num_points)
    half = np.minimum(index // 5, max(num_points // 80, 2))
    first, stop = index - half, np.minimum(index + half + 1, num_points)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        values = (sums[stop] - sums[first]) / (stop - first)
    return values
