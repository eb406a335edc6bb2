"""What a device holds: state falls with the axes that split it, and no array is ever whole on the way there."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxlm.feed import put_batch
from jaxlm.models.presets import PRESETS
from jaxlm.step import abstract_state, batch_sharding, compile_init, compile_step, init_state, make_program, num_params

SIZED = dict(vocab_size=1024, embed_dim=256, num_layers=1, num_heads=8, max_seq_len=16)


def abstract_batch(program):
    shape = (program.config.train.batch_size, program.config.train.seq_len)
    at = batch_sharding(program)
    kinds = (jnp.int32, jnp.int32, jnp.float32)
    return type(tiny.batch(program.config))(*(jax.ShapeDtypeStruct(shape, kind, sharding=at) for kind in kinds))


def argument_bytes(devices: int, *, optim: dict | None = None, **mesh) -> int:
    """Bytes of state and batch that one device holds, as the compiler counts them."""
    program = make_program(tiny.config(optim=optim, **SIZED), tiny.layout(devices, **mesh))
    compiled = compile_step(program).lower(abstract_state(program), abstract_batch(program)).compile()
    return compiled.memory_analysis().argument_size_in_bytes


def test_state_bytes_fall_as_one_over_fsdp_whatever_a_step_makes_of_them():
    whole = argument_bytes(1)
    for fsdp, zero in ((2, 3), (8, 3), (8, 1)):
        assert argument_bytes(fsdp, data=1, fsdp=fsdp, zero=zero) == pytest.approx(whole / fsdp, rel=0.05)
    # hybrid shard: what a group of 4 holds is repeated in the other group
    assert argument_bytes(8, data=2, fsdp=4) == pytest.approx(whole / 4, rel=0.05)


def test_the_init_of_7b_parameters_on_eight_devices_never_holds_more_than_its_eighth():
    program = make_program(
        tiny.config("llama", **(PRESETS["llama2-7b"] | dict(vocab_size=32000, preset="llama2-7b"))),
        tiny.layout(8, data=1, fsdp=8),
    )
    state = abstract_state(program)
    ends, block, opt_init = (
        f.lower(*args).compile() for f, args in zip(compile_init(program), ((), (np.int32(0),), (state.params,)))
    )

    def eighth(tree) -> float:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 8

    def held(compiled) -> int:
        memory = compiled.memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    def largest(compiled) -> int:
        """Elements of the largest array that the program of one device holds."""
        shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert eighth(state.params) * 8 > 4 * 6.7e9
    rest = {name: leaf for name, leaf in state.params.items() if name != "layers"}
    for compiled, tree in ((ends, rest), (block, state.params["layers"][0])):
        assert largest(compiled) == max(leaf.size for leaf in jax.tree.leaves(tree)) // 8
        assert held(compiled) + eighth(state.params) <= eighth(state)  # passes before the moments are there
    assert held(opt_init) <= 1.05 * eighth(state.opt_state)


def test_offloaded_moments_rest_on_the_host_and_change_no_number():
    losses = {}
    for offload in (False, True):
        config = tiny.config(optim=dict(offload=offload), num_layers=2)
        program = make_program(config, tiny.layout(2, data=1, fsdp=2))
        state, step = init_state(program), compile_step(program)
        for seed in range(3):
            state, metrics = step(state, put_batch(program, tiny.batch(config, seed)))
            losses[offload, seed] = float(metrics.loss)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        assert step._cache_size() == 1
    assert all(losses[True, seed] == losses[False, seed] for seed in range(3))


def test_gradients_that_lie_split_are_never_whole_in_a_loop_over_layers():
    held = []
    for zero in (1, 2):
        config = tiny.config(num_layers=6, embed_dim=96, num_heads=6, scan_layers=True)
        program = make_program(config, tiny.layout(4, data=1, fsdp=4, zero=zero))
        lowered = compile_step(program).lower(abstract_state(program), abstract_batch(program))
        held.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    gradients = 4 * num_params(
        program
    )  # bytes, of which three fourths are elsewhere, less what the compiler lays otherwise
    assert held[0] - held[1] > 0.6 * gradients
