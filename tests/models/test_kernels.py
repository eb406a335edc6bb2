"""A kernel's forward and backward are softmax attention and its derivative, over whole rows or a block of their keys."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm.config import UserError
from jaxlm.models import kernels
from jaxlm.models.kernels import ATTENTION, choose_attention
from jaxlm.models.position import alibi_slopes
from jaxlm.parallel.context import attend
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.zigzag import alibi
from jaxlm.step import abstract_state, make_program

CUDNN, XLA = (next(kernel for kernel in ATTENTION if kernel.name == name) for name in ("cudnn", "xla"))
FORWARD, BACKWARD = (jax.jit(local, static_argnames="causal") for local in (XLA.forward, XLA.backward))

# Relative L2 distance allowed between two orders of the same f32 sums: a gradient is a chain of 4 products and a softmax,
# sums of at most 24 terms each; errors of 2^-24 add as sqrt(24) in a sum and linearly along the chain.
REORDERED = 5 * 24**0.5 * 2**-24  # 1.5e-6


def naive(q, k, v, bias, keep, causal):
    """From the definition, one array of logits, keys and values repeated for their query heads."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + (0 if bias is None else bias)
    logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool) | (not causal), logits, -jnp.inf)
    weights = jax.nn.softmax(logits) * (1 if keep is None else keep)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), jax.nn.logsumexp(logits, axis=-1)


@partial(jax.jit, static_argnames="causal")
def naive_and_gradients(q, k, v, bias, keep, dout, *, causal):
    (out, lse), gradients = jax.vjp(lambda q, k, v: naive(q, k, v, bias, keep, causal), q, k, v)
    return (out, lse), gradients((dout, jnp.zeros_like(lse)))


def operands(T, S, N, K, *, with_bias, with_keep, H=8, B=2, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((B, *x, H), np.float32) for x in ((T, N), (S, K), (S, K), (T, N)))
    bias = rng.standard_normal((1, N, T, S), np.float32) if with_bias else None
    keep = (rng.random((B, N, T, S)) < 0.7).astype(np.float32) / 0.7 if with_keep else None
    return (*map(jnp.asarray, (q, k, v)), dout, bias, keep)


def near(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.linalg.norm(np.float64(a) - b) <= REORDERED * np.linalg.norm(b)


@pytest.mark.parametrize(("with_bias", "with_keep"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("T", "S", "causal"), [(12, 12, True), (12, 12, False), (6, 20, False), (20, 6, False)])
@pytest.mark.parametrize(("N", "K"), [(6, 6), (6, 2)])
def test_xla_is_softmax_attention_and_its_derivative(T, S, causal, N, K, with_bias, with_keep):
    q, k, v, dout, bias, keep = operands(T, S, N, K, with_bias=with_bias, with_keep=with_keep)
    setting = dict(bias=bias, keep=keep, causal=causal)
    want, gradients = naive_and_gradients(q, k, v, bias, keep, dout, causal=causal)
    out, lse = FORWARD(q, k, v, **setting)
    near((out, lse), want)
    near(BACKWARD(q, k, v, out, lse, dout, **setting), gradients)


def test_a_block_of_keys_with_the_whole_rows_out_and_lse_gives_its_share_of_the_gradient():
    q, k, v, dout, bias, _ = operands(8, 24, 4, 2, with_bias=True, with_keep=False)
    assert bias is not None
    whole = dict(keep=None, causal=False)
    out, lse = FORWARD(q, k, v, bias=bias, **whole)
    want = BACKWARD(q, k, v, out, lse, dout, bias=bias, **whole)
    blocks = (slice(0, 10), slice(10, 24))
    shares = [BACKWARD(q, k[:, s], v[:, s], out, lse, dout, bias=bias[..., s], **whole) for s in blocks]
    dq, dk, dv = zip(*shares)
    near((sum(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)), want)


def test_bfloat16_operands_give_bfloat16_results_and_a_float32_lse():
    q, k, v, dout, *_ = operands(12, 12, 4, 2, with_bias=False, with_keep=False)
    (want, _), gradients = naive_and_gradients(q, k, v, None, None, dout, causal=True)
    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, dout))
    setting = dict(bias=None, keep=None, causal=True)
    out, lse = FORWARD(q, k, v, **setting)
    assert lse.dtype == jnp.float32
    got = (out, *BACKWARD(q, k, v, out, lse, dout, **setting))
    # bf16 rounds to 2^-9: four operands, the weights or logits' gradient, and the result, at most 6 of them in a chain
    for a, b in zip(got, (want, *gradients), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(a) - b) <= 6 * 2**-9 * np.linalg.norm(b)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("keep", "forward_runs"), [((), 2), (("attn_context",), 1)])
