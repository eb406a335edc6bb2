"""The report says what the metrics file holds, exactly, and nothing a run holds can break it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from markdown_it import MarkdownIt

from jaxlm.config import Config, UserError
from jaxlm.metrics import writer
from jaxlm.metrics.summary import smoothed, summarize
from jaxlm.metrics.writer import MetricsLog
from jaxlm.report import main, write_report

HOSTILE = (
    "```\n</code></pre><script>alert(1)</script>\n````` | # heading\n~~~\n- [x](javascript:1)\n"
    "\x1b[31m\x00\u202e\ud800 end"
)


def losses_of(num_steps: int) -> list[float]:
    steps = np.arange(1, num_steps + 1)
    return [float(loss) for loss in np.float32(2 + 4 * steps**-0.5 + 0.05 * np.sin(steps * 1.7))]


def make_run(workdir, num_steps=40, *, planned=40, start=1, run=None):
    workdir.mkdir(exist_ok=True)
    config = dataclasses.asdict(dataclasses.replace(Config()))
    config["train"]["num_steps"] = planned
    config["data"]["path"] = ["/a|b/`c`<i>.txt"]
    origins = {f"{section}.{key}": "default" for section in config for key in config[section]}
    origins |= {"train.num_steps": "command line", "data.path": "file configs/x.py", "train.seq_len": "derived"}
    facts = {"parameters": 124_439_808, "flops_per_token": 855_166_464, "flops_per_token_causal": 798_543_360}
    facts |= {"device_kind": "NVIDIA H100 80GB HBM3", "command": ["python", "-m", "jaxlm.train", "--workdir", "a b"]}
    content = {"config": config, "from": origins, "run": facts if run is None else run}
    (workdir / "config.json").write_text(json.dumps(content))
    with MetricsLog(workdir, tensorboard=False, resume_step=start - 1) as log:
        for step, loss in enumerate(losses_of(num_steps), start=1):
            if step >= start:
                rates = {"step_time_s": 0.5, "tokens_per_s": 128.0, "mfu": 0.4, "data_wait_s": 0.05}
                log.write({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64 * step, **rates})
                if step % 10 == 0:
                    log.write({"step": step, "eval_loss": loss + 0.125})
    return workdir


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_results_are_those_of_the_metrics_file_to_the_bit(tmp_path):
    path = write_report(make_run(tmp_path / "run"))
    losses, results = losses_of(40), summary_of(tmp_path / "run")["results"]
    best = int(np.argmin(losses))
    assert results["train_loss_last"] == {"step": 40, "value": losses[-1]}
    assert results["train_loss_best"] == {"step": best + 1, "value": losses[best]}
    evaluated = {step: losses[step - 1] + 0.125 for step in (10, 20, 30, 40)}
    best_step = min(evaluated, key=evaluated.get)
    assert results["eval_loss_best"] == {"step": best_step, "value": evaluated[best_step]}
    assert results["eval_loss_last"] == {"step": 40, "value": evaluated[40]}
    assert (results["tokens"], results["train_time_s"], results["mfu_median"]) == (2560, 20.0, 0.4)
    assert results["data_wait_frac"] == pytest.approx(0.1, rel=1e-12)  # 40 sums of 0.05, rounded each
    assert summary_of(tmp_path / "run")["mfu_median_causal"] == pytest.approx(0.4 * 798_543_360 / 855_166_464)
    text = path.read_text()
    assert str(np.float32(losses[-1])) in text and "PaLM / nanoGPT convention" in text
    assert "Finished: 40 of 40 steps" in text and "jaxlm.train --workdir 'a b'" in text


def test_the_picture_is_a_png_of_readable_size(tmp_path):
    write_report(make_run(tmp_path / "run"))
    data = (tmp_path / "run" / "loss.png").read_bytes()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert data.startswith(b"\x89PNG\r\n") and width > 1000 and height > 700


def test_only_chosen_settings_are_listed_with_where_they_came_from(tmp_path):
    text = write_report(make_run(tmp_path / "run")).read_text()
    section = text.split("## Settings that differ from the default")[1].split("##")[0]
    assert "| `train.num_steps` | `40` | command line |" in section and "configs/x.py" in section
    assert "seq_len" not in section and section.count("\n| `") == 2
    assert set(summary_of(tmp_path / "run")["changed_settings"]) == {"train.num_steps", "data.path"}


@pytest.mark.parametrize("sample", [HOSTILE, "", "`", "```", "\n```\n", "````text\n" * 3, "tail `````"])
def test_no_sample_can_leave_its_block(tmp_path, sample):
    make_run(tmp_path / "run", run={"<script>": "a|b`c\n# d", "command": "x ``` y"})
    path = write_report(tmp_path / "run", sample=sample)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(path.read_text())
    fences = [token.content for token in tokens if token.type == "fence"]
    assert len(fences) == 2 and fences[1] == "x ``` y\n"
    if sample is not HOSTILE:
        assert fences[0] == sample + "\n"
    everything = tokens + [child for token in tokens for child in token.children or []]
    assert not [token.content for token in everything if token.type.startswith("html")]
    headings = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    assert headings == [
        "run", "Result", "What it ran on", "Settings that differ from the default",
        "The model's writing, after step 40", "Run it again",
    ]  # fmt: skip
    assert path.read_text().replace("\n", "").isprintable()
    assert summary_of(tmp_path / "run")["sample"] == {"step": 40, "text": sample}


def test_the_report_made_again_later_is_the_same(tmp_path):
    path = write_report(make_run(tmp_path / "run"), sample=HOSTILE)
    first = path.read_bytes(), (tmp_path / "run" / "summary.json").read_bytes()
    assert main([str(tmp_path / "run")]) == 0
    assert (path.read_bytes(), (tmp_path / "run" / "summary.json").read_bytes()) == first


def test_a_run_that_went_on_keeps_its_dated_sample(tmp_path):
    write_report(make_run(tmp_path / "run", 20), sample="once")
    text = write_report(make_run(tmp_path / "run", 30, start=21)).read_text()
    assert "after step 20" in text and "Not finished: 30 of 40 steps" in text


def test_a_run_in_progress_has_a_report(tmp_path):
    make_run(tmp_path / "run", 1, run={})
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in ("10", "9", "11.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    text = write_report(tmp_path / "run").read_text()
    assert "Not finished: 1 of 40 steps" in text and "| checkpoints | 9, 10 |" in text


@pytest.mark.parametrize("loss", [float("nan"), 0.0, -1.0, 1e-30, 1e30, 2.0])
def test_any_loss_can_be_reported(tmp_path, loss):
    make_run(tmp_path / "run", 1)
    with MetricsLog(tmp_path / "run", tensorboard=False, resume_step=0) as log:
        log.write({"step": 1, "loss": loss, "grad_norm": loss, "lr": 0.0})
        log.write({"step": 1, "eval_loss": loss})
    write_report(tmp_path / "run")
    assert json.dumps(summary_of(tmp_path / "run"), allow_nan=False)


@pytest.mark.parametrize("make", ["missing", "empty", "unlogged", "no config"])
def test_a_folder_without_a_run_is_a_three_line_error_and_exit_2(tmp_path, make):
    workdir = tmp_path / "run"
    if make != "missing":
        make_run(workdir)
    if make in ("empty", "unlogged"):
        (workdir / "metrics.jsonl").unlink()
    if make in ("empty", "no config"):
        (workdir / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        main([str(workdir)])
    assert caught.value.exit_code == 2 and str(caught.value).count("\n") == 2 and str(workdir) in str(caught.value)
    assert not (workdir / "report.md").exists()


def test_a_crash_while_writing_leaves_the_previous_report(tmp_path, monkeypatch):
    path = write_report(make_run(tmp_path / "run"), sample="first")
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "run", sample="second")
    assert path.read_bytes() == before


def test_the_command_prints_the_path_of_the_report(tmp_path):
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "jaxlm.report", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'run' / 'report.md'}\n", "")


def test_time_counts_every_step_when_only_some_are_logged():
    records = [{"step": step, "loss": 1.0, "step_time_s": 2.0} for step in (10, 20, 30, 35)]
    assert summarize(records).train_time_s == 70.0
    assert summarize(records[2:]).train_time_s == 20.0  # a file without its beginning: (5 + 5) steps


def test_smoothing_keeps_a_constant_and_the_first_value_and_shrinks_noise():
    assert smoothed(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0), rel=1e-12)
    noise = np.random.default_rng(0).normal(size=2000)
    assert smoothed(noise)[0] == noise[0]
    # two passes over 51 points are a triangle, whose variance is 2/3 of one pass's 1/51
    assert smoothed(noise)[300:1900].std() == pytest.approx((2 / 3 / 51) ** 0.5, rel=0.25)
