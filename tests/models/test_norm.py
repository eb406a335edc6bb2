"""The norm that adds a branch in its own pass is the sum, the norm and their derivative: alone, on a mesh, in a model."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_meshes
import test_pipeline
import test_step
import tiny
from jax.extend.core import jaxprs_in_params

from jaxlm.config import UserError
from jaxlm.models import norm_kernel
from jaxlm.models.gpt import GPT
from jaxlm.models.norm import NORM, Settings, Stream, choose_norm
from jaxlm.parallel.dense import RESIDUAL
from jaxlm.parallel.gradients import finish_gradients

PALLAS, XLA = (next(kernel for kernel in NORM if kernel.name == name) for name in ("pallas", "xla"))
one_device = test_pipeline.one_device

# Relative L2 distance allowed between two orders of the same f32 sums: mean, variance, two sums of a row's gradient and one
# over rows follow one another, of at most 60 terms each; errors of 2^-24 add as sqrt(60) in a sum and linearly along the chain.
REORDERED = 5 * 60**0.5 * 2**-24  # 2.3e-6


def operands(shape, *, adds: bool, y_bias: bool, bias: bool, dtype="float32"):
    """(stream, scale, bias) and the gradients of the stream's sum and of its norm. Rows have a mean of their own."""
    draw = np.random.default_rng(sum(shape)).standard_normal
    x, y, ds, dnormed = (jnp.asarray(draw(shape) + draw((*shape[:-1], 1)), dtype) for _ in range(4))
    scale, b, yb = (jnp.asarray(draw(shape[-1:]), "float32") for _ in range(3))
    stream = Stream(x, y if adds else None, yb if y_bias else None)
    return (stream, scale, b if bias else None), (ds, dnormed)


@partial(jax.jit, static_argnums=(0, 1))
def run(kernel, at, args, cotangents):
    out, back = jax.vjp(lambda *args: kernel.run(*args, at), *args)
    return out, back(cotangents)


def near(got, want, bound):
    pairs = list(zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True))
    for (path, a), b in pairs:
        assert a.shape == b.shape, path
        assert np.linalg.norm(np.float64(a) - np.float64(b)) <= bound * np.linalg.norm(np.float64(b)), path


CASES = [  # rows and widths that no block divides, and such that are a power of two; the last in 3 programs of 10 blocks
    ("layernorm", (2, 7, 24), dict(adds=True, y_bias=True, bias=True)),
    ("layernorm", (1, 8, 32), dict(adds=False, y_bias=False, bias=False)),
    pytest.param("rmsnorm", (3, 5, 40), dict(adds=True, y_bias=False, bias=False), marks=pytest.mark.nightly),
    ("rmsnorm", (1, 59, 8), dict(adds=True, y_bias=True, bias=False)),
]


@pytest.mark.parametrize(("kind", "shape", "parts"), CASES, ids=str)
def test_one_pass_is_the_sum_the_norm_and_their_derivative(monkeypatch, kind, shape, parts):
    monkeypatch.setattr(norm_kernel, "WARPS", 12)  # three programs
    at = Settings(True, kind, 1e-5, parts["adds"])
    args, cotangents = operands(shape, **parts)
    near(run(PALLAS, at, args, cotangents), run(XLA, at, args, cotangents), REORDERED)


def test_bfloat16_is_rounded_once_where_it_is_written():
    at = Settings(True, "layernorm", 1e-5, True)
    args, cotangents = operands((2, 7, 24), adds=True, y_bias=True, bias=True, dtype="bfloat16")
    (s, normed), grads = run(PALLAS, at, args, cotangents)
    (stream, scale, bias), cotangents = jax.tree.map(lambda a: a.astype("float32"), (args, cotangents))
    exact = stream.sum
    np.testing.assert_array_equal(s, exact.astype("bfloat16"))
    # from the rounded sum on, everything is float32 up to the one rounding of what is written, 2^-9
    args = (Stream(s.astype("float32")), scale, bias)
    (_, want), (dstream, *dvectors) = run(XLA, Settings(True, "layernorm", 1e-5, False), args, cotangents)
    near((normed, grads[0].x_BTD, grads[0].y_BTD), (want, dstream.x_BTD, dstream.x_BTD), 2**-9)
    near((grads[0].bias_D, *grads[1:]), (dstream.x_BTD.sum((0, 1)), *dvectors), REORDERED)
    assert {a.dtype.name for a in (s, normed, grads[0].x_BTD)} == {"bfloat16"} and grads[1].dtype == "float32"


