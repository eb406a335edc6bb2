"""model.remat=auto: of the ways that fit, the fastest is taken, and remembered."""

import json

import pytest
import tiny
from hosts import Hosts
from runs import command, final_checkpoint, make_folder, settings

from jaxlm import evaluate, train
from jaxlm.compiled import memory_bytes
from jaxlm.feed import abstract_batch
from jaxlm.parallel.gang import SOLO
from jaxlm.step import abstract_state, compile_step, make_program
from jaxlm.tuning import candidates, remembered, tune

WAYS = ("full", "none")
# the smallest whose step needs more memory where it keeps all
CONFIG = tiny.config(
    num_layers=1, num_heads=1, mlp_dim=256, max_seq_len=128, use_bias=False, remat="auto", train=dict(loss_chunk_tokens=64)
)  # fmt: skip


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, tiny.layout())


@pytest.fixture(scope="module")
def none_bytes(program):
    """What a step needs that keeps all: as an unresolved auto does."""
    step = compile_step(program).lower(abstract_state(program), abstract_batch(program, (8, 128))).compile()
    return memory_bytes(step)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder / "jaxlm"


@pytest.fixture(scope="module")
def found(program, none_bytes, cache, tmp_path_factory):
    """Of a device that is one byte too small to keep all."""
    return tune(SOLO, program, tmp_path_factory.mktemp("run"), ways=WAYS, limit_bytes=none_bytes - 1)


def test_of_the_ways_that_fit_the_fastest_is_taken(found, none_bytes):
    tried = found.facts["tried"]
    fit = {remat: way["step_s"] for remat, way in tried.items() if way["memory_bytes"] < none_bytes}
    assert [*fit] == ["full"] and all(fit.values()) and found.facts["chosen"] == min(fit, key=fit.__getitem__)
    assert found.program.config == tiny.replace(CONFIG, model=dict(remat=found.facts["chosen"]))
    assert [*found.steps] == [(8, 128)] and memory_bytes(found.steps[8, 128]) < none_bytes
    assert tried["none"] == {"memory_bytes": none_bytes, "step_s": None}
    said = str(found)
    assert f"none does not fit, {none_bytes / 2**30:.2f} GiB" in said and "measured" in said
    assert all(f"{remat} {1e3 * took:.1f} ms" in said for remat, took in fit.items())


def test_what_was_found_is_remembered_for_this_step_and_device_alone(program, found, cache, none_bytes, tmp_path):
    again = tune(SOLO, program, tmp_path, limit_bytes=none_bytes - 1)
    assert again.facts == found.facts and not again.steps and "remembered" in str(again)
    assert again.program.config == found.program.config
    (file,) = cache.glob("remat-*.json")
    key = found.facts["key"]
    assert remembered(tmp_path, file, key) == json.loads(file.read_text()) == found.facts
    assert remembered(tmp_path, file, "another") is None
    file.with_name("torn.json").write_text(file.read_text()[:-9])
    assert remembered(tmp_path, file.with_name("torn.json"), key) is None


def test_a_config_that_names_a_way_has_it(tmp_path):
    program = make_program(tiny.replace(CONFIG, model=dict(remat="full")), tiny.layout())
    assert tune(SOLO, program, tmp_path).program is program


@pytest.mark.nightly
def test_a_resume_has_the_way_of_its_checkpoint_and_tools_have_none(cache, tmp_path, capsys):
    make_folder(tmp_path)
    words = command(tmp_path, "run", *settings("model.remat=auto", "checkpoint.every_steps=2", "optim.warmup_steps=0"))

    def said_by(steps: int) -> str:
        assert train.main([*words, *settings(f"train.num_steps={steps}", "optim.schedule=constant")]) == 0
        return capsys.readouterr().out

    before = {*cache.glob("*")}
    assert ", measured (" in said_by(4)
    saved = final_checkpoint(tmp_path / "run").metadata
    tried = saved["remat"]["tried"]
    assert [*tried] == candidates(CONFIG) and len(tried) == 4 and all(way["step_s"] > 0 for way in tried.values())
    assert saved["remat"]["chosen"] == min(tried, key=lambda remat: tried[remat]["step_s"])
    assert saved["config"]["model"]["remat"] == "auto"
    for file in {*cache.glob("*")} - before:
        file.unlink()
    assert f"{saved['remat']['chosen']}, remembered (" in (said := said_by(6)) and "model.remat" not in said
    assert final_checkpoint(tmp_path / "run").metadata["remat"] == saved["remat"]
    (data,) = (tmp_path / "run" / "data").glob("*.idx")
    assert evaluate.main(["--workdir", str(tmp_path / "run"), "--data", str(data.with_suffix(""))]) == 0
    assert {*cache.glob("*")} == before


@pytest.mark.nightly
def test_all_processes_take_the_way_that_process_0_found(cache, tmp_path):
    make_folder(tmp_path)
    words = settings("model.remat=auto", "model.num_layers=1", "optim.warmup_steps=0", "optim.schedule=constant")
    for steps, how in ((3, "measured"), (5, "remembered")):
        hosts = Hosts(tmp_path, "pair", *words, *settings(f"train.num_steps={steps}"), count=2, devices=4)
        assert hosts.ends() == [0, 0], hosts.everything()
        said = json.loads((tmp_path / "pair" / "config.json").read_text())["run"]["remat_choice"]
        assert f", {how} (" in said and said in hosts.said(0)
