"""Any mesh gives the one-device numbers: losses of five AdamW steps, and the first gradients leaf by leaf."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm import step as step_module
from jaxlm.config import UserError
from jaxlm.feed import put_batch
from jaxlm.models import loss
from jaxlm.parallel import dense
from jaxlm.parallel.rules import Layout, with_rows
from jaxlm.parallel.working import cast
from jaxlm.step import compile_step, init_state, make_program, mean_loss_and_grads

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


# (how rows split over context meet, its mesh, family): positions by ALiBi and by RoPE; llama with 2 kv heads and biases
METHODS = [
    ("ring", (1, 2, 4, 1), "bloom"),
    ("ring", (1, 1, 4, 2), "llama"),
    ("allgather", (1, 1, 4, 2), "bloom"),
    ("allgather", (2, 2, 2, 1), "llama"),
]


@pytest.fixture
def compiled_here():
    """No cache of compiled programs: what the partitioner says, it says while it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def config(family: str, accumulate: int, **model):
    kv = dict(num_kv_heads=8) if family != "llama" else dict(num_kv_heads=8, mlp_dim=48)
    train = dict(accumulate=accumulate, batch_size=16)
    return tiny.config(family, train=train, optim=dict(peak_lr=3e-3), **(SHAPE | kv | model))


def numbers(c, layout: Layout, num_steps: int = 5, *, drawn: bool = False):
    """(gradients at step 0, the loss there and those of five steps on five batches). drawn: from biases other than zero."""
    program = make_program(c, layout)
    state, step = init_state(program), compile_step(program)
    if drawn:
        draw = np.random.default_rng(0).standard_normal
        params = jax.tree.map(
            lambda role, x: jax.device_put(0.3 * draw(x.shape, "float32"), x.sharding) if role == "bias" else x,
            program.roles, state.params,
        )  # fmt: skip
        state = dataclasses.replace(state, params=params)
    batches = [put_batch(program, tiny.batch(c, seed)) for seed in range(5)]
    loss, _, grads, norm = jax.jit(partial(mean_loss_and_grads, program))(state.params, batches[0], jnp.int32(0))
    grads, losses = jax.device_get(grads), [float(loss)]
    squares = sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(grads))
    assert float(norm) == pytest.approx(np.sqrt(squares), rel=1e-5)
    for batch in batches[:num_steps]:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert step._cache_size() == min(num_steps, 1)
    return grads, losses


@pytest.fixture(scope="session")
def one_device():
    cache = {}

    def get(family: str, accumulate: int, num_steps: int = 5, *, drawn: bool = False, **model):
        case = (family, accumulate, num_steps, drawn, *model.items())
        if case not in cache:
            cache[case] = numbers(config(family, accumulate, **model), tiny.layout(), num_steps, drawn=drawn)
        return cache[case]

    return get


def check(
    one_device,
    family: str,
    degrees: tuple[int, ...],
    accumulate: int,
    *,
    num_steps: int = 5,
    drawn: bool = False,
    model: dict | None = None,
    **mesh,
):
    model, layout = model or {}, tiny.layout(8, **dict(zip(AXES, degrees)), **mesh)
    got, losses = numbers(config(family, accumulate, **model), layout, num_steps, drawn=drawn)
    want, want_losses = one_device(family, accumulate, num_steps, drawn=drawn, **model)
    np.testing.assert_allclose(losses, want_losses, rtol=LOSS)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.float64(a) - b) <= GRADIENT * np.linalg.norm(np.float64(b)), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("degrees", "family"), list(zip(COVERING, itertools.cycle(tiny.FAMILIES))), ids=str)
def test_a_covering_set_of_meshes_gives_the_one_device_numbers(one_device, compiled_here, capfd, degrees, family):
    check(one_device, family, degrees, accumulate=1 if degrees[1] == 1 else 2)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("family", "degrees", "mesh"),
    [
        ("gpt2", (1, 8, 1, 1), dict(zero=1)),
        ("llama", (2, 2, 1, 2), dict(zero=2)),
        pytest.param("bloom", (2, 4, 1, 1), dict(rules=("embed=/data+fsdp",)), marks=pytest.mark.nightly),  # one group
        ("bloom", (1, 2, 1, 4), dict(rules=("residual=context/context",))),  # tensor parallel, positions whole
    ],
    ids=str,
)
def test_what_rests_where_changes_no_number(one_device, family, degrees, mesh):
    check(one_device, family, degrees, accumulate=2, **mesh)


