"""The activation's backward that sums for its biases as it goes is the derivative, of all rows of a mesh, each once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_meshes
import test_pipeline
import test_step
import tiny
from test_norm import near

from jaxlm.config import UserError
from jaxlm.models import activation_kernel
from jaxlm.models.mlp import ACTIVATION, How, activate, choose_activation, gelu, swiglu

PALLAS, XLA = (next(kernel for kernel in ACTIVATION if kernel.name == name) for name in ("pallas", "xla"))
FUNCTIONS = {gelu: 1, swiglu: 2}  # and of how many sums
MESH = dict(data=2, fsdp=2, model=2)  # rows over four devices, columns over two
one_device = test_pipeline.one_device

# Relative L2 distance allowed between two orders of the same f32 arithmetic: about 12 operations an entry, of 2^-24 each, and
# for a bias a sum of at most 66 such entries.
REORDERED = (12 + 66**0.5) * 2**-24  # 1.2e-6


def gradients(kernel, function, layout, shape, dtype="float32"):
    draw = np.random.default_rng(0).standard_normal
    sums = tuple(jnp.asarray(draw(shape), dtype) for _ in range(FUNCTIONS[function]))
    biases = tuple(jnp.asarray(draw(shape[-1:]), "float32") for _ in sums)
    how, dact = How(function, kernel, layout, True), jnp.asarray(draw(shape), dtype)
    return jax.jit(lambda *args: jax.vjp(lambda *args: activate(how, *args), *args)[1](dact))(sums, biases)


@pytest.mark.parametrize(("function", "shape"), [(gelu, (2, 33, 40)), (swiglu, (1, 16, 300))], ids=["gelu", "swiglu"])
def test_one_pass_is_the_derivative_and_its_sums_over_rows(monkeypatch, function, shape):
    monkeypatch.setattr(activation_kernel, "PROGRAMS", 4)  # of two or more blocks; neither rows nor columns fill theirs
    near(*(gradients(kernel, function, tiny.layout(), shape) for kernel in (PALLAS, XLA)), REORDERED)


def test_on_a_mesh_each_row_counts_once():
    want = gradients(XLA, gelu, tiny.layout(), (4, 4, 16))
    near(gradients(PALLAS, gelu, tiny.layout(8, **MESH), (4, 4, 16)), want, REORDERED)


def test_a_kernel_is_chosen_or_refused_with_its_reason():
    c = tiny.config(activation_kernel="pallas")
    assert str(choose_activation(c.model, tiny.layout())) == "pallas"
    with pytest.raises(UserError, match="without biases"):
        choose_activation(tiny.replace(c, model=dict(use_bias=False)).model, tiny.layout())


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
