"""Several processes, on one host or many, as one run: who they are, jax between them, agreement, and what each was asked."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Problem, UserError
from jaxlm.parallel.gang import EXIT_PEERS, LOOPBACK, Gang, Limits, free_port

JAX_LATER_S = 30.0  # jax's own heartbeat ends processes without a word: ours comes first
PORT = 61399  # where a host has all processes and nobody named a port
TLS = "JAX_MTLS_CERT_FILE"


@dataclass(frozen=True)
class Place:
    """process: of `count`.   address: of process 0.   found: what said so.   gpus: those of this host's visible ones that are
    this process's (None: all)."""

    process: int = 0
    count: int = 1
    address: str = ""
    found: str = "nothing"
    gpus: tuple[int, ...] | None = None


ALONE = Place()


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
    """The first host of the step, and a port by job and step."""
    head, bracket, inside = env["SLURM_STEP_NODELIST"].partition("[")
    first = head + re.split("[],-]", inside)[0] if bracket and "," not in head else head.split(",")[0]
    return f"{first}:{61440 + (int(env['SLURM_JOB_ID']) * 16 + int(env.get('SLURM_STEP_ID', 0))) % 4096}"


def _slurm_local(env: Mapping[str, str]) -> tuple[int, int, bool]:
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # 4(x2),2 is 4, 4 and 2
    tasks = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    bound = any(name in env for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    return int(env["SLURM_LOCALID"]), tasks[int(env["SLURM_NODEID"])], bound


def _ompi_address(env: Mapping[str, str]) -> str:
    """The host of mpirun, and a port by its job number; Open MPI 5 does not say it."""
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^],]+?)[],]?[,:]", env.get("OMPI_MCA_orte_hnp_uri", ""))
    return f"{found[2]}:{61440 + int(found[1]) // 4096 % 4096}" if found else ""


def _ompi_local(env: Mapping[str, str]) -> tuple[int, int, bool]:
    return int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"]), False


