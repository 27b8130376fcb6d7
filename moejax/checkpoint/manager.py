"""Checkpoints of a run, one folder a step: written in the background, committed whole, verified before they are read.

A checkpoint has named parts: pytrees of arrays, which Orbax writes, and `meta`, plain JSON. While it is written its
folder is `<step>.saving`. When all processes are done, each adds the checksums of what it wrote (`integrity`), and the
first renames the folder to `<step>`. So a folder whose name is a number was whole when it was made, and whether it
still is can be checked. Damaged ones are kept aside, as `<step>.damaged.<n>`.
"""

import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint.commit import (
    SAVING,
    Failure,
    Retention,
    Saved,
    Saving,
    State,
    entries,
    failure_of,
    first_cause,
    has_ended,
    orbax_settings,
)
from moejax.checkpoint.integrity import Damage, verify
from moejax.config import ConfigError

DAMAGED = ".damaged"
POLL_SECONDS = 0.1  # between two looks at the other processes, while a save is waited for


@dataclass(frozen=True)
class Checked:
    """A checkpoint whose files were compared with their checksums."""

    step: int
    damages: tuple[Damage, ...]
    files: int
    bytes: int  # of these files
    bytes_read: int  # by all processes
    aside: str = ""  # the folder's new name, where it was kept aside; known to the first process


class Checkpoints:
    """The checkpoints in a folder: a context manager. All processes of a run call its methods in the same order."""

    def __init__(
        self,
        folder: str | Path,
        retention: Retention | None = None,
        agree: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        """The folder is made by the first `save`.

        Args:
            folder: on a disk that all processes share.
            retention: None: nothing is deleted.
            agree: gives every process's value to every process, in their order.
        """
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every file and of what it raises
        self.folder = Path(folder).absolute()
        self._retention, self._agree = retention, agree
        self._saving: Saving | None = None
        self._given_up = 0  # saves

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        if self._saving is not None:  # of this process: after an error the others may not come to `wait`
            self._saving.join()

    @property
    def steps(self) -> list[int]:
        """The steps that were committed, ascending."""
        return sorted(int(entry.name) for entry in entries(self.folder) if entry.name.isdigit())

    @property
    def latest(self) -> int | None:
        """The newest step that was committed; None if there is none."""
        return max(self.steps, default=None)

    # ------------------------------------------------------------------------------------------------------------ save

    def save(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> Saved | None:
        """Begins to write a checkpoint, unless that step has one; the arrays may be donated when it returns.

        Whatever goes wrong is said by the `Saved` of this save.

        Returns:
            What came of the save before, if it has not been said yet. It has ended: saves never overlap.
        """
        before = self.wait()
        failure, steps = self._agree((self._drop_leftovers(), self.steps))[0]  # the first process deletes and renames
        if step not in steps:
            self._saving = Saving(self.folder, step, {**parts, "meta": meta}, self._retention, self._given_up, failure)
        return before

    def wait(self) -> Saved | None:
        """Returns when nothing is being written, with what came of it; None if that was said before."""
        while not has_ended(states := self._agree(self.state)):
            assert self._saving is not None  # all processes begin the same saves
            self._saving.join(POLL_SECONDS)
            if len(states) > 1 and not self._saving.is_alive():
                time.sleep(POLL_SECONDS)
        saving, self._saving = self._saving, None
        failures = [state.failure for state in states if state is not None and state.failure is not None]
        self._given_up += len(failures) > 0
        return None if saving is None else saving.ended(failures[0] if failures else None)

    @property
    def state(self) -> State | None:
        """How far this process is with a save; None: nothing is left to say of one."""
        return None if self._saving is None else self._saving.state

    def _drop_leftovers(self) -> Failure | None:
        """Deletes what a run left that was killed while it saved or deleted."""
        try:
            for left in entries(self.folder) if jax.process_index() == 0 else ():
                if SAVING in left.name and not left.is_symlink():
                    shutil.rmtree(left.path)
        except OSError as error:
            return failure_of(error)
        return None

    # ------------------------------------------------------------------------------------------------------------ read

    def newest_whole(self, sample: float, set_aside: bool) -> tuple[Checked | None, list[Checked]]:
        """The newest checkpoint whose files are all as they were written, and the newer ones, which are damaged.

        Args:
            sample: the part of the bytes that is read; names and sizes of files are always checked.
            set_aside: whether damaged checkpoints are renamed, so that their steps can be saved again. Where none is
                whole, all keep their names: else the next run would begin anew.

        Raises:
            ConfigError: a damaged checkpoint cannot be renamed. Of several processes only the first raises it.
        """
        damaged: list[Checked] = []
        for step in reversed(self._agree(self.steps)[0]):
            checked = self.check(step, sample)
            if not checked.damages:
                if set_aside and jax.process_index() == 0:
                    damaged = [replace(one, aside=self.set_aside(one.step)) for one in damaged]
                return checked, damaged
            damaged.append(checked)
        return None, damaged

    def check(self, step: int, sample: float = 1.0) -> Checked:
        """What is wrong with the files of a checkpoint; the processes share the reading."""
        parts = len(self._agree(None))
        found = self._agree(verify(self.folder / str(step), jax.process_index() % parts, parts, sample))
        damages = tuple(sorted({damage for part in found for damage in part.damages}))
        return Checked(step, damages, found[0].files, found[0].bytes, sum(part.bytes_read for part in found))

    def load_meta(self, step: int) -> dict[str, Any]:
        """What was saved as a checkpoint's `meta`.

        Raises:
            ConfigError: the checkpoint has none.
        """
        return self.load(step, {"meta": None})["meta"]

    def load(self, step: int, parts: dict[str, Any], partial: bool = False) -> dict[str, Any]:
        """The named parts of a checkpoint; with `partial` what else they have there is left out.

        Args:
            step: one that was saved.
            parts: pytrees of `jax.ShapeDtypeStruct` with a sharding; where and as what each array is wanted.

        Raises:
            ConfigError: the checkpoint does not have those arrays.
        """
        try:
            with orbax_settings(partial):
                loaded = ocp.load_checkpointables(self.folder / str(step), parts)
        except (ValueError, KeyError, OSError) as error:
            place, why = f"checkpoint {self.folder / str(step)}", str(first_cause(error)).splitlines()[0]
            raise ConfigError(place, why, "a whole checkpoint of the model that the config describes") from None
        return {name: loaded[name] for name in parts}

    def set_aside(self, step: int) -> str:
        """Renames a checkpoint that is damaged, and returns the folder's new name.

        Raises:
            ConfigError: it cannot be renamed.
        """
        names = {entry.name for entry in entries(self.folder)}
        name = next(f"{step}{DAMAGED}.{n}" for n in itertools.count(1) if f"{step}{DAMAGED}.{n}" not in names)
        try:
            os.rename(self.folder / str(step), self.folder / name)
        except OSError as error:
            wanted = f"a folder in which {step} can be renamed to {name} ({error.strerror})"
            raise ConfigError("out", str(self.folder), wanted) from None
        return name
