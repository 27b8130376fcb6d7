"""Where a run's settings come from: a Python file, a config.json or a run folder, then the command line's flags.

`load_config("configs/tiny.py", ["--optimizer.peak-lr", "3e-4"])` is what `moejax train` does with its arguments, so a
notebook gets the same settings with the same errors. tyro makes the flags from the dataclasses of `config.py`.
"""

import contextlib
import dataclasses
import difflib
import io
import runpy
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from moejax.config import ConfigError, RunConfig

USAGE = "moejax train CONFIG"
SOURCES = "a Python file with a function config(), a config.json, or a run folder"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of `path`, with the flags of `overrides` put on top.

    Args:
        path: a Python file whose `config()` returns a RunConfig, a config.json, or a run folder (its config.json).
        overrides: as on the command line, `["--optimizer.peak-lr", "3e-4", "--data.train", "a.txt", "b.txt"]`; words
            may be joined by - or _. A part that is off (None), like `model.attention.yarn`, is turned on by a flag for
            one of its fields. `--help` prints all flags with their docs and defaults, and raises SystemExit(0).

    Raises:
        ConfigError: nothing usable at `path`, an unknown flag, a value that does not fit.
    """
    return override(read_config(path), overrides)


def read_config(path: str | Path) -> RunConfig:
    """The settings of a Python file, a config.json or a run folder; see `load_config`."""
    source = Path(path)
    if source.is_dir():
        source = source / "config.json"
    if not source.is_file():
        raise ConfigError("CONFIG", str(source), SOURCES)
    if source.suffix == ".py":
        return _run_config_file(source)
    try:
        return RunConfig.from_json(source.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError("CONFIG", str(source), SOURCES) from None
    except ConfigError as error:
        if error.place != "config":  # of one field: the field says enough
            raise
        raise ConfigError(str(source), error.value, error.wanted) from None


def _run_config_file(path: Path) -> RunConfig:
    try:
        function = runpy.run_path(str(path)).get("config")
        config = function() if callable(function) else None
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1]
        said = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        raise ConfigError(f"{path}:{line}", said, "a config file that runs without an error") from None
    if function is None:
        raise ConfigError("CONFIG", str(path), "a file that defines a function config() -> RunConfig")
    if not isinstance(config, RunConfig):
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
        raise ConfigError(f"{path}:{line} config()", type(config).__name__, "a RunConfig as its result")
    return config


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`config` with the fields that command line `arguments` name replaced; see `load_config`."""
    arguments = list(arguments)
    config = _turn_on_parts(config, arguments)
    try:
        result, unknown = _parse(config, arguments)
    except SystemExit as end:
        if end.code in (None, 0):  # --help
            raise
        raise _reason(end, config, arguments) from None
    if unknown:
        raise ConfigError("command line", unknown[0], _nearest(config, unknown[0]))
    return result


def _parse(config: RunConfig, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """The settings and the arguments that fit no field. SystemExit(2), silently, where a value does not fit."""
    with contextlib.redirect_stderr(io.StringIO()):  # tyro explains itself in a box of many lines
        return tyro.cli(
            RunConfig,
            default=config,
            args=arguments,
            prog=USAGE,
            return_unknown_args=True,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )


def _turn_on_parts(part: Any, arguments: list[str], place: str = "") -> Any:
    """`part` with optional parts that are None, and that `arguments` name (or ask help for), at their defaults."""
    new = {}
    for name, kind in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        path = f"{place}{name}."
        optional: list[Any] = [a for a in typing.get_args(kind) if dataclasses.is_dataclass(a)]
        named = any(a in ("-h", "--help") or a.replace("-", "_").startswith(f"__{path}") for a in arguments)
        if value is None and optional and named:
            new[name] = optional[0]()
        elif dataclasses.is_dataclass(value):
            new[name] = _turn_on_parts(value, arguments, path)
    return dataclasses.replace(part, **new)


# ------------------------------------------------------------------------------------------------ what went wrong


def _reason(end: SystemExit, config: RunConfig, arguments: list[str]) -> ConfigError:
    """Why tyro ended: a check of the config that failed, or else the first flag whose value does not parse alone."""
    failed = _failed_check(end)
    if failed is not None:
        return failed
    starts = [index for index, text in enumerate(arguments) if text.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(arguments)], strict=True):
        try:
            _parse(config, arguments[start:stop])
        except SystemExit as alone:
            if _failed_check(alone) is not None:  # a value that parses, and does not fit without the others
                continue
            flag, _, joined = arguments[start].partition("=")
            values = [joined] if joined else arguments[start + 1 : stop]
            place = flag.removeprefix("--").replace("-", "_")
            return ConfigError(place, " ".join(values), _wanted(config, place))
    return ConfigError("command line", " ".join(arguments), f"flags of {USAGE} --help")


def _failed_check(end: SystemExit) -> ConfigError | None:
    """The check of the config because of which tyro ended, if it was one."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause


def _fields(part: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Path and type of every field that has a flag, `("schedule.learning_rate.0.value", float)`."""
    for name, kind in typing.get_type_hints(type(part)).items():
        value, path = getattr(part, name), f"{place}{name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{path}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from _fields(item, f"{path}.{index}.")
        else:
            yield path, kind


def _wanted(config: RunConfig, place: str) -> str:
    return _words(dict(_fields(config))[place])


def _words(kind: Any) -> str:
    """What a field of this type takes: `a whole number or None`."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    if kind in names:
        return names[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(inner)}"
    if typing.get_origin(kind) is tuple:
        return f"{_words(inner[0])} (several, separated by spaces)"
    return " or ".join(_words(part) for part in inner)


def _nearest(config: RunConfig, argument: str) -> str:
    flags = [f"--{path.replace('_', '-')}" for path, _ in _fields(config)]
    flag = argument.partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(flag, flags, 1) if flag.startswith("--") else []
    return f"a field of the config; {f'the nearest is {near[0]}' if near else f'see {USAGE} --help'}"
