"""Checkpoints of a run: `python -m jaxlm.checkpoint {list,verify,diff,export,prune,rewind} WORKDIR`.

Reads what a checkpoint says of itself; the model and its devices are not needed. Exit codes: 0; 1 diff found a difference;
3 something is damaged or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxlm.checkpoint import examine, layout
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.manifest import Damage, Manifest
from jaxlm.checkpoint.restore import TABLE_ROWS, newest_manifest, read_manifest
from jaxlm.checkpoint.retention import METRIC, Retention, superseded
from jaxlm.checkpoint.space import bytes_text
from jaxlm.config import Exit, Problem, UserError
from jaxlm.settings import Parser, columns, flatten, progress_bar, run_main, shown

EXIT_DIFFERENT = 1


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m jaxlm.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0], description=run.__doc__)
        command.add_argument("workdir", type=Path, metavar="WORKDIR", help="a run's folder")
        for flag, options in FLAGS[name].items():
            command.add_argument(flag, **options)
    args = parser.parse_args(argv)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # the accelerators may be training
    if not committed_steps(args.workdir / "checkpoints"):
        problem = Problem(str(args.workdir / "checkpoints"), "holds no checkpoint", "name a run's folder")
        raise UserError(problem, exit_code=Exit.UNUSABLE)
    try:
        return COMMANDS[args.command](args)
    except Damage as damage:
        remedy = "choose another step; a run that trains deletes old ones"
        raise UserError(Problem(str(damage.path), damage.reason, remedy), exit_code=Exit.UNUSABLE) from damage
    except OSError as error:
        raise UserError(
            Problem(str(args.workdir), str(error), "make it readable, and writable to change it")
        ) from error


def list_steps(args: argparse.Namespace) -> int:
    """Every checkpoint: when, how large, its metrics, mesh and versions, why it is kept."""
    directory = args.workdir / "checkpoints"
    rows = []
    for step in committed_steps(directory):
        try:
            rows.append(_facts(read_manifest(directory / str(step))))
        except Damage as damage:
            rows.append({"step": step, "damaged": str(damage)})
    damaged = {row["step"]: row["damaged"] for row in rows if "damaged" in row}
    sound = {row["step"]: row["metrics"].get(METRIC) for row in rows if "damaged" not in row}
    kept = _retention(directory, args).reasons(sound)
    for row in rows:
        row["kept"] = kept.get(row["step"], [])
    if args.json:
        print(json.dumps(rows, indent=1))
        return Exit.UNUSABLE if damaged else 0
    table = [("step", "saved", "size", "metrics", "mesh", "versions", "kept")]
    print("\n".join(columns([*table, *map(_row, rows)])))
    for step, reason in damaged.items():
        print(f"step {step} is damaged: {reason}")
    return Exit.UNUSABLE if damaged else 0


def verify(args: argparse.Namespace) -> int:
    """Reads every array of a step and compares it with its checksum; names the files and arrays that are bad."""
    directory, results = args.workdir / "checkpoints", {}
    for step in args.steps or committed_steps(directory):
        path = _step(args.workdir, step)
        with _bar(path) as bar:
            results[step] = examine.verify(path, bar.update)
        if not args.json:
            print(f"step {step}: " + ("\n  ".join(["DAMAGED", *map(str, results[step])]) if results[step] else "sound"))
    if args.json:
        print(json.dumps({step: [str(damage) for damage in found] for step, found in results.items()}, indent=1))
    return Exit.UNUSABLE if any(results.values()) else 0


def diff(args: argparse.Namespace) -> int:
    """What differs between two steps, of one run or of two: settings, and arrays with their largest difference."""
    steps = committed_steps(args.workdir / "checkpoints")
    if args.other is not None:
        steps = [steps[-1], *committed_steps(args.other / "checkpoints")[-1:]]
    one, other = args.steps or (steps * 2)[-2:]
    paths = _step(args.workdir, one), _step(args.other or args.workdir, other)
    a, b = map(_settings, map(read_manifest, paths))
    settings = {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}
    with _bar(*paths[:1]) as bar:
        arrays = examine.differences(*paths, bar.update)
    if args.json:
        print(json.dumps({"settings": settings, "arrays": list(map(asdict, arrays))}, indent=1))
        return EXIT_DIFFERENT if arrays or settings else 0
    where = [("", *map(str, paths))]
    rows = [(key, *map(shown, values)) for key, values in settings.items()]
    print("\n".join(columns([*where, *rows])))
    number = lambda x: "-" if x is None else f"{x:.3g}"  # noqa: E731
    worst = sorted(arrays, key=lambda d: -math.inf if d.relative is None else -d.relative)[:TABLE_ROWS]
    cells = [(d.name, d.one, d.other, number(d.largest), number(d.relative)) for d in worst]
    if cells:
        print("\n".join(columns([("array", "one", "other", "largest", "relative"), *cells])))
    if len(arrays) > len(cells):
        print(f"... and {len(arrays) - len(cells)} arrays that differ less; --json has all")
    print(f"{len(rows)} settings and facts differ, {len(arrays)} arrays")
    return EXIT_DIFFERENT if arrays or settings else 0


def export(args: argparse.Namespace) -> int:
    """Writes the parameters alone, in bfloat16 or float32, as a run of their own that evaluate and generate can read."""
    path = _step(args.workdir, args.step or committed_steps(args.workdir / "checkpoints")[-1])
    with _bar(path) as bar:
        made = examine.export(path, args.workdir, args.output, dtype=args.dtype, advance=bar.update)
    print(f"{made}: {bytes_text(read_manifest(made).size_bytes)}, from {bytes_text(read_manifest(path).size_bytes)}")
    return 0


def prune(args: argparse.Namespace) -> int:
    """Says which checkpoints the run's retention does not keep; with --delete, deletes them."""
    directory = args.workdir / "checkpoints"
    with RunLock(args.workdir) if args.delete else contextlib.nullcontext():
        doomed = superseded(directory, _retention(directory, args))
        if args.delete:
            layout.remove(directory, doomed)
    steps = ", ".join(map(str, doomed)) or "none"
    print(f"deleted: {steps}" if args.delete else f"would be deleted: {steps}" + (" (--delete does)" if doomed else ""))
    return 0


