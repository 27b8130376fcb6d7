"""When a run saves, what it saves, and what it says of it."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from typing import Any, Literal

from moejax.checkpoint.commit import Saved, State, has_ended
from moejax.checkpoint.manager import Checkpoints
from moejax.config import ConfigError, RunConfig
from moejax.data.batches import merge_states
from moejax.train.copies import LAST_SECONDS, STOPPED_SECONDS, Copies
from moejax.train.environment import versions
from moejax.train.phases import Phases
from moejax.train.resume import Position, checkpoint_parts, volume
from moejax.train.runlog import NoLog, RunLog
from moejax.train.state import TrainState, layer_of_slot
from moejax.train.together import everyones, is_main

logger = logging.getLogger("moejax")

Due = Literal["durable", "local"] | None


class Saver:
    """The saves of a run. All processes call `save` and `save_last` at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Checkpoints,
        local: Checkpoints | None,
        copies: Copies,
        log: RunLog | NoLog,
        phases: Phases,
    ):
        """The minutes between saves begin now; the newest checkpoint is sent where it has not been.

        `local`: those of `checkpoint.local`.
        """
        self._config, self._checkpoints, self._log, self._phases = config, checkpoints, log, phases
        self._local, self._copies = local, copies
        if checkpoints.latest is not None:
            copies.send(checkpoints.latest)
        self._last = checkpoints  # where the last save went
        self._began = self._began_local = time.monotonic()  # the save before

    def due(self, step: int) -> Due:
        """Whether to save after a step, by this process's clock. By time, only once the save before has ended."""
        every, now = self._config.checkpoint, time.monotonic()
        if every.every_steps is not None and step % every.every_steps == 0:
            return "durable"
        state = self._last.state
        if state is not None and state.running:
            return None
        if every.every_minutes is not None and now - self._began >= 60 * every.every_minutes:
            return "durable"
        if self._local is not None and now - self._began_local >= 60 * every.local_minutes:
            return "local"
        return None

    def save(self, state: TrainState, position: Position, due: Due = "durable") -> None:
        """Begins to save; waits for the save before, if that goes on."""
        with self._phases("save_stall"):
            self._began_local = time.monotonic()
            if due == "durable":
                self._began = self._began_local
            meta: dict[str, Any] = {"step": position.step, "tokens": position.tokens, "valid_loss": position.valid_loss}
            meta["data"] = merge_states(everyones(position.data))
            meta["layer_of_slot"] = layer_of_slot(self._config)
            meta |= {"config": dataclasses.asdict(self._config), "versions": versions()}
            self.settle()
            self._last = self._local if due == "local" and self._local is not None else self._checkpoints
            self._last.save(position.step, checkpoint_parts(state), meta)

    @property
    def state(self) -> State | None:
        """How far this process is with a save, for `look`."""
        return self._last.state

    def look(self, states: Sequence[State | None]) -> None:
        """Says what came of a save that has ended, given the `state` of all processes."""
        if any(states) and has_ended(states):
            self.settle()
        self._copies.tell(self._log)

    def settle(self) -> Saved | None:
        """Waits until nothing is being written, says what came of it, and returns that."""
        saved = self._last.wait()
        if saved is not None:
            self._tell(saved)
        return saved

    def save_last(self, state: TrainState, position: Position) -> None:
        """Saves and waits for it.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written.
            RuntimeError: it failed for another reason.
        """
        self.save(state, position)
        with self._phases("save_stall"):
            saved = self.settle()
        failure = saved.failure if saved else None
        if failure is not None and failure.wanted is not None:
            raise ConfigError("out", str(self._checkpoints.folder), failure.wanted)
        if failure is not None:
            raise RuntimeError(f"checkpoint {position.step} was not saved: {failure.words}")
        if self._local is not None and is_main():  # it may lie in memory, and is no longer needed
            shutil.rmtree(self._local.folder, ignore_errors=True)

    def finish(self, stopped: bool) -> None:
        """Waits for the last upload; `stopped`: the run was asked to end soon."""
        with self._phases.ledger.spend("save_stall"), self._phases.watchdog.allow(None, "upload"):  # ends by itself
            self._copies.finish(self._log, STOPPED_SECONDS if stopped else LAST_SECONDS)

    def _tell(self, saved: Saved) -> None:
        is_local = self._last is self._local
        place = {"folder": str(self._last.folder)} if is_local else {}
        name = f"{'local ' if is_local else ''}checkpoint {saved.step}"
        if saved.failure is not None:
            words, kept = saved.failure.words, self._last.latest
            rest = "there is none" if kept is None else f"the newest is {kept}"
            logger.warning(f"{name} was not saved ({words}); {rest}")
            self._log.event("checkpoint_failed", step=saved.step, error=words, **place)
            return
        deleted = list(saved.deleted)
        took = f"{name}: {volume(saved.bytes)} in {saved.seconds:.1f} s"
        logger.info(took + (f"; deleted {', '.join(map(str, deleted))}" if deleted else ""))
        seconds = round(saved.seconds, 3)
        self._log.event("checkpoint", step=saved.step, seconds=seconds, bytes=saved.bytes, deleted=deleted, **place)
        if not is_local:
            self._copies.send(saved.step)
