"""What is read is what was saved, on any mesh; what does not fit is a table; what is no checkpoint is passed over."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import abstract, make_state, same
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlm.checkpoint import restore as restore_module
from jaxlm.checkpoint.layout import Retention, name_leaves
from jaxlm.checkpoint.restore import restore, restore_latest_good
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import UserError

restore_params = partial(restore, step=None, part="params")

small = partial(make_state, width=64)


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class State:
    step: jax.Array
    params: Any
    opt_state: Any


def train_state() -> State:
    """Int keys (over ten, so that they do not sort as text), NamedTuples, empty nodes, bf16, odd floats, scalars."""
    draw = lambda i, dtype: jax.random.normal(jax.random.key(i), (8, 16)).astype(dtype)  # noqa: E731
    params = {
        "embed": {"tokens": draw(99, jnp.bfloat16)},
        "layers": {i: {"attn": {"query": draw(i, jnp.float32)}} for i in range(12)},
        "odd": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
    }
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale_by_schedule(lambda n: n))
    grads = jax.tree.map(jnp.ones_like, params)
    return State(jnp.int32(7), params, optimizer.update(grads, optimizer.init(params), params)[1])


def save(directory, step, state, **more):
    with CheckpointStore(directory, retention=Retention(9)) as store:
        store.save(step, state, **more)
        assert [outcome.error for outcome in store.close()] == [None]


def place(state, sharding_of):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), state)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = train_state()
    save(tmp_path, 7, state, metadata={"tokens": 12})
    restored = restore_latest_good(tmp_path, abstract(state))
    assert restored.step == 7 and restored.metadata == {"tokens": 12}
    assert same(restored.state, state)


def test_a_state_saved_on_one_mesh_loads_onto_another(tmp_path):
    state = train_state()
    devices = np.array(jax.devices())
    assert len(devices) == 8, "run with --xla_force_host_platform_device_count=8"
    one, two = Mesh(devices, ("fsdp",)), Mesh(devices.reshape(2, 4), ("data", "model"))
    spread = lambda x: NamedSharding(one, P("fsdp") if x.shape == (8, 16) else P())  # noqa: E731
    crossed = lambda x: NamedSharding(two, P("model", "data") if x.shape == (8, 16) else P())  # noqa: E731
    save(tmp_path, 1, jax.device_put(state, jax.tree.map(spread, state)))
    for sharding_of in (crossed, spread, lambda x: SingleDeviceSharding(devices[3])):
        restored = restore_latest_good(tmp_path, place(state, sharding_of)).state
        assert same(restored, state)
        assert all(leaf.sharding == sharding_of(leaf) for leaf in jax.tree.leaves(restored))


def test_a_state_may_change_its_containers_but_not_its_names(tmp_path):
    save(tmp_path, 1, {"layers": {0: jnp.ones(2), 1: jnp.zeros(3)}, "step": jnp.int32(4)})
    listed = {"layers": [jnp.ones(2), jnp.zeros(3)], "step": jnp.int32(4)}
    assert same(restore_latest_good(tmp_path, abstract(listed)).state, listed)
    with pytest.raises(ValueError, match="one name"):
        name_leaves({"a.b": 1, "a": {"b": 2}})


def test_parameters_load_without_the_optimizer_state(tmp_path, monkeypatch):
    state = train_state()
    save(tmp_path, 3, state)
    save(tmp_path, 5, State(state.step, jax.tree.map(jnp.zeros_like, state.params), state.opt_state))
    asked = []
    load = restore_module.ocp.load_checkpointables
    monkeypatch.setattr(
        restore_module.ocp,
        "load_checkpointables",
        lambda path, wanted: asked.extend(wanted["state"]) or load(path, wanted),
    )
    restored = restore_params(tmp_path, abstract(state.params), step=3)
    assert restored.step == 3 and same(restored.state, state.params)
    assert sorted(asked) == sorted(name_leaves(state.params, part="params"))
    assert same(restore_params(tmp_path, abstract(state.params)).state, jax.tree.map(jnp.zeros_like, state.params))


def test_a_missing_step_says_which_there_are(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint") as error:
        restore_params(tmp_path / "nowhere", abstract(small(0)["params"]))
    assert error.value.exit_code == 3 and restore_latest_good(tmp_path / "nowhere", abstract(small(0))) is None
    save(tmp_path, 3, small(3))
    save(tmp_path, 12, small(12))
    with pytest.raises(UserError, match="no checkpoint of step 7\n  it has steps 3, 12") as error:
        restore(tmp_path, abstract(small(0)), step=7)
    assert error.value.exit_code == 3


def test_what_is_no_checkpoint_is_passed_over(tmp_path, caplog):
    save(tmp_path, 5, small(5))
    for name in ("7", "9.orbax-checkpoint-tmp", "6.pruned", "lost+found", "12abc", "010"):
        (tmp_path / name).mkdir()
    (tmp_path / "11" / "state").mkdir(parents=True)
    (tmp_path / "8").write_text("")
    restored = restore_latest_good(tmp_path, abstract(small(0)))
    assert restored.step == 5 and same(restored.state, small(5))
    skipped = [str(tmp_path / name) for name in ("11", "7", "8")]
    assert [record.getMessage() for record in caplog.records] == [f"no checkpoints, skipped: {', '.join(skipped)}"]


def test_the_newest_is_the_largest_number_not_the_last_word(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, small(step))
    assert restore_latest_good(tmp_path, abstract(small(0))).step == 100


def test_every_difference_is_a_row_and_nothing_is_loaded(tmp_path, monkeypatch):
    save(
        tmp_path,
        5,
        {"params": {"kernel": jnp.ones((4, 2)), "scale": jnp.ones(3), "old": jnp.ones(1)}, "same": jnp.ones(2)},
    )
    wanted = {
        "params": {"kernel": jnp.ones((4, 3)), "scale": jnp.ones(3, jnp.bfloat16)},
        "new": jnp.ones(()),
        "same": jnp.ones(2),
    }
    monkeypatch.setattr(restore_module.ocp, "load_checkpointables", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        restore_latest_good(tmp_path, abstract(wanted))
    assert str(error.value) == (
        f"{tmp_path}/5\n"
        "  does not fit the model and optimizer of this run: 4 arrays differ\n"
        "    path           saved         now\n"
        "    new            -             float32[]\n"
        "    params.kernel  float32[4,2]  float32[4,3]\n"
        "    params.scale   float32[3]    bfloat16[3]\n"
        "    params.old     float32[1]    -\n"
        "  restore with the settings it was saved with, or use a new --workdir"
    )


def test_a_long_table_is_cut_and_counted(tmp_path):
    save(tmp_path, 5, {i: jnp.ones(2) for i in range(30)})
    with pytest.raises(UserError, match=r"30 arrays differ(.|\n)*\.\.\. and 10 more"):
        restore_latest_good(tmp_path, abstract({i: jnp.ones(3) for i in range(30)}))


def test_parameters_that_differ_are_a_table_too(tmp_path):
    save(tmp_path, 5, small(5))
    wanted = abstract({"layers": {0: {"kernel": jnp.ones(3)}}})
    with pytest.raises(UserError, match=r"params.layers.0.kernel  uint32\[64\]  float32\[3\]"):
        restore_params(tmp_path, wanted)


def test_reading_changes_nothing_on_disk(tmp_path):
    save(tmp_path, 5, small(5))
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # a trainer may be saving right now
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    restore_latest_good(tmp_path, abstract(small(0)))
    restore_params(tmp_path, abstract(small(0)["params"]))
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