def test_a_backward_that_keeps_attention_runs_cudnns_forward_once(monkeypatch, with_bias, keep, forward_runs):
    """Compiled for a GPU that is not there, as far as the calls that XLA hands to cuDNN."""
    monkeypatch.setattr(kernels.cudnn, "check_cudnn_version", lambda: 91900)
    q, k = (jax.ShapeDtypeStruct((2, 16, n, 8), jnp.bfloat16) for n in (4, 2))
    slopes = jnp.ones(4) if with_bias else None
    policy = jax.checkpoint_policies.save_only_these_names(*keep)

    @partial(jax.checkpoint, policy=policy)
    def layer(q, k, v):
        return attend(tiny.layout(), CUDNN, "alltoall", q, k, v, slopes, None)

    gradients = jax.jit(jax.grad(lambda *operands: jnp.square(layer(*operands)).sum(), (0, 1, 2)))
    text = gradients.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(", text)
    name = "fmhaScaleBiasSoftmax" if with_bias else "fmhaSoftmax"
    assert sorted(calls) == [name] * forward_runs + [name + "Backward"]
    results = re.search(r"@__cudnn\$\w+Backward\(.*-> (.*)", text)
    assert results and results[1].count("bf16") == 3  # the bias gets no gradient


@pytest.mark.parametrize(("T", "S", "causal"), [(9, 9, True), (8, 7, False)])
def test_cudnn_is_given_a_bias_of_even_lengths_that_changes_nothing(monkeypatch, T, S, causal):
    """Its two primitives by their definition, which takes even lengths only, as cuDNN does."""

    def define(function):
        def bind(q, k, v, bias, *others, mask_type, **_):
            assert q.shape[1] % 2 == k.shape[1] % 2 == 0 and bias.shape[2:] == (q.shape[1], k.shape[1])
            saved = () if function is FORWARD else (others[7], others[6], others[8])  # they take lse first
            return function(q, k, v, *saved, bias=bias, keep=None, causal=mask_type == kernels.cudnn.MaskType.CAUSAL)

        return type("Primitive", (), dict(bind=staticmethod(bind)))

    monkeypatch.setattr(kernels.cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(kernels.cudnn, "_dot_product_attention_fwd_p_wrapper", define(FORWARD))
    monkeypatch.setattr(kernels.cudnn, "_dot_product_attention_bwd_p_wrapper", define(BACKWARD))
    q, k, v, dout, bias, _ = operands(T, S, 4, 2, with_bias=True, with_keep=False)
    q, k, v, dout, bias = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, dout, bias))
    setting = dict(bias=bias, keep=None, causal=causal)
    out, lse = FORWARD(q, k, v, **setting)
    want = out, lse, *BACKWARD(q, k, v, out, lse, dout, **setting)
    got = CUDNN.forward(q, k, v, **setting)
    for a, b in zip((*got, *CUDNN.backward(q, k, v, out, lse, dout, **setting)), want, strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= 2**-9 * np.linalg.norm(b)  # the same sums in another order may round otherwise


def test_alibi_rounded_to_bfloat16_costs_no_head_more_than_one_more_rounding():
    T, N = 512, 4  # slopes 1/4 ... 1/256: of the flattest, a row is two lengths
    q, k, v, dout, *_ = operands(T, T, N, N, with_bias=False, with_keep=False, H=16, B=1)
    t_T = jnp.arange(T, dtype=jnp.float32)
    bias = alibi(jnp.asarray(alibi_slopes(N)), t_T, t_T)
    rounded = bias.astype(jnp.bfloat16).astype(jnp.float32)

    def results(bias):
        out, lse = FORWARD(q, k, v, bias=bias, keep=None, causal=True)
        return out, *BACKWARD(q, k, v, out, lse, dout, bias=bias, keep=None, causal=True)

    for a, b in zip(results(rounded), results(bias), strict=True):
        error_N = np.sqrt(np.square(a - b).sum((0, 1, 3)) / np.square(b).sum((0, 1, 3)))
        assert np.all(error_N <= 2**-9), error_N * 2**9


def test_cudnn_says_why_it_does_not_serve():
    model = tiny.config(dtype="bfloat16", embed_dim=48).model
    assert str(choose_attention(model, "cpu", documents=False)) == "xla (not cudnn: it runs on NVIDIA GPUs, not cpu)"
    for positions in ("learned", "alibi", "rope"):
        changed = dataclasses.replace(model, position=positions)
        assert str(choose_attention(changed, "gpu", documents=False)) == "cudnn"
    refusals = {
        "not float32": dict(dtype="float32"), "head width 4": dict(head_dim=4), "head width 512": dict(head_dim=512),
        "dropout": dict(dropout=0.1),
    }  # fmt: skip
    for reason, setting in refusals.items():
        changed = tiny.replace(tiny.config(dtype="bfloat16", embed_dim=48), model=setting)
        with pytest.raises(UserError, match=reason):
            choose_attention(tiny.replace(changed, model=dict(attention="cudnn")).model, "gpu", documents=False)
    with pytest.raises(UserError, match="mask of documents"):
        choose_attention(
            tiny.replace(tiny.config(dtype="bfloat16", embed_dim=48, attention="cudnn")).model, "gpu", documents=True
        )


def test_a_kernel_that_can_not_repeat_its_bits_is_passed_over_or_refused_where_they_are_asked_for():
    model = tiny.config(dtype="bfloat16", embed_dim=48).model
    choice = choose_attention(model, "gpu", documents=False, deterministic=True)
    assert str(choice).startswith("xla (not cudnn: XLA loses it where it is to be deterministic")
    with pytest.raises(UserError, match="not cudnn: XLA loses it"):
        choose_attention(dataclasses.replace(model, attention="cudnn"), "gpu", documents=False, deterministic=True)


def test_what_is_chosen_for_a_program_is_what_its_layers_run(monkeypatch):
    monkeypatch.setattr(Layout, "platform", property(lambda layout: "gpu"))
    for deterministic, kernel in ((False, "cudnn"), (True, "xla")):
        c = tiny.config(dtype="bfloat16", embed_dim=48, num_layers=1, train=dict(deterministic=deterministic))
        program = make_program(c, tiny.layout())
        assert kernel == program.model(abstract_state(program).params).layers[0].attn.model.attention
