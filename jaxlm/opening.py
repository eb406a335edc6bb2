"""How the processes of a run open it: one holds the workdir, all hold the same settings, packages, data and devices, and those
of the checkpoint that they go on from.

A setting that changed since is of one of three kinds: it gives the checkpoint's arrays another shape or meaning, and is
refused; it changes which tokens a step reads, or what an update does with them, and is refused unless resume.allow names it;
or it changes no number beyond rounding, and is noted. What the checkpoint was made with stands in the checkpoint itself.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.checkpoint.layout import Retention, committed_steps
from jaxlm.checkpoint.lock import STALE_S, RunLock
from jaxlm.checkpoint.restore import newest_manifest
from jaxlm.checkpoint.space import shortages
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Config, Exit, Problem, UserError, get, skipped_batches
from jaxlm.data.corpus import Corpus, evaluation_loaders, open_corpus, sets_read, training_loader
from jaxlm.data.loader import Loader, batch_of
from jaxlm.guards import Closing
from jaxlm.header import versions
from jaxlm.metrics.writer import read_metrics
from jaxlm.parallel.gang import Gang
from jaxlm.parallel.multihost import agree, check_devices
from jaxlm.pipelined import from_layers, to_layers
from jaxlm.session import made_with, open_mesh, with_vocabulary
from jaxlm.settings import SCHEMA, Resolved, columns, flatten, shown
from jaxlm.step import Program, TrainState, abstract_state, init_state, make_program, with_recent, without_recent

DAY_S = 86400.0
T = TypeVar("T")


def preflight(workdir: Path) -> None:
    """Makes the folder and proves that it and those in it take files. Raises UserError if one does not."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        inside = (workdir / name for name in ("checkpoints", "data", "tensorboard"))
        for folder in (workdir, *(path for path in inside if path.is_dir())):
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"jaxlm")
            probe.replace(probe.with_suffix(".moved"))
            probe.with_suffix(".moved").unlink()
        free = shutil.disk_usage(workdir).free
    except OSError as e:
        raise UserError(Problem(f"--workdir={workdir}", f"can't be written: {e}", "choose a folder of yours")) from e
    if free < 2**20:
        raise UserError(Problem(f"--workdir={workdir}", f"has {free} bytes free", "make room, or choose another disk"))


@contextmanager
def own_folder(gang: Gang, workdir: Path) -> Iterator[Path]:
    """Where this process writes what one process of a run writes down: process 0 in the workdir, which is everybody's; any
    other in a folder that is thrown away.

    Raises: UserError (exit code 3) naming a process that does not see the workdir of process 0.
    """
    mark = workdir / f".seen-{gang.settle('a mark in the workdir', uuid.uuid4().hex, lambda names: names[0])}"
    with gang.together("making the workdir"):
        if gang.process == 0:
            preflight(workdir)
            mark.touch()
    try:
        with gang.together("opening the workdir"):
            if gang.process != 0:
                preflight(workdir)
            if not mark.exists():
                rule, remedy = "is not the folder that process 0 has", "name one on a file system that all hosts share"
                raise UserError(Problem(f"--workdir={workdir}", rule, remedy), exit_code=Exit.UNUSABLE)
    finally:
        if gang.process == 0:
            mark.unlink()
    if gang.process == 0:
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="jaxlm-") as scratch:
        yield Path(scratch)


def take_lock(gang: Gang, stack: Closing, lock: RunLock) -> RunLock | None:
    """Process 0 holds the workdir for all of them; the others get None."""
    with gang.together("locking the workdir", limit_s=2 * STALE_S):  # another host's holder may have to grow old
        if gang.process != 0:
            return None
        gang.at_end.append(lock.__exit__)
        return stack.enter_context(lock)


@dataclass(frozen=True)
class Work:
    """What a run trains, and on what. resolved: settings, with those that the data decide."""

    resolved: Resolved
    corpus: Corpus
    program: Program
    loader: Loader
    held_out: dict[str, Loader]


