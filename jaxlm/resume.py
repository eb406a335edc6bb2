"""What may change between two starts of a run that has checkpoints, and what is said of it.

A changed setting is of one of three kinds: it gives the checkpoint's arrays another shape or meaning, and is refused; it
changes which tokens a step reads, or what an update does with them, and is refused unless resume.allow names it; or it
changes no number beyond rounding, and is noted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.layout import committed_steps
from jaxlm.config import Config, Problem, UserError, get, skipped_batches
from jaxlm.data.corpus import same_weights
from jaxlm.data.loader import batch_of
from jaxlm.metrics.writer import read_metrics
from jaxlm.session import load_config
from jaxlm.settings import SCHEMA, shown

SHAPE = (
    *(f"model.{key}" for key in ("vocab_size", "vocab_multiple", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
    *(f"model.{key}" for key in ("embed_dim", "mlp_dim", "max_seq_len", "position", "norm", "embed_norm", "activation")),
    *(f"model.{key}" for key in ("use_bias", "tie_embeddings")), "optim.name",
)  # fmt: skip
DATA = (
    *(
        f"data.{key}"
        for key in ("path", "train", "eval", "tokenizer", "text_key", "split", "mask_eod_loss", "skip_steps")
    ),
    *(
        f"data.{key}"
        for key in ("order", "packing", "reset_at_eod", "seq_lens", "fim_rate", "fim_spm_rate", "fim_tokens")
    ),
    *(f"train.{key}" for key in ("batch_size", "batch_ramp", "seq_len", "seed")),
)
UPDATE = (
    *(key for key in SCHEMA if key.startswith("optim.") and key not in ("optim.name", "optim.offload")),
    *(f"model.{key}" for key in ("dropout", "dtype", "rope_theta", "norm_eps")), "train.z_loss", "train.num_steps",
)  # fmt: skip


def compare_with_last_start(config: Config, workdir: Path, note: Callable[[str], None]) -> None:
    """Says which settings differ from those this run was last started with.

    Raises: UserError with a table (setting, saved, now) if there are checkpoints and the run would go on as another one.
    """
    if not (workdir / "config.json").is_file():
        return
    try:
        before = load_config(workdir)
    except UserError as e:
        note(f"settings of the last start can't be compared: {e.problems[0].rule}")
        return
    changed = [key for key in SCHEMA if key != "resume.allow" and get(before, key) != get(config, key)]
    changed = [key for key in changed if (key, get(config, key)) != ("model.vocab_size", 0)]  # the tokenizer decides
    steps, allow = committed_steps(workdir / "checkpoints"), config.resume.allow
    if steps:
        matters = [key for key in changed if _matters(key, before, config, steps[-1])]
        shape = [key for key in matters if key in SHAPE]
        others = [key for key in matters if key in DATA + UPDATE and key not in allow]
        where, remedy = f"--workdir={workdir}", "set them back, or start another run with another --workdir"
        problems = []
        if shape:
            rule = "its checkpoints have arrays of another shape or meaning:"
            problems.append(Problem(where, rule + _table(shape, before, config), remedy))
        if others:
            rule = "its checkpoints were made with other data or updates:"
            remedy += f", or insist: --config.resume.allow={_listed(config, others)}"
            problems.append(Problem(where, rule + _table(others, before, config), remedy))
        if problems:
            raise UserError(*problems)
    for key in changed:
        note(f"changed since the last start: {key} {shown(get(before, key))} -> {shown(get(config, key))}")


def _matters(key: str, before: Config, now: Config, step: int) -> bool:
    """Whether a changed `key` changes what a run at `step` does: some settings count only together with others."""
    old, new = (skipped_batches(config.data.skip_steps) for config in (before, now))
    ends = batch_of(before.train.num_steps - 1, old) != batch_of(now.train.num_steps - 1, new)
    shuffles = now.data.order == "megatron" and ends  # all batches up to the last as one
    if key == "train.num_steps":  # the horizon of the schedules that end there
        return now.optim.schedule in ("cosine", "linear", "wsd") or shuffles
    if key == "data.train":  # weights may change, and sets join, from a later step on
        return not same_weights(before.data.train, now.data.train, steps=step)
    if key == "data.eval":  # with sets of its own for evaluation, a run trains on all of the others
        return bool(before.data.eval) != bool(now.data.eval)
    if key == "data.skip_steps":  # batches that are still to come may be left out
        return shuffles or any(batch_of(i, old) != batch_of(i, new) for i in range(step))
    return True


def _table(keys: Sequence[str], before: Config, now: Config) -> str:
    rows = [(key, shown(get(before, key)) or "nothing", shown(get(now, key)) or "nothing") for key in keys]
    return _aligned([("setting", "saved", "now"), *rows])


def _aligned(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "".join(f"\n    {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def compare_data(config: Config, workdir: Path, now: Mapping[str, str]) -> None:
    """Holds the token sets of this start, {name: fingerprint}, in order, to those of the last one.

    Raises: UserError naming what changed if there are checkpoints, unless resume.allow names the setting of the data.
    """
    key = "data.path" if config.data.path else "data.train"
    saved = saved_data(workdir)
    if saved is None or list(saved.items()) == list(now.items())[: len(saved)] or key in config.resume.allow:
        return
    if not committed_steps(workdir / "checkpoints"):
        return
    names = [*saved, *(name for name in now if name not in saved)]
    rows = [(name, saved.get(name, "-"), now.get(name, "-")) for name in names]
    changed = [row for row in rows if row[1] != row[2]] or [("order", ", ".join(saved), ", ".join(now))]
    rule = "the token sets are not those that its checkpoints were trained on:"
    rule += _aligned([("set", "saved", "now"), *changed])
    remedy = f"bring them back, use another --workdir, or insist: --config.resume.allow={_listed(config, [key])}"
    raise UserError(Problem(f"--workdir={workdir}, {key}", rule, remedy))


def owes_evaluation(config: Config, workdir: Path, step: int) -> bool:
    """Whether the start before this one left after `step` without the evaluation that follows."""
    done = any(record["step"] == step and "eval_loss" in record for record in read_metrics(workdir))
    return step > 0 and config.train.evaluates_after(step) and not done


def _listed(config: Config, more: Sequence[str]) -> str:
    """A value for resume.allow: what it is, and `more`."""
    return ",".join((*config.resume.allow, *more))


def saved_data(workdir: Path) -> dict[str, Any] | None:
    """The token sets of the last start, {name: fingerprint}, if it wrote them down."""
    try:
        return json.loads((workdir / "config.json").read_text())["run"]["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
