"""From a config file and the command line to one `Config`, with the origin of every value.

A config file is Python: `get_config(arg)` returns an `ml_collections.ConfigDict` holding only what it changes. Values are
layered default < preset < file < command line, typed by the dataclasses of `jaxlm.config`, and checked; all problems are
raised together. A config file is code and is run: use files you trust. What a run keeps of its settings is data and is not run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict
from tqdm import tqdm

from jaxlm.checks import check, ignored
from jaxlm.config import Config, Exit, Problem, UserError, derived, get

PREFIX = "--config."
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SCHEMA: dict[str, tuple[Any, dataclasses.Field]] = {
    f"{section.name}.{key.name}": (typing.get_type_hints(type(section.default))[key.name], key)
    for section in dataclasses.fields(Config)
    for key in dataclasses.fields(typing.cast(Any, section.default))
}


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked config and, for each `section.key`, where its value came from."""

    config: Config
    origin: dict[str, str]


def resolve(
    tree: Mapping, *, overrides: Mapping[str, str], presets: Mapping[str, Mapping], file: str = "file"
) -> Resolved:
    """Layers defaults, preset, file and command line into a checked Config.

    Args:
      tree: {section: {key: value}} as a config file gives it, only what it changes.
      overrides: {"section.key": text} from the command line, parsed by the key's type.
      presets: {name: {model key: value}}, chosen by model.preset.
      file: what to call `tree` in origins and messages.

    Raises: UserError listing every problem.
    """
    problems: list[Problem] = []
    given = _accepted(flatten(tree), f"file {file}", typed, problems)
    given |= _accepted(overrides.items(), "command line", parsed, problems)
    preset = given.get("model.preset", (None, ""))[0]
    layers: dict[str, tuple[Any, str]] = {}
    if preset in presets:
        layers = {f"model.{key}": (value, f"preset {preset}") for key, value in presets[preset].items()}
    elif preset is not None:
        problems.append(Problem(f"model.preset={preset}", "no such preset", nearest(str(preset), presets, after="/")))
    filled = {path: (field.default, "default") for path, (_, field) in SCHEMA.items()} | layers | given
    config = derived(_build(filled))
    origin = {path: source if get(config, path) == value else "derived" for path, (value, source) in filled.items()}
    # a file is judged by itself: the command line may overrule it, and answers for its own keys only
    chosen = {path: value for path, value in given.items() if value[0] != SCHEMA[path][1].default}
    from_file = {path: value for path, value in chosen.items() if path not in overrides}
    problems += ignored(derived(_build(layers | from_file)), from_file)
    problems += ignored(config, chosen.keys() - from_file.keys())
    for problem in check(config):
        source = origin.get(problem.where.partition("=")[0], "")
        where = f"{problem.where} ({source})" if source.startswith(("preset", "file")) else problem.where
        problems.append(Problem(where, problem.rule, problem.remedy))
    if problems:
        raise UserError(*problems)
    return Resolved(config, origin)


