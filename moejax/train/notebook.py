"""What a run shows in a notebook: a bar, the line of the newest step and what the run has said, and below its pictures.

Each is an output of the cell that is replaced by a newer one, which every frontend of Jupyter can do without widgets.
"""

import base64
import html
import importlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURES = ("losses", "expert_load")  # of those in the run folder
WIDTH = 700  # pixels of a picture
SECONDS = 0.25  # least time between two states of the bar
LINES = 200  # the newest that stay


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class CellHandler(logging.Handler):
    """Shows records in the cell that runs. The line of a step gives way to that of the next."""

    def __init__(self, *, total_steps: int, pictures: bool = True):
        """`pictures`: whether `pictures` shows any."""
        super().__init__()
        self._total, self._step, self._eta, self._with_pictures = total_steps, 0, "?", pictures
        self._lines: deque[str] = deque(maxlen=LINES)
        self._passing, self._shown = "the first step is compiled first", -math.inf
        self._display = importlib.import_module("IPython.display").display
        self._text = self._display(self._page(), raw=True, display_id=True)
        self._pictures: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record; warnings and worse with their level."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = level + record.getMessage()
        if getattr(record, "passing", False):
            self._passing = line
        else:
            self._lines.append(line)
            self._update()

    def progress(self, step: int, eta: str) -> None:
        """Moves the bar to `step`."""
        self._step, self._eta = step, eta
        if time.monotonic() - self._shown >= SECONDS:
            self._update()

    def pictures(self, paths: Sequence[Path]) -> None:
        """Shows those of these files that PICTURES names, each in the place of the one before."""
        for path in sorted(paths, key=lambda path: path.stem, reverse=True):
            if self._with_pictures and path.stem in PICTURES:
                data = {"image/png": base64.b64encode(path.read_bytes()).decode(), "text/plain": path.stem}
                options: dict[str, Any] = {"raw": True, "metadata": {"image/png": {"width": WIDTH}}}
                if path.stem in self._pictures:
                    self._pictures[path.stem].update(data, **options)
                else:
                    self._pictures[path.stem] = self._display(data, display_id=True, **options)

    def close(self) -> None:
        """Leaves the last state, without the line of a step."""
        self._passing = ""
        self._update()
        super().close()

    def _update(self) -> None:
        self._shown = time.monotonic()
        self._text.update(self._page(), raw=True)

    def _page(self) -> dict[str, str]:
        lines = "\n".join([*self._lines, *filter(None, [self._passing])])
        bar = f'<progress value="{self._step}" max="{max(self._total, 1)}" style="width: 60%"></progress>'
        count = f"{self._step}/{self._total}, ETA {self._eta}" if self._passing else f"{self._step}/{self._total}"
        text = f'<pre style="white-space: pre-wrap">{html.escape(lines)}</pre>'
        return {"text/html": f"<div>{bar} {count}</div>{text}", "text/plain": f"{count}\n{lines}"}
