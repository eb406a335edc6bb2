"""The benchmark of a step: what a shape says, what a peer is told of it, and how the two compare."""

import json
import sys

import pytest
import tiny
from bench_step import cases
from peer import compared, job, run_peer

from jaxlm.config import UserError

ECHO = "import sys, json; lines = sys.stdin.read().splitlines(); print(*lines[:{}], sep='\\n'); sys.exit(3)"


def peer_that_answers(count: int) -> str:
    return f'{sys.executable} -c "{ECHO.format(count)}"'


def test_a_shape_takes_the_place_of_the_configs_numbers_and_nothing_else():
    mine = cases(["16,2048,16,8,5632,32000,512"], [2, 4], "configs/llama2.py", {"mesh.fsdp": "2"})
    assert [case.config.train.batch_size for case in mine] == [2, 4]
    model, train = mine[0].config.model, mine[0].config.train
    assert (model.num_layers, model.embed_dim, model.num_heads, model.num_kv_heads) == (16, 2048, 16, 8)
    assert (model.mlp_dim, model.vocab_size, train.seq_len, train.accumulate, model.head_dim) == (
        5632,
        32000,
        512,
        1,
        128,
    )
    assert (model.position, model.norm, model.activation, model.tie_embeddings) == ("rope", "rmsnorm", "swiglu", False)
    (gpt,) = cases(["2,64,4,300,32,8"], [], "configs/llama2.py", {})
    assert (gpt.config.model.num_kv_heads, gpt.config.model.mlp_dim, gpt.config.train.batch_size) == (4, 256, 8)
    (own,) = cases([], [], "configs/gpt2.py:355m", {"train.batch_size": "6"})
    assert (own.shape, own.config.model.num_layers, own.config.train.batch_size) == ("configs/gpt2.py:355m", 24, 6)
    with pytest.raises(UserError, match="3 numbers are no shape"):
        cases(["1,2,3"], [], "configs/gpt2.py", {})


@pytest.mark.parametrize(
    ("mesh", "replicas", "shards"),
    [({}, -1, 1), ({"fsdp": 2}, -1, 2), ({"data": 1, "fsdp": -1}, 1, -1), ({"data": 2, "fsdp": 4, "model": 2}, 2, 8)],
)
def test_a_peer_is_told_the_resolved_numbers_and_how_many_devices_share_the_parameters(mesh, replicas, shards):
    told = job(tiny.replace(tiny.config("llama"), mesh=mesh))
    assert (told["replicas"], told["shards"]) == (replicas, shards)
    assert (told["rows"], told["seq_len"], told["vocab_size"], told["vocab_rows"]) == (8, 16, 61, 64)
    assert (told["num_kv_heads"], told["head_dim"], told["mlp_dim"], told["position"]) == (2, 4, 40, "rope")


def test_what_a_peer_has_not_is_refused_before_it_is_started():
    config = tiny.replace(tiny.config("bloom"), optim=dict(name="lion"))
    with pytest.raises(UserError, match=r"(?s)position=alibi.*embed_norm=True.*optim.name=lion"):
        job(config)


def test_a_peer_answers_each_job_or_the_error_says_how_it_ended():
    jobs = [{"rows": 1}, {"rows": 2}]
    assert list(run_peer(peer_that_answers(2), jobs)) == jobs
    with pytest.raises(UserError, match="ended with code 3"):
        list(run_peer(peer_that_answers(1), jobs))


def test_ours_is_compared_at_the_same_rows_and_each_at_its_best():
    found = compared({1: 10.0, 2: 18.0, 4: 24.0}, {1: 8.0, 2: 16.0})
    assert found == {"ratio": 1.5, "rows": 4, "peer_rows": 2, "ratio_by_rows": {1: 1.25, 2: 1.125}}
    assert compared({}, {1: 8.0}) == {"ratio": None, "rows": None, "peer_rows": 1, "ratio_by_rows": {}}
    assert json.loads(json.dumps(found))["ratio_by_rows"] == {"1": 1.25, "2": 1.125}
