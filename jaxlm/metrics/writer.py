"""WORKDIR/metrics.jsonl and TensorBoard: what a run wrote down about its steps, unbroken over restarts.

A line of metrics.jsonl is one JSON object with an integer `step`: for a logged step also `loss, grad_norm, lr, tokens,
step_time_s, tokens_per_s, mfu, data_wait_s`, for an evaluation `eval_loss`. Floats are written as the shortest decimal
that reads back as the same bits. JSON has no NaN: a non-finite float is written as null, and the line's `nonfinite`
object says which it was, {"loss": null, ..., "nonfinite": {"loss": "nan"}}; `read_metrics` puts it back.

Start at MetricsLog. One process of a run writes; any may read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from jaxlm.config import Problem, UserError

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FLUSH_S = 10.0

_logger = logging.getLogger(__name__)


def to_json_values(value: Any) -> Any:
    """The same value in JSON's types; NumPy scalars become Python's, bit for bit, and non-finite floats leave a trace.

    In an object a non-finite float becomes null and an entry of that object's `nonfinite`; in a list, its name.
    Raises: TypeError for what JSON cannot hold; ValueError for an object that has a `nonfinite` of its own.
    """
    if isinstance(value, Mapping):
        if "nonfinite" in value:
            raise ValueError("`nonfinite` is the writer's own key of a metrics record; use another name")
        values = {str(key): to_json_values(item) for key, item in value.items()}
        names = {key: str(item) for key, item in values.items() if isinstance(item, float) and not math.isfinite(item)}
        return {**values, **dict.fromkeys(names), "nonfinite": names} if names else values
    if isinstance(value, list | tuple):
        items = [to_json_values(item) for item in value]
        return [str(item) if isinstance(item, float) and not math.isfinite(item) else item for item in items]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a metrics record holds numbers, strings and null, not {type(value).__name__}: {value!r:.80}")


def from_json_values(value: Any) -> Any:
    """Undoes `to_json_values` on an object and the objects in it: their `nonfinite` entries become floats again."""
    if not isinstance(value, dict):
        return value
    names = value.get("nonfinite", {})
    return {
        key: float(names[key]) if key in names else from_json_values(item)
        for key, item in value.items()
        if key != "nonfinite"
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Puts data at path through a temporary file beside it: a reader, or a crash, sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of WORKDIR/metrics.jsonl in file order; [] if there is none. Safe on a file that is being written.

    A torn last line is passed over in silence, any other damaged line with a warning.
    """
    records = [_parse(line) for line in _read_lines(Path(workdir) / FILE_NAME)]
    num_damaged = sum(record is None for record in records[:-1])
    if num_damaged:
        _logger.warning("%s: passed over %d damaged lines", Path(workdir) / FILE_NAME, num_damaged)
    return [record for record in records if record is not None]


def _read_lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []


def _parse(line: bytes) -> dict[str, Any] | None:
    """One record, or None for a line that is torn or damaged (no proper prefix of an object is valid JSON)."""
    try:
        record = from_json_values(json.loads(line))
    except (ValueError, TypeError, AttributeError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _cut_back(path: Path, *, resume_step: int) -> tuple[int, int]:
    """Rewrites the file to hold, whole, exactly the lines of steps <= resume_step.

    Returns: how many lines were unreadable, and how many were of later steps.

    Of two lines with the same step and the same fields the later stands, in the earlier one's place: a run that went
    over a step twice reads as if it had gone over it once.
    """
    kept: dict[tuple[int, frozenset[str]], bytes] = {}
    lines = _read_lines(path)
    records = [_parse(line) for line in lines]
    for line, record in zip(lines, records, strict=True):
        if record is not None and record["step"] <= resume_step:
            kept[record["step"], frozenset(record)] = line
    data = b"".join(line + b"\n" for line in kept.values())
    if path.exists() and path.read_bytes() != data:
        write_atomically(path, data)
    num_later = sum(record is not None and record["step"] > resume_step for record in records)
    return sum(record is None for record in records[:-1]), num_later  # the last is the line that the run's end tore


class _JsonLines:
    """Appends lines to a file; a line that cannot be written waits, in order, for the next write."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._end_bytes = -1  # of the last whole line; -1: not opened yet
        self._open()

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._descriptor = descriptor
        size_bytes = os.fstat(descriptor).st_size
        if 0 <= self._end_bytes < size_bytes:
            os.ftruncate(descriptor, self._end_bytes)  # part of a line that did not fit
        else:
            self._end_bytes = size_bytes
        return descriptor

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def write(self, line: bytes) -> None:
        """Raises OSError if it or an earlier line is still waiting."""
        self._waiting.append(line)
        self.drain()

    def drain(self) -> None:
        try:
            descriptor = self._open() if self._descriptor is None else self._descriptor
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                self._end_bytes += len(self._waiting.popleft())
        except OSError:
            self._close()  # a stale handle (NFS) must not fail every retry
            raise

    def flush(self) -> None:
        self.drain()
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the write that failed has been reported; close repeats its error
                os.close(descriptor)

    def close(self) -> None:
        try:
            if self._waiting:
                self.drain()
        finally:
            self._close()


class _TensorBoard:
    """Scalars in a TensorBoard event file, written on the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread of its own; a full disk kills that thread, and the tenth event
    after it blocks the training loop for ever. Its event file, written directly, raises instead.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two starts within one second from sharing, and so overwriting, one file.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        # TensorBoard hides what earlier files hold of this step and later ones.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=purge_step, session_log=restart))
        self._events.flush()
        self._flushed_s = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()])
        self._events.write_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
        if time.monotonic() - self._flushed_s > TENSORBOARD_FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._events.flush()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        self._events.close()


