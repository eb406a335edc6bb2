"""The report of a run: report.md, loss.png and summary.json from what its workdir holds.

`python -m jaxlm.report WORKDIR` works on a finished run, a killed one and one in progress, and may be repeated: what
only the training process knew (a sample of the model's writing, how the run ended) is kept in summary.json.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.metrics.flops import CONVENTION
from jaxlm.metrics.ledger import PHASES, Account, read_account
from jaxlm.metrics.markdown import code, fenced, plain, table
from jaxlm.metrics.numbers import count_text, duration_text, loss_text
from jaxlm.metrics.summary import Point, Summary, points, smoothed, summarize
from jaxlm.metrics.writer import from_json_values, read_metrics, to_json_values, write_atomically
from jaxlm.settings import Parser, run_main

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RAW, SMOOTH, EVAL, GRAD, INK = "#b9cde6", "#1f4e8c", "#d1495b", "#d9b382", "#333333"
GRAD_INK = "#9c6b26"
SMOOTH_FROM_POINTS = 20


@dataclass(frozen=True)
class Run:
    """All that a report is made from. settings: {section: {key: value}}; origins: "section.key" -> where it came from;
    facts: what the run wrote down about itself (config.json's `run`); the rest: see `write_report`."""

    workdir: Path
    settings: Mapping[str, Mapping[str, Any]]
    origins: Mapping[str, str]
    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    results: Summary
    sample: Mapping[str, Any] | None  # {"step", "text"}
    outcome: Mapping[str, Any] | None
    checkpoint_steps: Sequence[int]
    time: Account | None


def write_report(workdir: str | Path, *, sample: str | None = None, outcome: Mapping[str, Any] | None = None) -> Path:
    """Writes summary.json, loss.png and report.md into the workdir, each atomically; returns the path of report.md.

    sample: text the model wrote, after its prompt. outcome: facts about how the run ended, name -> number or string,
    shown as they are. Without them the ones of the previous summary.json stand; an outcome only while the run has not
    gone on since.
    Raises: UserError if the workdir holds no run or no metrics yet.
    """
    run = _read_run(Path(workdir), sample=sample, outcome=outcome)
    path = run.workdir / "report.md"
    _write(run.workdir / "loss.png", _picture(run))
    _write(run.workdir / "summary.json", (json.dumps(_summary(run), indent=2, allow_nan=False) + "\n").encode())
    _write(path, _markdown(run).encode())
    return path


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        rule = f"the report cannot be written: {error.strerror or error}"
        remedy = "make the workdir writable, with space left, and run it again"
        raise UserError(Problem(str(path), rule, remedy)) from error


def _read_run(workdir: Path, *, sample: str | None, outcome: Mapping[str, Any] | None) -> Run:
    config = _read_json(workdir / "config.json")
    if config is None:
        rule = "no readable config.json: this is not the workdir of a run" if workdir.is_dir() else "no such folder"
        raise UserError(Problem(str(workdir), rule, "give the folder that the run was given as --workdir"))
    records = read_metrics(workdir)
    if not records:
        rule = "metrics.jsonl holds no line yet: there is nothing to report"
        raise UserError(Problem(str(workdir), rule, "wait for the first logged step, or rerun the training command"))
    results = summarize(records)
    previous = _read_json(workdir / "summary.json") or {}
    kept_sample, kept_outcome = previous.get("sample"), previous.get("outcome")
    if (previous.get("results") or {}).get("step") != results.step:
        kept_outcome = None  # it told the end of an earlier part of the run
    checkpoints = workdir / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return Run(
        workdir=workdir,
        settings=config.get("config", {}),
        origins=config.get("from", {}),
        facts=config.get("run", {}),
        records=records,
        results=results,
        sample={"step": results.step, "text": sample} if sample is not None else kept_sample,
        outcome=outcome if outcome is not None else kept_outcome,
        checkpoint_steps=sorted(int(name) for name in names if name.isdecimal()),
        time=read_account(workdir),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = from_json_values(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return content if isinstance(content, dict) else None


def _summary(run: Run) -> dict[str, Any]:
    """What summary.json holds: results (losses exact, null if not measured), facts, settings, sample and outcome."""
    content = {
        "results": dataclasses.asdict(run.results),
        "finished": _is_finished(run),
        "mfu_convention": CONVENTION,
        "mfu_median_causal": _causal_mfu(run),
        "checkpoint_steps": run.checkpoint_steps,
        "time": dataclasses.asdict(run.time) | {"productive_frac": run.time.productive_frac} if run.time else None,
        "run": run.facts,
        "changed_settings": {name: _setting(run, name) for name in _changed(run)},
        "sample": run.sample,
        "outcome": run.outcome,
    }
    return to_json_values(content)


def _is_finished(run: Run) -> bool:
    num_steps = _setting(run, "train.num_steps")
    return num_steps is not None and run.results.step >= num_steps


def _setting(run: Run, name: str) -> Any:
    section, _, key = name.partition(".")
    return run.settings.get(section, {}).get(key)


def _changed(run: Run) -> dict[str, str]:
    """Settings that someone chose, name -> where the value came from; defaults and derived values are left out."""
    return {name: origin for name, origin in run.origins.items() if origin not in ("default", "derived")}


def _causal_mfu(run: Run) -> float | None:
    full, causal = run.facts.get("flops_per_token"), run.facts.get("flops_per_token_causal")
    if run.results.mfu_median is None or not full or not causal:
        return None
    return run.results.mfu_median * causal / full


def _markdown(run: Run) -> str:
    parts = [
        f"# {plain(run.workdir.resolve().name)}",
        _headline(run),
        "![Training and evaluation loss, learning rate and gradient norm by step](loss.png)",
        "## Result",
        table(("", ""), _result_rows(run)),
        f"Losses are nats per token. MFU counts {plain(CONVENTION)}.",
        *(("## Where the time went", _time_section(run.time)) if run.time else ()),
        "## What was trained",
        table(("", ""), _section_rows(run)),
        "## What it ran on",
        _facts_section(run),
        "## Settings that differ from the default",
        _settings_section(run),
    ]
    if run.sample is not None:
        parts += [f"## The model's writing, after step {int(run.sample['step']):,}", fenced(run.sample["text"])]
    parts += ["## Run it again", _again_section(run)]
    return "\n\n".join(parts) + "\n"


def _headline(run: Run) -> str:
    results = run.results
    num_steps = _setting(run, "train.num_steps")
    steps = f"{results.step:,}" + (f" of {num_steps:,}" if num_steps else "") + " steps"
    state = "Finished" if _is_finished(run) else "Not finished"
    tokens = f", {count_text(results.tokens)} tokens" if results.tokens is not None else ""
    best = results.eval_loss_best or results.train_loss_best
    kind = "evaluation" if results.eval_loss_best else "training"
    loss = f" Best {kind} loss **{loss_text(best.value)}** nats per token, at step {best.step:,}." if best else ""
    return f"{state}: {steps}{tokens}.{loss}"


def _loss_cell(point: Point | None) -> str | None:
    if point is None:
        return None
    perplexity = f", perplexity {math.exp(point.value):,.2f}" if point.value < 50 else ""
    return f"{loss_text(point.value)} at step {point.step:,}{perplexity}"


def _result_rows(run: Run) -> list[tuple[str, str]]:
    results = run.results
    end = results.train_loss_smoothed
    rows = {
        "evaluation loss, last": _loss_cell(results.eval_loss_last),
        "evaluation loss, best": _loss_cell(results.eval_loss_best),
        "training loss, last": _loss_cell(results.train_loss_last),
        "training loss, best step": _loss_cell(results.train_loss_best),
        "training loss, smoothed end": f"{end.value:.4f}" if end else None,
        "steps with a non-finite loss": f"{results.num_nonfinite_losses:,}" if results.num_nonfinite_losses else None,
        "tokens": f"{results.tokens:,}" if results.tokens is not None else None,
        "time in steps": duration_text(results.train_time_s) if results.train_time_s else None,
        "step time, median": f"{results.step_time_s_median:.4g} s" if results.step_time_s_median else None,
        "tokens/s, median": f"{results.tokens_per_s_median:,.0f}" if results.tokens_per_s_median else None,
        "waiting for data": f"{100 * results.data_wait_frac:.1f} %" if results.data_wait_frac is not None else None,
        "MFU, median": _mfu_cell(run),
        "checkpoints": ", ".join(f"{step:,}" for step in run.checkpoint_steps) or None,
    }
    outcome = [(plain(str(name)), code(value)) for name, value in (run.outcome or {}).items()]
    return [(name, text) for name, text in rows.items() if text is not None] + outcome


def _time_section(time: Account) -> str:
    rows = [
        (PHASES[phase], f"{spent_s:,.1f} s", f"{spent_s / time.wall_s:.1%}")
        for phase, spent_s in time.spent_s.items()
        if spent_s >= 0.05
    ]
    starts = f"{time.starts} starts" if time.starts > 1 else "one start"
    total = (f"since the first of {starts}", duration_text(time.wall_s), "")
    return table(("", "time", "share"), [*rows, total])


def _mfu_cell(run: Run) -> str:
    if run.results.mfu_median is None:
        return "not known: no peak FLOP/s on record for this device"
    causal = _causal_mfu(run)
    beside = f" (counting causal attention only: {100 * causal:.1f} %)" if causal is not None else ""
    return f"{100 * run.results.mfu_median:.1f} %{beside}"


def _section_rows(run: Run) -> list[tuple[str, str]]:
    """Model, data, mesh, training and optimizer in a row each."""
    wanted = {
        "model": "preset num_layers embed_dim num_heads num_kv_heads mlp_dim vocab_size position norm activation dtype",
        "data": "path train eval split tokenizer",
        "mesh": "pipeline data fsdp context model",
        "train": "num_steps batch_size seq_len accumulate seed",
        "optim": "name peak_lr schedule warmup_steps weight_decay",
    }
    rows = []
    for section, keys in wanted.items():
        values = {key: _setting(run, f"{section}.{key}") for key in keys.split()}
        text = ", ".join(f"{plain(key)} {code(value)}" for key, value in values.items() if value not in (None, [], ""))
        rows.append((section, text or "not recorded"))
    return rows


def _facts_section(run: Run) -> str:
    rows = [(plain(str(name)), code(value)) for name, value in run.facts.items() if name != "command"]
    return table(("", ""), rows) if rows else "Not recorded."


def _settings_section(run: Run) -> str:
    changed = _changed(run)
    if not changed:
        return "None." if run.origins else "Not recorded."
    rows = [(code(name), code(_setting(run, name)), plain(origin)) for name, origin in changed.items()]
    return table(("setting", "value", "from"), rows)


def _again_section(run: Run) -> str:
    command = run.facts.get("command")
    if not command:
        return "The command was not recorded."
    text = command if isinstance(command, str) else shlex.join(map(str, command))
    return (
        f"{fenced(text)}\n\nIn the same workdir it resumes from the newest checkpoint; with an empty `--workdir` it "
        "trains from the start. Every setting of the run, with where its value came from, is in config.json."
    )


def _picture(run: Run) -> bytes:
    """loss.png. Figure without pyplot: no global state, no display, and matplotlib loads only when a report is made."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.8), layout="constrained", facecolor="white", dpi=150)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    loss_axes.set_title(_picture_title(run), loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    _draw_loss(loss_axes, run)
    _draw_lr_and_grad_norm(rate_axes, run)
    rate_axes.set_xlabel("step", color=INK)
    rate_axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step == round(step) else "")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _picture_title(run: Run) -> str:
    parts = [ascii(run.workdir.resolve().name)[1:-1].replace("$", r"\$")]  # $ would begin a formula
    if isinstance(run.facts.get("parameters"), int):
        parts.append(f"{count_text(run.facts['parameters'])} parameters")
    if run.results.tokens is not None:
        parts.append(f"{count_text(run.results.tokens)} tokens")
    return "  ·  ".join(parts)


def _draw_loss(axes: Axes, run: Run) -> None:
    """Raw training loss faint, smoothed on top, evaluations as points; logarithmic unless a loss is not positive."""
    train = points(run.records, key="loss")
    finite = [point for point in train if math.isfinite(point.value)]
    evaluated = [point for point in points(run.records, key="eval_loss") if math.isfinite(point.value)]
    steps = np.array([point.step for point in finite])
    values = np.array([point.value for point in finite])
    if len(values) > SMOOTH_FROM_POINTS:
        axes.plot(steps, values, color=RAW, linewidth=0.7, label="training, each logged step")
        axes.plot(steps, smoothed(values), color=SMOOTH, linewidth=2.0, label="training, smoothed")
    elif len(values):
        axes.plot(steps, values, "o-", color=SMOOTH, linewidth=1.5, markersize=4, label="training, each logged step")
    if evaluated:
        last = evaluated[-1]
        label = f"evaluation, last {last.value:.4f}"
        xy = [point.step for point in evaluated], [point.value for point in evaluated]
        axes.plot(*xy, "o-", color=EVAL, markersize=5, linewidth=1, markeredgecolor="white", label=label)
    lost = [point.step for point in train if not math.isfinite(point.value)]
    if lost:
        axes.plot(lost, [0.02] * len(lost), "x", color=EVAL, transform=axes.get_xaxis_transform(), label="not finite")
    shown = [*values, *(point.value for point in evaluated)]
    if shown and min(shown) > 0:
        _plain_log_axis(axes, low=min(shown), high=max(shown), most_ticks=10)
    axes.set_ylabel("loss, nats per token", color=INK)
    _tidy(axes)
    if shown or lost:
        axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", labelcolor=INK, fontsize=9)


def _plain_log_axis(axes: Axes, *, low: float, high: float, most_ticks: int) -> None:
    """A logarithmic y axis over low..high; ticks are the roundest numbers that fit, written plainly (6, not 6x10^0)."""
    from matplotlib.ticker import FixedLocator, NullLocator

    margin = (high / low) ** 0.04 if high > low else 1.02
    low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for step in (9, 4, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):  # 1; 1 5; 1 3 5 7 9; 1 2 3 ...: each finer than the last
        rounder = [(1 + step * index) * 10.0**decade for decade in decades for index in range(int(9 / step) + 1)]
        for tick in rounder:
            is_free = all(abs(math.log(tick / other)) >= math.log(high / low) / most_ticks for other in ticks)
            if low <= tick <= high and is_free:
                ticks.append(tick)
        if len(ticks) >= most_ticks * 2 / 3:
            break
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _draw_lr_and_grad_norm(axes: Axes, run: Run) -> None:
    grad_axes = axes.twinx()
    lr, grad_norm = (
        [(point.step, point.value) for point in points(run.records, key=key) if math.isfinite(point.value)]
        for key in ("lr", "grad_norm")
    )
    if grad_norm:
        grad_axes.plot(*zip(*grad_norm, strict=True), color=GRAD, linewidth=0.7)
        norms = [norm for _, norm in grad_norm if norm > 0]
        if norms:
            _plain_log_axis(grad_axes, low=min(norms), high=max(norms), most_ticks=4)
    if lr:
        axes.plot(*zip(*lr, strict=True), color=SMOOTH, linewidth=2.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.set_ylim(bottom=0)
    for target, label, color in ((axes, "learning rate", SMOOTH), (grad_axes, "gradient norm", GRAD_INK)):
        target.set_ylabel(label, color=color)
        _tidy(target)
        target.grid(False)
    axes.set_zorder(grad_axes.get_zorder() + 1)  # the learning rate over the noise of the gradient norm
    axes.patch.set_visible(False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(colors=INK, length=0, labelsize=9, which="both")
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m jaxlm.report", description="Write the report of a training run.")
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder the run was given as --workdir")
    print(write_report(parser.parse_args(arguments).workdir))
    return 0


if __name__ == "__main__":
    run_main(main)
