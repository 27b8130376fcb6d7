"""`moejax plan CONFIG [--any.field value ...]`: memory, time and cost of a run, before anyone rents a GPU."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from moejax.commands.parser import Parser
from moejax.config import ConfigError, RunConfig
from moejax.config_source import load_config

if TYPE_CHECKING:
    from moejax.plan.compile import CompiledStep
    from moejax.plan.hardware import Hardware

WIDTH = 150


def plan_command(words: Sequence[str]) -> int:
    """Prints the plan of a run, or the best plans of a model, and writes them. Returns the exit code."""
    options, settings = _options(words)
    config = load_config(options.config, settings)
    from moejax.plan.hardware import load_hardware

    chip, console = load_hardware(options.hardware), Console(width=WIDTH, highlight=False)
    command = _search if options.search else _plan
    facts, shown = command(config, chip, options)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        console.print(*shown, sep="\n\n", soft_wrap=True)
    return 0


def _search(config: RunConfig, chip: "Hardware", options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    from moejax.plan.search import as_json, as_table, search

    found = search(config, chip, _devices(config, options))
    path = _written(options, config, "search.json", as_json(found))
    return as_json(found), [as_table(found), f"written: {path}"]


def _plan(config: RunConfig, chip: "Hardware", options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    from moejax.mesh import simulate
    from moejax.plan.plan import as_json, as_table, plan
    from moejax.report.plan import save_plan

    if options.compile and options.target == "cpu":
        simulate(_devices(config, options))  # before the estimate traces anything, which starts JAX
    made = plan(config, chip, options.devices)
    facts, shown = as_json(made), [as_table(made)]
    if options.compile:
        from moejax.plan.compile import compile_step

        compiled = compile_step(made.config, options.target)
        facts["compiled"] = _facts_of(compiled)
        shown.append(_table_of(compiled))
    path = _written(options, config, "plan.json", facts)
    save_plan(made.draw(), path.with_name("plan.png"))
    return facts, [*shown, f"written: {path}, {path.with_name('plan.png')}"]


def _facts_of(compiled: "CompiledStep") -> dict[str, Any]:
    facts = dataclasses.asdict(compiled)
    del facts["flights"]
    return facts | {"states": compiled.states}


def _table_of(compiled: "CompiledStep") -> Group:
    seconds = compiled.trace_seconds + compiled.lower_seconds + compiled.compile_seconds
    head = f"compiled for {compiled.devices} {compiled.target} devices in {seconds:.0f} s: "
    head += f"{compiled.argument_bytes / 1e9:.2f} GB given, {compiled.temporary_bytes / 1e9:.2f} GB temporary; "
    head += f"{compiled.flops / 1e12:.3f} TFLOP by XLA's count, the body of a loop once"
    table = Table(box=None)
    for heading in ("collectives over", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("in the program", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in compiled.sites:
        table.add_row(site.axis, site.kind, str(site.count), f"{site.bytes / 1e6:.3f}")
    states = ", ".join(f"{count} {state}" for state, count in compiled.states.items())
    return Group(head, *([f"beside products of the other micro-batch: {states}"] if states else []), "", table)


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own words, and those that set fields of the config."""
    parser = Parser("plan", "Memory, time and cost of a run; every other --field value sets one of the config's.")
    parser.add_argument("config", metavar="CONFIG", help="Python file, config.json or run folder")
    parser.add_argument("--hardware", default="h800", help="h800, h100, h200, b200 or a JSON file of one's own")
    parser.add_argument("--devices", type=int, help="that there are, where a length of the mesh is -1")
    parser.add_argument("--search", action="store_true", help="look for the ten cheapest plans on so many devices")
    parser.add_argument("--compile", action="store_true", help="compile the real step, and say what XLA says of it")
    parser.add_argument("--target", choices=("cpu", "h200"), default="cpu", help="for which --compile compiles")
    parser.add_argument("--out", metavar="DIR", help="folder of plan.json and plan.png; None: plans/NAME")
    parser.add_argument("--json", action="store_true", help="print the JSON")
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        raise ConfigError("CONFIG", words[0], "a config first: moejax plan CONFIG [--any.field value ...]")
    return parser.parse_known_args(list(words))


def _devices(config: RunConfig, options: argparse.Namespace) -> int:
    if options.devices:
        return options.devices
    lengths = [getattr(config.mesh, axis) for axis in ("pipe", "replica", "data", "expert")]
    if -1 in lengths:
        raise ConfigError("--devices", None, "how many there are, as a length of the mesh is -1")
    return math.prod(lengths)


def _written(options: argparse.Namespace, config: RunConfig, name: str, facts: object) -> Path:
    folder = Path(options.out or f"plans/{config.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error
    return path
