"""The progress line: never wider than a terminal, readable in a log, never the end of a run."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import numpy as np
import pytest

from jaxlm.metrics.progress import Progress


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def record(step: int, **fields: object) -> dict[str, object]:
    full = {"step": step, "loss": float(np.float32(10.826174)), "grad_norm": 1.234, "lr": 3e-4, "tokens": 64 * step}
    return full | {"step_time_s": 0.25, "tokens_per_s": 123_456.0, "mfu": 0.412, "data_wait_s": 0.005} | fields


def test_a_log_line_says_everything_with_the_loss_to_its_last_bit():
    stream = io.StringIO()
    with Progress(num_steps=1000, stream=stream, clock=Clock()) as progress:
        progress.update(record(1))
    assert stream.getvalue() == (
        "step 1/1000  loss 10.826174  lr 3.00e-04  grad 1.23  123k tok/s  mfu 41.2%  wait 2%  eta 0:04:10\n"
    )
    assert np.float32("10.826174") == np.float32(record(1)["loss"])


def test_a_log_has_the_first_ten_records_then_one_every_two_seconds_and_the_last():
    stream, clock = io.StringIO(), Clock()
    with Progress(num_steps=100, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now_s += 0.25
            progress.update(record(step))
        shown_at_the_end = stream.getvalue()
    assert stream.getvalue() == shown_at_the_end  # nothing was left for close to show
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [*range(1, 11), *range(18, 99, 8), 100]


def test_the_last_record_of_a_run_that_stops_early_is_in_the_log():
    stream = io.StringIO()
    with Progress(num_steps=100, stream=stream, clock=Clock()) as progress:
        for step in range(1, 31):
            progress.update(record(step))
    assert stream.getvalue().splitlines()[-1].startswith("step 30/100 ")
    assert len(stream.getvalue().splitlines()) == 11


def test_a_log_has_no_control_characters_and_notes_keep_their_place():
    stream = io.StringIO()
    with Progress(num_steps=2, stream=stream, clock=Clock()) as progress:
        progress.note("resumed from step 0")
        progress.update(record(1))
        progress.note("step 1  eval loss 3.25")
        progress.update(record(2))
    lines = stream.getvalue().split("\n")
    assert lines[0] == "resumed from step 0" and lines[2] == "step 1  eval loss 3.25" and lines[4:] == [""]
    assert stream.getvalue().replace("\n", "").isprintable()


def test_the_eta_follows_the_median_so_one_slow_step_does_not_move_it():
    stream = io.StringIO()
    with Progress(num_steps=7205, stream=stream, clock=Clock()) as progress:
        for step, step_time_s in enumerate([90.0, 1.0, 1.0, 300.0, 1.0], start=1):
            progress.update(record(step, step_time_s=step_time_s))
    assert stream.getvalue().splitlines()[-1].endswith("eta 2:00:00")


def test_unknown_fields_are_left_out_and_nan_is_shown():
    stream = io.StringIO()
    with Progress(num_steps=9, stream=stream, clock=Clock()) as progress:
        progress.update({"step": 1, "loss": float("nan"), "mfu": None, "grad_norm": float("inf")})
    assert stream.getvalue() == "step 1/9  loss nan  grad inf\n"


def on_terminal(columns: int, show) -> str:
    """What show(stream) writes to a pseudo-terminal of that width."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(reader, 65536):
                received.append(data)
        except OSError:
            pass  # Linux ends a pseudo-terminal with EIO

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w", encoding="utf-8", newline="") as stream:
        show(stream)
    thread.join()
    os.close(reader)
    return b"".join(received).decode().replace("\r\n", "\n")


def screen(text: str) -> list[str]:
    """Lines of a terminal after text; a carriage return writes over what is there."""
    lines = []
    for line in text.split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return lines


@pytest.mark.parametrize("columns", [1, 2, 12, 20, 40, 60, 79, 80, 120, 200])
def test_a_live_line_is_never_wider_than_the_terminal(columns):
    def show(stream):
        clock = Clock()
        with Progress(num_steps=1_000_000, stream=stream, clock=clock) as progress:
            for step in (1, 999, 123_456, 999_999, 1_000_000):
                clock.now_s += 1.0
                progress.update(record(step, grad_norm=1e-30, tokens_per_s=9.99e9))

    text = on_terminal(columns, show)
    pieces = text.replace("\n", "\r").split("\r")
    assert len(pieces) >= 6
    assert max(map(len, pieces)) <= max(columns - 1, 1)


def test_a_live_line_has_the_bar_and_every_field_where_there_is_room():
    def show(stream):
        with Progress(num_steps=1000, stream=stream, clock=Clock()) as progress:
            progress.update(record(500))

    (line, after) = screen(on_terminal(140, show))
    assert line == (
        " 50% [============>           ]  500/1000  loss 10.8262  lr 3.00e-04  grad 1.23  123k tok/s  mfu 41.2%"
        "  wait 2%  eta 0:02:05"
    )
    assert after == ""


def test_a_narrow_live_line_keeps_step_loss_and_eta():
    def show(stream):
        with Progress(num_steps=1000, stream=stream, clock=Clock()) as progress:
            progress.update(record(500))

    assert screen(on_terminal(50, show))[0] == " 50%  500/1000  loss 10.8262  eta 0:02:05"


def test_a_note_stands_above_the_live_line_without_remains_of_it():
    def show(stream):
        clock = Clock()
        with Progress(num_steps=1000, stream=stream, clock=clock) as progress:
            progress.note("started")
            progress.update(record(1))
            progress.note("committed step 1\nand more")
            clock.now_s += 1.0
            progress.update(record(2))

    lines = screen(on_terminal(100, show))
    assert lines[:3] == ["started", "committed step 1", "and more"]
    assert "2/1000" in lines[3] and "1/1000" not in "".join(lines) and lines[4:] == [""]


def test_a_live_line_is_redrawn_at_most_ten_times_a_second():
    def show(stream):
        clock = Clock()
        with Progress(num_steps=1000, stream=stream, clock=clock) as progress:
            for step in range(1, 1001):
                clock.now_s += 0.001
                progress.update(record(step))

    text = on_terminal(100, show)
    assert 9 <= text.count("\r") <= 12 and "1000/1000" in text and "took 0:00:01" in text


def test_a_closed_pipe_ends_the_output_and_not_the_run():
    program = """
import sys
from jaxlm.metrics.progress import Progress
with Progress(num_steps=100000, stream=sys.stdout) as progress:
    for step in range(1, 3001):
        progress.note("x" * 100)
        progress.update({"step": step, "loss": 1.0})
print("done", file=sys.stderr)
"""
    # Unbuffered output would hide what is left in the buffer of a broken pipe, which fails at exit.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, env=environment)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"done\n")


def test_a_stream_that_cannot_show_a_character_shows_its_escape():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(num_steps=9, stream=stream) as progress:
        progress.note("é")
        progress.update(record(1))
    stream.flush()
    assert raw.getvalue().startswith(b"\\xe9\nstep 1/9 ")


def test_a_closed_stream_is_no_error():
    stream = io.StringIO()
    progress = Progress(num_steps=9, stream=stream)
    stream.close()
    progress.update(record(1))
    progress.note("text")
    progress.close()
