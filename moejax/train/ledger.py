"""Where the wall-clock time of a run goes, over all its attempts: the kinds of KINDS, which sum to the wall clock.

An attempt is the life of one process, or the part of it after a roll-back; a run has many. At any moment the clock
runs for one kind only. What is known so far becomes a line of kind "ledger" in the run's events.jsonl, at least after
every save, so that of an attempt that was killed only the time since its last line is unknown; it counts as restart.

A line has: attempt (its start), resumed (the step it went on from), step (the last one done), useful (seconds of steps
when that one was done), until (when the line was written), seconds (of the attempt, kind by kind). Times are seconds,
`attempt` and `until` since the epoch; every line holds the whole attempt, so that any other may be lost.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

KINDS = {
    "steps": "of optimizer steps that the run has kept",
    "data_wait": "waiting for batches",
    "validation": "validating",
    "save_stall": "while steps wait for a checkpoint",
    "pictures": "drawing",
    "compilation": "of the step and the validation",
    "restore": "checking and loading a checkpoint",
    "initialisation": "from the start of the process to its first compilation or step, restore apart",
    "restart": "from an attempt's last line to the start of the next attempt",
    "lost_work": "of steps that did not end, or that a later attempt or the same one did again",
    "other": "all else",
}
SPENT = KINDS.keys() - {"steps", "restart"}  # what `Ledger.spend` takes


class _Mark(NamedTuple):
    step: int
    useful: float  # seconds of kept steps in the whole run, when that step was done


class Ledger:
    """The time of a run, in this attempt and the earlier ones."""

    def __init__(
        self, earlier: Path, *, began: float, every: float = 30.0, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens the ledger in the kind initialisation, before anything that takes time.

        Args:
            earlier: events.jsonl of the run, with the lines of earlier attempts; it need not exist.
            began: when this attempt's process started, seconds since the epoch.
            every: seconds after which a line is due at the end of a step or phase.
            clock: seconds since the epoch. Where it is set back, it counts as standing still.
        """
        self.attempts = self.lost_steps = 0
        self._every, self._clock = every, clock
        self._write: Callable[..., None] | None = None
        self._before, self._own = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)  # seconds; of this attempt
        self._marks = [_Mark(0, 0.0)]  # at the lines written so far, ascending
        self._attempt = self._until = self._noted = self._useful = 0.0
        self._step = self._resumed = 0
        for line in read_events(earlier):
            if line.get("kind") == "ledger":
                self._replay(line)
        self._begin(max(min(began, clock()), self._until))
        self._kind = "initialisation"

    def resume(self, step: int, write: Callable[..., None]) -> None:
        """Says from which step this attempt goes on (0: a new run), and opens the run's events for writing.

        Args:
            step: last step that the state holds; the steps that earlier attempts did after it are lost work.
            write: as `RunLog.event`.
        """
        self._go_back(step)
        self._write = write
        self.note()

    def roll_back(self, step: int) -> None:
        """Says that the run goes on from an earlier step: what comes now is another attempt."""
        self.note()
        self._begin(self._until)
        self._useful = 0.0
        self._go_back(step)
        self.note()

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Time for a kind of SPENT. What is spent inside of it, on steps too, is not counted for it as well."""
        if kind not in SPENT:
            raise ValueError(f"kind={kind!r}: wanted one of {', '.join(sorted(SPENT))}")
        with self._on(kind):
            yield
        self._note_if_due(at_once=kind == "save_stall")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time for optimizer step `number`, which is done when the block ends without an exception."""
        with self._on("steps"):
            yield
        self._step, self._useful = number, self._own["steps"]
        self._note_if_due()

    def note(self) -> None:
        """Writes a line now: for the end of an attempt. A save and a long phase write theirs by themselves."""
        self._charge()
        self._noted = self._until
        self._marks.append(_Mark(self._step, self._before["steps"] + self._useful))
        if self._write is not None:
            facts = {"attempt": self._attempt, "resumed": self._resumed, "step": self._step, "useful": self._useful}
            seconds = {kind: value for kind, value in self._own.items() if value}
            self._write("ledger", **facts, until=self._until, seconds=seconds)

    def totals(self) -> dict[str, float]:
        """Seconds of each of KINDS, up to now; their sum is the wall clock since the first attempt's start."""
        self._charge()
        return {kind: self._before[kind] + self._own[kind] for kind in KINDS}

    def goodput(self) -> float:
        """Share of the wall clock that went into steps which the run has kept."""
        totals = self.totals()
        wall = sum(totals.values())
        return totals["steps"] / wall if wall else 0.0

    def summary(self) -> dict[str, Any]:
        """For summary.json; seconds are rounded to milliseconds."""
        totals = self.totals()
        return {
            "goodput": round(self.goodput(), 4),
            "wall_seconds": round(sum(totals.values()), 3),
            "seconds": {kind: round(seconds, 3) for kind, seconds in totals.items()},
            "attempts": self.attempts,
            "lost_steps": self.lost_steps,
        }

    def table(self) -> str:
        """For the console: a line for each kind that took time, the wall clock, and what came of it."""
        totals = self.totals()
        wall = sum(totals.values())
        rows = [(kind.replace("_", " "), seconds) for kind, seconds in totals.items() if seconds]
        lines = [f"{name:<15}{s:>14,.1f} s {s / (wall or 1):>7.1%}" for name, s in [*rows, ("wall clock", wall)]]
        counts = f"{_counted(self.attempts, 'attempt')}, {_counted(self.lost_steps, 'step')} lost"
        return "\n".join([*lines, f"{counts}, goodput {self.goodput():.1%}"])

    # ------------------------------------------------------------------------------------------------------- pieces

    def _replay(self, line: dict[str, Any]) -> None:
        """Takes over a line of an earlier attempt."""
        if line["attempt"] != self._attempt:
            self._begin(line["attempt"])
            self._go_back(line["resumed"])
        self._own |= line["seconds"]
        self._until, self._step = line["until"], line["step"]
        self._marks.append(_Mark(self._step, self._before["steps"] + line["useful"]))

    def _begin(self, began: float) -> None:
        """Ends the attempt before, if there is one, and starts another."""
        for kind, seconds in self._own.items():
            self._before[kind] += seconds
        if self.attempts:
            self._before["restart"] += began - self._until
        self._own = dict.fromkeys(KINDS, 0.0)
        self._attempt = self._until = self._noted = began
        self.attempts += 1

    def _go_back(self, step: int) -> None:
        """Moves the time of the steps after `step` to the lost work."""
        while self._marks[-1].step > step:
            self._marks.pop()
        lost = self._before["steps"] - self._marks[-1].useful
        self._before["steps"] -= lost
        self._before["lost_work"] += lost
        self.lost_steps += max(0, self._step - step)
        self._step = self._resumed = step

    @contextlib.contextmanager
    def _on(self, kind: str) -> Iterator[None]:
        self._charge()
        started = self._kind == "initialisation" and kind in ("compilation", "steps")
        outer, self._kind = "other" if started else self._kind, kind
        try:
            yield
        finally:
            self._charge()
            self._kind = outer

    def _charge(self) -> None:
        """Books the time since the last call on the kind of now."""
        now = max(self._clock(), self._until)
        self._own[self._kind] += now - self._until
        self._until = now

    def _note_if_due(self, at_once: bool = False) -> None:
        if at_once or self._until - self._noted >= self._every:
            self.note()


def written_summary(path: Path) -> dict[str, Any] | None:
    """`Ledger.summary` as of the last line of an events.jsonl, for readers; None where there is no such line."""
    ledger = Ledger(path, began=0.0, clock=lambda: 0.0)  # its clock stands still: its own attempt takes no time
    summary = ledger.summary()
    return {**summary, "attempts": ledger.attempts - 1} if ledger.attempts > 1 else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an events.jsonl; none where it is missing.

    A process that is killed may leave a part of a line, which spoils what the next one writes behind it: both are left
    out.
    """
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
            events.append(json.loads(line))
    return events


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
