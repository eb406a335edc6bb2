"""Whatever a process hangs in, it ends in time with the stacks of its threads; errors keep their order on the way out."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.config import UserError
from jaxlm.guards import Closing, Watchdog, explained

# A process that steps, says so, and then does what the test asks. It has no jax: it starts in a fifth of a second.
CHILD = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from jaxlm.guards import StopSignals, Watchdog

def lock_twice(library):
    mutex = ctypes.create_string_buffer(64)  # a plain mutex waits for its own owner, and no signal wakes it
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def stuck_in_cpp():
    lock_twice(ctypes.CDLL(None))  # no bytecode runs in the main thread; others may

def holding_the_gil():
    lock_twice(ctypes.PyDLL(None))

def stepping():
    while True:
        watchdog.expect("data wait")
        watchdog.expect("step")
        time.sleep(0.02)

limit_s, grace_s, then = float(sys.argv[1]), float(sys.argv[2]), globals()[sys.argv[3]]
with Watchdog(limit_s, grace_s=grace_s, folder=Path(sys.argv[4])) as watchdog, StopSignals(print) as stop:
    for _ in range(7):
        watchdog.expect("data wait")
        watchdog.expect("step")
        time.sleep(0.1)
    print("stuck", flush=True)
    then()
"""


def child(tmp_path, then, *, limit_s=1.0, grace_s=0.0):
    args = [sys.executable, "-c", CHILD, str(limit_s), str(grace_s), then, str(tmp_path)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n", process.communicate()
    return process


def ended(process):
    """(exit code, seconds it took, what it wrote to stderr); within the five seconds that are promised beyond a limit."""
    begin = time.monotonic()
    try:
        _, errors = process.communicate(timeout=6.5)
    finally:
        process.kill()
    return process.returncode, time.monotonic() - begin, errors


def test_a_process_stuck_outside_python_ends_with_124_and_its_stacks(tmp_path):
    code, took_s, errors = ended(child(tmp_path, "stuck_in_cpp"))
    assert code == 124 and 0.9 <= took_s < 3.5
    assert "no end of this step in" in errors and "in stuck_in_cpp" in errors and "(most recent call first)" in errors
    assert "in stuck_in_cpp" in (tmp_path / "stacks.txt").read_text()


def test_a_held_interpreter_lock_ends_by_the_net_below_with_stacks(tmp_path):
    code, took_s, errors = ended(child(tmp_path, "holding_the_gil"))
    assert code == 1 and 3.5 < took_s < 6 and "in holding_the_gil" in errors


def test_a_stepping_process_lives_and_one_stopped_for_long_ends_when_it_is_continued(tmp_path):
    process = child(tmp_path, "stepping")
    time.sleep(1.2)
    assert process.poll() is None  # longer than its limit, with a step every 20 ms
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.5)  # beyond the limit and the net: which of them wakes first decides the code
    process.send_signal(signal.SIGCONT)
    code, took_s, errors = ended(process)
    assert code in (124, 1) and took_s < 2 and "in stepping" in errors


def test_sigterm_while_stuck_has_its_grace_and_no_more(tmp_path):
    process = child(tmp_path, "stuck_in_cpp", limit_s=0, grace_s=1)
    for _ in range(2):  # counted from the first
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    code, took_s, errors = ended(process)
    assert code == 124 and 0 <= took_s < 2.5 and "after SIGTERM (train.preempt_grace_s)" in errors


@pytest.mark.parametrize("then", ["stuck_in_cpp", "stepping"])  # the watchdog's thread hears it, or the handler
def test_a_second_ctrl_c_leaves_at_once_also_when_stuck_and_two_in_a_moment_are_one(tmp_path, then):
    process = child(tmp_path, then, limit_s=0)
    for _ in range(2):  # as `timeout -s INT` sends it: to its child, and to the child's group
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, took_s, _ = ended(process)
    assert code == 130 and took_s < 1.5


def test_limits_follow_the_phase_and_the_median_step(tmp_path):
    watchdog = Watchdog(-1, grace_s=0, folder=tmp_path)
    assert [watchdog.limit_s(phase) for phase in ("init", "data wait", "compile")] == [0, 300, 3600]
    watchdog._steps_s.extend([30, 40, 500])
    assert watchdog.limit_s("step") == 20 * 40
    assert Watchdog(7200, grace_s=0, folder=tmp_path).limit_s("save") == 7200
    assert {Watchdog(0, grace_s=0, folder=tmp_path).limit_s(phase) for phase in ("step", "save", "compile")} == {0}


def test_a_watchdog_leaves_no_thread_no_descriptor_and_the_signals_as_they_were(tmp_path):
    before = len(os.listdir("/proc/self/fd")), signal.set_wakeup_fd(-1)
    with Watchdog(60, grace_s=1, folder=tmp_path) as watchdog:
        watchdog.expect("step")
    assert not watchdog._thread.is_alive()
    assert (len(os.listdir("/proc/self/fd")), signal.set_wakeup_fd(-1)) == before


def test_the_first_error_is_the_one_that_gets_out(capsys):
    def close():
        raise OSError("second")

    with pytest.raises(RuntimeError, match="first"), Closing() as stack:
        stack.callback(close)
        raise RuntimeError("first")
    assert "closing after the error below: OSError: second" in capsys.readouterr().err
    with pytest.raises(OSError, match="second"), Closing() as stack:
        stack.callback(close)


def test_an_explained_error_takes_the_place_of_what_it_explains():
    JaxRuntimeError = type("JaxRuntimeError", (RuntimeError,), {})
    with pytest.raises(UserError, match="lower train.batch_size") as caught, Closing() as stack:
        stack.enter_context(explained(lambda: "steps that count, 3 steps done"))
        raise JaxRuntimeError("INTERNAL: Out of memory allocating 7 bytes.\nmore")
    assert str(caught.value).split("\n")[0] == "device memory, steps that count, 3 steps done"


def test_an_unforeseen_error_says_where_the_run_was():
    with pytest.raises(KeyError) as caught, explained(lambda: "saves, 41 steps done"):
        raise KeyError("x")
    assert caught.value.__notes__[0].split("\n")[0] == "  saves, 41 steps done"
    with pytest.raises(UserError) as caught, explained(lambda: "saves, 41 steps done"):
        raise UserError()
    assert not hasattr(caught.value, "__notes__")
