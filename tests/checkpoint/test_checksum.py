"""The checksum of an array depends on its bits and on nothing else, and on every one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlm.checkpoint.checksum import checksums
from jaxlm.checkpoint.staging import stage
from jaxlm.parallel.hlo import collectives


def checksum(x) -> int:
    return checksums({"x": jnp.asarray(x)})["x"]


def by_definition(x: np.ndarray) -> int:
    """The module's formula, a word at a time in Python's integers."""
    width = x.dtype.itemsize
    words = np.frombuffer(x.tobytes(), f"<u{min(width, 4)}")
    total = 0
    for i, word in enumerate(map(int, words)):
        word ^= i * 0x9E3779B1 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        total += word ^ word >> 16
    return total % 2**32


DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "uint8", "int16", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_definition_for_every_dtype_and_scalars_and_empty_arrays(dtype):
    for shape in ((), (0, 4), (5, 3, 2)):
        x = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
        assert checksum(x) == by_definition(np.asarray(x))
    assert checksum(np.zeros((0, 4), jnp.dtype(dtype))) == 0


def test_words_of_64_bits_count_too():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 5))
        assert checksum(jnp.asarray(x)) == by_definition(x)


def test_checkpoints_on_disk_keep_their_checksums():
    """Constants: a change of the formula would condemn every checkpoint there is."""
    assert checksum(np.arange(6, dtype=np.float32).reshape(2, 3)) == 1893641108
    assert checksum(np.ones((), bool)) == 1364076727


def test_any_flipped_bit_changes_it_and_so_do_two_signs_and_two_values_that_trade_places():
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    before, words = checksum(x), x.view(np.uint32).ravel()
    for i in range(x.size):
        for bit in range(32):
            words[i] ^= 1 << bit
            assert checksum(x) != before
            words[i] ^= 1 << bit
    assert checksum(x) == before
    words[[3, 17]] ^= 1 << 31
    assert checksum(x) != before
    words[[3, 17]] ^= 1 << 31
    words[[3, 17]] = words[[17, 3]]
    assert checksum(x) != before


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model"))


SPECS = (
    P("fsdp", "model"),
    P(("model", "fsdp")),
    P(("fsdp", "model"), "data"),
    P(None, ("data", "model", "fsdp")),
    P(),
)


def test_every_layout_on_devices_and_in_host_memory_gives_the_same(mesh):
    x = jax.random.normal(jax.random.key(0), (8, 16, 3))
    want = checksum(x)
    layouts = [SingleDeviceSharding(jax.devices()[3])] + [NamedSharding(mesh, spec) for spec in SPECS]
    layouts += [layout.with_memory_kind("pinned_host") for layout in layouts[:2]]
    for layout in layouts:
        assert checksum(jax.device_put(x, layout)) == want, layout


def test_nothing_is_sent_between_devices(mesh):
    from jaxlm.checkpoint import checksum as module

    spec = P(("model", "fsdp"), "data")
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    assert collectives(module._sums.lower(x, mesh, spec).compile().as_text(), mesh) == []
    sums = jax.ShapeDtypeStruct((8,), jnp.uint32, sharding=NamedSharding(mesh, P(mesh.axis_names)))
    assert collectives(module._stack.lower([sums, sums]).compile().as_text(), mesh) == []


def test_a_staged_copy_is_the_array_in_host_memory_each_part_once(mesh):
    x = jax.random.normal(jax.random.key(0), (8, 16))
    for spec in (*SPECS[:3], P()):
        for kind in ("device", "pinned_host"):
            held = jax.device_put(x, NamedSharding(mesh, spec, memory_kind=kind))
            copy = stage({"x": held})["x"]
            assert np.array_equal(np.asarray(copy), np.asarray(x)) and copy.sharding.memory_kind == "pinned_host"
            assert sum(shard.data.nbytes for shard in copy.addressable_shards) == x.nbytes
            pointers = [{s.data.unsafe_buffer_pointer() for s in array.addressable_shards} for array in (held, copy)]
            assert pointers[0].isdisjoint(pointers[1]), "the next step overwrites what it is given"