def _accepted(rows: Iterable, source: str, convert: Callable, problems: list[Problem]) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, source)} of those `rows` that are settings; of each other one a problem is added."""
    given = {}
    for path, value in rows:
        if path not in SCHEMA:
            problems.append(Problem(f"{path}={value}", f"no such setting ({source})", nearest(path, SCHEMA, after=".")))
            continue
        kind, key = SCHEMA[path]
        try:
            given[path] = (convert(value, kind), source)
        except (ValueError, TypeError, SyntaxError, KeyError):
            rule = f"is not {type_name(kind)} ({source})"
            problems.append(Problem(f"{path}={value}", rule, key.metadata["doc"]))
    return given


def _build(values: Mapping[str, tuple[Any, str]]) -> Config:
    """The Config of {"section.key": (value, where it came from)}, all other keys at their defaults."""
    sections: dict[str, dict[str, Any]] = {}
    for path, (value, _) in values.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    config = Config()
    return Config(**{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()})


def flatten(tree: Mapping) -> list[tuple[str, Any]]:
    """[("section.key", value)] of a two-level mapping; a value where a section should be keeps its own name."""
    rows = []
    for section, keys in tree.items():
        held = keys.items() if isinstance(keys, Mapping) else [(None, keys)]
        rows += [(f"{section}.{key}" if key else section, value) for key, value in held]
    return rows


def nearest(name: str, known: Iterable[str], *, after: str) -> str:
    """A remedy for a `name` that is not `known`: those near it in what comes `after` the part that many names share.

    Near are names that differ by a letter or two, or of which one has all the words of the other.
    """
    shared, _, own = name.rpartition(after)
    nearness = {}
    for other in known:
        part = other.rpartition(after)[2]
        words, others = (set(re.split("[_-]", text)) for text in (own, part))
        alike = difflib.SequenceMatcher(None, own, part).ratio()
        nearness[other] = (max(alike, 0.75 * (words <= others or others <= words)), other.startswith(shared + after))
    near = sorted((other for other in nearness if nearness[other][0] >= 0.75), key=nearness.__getitem__, reverse=True)
    return f"did you mean {', '.join(near[:3])}?" if near else "see --help for every name"


def typed(value: Any, kind: Any) -> Any:
    """`value` as a file gives it, accepted only if it is of type `kind` (an int may stand for a float, a list for a tuple)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else typed(value, args[0])
    if origin is Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = (value,)
        return tuple(typed(v, args[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is not kind:
        raise TypeError(value)
    return value


def parsed(text: str, kind: Any) -> Any:
    """`text` from the command line as type `kind`: by the type, never evaluated as code."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else parsed(text, args[0])
    if origin is tuple:
        if text.startswith(("(", "[")):
            return typed(ast.literal_eval(text), kind)
        return tuple(parsed(part.strip(), args[0]) for part in text.split(",") if part.strip())
    if kind is bool:
        return BOOLEANS[text.lower()]
    if kind is int and set(text) & set("eE."):  # 1e6 is how people write a million
        if not float(text).is_integer():
            raise ValueError(text)
        return int(float(text))
    return kind(text) if kind in (int, float) else typed(text, kind)


def type_name(kind: Any) -> str:
    """How `--help` and errors call a type: `int`, `a | b`, `list of str`, `float or none`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return f"{type_name(args[0])} or none"
    if origin is Literal:
        return " | ".join(args)
    return f"list of {type_name(args[0])}" if origin is tuple else kind.__name__


def shown(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of `rows` under one another."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def keys_help() -> str:
    """A table of every setting: name, type, default, what it is."""
    lines = ["settings (--config.SECTION.KEY=VALUE):"]
    for path, (kind, key) in SCHEMA.items():
        lines.append(f"  --config.{path}={shown(key.default)}")
        lines.append(f"        {type_name(kind)}: {key.metadata['doc']}")
    return "\n".join(lines)


def load_file(spec: str) -> Mapping:
    """Runs `FILE.py[:arg]` and returns its `get_config(arg)`; UserError if it is missing, broken, or returns no mapping."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        here = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(
            Problem(f"--config={spec}", f"no file {name} seen from {Path.cwd()}", nearest(name, here, after="/"))
        )
    try:
        get_config = runpy.run_path(name)["get_config"]
        tree = get_config(arg) if arg else get_config()
    except Exception as e:
        raise UserError(
            Problem(f"--config={spec}", f"{type(e).__name__}: {e}", "mend the :argument, or the file's get_config")
        ) from e
    if not isinstance(tree, Mapping | ConfigDict):
        raise UserError(Problem(f"--config={spec}", f"get_config gave a {type(tree).__name__}", "return a ConfigDict"))
    return tree.to_dict() if isinstance(tree, ConfigDict) else tree


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({"section.key": text}, the other arguments). Takes `--config.a.b=v`, `--config.a.b v` and a bare boolean."""
    overrides, others, rest = {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith(PREFIX):
            others.append(arg)
            continue
        path, equals, text = arg[len(PREFIX) :].partition("=")
        if not equals:
            boolean = path in SCHEMA and SCHEMA[path][0] is bool
            takes_next = rest and not rest[0].startswith("--") and not (boolean and rest[0].lower() not in BOOLEANS)
            text = rest.pop(0) if takes_next else ("true" if boolean else "")
        overrides[path] = text
    return overrides, others


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, so that they read like every other one and exit 2."""

    def error(self, message: str) -> typing.NoReturn:
        flags = [s for action in self._actions for s in action.option_strings]
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        as_setting = unknown.removeprefix("--")
        remedy = nearest(unknown, flags, after="--") if unknown else f"see {self.prog} --help"
        if as_setting in SCHEMA:
            remedy = f"did you mean {PREFIX}{as_setting}?"
        raise UserError(Problem(f"{self.prog}", message, remedy))


@contextlib.contextmanager
def warnings_to(note: Callable[[str], object]) -> Iterator[None]:
    """What the rooms of jaxlm log goes to `note`, as lines of the program among its others."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"{record.levelname}: {record.getMessage()}")

    logger = logging.getLogger("jaxlm")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Told(logging.WARNING)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


def progress_bar(total: int, what: str, unit: str, **more: Any) -> tqdm:
    """On a terminal a bar that goes away; elsewhere a line every ten seconds, and none if all is done before the first."""
    line = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {elapsed}, {remaining} left{postfix}\n"
    more |= {} if sys.stderr.isatty() else dict(delay=10, mininterval=10, miniters=1, bar_format=line)
    return tqdm(total=total, desc=what, unit=unit, leave=False, **more)


def run_main(main: Callable[[Sequence[str]], int]) -> typing.NoReturn:
    """Exits with what `main(arguments)` returns; a UserError is printed as its three lines and gives its exit code.

    An error ends the process right after what is printed of it: what jax would run at exit may wait for a device, or
    for another process, that failed.
    """
    try:
        with warnings_to(partial(print, file=sys.stderr)):
            code = main(sys.argv[1:])
    except UserError as e:
        sys.stdout.flush()
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(e.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = Exit.INTERRUPTED
    except Exception:
        sys.stdout.flush()
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(code)


def to_json(resolved: Resolved, run: Mapping[str, Any]) -> str:
    """config.json: {"config": {section: {key: value}}, "from": {"section.key": origin}, "run": facts of this run}."""
    tree = {"config": dataclasses.asdict(resolved.config), "from": resolved.origin, "run": dict(run)}
    return json.dumps(tree, indent=1) + "\n"


def from_values(values: Mapping[str, Any], source: str) -> Config:
    """The Config with these values of "section.key", all others their defaults. Raises UserError if one is none of a key."""
    problems: list[Problem] = []
    given = _accepted(values.items(), source, typed, problems)
    if problems:
        raise UserError(*problems)
    return _build(given)