def open_work(gang: Gang, resolved: Resolved, workdir: Path, note: Callable[[str], None]) -> Work:
    """Opens what settings name. Raises UserError, in all processes alike, where one has other settings, packages, data or
    devices than the others."""
    config = resolved.config
    with gang.together("comparing settings"):
        layout, made = open_mesh(config), last_made(workdir, note)
        if not config.model.vocab_size:
            # the data will say; what else does not fit the mesh is said before they are read
            any_size = dataclasses.replace(config.model, vocab_size=config.model.vocab_multiple * layout.mesh.size)
            make_program(dataclasses.replace(config, model=any_size), layout)
        if made is not None:
            made.compare_settings(config, layout.mesh.shape, note)
    settings = dict(flatten(dataclasses.asdict(config)))
    seen = {"checkpoints": committed_steps(workdir / "checkpoints"), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    agree(gang, settings | versions() | seen)
    check_devices(gang)
    corpus = in_turn(gang, lambda: open_corpus(config, workdir, note))
    with gang.together("opening data"):
        resolved = with_corpus(resolved, corpus, note)
        config = resolved.config
        if made is not None:
            made.compare_data(config, corpus.fingerprints, note)
        program = make_program(config, layout)
        loader, held_out = training_loader(config, corpus), evaluation_loaders(config, corpus, note)
    agree(gang, {"data": corpus.fingerprints, "mesh": dict(layout.mesh.shape)})
    return Work(resolved, corpus, program, loader, held_out)


def with_corpus(resolved: Resolved, corpus: Corpus, note: Callable[[str], None]) -> Resolved:
    """`resolved` with the vocabulary that its tokenizer decides; says if the model has tokens that it will never see."""
    config = with_vocabulary(resolved.config, corpus.tokenizer)
    if config.model.vocab_size > corpus.tokenizer.vocab_size:
        unseen = f"{config.data.tokenizer} has {corpus.tokenizer.vocab_size}: the others are never seen"
        note(f"model.vocab_size={config.model.vocab_size}, but data.tokenizer={unseen}")
    if config == resolved.config:
        return resolved
    return Resolved(config, resolved.origin | {"model.vocab_size": "derived"})


def in_turn(gang: Gang, make: Callable[[], T]) -> T:
    """What `make` gives, made by process 0 first, however long that takes: the others find its files there."""
    made = None
    for turn, limit_s in (("preparing data", DAY_S), ("opening what process 0 prepared", 0.0)):
        with gang.together(turn, limit_s=limit_s):
            if (gang.process == 0) == (limit_s > 0):
                made = make()
    assert made is not None
    return made


def open_store(config: Config, workdir: Path, lock: RunLock | None, gang: Gang) -> CheckpointStore:
    """The run's checkpoints, kept as the config has it."""
    kept = Retention(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best)
    return CheckpointStore(workdir / "checkpoints", retention=kept, lock=lock, gang=gang)


def resume_or_begin(program: Program, store: CheckpointStore, note: Callable[[str], None]) -> tuple[TrainState, int]:
    """The state of the newest sound checkpoint, or a new one, and the steps it has behind it."""
    like, _ = without_recent(abstract_state(program))
    saved_like = to_layers(program.pipe, like)
    for shortage in shortages(store.directory, saved_like):
        note(f"WARNING: {shortage}")
    restored = store.restore_latest_good(saved_like)
    if restored is None:
        return init_state(program), 0
    state = from_layers(program.pipe, restored.state, like)
    return with_recent(program, state, restored.metadata.get("recent")), restored.step


def as_saved(program: Program, state: TrainState) -> Any:
    """The arrays of a checkpoint, a leaf a layer."""
    return to_layers(program.pipe, without_recent(state)[0])


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


SHAPE = (
    *_keys("model", "vocab_size vocab_multiple num_layers num_heads num_kv_heads head_dim embed_dim mlp_dim max_seq_len"),
    *_keys("model", "position norm embed_norm activation use_bias tie_embeddings"), "optim.name",
)  # fmt: skip
DATA = (
    *_keys("data", "path eval tokenizer text_key split mask_eod_loss skip_steps order packing reset_at_eod seq_lens"),
    *_keys("data", "fim_rate fim_spm_rate fim_tokens"), *_keys("train", "batch_size batch_ramp seq_len seed"),
)  # fmt: skip
MASKS = ("train.accumulate", "pipeline.microbatches", "mesh.pipeline")  # dropout draws a mask for each microbatch
UPDATE = (
    *(key for key in SCHEMA if key.startswith("optim.") and key not in ("optim.name", "optim.offload")), *MASKS,
    *_keys("model", "dropout dtype rope_theta norm_eps"), "train.z_loss", "train.num_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What the newest checkpoint of a run was made with. mesh: the degrees above 1.   data: {name of a set: fingerprint}."""

    workdir: Path
    step: int
    config: Config
    mesh: Mapping[str, int]
    data: Mapping[str, str]

    def compare_settings(self, now: Config, mesh: Mapping[str, int], note: Callable[[str], None]) -> None:
        """Notes which settings differ. Raises UserError with a table of them if the run would go on as another."""
        changed = [key for key in SCHEMA if key != "resume.allow" and get(self.config, key) != get(now, key)]
        changed = [key for key in changed if (key, get(now, key)) != ("model.vocab_size", 0)]  # the tokenizer decides
        matters = [key for key in changed if self._matters(key, now, mesh)]
        shape = [key for key in matters if key in SHAPE]
        others = [key for key in matters if key in DATA + UPDATE and key not in now.resume.allow]
        kinds = (("arrays of another shape or meaning", shape, []), ("other data or updates", others, others))
        if problems := [self._refusal(what, keys, now, allow=allow) for what, keys, allow in kinds if keys]:
            raise UserError(*problems)
        for key in changed:
            note(f"changed since step {self.step}: {key} {shown(get(self.config, key))} -> {shown(get(now, key))}")

    def compare_data(self, now: Config, fingerprints: Mapping[str, str], note: Callable[[str], None]) -> None:
        """Holds the token sets that the run has read to their fingerprints, in order and with their weights, wherever they lie.

        Raises: UserError with a table unless resume.allow names the setting of the data.
        """
        before, after = (
            sets_read(config.data.train, [*sets.values()], steps=self.step)
            for config, sets in ((self.config, self.data), (now, fingerprints))
        )
        if before == after:
            return
        key = "data.path" if now.data.path else "data.train"
        names = dict.fromkeys((*self.data, *fingerprints))
        rows = [(name, self.data.get(name, "-"), fingerprints.get(name, "-")) for name in names]
        rows.append((key, shown(self.config.data.train), shown(now.data.train)))
        table = _table(("set", "saved", "now"), *(row for row in rows if row[1] != row[2]))
        if key in now.resume.allow:
            note(f"the token sets are not those of step {self.step}:{table}")
            return
        rule = f"the token sets are not those that its checkpoint of step {self.step} was trained on:{table}"
        remedy = f"bring them back, use another --workdir, or insist: --config.resume.allow={_listed(now, [key])}"
        raise UserError(Problem(f"--workdir={self.workdir}, {key}", rule, remedy))

    def _matters(self, key: str, now: Config, mesh: Mapping[str, int]) -> bool:
        """Whether a changed `key` changes what the run does: some settings count only together with others."""
        before, skipped = self.config, [skipped_batches(config.data.skip_steps) for config in (self.config, now)]
        last = [batch_of(config.train.num_steps - 1, skip) for config, skip in zip((before, now), skipped)]
        shuffles = now.data.order == "megatron" and last[0] != last[1]  # all batches up to the last as one
        if key in MASKS:
            return now.model.dropout > 0 and _microbatches(before, self.mesh) != _microbatches(now, mesh)
        if key == "train.num_steps":  # the horizon of the schedules that end there
            return now.optim.schedule in ("cosine", "linear", "wsd") or shuffles
        if key == "data.eval":  # with sets of its own for evaluation, a run trains on all of the others
            return bool(before.data.eval) != bool(now.data.eval)
        if key == "data.skip_steps":  # batches that are still to come may be left out
            return shuffles or any(batch_of(i, skipped[0]) != batch_of(i, skipped[1]) for i in range(self.step))
        return True

    def _refusal(self, what: str, keys: Sequence[str], now: Config, *, allow: Sequence[str]) -> Problem:
        rows = [(key, shown(get(self.config, key)) or "nothing", shown(get(now, key)) or "nothing") for key in keys]
        rule = f"its checkpoint of step {self.step} was made with {what}:{_table(('setting', 'saved', 'now'), *rows)}"
        remedy = "set them back, or start another run with another --workdir"
        remedy += f", or insist: --config.resume.allow={_listed(now, allow)}" if allow else ""
        return Problem(f"--workdir={self.workdir}", rule, remedy)


def last_made(workdir: Path, note: Callable[[str], None]) -> Made | None:
    """What the newest checkpoint that can say so was made with; None where there is none."""
    found = newest_manifest(workdir / "checkpoints")
    if found is None:
        return None
    return Made(workdir, found.step, made_with(found, note), found.metadata["mesh"], found.metadata["data"])


def _microbatches(config: Config, mesh: Mapping[str, int]) -> int:
    stages = mesh.get("pipeline", 1)
    return config.train.accumulate * (config.pipeline.pieces(stages) if stages > 1 else 1)


def owes_evaluation(config: Config, workdir: Path, step: int) -> bool:
    """Whether the start before this one left after `step` without the evaluation that follows."""
    done = any(record["step"] == step and "eval_loss" in record for record in read_metrics(workdir))
    return step > 0 and config.train.evaluates_after(step) and not done


def _table(*rows: tuple[str, str, str]) -> str:
    return "".join(f"\n    {line}" for line in columns(rows))


def _listed(config: Config, more: Sequence[str]) -> str:
    """A value for resume.allow: what it is, and `more`."""
    return ",".join((*config.resume.allow, *more))
