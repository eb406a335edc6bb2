"""What the processes of a run tell one another beside its steps: that they were told to leave, what they took by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.gang import Gang


class Votes:
    """What each process says beside its steps, known to all of them a step later, without anybody waiting.

    A vote is a small program on all devices that runs behind the step before it. All processes see the same votes at the
    same point of their loops, so what they decide by them is the same.
    """

    def __init__(self):
        self._last = None
        mesh = Mesh(np.asarray(jax.devices()), ("device",))
        self._spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("device",), ()))
        owners = [device.process_index for device in jax.devices()]
        self._rows = [owners.index(process) for process in range(jax.process_count())]
        self._gather = jax.jit(lambda table: table, out_shardings=whole)

    def cast(self, values: Sequence[float]) -> np.ndarray | None:
        """Says `values`; f32[processes, values] as they were said the time before, None the first time."""
        before = self._last
        local = np.tile(np.asarray(values, np.float32), (jax.local_device_count(), 1))
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
        self._votes = Votes() if gang.count > 1 else None
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

    def starts(self) -> None:
        """What this process does by itself counts from here on, and not the save before."""
        self._heard_s = time.monotonic()

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


def fastest_s(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of the fastest of six runs, the first of which compiles."""
    times_s = []
    for _ in range(6):
        begin_s = time.monotonic()
        jax.block_until_ready(run(x))
        times_s.append(time.monotonic() - begin_s)
    return min(times_s)


def slow_devices(gang: Gang, *, width: int = 4096) -> str:
    """What to say of a process with a device that multiplies a tenth slower than the median process's slowest."""
    mesh, split = Mesh(np.asarray(jax.devices()), ("device",)), PartitionSpec("device")
    place = NamedSharding(mesh, split)
    ones = jax.jit(lambda: jnp.ones((jax.device_count(), width, width), jnp.bfloat16), out_shardings=place)
    product = jax.jit(jax.shard_map(lambda x: x @ x @ x @ x @ x, mesh=mesh, in_specs=split, out_specs=split))
    all_s = gang.settle("how fast devices are", fastest_s(product, ones()), list)  # no device waits for another
    worst, usual_s = int(np.argmax(all_s)), float(np.median(all_s))
    slower = f"a device that takes {all_s[worst] / usual_s:.2f} times as long as others for a product of matrices"
    return f"process {worst} ({gang.names[worst]}) has {slower}" if all_s[worst] > 1.1 * usual_s else ""
