"""The writer of a run's checkpoints: saves in the background, says what is committed, keeps what retention asks for."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoint import layout, manifest
from jaxlm.checkpoint.checksum import own_sums
from jaxlm.checkpoint.layout import ITEM, Retention, committed_steps, name_leaves, superseded
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.manifest import Damage, Leaf
from jaxlm.checkpoint.restore import Restored, restore_latest_good, silence_details
from jaxlm.checkpoint.staging import stage
from jaxlm.config import Exit, Problem, UserError
from jaxlm.guards import first_line
from jaxlm.parallel.gang import LEAVE_S, RERUN, SOLO, Gang

log = logging.getLogger("jaxlm.checkpoint")

# Small chunks make a load onto another mesh 2 to 6 times slower: whole shards below this stay whole.
CHUNK_BYTES = 32 * 2**20

DEFAULT = Retention()


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: committed and restorable where `error` is None, else not there at all, and why.

    duration_s: from the call of `save` to the commit or failure, of which `blocked_s` in `save`.
    failures: saves in a row that failed, this one included; 0 if it did not.
    """

    step: int
    error: str | None
    duration_s: float
    blocked_s: float
    failures: int


class CheckpointStore:
    """Checkpoints of one run in one directory, written by this process (or gang of processes) alone.

    A step is committed by a rename once all of it is written: after `kill -9` at any time every step that was reported
    committed is restorable, and what else is there is removed at the next start. A save that fails is an outcome with its
    error, and the next one tries again. In a gang that holds until all have staged their parts; from there on Orbax waits in
    one process for the others, and who fails has to leave: `check` raises.

    Args:
      directory: made if it is missing. Leftovers of killed saves in it are removed.
      retention: which committed steps stay; the others are deleted after each commit.
      lock: of the run, asked before each commit: once another run has taken over, nothing is committed.
      gang: the processes that save together.

    Raises: UserError if the directory cannot be made or listed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        retention: Retention = DEFAULT,
        lock: RunLock | None = None,
        gang: Gang = SOLO,
    ):
        self.directory = Path(directory).absolute()
        self._retention, self._lock, self._gang = retention, lock, gang
        self._closed = False
        self._torn: UserError | None = None  # a save that failed here while the others go on with it
        self._failures = 0
        self._in_flight: Future[None] | None = None
        self._outcomes: deque[SaveOutcome] = deque()  # appended by the background thread, taken by poll
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._passed_over: dict[int, Damage] = {}  # later than the restored step
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                layout.remove_leftovers(self.directory)
            self.committed_step = max(committed_steps(self.directory), default=None)  # the newest, known restorable
        except OSError as error:
            problem = Problem(f"checkpoints in {self.directory}", str(error), "use another --workdir, or mend this one")
            raise UserError(problem) from error

    def restore_latest_good(self, abstract_state: Any) -> Restored | None:
        """See `restore.restore_latest_good`. Damaged later steps make way, to abandoned/, when the next save begins: until
        then nothing has happened, and a disk that only stuttered loses nothing."""
        restored = restore_latest_good(self.directory, abstract_state, gang=self._gang)
        if restored is not None and restored.passed_over:
            self._passed_over, self.committed_step = restored.passed_over, restored.step
        return restored

    def warm_up(self, state: Any) -> None:
        """Does in the background what only a first save would wait for: compiling the checksums, pinning host memory.

        `wait` ends it; until then `state` must not be donated.
        """
        named = name_leaves(state)

        def rehearse() -> None:
            try:
                own_sums(named)
                stage(named)  # like the sums without a word to other processes, whose main threads compute meanwhile
            except jax.errors.JaxRuntimeError as error:
                log.warning("the state does not fit where saves copy it: %s", first_line(error))

        self._in_flight = self._background.submit(rehearse)

    def save(self, step: int, state: Any, *, metadata: dict[str, Any] | None = None) -> bool:
        """Starts saving `state` as `step`. Returns once its values are in the host's memory: it may be donated then.

        A save that is still in flight is waited for first. Saving the newest committed step once more does nothing.

        Args:
          state: a tree of jax.Arrays.
          metadata: JSON kept beside the state, returned by a restore. `metrics` in it are the step's; retention goes by
            their `eval_loss`.

        Returns: True if a save was started.
        Raises: UserError (exit code 3) as `check` does, or if a process does not come. UserError if a later step is committed
          already: a restore would take that one; or if another run has committed `step` in this directory meanwhile.
        """
        assert not self._closed, "save after close"
        start = time.monotonic()
        note = json.loads(json.dumps(metadata or {}))
        named = name_leaves(state)
        for name, leaf in named.items():
            assert isinstance(leaf, jax.Array), f"{name} is a {type(leaf).__name__}, not a jax.Array"
        self.wait()
        self.check()
        if step == self.committed_step:
            return False
        if step < (self.committed_step or 0):
            rule = f"step {step} would be saved behind step {self.committed_step}, and a restart would not find it"
            remedy = "python -m jaxlm.checkpoint rewind moves later steps out of the way"
            raise UserError(Problem(f"checkpoints in {self.directory}", rule, remedy))
        # The loop runs under transfer_guard("disallow"); this copy to the host is meant.
        with jax.transfer_guard("allow"):
            staged, said = {}, None
            try:
                self._make_way(step)
                said, staged = own_sums(named).tolist(), stage(named)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                said = first_line(error)
            sums = self._gang.settle(f"saving step {step}", said, self._total)
            if isinstance(sums, str):
                self._failed(step, sums, start, time.monotonic() - start)
                return False
            # Orbax's start holds collectives where there are several processes: not in a thread beside a step's
            response = None
            if self._gang.count > 1:
                try:
                    response = self._begin(step, staged)
                except Exception as error:
                    self._failed(step, first_line(error), start, time.monotonic() - start, torn=True)
                    self.check()
        leaves = {name: Leaf(str(x.dtype), x.shape, total) for (name, x), total in zip(named.items(), sums)}
        seal = lambda path: manifest.seal(path, step=step, leaves=leaves, metadata=note)  # noqa: E731
        blocked_s = time.monotonic() - start
        self._in_flight = self._background.submit(self._finish, step, staged, response, seal, start, blocked_s)
        return True

    def poll(self) -> list[SaveOutcome]:
        """Saves that ended since the last call, oldest first. Never blocks."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def wait(self) -> None:
        """Blocks until no save is in flight; `poll` then says how they ended."""
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None

    def close(self) -> list[SaveOutcome]:
        """Waits for the save in flight, and returns what `poll` has not. Nothing can be saved afterwards."""
        self.wait()
        self._closed = True
        self._background.shutdown()
        return self.poll()

    def check(self) -> None:
        """Raises UserError (exit code 3) if another run has taken over, or if this process of several failed in a save that
        the others go on with: they wait for it until it leaves."""
        if self._lock is not None:
            self._lock.check()
        if self._torn is not None:
            time.sleep(2 * LEAVE_S)  # it may have failed because another is gone: who that was is on its way
            raise self._torn

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        for outcome in self.close():
            if outcome.error is not None:
                log.error("checkpoint of step %d was not saved: %s", outcome.step, outcome.error)

    def _begin(self, step: int, staged: dict[str, jax.Array]) -> ocp.AsyncResponse[None]:
        path = layout.writing_path(self.directory, step)
        with _writing():
            return ocp.save_checkpointables_async(str(path), {ITEM: staged})

    def _finish(
        self, step: int, staged: dict, response: Any, seal: Callable[[Path], None], start: float, blocked_s: float
    ) -> None:
        """In the background: writes, commits, records how it ended, deletes what is superseded."""
        try:
            (response or self._begin(step, staged)).result()
            if jax.process_index() == 0:
                seal(layout.writing_path(self.directory, step))
                self.check()
                layout.commit(self.directory, step)
        except Exception as error:  # whatever ended it, a run of one process goes on and the next save may succeed
            self._failed(step, first_line(error), start, blocked_s, torn=self._gang.count > 1)
            return
        self.committed_step, self._failures = step, 0
        self._outcomes.append(SaveOutcome(step, None, time.monotonic() - start, blocked_s, 0))
        if jax.process_index() == 0:
            try:
                layout.remove(self.directory, superseded(self.directory, self._retention))
            except OSError as error:
                log.warning("%s: old checkpoints stay, it can't be read: %s", self.directory, error)

    def _failed(self, step: int, error: str, start: float, blocked_s: float, *, torn: bool = False) -> None:
        if jax.process_index() == 0 and not (self._lock and self._lock.lost):  # else it is the other run's by now
            layout.remove_leftovers(self.directory)
        self._failures += 1
        if torn:
            problem = Problem(f"checkpoint of step {step}", f"was not saved: {error}", f"mend that; {RERUN}")
            self._torn = UserError(problem, exit_code=Exit.UNUSABLE)
        self._outcomes.append(SaveOutcome(step, error, time.monotonic() - start, blocked_s, self._failures))

    def _total(self, said: list[list[int] | str]) -> list[int] | str:
        """The checksums of a state of which each process said its own sums; or why one that said a word has none."""
        for process, sums in enumerate(said):
            if isinstance(sums, str):
                return f"process {process} ({self._gang.names[process]}): {sums}" if len(said) > 1 else sums
        return np.array(said, np.uint32).sum(0, dtype=np.uint32).tolist()

    def _make_way(self, step: int) -> None:
        """Moves aside what stands where steps from here on will go: damaged ones passed over, and what is none."""
        if jax.process_index() != 0:
            return
        for later, damage in [*self._passed_over.items()]:
            reason = f"{damage}; the run went on from step {self.committed_step}"
            layout.abandon(self.directory / str(later), reason)
            del self._passed_over[later]
        entry = self.directory / str(step)
        if layout.is_committed(entry):
            remedy = "give each a --workdir"
            raise UserError(Problem(str(entry), "was saved by another run while this one trains", remedy))
        if entry.exists():
            layout.abandon(entry, "no checkpoint, and stood in the way of one")


def _writing() -> ocp.Context:
    silence_details()
    context = ocp.Context()
    saving = context.array.saving
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    saving.enable_write_sharding_file = False  # a checkpoint knows nothing of the mesh
    saving.use_compression = False  # 8 % of trained float32 weights, for twice the time of a commit
    saving.use_replica_parallel = False  # each part is staged once
    return context
