"""Several processes, on one host or many, as one run: which of them this is, jax between them, and whether they agree."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Exit, Problem, UserError
from jaxlm.parallel.gang import LOOPBACK, Gang, Limits, free_port

JAX_LATER_S = 30.0  # jax's own heartbeat ends processes without a word: ours comes first
PORT = 61399  # where a host has all processes and nobody named a port
TLS = "JAX_MTLS_CERT_FILE"
# NPROC, of XLA on CPU devices, in each process. By default it has one a device: then two sums that are ready together can each
# hold threads the other waits for, for ever; and how work is cut, and so the order of sums, depends on devices a process.
CPU_THREADS = "16"


@dataclass(frozen=True)
class Place:
    """process: of `count`.   address: of process 0.   found: what said so.   gpus: those of this host's visible ones that are
    this process's (None: all)."""

    process: int = 0
    count: int = 1
    address: str = ""
    found: str = "nothing"
    gpus: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Launcher:
    """The environment variables in which something that starts processes tells each who it is.

    local: number of this process on its host, how many are there; whether each was given GPUs of its own.
    """

    name: str
    count: str
    process: str
    address: Callable[[Mapping[str, str]], str] = lambda env: ""
    local: Callable[[Mapping[str, str]], tuple[int, int, bool]] = lambda env: (0, 1, True)


def _slurm_address(env: Mapping[str, str]) -> str:
    """The first host of the step, and an even port by job and step: the one after it is jax's."""
    # rack[1-2]node[01,03],x1: of each bracket its first number, of the rest what comes before a comma
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"]).partition(",")[0]
    return f"{first}:{61440 + (int(env['SLURM_JOB_ID']) * 16 + int(env.get('SLURM_STEP_ID', 0))) * 2 % 4096}"


def _slurm_local(env: Mapping[str, str]) -> tuple[int, int, bool]:
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # 4(x2),2 is 4, 4 and 2
    tasks = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    bound = any(name in env for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    bound |= len(visible_gpus(env)) < int(env.get("SLURM_GPUS_ON_NODE", 0))  # --gpu-bind
    return int(env["SLURM_LOCALID"]), tasks[int(env["SLURM_NODEID"])], bound


def _ompi_address(env: Mapping[str, str]) -> str:
    """The host of mpirun, and an even port by its job number; Open MPI 5 does not say it."""
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^],]+?)[],]?[,:]", env.get("OMPI_MCA_orte_hnp_uri", ""))
    return f"{found[2]}:{61440 + int(found[1]) // 4096 * 2 % 4096}" if found else ""


def _ompi_local(env: Mapping[str, str]) -> tuple[int, int, bool]:
    return int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"]), False


LAUNCHERS = (  # the innermost first: SLURM may start Open MPI
    Launcher("the environment", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _ompi_address, _ompi_local),
    Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", _slurm_address, _slurm_local),
    Launcher("Kubernetes", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),  # scripts/kubernetes.yaml sets the first
)


def find_place(
    address: str = "",
    count: int = 0,
    process: int = -1,
    *,
    env: Mapping[str, str] = os.environ,
    gpus: int | None = None,
) -> Place:
    """This process's place: as the arguments say, else the environment; one process alone if neither says anything.

    gpus: visible on this host (None: counted). Where several processes of a host see all of them, each takes its share.
    Raises: UserError (exit code 2) if what is said is not enough.
    """
    ids = env.get("JAX_LOCAL_DEVICE_IDS")
    own = tuple(map(int, ids.split(","))) if ids else None
    address, found = address or env.get("JAX_COORDINATOR_ADDRESS", ""), "the command line"
    if not count and process < 0:
        launcher = next((x for x in LAUNCHERS if x.process in env), None)
        if launcher is None or int(env.get(launcher.count, 1)) == 1:
            return Place(gpus=own)
        count, process, found = int(env[launcher.count]), int(env[launcher.process]), launcher.name
        number, beside, bound = launcher.local(env)
        address = address or launcher.address(env)
        if beside == count:
            address = f"127.0.0.1:{address.rpartition(':')[2] or PORT}"
        each = (len(visible_gpus(env)) if gpus is None else gpus) // beside
        if own is None and not bound and beside > 1 and each > 0:
            own = tuple(range(number * each, (number + 1) * each))
    if not 0 <= process < count or (count > 1 and not re.fullmatch(r".+:\d+", address)):
        rule = f"{found} says process {process} of {count}, process 0 at {address or 'no address'}"
        remedy = "say all three: --coordinator HOST:PORT --processes N --process I, I from 0 to N - 1"
        raise UserError(Problem("processes", rule, remedy))
    return Place(process, count, address, found, own)


