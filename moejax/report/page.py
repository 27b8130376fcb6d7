"""The report of one or several runs: one HTML page that loads nothing and runs nothing.

The order is that of the questions: how did it end, what is missing, did it learn, are the experts balanced, how fast
was it, where did the time go, what went wrong, and what was set.
"""

import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from moejax.config import ConfigError
from moejax.report.page_experts import experts
from moejax.report.page_runs import differences, notes, summary
from moejax.report.page_time import faults, where_time_went
from moejax.report.page_training import losses, speed
from moejax.report.records import Records, read_runs


class Page(type(Path())):  # type: ignore[misc]
    """The path of a report, which a notebook shows as the page itself."""

    def _repr_html_(self) -> str:
        content = escape(self.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{content}" style="width:100%;height:800px;border:1px solid #8884"></iframe>'


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Page:
    """Writes the report of the runs in `folders` and returns its path; the file is replaced as a whole.

    Args:
        folders: run folders, also of runs that still go on or were cut off; several are compared.
        out: the file; None: report.html in the run folder, or, of several runs, in the working directory.

    Raises:
        ConfigError: a folder is not a run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    path = Page(out if out is not None else runs[0].folder / "report.html" if len(runs) == 1 else "report.html")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page(runs), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ConfigError("--out", str(path), f"a file that can be written ({error.strerror})") from None
    return path


def page(runs: Sequence[Records]) -> str:
    """The page as HTML text."""
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    sections = {
        "Losses": losses(runs),
        "Experts": experts(runs),
        "Speed": speed(runs),
        "Where the time went": where_time_went(runs),
        "Faults and restarts": faults(runs),
        "Settings": differences(runs),
    }
    there = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in there)
    parts = [f"<h1>{escape(title)}</h1><nav>{links}</nav>", summary(runs), notes(runs)]
    parts += [f'<h2 id="{_anchor(name)}">{name}</h2>{content}' for name, content in there.items()]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts.append(f"<footer>Made by moejax report on {made}. Numbers appear under the pointer.</footer>")
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), content="\n".join(parts))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
