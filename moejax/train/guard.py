"""What ends a run early: numbers that are not finite, checkpoints none of which is whole, and signals."""

import signal
from types import FrameType


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; the message names them."""


class DamagedError(RuntimeError):
    """A run has checkpoints, and none is whole; the message names them and the first damaged file."""


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
