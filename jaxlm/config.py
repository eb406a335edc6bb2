"""Every setting of a run: frozen dataclasses with a line of documentation each.

Imports nothing of jaxlm. `jaxlm.settings` builds a `Config` from a file and the command line, `jaxlm.checks` holds it to its
rules; every other room receives the section it uses and reads attributes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with its default and the one line of `--help`, which says what a special 0 stands for."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ModelConfig:
    preset: str | None = setting(None, "published size to start from, e.g. gpt2-124m (jaxlm/models/presets.py)")
    vocab_size: int = setting(0, "token ids the model knows (0: the tokenizer's)")
    vocab_multiple: int = setting(128, "the embedding's rows are padded to a multiple of this, their logits masked")
    num_layers: int = setting(12, "transformer blocks")
    embed_dim: int = setting(768, "model width")
    num_heads: int = setting(12, "query heads")
    num_kv_heads: int = setting(0, "key and value heads, a divisor of num_heads (0: num_heads)")
    head_dim: int = setting(0, "width of one head (0: embed_dim / num_heads)")
    mlp_dim: int = setting(0, "hidden width of the MLP (0: 4 * embed_dim)")
    max_seq_len: int = setting(1024, "longest sequence the model is built for; rows of the learned position table")
    position: Literal["learned", "alibi", "rope"] = setting("learned", "how positions enter")
    rope_theta: float = setting(10000.0, "base of the rotary wavelengths (position=rope)")
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation before each branch and before the head")
    norm_eps: float = setting(1e-5, "added to the variance in every norm")
    embed_norm: bool = setting(False, "LayerNorm on the embedding's output, as BLOOM has")
    activation: Literal["gelu", "swiglu"] = setting("gelu", "MLP: tanh-approximated GELU, or SiLU-gated")
    use_bias: bool = setting(True, "bias vectors in attention and MLP")
    tie_embeddings: bool = setting(True, "the head is the token embedding")
    dropout: float = setting(0.0, "probability of zeroing: embeddings, attention weights, both branches' outputs")
    init_std: float = setting(0.02, "standard deviation of initial weights; into the residual, over sqrt(2*layers)")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of computation; parameters and optimizer stay float32")
    attention: Literal["auto", "xla", "cudnn"] = setting("auto", "attention kernel; auto logs what it took and why")
    activation_kernel: Literal["auto", "xla", "pallas", "hopper"] = setting(
        "auto",
        "what the activation's backward runs on; pallas sums for biases in its pass, hopper in the product before it",
    )
    norm_kernel: Literal["auto", "xla", "pallas"] = setting(
        "auto", "norm kernel; pallas adds a branch and normalises in one pass; auto logs what it took and why"
    )
    loss_kernel: Literal["auto", "xla", "pallas"] = setting(
        "auto", "cross entropy's kernel; pallas reads logits once; auto logs what it took and why"
    )
    scan_layers: bool = setting(False, "a compiled block looped over layers: compiles faster, 10-30 % slower on a GPU")
    remat: str = setting(
        "none",
        "none | full | name=keep,name=offload,...: what backward reuses, unnamed is recomputed; auto: the fastest that fits",
    )


# Mesh axes, slow links outermost, fast links innermost. Experts, when they come, are one more axis, between fsdp and context.
MESH_AXES = ("pipeline", "data", "fsdp", "context", "model")


@dataclass(frozen=True)
class MeshConfig:
    pipeline: int = setting(1, "groups of layers")
    data: int = setting(-1, "replicas of the parameters, each with its own rows (-1: all devices that are left)")
    fsdp: int = setting(1, "parameters and optimizer state split this way; rows too")
    context: int = setting(1, "positions of one sequence")
    model: int = setting(1, "heads, MLP width and vocabulary")
    zero: int = setting(3, "what fsdp splits at rest: 1 the optimizer's state, 2 gradients too, 3 parameters too")
    rules: tuple[str, ...] = setting(
        (), "rows of the sharding table to replace: dim=axes/axes, computing and at rest, as in embed=/data+fsdp"
    )
    max_replicated_frac: float = setting(0.02, "largest share of parameter bytes that fsdp or model may leave unsplit")
    context_method: Literal["auto", "alltoall", "allgather", "ring"] = setting(
        "auto", "how rows split over context meet: trading positions for heads, all keys at once, or keys round a ring"
    )

    @property
    def degrees(self) -> dict[str, int]:
        """The degree of each axis, slow links outermost."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclass(frozen=True)
