"""What may change between the checkpoint that a run goes on from and now, and what is said of it.

A changed setting is of one of three kinds: it gives the checkpoint's arrays another shape or meaning, and is refused; it
changes which tokens a step reads, or what an update does with them, and is refused unless resume.allow names it; or it
changes no number beyond rounding, and is noted. What the checkpoint was made with stands in the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.checkpoint.restore import newest_manifest
from jaxlm.config import Config, Problem, UserError, get, skipped_batches
from jaxlm.data.corpus import sets_read
from jaxlm.data.loader import batch_of
from jaxlm.metrics.writer import read_metrics
from jaxlm.session import made_with
from jaxlm.settings import SCHEMA, columns, shown


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
        problems = []
        if shape:
            problems.append(self._refusal("arrays of another shape or meaning", shape, now))
        if others:
            problems.append(self._refusal("other data or updates", others, now, allow=others))
        if problems:
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

    def _refusal(self, what: str, keys: Sequence[str], now: Config, *, allow: Sequence[str] = ()) -> Problem:
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
