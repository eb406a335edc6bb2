"""A pipeline gives the one-device numbers: every schedule, with every other axis; its checkpoints know nothing of it."""

import dataclasses
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_meshes
import tiny
from test_memory import abstract_batch

from jaxlm import pipelined
from jaxlm import step as step_module
from jaxlm.checkpoint.layout import name_leaves
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import PipelineConfig, UserError
from jaxlm.feed import put_batch
from jaxlm.models.pieces import Pieces
from jaxlm.parallel.pipeline import _Run
from jaxlm.parallel.schedule import Schedule
from jaxlm.parallel.stages import Stages, by_slot
from jaxlm.pipelined import from_layers, to_layers
from jaxlm.step import abstract_state, compile_eval, compile_step, init_state, make_program

# f32: five AdamW steps' losses, and each gradient leaf in the two-norm
LOSS = GRADIENT = 5e-6


def config(family: str = "gpt2", *, layers: int = 4, batch_size: int = 16, accumulate: int = 1, model=None, **pipeline):
    c = test_meshes.config(family, accumulate, num_layers=layers, **(model or {}))
    c = tiny.replace(c, train=dict(batch_size=batch_size))
    return dataclasses.replace(c, pipeline=PipelineConfig(**pipeline))


compiled_here = test_meshes.compiled_here


@pytest.fixture(scope="session")
def one_device():
    cache = {}

    def get(c):
        """The same model, microbatches one after the other on one device."""
        M = c.pipeline.microbatches * c.train.accumulate
        plain = dataclasses.replace(tiny.replace(c, train=dict(accumulate=M)), pipeline=PipelineConfig())
        if plain not in cache:
            cache[plain] = test_meshes.numbers(plain, tiny.layout())
        return cache[plain]

    return get


def check(one_device, c, devices: int, **mesh):
    layout = tiny.layout(devices, **({"data": 1} | mesh))
    (got, losses), (want, want_losses) = test_meshes.numbers(c, layout), one_device(c)
    np.testing.assert_allclose(losses, want_losses, rtol=LOSS)
    got, want = layer_leaves(make_program(c, layout).pipe.stages, got), name_leaves(want)
    assert got.keys() == want.keys()
    for name, b in want.items():
        assert np.linalg.norm(np.float64(got[name]) - b) <= GRADIENT * np.linalg.norm(np.float64(b)), name


def layer_leaves(stages: Stages, tree) -> dict:
    """Host arrays a leaf a slot, as a leaf a layer: what `by_layer` does to arrays on devices."""
    out, table = {}, stages.layers()
    for name, leaf in name_leaves(tree).items():
        if not name.startswith("layers."):
            out[name] = leaf
            continue
        _, slot, rest = name.split(".", 2)
        for s, r in np.argwhere(table[int(slot)] >= 0):
            out[f"layers.{table[int(slot), s, r]}.{rest}"] = leaf[s, r]
    return out


CI = [
    ("gpt2", 4, dict(pipeline=4), dict(schedule="gpipe", microbatches=4)),
    ("llama", 4, dict(pipeline=2, fsdp=2), dict(schedule="1f1b", microbatches=4)),
    ("gpt2", 8, dict(pipeline=2, model=2, data=2), dict(schedule="1f1b", microbatches=4, repeats=2)),
    ("llama", 8, dict(pipeline=2, context=2, model=2), dict(schedule="circular", microbatches=4, repeats=2)),
    ("bloom", 8, dict(pipeline=4, context=2, context_method="ring"),
     dict(schedule="1f1b", microbatches=4)),
    ("gpt2", 8, dict(pipeline=2, data=2, fsdp=2, zero=2), dict(schedule="1f1b", microbatches=4, in_place=True)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "devices", "mesh", "pipeline"), CI, ids=str)
def test_a_covering_set_of_pipelines_gives_one_device_numbers(
    one_device, compiled_here, capfd, family, devices, mesh, pipeline
):
    check(one_device, config(family, **pipeline), devices, **mesh)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


EVERY = [
    (schedule, repeats, in_place, S, M, other)
    for schedule, repeats, in_place, degrees in (
        ("gpipe", 1, False, (2, 4)), ("circular", 2, False, (2, 4)), ("1f1b", 1, False, (2, 4)),
        ("1f1b", 2, False, (2, 4)), ("1f1b", 1, True, (2,)), ("1f1b", 2, True, (2,)),
    )
    for S in degrees
    for M in sorted({S, 2 * S, 8})
    for other in ({}, dict(fsdp=2), dict(model=2), dict(data=2), dict(context=2))
]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize(("case", "family"), list(zip(EVERY, itertools.cycle(tiny.FAMILIES))), ids=str)
def test_every_schedule_with_every_axis_gives_the_one_device_numbers(one_device, case, family):
    schedule, repeats, in_place, S, M, other = case
    c = config(family, layers=S * repeats, schedule=schedule, repeats=repeats, microbatches=M, in_place=in_place)
    check(one_device, c, S * int(np.prod(list(other.values()))), pipeline=S, **other)