class PipelineConfig:
    schedule: Literal["gpipe", "circular", "1f1b"] = setting(
        "1f1b", "order of work; 1f1b keeps the activations of a few microbatches, the others of all"
    )
    microbatches: int = setting(0, "pieces of a batch that follow one another through the stages (0: 4 a stage)")
    repeats: int = setting(1, "times each microbatch passes every stage: more make a smaller bubble and more sends")
    in_place: bool = setting(False, "with 1f1b: activations stay where they are made, uncopied; compiles twice as long")
    stage_layers: tuple[int, ...] = setting((), "layers of each stage, in order (none: as even as can be)")

    def pieces(self, stages: int) -> int:
        """Microbatches that follow one another through `stages` stages."""
        return self.microbatches or 4 * stages


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int = setting(1000, "optimizer steps in the whole run")
    batch_size: int = setting(8, "rows in one step, over all devices")
    batch_ramp: tuple[int, ...] = setting(
        (), "START,INCREMENT,SAMPLES: batches grow from START to batch_size while SAMPLES rows pass (none: no ramp)"
    )
    seq_len: int = setting(0, "tokens in a row (0: model.max_seq_len)")
    accumulate: int = setting(1, "microbatches in one step")
    seed: int = setting(0, "of initial weights, data order and dropout")
    eval_every: int = setting(0, "steps between evaluations; the last step always evaluates (0: only then)")
    eval_batches: int = setting(0, "batches in one evaluation (0: all held-out rows once)")
    z_loss: float = setting(0.0, "weight of the mean squared log-normaliser, in nats")
    loss_chunk_tokens: int = setting(0, "tokens whose logits exist at one time on a device (0: the kernel's choice)")
    max_nonfinite_steps: int = setting(
        5,
        "updates dropped in a row, for a loss or gradient that is not finite or a spike, that end the run with exit 4",
    )
    skip_spikes: float = setting(
        0.0, "an update is dropped if its loss or gradient norm is this many deviations above the last 128 (0: never)"
    )
    watchdog_s: float = setting(
        -1.0, "seconds without a step that end the run with stacks and exit 124 (-1: 300 or 20 median steps; 0: never)"
    )
    preempt_grace_s: float = setting(300.0, "seconds that saving and leaving may take after SIGTERM (0: any)")
    deterministic: bool = setting(False, "the same bits on a GPU in every run: deterministic kernels, no autotuning")
    sdc_check_every: int = setting(
        0, "steps between computing one twice and comparing replicas bit by bit; needs room for two states (0: never)"
    )
    compilation_cache: str = setting("", "folder for compiled programs, reused by later runs (empty: none)")

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows `step`."""
        return step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)

    @property
    def batch_unit(self) -> int:
        """What every batch size of the run is a multiple of."""
        return math.gcd(self.batch_size, *self.batch_ramp[:2])


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adafactor", "lion", "muon"] = setting("adamw", "optimizer")
    peak_lr: float = setting(3e-4, "learning rate after warm-up")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = setting("cosine", "after warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up from 0 (inverse_sqrt: also its time scale)")
    final_lr_frac: float = setting(0.1, "last learning rate over peak_lr (cosine, linear, wsd)")
    decay_steps: int = setting(0, "wsd: steps of the final linear decay (0: a fifth of num_steps)")
    weight_decay: float = setting(0.1, "decoupled weight decay, times the learning rate")
    decay_roles: tuple[str, ...] = setting(("kernel", "embedding"), "roles that decay: kernel, embedding, scale, bias")
    beta1: float = setting(0.9, "decay of the first moment (adamw, lion, muon's momentum)")
    beta2: float = setting(0.95, "decay of the second moment (adamw, lion)")
    eps: float = setting(1e-8, "added to the root of the second moment (adamw)")
    clip_norm: float = setting(1.0, "largest global gradient norm (0: no clipping)")
    offload: bool = setting(False, "the optimizer's moments rest in the host's memory and visit the device for updates")


@dataclass(frozen=True)
class DataConfig:
    path: tuple[str, ...] = setting((), "text to train on: .txt, .py, .jsonl[.gz|.zst], globs; tokenized on first use")
    train: tuple[str, ...] = setting(
        (),
        "tokenized sets to train on, not path: PREFIX (also gs://, s3://), with shares 0.7:PREFIX, by step 0.7/0.2@1000:PREFIX",
    )
    eval: tuple[str, ...] = setting((), "tokenized sets to evaluate on, PREFIX or NAME=PREFIX (none: cut by split)")
    split: tuple[float, ...] = setting(
        (0.95, 0.05),
        "shares, in file order, for training and evaluation: of tokens, or with whole documents of documents",
    )
    order: Literal["stateless", "megatron"] = setting(
        "stateless",
        "how rows are shuffled: any row in O(1) with nothing to build, or Megatron's GPTDataset row for row",
    )
    packing: Literal["none", "best_fit"] = setting(
        "none", "rows cut from documents end to end, or filled with whole documents, longest first"
    )
    reset_at_eod: bool = setting(False, "positions begin anew after the end-of-document token; attention stays inside")
    seq_lens: tuple[str, ...] = setting(
        (), "shorter rows in some steps, LENGTH@STEP from which step on: 256@0,1024@2000 (a step keeps its tokens)"
    )
    fim_rate: float = setting(0.0, "share of documents rewritten to fill in their middle")
    fim_spm_rate: float = setting(0.5, "of those, share whose suffix comes first")
    fim_tokens: tuple[int, ...] = setting((), "ids that stand before prefix, middle and suffix")
    tokenizer: str = setting("bytes", "bytes | chars | gpt2:DIR | hf:FILE.json | tiktoken:NAME | sentencepiece:FILE")
    text_key: str = setting("text", "field of a JSONL object that holds the text")
    mask_eod_loss: bool = setting(False, "positions whose input is the end-of-document token count no loss")
    skip_steps: tuple[str, ...] = setting(
        (), "batches never read, as first:last, numbered by the steps that would read them; later ones move up"
    )
    prefetch: int = setting(2, "batches prepared ahead of the step")

    @property
    def row_lengths(self) -> tuple[tuple[int, int], ...]:
        """seq_lens as (step, length). Raises ValueError where an entry is not LENGTH@STEP."""
        pairs = (entry.split("@") for entry in self.seq_lens)
        return tuple((int(step), int(length)) for length, step in pairs)

    @property
    def separates(self) -> bool:
        """Whether attention stays inside documents."""
        return self.reset_at_eod or self.packing != "none"


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = setting(500, "steps between saves; the last step always saves (0: only then)")
    keep: int = setting(3, "newest checkpoints kept")
    keep_every: int = setting(0, "checkpoints of steps divisible by this are kept for ever (0: none)")
    keep_best: int = setting(0, "checkpoints with the lowest evaluation loss kept (0: none)")


@dataclass(frozen=True)
class ResumeConfig:
    allow: tuple[str, ...] = setting((), "settings that may differ from those the checkpoints were made with")


@dataclass(frozen=True)
class HostsConfig:
    join_s: float = setting(300.0, "seconds until all processes of a run must be there")
    heartbeat_s: float = setting(60.0, "seconds of silence after which a process is gone, and all the others leave")
    wait_s: float = setting(1800.0, "seconds that processes wait for one another to open, restore and finish a run")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = setting(1, "steps between progress and metrics lines")
    tensorboard: bool = setting(True, "write TensorBoard events to WORKDIR/tensorboard")
    sample_prompt: str = setting("", "start of the sample that ends a run (empty: the end-of-document token)")
    sample_tokens: int = setting(200, "length of that sample (0: none)")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    hosts: HostsConfig = HostsConfig()
    log: LogConfig = LogConfig()


class Exit(IntEnum):
    """Exit codes of every command: 0 done, 1 an error that nobody foresaw, and these."""

    SETUP = 2  # settings or environment, for the user to mend
    UNUSABLE = 3  # no usable checkpoint, lock or peers; or the last save failed
    DIVERGED = 4
    PREEMPTED = 75  # saved: start me again
    WATCHDOG = 124
    INTERRUPTED = 130  # saved, but for a second Ctrl-C


@dataclass(frozen=True)
class Problem:
    """One thing for the user to mend: where it is, which rule it breaks, what to do."""

    where: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}\n  {self.rule}\n  {self.remedy}"


class UserError(ValueError):
    """Something the user can mend; printed as three lines a problem, without a traceback."""

    def __init__(self, *problems: Problem, exit_code: int = Exit.SETUP):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems
        self.exit_code = exit_code


# Tensors a block names for rematerialisation, in the order it makes them. models/ emits exactly these (tests hold it).
REMAT_NAMES = {
    "attn_norm": "normalised input of attention",
    "query": "queries, after rotary positions",
    "key": "keys, after rotary positions",
    "value": "values",
    "attn_context": "attention's output before its projection, with its log-normaliser: no forward kernel runs again",
    "attn_residual": "the residual with attention's branch added",
    "mlp_norm": "normalised input of the MLP",
    "mlp_up": "MLP before its activation",
    "mlp_gate": "gate of a SwiGLU before its activation",
    "mlp_act": "MLP after its activation",
}


def remat_actions(remat: str) -> dict[str, str]:
    """`name=keep,name=offload` as a dictionary; empty for none, full and auto. Raises ValueError on anything else."""
    if remat in ("none", "full", "auto"):
        return {}
    actions = {}
    for part in remat.split(","):
        name, _, action = part.strip().partition("=")
        if action not in ("keep", "offload", "recompute"):
            raise ValueError(f"{part.strip()!r} is not name=keep, name=offload or name=recompute")
        actions[name] = action
    return actions


def skipped_batches(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    """data.skip_steps as sorted, disjoint [start, stop) of batches, which count from 0. Raises ValueError on anything else.

    Example: skipped_batches(("5:8", "1:1", "7:9")) == [(0, 1), (4, 9)].
    """
    ranges: list[tuple[int, int]] = []
    for first, last in sorted(tuple(map(int, text.split(":", 1))) for text in texts):
        if not 1 <= first <= last:
            raise ValueError(f"{first}:{last} must be first:last with 1 <= first <= last")
        if ranges and first - 1 <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last))
        else:
            ranges.append((first - 1, last))
    return ranges


def derived(config: Config) -> Config:
    """`config` with every 0 that stands for a rule replaced: kv heads, head width, MLP width, row length, WSD's decay."""
    m, t, o = config.model, config.train, config.optim
    model = dataclasses.replace(
        m,
        num_kv_heads=m.num_kv_heads or m.num_heads,
        head_dim=m.head_dim or m.embed_dim // max(m.num_heads, 1),
        mlp_dim=m.mlp_dim or 4 * m.embed_dim,
    )
    train = dataclasses.replace(t, seq_len=t.seq_len or m.max_seq_len)
    decay = o.decay_steps or (max(t.num_steps // 5, 1) if o.schedule == "wsd" else 0)
    return dataclasses.replace(config, model=model, train=train, optim=dataclasses.replace(o, decay_steps=decay))


def get(config: Config, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)
