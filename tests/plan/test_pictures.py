"""What is drawn is a schedule that a pipeline can run, and its idle cells are the bubble of the formula."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.parallel.schedule import Schedule
from jaxlm.parallel.stages import Stages, cut
from jaxlm.plan.__main__ import main
from jaxlm.plan.schedule import (
    BACKWARD_LENGTH,
    DPI,
    FORWARD_LENGTH,
    halves,
    ink_on,
    most_kept,
    picture,
    text,
    tick_starts,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("schedules.txt")
GOLDEN_CASES = [
    *(Schedule(name, stages, 4) for name in ("gpipe", "1f1b") for stages in (2, 3, 4)),
    *(Schedule("1f1b", stages, 4, 2) for stages in (2, 4)),  # repeats pass in groups of as many as stages: not 3
]
CONFIG = """
from ml_collections import ConfigDict
def get_config(layers="4"):
    return ConfigDict(dict(model=dict(num_layers=int(layers)), train=dict(batch_size=16)))
"""


def stages_of(schedule: Schedule, more: int = 0) -> Stages:
    P, R = schedule.stages, schedule.repeats
    return Stages(P, R, cut(P * R + more, stages=P, repeats=R))


def drawn(schedule: Schedule, width: int = 10**6) -> str:
    return text(schedule, stages=stages_of(schedule), width=width)


@st.composite
def schedules(draw) -> Schedule:
    name = draw(st.sampled_from(["gpipe", "circular", "1f1b"]))
    stages = draw(st.integers(2, 9))
    repeats = 1 if name == "gpipe" else draw(st.integers(2 if name == "circular" else 1, 5))
    microbatches = draw(st.integers(stages, 24)) if repeats == 1 else stages * draw(st.integers(1, 4))
    return Schedule(name, stages, microbatches, repeats)


@dataclasses.dataclass
class Seen:
    """What a reader of the text sees. ticks[half, stage]: {(microbatch, repeat): tick}; idle[half, stage]: dots."""

    ticks: dict
    idle: dict
    num_ticks: int


def seen(drawing: str) -> Seen:
    """Reads columns by the tick numbers above them; fails if two entries share a cell."""
    ticks, idle, columns, stage, numbers = {}, {}, {}, "", []
    for line in drawing[re.search(r"^tick +\d", drawing, re.M).start() :].splitlines():
        if line.startswith("tick"):
            columns = {found.end(): int(found[0]) for found in re.finditer(r"\d+", line)}
            numbers += columns.values()
        elif line:
            stage, half = line.partition("stage")[2].split()[:1] or [stage], re.search("[FB]", line)
            stage = stage[0]
            key = half[0], int(stage)
            for entry in re.finditer(r"(\d+)([a-z]?)|\.", line[half.end() :]):
                tick = columns[half.end() + entry.end()]
                if entry[0] == ".":
                    idle[key] = idle.get(key, 0) + 1
                    continue
                item = int(entry[1]), ord(entry[2] or "a") - ord("a")
                assert item not in ticks.setdefault(key, {}), f"{item} twice at {key}"
                ticks[key][item] = tick
    assert numbers == list(range(len(numbers)))
    return Seen(ticks, idle, len(numbers))


def test_the_text_is_the_golden_one():
    sections = [f"== {s.name} S={s.stages} M={s.microbatches} R={s.repeats}\n{drawn(s, 100)}\n" for s in GOLDEN_CASES]
    assert "\n".join(sections) == GOLDEN.read_text()


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_what_is_drawn_can_run_and_its_idle_cells_are_the_bubble(schedule):
    S, M, R = schedule.stages, schedule.microbatches, schedule.repeats
    found = seen(drawn(schedule))
    assert found.num_ticks == schedule.num_ticks
    items = {(m, r) for m in range(M) for r in range(R)}
    forward = {(m, r, s): t for s in range(S) for (m, r), t in found.ticks["F", s].items()}
    backward = {(m, r, s): t for s in range(S) for (m, r), t in found.ticks["B", s].items()}
    for s in range(S):
        kept = np.zeros(schedule.num_ticks + 1, int)
        for half in "FB":
            at = found.ticks[half, s]
            assert at.keys() == items
            assert len(set(at.values())) == len(items)  # no two share a half-tick
            assert found.idle[half, s] == S - 1  # of M*R + S - 1
            assert found.idle[half, s] / (len(items) + found.idle[half, s]) == schedule.bubble_frac
        for m, r in items:
            one, two = forward[m, r, s], backward[m, r, s]
            if s > 0:
                assert one == forward[m, r, s - 1] + 1 and backward[m, r, s - 1] == two + 1
            elif r > 0:
                assert one == forward[m, r - 1, S - 1] + 1 and backward[m, r - 1, S - 1] == two + 1
            assert two >= one
            last = min(two, schedule.forward_ticks - 1)  # of the ticks that write, idle or not, to the ring of slots
            assert last - one < schedule.num_slots
            kept[one] += 1
            kept[two + 1] -= 1
        alive = np.cumsum(kept).max()
        assert alive == most_kept(schedule)[s] <= schedule.num_slots


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 150))
def test_folding_loses_nothing_and_keeps_to_the_width(schedule, width):
    folded, whole = drawn(schedule, width), drawn(schedule)
    assert seen(folded) == seen(whole)
    widest = max(len(line) for line in folded.splitlines())
    assert widest <= max(width, 46)  # a name and one cell; a word of the header with its column


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_the_grey_share_of_the_picture_is_the_bubble(schedule):
    lengths = {"F": FORWARD_LENGTH, "B": BACKWARD_LENGTH}
    busy = sum(lengths[half.name] * half.on.sum(1) for half in halves(schedule))
    whole = tick_starts(schedule)[-1]
    assert whole == sum(lengths[half.name] * half.runs.sum() for half in halves(schedule))
    assert (whole - busy) / whole == pytest.approx(np.full(schedule.stages, schedule.bubble_frac), rel=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [Schedule("1f1b", 2, 4), Schedule("gpipe", 12, 32), Schedule("1f1b", 4, 8, 2), Schedule("circular", 2, 2, 30)],
)
def test_the_picture_has_both_hues_and_grows_with_the_schedule(schedule):
    png = picture(schedule, stages=stages_of(schedule, more=1))
    assert png.startswith(b"\x89PNG\r\n")
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    height, width = pixels.shape[:2]
    assert 9 * DPI < width < 30 * DPI and height > (2 + 0.4 * schedule.stages) * DPI
    red, blue = pixels[..., 0] - pixels[..., 2], pixels[..., 2] - pixels[..., 0]
    assert (red > 0.15).mean() > 0.1 and (blue > 0.15).mean() > 0.05  # the lightest cells have 0.2
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 1).all()  # nothing is clipped by the border


def test_ink_reads_on_what_it_lies_on():
    assert (ink_on((1.0, 1.0, 0.9)), ink_on((0.1, 0.1, 0.4))) == ("black", "white")


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "tiny.py").write_text(CONFIG)
    return f"{tmp_path}/tiny.py"


def test_the_command_draws_and_refuses_with_three_lines(config, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "jaxlm.plan", "--config", f"{config}:8", "--schedule", *arguments]
        env = os.environ | {"COLUMNS": "60", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none: no device is touched"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    png = tmp_path / "schedule.png"
    done = run("--config.mesh.pipeline=2", "--config.pipeline.repeats=2", "--png", str(png))
    assert (done.returncode, done.stderr) == (0, "")
    wanted = text(Schedule("1f1b", 2, 8, 2), stages=Stages(2, 2, (2, 2, 2, 2)), width=60)
    assert done.stdout.startswith(wanted) and "mesh.data=-1 was counted as 1" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    refused = run("--config.mesh.pipeline=1")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 3)
    assert refused.stderr.startswith("error: mesh.pipeline=1\n") and "--config.mesh.pipeline" in refused.stderr


def test_devices_decide_the_stages_that_are_left(config, capsys):
    mesh = ["--config.mesh.pipeline=-1", "--config.mesh.data=2", "--config.pipeline.microbatches=8"]
    assert main(["--config", config, "--schedule", *mesh, "--devices=8"]) == 0
    printed = capsys.readouterr().out
    assert "S = 4; layers of each: 1 1 1 1" in printed and "counted" not in printed
    assert len(seen(printed).ticks["F", 3]) == 8


@pytest.mark.parametrize(
    "arguments, where, count",
    [
        ("--config.mesh.pipeline=-1 --config.mesh.data=1", "mesh.pipeline=-1", 1),
        ("--config.mesh.pipeline=-1 --config.mesh.data=4 --devices=4", "mesh.pipeline=-1", 1),
        ("--config.mesh.pipeline=3 --devices=8", "mesh: pipeline=3", 1),
        ("--config.mesh.pipeline=2 --devices=0", "--devices=0", 1),
        ("--config.mesh.pipeline=2 --devices=64", "pipeline.microbatches=8 (4 a stage, the default)", 1),
        ("--config.mesh.pipeline=4 --config.pipeline.microbatches=2", "pipeline.microbatches=2", 1),
        ("--config.mesh.pipeline=8 --config.pipeline.microbatches=3", "pipeline.microbatches=3", 3),
        ("--config.mesh.pipeline=2 --config.pipeline.stage_layers=1,2", "pipeline.stage_layers=1,2", 1),
        ("--config.mesh.pipeline=2 --png /nowhere/at/all.png", "--png=/nowhere/at/all.png", 1),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_exit_2(config, arguments, where, count):
    with pytest.raises(UserError) as caught:
        main(["--config", config, "--schedule", *arguments.split()])
    assert caught.value.exit_code == 2 and len(caught.value.problems) == count
    assert caught.value.problems[0].where == where and str(caught.value).count("\n") == 3 * count - 1
