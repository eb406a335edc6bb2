"""Where the time of a run went, over all its starts: WORKDIR/time.jsonl, and the account made from it.

A line is one JSON object: `start`, when its process began (seconds since 1970), and `spent`, seconds by phase since the
line before. A line that holds steps says which: `first`, done before them, and `last`. Lines are appended every few
seconds and before each save: a kill loses seconds, and a resumed run knows what the steps it makes again had cost.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.metrics.text import duration_text

FILE_NAME = "time.jsonl"
EVERY_S = 10.0

# What a run spends its time on, in reading order. "lost" and "down" are found afterwards.
PHASES = {
    "step": "steps that count",
    "lost": "steps made again after a kill",
    "data wait": "waiting for a batch",
    "evaluate": "evaluations",
    "save": "saves, as far as they block",
    "init": "settings and data",
    "restore": "restoring",
    "compile": "compiling, and making the first state",
    "end": "sample and report",
    "down": "between two starts",
}


class Ledger:
    """Accounts for the time of one start of a run, phase by phase; a context manager.

    `enter` ends the phase before. Nothing that fails while writing ends the run: the time is added to the next line.
    on_enter is told every phase; nothing is written while `lost` says that the folder is another run's. `clock` counts
    seconds, `wall_clock` says when a start began.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        on_enter: Callable[[str], None] = lambda phase: None,
        lost: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._path, self._on_enter, self._lost, self._clock = workdir / FILE_NAME, on_enter, lost, clock
        self._start = wall_clock()
        self._phase, self._since_s, self._written_s = "init", clock(), clock()
        self._spent = defaultdict[str, float](float)
        self._first = self._last = 0
        self._counts = False
        on_enter("init")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    @property
    def where(self) -> str:
        """Where the run is, in words."""
        return f"{PHASES[self._phase]}, {self._last} steps done"

    def resume(self, step: int) -> None:
        """Steps count from here: the state is that after `step`. A start that does not come this far is none: it was
        refused, or found the run done, or its time is that between two starts."""
        self._first = self._last = step
        self._counts = True
        self._write()

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """The run begins with `phase`; `step` steps are done."""
        assert phase in PHASES, phase
        now = self._clock()
        self._spent[self._phase] += now - self._since_s
        self._phase, self._since_s = phase, now
        self._last = self._last if step is None else step
        self._on_enter(phase)
        if now - self._written_s > EVERY_S or phase == "save":  # a save ends a line: what a resume keeps is whole lines
            self._write()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` inside another one, which goes on afterwards."""
        around = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(around)

    def flush(self) -> None:
        """Writes down all that was spent until now."""
        self.enter(self._phase)
        self._write()

    def _write(self) -> None:
        if not self._counts or self._lost():
            return
        line: dict[str, Any] = {"start": round(self._start, 3)}
        if self._last > self._first:
            line |= {"first": self._first, "last": self._last}
        line["spent"] = {phase: round(spent_s, 6) for phase, spent_s in self._spent.items()}
        with contextlib.suppress(OSError):
            with open(self._path, "ab") as file:
                file.write(b"\n" + json.dumps(line).encode())  # the newline first: it also ends a line that a kill tore
            self._spent, self._first, self._written_s = defaultdict(float), self._last, self._clock()


@dataclass(frozen=True)
class Account:
    """Seconds of a run by phase, which add up to `wall_s`, and how often it was started."""

    starts: int
    wall_s: float
    spent_s: dict[str, float]

    @property
    def productive_frac(self) -> float:
        """Goodput: the share of the time since the first start that went into steps that count."""
        return self.spent_s["step"] / self.wall_s if self.wall_s else 0.0

    @property
    def running_s(self) -> float:
        """Time in which the run was running."""
        return self.wall_s - self.spent_s["down"]

    @property
    def since(self) -> str:
        return f"since the first of {self.starts} starts" if self.starts > 1 else "since the first of one start"

    def __str__(self) -> str:
        """Two lines: the whole, and what is a hundredth of it or more, the largest first."""
        rest = sorted(((s, phase) for phase, s in self.spent_s.items() if phase != "step"), reverse=True)
        large = ", ".join(f"{phase} {s:.1f} s" for s, phase in rest if s >= self.wall_s / 100)
        whole = f"{duration_text(self.wall_s)} {self.since}, {self.productive_frac:.1%} in steps that count"
        return f"{whole}\n      {large}" if large else whole


def read_account(workdir: str | Path) -> Account | None:
    """The account of the run in `workdir`, None if it kept none; a line that is torn or damaged is passed over."""
    totals_s = defaultdict[str, float](float)
    starts: list[float] = []
    end_s = 0.0  # wall clock at the end of what was read
    spans: list[tuple[int, int, float]] = []  # (first, last, seconds) of steps that nothing has undone
    for line in _read_lines(Path(workdir) / FILE_NAME):
        start, spent = line["start"], line["spent"]
        if start not in starts[-1:]:
            totals_s["down"] += max(start - end_s, 0.0) if starts else 0.0
            starts.append(start)
            end_s = max(start, end_s)
        if "first" in line:
            if spans and spans[-1][1] > line["first"]:
                spans, lost_s = _undo(spans, line["first"])
                totals_s["lost"] += lost_s
                totals_s["step"] -= lost_s
            spans.append((line["first"], line["last"], spent.get("step", 0.0)))
        for phase, seconds in spent.items():
            totals_s[phase] += seconds
        end_s += sum(spent.values())
    spent_s = {phase: max(totals_s[phase], 0.0) for phase in PHASES}  # a sum of floats may end below 0
    return Account(len(starts), sum(spent_s.values()), spent_s) if starts else None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"start", "spent"} <= line.keys():
                yield line


def _undo(spans: list[tuple[int, int, float]], step: int) -> tuple[list[tuple[int, int, float]], float]:
    """Steps after `step` are made again: the spans without them, and the seconds that they took."""
    kept, lost_s = [], 0.0
    for first, last, seconds in spans:
        lost_frac = min(max((last - step) / (last - first), 0.0), 1.0)
        lost_s += seconds * lost_frac
        if lost_frac < 1:
            kept.append((first, min(last, step), seconds * (1 - lost_frac)))
    return kept, lost_s
