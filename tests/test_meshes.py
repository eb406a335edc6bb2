"""Any mesh gives the one-device numbers: losses of five AdamW steps, and the first gradients leaf by leaf."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm.config import MeshConfig, UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import Layout
from jaxlm.step import compile_step, init_state, make_program, mean_loss_and_grads, put_batch

SHAPE = dict(num_heads=8, embed_dim=32, num_layers=2)
AXES = ("data", "fsdp", "context", "model")
# every way to lay 8 devices over the axes: each axis alone, every pair, every triple
MESHES = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(m) == 8]
# each pair of axes is above 1 together at least once, and each axis alone
COVERING = [
    (2, 2, 2, 1),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
    (2, 2, 1, 2),
    (1, 1, 8, 1),
    (1, 8, 1, 1),
    (1, 1, 1, 8),
    (8, 1, 1, 1),
]
# f32: as tests/test_step.py derives it for a gradient; five steps of AdamW move a loss by far less than that
GRADIENT, LOSS = 24 * 128**0.5 * 2**-24, 1e-5


# (how rows split over context meet, its mesh, family): positions by ALiBi and by RoPE; llama with 2 kv heads
METHODS = [
    ("ring", (1, 2, 4, 1), "bloom"),
    ("ring", (1, 1, 4, 2), "llama"),
    ("allgather", (1, 1, 4, 2), "bloom"),
    ("allgather", (2, 1, 4, 1), "llama"),
]


def config(family: str, accumulate: int, num_kv_heads: int = 8):
    kv = dict(num_kv_heads=num_kv_heads) | (dict(mlp_dim=48) if family == "llama" else {})
    return tiny.config(
        family, train=dict(accumulate=accumulate, batch_size=16), optim=dict(peak_lr=3e-3), **(SHAPE | kv)
    )


def numbers(c, layout: Layout, num_steps: int = 5):
    """(gradients at step 0, the loss there and those of five steps on five batches)."""
    program = make_program(c, layout)
    state, step = init_state(program), compile_step(program)
    batches = [put_batch(program, tiny.batch(c, seed)) for seed in range(5)]
    loss, _, grads = jax.jit(partial(mean_loss_and_grads, program))(state.params, batches[0], jnp.int32(0))
    losses = [float(loss)]
    for batch in batches[:num_steps]:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert step._cache_size() == min(num_steps, 1)
    return jax.device_get(grads), losses


@pytest.fixture(scope="session")
def one_device():
    cache = {}

    def get(*model):
        if model not in cache:
            cache[model] = numbers(config(*model[:3]), tiny.layout(), *model[3:])
        return cache[model]

    return get


def check(one_device, family, degrees: tuple[int, ...], accumulate: int, num_kv_heads=8, num_steps=5, method="auto"):
    mesh, model = (
        make_mesh(MeshConfig(**dict(zip(AXES, degrees))), jax.devices()[:8]),
        (family, accumulate, num_kv_heads),
    )
    got, losses = numbers(config(*model), Layout(mesh, context_method=method), num_steps)
    want, want_losses = one_device(*model, num_steps)
    np.testing.assert_allclose(losses, want_losses, rtol=LOSS)
    whole = np.sqrt(sum(np.square(np.float64(b)).sum() for b in jax.tree.leaves(want)))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        yardstick = whole if "key_bias" in name else np.linalg.norm(np.float64(b))  # see test_step.assert_same
        assert np.linalg.norm(np.float64(a) - b) <= GRADIENT * yardstick, name


@pytest.mark.parametrize(("degrees", "family"), list(zip(COVERING, itertools.cycle(tiny.FAMILIES))), ids=str)
def test_a_covering_set_of_meshes_gives_the_one_device_numbers(one_device, capfd, degrees, family):
    check(one_device, family, degrees, accumulate=1 if degrees[1] == 1 else 2)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(("method", "degrees", "family"), METHODS, ids=str)
def test_rows_that_meet_by_blocks_of_keys_give_the_one_device_numbers(one_device, capfd, method, degrees, family):
    kv = 2 if family == "llama" else 8
    check(one_device, family, degrees, accumulate=1, num_kv_heads=kv, num_steps=0, method=method)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_every_mesh_gives_the_one_device_numbers(one_device, capfd, degrees, family, accumulate):
    check(one_device, family, degrees, accumulate)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "model", "part"),
    [
        (dict(data=1, model=4), dict(num_heads=6), "heads"),
        (dict(data=1, context=4), dict(num_heads=6, dropout=0.1), "heads"),
        (dict(data=1, context=8), dict(max_seq_len=12, num_heads=8, embed_dim=32), "residual"),
        (dict(data=1, fsdp=5), dict(), "embed"),
        (dict(data=3, model=3), dict(), "devices"),
    ],
)
def test_what_does_not_split_is_refused_with_the_dim_and_the_axes(mesh, model, part):
    with pytest.raises(UserError, match=part):
        make_program(
            tiny.config(**model), tiny.layout(int(np.prod(list(mesh.values()))) if part != "devices" else 8, **mesh)
        )
