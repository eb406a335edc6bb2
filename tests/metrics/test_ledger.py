"""Every second since the first start of a run is in exactly one place of its account, whatever ended each start."""

import json
import resource

import pytest

from jaxlm.metrics.ledger import EVERY_S, FILE_NAME, PHASES, Ledger, read_account


class Clock:
    """Seconds that pass when the test says so; `boot` is another machine's, whose monotonic clock starts elsewhere."""

    def __init__(self):
        self.now, self.boot = 1e9, 0.0

    def start(self, workdir, **more):
        return Ledger(workdir, clock=lambda: self.now - self.boot, wall_clock=lambda: self.now, **more)

    def spend(self, ledger, phase, seconds, *, step=None):
        ledger.enter(phase, step=step)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def train(clock, ledger, start, stop, *, save_every=5, step_s=2.0):
    """Steps of 2 s with 0.5 s of waiting for data each, and a save of 1 s after every fifth."""
    ledger.resume(start)
    for step in range(start, stop):
        clock.spend(ledger, "data wait", 0.5, step=step)
        clock.spend(ledger, "step", step_s)
        if (step + 1) % save_every == 0:
            clock.spend(ledger, "save", 1.0, step=step + 1)
            ledger.enter("step")


def test_one_start_is_accounted_for_phase_by_phase(tmp_path, clock):
    with clock.start(tmp_path) as ledger:
        clock.now += 3
        clock.spend(ledger, "restore", 1)
        clock.spend(ledger, "compile", 7)
        train(clock, ledger, 0, 10)
        clock.spend(ledger, "evaluate", 4, step=10)
        clock.spend(ledger, "end", 2)
    account = read_account(tmp_path)
    want = {"init": 3, "restore": 1, "compile": 7, "step": 20, "data wait": 5, "save": 2, "evaluate": 4, "end": 2}
    assert account.spent_s == pytest.approx(dict.fromkeys(PHASES, 0) | want, abs=1e-5)
    assert account.wall_s == pytest.approx(44) and account.productive_frac == pytest.approx(20 / 44)
    assert str(account).split("\n") == [
        "0:00:44 since the first of one start, 45.5% in steps that count",
        "      compile 7.0 s, data wait 5.0 s, evaluate 4.0 s, init 3.0 s, save 2.0 s, end 2.0 s, restore 1.0 s",
    ]


def test_after_a_kill_the_steps_made_again_are_lost_and_the_pause_is_down(tmp_path, clock):
    ledger = clock.start(tmp_path)
    train(clock, ledger, 0, 13)  # saved at 5 and 10, killed in step 14: 3 steps are lost
    clock.now += 1.5  # of step 14: nobody wrote that down
    clock.boot = 5e8
    clock.now += 60
    with clock.start(tmp_path) as ledger:
        clock.now += 2
        train(clock, ledger, 10, 20)
    account = read_account(tmp_path)
    assert account.starts == 2 and account.wall_s == pytest.approx(clock.now - 1e9, abs=1e-3)
    assert account.spent_s["step"] == pytest.approx(
        20 * 2.0, abs=1e-3
    )  # each step once, whatever happened to it before
    unwritten = 3 * 2.5 + 1.5 - account.spent_s["lost"]
    assert 0 <= unwritten <= EVERY_S + 2.5 and account.running_s == pytest.approx(
        account.wall_s - 60 - unwritten, abs=3
    )


def test_a_kill_loses_at_most_the_seconds_between_two_lines(tmp_path, clock):
    ledger = clock.start(tmp_path)
    train(clock, ledger, 0, 1000, save_every=10**9)
    assert clock.now - 1e9 - read_account(tmp_path).wall_s <= EVERY_S + 2.5
    assert (tmp_path / FILE_NAME).stat().st_size < 120 * 2500 / EVERY_S


def test_steps_lost_twice_are_lost_twice_and_counted_once(tmp_path, clock):
    for _ in range(3):
        with clock.start(tmp_path) as ledger:
            train(clock, ledger, 5, 8)
    account = read_account(tmp_path)
    assert account.spent_s["step"] == pytest.approx(6, abs=1e-5) and account.spent_s["lost"] == pytest.approx(
        12, abs=1e-5
    )


def test_torn_and_foreign_lines_are_passed_over_and_a_torn_one_spoils_no_other(tmp_path, clock):
    with clock.start(tmp_path) as ledger:
        train(clock, ledger, 0, 3)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'\n[]\n{"start": 1e9}\n{"start": 1000000000.0, "spent": {"st')
    with clock.start(tmp_path) as ledger:
        train(clock, ledger, 3, 5)
    account = read_account(tmp_path)
    assert account.starts == 2 and account.spent_s["step"] == pytest.approx(10, abs=1e-5)
    assert json.loads(path.read_bytes().split(b"\n")[-1])


def test_a_full_disk_costs_no_run_and_no_second(tmp_path, clock):
    workdir = tmp_path / "run"
    workdir.mkdir()
    ledger = clock.start(workdir)
    workdir.rmdir()  # every write fails now
    train(clock, ledger, 0, 20)
    workdir.mkdir()
    ledger.flush()
    assert read_account(workdir).spent_s["step"] == pytest.approx(40, abs=1e-5)


def test_a_line_that_fits_in_part_keeps_its_seconds_for_the_next(tmp_path, clock):
    ledger = clock.start(tmp_path)
    ledger.resume(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE_NAME).stat().st_size + 10, hard))
    try:
        train(clock, ledger, 0, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ledger.flush()
    assert read_account(tmp_path).spent_s["step"] == pytest.approx(40, abs=1e-5)


def test_a_start_that_made_no_step_is_none(tmp_path, clock):
    assert read_account(tmp_path) is None
    for steps in (5, None, None, 9):
        with clock.start(tmp_path) as ledger:
            clock.spend(ledger, "restore", EVERY_S + 1)  # refused, or done already
            if steps:
                train(clock, ledger, steps - 5, steps)
        clock.now += 100
    account = read_account(tmp_path)
    assert account.starts == 2 and account.spent_s["restore"] == pytest.approx(2 * (EVERY_S + 1))
    assert account.spent_s["lost"] == pytest.approx(2.0) and account.spent_s["down"] == pytest.approx(
        300 + 2 * (EVERY_S + 1)
    )


def test_whoever_listens_hears_every_phase(tmp_path, clock):
    heard = []
    with clock.start(tmp_path, on_enter=heard.append) as ledger:
        ledger.enter("compile")
    assert heard == ["init", "compile", "compile"]
