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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from jaxlm.files import mendable, write_whole

FILE_NAME = "metrics.jsonl"
LATER = "metrics.later.jsonl"  # lines of steps behind the one that a start resumed from, until its first save
ABANDONED = "metrics.abandoned.jsonl"  # and afterwards
TENSORBOARD_FLUSH_S = 10.0  # a flush takes 2 to 3 ms: tensorboardX makes it reach the disk

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


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of WORKDIR/metrics.jsonl in file order; [] if there is none. Safe on a file that is being written.

    A torn last line is passed over in silence, any other damaged line with a warning.
    """
    found, num_damaged = _read(Path(workdir) / FILE_NAME)
    if num_damaged:
        _logger.warning("%s: passed over %d damaged lines", Path(workdir) / FILE_NAME, num_damaged)
    return [record for _, record in found]


def _read(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """The sound lines of a file with their records; and how many others are damaged, not torn by the run's end."""
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []
    records = [_parse(line) for line in lines]
    return [(line, record) for line, record in zip(lines, records) if record], records[:-1].count(None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """One record, or None for a line that is torn or damaged (no proper prefix of an object is valid JSON)."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        record = from_json_values(json.loads(line))
        return record if type(record["step"]) is int else None


def _cut_back(path: Path, *, resume_step: int) -> tuple[int, int]:
    """Rewrites the file to hold, whole, exactly the lines of steps <= resume_step; those of later steps wait in LATER.

    Of two lines with the same step and the same fields the later stands, in the earlier one's place: a run that went
    over a step twice reads as if it had gone over it once. Lines come back from LATER if a start resumes behind them.
    Returns: how many lines were unreadable, and how many were of later steps.
    """
    waiting = path.with_name(LATER)
    (found, num_damaged), (held, _) = _read(path), _read(waiting)
    # what waits is of the branch that has checkpoints, and stands
    by_key = {(record["step"], frozenset(record)): line for line, record in found + held}
    lines = sorted(by_key.items(), key=lambda line: line[0][0])
    parts = {waiting: [line for (step, _), line in lines if step > resume_step]}
    parts[path] = [line for (step, _), line in lines if step <= resume_step]
    for file, part in parts.items():
        data = b"".join(line + b"\n" for line in part)
        if data != (file.read_bytes() if file.exists() else b""):
            write_whole(file, data)
    return num_damaged, sum(record["step"] > resume_step for _, record in found)


class _TensorBoard(EventsWriter):
    """Scalars in a TensorBoard event file, written on the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread of its own; a full disk kills that thread, and the tenth event
    after it blocks the training loop for ever. Its event file, written directly, raises instead.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two starts within one second from sharing, and so overwriting, one file.
        super().__init__(str(folder / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        self._flushed_s = -math.inf
        # TensorBoard hides what earlier files hold of this step and later ones.
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Mapping[str, Any]) -> None:
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if key != "step" and type(value) in (int, float)
        ]
        self._add(record["step"], summary=Summary(value=values))

    def _add(self, step: int, **what: Any) -> None:
        self.write_event(Event(wall_time=time.time(), step=step, **what))
        if time.monotonic() - self._flushed_s > TENSORBOARD_FLUSH_S:
            self.flush()
            self._flushed_s = time.monotonic()


class MetricsLog:
    """Writes records to WORKDIR/metrics.jsonl and, if asked, to WORKDIR/tensorboard; a context manager.

    Opening it cuts both back to resume_step (0: a fresh run): a torn last line goes, lines of later steps wait in LATER,
    every earlier one stays, so the file of a run that was killed and resumed reads like an unbroken run's. For that, write
    the record of step k and `settle` before the checkpoint of step k is committed. Until then the run may yet be resumed
    behind the lines that wait, from a checkpoint that could not be read for a while.

    Nothing that fails while writing ends the run: TensorBoard is dropped with one warning; a line of metrics.jsonl
    waits for the next write, with one warning in all. `warn` takes the text of a warning (default: logging).
    Raises: UserError on opening if the workdir cannot be written.
    """

    def __init__(
        self, workdir: str | Path, *, tensorboard: bool, resume_step: int, warn: Callable[[str], None] = _logger.warning
    ):
        self._warn = warn
        self._path = Path(workdir) / FILE_NAME
        self._waiting: list[bytes] = []
        self._torn_from: int | None = None  # bytes of the file before a line that fits in part
        self._warned = False
        remedy = "give --workdir a folder that you may write to and that has space left"
        with mendable(str(self._path), "the metrics file", remedy):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            num_damaged, num_later = _cut_back(self._path, resume_step=resume_step)
            self._path.open("ab").close()
        if num_damaged:
            warn(f"{self._path}: took out {num_damaged} damaged lines")
        if num_later:
            warn(f"{self._path}: {num_later} lines past step {resume_step} wait in {LATER}: they are made again")
        self._tensorboard: _TensorBoard | None = None
        if tensorboard:
            with self._tensorboard_or_off():
                self._tensorboard = _TensorBoard(self._path.parent / "tensorboard", purge_step=resume_step + 1)

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
        self._waiting.append(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._append()
        with self._tensorboard_or_off():
            if self._tensorboard:
                self._tensorboard.write(from_json_values(values))

    def flush(self) -> None:
        """Brings everything written so far to the disk, where it survives the machine."""
        self._append(sync=True)
        with self._tensorboard_or_off():
            if self._tensorboard:
                self._tensorboard.flush()

    def settle(self) -> None:
        """A save begins: `flush`, and the lines that wait in LATER are moved to ABANDONED."""
        self.flush()
        later = self._path.with_name(LATER)
        with contextlib.suppress(OSError):
            if data := later.read_bytes():
                with open(self._path.with_name(ABANDONED), "ab") as file:
                    file.write(data)
            later.unlink()

    def close(self) -> None:
        """Makes a last try at lines that wait; says how many are lost if it fails."""
        self._append()
        if self._waiting:
            self._warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
        with self._tensorboard_or_off():
            if self._tensorboard:
                self._tensorboard.close()
        self._tensorboard = None

    def _append(self, *, sync: bool = False) -> None:
        """Writes the lines that wait, in order. Opens the file anew: a stale handle (NFS) must not fail every retry."""
        try:
            with open(self._path, "ab") as file:
                if self._torn_from is not None:  # a part of a line that did not fit; never a line of another process
                    file.truncate(self._torn_from)
                while self._waiting:
                    rest, self._torn_from = self._waiting[0], file.seek(0, os.SEEK_END)
                    while rest:
                        rest = rest[os.write(file.fileno(), rest) :]
                    self._torn_from = None
                    del self._waiting[0]
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"{self._path}: {error.strerror or error}; lines wait in memory until a write succeeds")

    @contextlib.contextmanager
    def _tensorboard_or_off(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a training run
            self._tensorboard = None
            self._warn(f"TensorBoard is off from here on: {type(error).__name__}: {error}")
