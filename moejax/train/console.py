"""What a run shows: one line a step, at most one per `log.console_seconds`, and a progress bar on a terminal.

In a notebook it is shown by notebook.py.

Everything goes through the logger "moejax", whose handlers are the console of this file and log.txt of runlog.py.
"""

import datetime
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger("moejax")


class ConsoleHandler(logging.Handler):
    """Shows records as plain lines; on a terminal a progress bar stays below them."""

    def __init__(self, *, total_steps: int, console: Console | None = None):
        super().__init__()
        self.console = console or Console(highlight=False)
        columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn("ETA {task.fields[eta]}"), TimeElapsedColumn(), console=self.console)
        self.task = self.bar.add_task("", total=total_steps, eta="?")
        if self.console.is_terminal:
            self.bar.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record; warnings and worse with their level."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.print(level + record.getMessage(), markup=False, soft_wrap=True)

    def progress(self, step: int, eta: str) -> None:
        """Moves the bar to `step`."""
        self.bar.update(self.task, completed=step, eta=eta)

    def pictures(self, paths: Sequence[Path]) -> None:
        """Nothing: they are in the run folder."""

    def close(self) -> None:
        """Takes the progress bar away."""
        if self.console.is_terminal:
            self.bar.stop()
        super().close()


class StepLines:
    """Logs a line for a step, unless the last one was shown less than `seconds` ago."""

    def __init__(self, *, total_steps: int, seconds: float):
        self.total_steps, self.seconds, self.shown = total_steps, seconds, -math.inf
        self.step_times: deque[float] = deque(maxlen=50)

    def show(self, metrics: Mapping[str, Any]) -> str:
        """Logs the line of `metrics` when it is due (always for the last step and validations); returns the ETA."""
        if metrics.get("step_time"):
            self.step_times.append(metrics["step_time"])
        left = self.total_steps - metrics["step"]
        eta = duration(left * statistics.median(self.step_times)) if self.step_times else "?"
        now = time.monotonic()
        if now - self.shown >= self.seconds or left <= 0 or metrics.get("valid_loss") is not None:
            self.shown = now
            passing = left > 0 and metrics.get("valid_loss") is None  # where there is one line for steps
            logger.info(step_line(metrics, self.total_steps, eta), extra={"passing": passing})
        return eta


def step_line(metrics: Mapping[str, Any], total_steps: int, eta: str) -> str:
    """One line for people, `step  20/300  loss 3.4120  lr 3.00e-03  grad 0.84  12.3k tokens/s  ...  ETA 0:02:10`."""
    parts = [f"step {metrics['step']:>{len(str(total_steps))}}/{total_steps}"]
    parts += [form(metrics[key]) for key, form in _FORMS.items() if metrics.get(key) is not None]
    return "  ".join([*parts, f"ETA {eta}"])


def amount(value: float) -> str:
    """`value` in three digits: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """`seconds` as H:MM:SS, with days before it where there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))


_FORMS: dict[str, Callable[[float], str]] = {  # of the line's parts, in their order
    "loss": "loss {:.4f}".format,
    "learning_rate": "lr {:.2e}".format,
    "grad_norm": "grad {:.2f}".format,
    "tokens_per_second": lambda value: f"{amount(value)} tokens/s",
    "mfu": "MFU {:.1%}".format,
    "valid_loss": "valid loss {:.4f}".format,
    "valid_bits_per_byte": "{:.3f} bits/byte".format,
}
