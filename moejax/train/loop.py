"""The training loop: `train(config)` is what `moejax train` runs.

A run continues by itself: where its folder has a whole checkpoint, the same command goes on from there (resume.py).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from moejax.checkpoint.commit import Retention
from moejax.checkpoint.manager import Checkpoints
from moejax.config import CheckpointConfig, ConfigError, RunConfig
from moejax.data.dataset import Data, open_data
from moejax.mesh import batch_part, make_mesh, resolve
from moejax.pipeline.stages import require_pipeline
from moejax.train.copies import Copies
from moejax.train.environment import keep_programs
from moejax.train.guard import StopSignal
from moejax.train.ledger import Ledger
from moejax.train.local import open_local
from moejax.train.phases import Phases
from moejax.train.resume import find, require_memory, require_same_model, start
from moejax.train.run import Run, RunResult
from moejax.train.runlog import NoLog, RunLog
from moejax.train.saving import Saver
from moejax.train.schedules import plan_steps
from moejax.train.state import abstract_state
from moejax.train.together import everyones, is_main, main_first, together
from moejax.train.watchdog import Watchdog


def train(
    config: RunConfig,
    console: Console | None = None,
    devices: Sequence[jax.Device] | None = None,
    began: float | None = None,
    pictures: bool = True,
) -> RunResult:
    """Trains until `steps` or `schedule.tokens`, a signal, or a fault that the run cannot go back behind.

    Args:
        config: all settings; `config.folder` is made, or continued.
        console: where the run is shown; None: stdout, or the cell of a notebook.
        devices: of the mesh; None: all.
        began: when the time of the run began, seconds since the epoch; None: now.
        pictures: whether a notebook shows them below; they are in the run folder in any case.

    Raises:
        ConfigError: a setting or a file that cannot be used.
        DamagedError: the run has checkpoints, and none is whole.
        NonFiniteError, MachineFaultError, SpikeError: see `FaultConfig`. A good state is saved.
    """
    began = time.time() if began is None else began
    asked, config = config, resolve(config, len(devices or jax.devices()))
    mesh, folder = make_mesh(config.mesh, devices), Path(config.folder)
    ledger = Ledger(folder / "events.jsonl", began=began)
    require_pipeline(config, (plan.rows for plan in plan_steps(config, 0, 0)))
    keep_programs(Path(config.compiled or folder.parent / "compiled"))
    together(lambda: require_same_model(config, folder))
    together(lambda: require_memory(config, abstract_state(config, mesh)))
    with ExitStack() as stack:
        data = main_first(lambda: _open_data(config, mesh, folder))
        stack.callback(data.train.close)
        phases = Phases(ledger, stack.enter_context(together(lambda: _open_watchdog(config, folder))))
        checkpoints = stack.enter_context(_open_checkpoints(config.checkpoint, folder))
        local = open_local(config.checkpoint, folder)
        if local is not None:
            stack.enter_context(local)
        copies = stack.enter_context(together(lambda: Copies(config.checkpoint, checkpoints.folder)))
        with phases("restore"):
            found = find(config, checkpoints, local)
        with phases("restore" if found.whole else "initialisation"):
            state, position = together(lambda: start(config, mesh, data, found))
        total_steps = position.step + sum(1 for _ in plan_steps(config, position.step, position.tokens))
        log = _open_log(asked, total_steps, position.step, console, pictures)
        stack.enter_context(log)
        ledger.resume(position.step, log.event)
        saver = Saver(config, checkpoints, local, copies, log, phases)
        run = Run(config, mesh, data, checkpoints, local, saver, log, phases, state, position)
        run.announce(found, total_steps)
        stop = stack.enter_context(StopSignal())
        try:
            return run.go(stop)
        except BaseException:
            with suppress(ConfigError):  # a folder that cannot be written: it is what brought us here
                ledger.note()
            raise


def _open_data(config: RunConfig, mesh: Mesh, folder: Path) -> Data:
    """The rows of this process's devices."""
    host, num_hosts = batch_part(mesh)
    cache = config.data.cache or folder.parent / "tokens"
    vocab_size, seed = config.model.vocab_size, config.seed
    return open_data(config.data, vocab_size=vocab_size, seed=seed, cache=cache, host=host, num_hosts=num_hosts)


def _open_watchdog(config: RunConfig, folder: Path) -> Watchdog:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", str(folder), f"a folder that can be written ({error.strerror})") from None
    return Watchdog(config.hang_seconds, folder / f"stacks-{jax.process_index()}.txt")


def _open_checkpoints(config: CheckpointConfig, folder: Path) -> Checkpoints:
    retention = Retention(newest=config.keep, every=config.keep_every, best=config.keep_best)
    return Checkpoints(folder / "checkpoints", retention, agree=everyones)


def _open_log(
    config: RunConfig, total_steps: int, resumed_step: int, console: Console | None, pictures: bool
) -> RunLog | NoLog:
    def opened() -> RunLog | NoLog:
        if is_main():
            options = {"total_steps": total_steps, "resumed_step": resumed_step}
            return RunLog(config, **options, console=console, pictures=pictures)
        return NoLog(Path(config.folder))

    return together(opened)
