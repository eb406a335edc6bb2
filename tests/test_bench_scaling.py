"""The table of scripts/bench_scaling.py: what its rows mean, what is predicted of them, and that a run of it goes on."""

import json
import math

import bench_scaling
import pytest
from bench_scaling import TABLE, Row, exchange_s, main, markdown, predicted
from bench_step import cases

from jaxlm.parallel.hlo import Collective


def test_every_row_is_a_config_of_its_own_on_one_to_eight_gpus():
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        (case,) = cases([], [], row.config, row.overrides)
        assert math.prod(case.config.mesh.degrees.values()) == row.gpus in (1, 2, 4, 8)
        assert case.config.train.batch_size == row.rows and row.name.startswith(row.model)


def test_a_row_is_predicted_from_what_it_sends_and_from_the_fewest_gpus_that_were_measured():
    mesh = {"fsdp": 4, "data": 2}
    payload = (
        17e9 * 0.75
    )  # three quarters of it leave a device where four share it: 75 ms at 170 GB/s, but for the latency
    times = {
        kind: exchange_s(Collective(kind, ("fsdp",), int(payload), 1), mesh) for kind in ("all-gather", "all-reduce")
    }
    assert times["all-gather"] == pytest.approx(0.75 * 0.075, rel=1e-3)
    assert times["all-reduce"] == pytest.approx(2 * 0.75 * 0.075, rel=1e-3)
    whole = Collective("collective-permute", ("data", "fsdp"), int(payload), 1)
    assert exchange_s(whole, mesh) == pytest.approx(0.075, rel=1e-3)
    assert predicted(100, 10, bubble=0.0, exchange_s=10) == (5, 10)
    assert predicted(100, 10, bubble=0.25, exchange_s=20) == (100 / 32.5, 5)
    one, two, eight = (next(r for r in TABLE if r.model == "gpt2-124m" and r.mesh == {"data": n}) for n in (1, 2, 8))
    done = {
        (one.name, "measured"): {"tokens_per_s": 500.0, "memory_bytes": 2**30},
        (two.name, "measured"): {"tokens_per_s": 900.0, "memory_bytes": 2**30},
        (eight.name, "compiled"): {
            "memory_bytes": 2**31,
            "sent_bytes": {"all-reduce": 10**9},
            "exchange_s": 0.5,
            "tokens": 8000,
        },
    }
    lines = markdown([one, two, eight], done).splitlines()[2:]
    assert lines[1] == f"| {two.name} | 2 | 1.0 |  |  | 450 | 0.900 |  |"
    assert lines[2] == f"| {eight.name} | 8 | 2.0 | 1.0 GB | 400 to 500 |  |  |  |"


@pytest.mark.nightly
def test_a_run_goes_on_where_it_was_and_says_what_failed(tmp_path, monkeypatch, capsys):
    small = {"model.preset": "none", "model.num_layers": "1", "model.embed_dim": "32", "model.num_heads": "2"}
    small |= {"model.vocab_size": "64", "model.max_seq_len": "16", "model.dtype": "float32"}
    rows = [
        Row("tiny", "configs/gpt2.py:124m", {"data": 8}, 8, small),
        Row("wrong", "configs/gpt2.py:124m", {"data": 8}, 8, small | {"model.num_heads": "5"}),
        Row("large", "configs/gpt2.py:124m", {"data": 16}, 16, small),
    ]
    monkeypatch.setattr(bench_scaling, "TABLE", rows)
    out = tmp_path / "scaling.jsonl"
    for _ in range(2):
        assert main(["--out", str(out), "--gpus", "8", "--steps", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [rows[0].name, rows[1].name, rows[1].name]  # an error is tried again
    assert lines[0]["tokens_per_s"] > 0 and lines[1]["error"].startswith("model.num_heads=5 does not divide")
    assert "| tiny data=8 8 rows | 8 |" in capsys.readouterr().out
