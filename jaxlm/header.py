"""What a run says of itself before its first step: facts for config.json, the header, and layout.txt."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.files import write_whole
from jaxlm.metrics.throughput import flops_per_token
from jaxlm.parallel.describe import Parameter, bytes_a_device, collectives_table, communication_summary, parameter_table
from jaxlm.parallel.hlo import Collective
from jaxlm.session import kernel_facts
from jaxlm.settings import Resolved, to_json
from jaxlm.step import Program, abstract_state, num_params, step_options

LAYOUT_FILE = "layout.txt"


def describe(program: Program, corpus: Corpus, memory_bytes: int | None) -> dict[str, Any]:
    """Facts of this run for config.json, the header and the report."""
    config, device = program.config, jax.devices()[0]
    model, train = config.model, config.train
    shape: dict[str, Any] = dict(
        num_nonpositional_params=num_params(program, positions=False), num_layers=model.num_layers,
        num_heads=model.num_heads, head_dim=model.head_dim, seq_len=train.seq_len,
    )  # fmt: skip
    step_tokens = train.batch_size * train.seq_len
    return {
        "parameters": num_params(program, padding=False),
        "parameters_padded": num_params(program),
        **kernel_facts(program),
        **({"pipeline": str(program.pipe)} if program.pipe else {}),
        "devices": jax.device_count(),
        "device_kind": device.device_kind,
        "mesh": {axis: size for axis, size in program.layout.mesh.shape.items() if size > 1},
        "jax": jax.__version__,
        "versions": versions(),
        "data": corpus.fingerprints,
        "tokens_per_step": step_tokens,
        "training_tokens": corpus.num_tokens,
        "epochs": round(train.num_steps * step_tokens / max(corpus.num_tokens, 1), 3),
        "memory_bytes_per_device": memory_bytes,
        "flops_per_token": flops_per_token(**shape),
        "flops_per_token_causal": flops_per_token(**shape, causal=True),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers, and of jaxlm's own source where it is a git checkout."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"jaxlm": jaxlm.__version__} | {name: importlib.metadata.version(name) for name in packages}
    root = Path(jaxlm.__file__).parents[1]
    if (root / ".git").exists():
        ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            revision = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            found["jaxlm"] += f" {revision}"
    return found


def provenance(config: Config, facts: dict) -> dict[str, Any]:
    """What a checkpoint says of where it comes from. Batches and random numbers after step k follow from settings and k."""
    devices = f"{facts['devices']} x {facts['device_kind']}"
    kept = {key: facts[key] for key in ("mesh", "versions", "data", "remat") if key in facts}
    return kept | {"config": dataclasses.asdict(config), "devices": devices}


def header(
    program: Program, facts: dict, workdir: Path, found: list[Collective], *, start: int, compile_s: float
) -> str:
    """What a run says of itself before its first step. found: the collectives of a step."""
    m, t = program.config.model, program.config.train
    mesh = " x ".join(f"{axis}={n}" for axis, n in facts["mesh"].items()) or "one device"
    memory, options = facts["memory_bytes_per_device"], step_options(program)
    traffic = f"; {communication_summary(found)}" if program.layout.mesh.size > 1 else ""
    lines = (
        ("run", f"{workdir}  " + (f"resumes after step {start}" if start else "starts at step 0")),
        ("devices", f"{facts['devices']} x {facts['device_kind']}, {mesh}, jax {facts['jax']}"),
        ("model", f"{m.num_layers} layers, width {m.embed_dim}, {m.num_heads} heads of {m.head_dim}, {m.dtype}"),
        ("", f"{m.position} positions, {m.norm}, {m.activation}" + (f", dropout {m.dropout}" if m.dropout else "")),
        ("parameters", f"{facts['parameters']:,} ({facts['parameters_padded']:,} with the vocabulary padded)"),
        *((name, facts[name]) for name in ("attention", "norm", "activation", "loss", "context") if name in facts),
        *((("pipeline", facts["pipeline"]),) if "pipeline" in facts else ()),
        *((("remat", facts["remat_choice"]),) if "remat_choice" in facts else ()),
        ("a step", f"{t.batch_size} rows x {t.seq_len} = {facts['tokens_per_step']:,} tokens, {t.accumulate} microbatch(es)"),
        ("data", f"{facts['training_tokens']:,} training tokens; {t.num_steps} steps are {facts['epochs']:g} epochs"),
        ("memory", f"{memory / 2**30:.2f} GiB a device by the compiler's count" if memory else "not known here"),
        ("layout", LAYOUT_FILE + traffic),
        *((("numbers", "the same bits in every run"),) if t.deterministic else ()),
        *((("xla", ", ".join(f"{name}={value}" for name, value in options.items())),) if options else ()),
        ("compiled", f"in {compile_s:.1f} s"),
    )  # fmt: skip
    return "\n".join(f"{name:<11}{text}" for name, text in lines)


def layout_text(program: Program, found: list[Collective]) -> str:
    """layout.txt: the collectives of a step, where there is more than one device, and how each parameter lies."""
    state, layout = abstract_state(program), program.layout
    dims = jax.tree.leaves(program.dims, is_leaf=lambda x: isinstance(x, tuple))
    parameters = [
        Parameter(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, leaf_dims, leaf.dtype)
        for (path, leaf), leaf_dims in zip(jax.tree.leaves_with_path(state.params), dims, strict=True)
    ]
    table = parameter_table(parameters, layout, optimizer_bytes=bytes_a_device(state.opt_state))
    notes = ["its moments rest in the host's memory"] if program.config.optim.offload else []
    if program.pipe is not None:
        notes.append("layers.N is slot N of every stage: [stages, repeats, ...]; " + str(program.pipe))
        if not program.pipe.stages.is_even:
            notes.append("shorter stages keep empty slots, counted above")
    sent = f"{collectives_table(found)}\n\n" if layout.mesh.size > 1 else ""
    return sent + "\n".join((table, *notes)) + "\n"


def write_down(workdir: Path, resolved: Resolved, program: Program, found: list[Collective], facts: dict) -> None:
    """config.json and layout.txt: what this start trains with."""
    write_whole(workdir / "config.json", to_json(resolved, facts).encode())
    write_whole(workdir / LAYOUT_FILE, layout_text(program, found).encode())
