"""Whether a run on this machine is started again after a process has failed, when, and on which devices.

Every start is one of all processes, and the run goes on from its newest checkpoint. `launch.restarts` counts the
starts after the first over the whole life of the launcher, as torchelastic's max_restarts does: steps done in between
do not give any back. They do set the wait before a start back to 1 s; it doubles up to 60 s while none is done.

The first start after a failure takes the same devices. Where a process on the same device fails again before the run
has come to a new step, the device is taken to be broken and left out from then on; `fitted` says how the run does
without it, and if it cannot, it starts as before. A step that is done again after a failure is not a new one.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from moejax.config import ConfigError, MeshConfig, RunConfig

HARDWARE = 3
FINAL = (2, 10, 12, 14, 130)  # exit codes of cli.py that another start would not change; 3 is one at first
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
TAIL = 1 << 16  # bytes of metrics.jsonl that are searched for its last line


@dataclass(frozen=True)
class Start:
    """A start of all processes of a run."""

    config: RunConfig
    devices: tuple[int | None, ...]  # of each process the one of this machine that it takes; None: all
    flags: tuple[str, ...] = ()  # what `config` has otherwise than the run was asked for, as on the command line


class Restarts:
    """The starts of a run: `start` is the one to do now, `wait` the seconds before it.

    `word` says what comes after the last failure, as the end of a line for the user; it is empty where nothing does.
    """

    def __init__(self, config: RunConfig):
        """`config`: as the user asked for it."""
        count = config.launch.processes
        self.start = Start(config, tuple(range(count)) if count > 1 else (None,))
        self.wait, self.word = 0.0, ""
        self._asked, self._good = config, self.start.devices
        self._done, self._reached = 0, last_step(config)
        self._failures: dict[int | None, int] = {}  # device: the step that the run had reached when it failed

    def after(self, process: int, code: int) -> bool:
        """Whether the run goes on after process `process` of `start` failed, before the others.

        `code` is its exit code; below 0: the signal that ended it.
        """
        restarts, self.word = self._asked.launch.restarts, ""
        if code in FINAL or (code == HARDWARE and self._done == 0) or restarts == 0:
            return False
        if self._done == restarts:
            self.word = f"; launch.restarts={restarts} are used up"
            return False
        reached = max(self._reached, last_step(self._asked))
        fresh = self._done == 0 or reached > self._reached
        self.wait = FIRST_WAIT if fresh else min(2 * self.wait, LONGEST_WAIT)
        self._done, self._reached = self._done + 1, reached
        device = self.start.devices[process]
        lost = self._failures.get(device) == reached and self._leave_out(device)
        self._failures[device] = reached
        place = f"device {device} is" if self._asked.simulate is None else "its simulated devices are"
        again = f" again, without a new step; {place} left out" if lost else ""
        self.word = f"{again}; restart {self._done} of {restarts} in {self.wait:g} s on {_what(self.start)}"
        return True

    def _leave_out(self, device: int | None) -> bool:
        """Whether the run can do without a device; if so, `start` does."""
        good = tuple(other for other in self._good if other != device)
        config = fitted(self._asked, len(good)) if good else None
        if config is None:
            return False
        self._good = good
        self.start = Start(config, good[: config.launch.processes], tuple(_flags(self._asked, config)))
        return True


def fitted(config: RunConfig, processes: int) -> RunConfig | None:
    """The run on at most so many processes, each with as many devices as before (1, or its share of `simulate`).

    None: there is no way.

    The rule: as many processes as there is a mesh for. Of these meshes the one with the longest `pipe`, then the
    longest `expert`, then the longest `replica`, none of them longer than before; `data` takes the devices that are
    left. So `data` shrinks first, then `replica`, `expert` and `pipe`. A mesh must divide the batch, the model, the
    experts and the parts of the data, and suit the schedule.

    The batch is the same, and a device has at most as many of its rows at a time as before: there may be more
    micro-batches. `mesh.expert_nodes` becomes 1 where it does not divide `expert`, and `pipeline.layers` those of the
    layout's own choice where `pipe` is another.
    """
    from moejax.mesh import resolve
    from moejax.train.schedules import plan_steps

    per_process = (config.simulate or config.launch.processes) // config.launch.processes
    try:
        before = resolve(config, per_process * config.launch.processes)
    except ConfigError:
        return None
    sizes = {plan.rows for plan in plan_steps(before)} if before.mesh.pipe > 1 else set()
    for count in range(processes, 0, -1):
        launch, devices = replace(config.launch, processes=count), per_process * count
        simulate = None if config.simulate is None else devices
        for mesh in _meshes(before.mesh, devices):
            for micro in _microbatches(before, mesh):
                layers = before.pipeline.layers if mesh.pipe == before.mesh.pipe else None
                pipeline = replace(before.pipeline, microbatches=micro, layers=layers)
                with contextlib.suppress(ConfigError):
                    now = replace(before, launch=launch, simulate=simulate, mesh=mesh, pipeline=pipeline)
                    _require_fit(now, devices, sizes)
                    return now
    return None


def _meshes(before: MeshConfig, devices: int) -> Iterator[MeshConfig]:
    """The meshes of so many devices, best first."""
    shrunk = (range(length, 0, -1) for length in (before.pipe, before.expert, before.replica))
    for pipe, expert, replica in itertools.product(*shrunk):
        data, left = divmod(devices, pipe * expert * replica)
        if data and not left:
            nodes = 1 if expert % before.expert_nodes else before.expert_nodes
            yield replace(before, pipe=pipe, replica=replica, data=data, expert=expert, expert_nodes=nodes)


def _microbatches(before: RunConfig, mesh: MeshConfig) -> Iterator[int]:
    """Numbers of micro-batches with which a device has at most as many rows at a time as before, ascending."""
    batch = before.data.batch_size
    rows = before.rows_of_microbatch // before.mesh.batch_shards
    for micro in range(before.pipeline.least_microbatches(mesh.pipe), batch // mesh.batch_shards + 1):
        if batch % (micro * mesh.batch_shards) == 0 and batch <= micro * mesh.batch_shards * rows:
            yield micro


def _require_fit(config: RunConfig, devices: int, batch_sizes: Iterable[int]) -> None:
    """Raises ConfigError where something does not fit a mesh whose every length is given."""
    from moejax.mesh import resolve

    resolve(config, devices)
    if config.mesh.pipe > 1:
        from moejax.pipeline.stages import require_pipeline

        require_pipeline(config, batch_sizes)
    shards, per_process = config.mesh.batch_shards, devices // config.launch.processes
    rows = min(shards, per_process)  # parts of the batch that a process has; `mesh.batch_part` wants them in line
    hosts = shards // rows
    if shards % rows or config.data.virtual_shards % hosts:
        raise ConfigError("data.virtual_shards", config.data.virtual_shards, f"a multiple of the {hosts} hosts")


def _flags(asked: RunConfig, config: RunConfig) -> Iterable[str]:
    """The flags that make `config` of `asked`."""
    if config.simulate != asked.simulate:
        yield from ("--simulate", str(config.simulate))
    for name in ("launch", "mesh", "pipeline"):
        before, now = getattr(asked, name), getattr(config, name)
        for field in (field.name for field in fields(now)):
            if getattr(now, field) != getattr(before, field):
                yield from (f"--{name}.{field.replace('_', '-')}", str(getattr(now, field)))


def _what(start: Start) -> str:
    """Devices and mesh of a start, as far as they are known."""
    config, count = start.config, len(start.devices)
    if config.simulate is None and start.devices == (None,):
        return "the same devices"
    devices = config.simulate or count
    lengths = {axis: getattr(config.mesh, axis) for axis in ("pipe", "replica", "data", "expert")}
    rest = devices // -math.prod(lengths.values())  # of the one that is -1
    mesh = " x ".join(f"{axis} {rest if n == -1 else n}" for axis, n in lengths.items() if n != 1)
    numbers = f"{devices} device{'s' if devices > 1 else ''} in {count} process{'es' if count > 1 else ''}"
    return f"{numbers}, mesh {mesh or 'data 1'}"


def last_step(config: RunConfig) -> int:
    """The newest step in the run's metrics.jsonl; 0 if it has none."""
    path = Path(config.folder) / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # cut off, by a process that was killed or by this search
            return int(json.loads(line)["step"])
    return 0
