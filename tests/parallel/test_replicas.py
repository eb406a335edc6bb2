"""One flipped bit, in one copy of one parameter, is found and named."""

import pytest
import tiny

from jaxlm.config import UserError
from jaxlm.feed import put_batch
from jaxlm.parallel.replicas import differing_leaves, differing_replicas, step_twice
from jaxlm.step import compile_step, init_state, make_program


@pytest.fixture(scope="module")
def trained():
    c = tiny.config(num_layers=1, train=dict(batch_size=8))
    program = make_program(c, tiny.layout(4, data=2, fsdp=2))
    return program, compile_step(program), put_batch(program, tiny.batch(c))


@pytest.mark.parametrize("bit", [0, 31])
def test_a_bit_flipped_in_one_replica_between_steps_stops_the_run_and_is_named(trained, bit):
    program, step, batch = trained
    state, _ = step_twice(step, init_state(program), batch, number=1)
    assert int(state.step) == 1 and differing_replicas(state.params) == []
    for name, leaf in (
        ("final_norm.scale", state.params["final_norm"]["scale"]),
        ("embed.tokens", state.params["embed"]["tokens"]),
    ):
        for device in (0, 3):
            room, key = name.split(".")
            broken = {**state.params, room: {**state.params[room], key: tiny.flipped(leaf, device=device, bit=bit)}}
            assert differing_replicas(broken) == [name]
    state.params["embed"]["tokens"] = tiny.flipped(state.params["embed"]["tokens"], device=1, bit=bit)
    with pytest.raises(UserError, match="step 2: train.sdc_check_every") as caught:
        step_twice(step, state, batch, number=2)
    assert "replicas of embed.tokens" in str(caught.value) and caught.value.exit_code == 2


def test_a_step_that_computes_another_thing_the_second_time_stops_the_run(trained):
    program, step, batch = trained
    runs = []

    def unsteady(state, batch):
        runs.append(None)
        state, metrics = step(state, batch)
        if len(runs) == 2:
            state.params["final_norm"]["scale"] = tiny.flipped(state.params["final_norm"]["scale"], device=2)
        return state, metrics

    with pytest.raises(UserError, match="two runs from one state in params.final_norm.scale"):
        step_twice(unsteady, init_state(program), batch, number=5)


def test_a_step_that_is_checked_is_the_step_that_is_not(trained):
    program, step, batch = trained
    checked, once = step_twice(step, init_state(program), batch, number=1)
    plain, again = step(init_state(program), batch)
    assert differing_leaves((checked, once), (plain, again)) == []
    state, _ = step(init_state(program), batch)
    state.params["embed"]["tokens"] = tiny.flipped(state.params["embed"]["tokens"], device=3, bit=31)
    assert differing_leaves(state, plain) == ["params.embed.tokens"]
