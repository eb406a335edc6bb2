"""The peer in PyTorch trains the model that jaxlm trains: the same losses from the same parameters. Needs torch (.[peer])."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from peer import job

from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.step import compile_step, init_state, make_program, num_params

pytestmark = pytest.mark.nightly
torch = pytest.importorskip("torch", reason="torch is not there: pip install -e '.[peer]'")
SCRIPTS = Path(__file__).parents[1] / "scripts"
EXACT = dict(
    train=dict(batch_size=4), optim=dict(schedule="constant"), mesh=dict(data=1), model=dict(vocab_size=64)
)  # no padded rows: the peer's softmax counts them


def as_torch(params: dict, gated: bool) -> dict:
    """Our parameters by the peer's names: products of one input are one matrix, [out, in]."""

    def flat(leaf, dims_in: int):
        leaf = np.array(leaf)
        return leaf.reshape(int(np.prod(leaf.shape[:dims_in])), -1).T

    def norm(name, own):
        return {f"{name}.weight": own["scale"]} | ({f"{name}.bias": own["bias"]} if own.get("bias") is not None else {})

    found = {"tokens.weight": params["embed"]["tokens"]} | norm("norm", params["final_norm"])
    if "positions" in params["embed"]:
        found["positions.weight"] = params["embed"]["positions"]
    if "head" in params:
        found["head.weight"] = params["head"]
    for i, layer in params["layers"].items():
        attn, mlp = layer["attn"], layer["mlp"]
        ups = ("up", "gate") if gated else ("up",)
        weights = {
            "qkv": [flat(attn[name], 1) for name in ("query", "key", "value")], "out": [flat(attn["out"], 2)],
            "up": [flat(mlp[name], 1) for name in ups], "down": [flat(mlp["down"], 1)],
        }  # fmt: skip
        biases = {
            "qkv": [attn.get(f"{name}_bias") for name in ("query", "key", "value")], "out": [attn.get("out_bias")],
            "up": [mlp.get(f"{name}_bias") for name in ups], "down": [mlp.get("down_bias")],
        }  # fmt: skip
        found |= norm(f"blocks.{i}.norm1", layer["attn_norm"]) | norm(f"blocks.{i}.norm2", layer["mlp_norm"])
        for name, parts in weights.items():
            found[f"blocks.{i}.{name}.weight"] = np.concatenate(parts)
            if biases[name][0] is not None:
                found[f"blocks.{i}.{name}.bias"] = np.concatenate([np.array(bias).ravel() for bias in biases[name]])
    return {name: torch.tensor(np.array(leaf)) for name, leaf in found.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_peer_makes_our_losses_from_our_parameters(family):
    import torch_peer

    config = tiny.replace(tiny.config(family), **EXACT)
    program = make_program(config, tiny.layout())
    state, step = init_state(program), compile_step(program)
    spec = torch_peer.Job(**job(config), steps=1, rounds=1)
    peer = torch_peer.GPT(spec)
    peer.load_state_dict(as_torch(state.params, config.model.activation == "swiglu"))
    counted = sum(p.numel() for p in peer.parameters()) - (peer.positions.weight.numel() if peer.positions else 0)
    assert counted == num_params(program, positions=False, padding=False)
    optimizer, shape = torch_peer.make_optimizer(peer, spec), (config.train.batch_size, config.train.seq_len)
    rng, ours, theirs = np.random.default_rng(0), [], []
    for _ in range(4):
        rows = rng.integers(64, size=(shape[0], shape[1] + 1), dtype=np.int32)
        batch = put_batch(program, Batch(rows[:, :-1], rows[:, 1:], np.ones(shape, np.float32), None))
        state, metrics = step(state, batch)
        ours.append(float(jax.device_get(metrics.loss)))
        tokens, labels = (torch.tensor(x.astype(np.int64)) for x in (rows[:, :-1], rows[:, 1:]))
        theirs.append(float(torch_peer.update(peer, optimizer, spec, tokens, labels)))
    assert ours[3] != pytest.approx(ours[0], rel=1e-3)  # the updates count
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_benchmark_beside_the_peer_prints_both_and_their_ratio(tmp_path):
    words = ["2,32,4,2,48,64,16", "--rows", "2", "4", "--steps", "2", "--rounds", "1", "--config", "configs/llama2.py"]
    words += [
        "--peer",
        "--peer-command",
        f"{sys.executable} {SCRIPTS}/torch_peer.py --eager --attention FLASH_ATTENTION MATH",
    ]
    env = dict(os.environ, XLA_FLAGS="", PYTHONPATH=str(SCRIPTS.parent))
    command = [sys.executable, str(SCRIPTS / "bench_step.py"), *words]
    printed = subprocess.run(command, env=env, cwd=SCRIPTS.parent, capture_output=True, text=True, timeout=300)
    assert printed.returncode == 0, printed.stderr
    *lines, ratio = map(json.loads, printed.stdout.splitlines())
    assert [(line["rows"], "peer" in line) for line in lines] == [(2, True), (4, True), (2, False), (4, False)]
    assert len({line["counted_params"] for line in lines}) == 1
    theirs, ours = ({line["rows"]: line["tokens_per_s"] for line in half} for half in (lines[:2], lines[2:]))
    assert ratio["ratio"] == pytest.approx(max(ours.values()) / max(theirs.values()))
    assert ratio["ratio_by_rows"] == {str(n): pytest.approx(ours[n] / theirs[n]) for n in (2, 4)}
