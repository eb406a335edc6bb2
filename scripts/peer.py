"""What bench_step.py tells a peer of a config, what it gets back, and how ours compares."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

from jaxlm.config import Config, Problem, UserError, get
from jaxlm.models.embed import padded_vocab

PEER = Path(__file__).with_name("torch_peer.py")
TOLD = {
    "model": "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim position rope_theta norm norm_eps "
    "activation use_bias tie_embeddings init_std dtype",
    "train": "seq_len",
    "mesh": "zero",
    "optim": "peak_lr beta1 beta2 eps weight_decay clip_norm",
}
# Values that the peer has too, of settings that it does not ask for and that change what a step computes.
KNOWN = {
    "model.position": ("learned", "rope"), "model.embed_norm": (False,), "model.dropout": (0.0,), "train.accumulate": (1,),
    "train.z_loss": (0.0,), "train.skip_spikes": (0.0,), "optim.name": ("adamw",), "optim.offload": (False,),
    "data.packing": ("none",), "data.reset_at_eod": (False,),
}  # fmt: skip


def job(config: Config) -> dict[str, Any]:
    """`config` as the fields of torch_peer.Job. Raises UserError on what the peer has not."""
    unlike = [key for key, values in KNOWN.items() if get(config, key) not in values]
    if unlike:
        problems = (
            Problem(f"{key}={get(config, key)}", "the peer has no such thing", "leave it out") for key in unlike
        )
        raise UserError(*problems)
    told = {name: getattr(getattr(config, section), name) for section, names in TOLD.items() for name in names.split()}
    degrees = dict(config.mesh.degrees)
    replicas, shards = degrees.pop("data"), max(math.prod(degrees.values()), -1)
    return told | dict(
        rows=config.train.batch_size, vocab_rows=padded_vocab(config.model), replicas=replicas, shards=shards
    )


def run_peer(command: str, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The line that `command` prints for each of the jobs, as it comes. Raises UserError where it ends before."""
    with subprocess.Popen(shlex.split(command), stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write("\n".join(map(json.dumps, jobs)))
            process.stdin.close()
            for _ in jobs:
                if not (line := process.stdout.readline()):
                    rule = f"ended with code {process.wait()} before its last line"
                    raise UserError(Problem(f"--peer-command={command}", rule, "see above; its python needs torch"))
                yield json.loads(line)
        finally:
            process.terminate()


def compared(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """Ours over theirs, of tokens/s by rows a step where these fit: each at its best, and at the same rows.

    Example: compared({8: 9.0, 16: 10.0}, {8: 5.0})["ratio"] == 2.0.
    """
    best = max(ours.values()) / max(theirs.values()) if ours and theirs else None
    at = {f"{who}rows": max(x, key=x.__getitem__, default=None) for who, x in (("", ours), ("peer_", theirs))}
    same = {rows: ours[rows] / theirs[rows] for rows in ours if rows in theirs}
    return {"ratio": best, **at, "ratio_by_rows": same}
