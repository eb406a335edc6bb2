# Dims: P stages (S in what is drawn), T ticks, M microbatches, R repeats.
"""A pipeline's ticks by stage, with its bubble: as text, and as a picture whose widths are times.

Both draw what `Schedule.forward` and `Schedule.backward` say: what the trainer runs. A tick has up to two halves, a
forward and a backward; a half that no stage needs (`Schedule.phases`) is not run and is left blank.
"""

from __future__ import annotations

import colorsys
import io
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.parallel.schedule import Schedule
from jaxlm.parallel.stages import Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORWARD_LENGTH, BACKWARD_LENGTH = 1, 2  # a backward takes the gradients of inputs and of weights: two products for one
WORDS = {
    "gpipe": "all forwards, then all backwards",
    "circular": "all forwards, every microbatch going round the stages again and again, then all backwards",
    "1f1b": "backwards begin the tick after the first microbatch has left the last stage for good",
}
PHASES = {
    (True, False): ("forwards only", "forwards", "F"),
    (True, True): ("forwards and backwards", "both", "F+B", ""),
    (False, True): ("backwards only", "backwards", "B"),
}
LEGEND = (
    "F forward, B backward; number: microbatch{repeat}; dot: idle; blank: the tick has no such half; bar: next phase"
)


@dataclass(frozen=True)
class Half:
    """All work of one direction. runs: bool[T], whether the tick has this half; on: bool[P, T], whether the stage has
    work in it; microbatch, repeat: i32[P, T], of that work."""

    name: str
    runs: np.ndarray
    on: np.ndarray
    microbatch: np.ndarray
    repeat: np.ndarray


def halves(schedule: Schedule) -> tuple[Half, Half]:
    """The forwards and the backwards of a step."""
    stage, tick = np.arange(schedule.stages)[:, None], np.arange(schedule.num_ticks)
    runs = np.zeros((2, schedule.num_ticks), bool)
    for start, stop, *needed in schedule.phases:
        runs[:, start:stop] = np.array(needed)[:, None]
    items = schedule.forward(stage, tick), schedule.backward(stage, tick)
    forward, backward = ((item.on, item.microbatch, item.repeat) for item in items)
    return Half("F", runs[0], *forward), Half("B", runs[1], *backward)


def most_kept(schedule: Schedule) -> np.ndarray:
    """i32[P]: microbatches, counted once a repeat, whose forward a stage has done and whose backward it has yet to end,
    at the tick with most of them."""
    forward, backward = halves(schedule)
    return (np.cumsum(forward.on, 1) - np.cumsum(backward.on, 1) + backward.on).max(1)


def repeat_name(repeat: int) -> str:
    """a, b, ... and from the 27th on .27."""
    return chr(ord("a") + repeat) if repeat < 26 else f".{repeat + 1}"


def bubble(schedule: Schedule) -> str:
    return f"{schedule.stages - 1}/{schedule.forward_ticks} = {100 * schedule.bubble_frac:.1f} %"


# ---- text


