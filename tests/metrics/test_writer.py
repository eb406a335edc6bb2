"""metrics.jsonl reads like an unbroken run's, to the bit, whatever happens around it."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import struct

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.metrics import writer
from jaxlm.metrics.writer import MetricsLog, read_metrics


def record(step: int, **fields: object) -> dict[str, object]:
    return {"step": step, "loss": np.float32(10.0 / step), "grad_norm": 1.0, "lr": 3e-4, "tokens": 64 * step, **fields}


def write_run(workdir, steps, *, resume_step=0, tensorboard=False):
    with MetricsLog(workdir, tensorboard=tensorboard, resume_step=resume_step) as log:
        for step in steps:
            log.write(record(step))
            if step % 4 == 0:
                log.write({"step": step, "eval_loss": 1.0 / step})


def content(workdir) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "loss": 1.', b'{"step": 10, "loss": 1.0', b"\x00\x00\x00"])
@pytest.mark.parametrize("resume_step", [0, 3, 4, 8])
def test_killed_and_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path, torn, resume_step):
    write_run(tmp_path / "unbroken", range(1, 13))
    killed = tmp_path / "killed"
    write_run(killed, range(1, 10))
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(torn)
    write_run(killed, range(resume_step + 1, 13), resume_step=resume_step)
    assert content(killed) == content(tmp_path / "unbroken")


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    write_run(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]


def test_steps_written_twice_are_read_once_after_a_resume(tmp_path):
    lines = [record(step, loss=loss) for step, loss in [(1, 5.0), (2, 4.0), (3, 3.5), (2, 4.5), (3, 3.0), (4, 2.0)]]
    lines.insert(2, {"step": 2, "eval_loss": 9.0})  # another kind of line of the same step: no duplicate
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in map(plain, lines)))
    MetricsLog(tmp_path, tensorboard=False, resume_step=3).close()
    kept = [(line["step"], line.get("loss", line.get("eval_loss"))) for line in read_metrics(tmp_path)]
    assert kept == [(1, 5.0), (2, 4.5), (2, 9.0), (3, 3.0)]


def plain(line):
    return {key: float(value) if isinstance(value, np.float32) else value for key, value in line.items()}


def test_lines_behind_a_checkpoint_that_was_unreadable_for_a_while_come_back_with_it(tmp_path):
    write_run(tmp_path, range(1, 13))
    whole = content(tmp_path)
    write_run(tmp_path, [], resume_step=6)  # step 12 can not be read, nor 9: from 6 again, killed at once, and again
    with MetricsLog(tmp_path, tensorboard=False, resume_step=6) as log:
        log.write(record(8, loss=0.5))  # of other settings, that log every second step
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 8]
    MetricsLog(tmp_path, tensorboard=False, resume_step=12).close()  # now it can
    assert content(tmp_path) == whole and not (tmp_path / "metrics.later.jsonl").read_bytes()


def test_a_save_gives_up_the_lines_of_steps_that_are_made_again_and_keeps_them(tmp_path):
    write_run(tmp_path, range(1, 13))
    with MetricsLog(tmp_path, tensorboard=False, resume_step=6) as log:
        log.write(record(7, loss=0.5))
        log.settle()
    MetricsLog(tmp_path, tensorboard=False, resume_step=12).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7]
    given_up = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in given_up] == [7, 8, 8, 9, 10, 11, 12, 12]


def test_an_append_never_cuts_what_another_process_wrote(tmp_path):
    mine = MetricsLog(tmp_path, tensorboard=False, resume_step=0)
    mine.write(record(1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n')
    mine.write(record(3))
    mine.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_costs_no_other_line_and_is_reported(tmp_path):
    write_run(tmp_path, range(1, 4))
    lines = content(tmp_path).split(b"\n")
    lines.insert(1, b"\xff\x00 not a line")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    warnings: list[str] = []
    MetricsLog(tmp_path, tensorboard=False, resume_step=3, warn=warnings.append).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(warnings) == 1 and "1 damaged" in warnings[0]


def test_a_crash_while_cutting_back_loses_no_line(tmp_path, monkeypatch):
    write_run(tmp_path, range(1, 10))
    before = content(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, tensorboard=False, resume_step=5)
    assert content(tmp_path) == before
    monkeypatch.undo()
    MetricsLog(tmp_path, tensorboard=False, resume_step=5).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5]


def test_every_float_reads_back_with_the_same_bits(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    doubles = [float(value) for value in bits.view(np.float64) if math.isfinite(value)] + [-0.0, 5e-324, 0.1]
    singles = [value for value in bits.view(np.float32) if np.isfinite(value)]
    with MetricsLog(tmp_path, tensorboard=False, resume_step=0) as log:
        for step, value in enumerate([*doubles, *singles, np.array(singles[0])]):
            log.write({"step": step, "loss": value})
    read = [line["loss"] for line in read_metrics(tmp_path)]
    assert [struct.pack("<d", value) for value in read[: len(doubles)]] == [struct.pack("<d", v) for v in doubles]
    assert np.array(read[len(doubles) :], np.float32).tobytes() == np.array([*singles, singles[0]]).tobytes()


def test_nonfinite_values_are_valid_json_and_read_back(tmp_path):
    written = {"step": 1, "loss": np.float32("nan"), "grad_norm": math.inf, "lr": -math.inf, "mfu": None}
    with MetricsLog(tmp_path, tensorboard=True, resume_step=0) as log:
        log.write(written)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(content(tmp_path), parse_constant=refuse)
    assert line["loss"] is None and line["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "lr": "-inf"}
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read.pop("loss"))
    assert read == {"step": 1, "grad_norm": math.inf, "lr": -math.inf, "mfu": None}


def test_each_line_is_readable_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, resume_step=0) as log:
        log.write(record(1))
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_full_disk_holds_lines_back_and_loses_none(tmp_path):
    warnings: list[str] = []
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=0, warn=warnings.append)
    log.write(record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content(tmp_path)) + 10, hard))  # ten bytes of the next line fit
    try:
        for step in (2, 3, 4):
            log.write(record(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log.write(record(5))
    log.close()
    expected = b"".join(json.dumps(line).encode() + b"\n" for line in map(plain, map(record, range(1, 6))))
    assert content(tmp_path) == expected
    assert len(warnings) == 1


def test_lines_that_never_reach_the_disk_are_named_as_lost(tmp_path, monkeypatch):
    warnings: list[str] = []
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=0, warn=warnings.append)
    monkeypatch.setattr(writer.os, "write", fail)
    for step in (1, 2):
        log.write(record(step))
    log.close()
    assert len(warnings) == 2 and "2 lines" in warnings[1]


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", ["__init__", "write", "flush", "close"])
def test_a_failing_tensorboard_is_dropped_with_one_warning_and_no_line_lost(tmp_path, monkeypatch, failing, caplog):
    monkeypatch.setattr(writer._TensorBoard, failing, fail)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, tensorboard=True, resume_step=0) as log:
        for step in range(1, 6):
            log.write(record(step))
            log.flush()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [entry.message for entry in caplog.records if "TensorBoard" in entry.message] == [
        "TensorBoard is off from here on: OSError: [Errno 28] No space left on device"
    ]


def events(folder):
    """(step, what) of every event in every file of a TensorBoard folder, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            event = Event.FromString(data[offset + 12 : offset + 12 + length])
            offset += 12 + length + 4
            scalars = {value.tag: value.simple_value for value in event.summary.value}
            found.append((event.step, scalars or ("start" if event.HasField("session_log") else "version")))
    return found


