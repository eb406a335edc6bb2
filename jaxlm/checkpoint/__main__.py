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
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxlm.checkpoint import layout, manifest
from jaxlm.checkpoint.layout import METRIC, Retention, committed_steps, superseded
from jaxlm.checkpoint.lock import RunLock
from jaxlm.checkpoint.manifest import Damage, Leaf, Manifest, described
from jaxlm.checkpoint.restore import TABLE_ROWS, changed, check_sums, newest_manifest, read_leaves, step_path
from jaxlm.checkpoint.space import bytes_text
from jaxlm.checkpoint.store import CheckpointStore
from jaxlm.config import Exit, Problem, UserError
from jaxlm.settings import Parser, columns, flatten, progress_bar, run_main, shown

EXIT_DIFFERENT = 1
BATCH_BYTES = 2**30  # of arrays that are read at a time, onto one device
PARAMS = "params."


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m jaxlm.checkpoint", description=__doc__, formatter_class=raw)
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
        problem = Problem(str(args.workdir), str(error), "make it readable, and writable to change it")
        raise UserError(problem) from error


def list_steps(args: argparse.Namespace) -> int:
    """Every checkpoint: when, how large, its metrics, mesh and versions, why it is kept."""
    directory = args.workdir / "checkpoints"
    rows, damaged = [], []
    for step in committed_steps(directory):
        try:
            rows.append(_facts(manifest.read(directory / str(step))))
        except Damage as damage:
            rows.append({"step": step, "damaged": str(damage)})
            damaged.append(f"step {step} is damaged: {damage}")
    kept = _retention(directory, args).reasons({r["step"]: r["metrics"].get(METRIC) for r in rows if "metrics" in r})
    for row in rows:
        row["kept"] = kept.get(row["step"], [])
    table = [("step", "saved", "size", "metrics", "mesh", "versions", "kept"), *map(_row, rows)]
    print(json.dumps(rows, indent=1) if args.json else "\n".join([*columns(table), *damaged]))
    return Exit.UNUSABLE if damaged else 0


def verify(args: argparse.Namespace) -> int:
    """Reads every array of a step and compares it with its checksum; names the files and arrays that are bad."""
    results = {}
    for step in args.steps or committed_steps(args.workdir / "checkpoints"):
        found = results[step] = [str(damage) for damage in _damages(_step(args.workdir, step))]
        if not args.json:
            print(f"step {step}: " + ("\n  ".join(["DAMAGED", *found]) if found else "sound"))
    if args.json:
        print(json.dumps(results, indent=1))
    return Exit.UNUSABLE if any(results.values()) else 0


def diff(args: argparse.Namespace) -> int:
    """What differs between two steps, of one run or of two: settings, and arrays with their largest difference."""
    steps = committed_steps(args.workdir / "checkpoints")
    if args.other is not None:
        steps = [steps[-1], *committed_steps(args.other / "checkpoints")[-1:]]
    one, other = args.steps or (steps * 2)[-2:]
    paths = _step(args.workdir, one), _step(args.other or args.workdir, other)
    a, b = map(_settings, map(manifest.read, paths))
    settings = {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}
    arrays = _differences(*paths)
    if args.json:
        print(json.dumps({"settings": settings, "arrays": arrays}, indent=1))
        return EXIT_DIFFERENT if arrays or settings else 0
    print("\n".join(columns([("", *map(str, paths)), *((key, *map(shown, both)) for key, both in settings.items())])))
    number = lambda x: "-" if x is None else f"{x:.3g}"  # noqa: E731
    worst = sorted(arrays, key=lambda d: -math.inf if d["relative"] is None else -d["relative"])[:TABLE_ROWS]
    if worst:
        cells = [(d["name"], d["one"], d["other"], number(d["largest"]), number(d["relative"])) for d in worst]
        print("\n".join(columns([("array", "one", "other", "largest", "relative"), *cells])))
    if len(arrays) > len(worst):
        print(f"... and {len(arrays) - len(worst)} arrays that differ less; --json has all")
    print(f"{len(settings)} settings and facts differ, {len(arrays)} arrays")
    return EXIT_DIFFERENT if arrays or settings else 0