def rewind(args: argparse.Namespace) -> int:
    """Moves the checkpoints after a step to checkpoints/abandoned, so that the run goes on from there."""
    directory, path = args.workdir / "checkpoints", _step(args.workdir, args.to)
    with RunLock(args.workdir):
        read_manifest(path)
        later = [directory / str(step) for step in committed_steps(directory) if step > args.to]
        layout.abandon(directory, later, f"rewound to step {args.to}")
    print(f"the run goes on from step {args.to}; {len(later)} later checkpoints are in {directory / layout.ABANDONED}")
    return 0


COMMANDS = {"list": list_steps, "verify": verify, "diff": diff, "export": export, "prune": prune, "rewind": rewind}

KEYS = ("keep", "keep_every", "keep_best")
JSON = {"--json": dict(action="store_true", help="print JSON")}
KEEP = {
    "--keep": dict(type=int, metavar="N", help="newest ones kept (default: the run's setting)"),
    "--keep-every": dict(type=int, metavar="K", help="steps divisible by this are kept (default: the run's setting)"),
    "--keep-best": dict(type=int, metavar="N", help="with the lowest evaluation loss (default: the run's setting)"),
}
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "list": KEEP | JSON,
    "verify": {"--steps": dict(type=int, nargs="+", metavar="STEP", help="only these")} | JSON,
    "diff": {
        "other": dict(type=Path, nargs="?", metavar="OTHER", help="another run's folder (default: the same)"),
        "--steps": dict(type=int, nargs=2, metavar="STEP", help="default: the last two of one run, the last of two"),
    }
    | JSON,
    "export": {
        "--step": dict(type=int, metavar="STEP", help="default: the newest"),
        "--dtype": dict(choices=("bfloat16", "float32"), default="bfloat16", help="of floating parameters"),
        "--output": dict(type=Path, required=True, metavar="DIR", help="folder to make"),
    },
    "prune": KEEP | {"--delete": dict(action="store_true", help="delete them")},
    "rewind": {"--to": dict(type=int, required=True, metavar="STEP", help="the step to go on from")},
}


def _step(workdir: Path, step: int) -> Path:
    steps = committed_steps(workdir / "checkpoints")
    if step not in steps:
        rule, remedy = f"holds no checkpoint of step {step}", f"it has steps {', '.join(map(str, steps))}"
        raise UserError(Problem(str(workdir), rule, remedy), exit_code=Exit.UNUSABLE)
    return workdir / "checkpoints" / str(step)


def _bar(path: Path) -> tqdm:
    """Bytes of arrays read."""
    try:
        total = examine.size_bytes(read_manifest(path).leaves)
    except Damage:
        total = 0
    return progress_bar(total, f"step {path.name}", "B", unit_scale=True)


def _retention(directory: Path, args: argparse.Namespace) -> Retention:
    """The run's rules as its newest readable checkpoint has them, or what the flags say instead."""
    newest = newest_manifest(directory)
    settings = dict(zip(KEYS, (3, 0, 0)))
    settings |= (newest.metadata.get("config", {}) if newest else {}).get("checkpoint", {})
    asked = (args.keep, args.keep_every, args.keep_best)
    rules = Retention(*(settings[key] if value is None else value for key, value in zip(KEYS, asked)))
    if rules.newest < 1:
        raise UserError(Problem(f"--keep={rules.newest}", "the newest checkpoint always stays", "use 1 or more"))
    return rules


def _facts(found: Manifest) -> dict[str, Any]:
    kept = {
        key: found.metadata[key] for key in ("mesh", "devices", "versions", "data", "export") if key in found.metadata
    }
    own = dict(step=found.step, saved_at=found.saved_at, size_bytes=found.size_bytes, metrics=found.metrics)
    return own | kept


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    if "damaged" in facts:
        return (str(facts["step"]), *[""] * 5, "DAMAGED")
    pairs = lambda key: " ".join(f"{name}={value:.5g}" for name, value in facts.get(key, {}).items()) or "-"  # noqa: E731
    versions = facts.get("versions", {})
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["saved_at"]))
    return (
        str(facts["step"]), saved, bytes_text(facts["size_bytes"]), pairs("metrics"), pairs("mesh"),
        " ".join(f"{name} {versions[name]}" for name in ("jaxlm", "jax") if name in versions) or "-",
        ", ".join(facts["kept"]) or "-",
    )  # fmt: skip


def _settings(found: Manifest) -> dict[str, Any]:
    """The run's settings, and every other fact, as section.key."""
    facts = {name: value for name, value in found.metadata.items() if name != "config"}
    return dict(flatten(found.metadata.get("config", {})) + flatten(facts))


if __name__ == "__main__":
    run_main(main)
