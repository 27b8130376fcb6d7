"""How results show themselves in a notebook: formatters for IPython, set when moejax is imported in its kernel."""

import html
import io
import sys
from typing import TYPE_CHECKING, Any

from moejax.train.notebook import in_notebook

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

DPI = 80
WIDTH = 110  # characters of a table
PRE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3">{code}</pre>'


def show_results() -> None:
    """Sets the formatters where this process is the kernel of a notebook; nothing else is loaded for it."""
    if not in_notebook():
        return
    display = sys.modules["IPython"].get_ipython().display_formatter
    display.formatters["text/html"].for_type_by_name("moejax.train.run", "RunResult", _result)
    display.formatters["image/png"].for_type_by_name("moejax.pipeline.schedule", "Program", _program)
    display.formatters["image/png"].for_type_by_name("moejax.pipeline.simulate", "Timeline", _timeline)
    display.ipython_display_formatter.for_type_by_name("moejax.plan.plan", "Plan", _show_plan)


def _result(result: Any) -> str:
    parts = [f"<b>{result.ended}</b> at step {result.step}, {result.tokens:,} tokens"]
    for name, value in (("loss", result.loss), ("validation loss", result.valid_loss)):
        parts += [f"{name} {value:.4f}"] if value is not None else []
    return f"{'; '.join(parts)}; <code>{html.escape(str(result.folder))}</code>"


def _program(program: Any) -> bytes:
    from moejax.pipeline.simulate import simulate

    return _timeline(simulate(program))


def _timeline(timeline: Any) -> bytes:
    from moejax.report.schedule import draw_schedule

    return _png(draw_schedule(timeline))


def _show_plan(plan: Any) -> None:
    """The tables, and the picture below them."""
    from IPython.display import HTML, Image, display

    from moejax.plan.plan import as_table

    display(HTML(_html(as_table(plan))))
    display(Image(data=_png(plan.draw())))


def _html(shown: "RenderableType") -> str:
    from rich.console import Console

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False, highlight=False)
    console.print(shown, soft_wrap=True)
    return console.export_html(inline_styles=True, code_format=PRE)


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, dpi=DPI)
    return file.getvalue()
