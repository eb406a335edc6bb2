"""What ends a run that cannot go on by itself: signals that ask it to leave, steps that never end, errors in the way out.

Needs neither jax nor a device: all of it must work while the device, the network or a file system does not answer.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from jaxlm.config import Exit, Problem, UserError

STACKS_FILE = "stacks.txt"
AGAIN_S = 1.0  # a Ctrl-C that follows faster is the same one: `timeout` signals its child, and then the child's group
TICK_S = 0.5  # how often the watchdog looks
NET_S = 3.0  # how long after the watchdog the net below it ends the process
FILE_S = 2.0  # how long writing the stacks to the workdir may take
AUTO_S, AUTO_STEPS = 300.0, 20
# What may take longer than a step, in seconds. Reading settings and preparing data have no limit: they show progress.
LIMITS_S = {"restore": 3600.0, "compile": 3600.0, "evaluate": 3600.0, "save": 3600.0, "end": 3600.0}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
STEPPING = ("step", "data wait")


class Closing(ExitStack):
    """An ExitStack that never lets an error of closing take the place of the error that ended its body."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            return super().__exit__(kind, error, trace)
        except Exception as second:
            if error is None or second.__cause__ is error:  # what `explained` makes of it
                raise
            print(f"closing after the error below: {type(second).__name__}: {second}", file=sys.stderr)
            return False


@contextmanager
def explained(where: Callable[[], str]) -> Iterator[None]:
    """An error that nobody foresaw gets two lines more: where the run was, what to do. Out of memory becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # computing on another thread, XLA may wrap its RESOURCE_EXHAUSTED into an INTERNAL error
        if type(error).__name__ == "JaxRuntimeError" and any(s in str(error) for s in OUT_OF_MEMORY):
            remedy = "lower train.batch_size, raise train.accumulate or mesh.fsdp, or set model.remat=full"
            raise UserError(Problem(f"device memory, {where()}", str(error).split("\n")[0], remedy)) from error
        then = "the same command goes on from the newest checkpoint; if this comes again, report it"
        error.add_note(f"  {where()}\n  {then}")
        raise


class StopSignals:
    """SIGTERM and Ctrl-C ask the loop to save and leave, with 75 and 130; one more, a second later, makes the
    watchdog leave at once."""

    def __init__(self, note: Callable[[str], None]):
        self.exit_code: int | None = None
        self._note = note

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.exit_code is not None:
            return  # for the watchdog's thread, which sees it also where the main thread is stuck
        self.exit_code = Exit.PREEMPTED if number == signal.SIGTERM else Exit.INTERRUPTED
        self._note(f"{signal.Signals(number).name}: saving after this step (Ctrl-C: leave at once)")


class Watchdog:
    """Ends the process, with the stacks of all threads and exit 124, when the run makes no progress; a context manager.

    `expect` says what the run does now: a step within `limit_s` (-1: max(300, 20 x the median step); 0: no limit),
    anything in LIMITS_S within that. A thread looks at the clock, so it works while the main thread waits in C++ for a device
    or a network. Where the interpreter itself is held (an extension that blocks without releasing the GIL), a timer of
    faulthandler ends the process NET_S later, with stacks and exit 1: it can give no other code.

    Python's signal handlers wait for the main thread too. The thread therefore sees signals itself, through the wakeup
    descriptor: after the first SIGTERM or Ctrl-C the run has `grace_s` to save and leave (0: no limit), whatever it is
    stuck in, and a second Ctrl-C ends it at once.

    Time in which the process is stopped (SIGSTOP, Ctrl-Z) counts, since peers cannot tell it from any other hang: stopped for
    longer than the limit and NET_S, it ends when it is continued.
    """

    def __init__(self, limit_s: float, *, grace_s: float, folder: Path):
        self._limit_s, self._grace_s, self._folder = limit_s, grace_s, folder
        self._doing = ("init", time.monotonic())
        self._steps_s: deque[float] = deque(maxlen=50)
        self._asked: list[int] = []  # stop signals, as they came
        self._asked_s = 0.0
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._read, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._wake_before)
        os.close(self._wake)  # which ends the thread
        self._thread.join()
        os.close(self._read)
        faulthandler.cancel_dump_traceback_later()

    def expect(self, phase: str) -> None:
        """The run begins with `phase`. "data wait" again and again, a step between two, is what progress looks like."""
        (before, since), now = self._doing, time.monotonic()
        if before == "data wait" and phase == "step":
            return  # a step is from batch to batch
        if before == phase == "data wait":
            self._steps_s.append(now - since)
        self._doing = (phase, now)

    def limit_s(self, phase: str) -> float:
        """Seconds `phase` may take; 0: no limit."""
        if self._limit_s == 0 or phase not in (*STEPPING, *LIMITS_S):
            return 0.0
        step_s = self._limit_s
        if step_s < 0:
            step_s = max(AUTO_S, AUTO_STEPS * statistics.median(self._steps_s or [0.0]))
        return step_s if phase in STEPPING else max(step_s, LIMITS_S[phase])

    def _work(self) -> None:
        armed = None
        while True:
            if select.select([self._read], [], [], TICK_S)[0]:
                numbers = os.read(self._read, 64)
                if not numbers:
                    return
                self._count(numbers)
            doing = self._doing
            (phase, since), now = doing, time.monotonic()
            limit_s = self.limit_s(phase)
            if limit_s and now - since > limit_s:
                what = "step" if phase in STEPPING else phase
                self._end(f"no end of this {what} in {now - since:.0f} s; limit {limit_s:.0f} s (train.watchdog_s)")
            if self._asked and self._grace_s and now - self._asked_s > self._grace_s:
                asked = signal.Signals(self._asked[0]).name
                self._end(f"{phase} still not done {self._grace_s:.0f} s after {asked} (train.preempt_grace_s)")
            if limit_s and doing != armed:
                faulthandler.dump_traceback_later(since + limit_s + NET_S - now, exit=True, file=2)
                armed = doing
            elif armed and not limit_s:
                faulthandler.cancel_dump_traceback_later()
                armed = None

    def _count(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                if number == signal.SIGINT and self._asked and time.monotonic() - self._asked_s >= AGAIN_S:
                    os._exit(Exit.INTERRUPTED)
                self._asked_s = self._asked_s or time.monotonic()
                self._asked.append(number)

    def _end(self, why: str) -> None:
        text = f"watchdog: {why}\n  stacks of all threads: below, and in {self._folder / STACKS_FILE}\n"
        text += "  the same command goes on from the newest checkpoint\n"
        writer = threading.Thread(target=self._write, args=(text,), daemon=True)
        writer.start()
        writer.join(FILE_S)  # the folder may be what hangs
        os.write(2, text.encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(Exit.WATCHDOG)

    def _write(self, text: str) -> None:
        with open(self._folder / STACKS_FILE, "w") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)


def first_line(error: BaseException) -> str:
    """What went wrong in the first place, for a line of a log."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UserError):
        return f"{error.problems[0].where} {error.problems[0].rule}"
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:400]}"
