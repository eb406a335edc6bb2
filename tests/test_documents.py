"""Documents of one row do not see each other: a loss depends on its own document alone, on every path of attention."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm.config import DataConfig, PipelineConfig, UserError
from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.generate import generate
from jaxlm.session import kernel_facts, open_mesh
from jaxlm.step import compile_step, init_state, make_program, mean_loss_and_grads

B, T, IDS = 8, 16, 30  # documents beside the one that counts have ids below IDS, that one has the others
# f32: orders of the same sums, as tests/test_meshes.py has it for losses
LOSS = 1e-5

# (family, mesh, other settings): every way rows meet, every axis, rematerialisation, a scan, pipelines
PATHS = [
    ("gpt2", {}, {}),
    ("llama", {}, dict(scan_layers=True, remat="full")),
    ("gpt2", dict(context=2, model=2), dict(context_method="alltoall")),
    ("bloom", dict(context=4), dict(context_method="ring")),
    ("gpt2", dict(pipeline=2, model=2), {}),
    *(
        pytest.param(*case, marks=pytest.mark.nightly)
        for case in (
            ("llama", dict(context=2, fsdp=2), dict(context_method="allgather")),
            ("bloom", dict(pipeline=2, context=2), dict(context_method="ring")),
            ("llama", dict(pipeline=2, context=2), dict(context_method="alltoall")),
        )
    ),
]


def config(family: str, **model):
    shape = dict(num_layers=1, embed_dim=32, num_heads=8, tie_embeddings=False)
    kv = dict(num_kv_heads=4, mlp_dim=48) if family == "llama" else {}
    c = tiny.config(family, train=dict(batch_size=B), **(shape | kv | model))
    return tiny.replace(c, data=dict(reset_at_eod=True))


def packed() -> tuple[Batch, list[tuple[int, int, int]]]:
    """Rows of three documents, of which the middle one counts; and that one's (row, start, stop)."""
    rng, rows = np.random.default_rng(0), []
    tokens, labels = rng.integers(0, IDS, (2, B, T), dtype=np.int32)
    weights, starts = np.zeros((B, T), np.float32), np.zeros((B, T), np.int32)
    for row in range(B):
        start, stop = sorted(rng.choice(np.arange(1, T + 1), 2, replace=False).tolist())
        tokens[row, start:stop] = rng.integers(IDS, 61, stop - start)
        weights[row, start:stop] = 1
        starts[row, start:], starts[row, stop:] = start, stop
        rows.append((row, start, stop))
    return Batch(tokens, labels, weights, starts), rows


def alone() -> Batch:
    """The documents that count, each at the start of a row."""
    batch, rows = packed()
    tokens, labels, weights = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    for row, start, stop in rows:
        for mine, theirs in zip((tokens, labels, weights), batch, strict=False):
            mine[row, : stop - start] = theirs[row, start:stop]
    return Batch(tokens, labels, weights)


def loss_and_token_grads(c, layout, batch: Batch) -> tuple[float, np.ndarray]:
    """(loss, its gradient by the rows of the token table)."""
    program = make_program(c, layout)
    state = init_state(program)
    run = jax.jit(partial(mean_loss_and_grads, program))
    loss, _, grads, _ = run(state.params, put_batch(program, batch), jnp.int32(0))
    return float(loss), jax.device_get(grads["embed"]["tokens"])


@cache
def loss_alone(family: str, layers: int = 1) -> float:
    c = tiny.replace(config(family, num_layers=layers), data=dict(reset_at_eod=False))
    return loss_and_token_grads(c, tiny.layout(), alone())[0]


@pytest.mark.parametrize(("family", "mesh", "more"), PATHS, ids=str)
def test_a_loss_depends_on_its_own_document_alone(family: str, mesh: dict, more: dict) -> None:
    model, layers = {key: value for key, value in more.items() if key != "context_method"}, mesh.get("pipeline", 1)
    c = config(family, num_layers=layers, **model)
    if "pipeline" in mesh:
        c = dataclasses.replace(c, pipeline=PipelineConfig(microbatches=2))
    method = {"context_method": more["context_method"]} if "context_method" in more else {}
    layout = tiny.layout(int(np.prod([1, *mesh.values()])), **({"data": 1} | mesh), **method)
    loss, grads = loss_and_token_grads(c, layout, packed()[0])
    np.testing.assert_allclose(loss, loss_alone(family, layers), rtol=LOSS)
    assert (grads[:IDS] == 0).all()  # exactly: no other document's embeddings
    assert (np.abs(grads[np.unique(packed()[0].tokens[packed()[0].weights > 0])]).max(axis=1) > 0).all()


def test_without_it_the_document_before_is_seen() -> None:
    batch = packed()[0]._replace(starts=None)
    loss, grads = loss_and_token_grads(
        tiny.replace(config("gpt2"), data=dict(reset_at_eod=False)), tiny.layout(), batch
    )
    assert (grads[:IDS] != 0).any() and abs(loss - loss_alone("gpt2")) > 1e-3


def test_what_is_written_after_an_end_of_document_depends_on_what_follows_it_alone() -> None:
    eod, before, prompt = 60, [3, 9, 27, 4], [40, 7, 12]
    for apart in (True, False):
        program = make_program(tiny.replace(config("gpt2"), data=dict(reset_at_eod=apart)), tiny.layout())
        params = init_state(program).params
        alone, after = (
            generate(program, params, ids, max_new_tokens=6, temperature=0, eod=eod, num_ids=eod)
            for ids in (prompt, [*before, eod, *prompt])
        )
        assert (alone == after) == apart


def test_a_run_of_packed_rows_compiles_once_and_names_its_kernel() -> None:
    c = config("gpt2", dropout=0.1)
    program = make_program(c, tiny.layout(2, data=2))
    state, step = init_state(program), compile_step(program)
    for _ in range(2):
        state, metrics = step(state, put_batch(program, packed()[0]))
    assert step._cache_size() == 1 and np.isfinite(float(metrics.loss))
    assert kernel_facts(program)["attention"].startswith("xla")


@pytest.mark.parametrize("data", [dict(reset_at_eod=True), dict(packing="best_fit")])
def test_a_kernel_that_cannot_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch, data: dict) -> None:
    monkeypatch.setattr("jaxlm.parallel.rules.Layout.platform", "gpu")
    c = tiny.config(dtype="bfloat16", embed_dim=48, attention="cudnn")
    open_mesh(tiny.replace(c, mesh=dict(data=8)))
    with pytest.raises(UserError, match="mask of documents"):
        open_mesh(dataclasses.replace(tiny.replace(c, mesh=dict(data=8)), data=DataConfig(train=("none",), **data)))
