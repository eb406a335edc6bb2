"""What the loop and the tools over a workdir both open: settings, text, the program, batches on devices.

A workdir is one run: config.json, data/, checkpoints/, metrics.jsonl, tensorboard/, report.md, loss.png, summary.json.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxlm.checkpoint import restore
from jaxlm.config import Config, Problem, UserError
from jaxlm.data.indexed import IndexedDataset
from jaxlm.data.loader import Batch, Loader
from jaxlm.data.prepare import prepare
from jaxlm.data.samples import Samples, TokenRange, split_ranges
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import Layout
from jaxlm.settings import from_json
from jaxlm.step import Program, abstract_state, make_program


@dataclass(frozen=True)
class Corpus:
    """The text of a run: what to train on, what to hold out, and how it is spelled."""

    tokenizer: Tokenizer
    training: tuple[TokenRange, ...]
    held_out: tuple[TokenRange, ...]

    @property
    def num_tokens(self) -> int:
        return sum(r.num_tokens for r in self.training)


def open_corpus(config: Config, workdir: Path, log: Callable[[str], None]) -> Corpus:
    """Tokenizes data.path into workdir/data on first use, or opens data.train and data.eval.

    Raises: UserError if a file is missing, malformed, changed since it was tokenized, or too short for a row.
    """
    data = config.data
    if data.path:
        ready = prepare(
            data.path, tokenizer_spec=data.tokenizer, text_key=data.text_key, folder=workdir / "data", log=log
        )  # fmt: skip
        tokenizer, prefixes = ready.tokenizer, (ready.prefix,)
    else:
        tokenizer, prefixes = load_tokenizer(data.tokenizer), data.train
    sets = [IndexedDataset(prefix) for prefix in prefixes]
    if data.eval:
        return Corpus(tokenizer, tuple(map(whole, sets)), tuple(whole(IndexedDataset(prefix)) for prefix in data.eval))
    cuts = [split_ranges(s.num_tokens, shares=data.split) for s in sets]
    training, held_out = (tuple(TokenRange(s, *cut[i]) for s, cut in zip(sets, cuts)) for i in (0, 1))
    return Corpus(tokenizer, training, tuple(r for r in held_out if r.num_tokens > config.train.seq_len))


def whole(dataset: IndexedDataset) -> TokenRange:
    """All tokens of a set."""
    return TokenRange(dataset, 0, dataset.num_tokens)


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with model.vocab_size from the tokenizer where it was left open. Raises UserError if it is too small."""
    size = config.model.vocab_size
    if size and size < tokenizer.vocab_size:
        text = f"is smaller than the {tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer}"
        raise UserError(Problem(f"model.vocab_size={size}", text, "leave it out, or name the tokenizer of this model"))
    model = dataclasses.replace(config.model, vocab_size=size or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def make_loader(config: Config, ranges: tuple[TokenRange, ...], tokenizer: Tokenizer, *, shuffle: bool) -> Loader:
    """Global batches over `ranges`: shuffled by train.seed without end, or in file order once."""
    train = config.train
    return Loader(
        Samples(ranges, seq_len=train.seq_len, seed=train.seed, shuffle=shuffle),
        train.batch_size,
        eod=tokenizer.eod,
        mask_eod_loss=config.data.mask_eod_loss,
        vocab_size=config.model.vocab_size,
    )


def open_program(config: Config) -> Program:
    """The program of `config` over all devices. Raises UserError if the mesh or the batch does not fit them."""
    check_accelerator()
    mesh = make_mesh(config.mesh, jax.devices())
    shards, train = mesh.shape["data"] * mesh.shape["fsdp"], config.train
    rows = train.batch_size // train.accumulate
    if rows % shards:
        text = f"/ train.accumulate={train.accumulate} = {rows} rows do not split over mesh.data*mesh.fsdp = {shards}"
        unit = shards * train.accumulate
        below = train.batch_size // unit * unit
        remedy = f"use a multiple of {unit} ({below or unit} or {below + unit + (0 if below else unit)})"
        raise UserError(Problem(f"train.batch_size={train.batch_size}", text, remedy))
    return make_program(config, Layout(mesh))


def check_accelerator() -> None:
    """Raises UserError where an NVIDIA GPU is present and jax can't use it; JAX_PLATFORMS=cpu says that it is meant."""
    gpus = (
        [d for d in os.listdir("/dev") if d.startswith("nvidia") and d[6:].isdigit()] if os.path.isdir("/dev") else []
    )
    if gpus and not os.environ.get("JAX_PLATFORMS") and jax.default_backend() == "cpu":
        remedy = (
            f"{sys.executable} -m pip install 'jaxlm[cuda13]' (or cuda12 for older drivers); JAX_PLATFORMS=cpu to go on"
        )
        raise UserError(Problem(f"{len(gpus)} NVIDIA GPU(s)", "the installed jax sees only the CPU", remedy))


def open_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The tokenizer of a run, from its workdir where the run made one of its own."""
    made = workdir / "data" / "chars.json"
    return load_tokenizer(f"chars:{made}" if config.data.tokenizer == "chars" else config.data.tokenizer)


def restore_params(program: Program, workdir: Path, step: int | None) -> restore.Restored:
    """Parameters of checkpoint `step`, or of the newest, on the program's devices. UserError if there is none."""
    return restore.restore_params(workdir / "checkpoints", abstract_state(program).params, step=step)


def mean_loss(eval_fn: Callable, params: object, batches: Iterable[Batch]) -> float:
    """Nats a counted token over `batches` on devices; the device is read once, at the end."""
    sums = [eval_fn(params, batch) for batch in batches]
    nats, tokens = (np.asarray(jax.device_get(part), np.float64).sum() for part in zip(*sums))
    return float(nats / max(tokens, 1))


def load_config(workdir: Path) -> Config:
    """The resolved settings of a run. Raises UserError if `workdir` is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(Problem(f"--workdir={workdir}", "has no config.json: it is not a run", "name a run's folder"))
    return from_json(path.read_text())


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
