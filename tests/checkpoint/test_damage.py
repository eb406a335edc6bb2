"""Files that rot, are cut or vanish: it is always told, and the newest sound step is taken."""

import os
import random
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import abstract, make_state, same
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.restore import restore, restore_latest_good
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import UserError

restore_params = partial(restore, step=None, part="params")

WIDTH = 4096
LIKE = abstract(make_state(0, width=WIDTH))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 9 and 10 as they were saved. Files above 4 kB, which hold arrays, have no digest: checksums alone guard them."""
    directory = tmp_path_factory.mktemp("damage") / "saved"
    with pytest.MonkeyPatch.context() as patched, CheckpointStore(directory) as store:
        patched.setattr(manifest, "DIGEST_BELOW_BYTES", 4096)
        for step in (9, 10):
            store.save(step, make_state(step, width=WIDTH), metadata={"step": step})
            store.wait()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of them to spoil."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def kinds(path):
    """The files of a step by kind: random names of data files don't count."""
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return {str(file) if file.parent.name != "d" else f"{file.parent}/*": path / file for file in files}


def flip(file, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def offset_of(leaf, file) -> int:
    return file.read_bytes().index(np.asarray(leaf).tobytes())


def fall_back(directory) -> bool:
    """Whether step 10 is passed over for 9; either way what is restored is right."""
    restored = restore_latest_good(directory, LIKE)
    assert same(restored.state, make_state(restored.step, width=WIDTH)) and restored.metadata == {"step": restored.step}
    return restored.step == 9


def test_every_file_of_a_step_cut_or_gone_means_the_step_before(saved, directory, caplog):
    files = kinds(saved / "10")
    assert {"step.json", "_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0/d/*"} <= files.keys()
    for kind, source in files.items():
        file = directory / source.relative_to(saved)
        size = file.stat().st_size
        for left in {0, size // 2, size * 99 // 100} - {size}:
            os.truncate(file, left)
            caplog.clear()
            assert fall_back(directory), f"{kind} cut to {left} of {size} bytes"
            assert str(file) in caplog.text and "step 10 is passed over" in caplog.text
            shutil.copy(source, file)
        file.unlink()
        assert fall_back(directory), f"{kind} gone"
        assert (directory / "10").is_dir(), "a bad step is never deleted"
        shutil.copy(source, file)
    assert not fall_back(directory)


@pytest.mark.parametrize("flips", [4, pytest.param(100, marks=pytest.mark.nightly)])
def test_any_flipped_bit_is_found_in_any_kind_of_file(saved, directory, flips):
    """A flip that nothing reads, as in the unused end of a data file's block, may be passed: what is loaded is right."""
    rng, found = random.Random(flips), {}
    for kind, source in kinds(saved / "10").items():
        file, size = directory / source.relative_to(saved), source.stat().st_size
        for _ in range(flips if size else 0):
            flip(file, rng.randrange(8 * size))
            found[kind] = found.get(kind, 0) + fall_back(directory)
            shutil.copy(source, file)
    print(found)
    assert set(found.values()) == {flips}, found


def test_a_flipped_bit_names_its_array_and_hurts_only_those_who_load_it(saved, directory, caplog):
    state, file = (
        make_state(10, width=WIDTH),
        directory / kinds(saved / "10")["state/ocdbt.process_0/d/*"].relative_to(saved),
    )
    flip(file, 8 * offset_of(state["moments"].mu, file) + 5)
    assert restore_params(directory, LIKE["params"]).step == 10
    with pytest.raises(UserError, match=r"checksum differs from what was saved: moments\.mu\n") as error:
        restore(directory, LIKE, step=10)
    assert error.value.exit_code == 3
    flip(file, 8 * offset_of(state["params"]["layers"][1]["kernel"], file) + 7)
    restored = restore_params(directory, LIKE["params"])
    assert restored.step == 9 and same(restored.state, make_state(9, width=WIDTH)["params"])
    assert "params.layers.1.kernel" in caplog.text


def test_facts_that_changed_beside_sound_arrays_are_damage_too(directory):
    file = directory / "10" / "step.json"
    before = file.read_text()
    assert '"metadata": {"step": 10}' in before
    file.write_text(before.replace('"metadata": {"step": 10}', '"metadata": {"step": 11}'))
    assert fall_back(directory)


def test_nothing_sound_left_is_an_error_that_lists_what_was_tried(directory):
    for step, name in ((9, "step.json"), (10, "state/manifest.ocdbt")):
        (directory / str(step) / name).unlink()
    with pytest.raises(UserError) as error:
        restore_latest_good(directory, LIKE)
    assert error.value.exit_code == 3 and len(error.value.problems) == 1
    assert all(
        f"{directory}/{name}: missing" in str(error.value) for name in ("9/step.json", "10/state/manifest.ocdbt")
    )


def test_another_shape_is_the_callers_error_and_no_reason_to_go_back(directory):
    with CheckpointStore(directory) as store:
        store.save(11, make_state(11, width=64))
    with pytest.raises(UserError, match=rf"{directory}/11\n  does not fit"):
        restore_latest_good(directory, LIKE)


def test_a_run_that_fell_back_moves_the_bad_steps_aside_when_it_saves(directory):
    (directory / "10" / "step.json").write_text("{}")
    (directory / "12").mkdir()  # no checkpoint: it is not in the way of 11
    with CheckpointStore(directory) as store:
        assert store.restore_latest_good(LIKE).step == store.committed_step == 9
        assert committed_steps(store.directory) == [9, 10], "nothing has happened yet"
        store.save(10, make_state(10, width=WIDTH), metadata={"step": 10})
    assert not fall_back(directory)
    assert (directory / "abandoned" / "10" / "step.json").read_text() == "{}"
    (note,) = (directory / "abandoned" / "notes.txt").read_text().splitlines()
    assert "10/step.json: unreadable" in note and note.endswith("the run went on from step 9")


def test_a_bad_step_keeps_no_good_one_from_being_kept(directory):
    os.truncate(kinds(directory / "10")["state/ocdbt.process_0/d/*"], 100)
    with CheckpointStore(directory) as store:
        for step in (11, 12):
            store.save(step, make_state(step, width=WIDTH))
    assert committed_steps(store.directory) == [9, 10, 11, 12]


def test_order_is_by_step_whatever_the_clocks_say(directory):
    for step, when in ((9, 2e9), (10, 1e9)):
        for entry in (directory / str(step), *(directory / str(step)).rglob("*")):
            os.utime(entry, (when, when))
    assert not fall_back(directory)


def test_a_step_without_its_manifest_is_never_loaded_and_never_taken_for_no_step(tmp_path):
    ocp.save_checkpointables(str(tmp_path / "4"), {"state": {"kernel": jnp.arange(8.0)}})
    with pytest.raises(UserError, match=r"none of its checkpoints is sound:\n.*4/step.json: missing") as caught:
        restore_latest_good(tmp_path, abstract({"kernel": jnp.ones(8)}))
    assert caught.value.exit_code == 3


def test_being_out_of_memory_is_no_word_against_a_step(directory, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp, "load_checkpointables", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore_latest_good(directory, LIKE)


def test_a_note_that_can_not_be_written_does_not_keep_a_run_from_saving(directory):
    array = next(file for kind, file in kinds(directory / "10").items() if kind.endswith("/*"))
    flip(array, 8 * (array.stat().st_size // 2))
    (directory / "abandoned" / "notes.txt").mkdir(parents=True)  # opening it fails, as on a full disk
    (directory / "abandoned" / "10-1").mkdir()
    with CheckpointStore(directory) as store:
        restored = store.restore_latest_good(LIKE)
        assert restored.step == 9 and 10 in restored.passed_over
        store.save(10, make_state(10, width=WIDTH), metadata={"step": 10})
        assert [outcome.error for outcome in store.close()] == [None]
    assert (directory / "abandoned" / "10").is_dir() and not fall_back(directory)
