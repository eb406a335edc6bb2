"""Draws the schedule of a config's pipeline: which stage works on which microbatch at which tick, and its bubble.

  python -m jaxlm.plan --config configs/X.py[:arg] [--config.a.b=v ...] --schedule [--devices N] [--png FILE]

Reads no data and touches no device. Exit codes: 0 drawn; 2 a setting to mend, in the same words as `jaxlm.train`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.config import Config, Problem, UserError
from jaxlm.files import mendable, write_whole
from jaxlm.models.presets import PRESETS
from jaxlm.parallel.mesh import mesh_shape
from jaxlm.parallel.rules import with_rows
from jaxlm.parallel.schedule import Schedule
from jaxlm.parallel.stages import Stages
from jaxlm.pipelined import AXIS, plan_stages
from jaxlm.plan.schedule import picture, text
from jaxlm.settings import Parser, flatten, keys_help, load_file, resolve, run_main, split_overrides


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m jaxlm.plan",
        description=__doc__,
        epilog=keys_help() + "\n\nA config file is Python code and is run: use files you trust.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:arg]", help="the settings to start from")
    parser.add_argument("--schedule", required=True, action="store_true", help="draw the pipeline's ticks by stage")
    counted = "devices of the run (default: as few as the mesh allows, a degree of -1 counted as 1)"
    parser.add_argument("--devices", type=int, metavar="N", help=counted)
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture here too")
    overrides, others = split_overrides(argv)
    args = parser.parse_args(others)
    if args.devices is not None and args.devices < 1:
        raise UserError(Problem(f"--devices={args.devices}", "must be at least 1", "use 1 or more"))
    config = read_config(args.config, overrides)
    schedule, stages = configured_schedule(config, num_devices=args.devices)
    print(text(schedule, stages=stages, width=shutil.get_terminal_size().columns))
    unknown = [f"mesh.{axis}=-1" for axis, degree in config.mesh.degrees.items() if degree == -1]
    if unknown and args.devices is None:
        print(f"\n{unknown[0]} was counted as 1: --devices N checks that microbatches split over N devices")
    if args.png:
        with mendable(f"--png={args.png}", "the picture", "name a file in a folder that exists and is writable"):
            write_whole(args.png, picture(schedule, stages=stages))
        print(f"\npicture: {args.png}")
    return 0


def read_config(spec: str, overrides: Mapping[str, str]) -> Config:
    """The checked config of `FILE.py[:arg]` and overrides; it need not name data, which no plan reads."""
    tree = load_file(spec)
    named = {path for path, value in flatten(tree) if value} | overrides.keys()
    unread = {} if named & {"data.path", "data.train"} else {"data.train": "unread"}
    return resolve(tree, overrides={**overrides, **unread}, presets=PRESETS, file=spec).config


def configured_schedule(config: Config, *, num_devices: int | None) -> tuple[Schedule, Stages]:
    """The schedule and stages that a run of `config` over `num_devices` would have (None: as few as it can run on).

    Raises: UserError if the mesh does not fill the devices, has one stage, or breaks a rule of `plan_stages`.
    """
    degrees = config.mesh.degrees
    where = f"mesh.{AXIS}={degrees[AXIS]}"
    if num_devices is None and degrees[AXIS] == -1:
        raise UserError(Problem(where, "takes the devices that are left, of how many is not known", "give --devices N"))
    fewest = math.prod(degree for degree in degrees.values() if degree != -1)
    shape = mesh_shape(config.mesh, num_devices=num_devices or fewest)
    if shape[AXIS] == 1:
        rule = "one stage holds every layer: there is no pipeline to draw"
        keys = "pipeline.schedule, pipeline.microbatches, pipeline.repeats and pipeline.stage_layers"
        raise UserError(Problem(where, rule, f"set --config.mesh.{AXIS} to 2 or more, and as you like {keys}"))
    rows = next(rule.compute for rule in with_rows(config.mesh.rules) if rule.dim == "batch")
    return plan_stages(config, num_stages=shape[AXIS], num_row_shards=math.prod(shape[axis] for axis in rows))


if __name__ == "__main__":
    run_main(main)
