"""When a run saves, what it saves, and what it says of it."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from moejax.checkpoint.commit import Saved, State, has_ended
from moejax.checkpoint.manager import Checkpoints
from moejax.config import ConfigError, RunConfig
from moejax.data.batches import merge_states
from moejax.train.copies import LAST_SECONDS, STOPPED_SECONDS, Copies
from moejax.train.phases import Phases
from moejax.train.resume import Position, checkpoint_parts, volume
from moejax.train.runlog import NoLog, RunLog
from moejax.train.state import TrainState, layer_of_slot
from moejax.train.together import everyones

logger = logging.getLogger("moejax")


class Saver:
    """The saves of a run. All processes call `save` and `save_last` at the same steps."""

    def __init__(
        self, config: RunConfig, checkpoints: Checkpoints, copies: Copies, log: RunLog | NoLog, phases: Phases
    ):
        """The minutes of `checkpoint.every_minutes` begin now; the newest checkpoint is sent where it has not been."""
        self._config, self._checkpoints, self._log, self._phases = config, checkpoints, log, phases
        self._copies = copies
        if checkpoints.latest is not None:
            copies.send(checkpoints.latest)
        self._began = time.monotonic()  # the save before

    def is_due(self, step: int) -> bool:
        """Whether to save after a step, by this process's clock. By time, only once the save before has ended."""
        every = self._config.checkpoint
        if every.every_steps is not None and step % every.every_steps == 0:
            return True
        state = self._checkpoints.state
        if every.every_minutes is None or (state is not None and state.running):
            return False
        return time.monotonic() - self._began >= 60 * every.every_minutes

    def save(self, state: TrainState, position: Position) -> None:
        """Begins to save; waits for the save before, if that goes on."""
        with self._phases("save_stall"):
            self._began = time.monotonic()
            meta: dict[str, Any] = {"step": position.step, "tokens": position.tokens, "valid_loss": position.valid_loss}
            meta["data"] = merge_states(everyones(position.data))
            meta["layer_of_slot"] = layer_of_slot(self._config)
            self._tell(self._checkpoints.save(position.step, checkpoint_parts(state), meta))

    @property
    def state(self) -> State | None:
        """How far this process is with a save, for `look`."""
        return self._checkpoints.state

    def look(self, states: Sequence[State | None]) -> None:
        """Says what came of a save that has ended, given the `state` of all processes."""
        if any(states) and has_ended(states):
            self._tell(self._checkpoints.wait())
        self._copies.tell(self._log)

    def save_last(self, state: TrainState, position: Position) -> None:
        """Saves and waits for it.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written.
            RuntimeError: it failed for another reason.
        """
        self.save(state, position)
        with self._phases("save_stall"):
            saved = self._checkpoints.wait()
        self._tell(saved)
        failure = saved.failure if saved else None
        if failure is not None and failure.wanted is not None:
            raise ConfigError("out", str(self._checkpoints.folder), failure.wanted)
        if failure is not None:
            raise RuntimeError(f"checkpoint {position.step} was not saved: {failure.words}")

    def finish(self, stopped: bool) -> None:
        """Waits for the last upload; `stopped`: the run was asked to end soon."""
        with self._phases.ledger.spend("save_stall"), self._phases.watchdog.allow(None, "upload"):  # ends by itself
            self._copies.finish(self._log, STOPPED_SECONDS if stopped else LAST_SECONDS)

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.failure is not None:
            words, kept = saved.failure.words, self._checkpoints.latest
            rest = "there is none" if kept is None else f"the newest is {kept}"
            logger.warning(f"checkpoint {saved.step} was not saved ({words}); {rest}")
            self._log.event("checkpoint_failed", step=saved.step, error=words)
            return
        deleted = list(saved.deleted)
        took = f"checkpoint {saved.step}: {volume(saved.bytes)} in {saved.seconds:.1f} s"
        logger.info(took + (f"; deleted {', '.join(map(str, deleted))}" if deleted else ""))
        seconds = round(saved.seconds, 3)
        self._log.event("checkpoint", step=saved.step, seconds=seconds, bytes=saved.bytes, deleted=deleted)
        self._copies.send(saved.step)
