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

from moejax.checkpoint import reading
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
        return self._read(step, {"meta": None})["meta"]

    def load(
        self,
        step: int,
        parts: dict[str, Any],
        partial: bool = False,
        finish: Callable[[tuple, Any], Any] | None = None,
    ) -> dict[str, Any]:
        """The named parts of a checkpoint.

        Arrays that stay as they are read are read at once, and a device holds nothing else. With `finish`, or where one
        replica reads for the others, they are read in groups of `reading.STAGED_BYTES` of a device, or alone where one
        is larger: so much a device holds beyond the result, and what `finish` takes for one array.

        Args:
            step: one that was saved.
            parts: pytrees of `jax.ShapeDtypeStruct` with a sharding; where and as what each array is wanted.
            partial: whether a part may lack some of the keys that it has in the checkpoint.
            finish: given an array and its path in `parts`, what is returned in its place.

        Raises:
            ConfigError: the checkpoint does not have those arrays; all processes raise it.
        """
        named, tree = jax.tree_util.tree_flatten_with_path(parts)
        reads = [reading.as_read(like) for _, like in named]
        sizes = [reading.device_bytes(read) for read in reads]
        shared = any(read is not like for read, (_, like) in zip(reads, named, strict=True))
        if shared:  # Orbax would let those wait that read nothing
            here = [(path, read) for (path, _), read in zip(named, reads, strict=True) if reading.is_here(read)]
            self._raise_first(step, self._mismatch(step, here) if here else None)
        others = self._others(step, parts) if partial else {}
        arrays: list[Any] = [None] * len(named)
        for group in reading.groups(sizes, reading.STAGED_BYTES if shared or finish is not None else sum(sizes)):
            own = {index for index in group if reading.is_here(reads[index])}
            asked = jax.tree.unflatten(tree, [read if n in own else ocp.PLACEHOLDER for n, read in enumerate(reads)])
            found = self._read(step, asked, others)
            leaves = jax.tree.leaves(found)
            del found
            for index in group:
                (path, like), array = named[index], leaves[index]
                leaves[index] = None
                if reads[index] is not like:
                    array = reading.spread(array if index in own else None, like)
                arrays[index] = array if finish is None else finish(path, array)
                del array
        return jax.tree.unflatten(tree, arrays)

    def _read(self, step: int, parts: dict[str, Any], others: dict[str, Any] | None = None) -> dict[str, Any]:
        """Parts as Orbax takes them; `others` in them are asked for too, and dropped."""
        error, found, others = None, {}, others or {}
        try:
            with orbax_settings():
                asked = {name: {**part, **others[name]} if name in others else part for name, part in parts.items()}
                found = ocp.load_checkpointables(self.folder / str(step), asked)
        except (ValueError, KeyError, OSError) as raised:
            error = str(first_cause(raised)).splitlines()[0]
        self._raise_first(step, error)
        return {
            name: {key: found[name][key] for key in parts[name]} if name in others else found[name] for name in parts
        }

    def _others(self, step: int, parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What the parts have in the checkpoint besides what is asked for, each array as one that is not to be read."""
        there = self._stored(step)
        others = {name: there[name].keys() - part.keys() for name, part in parts.items()}
        return {
            name: {key: jax.tree.map(lambda _: ocp.PLACEHOLDER, there[name][key]) for key in keys}
            for name, keys in others.items()
        }

    def _mismatch(self, step: int, named: list[tuple[tuple, jax.ShapeDtypeStruct]]) -> str | None:
        """Which of these arrays the checkpoint lacks, or has with another shape."""
        there = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(self._stored(step))}
        asked = [(_names(path), like.shape) for path, like in named]
        wrong = [(name, shape) for name, shape in asked if there.get(name) != shape]
        if not wrong:
            return None
        name, shape = wrong[0]
        return f"{'.'.join(name)} is {there.get(name)} there and {shape} here; {len(wrong)} arrays differ"

    def _stored(self, step: int) -> dict[str, Any]:
        """Orbax's descriptions of the arrays of a checkpoint."""
        with orbax_settings():
            return ocp.checkpointables_metadata(self.folder / str(step)).metadata

    def _raise_first(self, step: int, error: str | None) -> None:
        """Raises on all processes the first one's error, before they wait for each other in vain."""
        why = next((why for why in self._agree(error) if why is not None), None)
        if why is not None:
            wanted = "a whole checkpoint of the model that the config describes"
            raise ConfigError(f"checkpoint {self.folder / str(step)}", why, wanted)

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


def _names(path: tuple) -> tuple[str, ...]:
    """A path in a tree as Orbax has it, which writes dicts and lists."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path)
