"""Several processes of `jaxlm.train` that are one run on this machine, for tests."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from runs import command, settings

from jaxlm.parallel.gang import free_port
from jaxlm.parallel.multihost import CPU_THREADS

QUICK = settings("hosts.heartbeat_s=10", "hosts.join_s=60", "hosts.wait_s=60")


class Hosts:
    """`count` processes with `devices` CPU devices each, told where they are by the environment; logs in `folder`.

    each: more arguments, by process.   prefix: words before the command, by process, as `ip netns exec` has them.
    """

    def __init__(
        self, folder: Path, workdir: str, *more: str, count: int, devices: int,
        each: dict[int, list[str]] | None = None, prefix: dict[int, list[str]] | None = None, host: str = "127.0.0.1",
        program: tuple[str, ...] = ("-m", "jaxlm.train"), count_said: int = 0,
    ):  # fmt: skip
        kept = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        xla_flags = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
        environment = dict(os.environ, XLA_FLAGS=xla_flags, PYTHONUNBUFFERED="1")
        environment["NPROC"] = CPU_THREADS
        environment["JAX_NUM_PROCESSES"] = str(count_said or count)
        environment["JAX_COORDINATOR_ADDRESS"] = f"{host}:{free_port()}"
        self.logs = [folder / f"{workdir}.{i}.{time.monotonic_ns()}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            args = command(folder, workdir, *QUICK, *more, *(each or {}).get(i, []))
            words = [*(prefix or {}).get(i, []), sys.executable, *program, *args]
            with log.open("w") as out:
                env = environment | {"JAX_PROCESS_ID": str(i)}
                self.processes.append(subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env))

    def said(self, process: int) -> str:
        return self.logs[process].read_text(errors="replace")

    def wait_for(self, pattern: str, *, process: int = 0, limit_s: float = 120) -> re.Match:
        end_s = time.monotonic() + limit_s
        while not (found := re.search(pattern, self.said(process))):
            ended = [p.returncode for p in self.processes if p.poll() is not None]
            assert not ended and time.monotonic() < end_s, self.everything()
            time.sleep(0.02)
        return found

    def ends(self, *, limit_s: float = 200) -> list[int]:
        end_s = time.monotonic() + limit_s
        try:
            return [p.wait(max(end_s - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def everything(self) -> str:
        return "\n".join(f"--- process {i}\n{self.said(i)[-3000:]}" for i in range(len(self.logs)))
