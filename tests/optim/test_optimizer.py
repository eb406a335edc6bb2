"""AdamW against a plain numpy one, and what every optimizer here promises: roles, dtypes, layout, one compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import OptimConfig
from jaxlm.optim.muon import matrix_dims
from jaxlm.optim.optimizer import make_optimizer, num_updates
from jaxlm.optim.schedule import make_schedule

NAMES = ["adamw", "lion", "adafactor", "muon"]
ROLES = {
    "embed": {"tokens": "embedding"},
    "layers": {0: {"query": "kernel", "out": "kernel", "up": "kernel", "bias": "bias"}, 1: {"scale": "scale"}},
    "head": "kernel",
}
DIMS = {
    "embed": {"tokens": ("vocab", "embed")},
    "layers": {
        0: {
            "query": ("embed", "heads", "head"),
            "out": ("heads", "head", "embed"),
            "up": ("embed", "mlp"),
            "bias": ("mlp",),
        },
        1: {"scale": ("embed",)},
    },
    "head": ("vocab", "embed"),
}
SIZES = {"vocab": 12, "embed": 8, "heads": 2, "head": 3, "mlp": 16}
is_dims = lambda x: isinstance(x, tuple)  # noqa: E731


def tree(seed: int, sizes=SIZES):
    rng = np.random.default_rng(seed)
    draw = lambda dims: jnp.asarray(rng.normal(size=[sizes[d] for d in dims]), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, DIMS, is_leaf=is_dims)


def build(name="adamw", *, num_steps=100, **settings):
    optim = OptimConfig(name=name, **settings)
    return make_optimizer(optim, schedule=make_schedule(optim, num_steps), roles=ROLES, dims=DIMS)


def run(optimizer, params, grads_of, steps):
    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for k in range(steps):
        params, state = step(params, state, grads_of(params, k))
    assert step._cache_size() == 1, "an update must compile once"
    return params, state


def numpy_adamw(params, grads, *, lrs, beta1, beta2, eps, decay):
    """Parameter after len(grads) updates, in f64, by the definition in arXiv:1711.05101 with decay times lr."""
    p, m, v = np.asarray(params, np.float64), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        g = np.asarray(g, np.float64)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * p)
    return p


def test_adamw_is_the_textbook_adamw():
    params, grads = tree(0), [tree(seed) for seed in range(1, 6)]
    settings = dict(beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.3, peak_lr=0.1, warmup_steps=3)
    got, state = run(build(**settings, num_steps=5), params, lambda p, k: grads[k], 5)
    # Warm-up 1/3, 2/3, 1, then cosine from the third update to a tenth at the fifth: halfway is 0.55.
    lrs = [0.1 * x for x in (1 / 3, 2 / 3, 1, 0.55, 0.1)]
    # About 12 roundings an update, of terms below |p| + lr (direction < 10 at these betas, decay < 1); bias correction
    # divides by 1 - 0.95^t >= 0.05, whose f32 error is 20 ulp. 5 updates * 32 ulp of a magnitude of 4, in all < 1e-4.
    tolerance = 5 * 32 * np.finfo(np.float32).eps * 4
    for path, role in jax.tree_util.tree_flatten_with_path(ROLES)[0]:
        pick = lambda t, path=path: dict(jax.tree_util.tree_flatten_with_path(t)[0])[path]  # noqa: E731
        decay = 0.3 if role in ("kernel", "embedding") else 0.0
        want = numpy_adamw(pick(params), map(pick, grads), lrs=lrs, beta1=0.9, beta2=0.95, eps=1e-3, decay=decay)
        np.testing.assert_allclose(pick(got), want, rtol=0, atol=tolerance, err_msg=str(path))
    assert int(num_updates(state)) == 5


@pytest.mark.parametrize("name", NAMES)
def test_only_the_chosen_roles_decay(name):
    params, lr, decay = tree(0), 0.5, 0.25
    zeros = jax.tree.map(jnp.zeros_like, params)
    for roles in [("kernel", "embedding"), ("bias",), ("scale", "embedding"), ()]:
        optimizer = build(name, peak_lr=lr, weight_decay=decay, decay_roles=roles, schedule="constant")
        got, _ = run(optimizer, params, lambda p, k: zeros, 1)

        def check(role, before, after, roles=roles):
            if role in roles:
                np.testing.assert_allclose(after, before * (1 - lr * decay), rtol=2e-7)  # 2 roundings
            else:
                assert bytes(np.asarray(after)) == bytes(np.asarray(before)), role

        jax.tree.map(check, ROLES, params, got)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_down_a_quadratic(name):
    target = tree(7)
    loss = lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target)))  # noqa: E731
    # The farthest is a singular value of about 9: Muon moves one by 0.05 * 0.2 * sqrt(16) * lr/peak, mean 0.02.
    optimizer = build(name, peak_lr=0.05, weight_decay=0.0, schedule="linear", final_lr_frac=0.0, num_steps=600)
    grad = jax.jit(jax.grad(loss))
    got, _ = run(optimizer, tree(0), lambda p, k: grad(p), 600)
    assert loss(got) < 0.01 * loss(tree(0))


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_f32_and_the_state_follows_the_parameters_layout(name):
    sizes = SIZES | {"embed": 128, "mlp": 256}  # large enough for adafactor to factor
    params = tree(0, sizes)
    optimizer = build(name)
    state = optimizer.init(params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(leaf.dtype == jnp.float32 for leaf in floats)

    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    follow = lambda leaf, param, name: name if leaf.shape == param.shape else "whole"  # noqa: E731
    laid = optax.tree_map_params(optimizer, follow, state, params, names, transform_non_params=lambda _: "whole")
    assert jax.tree.structure(laid) == jax.tree.structure(state)
    for (path, name_), leaf in zip(jax.tree_util.tree_flatten_with_path(laid)[0], jax.tree.leaves(state)):
        if name_ == "whole":
            assert leaf.size <= 256 * 6, (path, leaf.shape)  # a factored row or column, never a matrix
        else:
            assert jax.tree_util.keystr(path).endswith(name_)


def test_the_state_tree_depends_on_the_name_alone():
    one = build("adamw", weight_decay=0.0, decay_roles=(), schedule="constant", beta1=0.5)
    other = build("adamw", weight_decay=0.2, decay_roles=("bias",), schedule="wsd")
    assert jax.tree.structure(one.init(tree(0))) == jax.tree.structure(other.init(tree(0)))


def test_a_kept_state_does_not_advance_the_schedule():
    optimizer = build("adamw", peak_lr=0.1, warmup_steps=10)
    state = optimizer.init(tree(0))
    assert int(num_updates(state)) == 0
    _, after = optimizer.update(tree(1), state, tree(0))
    assert int(num_updates(after)) == 1 and int(num_updates(state)) == 0


def test_muon_moves_kernels_by_orthogonal_matrices_and_the_rest_by_adamw():
    settings = dict(peak_lr=1.0, weight_decay=0.0, schedule="constant")
    params, grads = tree(0), tree(1)
    second = build("muon").init(params)[0].second  # half of AdamW's state is what Muon saves
    assert second["layers"][0]["up"].shape == (1,) and second["head"].shape == params["head"].shape
    moves = {}
    for name in ("muon", "adamw"):
        got, _ = run(build(name, **settings), params, lambda p, k: grads, 1)
        moves[name] = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), params, got)
    for leaf, rows in (("query", 8), ("out", 6), ("up", 8)):
        matrix = moves["muon"]["layers"][0][leaf].reshape(rows, -1)
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        # Five quintic steps bring the singular values of an 8 x 16 Gaussian into about [0.5, 1.5], not to 1.
        assert singular.min() > 0.3 and singular.max() < 1.6, (leaf, singular)
        grad = np.asarray(grads["layers"][0][leaf], np.float64).reshape(rows, -1)
        assert np.sum(matrix * grad) > 0
    for leaf in ("embed", "head"):
        jax.tree.map(np.testing.assert_array_equal, moves["muon"][leaf], moves["adamw"][leaf])
    for layer, leaf in ((0, "bias"), (1, "scale")):
        np.testing.assert_array_equal(moves["muon"]["layers"][layer][leaf], moves["adamw"]["layers"][layer][leaf])


def test_muon_reads_inputs_and_outputs_off_the_dims():
    assert matrix_dims("kernel", ("embed", "heads", "head")) == ((0,), (1, 2))
    assert matrix_dims("kernel", ("heads", "head", "embed")) == ((0, 1), (2,))
    assert matrix_dims("kernel", ("mlp", "embed")) == ((0,), (1,))
    assert matrix_dims("kernel", ("vocab", "embed")) is None and matrix_dims("bias", ("mlp",)) is None
    with pytest.raises(ValueError, match="embed first or last"):
        matrix_dims("kernel", ("layers", "embed", "mlp"))
    with pytest.raises(ValueError, match="pass dims"):
        make_optimizer(OptimConfig(name="muon"), schedule=make_schedule(OptimConfig(), 10), roles=ROLES)