def test_tensorboard_gets_the_numbers_and_hides_what_a_resume_goes_over_again(tmp_path):
    for resume_step, steps in ((0, [1, 2, 3]), (2, [3])):
        with MetricsLog(tmp_path, tensorboard=True, resume_step=resume_step) as log:
            for step in steps:
                log.write({"step": step, "loss": 0.5 * step, "mfu": None, "note": "text"})
    one, two, three = ((step, {"loss": 0.5 * step}) for step in (1, 2, 3))
    version = (0, "version")
    assert events(tmp_path / "tensorboard") == [version, (1, "start"), one, two, three, version, (3, "start"), three]


def test_a_workdir_that_cannot_be_written_is_a_three_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        MetricsLog(tmp_path / "file" / "workdir", tensorboard=False, resume_step=0)
    assert len(str(caught.value).split("\n")) == 3 and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"loss": 1.0}, ValueError),
        ({"step": True}, ValueError),
        ({"step": 1, "nonfinite": {}}, ValueError),
        ({"step": 1, "loss": np.zeros(3)}, TypeError),
    ],
)
def test_a_record_that_breaks_the_contract_is_refused(tmp_path, bad, error):
    with MetricsLog(tmp_path, tensorboard=False, resume_step=0) as log, pytest.raises(error):
        log.write(bad)
    assert read_metrics(tmp_path) == [] and os.listdir(tmp_path) == ["metrics.jsonl"]
