"""`moejax schedule`: a pipeline schedule as text, picture, JSON and Chrome trace, or all schedules side by side."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

from moejax.commands.parser import Parser
from moejax.config import ConfigError


def schedule_command(words: Sequence[str]) -> int:
    """Prints a schedule and what it costs, and writes what is asked for. Returns the exit code."""
    options = _options(words)
    from moejax.pipeline.schedule import named
    from moejax.pipeline.simulate import Costs, simulate
    from moejax.pipeline.table import build
    from moejax.report.compare import as_table, compare
    from moejax.report.schedule import as_text, describe, save_schedule
    from moejax.report.trace import chrome_trace, measured_spans

    costs, console = Costs.parsed(options.costs), Console(width=150, highlight=False)
    if options.compare:
        rows = compare(options.stages, options.microbatches, costs, options.max_deferred_w)
        console.print_json(data=rows) if options.json else console.print(as_table(rows))
        return 0
    program = named(options.kind, options.stages, options.microbatches, max_deferred_w=options.max_deferred_w)
    timeline = simulate(program, costs)
    facts = describe(build(program), timeline, costs)
    if options.json:
        print(json.dumps(facts))
    else:
        console.print(as_text(facts, timeline), soft_wrap=True, end="")
    try:
        if options.png:
            save_schedule(timeline, options.png)
        if options.trace:
            measured = measured_spans(options.measured, timeline) if options.measured else None
            with open(options.trace, "w", encoding="utf-8") as file:
                json.dump(chrome_trace(timeline, measured), file)
    except OSError as error:
        raise ConfigError("FILE", error.filename, f"a file that can be read or written ({error.strerror})") from error
    return 0


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser("schedule", "Draws a pipeline schedule and says what it costs. Defaults: the V3 report's Figure 5.")
    kinds = "gpipe, one_f_one_b, zb1p, dualpipe or dualpipe_v"
    parser.add_argument("--kind", default="dualpipe", metavar="NAME", help=kinds)
    parser.add_argument("--stages", type=int, default=8, help="parts of the model; dualpipe_v has two on a rank")
    parser.add_argument("--microbatches", type=int, default=20, help="of a step, both directions together")
    parser.add_argument("--max-deferred-w", type=int, help="weight gradients that a rank puts off at most")
    times = "times of F, I, W, B, FB and send, e.g. F=1 I=1.1 W=0.9 FB=2.5; F, I, W are 1 and B, FB the sum by default"
    parser.add_argument("--costs", nargs="+", metavar="KIND=TIME", default=[], help=times)
    parser.add_argument("--compare", action="store_true", help="all kinds: bubble, parameters and activations")
    parser.add_argument("--png", metavar="FILE", help="picture that is written")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace that is written, for ui.perfetto.dev")
    parser.add_argument("--measured", metavar="FILE", help="times of a run, laid over the trace: the cells of --json")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, every cell with its start and end")
    return parser.parse_args(list(words))