def visible_gpus(env: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, without asking jax."""
    if env.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        return [d for d in env["CUDA_VISIBLE_DEVICES"].split(",") if d.strip() not in ("", "-1", "NoDevFiles")]
    return [p.name[6:] for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit()]


@contextmanager
def join(place: Place, limits: Limits) -> Iterator[Gang]:
    """The gang of this process, and jax between its processes. To be entered before jax takes hold of a device.

    Raises: UserError (exit code 3) if not all come, or where TLS is asked of a jax that has none.
    """
    if os.environ.get(TLS) and not hasattr(jax.config, TLS.lower()):
        rule = f"jax {jax.__version__} can't encrypt what its processes say to one another"
        raise UserError(Problem(TLS, rule, "use jax 0.11.2 or newer, or unset it"), exit_code=Exit.UNUSABLE)
    name = f"{socket.gethostname()}, pid {os.getpid()}"
    with Gang(place.process, place.count, place.address, name=name, limits=limits) as gang:
        if place.gpus is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, place.gpus)))
        if place.count > 1:
            jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; the loop agrees by Votes
            here = gang.host in LOOPBACK
            named = int(place.address.rpartition(":")[2])
            port = gang.settle("a port for jax", free_port() if here else named + 1, lambda ports: ports[0])
            try:
                jax.distributed.initialize(
                    f"{gang.host}:{port}", place.count, place.process, cluster_detection_method="deactivate",
                    coordinator_bind_address=f"{'127.0.0.1' if here else '[::]'}:{port}",
                    initialization_timeout=int(limits.join_s),
                    heartbeat_timeout_seconds=int(limits.heartbeat_s + JAX_LATER_S),
                )  # fmt: skip
            except RuntimeError as e:
                remedy = "name an address whose port and the next one are free on host 0"
                problem = Problem(f"jax on port {port}", str(e).partition("\n")[0], remedy)
                raise UserError(problem, exit_code=Exit.UNUSABLE) from e
        yield gang
        if place.count > 1:
            gang.settle("leaving jax")  # whoever fails before has said so, and nobody waits for it in C++
            jax.distributed.shutdown()


def agree(gang: Gang, facts: Mapping[str, Any]) -> None:
    """Holds the facts of all processes to one another.

    Raises: UserError (exit code 3), in each, with a table of what differs: whose, theirs, everybody else's.
    """

    def named(processes: Sequence[int]) -> str:
        more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
        return "; ".join(f"{i} ({gang.names[i]})" for i in processes[:4]) + more

    rows = gang.settle("agreement", facts, differences)
    if rows:
        shown = [f"{key}: {odd} on process {named(who)}, {usual} on the others" for key, who, odd, usual in rows]
        rule = "\n    ".join(["they would compute something else than the others:", *shown])
        remedy = "start every process with the same command, packages and data"
        raise UserError(Problem(f"{gang.count} processes", rule, remedy), exit_code=Exit.UNUSABLE)


def differences(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], str, str]]:
    """(fact, odd processes, what they say, what most say) for each fact that is not the same everywhere."""
    rows = []
    for key in dict.fromkeys(key for each in facts for key in each):
        said = [json.dumps(each.get(key), sort_keys=True) for each in facts]
        usual = Counter(said).most_common(1)[0][0]
        for odd in dict.fromkeys(said):
            if odd != usual:
                rows.append((key, [process for process, value in enumerate(said) if value == odd], odd, usual))
    return rows


def check_devices(gang: Gang) -> None:
    """Raises UserError (exit code 3), in each process, where the processes of a host leave one of its GPUs unused."""
    used = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    found = gang.settle("devices", (socket.gethostname(), used, visible_gpus() if used else []), unused_gpus)
    if found and gang.count > 1:
        remedy = "start a process for each GPU or one for all, or hide the others with CUDA_VISIBLE_DEVICES"
        raise UserError(Problem("GPUs", "; ".join(found), remedy), exit_code=Exit.UNUSABLE)


def unused_gpus(processes: Sequence[tuple[str, int, Sequence[str]]]) -> list[str]:
    """Of the (host, number of GPUs in use, GPUs visible) of each process: the hosts where not all are used, in words."""
    used, seen = Counter[str](), defaultdict[str, set[str]](set)
    for host, count, names in processes:
        used[host] += count
        seen[host].update(names)
    return [f"{host} uses {used[host]} of {len(names)}" for host, names in seen.items() if used[host] < len(names)]