def export(args: argparse.Namespace) -> int:
    """Writes the parameters alone, in bfloat16 or float32, as a run of their own that evaluate and generate can read."""
    path = _step(args.workdir, args.step or committed_steps(args.workdir / "checkpoints")[-1])
    source, output = manifest.read(path), args.output
    if there := committed_steps(output / "checkpoints"):
        rule = f"holds checkpoints already, of steps {', '.join(map(str, there))}"
        raise UserError(Problem(f"--output={output}", rule, "name an empty folder"), exit_code=Exit.UNUSABLE)
    cast: dict[str, jax.Array] = {}  # the host holds what is written
    for batch in _batches(path, {name: leaf for name, leaf in source.leaves.items() if name.startswith(PARAMS)}):
        loaded = _read(path, batch)
        check_sums(path, batch, loaded)
        for name, x in loaded.items():
            cast[name] = x.astype(args.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    output.mkdir(parents=True, exist_ok=True)
    with RunLock(output) as lock, CheckpointStore(output / "checkpoints", lock=lock) as store:
        store.save(source.step, cast, metadata=source.metadata | {"export": {"dtype": args.dtype, "from": str(path)}})
        (outcome,) = store.close()
    if outcome.error is not None:
        remedy = "name an empty folder on a disk with room"
        raise UserError(Problem(f"--output={output}", outcome.error, remedy), exit_code=Exit.UNUSABLE)
    own = Path("data/chars.json")  # a tokenizer that the run made for itself
    if (args.workdir / own).is_file():
        (output / own).parent.mkdir(exist_ok=True)
        shutil.copy(args.workdir / own, output / own)
    made = _step(output, source.step)
    print(f"{made}: {bytes_text(manifest.read(made).size_bytes)}, from {bytes_text(source.size_bytes)}")
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
        manifest.read(path)
        later = [directory / str(step) for step in committed_steps(directory) if step > args.to]
        for entry in later:
            layout.abandon(entry, f"rewound to step {args.to}")
    print(f"the run goes on from step {args.to}; {len(later)} later checkpoints are in {directory / layout.ABANDONED}")
    return 0


COMMANDS = {"list": list_steps, "verify": verify, "diff": diff, "export": export, "prune": prune, "rewind": rewind}

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
    return step_path(workdir / "checkpoints", step)


def _damages(path: Path) -> list[Damage]:
    """Everything that is wrong with the step in `path`.   Raises: Damage if a run deleted it meanwhile."""
    try:
        saved = manifest.read(path).leaves
    except Damage as damage:
        return [damage]
    found: list[Damage] = []
    for batch in _batches(path, saved):
        found += _damaged_arrays(path, batch)
    if not layout.is_committed(path):
        raise Damage(path, "was deleted while it was read")
    return found


def _damaged_arrays(path: Path, leaves: dict[str, Leaf]) -> Iterator[Damage]:
    try:
        for name in changed(leaves, _read(path, leaves)):
            yield Damage(path, f"checksum of {name} differs from what was saved")
    except Damage as damage:
        for name, leaf in leaves.items():  # which of them?
            if len(leaves) > 1:
                yield from _damaged_arrays(path, {name: leaf})
            else:
                yield Damage(path, f"{name} can't be read: {damage.reason}")


def _differences(one: Path, other: Path) -> list[dict[str, Any]]:
    """Arrays that differ between two steps, in the first's order. Equal checksums are equal arrays and are not read.

    largest, relative: of the absolute difference, and that over the first's largest value; None where shapes or dtypes
    differ or one has no such array.
    """
    a, b = manifest.read(one).leaves, manifest.read(other).leaves
    found = []
    with _bar(one, a | b) as bar:
        for name, leaf in (a | b).items():
            x, y = a.get(name), b.get(name)
            row = {"name": name, "one": described(x), "other": described(y), "largest": None, "relative": None}
            if row["one"] != row["other"]:
                found.append(row)
            elif x != y:
                first, second = (np.asarray(_read(path, {name: leaf})[name], np.float64) for path in (one, other))
                largest, scale = (float(np.abs(values).max()) for values in (first - second, first))
                if largest != 0:
                    found.append(row | {"largest": largest, "relative": largest / scale if scale else math.inf})
            bar.update(_bytes(leaf))
    return found


def _batches(path: Path, leaves: Mapping[str, Leaf]) -> Iterator[dict[str, Leaf]]:
    """`leaves` of the step in `path` in order, as many at a time as fit into BATCH_BYTES, one at least."""
    batch: dict[str, Leaf] = {}
    with _bar(path, leaves) as bar:
        for name, leaf in leaves.items():
            if batch and _bytes(*batch.values(), leaf) > BATCH_BYTES:
                yield batch
                bar.update(_bytes(*batch.values()))
                batch = {}
            batch[name] = leaf
        if batch:
            yield batch
            bar.update(_bytes(*batch.values()))


def _bar(path: Path, leaves: Mapping[str, Leaf]) -> tqdm:
    return progress_bar(_bytes(*leaves.values()), f"step {path.name}", "B", unit_scale=True)


def _read(path: Path, leaves: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=here) for name, x in leaves.items()}
    return read_leaves(path, like)


def _bytes(*leaves: Leaf) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _retention(directory: Path, args: argparse.Namespace) -> Retention:
    """The run's rules as its newest readable checkpoint has them, or what the flags say instead."""
    keys, newest = ("keep", "keep_every", "keep_best"), newest_manifest(directory)
    settings = dict(zip(keys, astuple(Retention())))
    settings |= (newest.metadata.get("config", {}) if newest else {}).get("checkpoint", {})
    settings |= {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    rules = Retention(*(settings[key] for key in keys))
    if rules.newest < 1:
        raise UserError(Problem(f"--keep={rules.newest}", "the newest checkpoint always stays", "use 1 or more"))
    return rules


def _facts(found: Manifest) -> dict[str, Any]:
    own = dict(step=found.step, saved_at=found.saved_at, size_bytes=found.size_bytes, metrics=found.metrics)
    kept = ("mesh", "devices", "versions", "data", "export")
    return own | {key: found.metadata[key] for key in kept if key in found.metadata}


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