MESH = dict(data=2, fsdp=2, model=2)  # rows over four devices, positions over two


def test_on_a_mesh_each_row_counts_once():
    (stream, *vectors), cotangents = operands((4, 4, 24), adds=True, y_bias=True, bias=True)
    at, layout = Settings(True, "layernorm", 1e-5, True), tiny.layout(8, **MESH)

    def local(stream, vectors, cotangents):
        out, (dstream, *dvectors) = run(PALLAS, at, (stream, *vectors), cotangents)
        bias, *dvectors = finish_gradients(layout, [("channel",)] * 3, [dstream.bias_D, *dvectors])
        return out, (dstream._replace(bias_D=bias), *dvectors)

    x, one = layout.spec(RESIDUAL), jax.P()
    streams = Stream(x, x, one)
    on_mesh = layout.on_mesh(local, (streams, [one, one], (x, x)), ((x, x), (streams, one, one)))
    want = run(XLA, at, (stream, *vectors), cotangents)
    near(jax.jit(on_mesh)(stream, vectors, cotangents), want, REORDERED)


def additions(jaxpr, shape) -> int:
    """How often arrays of `shape` in bfloat16 are added to one another outside of a kernel."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "pallas_call":
            found += sum(additions(part, shape) for part in jaxprs_in_params(eqn.params))
        found += eqn.primitive.name == "add" and all(
            (v.aval.shape, v.aval.dtype) == (shape, jnp.bfloat16) for v in eqn.invars
        )
    return found


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        ({}, 0),
        (dict(norm_kernel="xla"), 6),
        (dict(dropout=0.1), 0),
        (dict(remat="full"), 6),
        (dict(scan_layers=True), 2),
    ],
    ids=str,
)
def test_the_residual_is_added_in_the_norms_pass_unless_the_sum_is_kept_or_carried(setting, left):
    model = tiny.config(**(dict(dtype="bfloat16", norm_kernel="pallas") | setting)).model
    key = jax.random.key(0)
    drops = key if model.dropout else None
    traced = jax.make_jaxpr(lambda tokens: GPT(model, key, tiny.layout()).hidden(tokens, drops))(np.zeros((2, 16), int))
    assert additions(traced.jaxpr, (2, 16, model.embed_dim)) == left


def test_a_kernel_is_chosen_or_refused_with_its_reason():
    model = tiny.config().model
    named = dataclasses.replace(model, norm_kernel="pallas")
    assert str(choose_norm(model, tiny.layout())).startswith("xla (not pallas: it is for NVIDIA GPUs; a cpu runs it")
    assert str(choose_norm(named, tiny.layout())) == "pallas"
    with pytest.raises(UserError, match="width 8200 is above 8192"):
        choose_norm(dataclasses.replace(named, embed_dim=8200), tiny.layout())


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("setting", "mesh"),
    [
        ({}, {}),
        (dict(dropout=0.1), {}),
        (dict(remat="attn_residual=keep,mlp_norm=keep", scan_layers=True), {}),
        (dict(remat="full"), dict(devices=4, data=2, fsdp=2)),
        ({}, dict(devices=4, data=1, fsdp=2, model=2)),
        ({}, dict(devices=8, data=1, fsdp=2, model=2, context=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_has_the_loss_and_gradients_it_has_with_xlas_norm(family, setting, mesh):
    c = test_meshes.config(family, 1, **setting)
    got = test_step.loss_and_grads(
        tiny.replace(c, model=dict(norm_kernel="pallas")), tiny.batch(c), tiny.layout(**mesh)
    )
    test_step.assert_same(got, test_step.loss_and_grads(c, tiny.batch(c)))


@pytest.mark.nightly
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_has_the_losses_and_gradients_of_xlas_norm_on_one_device(one_device, family):
    c = test_pipeline.config(family, microbatches=4, model=dict(norm_kernel="pallas"))
    xla = test_pipeline.config(family, microbatches=4)
    test_pipeline.check(lambda _: one_device(xla), c, 4, pipeline=2, model=2)
