"""What starts the processes of a run: their output, their ends, the signals they get, and when they are not started again."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlm import launch

COUNT = "import os, sys, time; me = int(os.environ['JAX_PROCESS_ID']); print('I am', me, flush=True)\n"


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(tmp_path, program, *flags, processes=2):
    command = [f"--processes={processes}", f"--logs={tmp_path / 'logs'}", *flags, "--", sys.executable, "-c", program]
    return launch.main([*command, "--workdir", str(tmp_path / "run")])


def test_one_death_ends_the_gang_and_its_words_come_last(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    ends = "time.sleep(0.3 if me < 2 else 60)\nif me == 1: print('first', file=sys.stderr)\nsys.exit([3, 7][me])"
    begin = time.monotonic()
    assert run(tmp_path, COUNT + ends, processes=3) == 7 and time.monotonic() - begin < 30
    said = capfd.readouterr()
    assert {"[0] I am 0", "[1] I am 1", "[2] I am 2", "[1] first"} <= set(said.out.splitlines())
    assert said.err == "launch: process 1 ended first, with 7; the last it wrote:\n    I am 1\n    first\n"
    assert (tmp_path / "logs" / "process-1.log").read_text() == "I am 1\nfirst\n"
    assert run(tmp_path, COUNT + "os.kill(os.getpid(), 9)", processes=1) == 128 + 9


def test_a_crash_loop_ends_after_three_restarts_without_a_newer_checkpoint(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, "BACK_OFF_S", 0.01)
    commits = """
from pathlib import Path
starts = Path(sys.argv[2]) / "starts"
starts.parent.mkdir(exist_ok=True)
starts.open("a").write("x")
step = len(starts.read_text())
if step in (1, 4):  # two starts get further
    (starts.parent / "checkpoints" / str(step)).mkdir(parents=True)
    (starts.parent / "checkpoints" / str(step) / "step.json").touch()
sys.exit(124)
"""
    assert run(tmp_path, COUNT + commits, "--max-restarts=20", processes=1) == 124
    assert (tmp_path / "run" / "starts").read_text() == "x" * (4 + 1 + 3)
    assert "3 restarts brought no checkpoint newer than step 4: not started again" in capfd.readouterr().err
    for code, starts in ((0, 1), (2, 1), (4, 1), (75, 1), (3, 2)):  # only what may pass is tried again
        (tmp_path / "run" / "starts").unlink()
        again = commits.replace("124", str(code)).replace("(1, 4)", "()")
        assert run(tmp_path, COUNT + again, "--max-restarts=1", processes=1) == code
        assert len((tmp_path / "run" / "starts").read_text()) == starts, code


def test_signals_go_to_every_process_once(tmp_path):
    program = (
        COUNT + "import signal\nsignal.signal(15, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    args = ["--processes=2", f"--logs={tmp_path}", "--devices-per-process=3", "--", sys.executable, "-c", program]
    started = subprocess.Popen([sys.executable, "-m", "jaxlm.launch", *args], stdout=subprocess.PIPE, text=True)
    while len(re.findall("ready", "".join((tmp_path / f).read_text() for f in os.listdir(tmp_path)))) < 2:
        time.sleep(0.05)
    started.terminate()
    assert started.wait(timeout=10) == 75


def test_a_script_that_starts_another_leaves_none_behind_and_a_signal_ends_the_wait_for_a_restart(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    pid = tmp_path / "pid"
    wraps = f"""
import subprocess
if me == 0:
    subprocess.run([sys.executable, "-c", "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"])
while not os.path.exists({str(pid)!r}) or not open({str(pid)!r}).read():
    time.sleep(0.05)
sys.exit(7)
"""
    begin = time.monotonic()
    assert run(tmp_path, COUNT + wraps) == 7 and time.monotonic() - begin < 30
    stat = Path("/proc", pid.read_text(), "stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":  # ended; nobody here to reap it
            assert time.monotonic() - begin < 30
            time.sleep(0.05)
    monkeypatch.setattr(launch, "BACK_OFF_S", 60.0)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run(tmp_path, COUNT + "sys.exit(7)", "--max-restarts=1", processes=1) == 7 and time.monotonic() - begin < 50
