"""Starts the processes of a run on this host: `python -m jaxlm.launch --processes P [...] -- python -m jaxlm.train ...`.

Each line of output comes with the number of its process, and stays in a file for each. When one process fails the others
are ended, and what the first said last is said again at the end. SIGTERM and Ctrl-C go to all of them, once. With
--max-restarts a gang that failed is started again, later each time, until three starts have brought no newer checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from jaxlm.checkpoint.layout import committed_steps
from jaxlm.config import Exit, Problem, UserError
from jaxlm.parallel.gang import free_port
from jaxlm.parallel.multihost import CPU_THREADS, visible_gpus
from jaxlm.settings import Parser, run_main

# starting again would do the same, or is for somebody else to do
FINAL = (0, Exit.SETUP, Exit.DIVERGED, Exit.PREEMPTED, Exit.INTERRUPTED)
IN_VAIN = 3  # restarts without a newer checkpoint
LAST_LINES = 20
GRACE_S = 5.0  # that the others have where one died: to notice by themselves, and to end when told
COMMIT_S = 300.0  # that they have where one ended in order: a commit may be under way
BACK_OFF_S = 1.0


class Child:
    """One process: its number in the run, the last lines it wrote, and when it was seen to have ended."""

    def __init__(self, number: int, command: Sequence[str], env: dict[str, str], log: IO[str]):
        self.number, self.ended_s, self.last = number, 0.0, deque[str](maxlen=LAST_LINES)
        # in a session of its own: Ctrl-C on the terminal reaches it once, from us
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self.reader.start()

    def runs(self) -> bool:
        if self.process.poll() is not None:
            self.ended_s = self.ended_s or time.monotonic()
        return not self.ended_s

    def _copy(self, log: IO[str]) -> None:
        """Every line to the log and, behind the number, to our own output."""
        with log:
            for line in self.process.stdout or ():
                log.write(line)
                log.flush()
                self.last.append(line)
                sys.stdout.write(f"[{self.number}] {line}")
                sys.stdout.flush()


class Launch:
    """The processes of this host, started as often as it takes."""

    def __init__(self, command: Sequence[str], args: argparse.Namespace):
        self._command, self._args = list(command), args
        self._children: list[Child] = []
        self._told, self._awake = None, threading.Event()

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        workdir, restarts, in_vain = _workdir(self._command), 0, 0
        while True:
            before = _newest(workdir)
            code = self._once(restarts)
            if code in FINAL or self._told is not None or restarts == self._args.max_restarts:
                return code
            in_vain = 0 if _newest(workdir) > before else in_vain + 1
            if in_vain > IN_VAIN:
                _say(f"{IN_VAIN} restarts brought no checkpoint newer than step {before}: not started again")
                return code
            wait_s = BACK_OFF_S * 2**in_vain
            restarts += 1
            _say(f"ended with {code}; restart {restarts} of {self._args.max_restarts} in {wait_s:.0f} s")
            if self._awake.wait(wait_s):
                return code

    def _once(self, restarts: int) -> int:
        """Starts the gang and waits for its end. Returns 0, or the exit code of the process that failed first."""
        address = f"127.0.0.1:{free_port()}"
        self._children = [self._start(i, address, restarts) for i in range(self._args.processes)]
        if self._told is not None:
            self._send(self._told)
        while any([child.runs() for child in self._children]):
            time.sleep(0.05)
            failed = [child for child in self._children if child.ended_s and child.process.returncode]
            waits = [child.ended_s + (COMMIT_S if child.process.returncode in [*Exit] else GRACE_S) for child in failed]
            if waits and time.monotonic() > min(waits):
                self._kill()
        self._kill()  # what the command may have left behind would hold our pipe
        for child in self._children:
            child.reader.join()
        return self._outcome()

    def _outcome(self) -> int:
        """Says again what the process that failed first wrote last: the others left because it was gone."""
        failed = [child for child in self._children if child.process.returncode]
        if not failed:
            return 0
        first = min(failed, key=lambda child: (child.process.returncode == Exit.UNUSABLE, child.ended_s))
        code = first.process.returncode
        if code not in (Exit.PREEMPTED, Exit.INTERRUPTED) and len(self._children) > 1:
            how = f"with {code}" if code > 0 else f"by {signal.Signals(-code).name}"
            _say(f"process {first.number} ended first, {how}; the last it wrote:")
            sys.stderr.writelines(f"    {line}" for line in first.last)
        return code if code > 0 else 128 - code

    def _start(self, index: int, address: str, restarts: int) -> Child:
        args = self._args
        env = dict(os.environ, JAX_COORDINATOR_ADDRESS=address, PYTHONUNBUFFERED="1")
        env |= {"JAX_NUM_PROCESSES": str(args.processes), "JAX_PROCESS_ID": str(index)}
        gpus, each = len(visible_gpus()), args.devices_per_process
        if gpus:
            each = each or gpus // args.processes
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(index * each, (index + 1) * each)))
        elif each:
            flags = env.get("XLA_FLAGS", "").split()
            flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
            env.setdefault("NPROC", CPU_THREADS)
            env["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={each}"])
        args.logs.mkdir(parents=True, exist_ok=True)
        log = (args.logs / f"process-{index}.log").open("a" if restarts else "w")
        return Child(index, self._command, env, log)

    def _pass_on(self, number: int, frame: object) -> None:
        self._told = number
        self._awake.set()
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    def _kill(self) -> None:
        """Every process of every session: a command may be a script that starts another."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _workdir(command: Sequence[str]) -> Path | None:
    """The --workdir of the command, if it has one."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--workdir", type=Path, nargs="?")
    return finder.parse_known_args([word for word in command if word != "--"])[0].workdir


def _newest(workdir: Path | None) -> int:
    return max(committed_steps(workdir / "checkpoints"), default=0) if workdir else 0


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m jaxlm.launch", description=__doc__, formatter_class=raw)
    parser.add_argument("--processes", type=int, required=True, metavar="P", help="on this host")
    parser.add_argument(
        "--devices-per-process", type=int, default=0, metavar="D",
        help="GPUs of each, or where there are none, CPU devices (default: an even share of the GPUs)",
    )  # fmt: skip
    parser.add_argument("--max-restarts", type=int, default=0, metavar="R", help="times a failed gang is started again")
    logs = "folder of process-I.log (default: logs in the command's --workdir, or here)"
    parser.add_argument("--logs", type=Path, help=logs)
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args, command = parser.parse_args(words[:at]), words[at + 1 :]
    args.logs = args.logs or (_workdir(command) or Path()) / "logs"
    problems = []
    if not command:
        problems.append(Problem("command", "there is none", "write it behind --: -- python -m jaxlm.train ..."))
    if args.processes < 1:
        problems.append(Problem(f"--processes={args.processes}", "starts nothing", "count processes from 1"))
    gpus = len(visible_gpus())
    each = args.devices_per_process or gpus // max(args.processes, 1) or 1
    if gpus and args.processes * each > gpus:
        where = f"--processes={args.processes} --devices-per-process={args.devices_per_process}"
        problems.append(Problem(where, f"there are {gpus} GPUs", "start fewer, or set JAX_PLATFORMS=cpu"))
    if args.max_restarts and command and _workdir(command) is None:
        rule = "is needed to see whether a restart got further"
        problems.append(Problem("--workdir", rule, "add it to the command, or leave out --max-restarts"))
    if problems:
        raise UserError(*problems)
    return Launch(command, args).run()


if __name__ == "__main__":
    run_main(main)