def text(schedule: Schedule, *, stages: Stages, width: int) -> str:
    """The schedule's `facts`, and a column a tick, folded into blocks of at most `width` characters."""
    T, P, lines = schedule.num_ticks, schedule.stages, []
    for name, words in facts(schedule, stages).items():
        lines += textwrap.wrap(words, max(width, 40), initial_indent=name.ljust(14), subsequent_indent=" " * 14)
    repeat = "" if schedule.repeats == 1 else ", letter: repeat"
    lines += ["", *textwrap.wrap(LEGEND.format(repeat=repeat), max(width, 20))]

    cells = {half.name: _cells(schedule, half) for half in halves(schedule)}
    rows = {f"stage {s:>{len(str(P - 1))}} {half}": cells[half][s] for s in range(P) for half in cells}
    rows = {"tick": [str(t) for t in range(T)], **rows}
    margin, cell = max(map(len, rows)), max(len(entry) for row in rows.values() for entry in row)
    bars = {start: "|" for start, *_ in schedule.phases[1:]}
    fit = max((width - margin) // (cell + 1), 1)
    each = -(-T // -(-T // fit))  # as few blocks as fit, of about the same length
    for first in range(0, T, each):
        lines.append("")
        for name, row in rows.items():
            line = "".join(bars.get(t, " ") + row[t].rjust(cell) for t in range(first, min(first + each, T)))
            if line.strip(" |"):
                is_same_stage = lines[-1].startswith(name[:-1])
                lines.append(((name[-1].rjust(margin) if is_same_stage else name.ljust(margin)) + line).rstrip())
    return "\n".join(lines)


def facts(schedule: Schedule, stages: Stages) -> dict[str, str]:
    """The schedule in words and numbers, name -> text."""
    P, M, R = schedule.stages, schedule.microbatches, schedule.repeats
    counts = np.reshape(stages.counts, (R, P)).T
    layers = " ".join("+".join(map(str, row)) for row in counts)
    passes = "once" if R == 1 else f"{R} times ({repeat_name(0)} to {repeat_name(R - 1)})"
    ticks = " + ".join(f"{stop - start} {PHASES[f, b][0]}" for start, stop, f, b in schedule.phases)
    kept = " ".join(map(str, most_kept(schedule)))
    return {
        "schedule": f"{schedule.name}: {WORDS[schedule.name]}",
        "stages": f"S = {P}; layers of each: {layers}",
        "microbatches": f"M = {M}",
        "repeats": f"R = {R}: each microbatch passes each stage {passes}",
        "ticks": f"{schedule.num_ticks} = {ticks}",
        "bubble": f"(S-1)/(M*R+S-1) = {bubble(schedule)} of each stage's time is idle",
        "activations": f"a stage has room for {schedule.num_slots} microbatches' (num_slots); "
        f"most in use, by stage: {kept}",
    }


def _cells(schedule: Schedule, half: Half) -> np.ndarray:
    """str[P, T]: a label, a dot where the stage is idle, nothing where the tick has no such half."""
    cells = np.full(half.on.shape, "", object)
    cells[:, half.runs] = "."
    for s, t in np.argwhere(half.on):
        repeat = "" if schedule.repeats == 1 else repeat_name(int(half.repeat[s, t]))
        cells[s, t] = f"{half.microbatch[s, t]}{repeat}"
    return cells


# ---- picture

INK, IDLE, DPI = "#333333", "#e4e4e4", 150
HUES = {"F": (0.60, 0.44), "B": (0.02, 0.12)}  # of the first and last repeat: blue to green, red to yellow
UNIT_IN, ROW_IN, MIN_WIDTH_IN, MAX_WIDTH_IN = 0.19, 0.42, 9.5, 28.0  # UNIT_IN: a forward's width, two digits at 7 pt


def picture(schedule: Schedule, *, stages: Stages) -> bytes:
    """A PNG: stages as rows, time to the right in units of a forward, idle grey: the grey share is the bubble."""
    from matplotlib.figure import Figure

    starts, margin_in = tick_starts(schedule), 1.2
    width_in = np.clip(margin_in + UNIT_IN * starts[-1], MIN_WIDTH_IN, MAX_WIDTH_IN)
    unit_in = (width_in - margin_in) / starts[-1]
    points = 9 * np.clip(width_in / 14, 1, 1.6)  # a wide picture is looked at from further away
    size = (width_in, 2.2 + ROW_IN * schedule.stages)
    figure = Figure(figsize=size, layout="constrained", facecolor="white", dpi=DPI)
    axes = figure.subplots()
    title = f"{schedule.name}, {schedule.stages} stages, {schedule.microbatches} microbatches"
    title += f", {schedule.repeats} repeats" if schedule.repeats > 1 else ""
    title += f"  ·  bubble (S-1)/(M·R+S-1) = {bubble(schedule)}"
    axes.set_title(title, loc="left", fontsize=points + 3, fontweight="bold", color=INK, pad=1.6 * points + 9)
    forward, backward = halves(schedule)
    _draw_half(axes, schedule, forward, starts[:-1], FORWARD_LENGTH, unit_in)
    _draw_half(axes, schedule, backward, starts[:-1] + FORWARD_LENGTH * forward.runs, BACKWARD_LENGTH, unit_in)
    _draw_axes(axes, schedule, stages, unit_in, points)
    _draw_legend(figure, schedule, points)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def tick_starts(schedule: Schedule) -> np.ndarray:
    """i64[T + 1]: when each tick begins, and the last one ends, in lengths of a forward."""
    forward, backward = halves(schedule)
    return np.cumsum([0, *(FORWARD_LENGTH * forward.runs + BACKWARD_LENGTH * backward.runs)])


def _draw_half(axes: Axes, schedule: Schedule, half: Half, left: np.ndarray, length: int, unit_in: float) -> None:
    """left: i64[T], where the half of a tick begins."""
    longest = max(len(str(schedule.microbatches - 1)), len(repeat_name(schedule.repeats - 1)))
    points = min(9.0, 0.8 * 72 * unit_in * length / (0.6 * longest))  # a digit is about 0.6 as wide as high
    middle = "center" if schedule.repeats > 1 else "center_baseline"
    for s in range(schedule.stages):
        colors: dict[Any, Any] = {t: IDLE for t in np.flatnonzero(half.runs)}
        for t in np.flatnonzero(half.on[s]):
            microbatch, repeat = half.microbatch[s, t], half.repeat[s, t]
            colors[t] = color(schedule, half.name, microbatch, repeat)
            if points >= 4.5:
                words = f"{microbatch}\n{repeat_name(repeat)}" if schedule.repeats > 1 else f"{microbatch}"
                at = left[t] + length / 2, s
                axes.text(*at, words, fontsize=points, color=ink_on(colors[t]), ha="center", va=middle)
        spans = [(float(left[t]), length) for t in colors]
        height, line = (s - 0.46, 0.92), min(0.8, 6 * unit_in)
        axes.broken_barh(spans, height, facecolors=list(colors.values()), edgecolor="white", linewidth=line)


def color(schedule: Schedule, name: str, microbatch: int, repeat: int) -> tuple[float, float, float]:
    """RGB: the direction's hue, turned with the repeat, darker with the microbatch."""
    first, last = HUES[name]
    hue = first + (last - first) * repeat / max(schedule.repeats - 1, 1)
    depth = microbatch / max(schedule.microbatches - 1, 1)
    return colorsys.hls_to_rgb(hue, 0.84 - 0.46 * depth, 0.62)


def ink_on(rgb: tuple[float, float, float]) -> str:
    """Black or white, whichever reads better: by relative luminance, WCAG 2 (contrasts are equal near 0.18)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.18 else "white"


def _draw_axes(axes: Axes, schedule: Schedule, stages: Stages, unit_in: float, points: float) -> None:
    starts, P = tick_starts(schedule), schedule.stages
    axes.set_xlim(0, starts[-1])
    axes.set_ylim(P - 0.5, -0.5)
    layers = np.reshape(stages.counts, (schedule.repeats, P)).sum(0)
    names = [f"stage {s}: {n} {'layer' if n == 1 else 'layers'}" for s, n in enumerate(layers)]
    axes.set_yticks(range(P), names)
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n * unit_in >= 0.25), 1000)
    shown = range(0, schedule.num_ticks, every)
    axes.set_xticks([(starts[t] + starts[t + 1]) / 2 for t in shown], [f"{t}" for t in shown])
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    F, B = FORWARD_LENGTH, BACKWARD_LENGTH
    widths = f"a forward is {F} wide, a backward {B}, a tick with both {F + B}: widths are times"
    axes.set_xlabel(f"tick  ({widths})", color=INK, fontsize=points + 1)
    for start, stop, f, b in schedule.phases:
        room_in = unit_in * (starts[stop] - starts[start])
        name = next((name for name in PHASES[f, b] if points * len(name) / 120 + 0.1 <= room_in), "")
        middle = (starts[start] + starts[stop]) / 2
        style: dict[str, Any] = {"fontsize": points, "color": INK, "ha": "center", "va": "bottom"}
        axes.annotate(name, (middle, -0.5), (0, 6), textcoords="offset points", **style)
        if start:
            axes.axvline(starts[start], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))


def _draw_legend(figure: Figure, schedule: Schedule, points: float) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    last, R = schedule.microbatches - 1, schedule.repeats
    shown = range(R) if R <= 4 else (0, R // 2, R - 1)
    shades = 0, last // 2, last
    handles: dict[str, Any] = {}
    for r in shown:
        for name, words in (("F", "forward"), ("B", "backward")):
            patches = tuple(Patch(color=color(schedule, name, m, r), linewidth=0) for m in shades)
            handles[words if R == 1 else f"{words}, repeat {repeat_name(r)}"] = patches
    handles["idle"] = (Patch(color=IDLE, linewidth=0),)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", frameon=False, labelcolor=INK,
        ncols=3 if R == 1 else len(shown) + 1, handlelength=3, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        fontsize=points, title=f"light to dark: microbatch 0 to {last}", title_fontproperties={"size": points},
    ).get_title().set_color(INK)  # fmt: skip
