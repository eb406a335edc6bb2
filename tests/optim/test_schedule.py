"""Learning rates at the steps where a schedule turns, worked out by hand."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import OptimConfig
from jaxlm.optim import schedule as schedule_module
from jaxlm.optim.schedule import make_schedule

# Each value is one rounded product, quotient or cosine away from its formula: 4 ulp of f32.
RTOL = 4 * np.finfo(np.float32).eps


def rates(num_steps: int, steps: list[int], **optim) -> list[float]:
    lr = jax.jit(make_schedule(OptimConfig(**optim), num_steps))
    return [float(lr(jnp.int32(step))) for step in steps]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_warmup_is_linear_and_its_first_rate_is_not_zero(kind):
    got = rates(100, [0, 1, 2, 3], schedule=kind, peak_lr=0.8, warmup_steps=4, final_lr_frac=0.1)
    np.testing.assert_allclose(got, [0.2, 0.4, 0.6, 0.8], rtol=RTOL)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_without_warmup_the_first_rate_is_the_peak(kind):
    assert rates(100, [0], schedule=kind, peak_lr=0.3, warmup_steps=0) == [np.float32(0.3)]


def test_cosine_passes_quarters_of_its_arc():
    # Peak at step 3 (n=4), end at step 43 (n=44): a quarter, half and three quarters at steps 13, 23, 33.
    got = rates(44, [3, 13, 23, 33, 43], schedule="cosine", peak_lr=2.0, warmup_steps=4, final_lr_frac=0.5)
    cos = [1 + 0.5 * (1 + math.cos(math.pi * t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(got, cos, rtol=RTOL)


def test_linear_falls_evenly():
    got = rates(11, [0, 1, 5, 9, 10], schedule="linear", peak_lr=1.0, final_lr_frac=0.0)
    np.testing.assert_allclose(got, [1.0, 0.9, 0.5, 0.1, 0.0], rtol=RTOL, atol=np.finfo(np.float32).eps)


def test_inverse_sqrt_halves_at_four_times_the_warmup():
    got = rates(10, [15, 63, 143, 10**6 - 1], schedule="inverse_sqrt", peak_lr=1.0, warmup_steps=16)
    np.testing.assert_allclose(got, [1.0, 0.5, 1 / 3, 4e-3], rtol=RTOL)


def test_wsd_holds_then_falls_over_its_last_steps():
    settings = dict(schedule="wsd", peak_lr=1.0, warmup_steps=2, final_lr_frac=0.2, decay_steps=4)
    got = rates(20, [1, 10, 15, 16, 17, 18, 19, 30], **settings)
    np.testing.assert_allclose(got, [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=RTOL)


def test_wsd_decays_over_a_fifth_when_not_told():
    got = rates(50, [39, 40, 49], schedule="wsd", peak_lr=1.0, final_lr_frac=0.0, decay_steps=0)
    np.testing.assert_allclose(got, [1.0, 0.9, 0.0], rtol=RTOL)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_and_every_later_one_get_exactly_the_final_rate(kind):
    for num_steps in [2, 3, 7, 10, 49, 1000, 12345]:
        for frac in [0.0, 0.1, 1 / 3, 1.0]:
            got = rates(num_steps, [num_steps - 1, num_steps, 2**30], schedule=kind, peak_lr=3e-4, final_lr_frac=frac)
            assert got == [np.float32(3e-4 * frac)] * 3, (num_steps, frac)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_a_run_of_one_step_takes_it_at_the_peak(kind):
    assert rates(1, [0], schedule=kind, peak_lr=0.3) == [np.float32(0.3)]


def test_a_run_that_ends_in_warmup_never_decays():
    got = rates(4, [3, 7], schedule="cosine", peak_lr=0.8, warmup_steps=8, final_lr_frac=0.0)
    np.testing.assert_allclose(got, [0.4, 0.8], rtol=RTOL)


def test_the_rate_is_one_f32_scalar_and_compiles_once():
    lr = jax.jit(make_schedule(OptimConfig(warmup_steps=3), 100))
    values = [lr(jnp.int32(step)) for step in range(5)]
    assert all(v.dtype == jnp.float32 and v.shape == () for v in values)
    assert lr._cache_size() == 1


def test_the_docstring_example_is_true():
    assert doctest.testmod(schedule_module).attempted == 2 and doctest.testmod(schedule_module).failed == 0
