"""Checkpoints of a run, one folder a step, written and read by Orbax.

A checkpoint has named parts: pytrees of arrays, and `meta`, plain JSON. Orbax writes a step to a temporary folder and
renames it when it is whole, so that a step which was being written when a run died is never taken for one.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from moejax.config import ConfigError


class Checkpoints:
    """The checkpoints in a folder: a context manager."""

    def __init__(self, folder: str | Path, keep: int | None = None):
        """`keep`: newest checkpoints that are kept; None: all. The folder is made by the first `save`."""
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every file
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._open: ocp.training.Checkpointer | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.close()

    @property
    def latest(self) -> int | None:
        """The newest step that was written whole; None if there is none."""
        if not self.folder.is_dir():
            return None
        newest = self._checkpointer().latest
        return None if newest is None else newest.step

    def save(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
        """Writes a checkpoint, unless that step has one.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written.
        """
        with self._disk():
            if self.latest != step:
                self._checkpointer().save_checkpointables(step, {**parts, "meta": meta}, force=True)

    def load_meta(self, step: int) -> dict[str, Any]:
        """What was saved as a checkpoint's `meta`.

        Raises:
            ConfigError: the checkpoint has none.
        """
        return self.load(step, {"meta": None})["meta"]

    def load(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        """The named parts of a checkpoint.

        Args:
            step: one that was saved.
            parts: pytrees of `jax.ShapeDtypeStruct` with a sharding; where and as what each array is wanted.

        Raises:
            ConfigError: the checkpoint does not have those arrays.
        """
        checkpointer = self._checkpointer()
        try:
            loaded = checkpointer.load_checkpointables(step, parts)
        except (ValueError, KeyError, OSError) as error:
            place, why = f"checkpoint {self.folder / str(step)}", str(_first_cause(error)).splitlines()[0]
            raise ConfigError(place, why, "a whole checkpoint of the model that the config describes") from None
        return {name: loaded[name] for name in parts}

    def _checkpointer(self) -> ocp.training.Checkpointer:
        if self._open is None:
            registry = ocp.handlers.local_registry()
            registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
            context = ocp.Context()
            context.checkpointables.registry = registry
            context.array.saving.use_compression = False  # training state does not compress; it only costs time
            policies = ocp.training.preservation_policies
            self._open = ocp.training.Checkpointer(
                self.folder,
                context=context,
                preservation_policy=policies.PreserveAll() if self._keep is None else policies.LatestN(self._keep),
                cleanup_tmp_directories=self._keep is not None,
            )
        return self._open

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            cause = _first_cause(error)
            full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause)
            if full:
                raise ConfigError("out", str(self.folder), "a disk with space left for a checkpoint") from None
            if isinstance(cause, PermissionError):
                raise ConfigError("out", str(self.folder), "a folder that can be written") from None
            raise


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