LAUNCHERS = (
    Launcher("the environment", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", _slurm_address, _slurm_local),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _ompi_address, _ompi_local),
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
        told = (x for x in LAUNCHERS if x.process in env and int(env.get(x.count, 1)) > 1)
        launcher = next(told, None)
        if launcher is None:
            return Place(gpus=own)
        count, process, found = int(env[launcher.count]), int(env[launcher.process]), launcher.name
        number, beside, bound = launcher.local(env)
        address = address or launcher.address(env)
        if beside == count:
            address = f"127.0.0.1:{address.rpartition(':')[2] or PORT}"
        if own is None and not bound:
            own = _share(number, beside, visible_gpus(env) if gpus is None else gpus)
    if not 0 <= process < count or (count > 1 and not re.fullmatch(r".+:\d+", address)):
        rule = f"{found} says process {process} of {count}, process 0 at {address or 'no address'}"
        remedy = "say all three: --coordinator HOST:PORT --processes N --process I, I from 0 to N - 1"
        raise UserError(Problem("processes", rule, remedy))
    return Place(process, count, address, found, own)


def _share(number: int, beside: int, gpus: int) -> tuple[int, ...] | None:
    """The GPUs of process `number` of the `beside` on a host that all see `gpus`; None: those it sees, as it was bound."""
    each = gpus // beside
    return tuple(range(number * each, (number + 1) * each)) if beside > 1 and each > 0 else None


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that this process may use, without asking jax."""
    if env.get("JAX_PLATFORMS", "").startswith("cpu"):
        return 0
    if "CUDA_VISIBLE_DEVICES" in env:
        return len([d for d in env["CUDA_VISIBLE_DEVICES"].split(",") if d.strip() not in ("", "-1")])
    return len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit()])


@contextmanager
def join(place: Place, limits: Limits) -> Iterator[Gang]:
    """The gang of this process, and jax between its processes. To be entered before jax takes hold of a device.

    Raises: UserError (exit code 3) if not all come, or where TLS is asked of a jax that has none.
    """
    if os.environ.get(TLS) and not hasattr(jax.config, TLS.lower()):
        rule = f"jax {jax.__version__} can't encrypt what its processes say to one another"
        raise UserError(Problem(TLS, rule, "use jax 0.11.2 or newer, or unset it"), exit_code=EXIT_PEERS)
    name = f"{socket.gethostname()}, pid {os.getpid()}"
    with Gang(place.process, place.count, place.address, name=name, limits=limits) as gang:
        if place.gpus is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, place.gpus)))
        if place.count > 1:
            jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; the loop agrees by Votes
            bind = "127.0.0.1" if gang.host in LOOPBACK else "[::]"
            port = gang.settle("a port for jax", free_port(), lambda ports: ports[0])
            jax.distributed.initialize(
                f"{gang.host}:{port}", place.count, place.process, cluster_detection_method="deactivate",
                coordinator_bind_address=f"{bind}:{port}",
                initialization_timeout=int(limits.join_s), heartbeat_timeout_seconds=int(limits.heartbeat_s + JAX_LATER_S),
            )  # fmt: skip
        yield gang
        if place.count > 1:
            gang.settle("leaving jax")  # whoever fails before has said so, and nobody waits for it in C++
            jax.distributed.shutdown()


def agree(gang: Gang, facts: Mapping[str, Any]) -> None:
    """Holds the facts of all processes to one another.

    Raises: UserError (exit code 3), in each, with a table of what differs: whose, theirs, everybody else's.
    """
    rows = gang.settle("agreement", facts, differences)
    if rows:
        shown = [f"{key}: {odd} on {_named(gang, who)}, {usual} on the others" for key, who, odd, usual in rows]
        rule = "\n    ".join(["they would compute something else than the others:", *shown])
        remedy = "start every process with the same command, packages and data"
        raise UserError(Problem(f"{gang.count} processes", rule, remedy), exit_code=EXIT_PEERS)


def differences(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], str, str]]:
    """(fact, odd processes, what they say, what most say) for each fact that is not the same everywhere."""
    rows = []
    for key in dict.fromkeys(key for each in facts for key in each):
        said = [json.dumps(each.get(key), sort_keys=True) for each in facts]
        usual = Counter(said).most_common(1)[0][0]
        odd = defaultdict[str, list[int]](list)
        for process, value in enumerate(said):
            if value != usual:
                odd[value].append(process)
        rows += [(key, who, value, usual) for value, who in odd.items()]
    return rows


def _named(gang: Gang, processes: Sequence[int]) -> str:
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return "process " + "; ".join(f"{i} ({gang.names[i]})" for i in processes[:4]) + more


def check_devices(gang: Gang) -> None:
    """Raises UserError (exit code 3), in each process, where the processes of a host leave one of its GPUs unused."""
    used = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    found = gang.settle("devices", (socket.gethostname(), used, visible_gpus() if used else 0), unused_gpus)
    if found and gang.count > 1:
        remedy = "start a process for each GPU or one for all, or hide the others with CUDA_VISIBLE_DEVICES"
        raise UserError(Problem("GPUs", "; ".join(found), remedy), exit_code=EXIT_PEERS)


def unused_gpus(processes: Sequence[tuple[str, int, int]]) -> list[str]:
    """Of the (host, GPUs in use, GPUs visible) of each process: the hosts where not all are used, in words."""
    hosts = defaultdict[str, list[tuple[int, int]]](list)
    for host, *counts in processes:
        hosts[host].append((counts[0], counts[1]))
    sums = ((host, sum(used for used, _ in parts), max(seen for _, seen in parts)) for host, parts in hosts.items())
    return [f"{host} uses {used} of {seen}" for host, used, seen in sums if used < seen]


class Votes:
    """What each process says beside its steps, known to all of them a step later, without anybody waiting.

    A vote is a small program on all devices that runs behind the step before it. All processes see the same votes at the
    same point of their loops, so what they decide by them is the same.
    """

    def __init__(self, num_values: int):
        self._num_values, self._last = num_values, None
        mesh = Mesh(np.asarray(jax.devices()), ("device",))
        self._spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("device",), ()))
        self._first = [min(d.id for d in jax.devices() if d.process_index == i) for i in range(jax.process_count())]
        self._rows = [[d.id for d in jax.devices()].index(i) for i in self._first]
        self._gather = jax.jit(lambda table: table, out_shardings=whole)

    def cast(self, values: Sequence[float]) -> np.ndarray | None:
        """Says `values`; f32[processes, num_values] as they were said the time before, None the first time."""
        before, shape = self._last, (jax.local_device_count(), self._num_values)
        local = np.broadcast_to(np.asarray(values, np.float32), shape)
        with jax.transfer_guard("allow"):  # a few bytes, meant
            self._last = self._gather(jax.make_array_from_process_local_data(self._spread, local))
        return None if before is None else np.asarray(jax.device_get(before))[self._rows]


class Asked:
    """The exit code with which a run was told to leave, None if it was not: the same in all its processes.

    asked: what this process was told until now. Alone, that is the answer. With others, each call is a vote, and tells of
    the one before it. Votes also carry what each process took by itself, for data and in Python, since it last heard the
    others: all hear at the same moment, so who takes longest is who the others wait for.
    """

    def __init__(self, asked: Callable[[], int | None], gang: Gang):
        self._asked, self._gang, self._code = asked, gang, None
        self._votes = Votes(num_values=2) if gang.count > 1 else None
        self._heard_s = self._began_s = time.monotonic()
        self._own_s, self._taken_s, self._num_taken = 0.0, np.zeros(gang.count), 0
        self._named: set[int] = set()

    def __call__(self) -> int | None:
        if self._votes is None:
            return self._asked()
        table = self._votes.cast([self._asked() or 0, self._own_s])
        self._heard_s, self._own_s = time.monotonic(), 0.0
        if table is not None:
            self._code = self._code or int(table[:, 0].max()) or None
            self._taken_s, self._num_taken = self._taken_s + table[:, 1], self._num_taken + 1
        return self._code

    def dispatches(self) -> None:
        """From here on the devices of all processes have to come along."""
        self._own_s += time.monotonic() - self._heard_s

    def slowest(self) -> tuple[dict[str, float], str]:
        """({slowest_process, slowest_process_s: what it took by itself a vote since this was asked before}, what to say of
        it the first time that the others waited for it a fifth of the time)."""
        if self._votes is None or not self._num_taken:
            return {}, ""
        now, taken_s = time.monotonic(), self._taken_s / self._num_taken
        usual_s, each_s = float(np.sort(taken_s)[(len(taken_s) - 1) // 2]), (now - self._began_s) / self._num_taken
        worst = int(taken_s.argmax())
        self._began_s, self._taken_s, self._num_taken = now, np.zeros(len(taken_s)), 0
        found = {"slowest_process": worst, "slowest_process_s": float(taken_s[worst])}
        if worst in self._named or taken_s[worst] - usual_s < 0.2 * each_s:
            return found, ""
        self._named.add(worst)
        text = f"the others wait for process {worst} ({self._gang.names[worst]}), {taken_s[worst]:.3g} s a step for its data "
        return found, text + f"and in Python, where half of all take {usual_s:.3g} or less"


def slow_devices(gang: Gang, *, width: int = 4096) -> str:
    """What to say of a process with a device that multiplies a tenth slower than the median process's slowest."""
    mesh, split = Mesh(np.asarray(jax.devices()), ("device",)), PartitionSpec("device")
    place = NamedSharding(mesh, split)
    ones = jax.jit(lambda: jnp.ones((jax.device_count(), width, width), jnp.bfloat16), out_shardings=place)
    product = jax.jit(jax.shard_map(lambda x: x @ x @ x @ x @ x, mesh=mesh, in_specs=split, out_specs=split))
    x, times_s = ones(), []
    for _ in range(6):
        begin_s = time.monotonic()
        jax.block_until_ready(product(x))  # no device waits for another
        times_s.append(time.monotonic() - begin_s)
    all_s = gang.settle("how fast devices are", min(times_s), list)
    worst, usual_s = int(np.argmax(all_s)), float(np.median(all_s))
    slower = f"a device that takes {all_s[worst] / usual_s:.2f} times as long as others for a product of matrices"
    return f"process {worst} ({gang.names[worst]}) has {slower}" if all_s[worst] > 1.1 * usual_s else ""
