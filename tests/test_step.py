"""One update is the same number however it is cut up, and a bad one leaves no trace."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxlm.checkpoint.layout import name_leaves
from jaxlm.config import REMAT_NAMES
from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.models.gpt import GPT, _unroll
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.xla import DETERMINISTIC, GPU, ONE_HOST, compiler_options
from jaxlm.step import (
    WINDOW,
    compile_eval,
    compile_step,
    init_state,
    make_program,
    mean_loss_and_grads,
    with_recent,
    without_recent,
)

# Relative L2 distance allowed between two orders of the same f32 sums. A gradient leaf is a chain of at most 3 layers x 8
# matmuls, each a sum of at most 128 terms: errors of 2^-24 add as sqrt(128) in a sum and linearly along the chain.
REORDERED = 24 * 128**0.5 * 2**-24  # 1.6e-5


def loss_and_grads(config, batch, layout=None):
    program = make_program(config, layout or tiny.layout())
    state = init_state(program)
    fn = jax.jit(partial(mean_loss_and_grads, program))
    return jax.device_get(fn(state.params, put_batch(program, batch), jnp.int32(0)))


def assert_same(got, want, bound=REORDERED):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        difference, size = np.linalg.norm(np.float64(a) - b), np.linalg.norm(np.float64(b))
        assert difference <= bound * size, (jax.tree_util.keystr(path), difference, size)


def norm(grads):
    return np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads)))


@pytest.fixture(scope="module")
def reference():
    c = tiny.config(train=dict(z_loss=1e-3))
    return c, tiny.batch(c), loss_and_grads(c, tiny.batch(c))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_mean_over_counted_tokens(family):
    c = tiny.config(family, train=dict(z_loss=1e-3))
    batch = tiny.batch(c)
    program = make_program(c, tiny.layout())

    def plain(params):
        model = program.model(params)
        logits = model.logits(model.hidden(batch.tokens))[..., : c.model.vocab_size]
        z = jax.nn.logsumexp(logits, -1)
        nats = z - jnp.take_along_axis(logits, batch.labels[..., None], -1)[..., 0]
        mean = partial(jnp.average, weights=jnp.asarray(batch.weights))
        return mean(nats) + 1e-3 * mean(z**2), mean(nats)

    (_, loss), grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(init_state(program).params)
    grads = jax.device_get(grads)
    assert_same(loss_and_grads(c, batch), (loss, batch.weights.sum(), grads, norm(grads)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_compute_stays_near_float32_and_scans_the_same(family):
    c = tiny.config(family)
    batch = tiny.batch(c)
    want = loss_and_grads(c, batch)
    half = tiny.replace(c, model=dict(dtype="bfloat16"))
    got, scanned = (loss_and_grads(tiny.replace(half, model=dict(scan_layers=s)), batch) for s in (False, True))
    # bf16 rounds to 2^-9 relative; about 8 roundings a layer over 3 layers, forward and backward, add as a random walk
    bound = 2**-9 * (2 * 3 * 8) ** 0.5
    assert abs(got[0] / want[0] - 1) < bound
    flat = [
        np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(x[2])]) for x in (got, scanned, want)
    ]
    for one, other in ((flat[0], flat[2]), (flat[1], flat[0])):
        # gradients pass 3 layers of random weights 10 times GPT-2's, which amplify an error by up to 4
        assert np.linalg.norm(one - other) < 4 * bound * np.linalg.norm(other)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got[2]))


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_with_ragged_masks_gives_the_same_loss_and_gradients(reference, accumulate):
    c, batch, want = reference
    assert_same(loss_and_grads(tiny.replace(c, train=dict(accumulate=accumulate)), batch), want)


def test_the_mean_is_over_counted_tokens_not_over_rows(reference):
    c, batch, (loss, tokens, *_) = reference
    assert tokens == batch.weights.sum()
    rows = [
        loss_and_grads(c, batch._replace(weights=np.where(np.arange(8)[:, None] == i, batch.weights, 0)))
        for i in (0, 1)
    ]
    pair = loss_and_grads(c, batch._replace(weights=np.where(np.arange(8)[:, None] < 2, batch.weights, 0)))
    want = sum(r[0] * r[1] for r in rows) / sum(r[1] for r in rows)
    assert abs(pair[0] / want - 1) < REORDERED


@pytest.mark.parametrize("remat", ["full", "attn_context=keep,mlp_act=keep", "query=keep,mlp_up=offload"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_and_scan_change_no_number(reference, remat, scan_layers):
    c, batch, want = reference
    assert_same(loss_and_grads(tiny.replace(c, model=dict(remat=remat, scan_layers=scan_layers)), batch), want)


def test_scanned_layers_equal_unrolled_ones(reference):
    c, batch, want = reference
    assert_same(loss_and_grads(tiny.replace(c, model=dict(scan_layers=True)), batch), want)


def test_dropout_is_the_same_scanned_and_unrolled_and_differs_by_step():
    c = tiny.config(dropout=0.3)
    batch = tiny.batch(c)
    want = loss_and_grads(c, batch)
    assert_same(loss_and_grads(tiny.replace(c, model=dict(scan_layers=True, remat="full")), batch), want)
    program = make_program(c, tiny.layout())
    fn, params = jax.jit(partial(mean_loss_and_grads, program)), init_state(program).params
    losses = {float(fn(params, put_batch(program, batch), jnp.int32(step))[0]) for step in range(3)}
    assert len(losses) == 3
    assert float(want[0]) in losses


def test_attention_drops_the_same_weights_where_heads_are_split_twice():
    c = tiny.config(dropout=0.3, num_heads=8, embed_dim=32, num_layers=1)
    batch = tiny.batch(c)
    assert_same(loss_and_grads(c, batch, tiny.layout(4, data=1, context=2, model=2)), loss_and_grads(c, batch))


def test_remat_by_name_keeps_exactly_the_named_tensors():
    def compiled(remat):
        c = tiny.config(num_layers=1, remat=remat)
        program = make_program(c, tiny.layout())
        lowered = compile_step(program).lower(init_state(program), put_batch(program, tiny.batch(c)))
        text = lowered.compile().as_text()
        return text.count(" tanh"), text.count(" dot("), "annotate_device_placement" in lowered.as_text()

    none, full = compiled("none"), compiled("full")
    assert full[0] > none[0] and full[1] > none[1]  # GELU's tanh and the matmuls are computed again
    everything = ",".join(f"{name}=keep" for name in REMAT_NAMES if name != "mlp_gate")
    matmuls = ",".join(f"{name}=keep" for name in ("query", "key", "value", "attn_context", "attn_residual", "mlp_up"))
    # attention's two inner products have no name: some versions of XLA share them with the forward's, some do not
    assert none[1] <= compiled(everything)[1] <= compiled(matmuls)[1] <= none[1] + 2 < full[1]
    assert compiled("mlp_up=keep")[1] == full[1] - 1
    assert not full[2] and compiled("mlp_up=offload")[2]


def test_dropout_keys_differ_by_layer_and_by_microbatch_and_evaluation_has_none():
    keys = []

    def block(params, x, key):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return x

    _unroll(block, [0, 1, 2, 3], jnp.zeros(1), jax.random.key(0))
    assert len(set(keys)) == 4
    c = tiny.config(dropout=0.3, train=dict(accumulate=2))
    half = tiny.batch(tiny.replace(c, train=dict(batch_size=4)))
    twice = jax.tree.map(
        lambda a: np.repeat(a, 2, axis=0), half
    )  # microbatch m takes rows m, m+2, ...: both are `half`
    one = loss_and_grads(tiny.replace(c, train=dict(accumulate=1, batch_size=4)), half)[0]
    assert abs(loss_and_grads(c, twice)[0] - one) > 1e-3
    sums = []
    for rate in (0.0, 0.3):
        program = make_program(tiny.config(dropout=rate), tiny.layout())
        sums.append(float(compile_eval(program)(init_state(program).params, put_batch(program, tiny.batch(c)))[0]))
    assert sums[0] == pytest.approx(sums[1], rel=REORDERED)


def test_every_parameter_has_the_role_that_decides_its_decay():
    for family in tiny.FAMILIES:
        roles = make_program(tiny.config(family), tiny.layout()).roles
        for path, role in jax.tree.leaves_with_path(roles):
            name = path[-1].key
            want = (
                "bias" if name.endswith("bias") else {"scale": "scale", "tokens": "embedding", "positions": "embedding"}
            )
            assert role == (want if isinstance(want, str) else want.get(name, "kernel")), path


@pytest.mark.parametrize("mesh", [dict(data=4), dict(data=2, fsdp=2), dict(data=1, fsdp=4)])
def test_any_data_and_fsdp_mesh_gives_the_one_device_loss_and_gradients(reference, mesh):
    c, batch, want = reference
    assert_same(loss_and_grads(c, batch, tiny.layout(4, **mesh)), want)


def test_fsdp_rests_a_share_of_every_large_leaf_on_each_device():
    program = make_program(tiny.config(), tiny.layout(4, data=1, fsdp=4))
    state = init_state(program)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        if leaf.ndim > 1 and 24 in leaf.shape:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size


def test_blocks_made_one_by_one_are_those_of_the_whole_model():
    c = tiny.config("llama")
    program = make_program(c, tiny.layout())
    whole = nnx.to_pure_dict(nnx.split(GPT(c.model, jax.random.key(c.train.seed), program.layout))[1])
    close = partial(
        np.testing.assert_allclose, rtol=2**-21
    )  # compiled and op by op, the normal draw rounds differently
    jax.tree.map(close, init_state(program).params, whole)


def run(config, batches):
    program = make_program(config, tiny.layout())
    state, step = init_state(program), compile_step(program)
    metrics = []
    for batch in batches:
        on_device = put_batch(program, batch)
        with jax.transfer_guard("disallow"):
            state, m = step(state, on_device)
        metrics.append(m)
    return state, metrics, step


def test_the_step_compiles_once_and_learns():
    c = tiny.config(optim=dict(warmup_steps=2))
    _, metrics, step = run(c, [tiny.batch(c)] * 20)
    assert step._cache_size() == 1
    losses = [float(m.loss) for m in metrics]
    assert losses[-1] < losses[0] - 1
    lr = [float(m.lr) for m in metrics]
    assert lr[0] > 0 and max(lr) == pytest.approx(1e-2) and lr[-1] == pytest.approx(1e-3, rel=0.3)


def test_a_nonfinite_loss_leaves_parameters_and_optimizer_bitwise_unchanged():
    c = tiny.config()
    good = tiny.batch(c)
    bad = good._replace(weights=good.weights * np.float32(np.nan))
    before, _, _ = run(c, [good, good])
    after, metrics, _ = run(c, [good, good, bad, bad])
    assert_bitwise((before.params, before.opt_state), (after.params, after.opt_state))
    assert [int(m.streak) for m in metrics] == [0, 0, 1, 2]
    assert int(after.skipped) == 2 and int(after.step) == 4
    again, metrics, _ = run(c, [good, good, bad, good])
    assert int(metrics[-1].streak) == 0 and int(again.skipped) == 1
    assert float(metrics[-1].lr) == float(run(c, [good, good, good])[1][-1].lr)  # the schedule waits for the update
    assert any(
        (np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(before.params))
    )


def test_a_nonfinite_gradient_under_a_finite_loss_is_dropped_too():
    c = tiny.config()
    program = make_program(c, tiny.layout())
    state, step = init_state(program), compile_step(program)
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"] * 1e21  # squares of gradients overflow
    before = jax.device_get((state.params, state.opt_state))
    after, metrics = step(state, put_batch(program, tiny.batch(c)))
    assert np.isfinite(float(metrics.loss)) and not np.isfinite(float(metrics.grad_norm)) and int(metrics.streak) == 1
    assert_bitwise(before, (after.params, after.opt_state))


def assert_bitwise(want, got):
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_clipping_bounds_what_the_optimizer_sees_and_reports_the_norm_before_it():
    c = tiny.config(optim=dict(clip_norm=1e-3))
    state, (first, *_), _ = run(c, [tiny.batch(c)])
    grads = loss_and_grads(c, tiny.batch(c))[2]
    assert float(first.grad_norm) == pytest.approx(norm(grads), rel=1e-5)
    moments = [np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(state.opt_state[0].mu)]
    assert np.sqrt(sum(moments)) == pytest.approx((1 - c.optim.beta1) * 1e-3, rel=1e-5)  # the first moment after a step


def test_the_learning_rate_that_is_reported_is_the_one_applied():
    c = tiny.config(optim=dict(name="lion", warmup_steps=3))  # lion moves every undecayed weight by exactly the rate
    good = tiny.batch(c)
    bad = good._replace(weights=good.weights * np.float32(np.nan))
    program = make_program(c, tiny.layout())
    state, step = init_state(program), compile_step(program)
    for batch in (good, good, bad, good, good):
        before = np.asarray(state.params["final_norm"]["scale"])
        state, metrics = step(state, put_batch(program, batch))
        moved = np.abs(np.asarray(state.params["final_norm"]["scale"]) - before)
        want = float(metrics.lr) if int(metrics.streak) == 0 else 0.0
        np.testing.assert_allclose(moved, want, atol=2**-23)  # scales near 1 round to 2^-24


def test_evaluation_counts_tokens_and_ignores_z_loss(reference):
    c, batch, (loss, tokens, *_) = reference
    for layout in (tiny.layout(8, data=2, context=2, model=2), tiny.layout()):
        program = make_program(c, layout)
        nats, counted = compile_eval(program)(init_state(program).params, put_batch(program, batch))
        assert counted == tokens
        assert float(nats) / float(counted) == pytest.approx(float(loss), rel=REORDERED)


def test_a_batch_is_plain_arrays():
    assert Batch._fields == ("tokens", "labels", "weights", "starts")


def with_window(state, program, values, count=WINDOW):
    """A state whose last 128 updates had losses and gradient norms around these values, by one part in a hundred."""
    ring = np.float32(values)[:, None] * np.float32(1 + 0.01 * np.sin(np.arange(WINDOW)))
    return with_recent(program, state, {"values": ring.tolist(), "count": count})


def test_a_spike_is_dropped_like_a_nan_and_what_is_usual_is_not():
    c = tiny.config(num_layers=1, train=dict(skip_spikes=6.0))
    program = make_program(c, tiny.layout())
    step, good = compile_step(program), tiny.batch(c)
    _, metrics = step(init_state(program), put_batch(program, good))
    usual = [float(metrics.loss), float(metrics.grad_norm)]
    signs = np.where(np.arange(good.weights.size).reshape(good.weights.shape) % 2, 1e4, -1e4).astype(np.float32)
    signs.flat[0] += 1  # counts one token in all, with gradients of ten thousand times the size
    spike = good._replace(weights=signs)

    def after(batch, values, count=WINDOW):
        start = with_window(init_state(program), program, values, count)
        before = jax.device_get((start.params, start.opt_state, start.recent))
        state, metrics = step(start, put_batch(program, batch))
        return before, state, metrics

    before, state, metrics = after(good, usual)
    assert int(metrics.streak) == 0 and int(state.recent.count) == WINDOW + 1
    assert np.asarray(state.recent.values)[:, 0].tolist() == usual  # the oldest makes room
    for batch, values in ((spike, [1e9, usual[1]]), (good, [usual[0] * 0.8, 1e9]), (good, [1e9, usual[1] * 0.8])):
        before, state, metrics = after(batch, values)
        assert int(metrics.streak) == 1 and int(state.skipped) == 1 and np.isfinite(float(metrics.grad_norm))
        assert_bitwise(before, (state.params, state.opt_state, state.recent))
    _, state, metrics = after(good, [usual[0] * 0.8, usual[1] * 0.8], count=WINDOW - 1)
    assert int(metrics.streak) == 0 and int(state.recent.count) == WINDOW  # nothing is judged by a window in the making


def test_the_window_of_spikes_passes_through_json_to_the_last_bit():
    program = make_program(tiny.config(num_layers=1, train=dict(skip_spikes=6.0)), tiny.layout())
    state = with_window(init_state(program), program, [3.3, 0.7])
    arrays, kept = without_recent(state)
    assert arrays.recent is None
    assert_bitwise(with_recent(program, arrays, json.loads(json.dumps(kept))["recent"]), state)


def test_without_spike_skipping_the_state_and_its_checkpoint_have_no_part_of_it():
    states = [
        init_state(make_program(tiny.config(num_layers=1, train=dict(skip_spikes=s)), tiny.layout()))
        for s in (0.0, 6.0)
    ]
    assert len(jax.tree.leaves(states[1])) == len(jax.tree.leaves(states[0])) + 2 and states[0].recent is None
    names = [list(name_leaves(without_recent(state)[0])) for state in states]
    assert names[0] == names[1]


def test_gpus_have_options_that_xla_knows_and_xla_flags_overrides(monkeypatch):
    alone, two = (partial(compiler_options, tiny.layout(n, data=n)) for n in (1, 2))
    assert (two(deterministic=False), two(deterministic=True)) == ({}, DETERMINISTIC)
    monkeypatch.setattr(Layout, "platform", "gpu")
    assert (alone(deterministic=False), two(deterministic=False)) == (GPU, GPU | ONE_HOST)
    assert jax.jit(lambda x: x + 1, compiler_options=GPU | ONE_HOST)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}=1" for name in ONE_HOST) + f" --{next(iter(GPU))}_not")
    assert two(deterministic=False) == GPU


def test_deterministic_kernels_are_asked_of_xla_and_an_unknown_option_is_an_error_not_an_abort(monkeypatch):
    c = tiny.config(num_layers=1, train=dict(deterministic=True))
    plain, asked = (run(tiny.replace(c, train=dict(deterministic=d)), [tiny.batch(c)] * 2)[0] for d in (False, True))
    assert_bitwise(plain, asked)  # a CPU has no other kernels
    monkeypatch.setattr("jaxlm.parallel.xla.DETERMINISTIC", {"xla_gpu_no_such_option": True})
    with pytest.raises(Exception, match="No such compile option: 'xla_gpu_no_such_option'"):
        run(c, [tiny.batch(c)])
