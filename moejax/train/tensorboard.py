"""TensorBoard's event file, written by the calling thread.

tensorboardX's own SummaryWriter hands its events to a thread: when the disk is full, that thread dies with a traceback
and the next step waits for it forever. Here the same records raise OSError where they are written.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class TensorBoard:
    """One event file in `folder`. Raises OSError where the disk is full."""

    def __init__(self, folder: Path, *, first_step: int, flush_seconds: float = 10.0) -> None:
        """`first_step`: points of this step and later, in older files of the folder, are no longer shown."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._flush_seconds, self._flushed = EventsWriter(str(folder / "events")), flush_seconds, 0.0
        self.restart(first_step)

    def restart(self, first_step: int) -> None:
        """Points of this step and later that are there already are no longer shown."""
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the points of one step; names with a slash share a card."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed >= self._flush_seconds:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is left."""
        self._file.close()
