"""The writer of a run's checkpoints: saves in the background, says what is committed, keeps the newest."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoint.layout import (
    ITEM,
    clear_the_way,
    committed_steps,
    name_leaves,
    prune,
    remove_leftovers,
    remove_temporary,
)
from jaxlm.checkpoint.quiet import silence_details
from jaxlm.checkpoint.restore import Restored, restore_latest, restore_params
from jaxlm.config import Problem, UserError

log = logging.getLogger("jaxlm.checkpoint")

# Small chunks make a load onto another mesh 2 to 6 times slower (docs/FAULTS.md); whole shards below this stay whole.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: committed and restorable where `error` is None, else not there at all, and why.

    duration_s: from the call of `save` to the commit or failure.
    """

    step: int
    error: str | None
    duration_s: float


class CheckpointStore:
    """Checkpoints of one run in one directory, written by this process (or gang of processes) alone.

    A step is committed by a rename once all of it is written: after `kill -9` at any time every step that was reported
    committed is restorable, and what else is there is removed at the next start. Nothing here ends a run: a save that
    fails is an outcome with its error, and the next one tries again.

        with CheckpointStore(workdir / "checkpoints", keep=3) as store:
            restored = store.restore_latest(abstract_state)
            ...
            store.save(step, state, metadata={"tokens": tokens})
            for outcome in store.poll():
                print(f"committed step {outcome.step}")

    Args:
      directory: made if it is missing. Leftovers of killed saves in it are removed.
      keep: newest committed steps to keep, >= 1; older ones are deleted after each commit.

    Raises: UserError if the directory cannot be made or listed.
    """

    def __init__(self, directory: str | Path, *, keep: int):
        assert keep >= 1, keep
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._closed = False
        self._in_flight: Future[None] | None = None
        self._outcomes: deque[SaveOutcome] = deque()  # appended by the background thread, taken by poll
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                remove_leftovers(self.directory)
            self._committed_step = max(committed_steps(self.directory), default=None)
        except OSError as error:
            problem = Problem(f"checkpoints in {self.directory}", str(error), "use another --workdir, or mend this one")
            raise UserError(problem) from error

    def save(self, step: int, state: Any, *, metadata: dict[str, Any] | None = None) -> bool:
        """Starts saving `state` as `step`. Returns once its values are copied to the host: it may be donated then.

        A save that is still in flight is waited for first. Saving the newest committed step once more does nothing.

        Args:
          state: a tree of jax.Arrays.
          metadata: JSON kept beside the state, returned by a restore.

        Returns: True if a save was started.
        Raises: UserError if a later step is committed already: a restore would take that one. UserError if another
          run has committed `step` in this directory meanwhile.
        """
        assert not self._closed, "save after close"
        note = json.loads(json.dumps(metadata or {}))
        named = name_leaves(state)
        for name, leaf in named.items():
            assert isinstance(leaf, jax.Array), f"{name} is a {type(leaf).__name__}, not a jax.Array"
        self.wait()
        if self._committed_step is not None and step <= self._committed_step:
            self._refuse_earlier(step)
            return False
        start = time.monotonic()
        try:
            if jax.process_index() == 0:
                clear_the_way(self.directory, step)
            # The loop runs under transfer_guard("disallow"); this copy to the host is meant.
            with _writing(), jax.transfer_guard("allow"):
                response = ocp.save_checkpointables_async(
                    str(self.directory / str(step)), {ITEM: named}, custom_metadata=note
                )
        except OSError as error:
            self._failed(step, error, start)
            return False
        self._in_flight = self._background.submit(self._finish, step, response, start)
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

    @property
    def committed_step(self) -> int | None:
        """The newest step that is known to be restorable."""
        return self._committed_step

    def steps(self) -> list[int]:
        """Committed steps on disk, ascending."""
        return committed_steps(self.directory)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """See `restore.restore_latest`."""
        return restore_latest(self.directory, abstract_state)

    def restore_params(self, abstract_params: Any, *, step: int | None = None) -> Restored:
        """See `restore.restore_params`."""
        return restore_params(self.directory, abstract_params, step=step)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        for outcome in self.close():
            if outcome.error is not None:
                log.error("checkpoint of step %d was not saved: %s", outcome.step, outcome.error)

    def _finish(self, step: int, response: ocp.AsyncResponse[None], start: float) -> None:
        """In the background: waits for the commit, records how it ended, deletes what is too old."""
        try:
            response.result()
        except Exception as error:  # whatever ended it, the run goes on and the next save may succeed
            self._failed(step, error, start)
            return
        self._committed_step = step
        self._outcomes.append(SaveOutcome(step, None, time.monotonic() - start))
        if jax.process_index() == 0:
            prune(self.directory, keep=self._keep)

    def _failed(self, step: int, error: Exception, start: float) -> None:
        if jax.process_index() == 0:
            remove_temporary(self.directory, step)
        self._outcomes.append(SaveOutcome(step, f"{type(error).__name__}: {error}", time.monotonic() - start))

    def _refuse_earlier(self, step: int) -> None:
        if step == self._committed_step:
            return
        rule = f"step {step} would be saved behind step {self._committed_step}, and a restart would not find it"
        remedy = "move the later steps elsewhere before training on from an earlier one"
        raise UserError(Problem(f"checkpoints in {self.directory}", rule, remedy))


def _writing() -> ocp.Context:
    silence_details()
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.enable_write_sharding_file = False  # a checkpoint knows nothing of the mesh
    return context
