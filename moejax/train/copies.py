"""The copies of a run's checkpoints at `checkpoint.remote`: sent while training goes on, fetched where none is here."""

import logging
import queue
from pathlib import Path
from typing import Any

from moejax.checkpoint.integrity import identity, verify
from moejax.checkpoint.manager import Checkpoints
from moejax.checkpoint.remote import Uploader, download, remote_steps
from moejax.config import CheckpointConfig, ConfigError
from moejax.train.runlog import NoLog, RunLog
from moejax.train.together import is_main

logger = logging.getLogger("moejax")

LAST_SECONDS = 600.0  # in which the last upload may end, once training has
STOPPED_SECONDS = 10.0  # the same when the run was asked to stop: the upload goes on with the next start


class Copies:
    """Sends checkpoints from the main process; nothing where `checkpoint.remote` is None: a context manager."""

    def __init__(self, config: CheckpointConfig, folder: Path):
        """Tries the address.

        Raises:
            ConfigError: nothing can be written there.
        """
        self._folder = folder
        self._told: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()  # by the uploader's threads
        self._uploader: Uploader | None = None
        if config.remote is not None and is_main():
            self._uploader = Uploader(
                config.remote, lambda kind, **fields: self._told.put((kind, fields)), keep=config.remote_keep
            )

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self._uploader is not None:
            self._uploader.__exit__(kind, *error)

    def send(self, step: int) -> None:
        """Queues a checkpoint that was committed; what was sent of it before is not sent again."""
        if self._uploader is not None:
            folder = self._folder / str(step)
            try:
                self._uploader.put(step, folder, identity(folder))
            except ConfigError as error:  # it has been deleted since, or damaged
                self._told.put(("upload_failed", {"step": step, "error": str(error)}))

    def finish(self, log: RunLog | NoLog, seconds: float) -> None:
        """Waits for the last upload, at most so long, and says what came of it."""
        if self._uploader is not None:
            self._uploader.close(seconds)
            self.tell(log)

    def tell(self, log: RunLog | NoLog) -> None:
        """Writes what has happened since as events; failures are warnings too."""
        while not self._told.empty():
            kind, fields = self._told.get()
            log.event(kind, **fields)
            if kind == "uploaded":
                logger.info(
                    f"checkpoint {fields['step']}: uploaded, {fields['sent']} files in {fields['seconds']:.1f} s"
                )
            elif kind != "remote_removed":
                words = "; ".join(f"{name} {value}" for name, value in fields.items() if name != "step")
                logger.warning(f"checkpoint {fields.get('step')}: {kind.replace('_', ' ')}: {words}")


def fetch(remote: str, checkpoints: Checkpoints) -> int | None:
    """Brings the newest whole copy into a run folder that has no whole checkpoint; its step, None where there is none.

    For one process. What lies in the way, damaged, and copies that are damaged themselves are kept aside.

    Raises:
        ConfigError: the address cannot be read, or the folder cannot be written.
    """
    for step in reversed(remote_steps(remote)):
        if step in checkpoints.steps:
            checkpoints.set_aside(step)
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        download(remote, step, checkpoints.folder / str(step))
        damages = verify(checkpoints.folder / str(step)).damages
        if not damages:
            return step
        logger.warning(f"checkpoint {step} of {remote}: damaged: {damages[0]}")
    return None
