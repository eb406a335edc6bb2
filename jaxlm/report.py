"""The report of a run: report.md, loss.png and summary.json from what its workdir holds.

`python -m jaxlm.report WORKDIR` works on a finished run, a killed one and one in progress, and may be repeated: what
only the training process knew, a sample of the model's writing, is kept in summary.json.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import Problem, UserError
from jaxlm.files import mendable, write_whole
from jaxlm.metrics.ledger import PHASES, Account, read_account
from jaxlm.metrics.summary import Point, Summary, points, smoothed, summarize
from jaxlm.metrics.text import code, count_text, duration_text, fenced, loss_text, plain, table
from jaxlm.metrics.throughput import CONVENTION
from jaxlm.metrics.writer import from_json_values, read_metrics, to_json_values
from jaxlm.settings import Parser, flatten, run_main

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RAW, SMOOTH, EVAL, GRAD, GRAD_INK, INK = "#b9cde6", "#1f4e8c", "#d1495b", "#d9b382", "#9c6b26", "#333333"
SMOOTH_FROM_POINTS = 20


@dataclass(frozen=True)
class Run:
    """All that a report is made from. settings: "section.key" -> value; origins: "section.key" -> where it came from;
    facts: what the run wrote down about itself (config.json's `run`); the rest: see `write_report`."""

    workdir: Path
    settings: Mapping[str, Any]
    origins: Mapping[str, str]
    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    results: Summary
    sample: Mapping[str, Any] | None  # {"step", "text"}
    checkpoint_steps: Sequence[int]
    time: Account | None

    @property
    def is_finished(self) -> bool:
        return self.results.step >= self.settings.get("train.num_steps", math.inf)

    @property
    def chosen(self) -> list[str]:
        """Settings that someone chose; defaults and derived values are left out."""
        return [name for name, origin in self.origins.items() if origin not in ("default", "derived")]

    @property
    def causal_mfu(self) -> float | None:
        full, causal = self.facts.get("flops_per_token"), self.facts.get("flops_per_token_causal")
        mfu = self.results.mfu_median
        return None if mfu is None or not full or not causal else mfu * causal / full


def write_report(workdir: str | Path, *, sample: str | None = None) -> Path:
    """Writes summary.json, loss.png and report.md into the workdir, each atomically; returns the path of report.md.

    sample: text the model wrote, after its prompt; without it the one of the previous summary.json stands.
    Raises: UserError if the workdir holds no run or no metrics yet.
    """
    run = _read_run(Path(workdir), sample=sample)
    summary = json.dumps(_summary(run), indent=2, allow_nan=False) + "\n"
    files = {"loss.png": _picture(run), "summary.json": summary.encode(), "report.md": _markdown(run).encode()}
    for name, data in files.items():
        path, remedy = run.workdir / name, "make the workdir writable, with space left, and run it again"
        with mendable(str(path), "the report", remedy):
            write_whole(path, data)
    return run.workdir / "report.md"


def _read_run(workdir: Path, *, sample: str | None) -> Run:
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
    return Run(
        workdir=workdir,
        settings=dict(flatten(config.get("config", {}))),
        origins=config.get("from", {}),
        facts=config.get("run", {}),
        records=records,
        results=results,
        sample={"step": results.step, "text": sample} if sample is not None else previous.get("sample"),
        checkpoint_steps=sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal()),
        time=read_account(workdir),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return from_json_values(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _summary(run: Run) -> dict[str, Any]:
    """What summary.json holds: results (losses exact, null if not measured), facts, settings and sample."""
    content = {
        "results": dataclasses.asdict(run.results),
        "finished": run.is_finished,
        "mfu_convention": CONVENTION,
        "mfu_median_causal": run.causal_mfu,
        "checkpoint_steps": run.checkpoint_steps,
        "time": dataclasses.asdict(run.time) | {"productive_frac": run.time.productive_frac} if run.time else None,
        "run": run.facts,
        "changed_settings": {name: run.settings.get(name) for name in run.chosen},
        "sample": run.sample,
    }
    return to_json_values(content)


def _markdown(run: Run) -> str:
    facts = [(plain(str(name)), code(value)) for name, value in run.facts.items() if name != "command"]
    chosen = [(code(name), code(run.settings.get(name)), plain(run.origins[name])) for name in run.chosen]
    convention = f"Losses are nats per token. MFU counts {plain(CONVENTION)}."
    settings = table(("setting", "value", "from"), chosen) if chosen else "None." if run.origins else "Not recorded."
    sections = {
        "Result": f"{table(('', ''), _result_rows(run))}\n\n{convention}",
        "Where the time went": _time_table(run.time) if run.time else None,
        "What it ran on": table(("", ""), facts) if facts else "Not recorded.",
        "Settings that differ from the default": settings,
    }
    if run.sample is not None:
        sections[f"The model's writing, after step {run.sample['step']:,}"] = fenced(run.sample["text"])
    sections["Run it again"] = _again(run.facts.get("command"))
    picture = "![Training and evaluation loss, learning rate and gradient norm by step](loss.png)"
    parts = [f"# {plain(run.workdir.resolve().name)}", _headline(run), picture]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _headline(run: Run) -> str:
    results, num_steps = run.results, run.settings.get("train.num_steps")
    planned = f" of {num_steps:,}" if num_steps else ""
    tokens = f", {count_text(results.tokens)} tokens" if results.tokens is not None else ""
    text = f"{'Finished' if run.is_finished else 'Not finished'}: {results.step:,}{planned} steps{tokens}."
    for kind, best in (("evaluation", results.eval_loss_best), ("training", results.train_loss_best)):
        if best:
            return f"{text} Best {kind} loss **{loss_text(best.value)}** nats per token, at step {best.step:,}."
    return text


def _result_rows(run: Run) -> list[tuple[str, str]]:
    results = run.results
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("evaluation loss, last", results.eval_loss_last, _loss_cell),
        ("evaluation loss, best", results.eval_loss_best, _loss_cell),
        ("training loss, last", results.train_loss_last, _loss_cell),
        ("training loss, best step", results.train_loss_best, _loss_cell),
        ("training loss, smoothed end", results.train_loss_smoothed, lambda end: f"{end.value:.4f}"),
        ("steps with a non-finite loss", results.num_nonfinite_losses or None, "{:,}".format),
        ("tokens", results.tokens, "{:,}".format),
        ("time in steps", results.train_time_s or None, duration_text),
        ("step time, median", results.step_time_s_median, "{:.4g} s".format),
        ("tokens/s, median", results.tokens_per_s_median, "{:,.0f}".format),
        ("waiting for data", results.data_wait_frac, lambda frac: f"{100 * frac:.1f} %"),
        ("MFU, median", _mfu_cell(run), str),
        ("checkpoints", run.checkpoint_steps or None, lambda steps: ", ".join(f"{step:,}" for step in steps)),
    ]
    return [(name, show(value)) for name, value, show in rows if value is not None]


def _loss_cell(point: Point) -> str:
    perplexity = f", perplexity {math.exp(point.value):,.2f}" if point.value < 50 else ""
    return f"{loss_text(point.value)} at step {point.step:,}{perplexity}"


def _mfu_cell(run: Run) -> str:
    if run.results.mfu_median is None:
        return "not known: no peak FLOP/s on record for this device"
    beside = "" if run.causal_mfu is None else f" (counting causal attention only: {100 * run.causal_mfu:.1f} %)"
    return f"{100 * run.results.mfu_median:.1f} %{beside}"


def _time_table(time: Account) -> str:
    spent = [(PHASES[phase], spent_s) for phase, spent_s in time.spent_s.items() if spent_s >= 0.05]
    rows = [(words, f"{spent_s:,.1f} s", f"{spent_s / time.wall_s:.1%}") for words, spent_s in spent]
    return table(("", "time", "share"), [*rows, (time.since, duration_text(time.wall_s), "")])


def _again(command: str | Sequence[str] | None) -> str:
    if not command:
        return "The command was not recorded."
    return (
        f"{fenced(command if isinstance(command, str) else shlex.join(command))}\n\n"
        "In the same workdir it resumes from the newest checkpoint; with an empty `--workdir` it "
        "trains from the start. Every setting of the run, with where its value came from, is in config.json."
    )


def _picture(run: Run) -> bytes:
    """loss.png. Figure without pyplot: no global state, no display, and matplotlib loads only when a report is made."""
    from matplotlib.figure import Figure

    title = [ascii(run.workdir.resolve().name)[1:-1].replace("$", r"\$")]  # $ would begin a formula
    for count, what in ((run.facts.get("parameters"), "parameters"), (run.results.tokens, "tokens")):
        title += [f"{count_text(count)} {what}"] if isinstance(count, int) else []
    figure = Figure(figsize=(9.5, 6.8), layout="constrained", facecolor="white", dpi=150)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    loss_axes.set_title("  ·  ".join(title), loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    _draw_loss(loss_axes, run)
    _draw_lr_and_grad_norm(rate_axes, run)
    rate_axes.set_xlabel("step", color=INK)
    rate_axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step == round(step) else "")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a field where it is finite."""
    found = points(run.records, key=key, finite=True)
    return np.array([point.step for point in found]), np.array([point.value for point in found])


def _draw_loss(axes: Axes, run: Run) -> None:
    """Raw training loss faint, smoothed on top, evaluations as points; logarithmic unless a loss is not positive."""
    (steps, losses), (eval_steps, eval_losses) = _curve(run, "loss"), _curve(run, "eval_loss")
    each = "training, each logged step"
    if len(losses) > SMOOTH_FROM_POINTS:
        axes.plot(steps, losses, color=RAW, linewidth=0.7, label=each)
        axes.plot(steps, smoothed(losses), color=SMOOTH, linewidth=2.0, label="training, smoothed")
    elif len(losses):
        axes.plot(steps, losses, "o-", color=SMOOTH, linewidth=1.5, markersize=4, label=each)
    if len(eval_losses):
        style: dict[str, Any] = {"color": EVAL, "markersize": 5, "linewidth": 1, "markeredgecolor": "white"}
        axes.plot(eval_steps, eval_losses, "o-", label=f"evaluation, last {eval_losses[-1]:.4f}", **style)
    lost = [point.step for point in points(run.records, key="loss") if not math.isfinite(point.value)]
    if lost:
        axes.plot(lost, [0.02] * len(lost), "x", color=EVAL, transform=axes.get_xaxis_transform(), label="not finite")
    shown = np.concatenate([losses, eval_losses])
    if (shown > 0).all():
        _plain_log_axis(axes, shown, most_ticks=10)
    axes.set_ylabel("loss, nats per token", color=INK)
    _tidy(axes)
    if axes.lines:
        axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", labelcolor=INK, fontsize=9)


def _plain_log_axis(axes: Axes, values: np.ndarray, *, most_ticks: int) -> None:
    """A logarithmic y axis over values > 0; its ticks are round numbers, written plainly."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if len(values):
        low, high = values.min(), values.max()
        margin = (high / low) ** 0.04 if high > low else 1.02
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        near = MaxNLocator(most_ticks, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_locator(near if high < 10 * low else LogLocator(subs=(1, 2, 5), numticks=most_ticks))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.minorticks_off()


def _draw_lr_and_grad_norm(axes: Axes, run: Run) -> None:
    grad_axes = axes.twinx()
    norms, rates = _curve(run, "grad_norm"), _curve(run, "lr")
    grad_axes.plot(*norms, color=GRAD, linewidth=0.7)
    _plain_log_axis(grad_axes, norms[1][norms[1] > 0], most_ticks=4)
    axes.plot(*rates, color=SMOOTH, linewidth=2.0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.2g}")
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
