"""How far a run is: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from jaxlm.metrics.numbers import count_text, duration_text, loss_text

LIVE_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 2.0
PLAIN_FIRST_LINES = 10
MEDIAN_OF_RECORDS = 50
WIDEST_BAR = 24
NARROWEST_BAR = 6

# Fields of a line in reading order, each with its rank: a live line that is too long drops the highest rank first.
_FIELD_RANKS = {"loss": 0, "lr": 4, "grad": 5, "rate": 2, "mfu": 3, "wait": 6, "eta": 1}


class Progress:
    """Shows the logged records of a run of num_steps steps that begins after start_step; a context manager.

    On a terminal: one line rewritten in place, never wider than the terminal. Elsewhere: the first ten records, then
    at most one every two seconds, and always the last. A stream that was closed on the other side (`| head`) ends the
    output, not the run. Methods may be called from any thread.
    before_s: what earlier starts of the run took. `clock` is `time.monotonic`, or a test's.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        start_step: int = 0,
        stream: TextIO,
        before_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._start_step = start_step
        self._stream: TextIO | None = stream
        self._clock = clock
        self._start_s = clock()
        self._before_s = before_s
        self._shown_s = -float("inf")
        self._num_shown = 0
        self._record: Mapping[str, Any] | None = None
        self._record_is_shown = True
        self._step_times_s: deque[float] = deque(maxlen=MEDIAN_OF_RECORDS)
        self._lock = threading.RLock()  # reentrant: a signal handler may note() in the middle of an update()
        self._is_live = _is_terminal(stream)

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
            since_s = self._clock() - self._shown_s
            is_last = record["step"] >= self._num_steps
            if self._is_live:
                is_due = since_s >= LIVE_INTERVAL_S
            else:
                is_due = self._num_shown < PLAIN_FIRST_LINES or since_s >= PLAIN_INTERVAL_S
            if is_due or is_last:
                self._show()

    def note(self, text: str) -> None:
        """Prints text on lines of its own, above the live line."""
        with self._lock:
            if not self._is_live:
                self._write(text + "\n")
                return
            first, *others = text.split("\n")
            blank = " " * (_width(self._stream) - 1)
            self._write("\r" + "\n".join([first.ljust(len(blank)) if self._num_shown else first, *others]) + "\n")
            if self._record is not None:
                self._show()

    def close(self) -> None:
        """Shows the last record if it was held back, and leaves the cursor on a new line."""
        with self._lock:
            if self._record is not None and not self._record_is_shown:
                self._show()
            if self._is_live and self._num_shown:
                self._write("\n")
            self._stream = None

    def _show(self) -> None:
        assert self._record is not None
        fields = self._fields(self._record)
        step = self._record["step"]
        if self._is_live:
            columns = max(_width(self._stream) - 1, 1)  # the last column makes some terminals wrap
            self._write("\r" + _live_line(fields, step=step, num_steps=self._num_steps, columns=columns))
        else:
            self._write("  ".join([f"step {step}/{self._num_steps}", *fields.values()]) + "\n")
        self._record_is_shown = True
        self._num_shown += 1
        self._shown_s = self._clock()

    def _fields(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Text of each field of _FIELD_RANKS that this record has, in reading order."""
        known = {key: value for key, value in record.items() if value is not None}
        # a log keeps the loss exactly; a live line keeps its width
        fields = {"loss": f"loss {record['loss']:.4f}" if self._is_live else f"loss {loss_text(record['loss'])}"}
        if "lr" in known:
            fields["lr"] = f"lr {known['lr']:.2e}"
        if "grad_norm" in known:
            fields["grad"] = (
                f"grad {known['grad_norm']:.2f}" if known["grad_norm"] < 1e4 else f"grad {known['grad_norm']:.1e}"
            )
        if "tokens_per_s" in known:
            fields["rate"] = f"{count_text(known['tokens_per_s'])} tok/s"
        if "mfu" in known:
            fields["mfu"] = f"mfu {100 * known['mfu']:.1f}%"
        if "data_wait_s" in known and known.get("step_time_s"):
            fields["wait"] = f"wait {100 * known['data_wait_s'] / known['step_time_s']:.0f}%"
        fields["eta"] = self._eta_text(record["step"])
        return fields

    def _eta_text(self, step: int) -> str:
        elapsed_s = self._clock() - self._start_s
        if step >= self._num_steps:
            return f"took {duration_text(self._before_s + elapsed_s)}"
        if self._step_times_s:  # the median, so that a slow first step or a pause does not move it
            step_time_s = statistics.median(self._step_times_s)
        else:
            step_time_s = elapsed_s / max(step - self._start_step, 1)
        return f"eta {duration_text(step_time_s * (self._num_steps - step))}"

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:
            _silence(self._stream)
            self._stream = None
        except ValueError:  # the stream object itself was closed
            self._stream = None
        except OSError:  # a full disk or a busy terminal: this line is lost, a later one may pass
            pass


def _live_line(fields: Mapping[str, str], *, step: int, num_steps: int, columns: int) -> str:
    """A percent bar and the fields that fit, padded to exactly `columns` characters so that it covers the last one."""
    done_frac = min(max(step / max(num_steps, 1), 0.0), 1.0)
    percent = f"{int(100 * done_frac):3d}%"
    shown = dict(fields)
    while True:
        text = "  ".join([f"{step}/{num_steps}", *shown.values()])
        room = columns - len(percent) - len(text) - 2
        if room >= 0 or not shown:
            break
        del shown[max(shown, key=_FIELD_RANKS.__getitem__)]
    bar = ""
    if room >= NARROWEST_BAR + 3:
        inner = min(room - 3, WIDEST_BAR)
        bar = f" [{('=' * int(inner * done_frac) + '>')[:inner]:<{inner}}]"
    return f"{percent}{bar}  {text}".ljust(columns)[:columns]


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


def _width(stream: TextIO | None) -> int:
    """Columns of the terminal behind stream; 80 if it does not say (some report 0)."""
    if stream is None:
        return 80
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _silence(stream: TextIO) -> None:
    """Points a broken pipe's descriptor at /dev/null: else Python's flush at exit fails and the exit code becomes 120.

    Source: Python documentation, library/signal, "Note on SIGPIPE".
    """
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass
