"""What the loop and the tools over a workdir both open: settings, text, the program, batches on devices.

A workdir is one run: config.json, layout.txt, data/, checkpoints/, metrics.jsonl, tensorboard/, report.md, loss.png,
summary.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxlm.checkpoint import restore
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checks import ignored
from jaxlm.config import Config, MeshConfig, PipelineConfig, Problem, UserError, get
from jaxlm.data.atomic import open_exclusive
from jaxlm.data.corpus import Corpus, same_weights
from jaxlm.data.loader import Batch
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.models.kernels import choose_attention
from jaxlm.parallel.context import choose_context
from jaxlm.parallel.mesh import make_layout, make_mesh
from jaxlm.parallel.rules import Layout
from jaxlm.pipelined import from_layers, to_layers
from jaxlm.settings import SCHEMA, from_json, shown
from jaxlm.step import Program, abstract_state, make_program


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with model.vocab_size from the tokenizer where it was left open. Raises UserError if it is too small."""
    size = config.model.vocab_size
    if size and size < tokenizer.vocab_size:
        text = f"is smaller than the {tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer}"
        raise UserError(Problem(f"model.vocab_size={size}", text, "leave it out, or name the tokenizer of this model"))
    model = dataclasses.replace(config.model, vocab_size=size or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def open_mesh(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of `config` over `devices` (None: all), before any data is read.

    Raises: UserError if a GPU is there that jax can't use, or mesh, batch, attention kernel or way of
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
    choose_attention(config.model, layout.platform, documents=config.data.separates)
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
    rows, width = config.train.batch_size // config.train.accumulate, config.model.embed_dim
    count = max(n for n in range(1, jax.device_count() + 1) if rows % n == 0 and width % n == 0)
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=count), pipeline=PipelineConfig())
    return open_program(config, jax.devices()[:count])


def _fits(mesh: MeshConfig) -> bool:
    """Whether the degrees fill the devices there are."""
    try:
        make_mesh(mesh, jax.devices())
    except UserError:
        return False
    return True


def attention_facts(program: Program) -> dict[str, str]:
    """What attention runs on and, where rows are split over devices, how they meet; with the reasons of each choice."""
    model, layout = program.config.model, program.layout
    documents = program.config.data.separates
    facts = {"attention": str(choose_attention(model, layout.platform, documents=documents))}
    if layout.split("seq"):
        facts["context"] = str(choose_context(layout, model, program.config.train.seq_len))
    return facts


def check_accelerator() -> None:
    """Raises UserError where an NVIDIA GPU is present and jax can't use it; JAX_PLATFORMS=cpu says that it is meant."""
    gpus = (
        [d for d in os.listdir("/dev") if d.startswith("nvidia") and d[6:].isdigit()] if os.path.isdir("/dev") else []
    )
    if gpus and not os.environ.get("JAX_PLATFORMS") and jax.default_backend() == "cpu":
        remedy = f"{sys.executable} -m pip install 'jax[cuda13]=={jax.__version__}' (cuda12 for drivers older than 580)"
        raise UserError(Problem(f"{len(gpus)} NVIDIA GPU(s)", "the installed jax sees only the CPU", remedy))


# What must stay as it was while a run has checkpoints: the shape of its state, and which tokens a step reads.
FIXED = (
    *(f"model.{key}" for key in ("vocab_size", "vocab_multiple", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
    *(f"model.{key}" for key in ("embed_dim", "mlp_dim", "max_seq_len", "position", "norm", "embed_norm", "activation")),
    *(f"model.{key}" for key in ("use_bias", "tie_embeddings")), "optim.name", "train.batch_size", "train.seq_len",
    "train.seed", "train.batch_ramp",
    *(f"data.{key}" for key in ("path", "train", "tokenizer", "text_key", "split", "mask_eod_loss", "order", "packing")),
    *(f"data.{key}" for key in ("reset_at_eod", "seq_lens", "fim_rate", "fim_spm_rate", "fim_tokens")),
)  # fmt: skip


def compare_with_last_start(config: Config, workdir: Path, note: Callable[[str], None]) -> None:
    """Says which settings differ from those this run was last started with.

    Raises: UserError if there are checkpoints and one of FIXED differs: the run would go on as another one.
    """
    if not (workdir / "config.json").is_file():
        return
    try:
        before = load_config(workdir)
    except UserError as e:
        note(f"settings of the last start can't be compared: {e.problems[0].rule}")
        return
    changed = [key for key in SCHEMA if get(before, key) != get(config, key)]
    changed = [key for key in changed if (key, get(config, key)) != ("model.vocab_size", 0)]  # the tokenizer decides
    steps = max(committed_steps(workdir / "checkpoints"), default=0)
    fixed = FIXED + (("train.num_steps",) if config.data.order == "megatron" else ())  # which shuffles all steps as one
    refused = [key for key in changed if key in fixed] if steps else []
    if same_weights(before.data.train, config.data.train, steps=steps):
        refused = [key for key in refused if key != "data.train"]
    if refused:
        text = "this run has checkpoints made with {}; going on would change its {}"
        part = {"model": "shape", "optim": "state"}
        raise UserError(
            *(
                Problem(
                    f"{key}={shown(get(config, key))}",
                    text.format(shown(get(before, key)) or "nothing", part.get(key.split(".")[0], "data order")),
                    "set it back, or start another run with another --workdir",
                )
                for key in refused
            )
        )
    for key in changed:
        note(f"changed since the last start: {key} {shown(get(before, key))} -> {shown(get(config, key))}")


def compare_data(corpus: Corpus, workdir: Path) -> None:
    """Raises UserError where there are checkpoints and a set to train on is no longer what the last start saw."""
    try:
        before = json.loads((workdir / "config.json").read_text())["run"]["data"]
    except (OSError, ValueError, KeyError):
        return
    now, text = corpus.fingerprints, "this run has checkpoints made with another set of that name"
    if committed_steps(workdir / "checkpoints") and (other := [p for p in now if before.get(p, now[p]) != now[p]]):
        remedy = "restore the set, or start another run with another --workdir"
        raise UserError(*(Problem(f"token set {prefix}", text, remedy) for prefix in other))


def open_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The tokenizer of a run, from its workdir where the run made one of its own."""
    made = workdir / "data" / "chars.json"
    return load_tokenizer(f"chars:{made}" if config.data.tokenizer == "chars" else config.data.tokenizer)


def restore_params(program: Program, workdir: Path, step: int | None) -> restore.Restored:
    """Parameters of checkpoint `step`, or of the newest, on the program's devices. UserError if there is none."""
    like = abstract_state(program).params
    found = restore.restore_params(workdir / "checkpoints", to_layers(program.pipe, like), step=step)
    return dataclasses.replace(found, state=from_layers(program.pipe, found.state, like))


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a counted token.   tokens: how many counted."""

    loss: float
    tokens: int


def evaluate_batches(eval_fn: Callable, params: object, batches: Iterable[Batch]) -> Evaluation:
    """The mean over `batches` on devices; the device is read once, at the end."""
    sums = [eval_fn(params, batch) for batch in batches]
    nats, tokens = (float(np.asarray(jax.device_get(part), np.float64).sum()) for part in zip(*sums))
    return Evaluation(nats / max(tokens, 1), int(tokens))


def load_config(workdir: Path) -> Config:
    """The resolved settings of a run. Raises UserError if `workdir` is none."""
    path = workdir / "config.json"
    try:
        return from_json(path.read_text())
    except FileNotFoundError as e:
        problem = Problem(f"--workdir={workdir}", "has no config.json: it is not a run", "name a run's folder")
        raise UserError(problem) from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(Problem(str(path), f"can't be read: {e}", "mend it, or name another run's folder")) from e


def lock_run(workdir: Path) -> BinaryIO:
    """Holds the workdir for this process until closed, or until the process ends however it ends.

    Raises: UserError (exit 3) if another process of this machine holds it.
    """
    lock = open_exclusive(workdir / "lock", wait=False)
    if lock is None:
        remedy = "wait for it, stop it, or give this run another --workdir"
        raise UserError(Problem(f"--workdir={workdir}", "another process is training here", remedy), exit_code=3)
    return lock


def preflight(workdir: Path) -> None:
    """Makes the folder and proves that it takes files. Raises UserError if it does not."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.write_bytes(b"jaxlm")
        probe.replace(probe.with_suffix(".moved"))
        probe.with_suffix(".moved").unlink()
        free = shutil.disk_usage(workdir).free
    except OSError as e:
        raise UserError(Problem(f"--workdir={workdir}", f"can't be written: {e}", "choose a folder of yours")) from e
    if free < 2**20:
        raise UserError(Problem(f"--workdir={workdir}", f"has {free} bytes free", "make room, or choose another disk"))
