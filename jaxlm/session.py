"""What the loop and the tools over a workdir both open: settings, text, the program, batches on devices.

A workdir is one run: config.json, layout.txt, data/, checkpoints/, metrics.jsonl (metrics.later.jsonl and .abandoned.jsonl:
lines of steps made again), time.jsonl, tensorboard/, report.md, loss.png, summary.json, and stacks.txt of the watchdog.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.manifest import Manifest
from jaxlm.checkpoint.restore import Restored, newest_manifest, restore
from jaxlm.checks import ignored
from jaxlm.config import Config, Exit, MeshConfig, PipelineConfig, Problem, UserError, get
from jaxlm.data.corpus import Corpus
from jaxlm.data.loader import Batch
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.parallel.context import choose_context
from jaxlm.parallel.gang import Gang
from jaxlm.parallel.mesh import make_layout, make_mesh
from jaxlm.parallel.multihost import CPU_THREADS, visible_gpus
from jaxlm.parallel.rules import Layout
from jaxlm.pipelined import from_layers, plan_stages, to_layers
from jaxlm.settings import SCHEMA, Resolved, flatten, from_values, shown
from jaxlm.step import Program, abstract_state, chosen_kernels, make_program

AHEAD = 2  # batches of an evaluation in flight


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with model.vocab_size from the tokenizer where it was left open. Raises UserError if it is too small."""
    size = config.model.vocab_size
    if size and size < tokenizer.vocab_size:
        text = f"is smaller than the {tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer}"
        raise UserError(Problem(f"model.vocab_size={size}", text, "leave it out, or name the tokenizer of this model"))
    model = dataclasses.replace(config.model, vocab_size=size or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def with_corpus(resolved: Resolved, corpus: Corpus, note: Callable[[str], None]) -> Resolved:
    """`resolved` with the vocabulary that its tokenizer decides; says if the model has tokens that it will never see."""
    config = with_vocabulary(resolved.config, corpus.tokenizer)
    if config.model.vocab_size > corpus.tokenizer.vocab_size:
        unseen = f"{config.data.tokenizer} has {corpus.tokenizer.vocab_size}: the others are never seen"
        note(f"model.vocab_size={config.model.vocab_size}, but data.tokenizer={unseen}")
    return (
        resolved if config == resolved.config else Resolved(config, resolved.origin | {"model.vocab_size": "derived"})
    )


def open_mesh(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of `config` over `devices` (None: all), before any data is read.

    Raises: UserError if a GPU is there that jax can't use, or mesh, batch, kernels, pipeline or way of
      splitting rows do not fit the devices.
    """
    check_accelerator()
    layout = make_layout(config.mesh, devices or jax.devices())
    actual = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **layout.mesh.shape))
    chosen = [key for key, (_, default) in SCHEMA.items() if get(config, key) != default.default]
    if problems := [
        p for p in ignored(actual, chosen) if p not in ignored(config, chosen)
    ]:  # what a -1 turned out to be
        raise UserError(*problems)
    chosen_kernels(config, layout)
    for length in {config.train.seq_len, *(length for _, length in config.data.row_lengths)}:
        choose_context(layout, config.model, length)
        layout.check_divides("a row", (length,), ("residual",))
    shards, train = layout.num_row_shards, config.train
    rows = train.batch_unit // train.accumulate
    if rows % shards:
        over = "*".join(f"mesh.{axis}" for axis in layout.split("batch"))
        text = f"/ train.accumulate={train.accumulate} = {rows} rows do not split over {over} = {shards}"
        fits = [a for a in range(1, train.batch_size + 1) if train.batch_size % (a * shards) == 0]
        below = train.batch_size // shards * shards
        batch = f"train.batch_size={below or shards} or {below + shards if below else 2 * shards}"
        remedy = (
            f"use train.accumulate={max(fits, key=lambda a: -abs(a - train.accumulate))}" if fits else f"use {batch}"
        )
        raise UserError(Problem(f"train.batch_size={train.batch_size}", text, remedy))
    if (stages := layout.mesh.shape["pipeline"]) > 1:
        plan_stages(config, num_stages=stages, num_row_shards=shards)
    return layout


def open_program(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """The program of `config`, its vocabulary known, over `devices` (None: all). Raises as `open_mesh` and `make_program`."""
    return make_program(config, open_mesh(config, devices))


def open_tool_program(config: Config, *, plain: bool) -> Program:
    """A program of a run's model for a tool, on whatever devices there are.

    The run's own mesh where it fits them; else, or where `plain` asks for no pipeline and the run has one, the parameters
    are split by fsdp over as many devices as rows and model width split over.
    """
    if not (plain and config.mesh.pipeline != 1) and _fits(config.mesh):
        return open_program(config)
    rows, width = config.train.batch_unit // config.train.accumulate, config.model.embed_dim
    count = max(n for n in range(1, jax.device_count() + 1) if rows % n == 0 and width % n == 0)
    if count < jax.device_count() and jax.process_count() > 1:
        rule = (
            f"rows and width split over {count} of the {jax.device_count()} devices of {jax.process_count()} processes"
        )
        raise UserError(Problem("a tool's mesh", rule, "run the tool by itself, in one process"))
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=count), pipeline=PipelineConfig())
    return open_program(config, jax.devices()[:count])


def _fits(mesh: MeshConfig) -> bool:
    """Whether the degrees fill the devices there are."""
    try:
        make_mesh(mesh, jax.devices())
    except UserError:
        return False
    return True


def kernel_facts(program: Program) -> dict[str, str]:
    """What each operation that has several kernels runs on and, where rows are split over devices, how they meet; and why."""
    model, layout = program.config.model, program.layout
    facts = {key.removesuffix("_kernel"): str(choice) for key, choice in chosen_kernels(program.config, layout).items()}
    if layout.split("seq"):
        facts["context"] = str(choose_context(layout, model, program.config.train.seq_len))
    return facts


def use_device_settings(config: Config) -> None:
    """What must be set before jax takes hold of a device: memory share, queues, threads, compilation cache."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    if len(visible_gpus()) > 1:
        # one queue for the work of all streams: a collective is not put off behind products that come after it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # XLA lends 64 GB of pinned host memory, a ceiling and no reservation; a host of eight GPUs saves and offloads more.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "65536")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", CPU_THREADS)
    if config.train.compilation_cache:
        folder = Path(config.train.compilation_cache).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            problem = Problem(f"train.compilation_cache={folder}", f"can't be made: {e}", "choose a folder of yours")
            raise UserError(problem) from e
        jax.config.update("jax_compilation_cache_dir", str(folder))


def check_accelerator() -> None:
    """Raises UserError where an NVIDIA GPU is present and jax can't use it; JAX_PLATFORMS=cpu says that it is meant."""
    gpus = len(visible_gpus())
    if gpus and not os.environ.get("JAX_PLATFORMS") and jax.default_backend() == "cpu":
        remedy = f"{sys.executable} -m pip install 'jax[cuda13]=={jax.__version__}' (cuda12 for drivers older than 580)"
        raise UserError(Problem(f"{gpus} NVIDIA GPU(s)", "the installed jax sees only the CPU", remedy))


def open_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The tokenizer of a run, from its workdir where the run made one of its own."""
    made = workdir / "data" / "chars.json"
    return load_tokenizer(f"chars:{made}" if config.data.tokenizer == "chars" else config.data.tokenizer)


def restore_params(program: Program, workdir: Path, step: int | None) -> Restored:
    """Parameters of checkpoint `step`, or of the newest, on the program's devices. UserError if there is none."""
    like = abstract_state(program).params
    found = restore(workdir / "checkpoints", to_layers(program.pipe, like), step=step, part="params")
    return dataclasses.replace(found, state=from_layers(program.pipe, found.state, like))


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a counted token.   tokens: how many counted."""

    loss: float
    tokens: int

    def __str__(self) -> str:
        """For a screen, with a loss as exact as a training step's, float32's."""
        return f"eval loss {np.float32(self.loss)!s} on {self.tokens:,} tokens"


def evaluate_batches(
    eval_fn: Callable, params: object, batches: Iterable[Batch], *, seen: Callable[[], object] = lambda: None
) -> Evaluation:
    """The mean over `batches`. Each is read AHEAD batches after it was dispatched, and `seen` is called then: neither do
    batches pile up on the devices, nor do these wait."""
    sums, ahead = [], deque()
    for batch in batches:
        ahead.append(eval_fn(params, batch))
        if len(ahead) > AHEAD:
            sums.append(jax.device_get(ahead.popleft()))
            seen()
    nats, tokens = (math.fsum(map(float, part)) for part in zip((0, 0), *sums, *jax.device_get([*ahead])))
    return Evaluation(nats / max(tokens, 1), int(tokens))


def load_config(workdir: Path) -> Config:
    """The settings that a run's newest checkpoint was made with. Raises UserError if there is none."""
    found = newest_manifest(workdir / "checkpoints")
    if found is None:
        rule = "has no checkpoint: it is not a run, or one that has not saved yet"
        code = Exit.UNUSABLE if workdir.is_dir() else Exit.SETUP
        raise UserError(Problem(f"--workdir={workdir}", rule, "name a run's folder"), exit_code=code)
    return made_with(found, lambda text: print(text, file=sys.stderr))


def made_with(found: Manifest, note: Callable[[str], object]) -> Config:
    """The settings of a checkpoint. Says which of them there are no more."""
    values = dict(flatten(found.metadata["config"]))
    for gone in sorted(values.keys() - SCHEMA.keys()):
        note(f"step {found.step} was made with {gone}={shown(values.pop(gone))}, which is no setting any more")
    return from_values(values, f"step {found.step}")


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