@pytest.mark.parametrize(("method", "degrees", "family"), METHODS, ids=str)
def test_rows_that_meet_by_blocks_of_keys_give_one_device_numbers(
    one_device, compiled_here, capfd, method, degrees, family
):
    model = dict(num_kv_heads=2, use_bias=True) if family == "llama" else {}
    check(one_device, family, degrees, accumulate=1, num_steps=0, drawn=True, model=model, context_method=method)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_every_mesh_gives_the_one_device_numbers(one_device, compiled_here, capfd, degrees, family, accumulate):
    check(one_device, family, degrees, accumulate)
    if accumulate == 1:
        check_bfloat16(one_device, family, degrees)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def check_bfloat16(one_device, family: str, degrees: tuple[int, ...]):
    """A mesh adds the same products in another order and rounds to bfloat16 at other places: one more draw of the error
    that bfloat16 makes on one device, where its size e is the distance from float32's gradients. Two draws differ by
    about sqrt(2) e; twice e is allowed. A loss is a mean of logits rounded to 2^-9 of themselves."""
    got, losses = numbers(config(family, 1, dtype="bfloat16"), tiny.layout(8, **dict(zip(AXES, degrees))))
    want, want_losses = one_device(family, 1, dtype="bfloat16")
    exact = one_device(family, 1)[0]
    np.testing.assert_allclose(losses, want_losses, rtol=2**-9)
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), jax.tree.leaves(exact), strict=True
    ):
        assert np.linalg.norm(np.float64(a) - b) <= 2 * np.linalg.norm(np.float64(b) - c), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("degrees", "family"),
    [((2, 1, 2, 2), "gpt2"), pytest.param((1, 8, 1, 1), "llama", marks=pytest.mark.nightly)],
    ids=str,
)
def test_bfloat16_differs_over_a_mesh_by_its_own_rounding_alone(one_device, degrees, family):
    check_bfloat16(one_device, family, degrees)


MUTATIONS = {  # what a broken collective or a wrong row would do: numbers that are wrong without an error
    "gradients not summed over data": (step_module, "finish_gradients", lambda real: lambda layout, *args: real(
        dataclasses.replace(layout, rules=with_rows(["batch=fsdp/fsdp"], layout.rules)), *args)),
    "tensor-parallel partial sums not added": (dense, "scatter_positions", lambda real: lambda layout, x, over: (
        jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * (x.shape[1] // 2), x.shape[1] // 2, 1))),
    "loss not summed over positions": (jax.lax, "psum", lambda real: lambda x, axes: (
        x if isinstance(x, tuple) else real(x, axes))),
    "softmax over this device's vocabulary alone": (jax.lax, "all_gather", lambda real: lambda x, axes, **how: (
        jnp.stack([x, x], 1) if how == dict(axis=1) else real(x, axes, **how))),
    "tokens of another vocabulary shard looked up here": (dense, "_local_rows", lambda real: lambda *args: (
        real(*args)[0], jnp.ones_like(real(*args)[1]))),
    "a weight gathered in the wrong order": (dense, "gather_weight", lambda real: lambda layout, w, dims, dtype: (
        jnp.roll(real(layout, w, dims, dtype), cast(w, dtype).shape[dims.index("embed")], dims.index("embed")))),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_parity_check_sees_a_broken_collective(one_device, monkeypatch, mutation):
    one_device("gpt2", 1)  # made whole before anything is broken
    room, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(room, name, mutate(getattr(room, name)))
    if name in ("scatter_positions", "gather_weight"):
        monkeypatch.setattr(loss, name, getattr(room, name))
    with pytest.raises(AssertionError):
        check(one_device, "gpt2", (2, 2, 1, 2), accumulate=1)


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
