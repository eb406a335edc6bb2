"""The rules of a config that span or bound its settings: all problems at once, before a device is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxlm.config import REMAT_NAMES, Config, Problem, get, remat_actions, skipped_batches

# (key, whether the rest of the config makes it count, what it needs). Set by the user and not counting is an error.
APPLIES = (
    ("mesh.zero", lambda c: c.mesh.fsdp != 1 or c.mesh.rules, "mesh.fsdp above 1"),
    *(
        (f"pipeline.{key}", lambda c: c.mesh.pipeline != 1, "mesh.pipeline above 1")
        for key in ("schedule", "microbatches", "repeats", "stage_layers", "in_place")
    ),
    ("pipeline.in_place", lambda c: c.pipeline.schedule == "1f1b", "pipeline.schedule=1f1b: others keep all"),
    ("model.scan_layers", lambda c: c.mesh.pipeline == 1, "mesh.pipeline=1"),
    ("model.rope_theta", lambda c: c.model.position == "rope", "model.position=rope"),
    ("mesh.context_method", lambda c: c.mesh.context != 1, "mesh.context other than 1"),
    ("optim.final_lr_frac", lambda c: c.optim.schedule in ("cosine", "linear", "wsd"), "a schedule that decays to it"),
    ("optim.decay_steps", lambda c: c.optim.schedule == "wsd", "optim.schedule=wsd"),
    ("optim.beta1", lambda c: c.optim.name != "adafactor", "optim.name other than adafactor"),
    ("optim.beta2", lambda c: c.optim.name != "adafactor", "optim.name other than adafactor"),
    ("optim.eps", lambda c: c.optim.name in ("adamw", "muon"), "optim.name=adamw or muon"),
    ("optim.decay_roles", lambda c: c.optim.weight_decay > 0, "optim.weight_decay above 0"),
    ("train.sdc_check_every", lambda c: c.train.deterministic, "train.deterministic=true"),
    ("train.sdc_check_every", lambda c: not c.optim.offload, "optim.offload=false"),
    ("data.text_key", lambda c: bool(c.data.path), "data.path"),
    ("data.split", lambda c: not c.data.eval, "no data.eval"),
    ("checkpoint.keep_every", lambda c: c.checkpoint.every_steps > 0, "checkpoint.every_steps above 0"),
    ("checkpoint.keep_best", lambda c: c.train.eval_every > 0, "train.eval_every above 0"),
    ("data.packing", lambda c: c.data.order == "stateless", "data.order=stateless"),
    ("data.reset_at_eod", lambda c: c.data.packing == "none", "data.packing=none, as packed documents are apart"),
    ("data.fim_rate", lambda c: c.data.packing == "none", "data.packing=none"),
    ("data.fim_spm_rate", lambda c: c.data.fim_rate > 0, "data.fim_rate above 0"),
    ("data.fim_tokens", lambda c: c.data.fim_rate > 0, "data.fim_rate above 0"),
    ("log.sample_prompt", lambda c: c.log.sample_tokens > 0, "log.sample_tokens above 0"),
)

# key -> smallest value allowed
AT_LEAST = {
    "model.vocab_size": 0, "model.vocab_multiple": 1, "model.num_layers": 1, "model.embed_dim": 1, "model.num_heads": 1,
    "model.num_kv_heads": 1, "model.head_dim": 1, "model.mlp_dim": 1, "model.max_seq_len": 1, "model.init_std": 0,
    "model.norm_eps": 0, "train.num_steps": 1, "train.batch_size": 1, "train.seq_len": 1, "train.accumulate": 1,
    "train.eval_every": 0, "train.eval_batches": 0, "train.z_loss": 0, "train.loss_chunk_tokens": 0,
    "train.max_nonfinite_steps": 1, "train.skip_spikes": 0, "train.watchdog_s": -1, "train.preempt_grace_s": 0,
    "train.sdc_check_every": 0, "optim.warmup_steps": 0, "optim.decay_steps": 0, "optim.weight_decay": 0,
    "optim.eps": 0, "optim.clip_norm": 0, "data.prefetch": 1, "checkpoint.every_steps": 0, "checkpoint.keep": 1,
    "checkpoint.keep_every": 0, "checkpoint.keep_best": 0,
    "hosts.join_s": 1, "hosts.heartbeat_s": 1, "hosts.wait_s": 1,
    "log.every_steps": 1, "log.sample_tokens": 0, "pipeline.microbatches": 0, "pipeline.repeats": 1,
}  # fmt: skip

# key -> the interval of its values: a square bracket stands where the end itself is allowed
WITHIN = {
    "optim.peak_lr": "(0, inf)", "model.rope_theta": "(1, inf)", "train.seed": f"[0, {2**63})", "model.dropout": "[0, 1)",
    "optim.beta1": "[0, 1)", "optim.beta2": "[0, 1)", "optim.final_lr_frac": "[0, 1]", "mesh.max_replicated_frac": "[0, 1]",
    "mesh.zero": "[1, 3]", "data.fim_rate": "[0, 1]", "data.fim_spm_rate": "[0, 1]",
}  # fmt: skip


def ignored(config: Config, chosen: Iterable[str]) -> list[Problem]:
    """A problem for each of `chosen` (keys someone set to another value than the default) that `config` would not use."""
    rows = ((path, need) for path, counts, need in APPLIES if path in chosen and not counts(config))
    text = "would be ignored: it needs {}"
    return [Problem(f"{path}={get(config, path)}", text.format(need), "remove it, or set that") for path, need in rows]


def check(config: Config) -> list[Problem]:
    """Every rule that spans or bounds settings, on a `derived` config: 0 only where the tokenizer decides (vocab_size)."""
    problems = []

    def rule(holds: bool, path: str, text: str, remedy: str) -> None:
        if not holds:
            problems.append(Problem(f"{path}={get(config, path)}", text, remedy))

    for path, low in AT_LEAST.items():
        value = get(config, path)
        rule(value >= low, path, f"must be at least {low}", f"use {low} or more")
    for path, interval in WITHIN.items():
        value, (low, high) = get(config, path), map(float, interval[1:-1].split(","))
        holds = low < value < high or (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
        rule(holds, path, f"must lie in {interval}", "choose a value inside")
    divisors = ("model.embed_dim=", "model.num_heads=", "model.num_kv_heads=", "train.accumulate=")
    if any(problem.where.startswith(divisors) for problem in problems):
        return problems  # the rules below divide by these
    _check_model(config, rule)
    _check_mesh(config, rule)
    _check_run(config, rule)
    _check_data(config, rule)
    return problems


def _check_model(config: Config, rule: Any) -> None:
    m = config.model
    if m.head_dim == m.embed_dim // m.num_heads:
        near = [n for n in range(1, m.embed_dim + 1) if m.embed_dim % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - m.num_heads))[:3])
        rule(m.embed_dim % m.num_heads == 0, "model.num_heads", f"does not divide model.embed_dim={m.embed_dim}",
             f"use {', '.join(map(str, near))}, or set model.head_dim")  # fmt: skip
    rule(m.num_heads % m.num_kv_heads == 0, "model.num_kv_heads", f"does not divide model.num_heads={m.num_heads}",
         f"use one of {[n for n in range(1, m.num_heads + 1) if m.num_heads % n == 0]}")  # fmt: skip
    rule(m.position != "rope" or m.head_dim % 2 == 0, "model.head_dim",
         "rotary positions turn pairs of channels: the head width must be even", "use an even model.head_dim")  # fmt: skip
    try:
        unknown = sorted(set(remat_actions(m.remat)) - set(REMAT_NAMES))
        rule(not unknown, "model.remat", f"no tensor is named {', '.join(unknown)}", f"names: {', '.join(REMAT_NAMES)}")
        rule("mlp_gate" not in remat_actions(m.remat) or m.activation == "swiglu", "model.remat",
             "mlp_gate exists only with model.activation=swiglu", "leave mlp_gate out")  # fmt: skip
    except ValueError as e:
        rule(False, "model.remat", str(e), f"use none, full, auto, or a list over {', '.join(REMAT_NAMES)}")


def _check_mesh(config: Config, rule: Any) -> None:
    degrees = config.mesh.degrees
    for axis, degree in degrees.items():
        rule(degree == -1 or degree >= 1, f"mesh.{axis}", "a degree is 1 or more, or -1 for what is left", "use 1")
    free = [axis for axis, degree in degrees.items() if degree == -1]
    rule(len(free) <= 1, f"mesh.{free[-1] if free else 'data'}", "only one axis can take what is left", "give a number")
    schedule, repeats = config.pipeline.schedule, config.pipeline.repeats
    rule(repeats > 1 if schedule == "circular" else repeats == 1 or schedule == "1f1b", "pipeline.repeats",
         f"does not fit pipeline.schedule={schedule}",
         "circular repeats 2 times or more, gpipe once, 1f1b as often as you like")  # fmt: skip


def _check_run(config: Config, rule: Any) -> None:
    m, t, o, c = config.model, config.train, config.optim, config.checkpoint
    rule(t.seq_len <= m.max_seq_len, "train.seq_len", f"is longer than model.max_seq_len={m.max_seq_len}",
         f"use {m.max_seq_len} or less, or raise model.max_seq_len")  # fmt: skip
    rule(t.batch_size % t.accumulate == 0, "train.batch_size",
         f"does not split into train.accumulate={t.accumulate} microbatches", f"use a multiple of {t.accumulate}")  # fmt: skip
    rule(o.warmup_steps < t.num_steps or o.warmup_steps == 0, "optim.warmup_steps",
         f"leaves no step of train.num_steps={t.num_steps} at the peak",
         f"use {t.num_steps // 10}, or a train.num_steps above {o.warmup_steps}")  # fmt: skip
    rule(o.schedule != "inverse_sqrt" or o.warmup_steps > 0, "optim.warmup_steps",
         "is the time scale of inverse_sqrt and must be above 0", "use for example 1000")  # fmt: skip
    rule(o.schedule != "wsd" or o.warmup_steps + o.decay_steps <= t.num_steps, "optim.decay_steps",
         f"with warmup_steps={o.warmup_steps} is longer than train.num_steps={t.num_steps}",
         f"use at most {t.num_steps - o.warmup_steps}")  # fmt: skip
    rule(c.every_steps == 0 or c.keep_every % c.every_steps == 0, "checkpoint.keep_every",
         f"is no multiple of checkpoint.every_steps={c.every_steps}: few or none of its steps are saved",
         f"use a multiple of {c.every_steps}")  # fmt: skip
    unknown = sorted(set(o.decay_roles) - {"kernel", "embedding", "scale", "bias"})
    rule(not unknown, "optim.decay_roles", f"no role {', '.join(unknown)}", "roles: kernel, embedding, scale, bias")


def _check_data(config: Config, rule: Any) -> None:
    t, d, ramp = config.train, config.data, config.train.batch_ramp
    rule(bool(d.path) != bool(d.train), "data.path",
         "exactly one of data.path (text) and data.train (tokenized sets) names the training data",
         "clear one: --config.data.path= or --config.data.train=" if d.path
         else "set --config.data.path=FILE.txt, or --config.data.train=PREFIX")  # fmt: skip
    rule(2 <= len(d.split) <= 3 and all(share >= 0 for share in d.split) and d.split[0] > 0, "data.split",
         "must be two or three shares, the first above 0: training, evaluation, kept apart",
         "use for example 0.95,0.05")  # fmt: skip
    rule(t.eval_every == 0 or bool(d.eval) or d.split[1:2] != (0,), "train.eval_every", "no text is held out",
         "raise data.split's second share, name data.eval, or set it to 0")  # fmt: skip
    grows = len(ramp) == 3 and 0 < ramp[0] <= t.batch_size and ramp[1] > 0 <= ramp[2]
    rule(not ramp or (grows and (t.batch_size - ramp[0]) % ramp[1] == 0 == t.batch_unit % t.accumulate), "train.batch_ramp",
         f"is not START,INCREMENT,SAMPLES that reaches train.batch_size={t.batch_size} in whole increments, of rows that "
         f"train.accumulate={t.accumulate} divides",
         "use for example 192,16,9765625 with train.batch_size=2048")  # fmt: skip
    try:
        steps, lengths = zip(*d.row_lengths) if d.seq_lens else ((), ())
        sound = list(steps) == sorted(set(steps)) and all(n > 0 and t.seq_len % n == 0 for n in lengths)
    except ValueError:
        sound = False
    rule(sound, "data.seq_lens", f"is not LENGTH@STEP, steps rising, lengths that divide train.seq_len={t.seq_len}",
         "use for example 256@0,1024@2000")  # fmt: skip
    rule(d.order != "megatron" or t.seed < 2**32, "train.seed",
         "data.order=megatron shuffles with numpy's RandomState, whose seeds are below 2^32",
         "use a smaller seed")  # fmt: skip
    rule(d.order != "megatron" or not any("@" in entry for entry in d.train), "data.train",
         "Megatron's mixtures keep their weights: data.order=megatron has no weights by step",
         "write one weight a set, or use data.order=stateless")  # fmt: skip
    rule(d.fim_rate == 0 or (len(set(d.fim_tokens)) == 3 and min(d.fim_tokens) >= 0), "data.fim_tokens",
         "data.fim_rate needs three ids: before prefix, middle and suffix",
         "name the tokenizer's three sentinels")  # fmt: skip
    try:
        skipped_batches(d.skip_steps)
    except ValueError as e:
        rule(False, "data.skip_steps", f"is no list of first:last: {e}", "write for example 1200:1500,2000:2010")
    unknown = [key for key in config.resume.allow if not _is_setting(config, key)]
    rule(not unknown, "resume.allow", f"no setting is called {', '.join(unknown)}", "name them as section.key")


def _is_setting(config: Config, key: str) -> bool:
    section, _, name = key.partition(".")
    return hasattr(getattr(config, section, None), name)
