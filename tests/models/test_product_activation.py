"""The product and the activation's backward in one kernel are the derivative of the two, and of its sums over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_norm import near

from jaxlm.models.mlp import gelu, swiglu
from jaxlm.models.product_activation_kernel import Tile, product_activation_backward

R, D, F = 96, 48, 64
TILE = Tile(rows=16, columns=32, depth=16, group=4)  # 6 x 2 of 3 steps, and a last group of two where others have four
# Relative L2 distance allowed between two orders of the same f32 arithmetic: a sum of D products, about 12 operations an
# entry, a sum of R entries; 2^-24 each.
REORDERED = (D**0.5 + 12 + R**0.5) * 2**-24  # 1.7e-6


@pytest.mark.parametrize(("function", "num", "biased"), [(gelu, 1, False), (swiglu, 2, True)], ids=["gelu", "swiglu"])
def test_one_kernel_is_the_derivative_of_the_product_of_the_activation(function, num, biased):
    draw = np.random.default_rng(0).standard_normal
    *sums, dy_RD, weight_FD = (jnp.asarray(draw(s), "float32") for s in (*[(R, F)] * num, (R, D), (F, D)))
    got = product_activation_backward(function, tuple(sums), dy_RD, weight_FD, biased=biased, interpret=True, tile=TILE)
    dsums = jax.jit(lambda *sums: jax.vjp(lambda *sums: function(*sums) @ weight_FD, *sums)[1](dy_RD))(*sums)
    near(got, (dsums, tuple(d.sum(0) for d in dsums if biased)), REORDERED)


@pytest.mark.parametrize(
    ("shape", "what"), [((40, 48, 64), "rows 40"), ((96, 40, 64), "depth 40"), ((96, 48, 40), "columns 40")]
)
def test_what_no_tile_divides_is_declined(shape, what):
    assert what in TILE.refuses(*shape) and TILE.refuses(R, D, F) is None