class MetricsLog:
    """Writes records to WORKDIR/metrics.jsonl and, if asked, to WORKDIR/tensorboard; a context manager.

    Opening it cuts both back to resume_step (0: a fresh run): lines of later steps and a torn last line go, every
    earlier one stays, so the file of a run that was killed and resumed reads like an unbroken run's. For that, write
    the record of step k and `flush` before the checkpoint of step k is committed.

    Nothing that fails while writing ends the run: TensorBoard is dropped with one warning; a line of metrics.jsonl
    waits for the next write, with one warning in all. `warn` takes the text of a warning (default: logging).
    Raises: UserError on opening if the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        tensorboard: bool,
        resume_step: int,
        warn: Callable[[str], None] = _logger.warning,
    ):
        self._warn = warn
        self._path = Path(workdir) / FILE_NAME
        self._warned_lines = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            num_damaged, num_later = _cut_back(self._path, resume_step=resume_step)
            self._lines = _JsonLines(self._path)
        except OSError as error:
            rule = f"the metrics file cannot be written: {error.strerror or error}"
            remedy = "give --workdir a folder that you may write to and that has space left"
            raise UserError(Problem(str(self._path), rule, remedy)) from error
        if num_damaged:
            warn(f"{self._path}: took out {num_damaged} damaged lines")
        if num_later:
            warn(f"{self._path}: took out {num_later} lines past step {resume_step}: those steps are made again")
        self._tensorboard: _TensorBoard | None = None
        if tensorboard:
            self._tensorboard = self._try_tensorboard(
                lambda: _TensorBoard(self._path.parent / "tensorboard", purge_step=resume_step + 1)
            )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, readable by others on return. Values are host numbers: a device array would make the loop wait.

        Raises: ValueError without an integer `step`; TypeError for a value that is no number, string or None.
        """
        values = to_json_values(record)
        if type(values.get("step")) is not int:
            raise ValueError(f"a metrics record needs an integer step, not {values.get('step')!r}")
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        self._try_lines(lambda: self._lines.write(line))
        if tensorboard := self._tensorboard:
            self._try_tensorboard(lambda: tensorboard.write(from_json_values(values)))

    def flush(self) -> None:
        """Brings everything written so far to the disk, where it survives the machine."""
        self._try_lines(self._lines.flush)
        if self._tensorboard:
            self._try_tensorboard(self._tensorboard.flush)

    def close(self) -> None:
        """Makes a last try at lines that wait; says how many are lost if it fails."""
        self._try_lines(self._lines.close)
        if self._lines.num_waiting:
            self._warn(f"{self._path}: {self._lines.num_waiting} lines could not be written and are lost")
        if self._tensorboard:
            self._try_tensorboard(self._tensorboard.close)
        self._tensorboard = None

    def _try_lines(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned_lines:
                self._warned_lines = True
                self._warn(f"{self._path}: {error.strerror or error}; lines wait in memory until a write succeeds")

    def _try_tensorboard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever it is, it is not worth a training run
            self._tensorboard = None
            self._warn(f"TensorBoard is off from here on: {type(error).__name__}: {error}")
            return None
