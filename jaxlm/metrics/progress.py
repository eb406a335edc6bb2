"""How far a run is: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from jaxlm.metrics.text import count_text, duration_text, loss_text

LIVE_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 2.0
PLAIN_FIRST_LINES = 10
MEDIAN_OF_RECORDS = 50
WIDEST_BAR = 24
NARROWEST_BAR = 6

# Fields of a line in reading order: rank, key in a record, text of its value. A live line that is too long drops the
# highest rank first.
_FIELDS = (
    (1, "loss", lambda loss: f"loss {loss}"),
    (5, "lr", lambda lr: f"lr {lr:.2e}"),
    (6, "grad_norm", lambda norm: f"grad {norm:.2f}" if norm < 1e4 else f"grad {norm:.1e}"),
    (3, "tokens_per_s", lambda rate: f"{count_text(rate)} tok/s"),
    (4, "mfu", lambda mfu: f"mfu {mfu:.1%}"),
    (7, "wait_frac", lambda frac: f"wait {frac:.0%}"),
    (2, "eta", str),
)


class Progress:
    """Shows the logged records of a run of num_steps steps; a context manager.

    On a terminal: one line rewritten in place, never wider than the terminal. Elsewhere: the first ten records, then
    at most one every two seconds, and always the last. A stream that was closed on the other side (`| head`) ends the
    output, not the run. Methods may be called from any thread.
    before_s: what earlier starts of the run took. `clock` is `time.monotonic`, or a test's.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        stream: TextIO,
        before_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._stream: TextIO | None = stream
        self._is_live = stream.isatty()
        self._clock, self._start_s, self._before_s = clock, clock(), before_s
        self._shown_s, self._num_shown = -float("inf"), 0
        self._record: Mapping[str, Any] | None = None
        self._record_is_shown = True
        self._step_times_s: deque[float] = deque(maxlen=MEDIAN_OF_RECORDS)
        self._lock = threading.RLock()  # reentrant: a signal handler may note() in the middle of an update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a logged step: needs `step` and `loss`; other fields of metrics.jsonl are shown if there."""
        with self._lock:
            self._record, self._record_is_shown = record, False
            if record.get("step_time_s") is not None:
                self._step_times_s.append(record["step_time_s"])
            interval_s = LIVE_INTERVAL_S if self._is_live else PLAIN_INTERVAL_S
            is_first = not self._is_live and self._num_shown < PLAIN_FIRST_LINES
            is_last = record["step"] >= self._num_steps
            if is_first or is_last or self._clock() - self._shown_s >= interval_s:
                self._show(record)

    def note(self, text: str) -> None:
        """Prints text on lines of its own, above the live line."""
        with self._lock:
            if not self._is_live:
                self._write(text + "\n")
                return
            first, *others = text.split("\n")
            over = _width(self._stream) - 1 if self._num_shown else 0
            self._write("\r" + "\n".join([first.ljust(over), *others]) + "\n")
            if self._record is not None:
                self._show(self._record)

    def rest(self) -> None:
        """Shows the last record if it was held back, and leaves the cursor on a new line: what is noted now comes after it."""
        with self._lock:
            if self._record is not None and not self._record_is_shown:
                self._show(self._record)
            if self._is_live and self._num_shown:
                self._write("\n")
            self._record, self._num_shown = None, 0

    def close(self) -> None:
        with self._lock:
            self.rest()
            self._stream = None

    def _show(self, record: Mapping[str, Any]) -> None:
        fields = self._fields(record)
        if self._is_live:
            columns = max(_width(self._stream) - 1, 1)  # the last column makes some terminals wrap
            self._write("\r" + _live_line(fields, step=record["step"], num_steps=self._num_steps, columns=columns))
        else:
            self._write("  ".join([f"step {record['step']}/{self._num_steps}", *fields.values()]) + "\n")
        self._record_is_shown = True
        self._num_shown += 1
        self._shown_s = self._clock()

    def _fields(self, record: Mapping[str, Any]) -> dict[int, str]:
        """The texts that a line has of this record, in reading order: rank -> text."""
        loss = record["loss"]  # a log keeps it exactly; a live line keeps its width
        shown = {**record, "loss": f"{loss:.4f}" if self._is_live else loss_text(loss)}
        if record.get("step_time_s") and "data_wait_s" in record:
            shown["wait_frac"] = record["data_wait_s"] / record["step_time_s"]
        shown["eta"] = self._eta_text(record["step"])
        return {rank: text(shown[key]) for rank, key, text in _FIELDS if shown.get(key) is not None}

    def _eta_text(self, step: int) -> str | None:
        elapsed_s = self._clock() - self._start_s
        if step >= self._num_steps:
            return f"took {duration_text(self._before_s + elapsed_s)}"
        if not self._step_times_s:
            return None
        left_s = statistics.median(self._step_times_s) * (self._num_steps - step)  # one slow step does not move it
        return f"eta {duration_text(left_s)}"

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:  # else Python's flush at exit fails too, and the exit code becomes 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None
        except ValueError:  # the stream object itself was closed
            self._stream = None
        except OSError:  # a full disk or a busy terminal: this line is lost, a later one may pass
            pass


def _live_line(fields: Mapping[int, str], *, step: int, num_steps: int, columns: int) -> str:
    """A percent bar and the fields that fit, padded to exactly `columns` characters so that it covers the last one."""
    done_frac = min(step / num_steps, 1.0)
    left = f"{int(100 * done_frac):3d}%"
    shown = {0: f"{step}/{num_steps}", **fields}
    while (room := columns - len("  ".join([left, *shown.values()]))) < 0 and len(shown) > 1:
        del shown[max(shown)]
    if room >= NARROWEST_BAR + 3:
        inner = min(room - 3, WIDEST_BAR)
        left += f" [{('=' * int(inner * done_frac) + '>')[:inner]:<{inner}}]"
    return "  ".join([left, *shown.values()]).ljust(columns)[:columns]


def _width(stream: TextIO | None) -> int:
    """Columns of the terminal behind stream; 80 if it does not say (some report 0)."""
    with contextlib.suppress(OSError, ValueError):
        return (stream and os.get_terminal_size(stream.fileno()).columns) or 80
    return 80
