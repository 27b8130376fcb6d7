"""What ends a run early: faults, checkpoints none of which is whole, and signals."""

import signal
from types import FrameType


class EndError(RuntimeError):
    """A run cannot go on; the message says why, in one line."""

    kind: str  # of the run's last event
    exit_code: int

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"moejax: {self}"]


class NonFiniteError(EndError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    kind, exit_code = "non_finite", 10


class DamagedError(EndError):
    """A run has checkpoints, and none is whole."""

    kind, exit_code = "damaged", 12


class MachineFaultError(EndError):
    """Steps had numbers that are not finite, and others when they were repeated."""

    kind, exit_code = "machine_fault", 13


class SpikeError(EndError):
    """The loss has a spike, and the run cannot go back behind it."""

    kind, exit_code = "spike", 14


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that a run ends after its step: a context manager.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where no handler can be set
                return self
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
