"""The activation's backward is the derivative whatever it runs on, and sums for biases all rows of a mesh, each once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_meshes
import test_pipeline
import test_step
import tiny
from jax.experimental.pallas import mosaic_gpu
from test_norm import near

from jaxlm.config import UserError
from jaxlm.models import activation_kernel, product_gelu_kernel
from jaxlm.models.mlp import ACTIVATION, Activation, choose_activation, gelu, swiglu
from jaxlm.models.params import Parameter, add_bias
from jaxlm.parallel.dense import RESIDUAL, Products
from jaxlm.parallel.gradients import finish_gradients

PALLAS, XLA = (next(kernel for kernel in ACTIVATION if kernel.name == name) for name in ("pallas", "xla"))
FUNCTIONS = {gelu: 1, swiglu: 2}  # and of how many sums
MESH = dict(data=2, fsdp=2, model=2)  # rows over four devices, columns over two
one_device = test_pipeline.one_device

# Relative L2 distance allowed between two orders of the same f32 arithmetic: about 12 operations an entry, of 2^-24 each, two
# products of at most 300 terms, and for a bias a sum of at most 66 entries.
REORDERED = (12 + 2 * 300**0.5 + 66**0.5) * 2**-24  # 3.3e-6


def gradients(kernel, function, layout, shape):
    """Of the activation times a weight: of sums, biases, weight."""
    draw = np.random.default_rng(0).standard_normal
    arrays = [jnp.asarray(draw(s), "float32") for s in [shape, shape[-1:]] * FUNCTIONS[function]]
    down, dx = (jnp.asarray(draw(s), "float32") for s in ((shape[-1], 8), (*shape[:-1], 8)))
    made = Activation(function, kernel, layout, biased=True)

    def run(sums, biases, down):
        down = Parameter(down, dims=("mlp", "embed"), role="kernel")
        return Products(layout, "float32").rows_of(made, sums, biases, down)

    def local(sums, biases, down, dx):
        dsums, dbiases, ddown = jax.vjp(run, sums, biases, down)[1](dx)
        dims = [[("mlp",)] * len(biases), ("mlp", "embed")]
        dbiases, ddown = finish_gradients(layout, dims, [list(dbiases), ddown])
        return dsums, tuple(dbiases), ddown

    y, bias, weight = (
        layout.spec(("batch", "seq", "mlp")),
        layout.spec(("mlp",)),
        layout.spec(("mlp", "embed"), at="rest"),
    )
    local = layout.on_mesh(local, (y, bias, weight, layout.spec(RESIDUAL)), (y, bias, weight))
    return jax.jit(local)(tuple(arrays[::2]), tuple(arrays[1::2]), down, dx)


@pytest.mark.parametrize(("function", "shape"), [(gelu, (2, 33, 40)), (swiglu, (1, 16, 300))], ids=["gelu", "swiglu"])
def test_one_pass_is_the_derivative_and_its_sums_over_rows(monkeypatch, function, shape):
    monkeypatch.setattr(activation_kernel, "PROGRAMS", 4)  # of two or more blocks; neither rows nor columns fill theirs
    near(*(gradients(kernel, function, tiny.layout(), shape) for kernel in (PALLAS, XLA)), REORDERED)


def test_a_bias_gradient_of_bfloat16_rows_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(activation_kernel, "PROGRAMS", 1)  # which adds 257 rows up in three entries
    rows, want = (7, 293), 2051  # bfloat16 rounds it to 2048, and stops at 256 when it adds ones
    y = jnp.zeros((*rows, 2), "bfloat16")
    summed = [jax.grad(lambda bias: add_bias(y, bias).astype("float32").sum())(jnp.zeros(2))]
    for kernel in (PALLAS, XLA):
        dx, down = jnp.full((*rows, 1), 2, "bfloat16"), jnp.ones((2, 1), "bfloat16")  # half of dx: gelu' is 1/2 at 0
        summed += Activation(gelu, kernel, tiny.layout(), biased=True).backward((y,), dx, down)[1]
    np.testing.assert_array_equal(summed, want)


def test_on_a_mesh_each_row_counts_once():
    want = gradients(XLA, gelu, tiny.layout(), (4, 4, 16))
    near(gradients(PALLAS, gelu, tiny.layout(8, **MESH), (4, 4, 16)), want, REORDERED)


@pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="jax 0.10 does not interpret Mosaic GPU kernels"
)
@pytest.mark.parametrize(
    ("R", "D", "F", "biased"), [(300, 192, 256, True), pytest.param(256, 320, 384, False, marks=pytest.mark.nightly)]
)
def test_in_the_product_it_is_the_derivative_of_any_number_of_rows(monkeypatch, R, D, F, biased):
    monkeypatch.setattr(product_gelu_kernel, "PROGRAMS", 2)  # of three tiles each
    monkeypatch.setattr(product_gelu_kernel, "GROUP", 2)
    draw = np.random.default_rng(0).standard_normal
    args = tuple(jnp.asarray(draw(s), "bfloat16") for s in ((R, F), (R, D), (F, D)))
    interpret = mosaic_gpu.InterpretGPUParams()
    got = product_gelu_kernel.product_gelu_backward(*args, biased=biased, interpret=interpret)
    up, dy, weight = (a.astype("float32") for a in args)
    (want,) = jax.jit(lambda up: jax.vjp(gelu, up)[1](dy @ weight.T))(up)
    near(got[0], want, 2**-8)  # rounded once
    near(got[1], (want.sum(0),) * biased, (12 + D**0.5 + R**0.5) * 2**-24)


def test_a_kernel_is_chosen_or_refused_with_its_reason():
    c = tiny.config(activation_kernel="pallas")
    assert str(choose_activation(c.model, tiny.layout())) == "pallas"
    with pytest.raises(UserError, match="without biases"):
        choose_activation(tiny.replace(c, model=dict(use_bias=False)).model, tiny.layout())
    with pytest.raises(UserError, match="capability 9, not a cpu"):
        choose_activation(tiny.replace(c, model=dict(activation_kernel="hopper")).model, tiny.layout())
    assert product_gelu_kernel.refuses(768, 3072) is None
    assert "3000," in product_gelu_kernel.refuses(768, 3000) and "width 760" in product_gelu_kernel.refuses(760, 3072)


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", [{}, dict(devices=8, data=1, fsdp=2, model=2, context=2)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_model_has_the_loss_and_gradients_it_has_with_xlas_backward(activation, mesh):
    c = test_meshes.config("gpt2", 1, activation=activation, remat="attn_context=keep" if mesh else "none")
    got = tiny.replace(c, model=dict(activation_kernel="pallas"))
    got = test_step.loss_and_grads(got, tiny.batch(c), tiny.layout(**mesh))
    test_step.assert_same(got, test_step.loss_and_grads(c, tiny.batch(c)))


@pytest.mark.nightly
def test_a_pipeline_has_the_losses_and_gradients_of_xlas_backward_on_one_device(one_device):
    c = test_pipeline.config(microbatches=4, model=dict(activation_kernel="pallas"))
    xla = test_pipeline.config(microbatches=4)
    test_pipeline.check(lambda _: one_device(xla), c, 4, pipeline=2, model=2)
