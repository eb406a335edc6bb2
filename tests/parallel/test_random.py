"""A mask drawn a share at a time is the mask of the whole array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm.parallel.random import _times, keep_mask


@pytest.mark.parametrize("dims", [("batch", "residual", "embed"), ("batch", "heads", "channel", "channel")])
def test_every_device_draws_its_share_of_one_mask(dims):
    layout, shape = tiny.layout(8, data=2, fsdp=1, context=2, model=2), (4, 8, 12, 6)[: len(dims)]
    spec = layout.spec(dims)
    local = layout.sharding(dims).shard_shape(shape)
    key = jax.random.key(7)

    def share() -> jax.Array:
        return keep_mask(layout, key, local, layout.axes(dims), 0.7)

    whole = jax.jit(layout.on_mesh(share, (), spec))()
    np.testing.assert_array_equal(whole, jax.random.bernoulli(key, 0.7, shape))
    assert 0.6 < np.mean(whole) < 0.8


def test_indices_beyond_32_bits_are_exact():
    for start, factor in ((2**32 - 1, 2**31 + 12345), (987654321, 4096), (3, 2**16 + 1)):
        hi, lo = _times(jnp.zeros((1,), jnp.uint32), jnp.full((1,), start, jnp.uint32), factor)
        assert int(hi[0]) << 32 | int(lo[0]) == start * factor