def everything(*counts: int):
    """Dropout, z-loss, rematerialisation, accumulation and repeats at once, with so many layers in each virtual stage."""
    model = dict(dropout=0.2, remat="query=keep,mlp_up=keep")
    cut = dict(layers=sum(counts), repeats=len(counts) // 2, stage_layers=counts, accumulate=2, microbatches=2)
    return tiny.replace(config("gpt2", schedule="1f1b", model=model, **cut), train=dict(z_loss=0.1))


@pytest.mark.parametrize(
    "counts", [(1, 1), *(pytest.param(c, marks=pytest.mark.nightly) for c in ((1, 1, 1, 1), (1, 2, 1, 1)))], ids=str
)
def test_dropout_and_recomputation_are_those_of_one_device(one_device, counts):
    """Masks are a function of layer, microbatch and place: no schedule, mesh or remat changes them."""
    check(one_device, everything(*counts), 4, pipeline=2, context=2)


@pytest.mark.parametrize("repeats", [1, 2])
def test_evaluation_under_a_pipeline_is_that_of_one_device(repeats):
    c = config("llama", schedule="1f1b", microbatches=4, repeats=repeats)
    sums = []
    for layout, case in (
        (tiny.layout(), dataclasses.replace(c, pipeline=PipelineConfig())),
        (tiny.layout(4, pipeline=2, fsdp=2, data=1), c),
    ):
        program = make_program(case, layout)
        sums.append(compile_eval(program)(init_state(program).params, put_batch(program, tiny.batch(case))))
    np.testing.assert_allclose(np.float64(sums[0]), np.float64(sums[1]), rtol=LOSS)


def test_a_checkpoint_of_any_schedule_loads_under_any_other_and_without_a_pipeline(tmp_path):
    """Bitwise: the arrays written under one cut of the layers are those read under another."""
    cases = [
        (dict(), {}, 1),
        (dict(schedule="1f1b", microbatches=4, repeats=2), dict(pipeline=2, data=2), 4),
        (dict(schedule="gpipe", microbatches=4, stage_layers=(1, 2, 1)), dict(pipeline=3, data=1), 3),
        (dict(), dict(fsdp=4, data=1), 4),
    ]
    seen = []
    for step, (pipeline, mesh, devices) in enumerate(cases):
        c = config("gpt2", model=dict(vocab_multiple=48), **pipeline)
        program = make_program(c, tiny.layout(devices, **mesh))
        like = abstract_state(program)
        with CheckpointStore(tmp_path / "checkpoints") as store:
            restored = store.restore_latest_good(to_layers(program.pipe, like))
            if restored is None:
                state = init_state(program)
                state, _ = compile_step(program)(state, put_batch(program, tiny.batch(c)))
            else:
                state = from_layers(program.pipe, restored.state, like)
                match = jax.tree.map(lambda a, b: (a.shape, a.sharding) == (b.shape, b.sharding), state, like)
                assert all(jax.tree.leaves(match))
            store.save(step + 1, to_layers(program.pipe, state))
            store.wait()
            assert store.committed_step == step + 1
        seen.append(jax.device_get(name_leaves(to_layers(program.pipe, state))))
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for name, leaf in seen[0].items():
            np.testing.assert_array_equal(other[name], leaf, err_msg=name)


def temp_bytes(schedule: str, M: int) -> int:
    c = config("gpt2", layers=2, batch_size=M, schedule=schedule, microbatches=M, model=dict(max_seq_len=64))
    program = make_program(c, tiny.layout(2, pipeline=2, data=1))
    compiled = compile_step(program).lower(abstract_state(program), abstract_batch(program)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_1f1b_keeps_no_more_for_32_microbatches_than_for_8_and_gpipe_does():
    assert temp_bytes("1f1b", 32) <= 1.10 * temp_bytes("1f1b", 8)
    assert temp_bytes("gpipe", 32) >= 2 * temp_bytes("gpipe", 8)


def test_no_device_holds_another_stages_layers():
    program = make_program(config("gpt2", schedule="1f1b", microbatches=4), tiny.layout(4, pipeline=4, data=1))
    state = init_state(program)
    for leaf in jax.tree.leaves(state.params["layers"]):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    named = to_layers(program.pipe, state.params)
    assert {len(named[f"layers.{i}.attn.query"].sharding.device_set) for i in range(4)} == {1}


@pytest.mark.parametrize(
    ("pipeline", "mesh", "message"),
    [
        (dict(microbatches=3), {}, "does not split train.batch_size / train.accumulate = 16 rows"),
        (dict(microbatches=2), dict(pipeline=4), "leaves some of mesh.pipeline=4 stages without work"),
        (dict(microbatches=16, repeats=2, layers=6, model=dict(vocab_multiple=48)), dict(pipeline=3), "in groups"),
        (dict(microbatches=4, repeats=2), dict(pipeline=4), "is more than model.num_layers=4"),
        (dict(microbatches=4, stage_layers=(4,)), {}, "is not one count for each of 2 virtual stages"),
        (dict(microbatches=4, stage_layers=(5, -1)), {}, "has a negative count"),
        (dict(microbatches=4, stage_layers=(1, 2)), {}, "does not add up to model.num_layers=4"),
    ],
)  # fmt: skip
def test_a_pipeline_that_can_not_run_is_refused(pipeline, mesh, message):
    mesh = {"pipeline": 2, "data": 1} | mesh
    with pytest.raises(UserError) as e:
        make_program(config("gpt2", **pipeline), tiny.layout(int(np.prod(list(mesh.values()))), **mesh))
    assert message in str(e.value)


MUTATIONS = {
    "gradients of vectors not summed over rows": (step_module, "finish_gradients", lambda layout, dims, grads, share: (
        jax.tree.map(lambda g: g * share, grads))),
    "what another stage holds sent to the loss": (_Run, "from_stage", lambda run, stage, x: jax.lax.psum(
        jnp.where(run.stage == 1, x, 0), run.axis)),
    "activations sent backwards": (_Run, "send", lambda run, x, step: jax.lax.ppermute(
        x, run.axis, [(s, (s - step) % 4) for s in range(4)])),
    "residuals of another tick": (Schedule, "forward_index", lambda self, item: item.index + 1),
    "a loss without its z-term": (pipelined, "_parts", lambda pipe, batch, keys_M, z_loss: PARTS(
        pipe, batch, keys_M, 0.0)),
    "one accumulation step's dropout in all": (step_module, "loss_and_grads", lambda *args: LOSS_AND_GRADS(
        *args[:3], jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(2 * jnp.arange(2)), args[4])),
    "layers of the first repeat in all": (Pieces, "_stage", lambda self, starts, keys, slots, x, m, repeat: STAGE(
        self, starts, keys, slots, x, m, 0)),
}  # fmt: skip
PARTS, LOSS_AND_GRADS, STAGE = pipelined._parts, step_module.loss_and_grads, Pieces._stage


@pytest.mark.nightly
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_parity_check_sees_a_broken_pipeline(one_device, monkeypatch, mutation):
    small = list(MUTATIONS).index(mutation) < 4
    c = config("gpt2", schedule="1f1b", microbatches=4) if small else everything(1, 1, 1, 1)
    one_device(c)  # made whole before anything is broken
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        check(one_device, c, 8 if small else 4, **(dict(pipeline=4, data=2) if small else dict(pipeline=2, context=2)))


@pytest.mark.nightly
def test_bfloat16_over_a_pipeline_differs_by_its_own_rounding_alone(one_device):
    """As test_meshes.check_bfloat16 has it: within twice what bfloat16 differs from float32 on one device."""
    exact, c = (config("gpt2", schedule="1f1b", microbatches=4, model=dict(dtype=t)) for t in ("float32", "bfloat16"))
    layout = tiny.layout(2, pipeline=2, data=1)
    got = layer_leaves(make_program(c, layout).pipe.stages, test_meshes.numbers(c, layout)[0])
    want, right = name_leaves(one_device(c)[0]), name_leaves(one_device(exact)[0])
    for name, b in want.items():
        assert np.linalg.norm(np.float64(got[name]) - b) <= 2 * np.linalg.norm(np.float64(b) - right[name]), name


PICTURE = """
import sys
sys.path.insert(0, {tests!r})
import test_pipeline as t
k = {k}
c = t.config("gpt2", layers=6, batch_size=12 * k, model=dict(vocab_multiple=24), schedule="1f1b", microbatches=6)
plain = t.dataclasses.replace(t.tiny.replace(c, train=dict(accumulate=6)), pipeline=t.PipelineConfig())
t.check(lambda c: t.test_meshes.numbers(plain, t.tiny.layout()), c, 24 * k, pipeline=6, model=4, data=k)
print("same numbers")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("k", [1, 2])
def test_six_stages_by_four_tensor_shards_by_k_replicas(k):
    """The 3D picture of Megatron-LM's users: 6 layers, pipeline=6, model=4, data=k, on 24 k devices."""
    flags = f"--xla_force_host_platform_device_count={24 * k} --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags}
    code = PICTURE.format(tests=str(Path(__file__).parent), k=k)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=1200)
    assert "same numbers" in done.stdout, done.stderr[-3000:]


def test_empty_slots_are_zeros_and_nothing_is_lost():
    stages = Stages(2, 1, (1, 2))
    layout = tiny.layout(2, pipeline=2, data=1)
    like = {"layers.0.w": (2, 1, 3), "layers.1.w": (2, 1, 3)}
    sharding = layout.sharding(("stage", "repeat", "head"))
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for name, shape in like.items()}
    devices = jax.devices()
    layers = {f"layers.{i}.w": jax.device_put(jnp.full((3,), i + 1.0), devices[i > 0]) for i in range(3)}
    made = jax.device_get(by_slot(stages, layers, like))
    np.testing.assert_array_equal(made["layers.0.w"], [[[1, 1, 1]], [[2, 2, 2]]])
    np.testing.assert_array_equal(made["layers.1.w"], [[[0, 0, 0]], [[3, 3, 3]]])
