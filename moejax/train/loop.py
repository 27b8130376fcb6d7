"""The training loop: `train(config)` is what `moejax train` runs.

A run continues by itself: where its folder has a whole checkpoint, the same command goes on from there (resume.py).
"""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from rich.console import Console

from moejax.checkpoint.commit import Retention
from moejax.checkpoint.manager import Checkpoints
from moejax.config import CheckpointConfig, ConfigError, RunConfig
from moejax.data.dataset import Data, open_data
from moejax.mesh import batch_part, make_mesh, resolve
from moejax.model.count import abstract_model, active_per_token, num_parameters, train_flops_per_token
from moejax.pipeline.stages import require_pipeline
from moejax.report.pictures import draw_pictures
from moejax.serve.load import from_state
from moejax.train.copies import Copies
from moejax.train.guard import NonFiniteError, StopSignal
from moejax.train.ledger import Ledger
from moejax.train.peak import peak_flops, peak_memory_bytes
from moejax.train.phases import Phases
from moejax.train.resume import Found, Position, find, require_memory, require_same_model, start, tell
from moejax.train.runlog import NoLog, RunLog
from moejax.train.saving import Saver
from moejax.train.schedules import StepPlan, plan_steps
from moejax.train.state import TrainState, abstract_state
from moejax.train.step import Metrics, StepSettings, make_eval_step, make_train_step, place
from moejax.train.together import CompiledTogether, everyones, is_main, main_first, together
from moejax.train.validation import Validation
from moejax.train.watchdog import Watchdog

logger = logging.getLogger("moejax")


@dataclass(frozen=True)
class RunResult:
    """What came of a run."""

    folder: Path
    ended: Literal["finished", "stopped"]
    step: int
    tokens: int
    loss: float | None  # of the last step; None if no step was left to do
    valid_loss: float | None  # at the end; None without validation text


def train(
    config: RunConfig,
    console: Console | None = None,
    devices: Sequence[jax.Device] | None = None,
    began: float | None = None,
) -> RunResult:
    """Trains until `steps` or `schedule.tokens`, a signal, or too many steps that are not finite.

    Args:
        config: all settings; `config.folder` is made, or continued.
        console: where the run is shown; None: stdout.
        devices: of the mesh; None: all.
        began: when the time of the run began, seconds since the epoch; None: now.

    Raises:
        ConfigError: a setting or a file that cannot be used.
        DamagedError: the run has checkpoints, and none is whole.
        NonFiniteError: `max_bad_steps` steps in a row had a loss or gradient that is not finite; the last good state
            is saved.
    """
    began = time.time() if began is None else began
    asked, config = config, resolve(config, len(devices or jax.devices()))
    mesh, folder = make_mesh(config.mesh, devices), Path(config.folder)
    ledger = Ledger(folder / "events.jsonl", began=began)
    require_pipeline(config, (plan.rows for plan in plan_steps(config, 0, 0)))
    together(lambda: require_same_model(config, folder))
    together(lambda: require_memory(config, abstract_state(config, mesh)))
    with ExitStack() as stack:
        data = main_first(lambda: _open_data(config, mesh, folder))
        stack.callback(data.train.close)
        phases = Phases(ledger, stack.enter_context(together(lambda: _open_watchdog(config, folder))))
        checkpoints = stack.enter_context(_open_checkpoints(config.checkpoint, folder))
        copies = stack.enter_context(together(lambda: Copies(config.checkpoint, checkpoints.folder)))
        with phases("restore"):
            found = find(config, checkpoints)
        with phases("restore" if found.whole else "initialisation"):
            state, position = together(lambda: start(config, mesh, data, checkpoints, found))
        plans = list(plan_steps(config, position.step, position.tokens))
        log = _open_log(asked, position.step + len(plans), position.step, console)
        stack.enter_context(log)
        ledger.resume(position.step, log.event)
        run = _Run(config, mesh, data, Saver(config, checkpoints, copies, log, phases), log, phases, state, position)
        run.announce(found, position.step + len(plans))
        stop = stack.enter_context(StopSignal())
        try:
            return run.go(plans, stop)
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


def _open_log(config: RunConfig, total_steps: int, resumed_step: int, console: Console | None) -> RunLog | NoLog:
    def opened() -> RunLog | NoLog:
        if is_main():
            return RunLog(config, total_steps=total_steps, resumed_step=resumed_step, console=console)
        return NoLog(Path(config.folder))

    return together(opened)


class _Run:
    """A run that has started: its state, and what is done between the steps."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        data: Data,
        saver: Saver,
        log: RunLog | NoLog,
        phases: Phases,
        state: TrainState,
        position: Position,
    ):
        self.config, self.mesh, self.data, self.log, self.phases = config, mesh, data, log, phases
        self.state, self.position = state, position
        self.saver = saver
        compiling = partial(phases, "compilation")
        self.train_step = CompiledTogether(make_train_step(config, mesh), compiling)
        self.validate = Validation(config, mesh, data, CompiledTogether(make_eval_step(config, mesh), compiling))
        self.flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)
        self.peak = config.log.peak_flops or peak_flops(mesh.size)
        self.bad_steps: list[int] = []  # in a row, up to the last step
        self.loss: float | None = None

    def announce(self, found: Found, total_steps: int) -> None:
        """Says what is trained, on what, and from where."""
        config, model, data = self.config, self.config.model, self.data
        total = num_parameters(abstract_model(model))
        active = active_per_token(model, mtp=False)
        lengths = " x ".join(f"{axis} {length}" for axis, length in self.mesh.shape.items() if length > 1)
        logger.info(
            f"{config.name}: {total:,} parameters, {active:,} of them per token; {config.precision} on "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}; peak {self.peak / 1e12:.3g} TFLOP/s"
        )
        if lengths:
            processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
            logger.info(f"mesh: {lengths}{processes}; {config.mesh.sharding}")
        text = f"{data.num_train_tokens:,} training tokens, {data.num_valid_tokens:,} for validation"
        if data.unigram_loss is not None:
            text += f", where knowing only how often each token occurs gives a loss of {data.unigram_loss:.4f}"
        logger.info(text)
        fields = {"unigram_loss": data.unigram_loss, "parameters": total, "peak_flops": self.peak}
        tell(found, total_steps, self.log, **fields)

    def go(self, plans: Iterable[StepPlan], stop: StopSignal) -> RunResult:
        """The steps, one after the other, and what is due after each."""
        config, log = self.config, self.log
        ledger = self.phases.ledger
        clock = time.perf_counter()
        for plan in plans:
            waited = self.data.train.waited
            with ledger.spend("data_wait"):
                batch = place(self.data.train.next(plan.rows), self.mesh)
            waited = self.data.train.waited - waited
            settings = StepSettings(
                learning_rate=np.float32(plan.learning_rate),
                bias_update_speed=np.float32(plan.bias_update_speed),
                mtp_weight=np.float32(plan.mtp_weight),
            )
            with ledger.step(plan.step):
                self.state, metrics = self.train_step(self.state, batch, settings)
                metrics = jax.device_get(metrics)
            step_time = time.perf_counter() - clock
            tokens = plan.tokens + plan.rows * config.data.sequence_length
            self.position = Position(plan.step, tokens, self.data.train.state(), self.position.valid_loss)
            record = self._record(plan, metrics, step_time, waited)
            if plan.step % config.log.valid_every == 0:  # once in a while: validate
                record |= self._validated()
            log.step(record)
            if plan.step % config.log.pictures_every == 0:  # once in a while: show
                self._draw(metrics)
            self._watch(metrics)
            said = everyones((stop.name, self.saver.is_due(plan.step), self.saver.state))
            signals, due, saves = zip(*said, strict=True)
            self.saver.look(saves)
            if due[0]:  # once in a while, by the main process's clock: save
                self.saver.save(self.state, self.position)
            self.phases.watchdog.beat(plan.step)
            signal = next((name for name in signals if name is not None), None)
            if signal is not None:
                logger.info(f"{signal}: stopping after step {plan.step}; the same command goes on from there")
                return self._finish("stopped", metrics)
            clock = time.perf_counter()
        return self._finish("finished", metrics if self.loss is not None else None)

    # ------------------------------------------------------------------------------------------------------- pieces

    def _record(self, plan: StepPlan, metrics: Metrics, step_time: float, waited: float) -> dict[str, Any]:
        """The line of metrics.jsonl; its keys are documented in runlog.py."""
        tokens = plan.rows * self.config.data.sequence_length
        speed = tokens / step_time
        self.loss = float(metrics.loss)
        return {
            "step": plan.step,
            "tokens": plan.tokens + tokens,
            "loss": self.loss,
            "mtp_loss": float(metrics.mtp_loss),
            "balance_loss": float(metrics.balance_loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": plan.learning_rate,
            "bias_update_speed": plan.bias_update_speed,
            "mtp_weight": plan.mtp_weight,
            "tokens_per_second": speed,
            "flops_per_second": speed * self.flops_per_token,
            "mfu": speed * self.flops_per_token / self.peak,
            "max_violation": (_relative_load(metrics.counts).max(-1) - 1).tolist(),
            "dead_experts": int((metrics.counts == 0).sum()),
            "exchange_rounds": float(metrics.exchange_rounds),
            "data_wait": waited,
            "step_time": step_time,
            "memory_bytes": peak_memory_bytes(),
        }

    def _validated(self) -> dict[str, float]:
        with self.phases("validation"):
            found = self.validate(self.state)
        self.position.valid_loss = found.get("valid_loss")
        return found

    def _draw(self, metrics: Metrics) -> None:
        if metrics.counts.size:
            self.log.expert_load(self.position.step, np.round(_relative_load(metrics.counts), 3).tolist())
        if is_main():
            with self.phases("pictures"), self.log.full_disk_borne():
                draw_pictures(self.log.folder)

    def _watch(self, metrics: Metrics) -> None:
        """Raises NonFiniteError after `max_bad_steps` steps in a row that were not applied."""
        if metrics.finite:
            self.bad_steps = []
            return
        self.bad_steps.append(self.position.step)
        bad = [n for n in ("loss", "mtp_loss", "balance_loss", "grad_norm") if not np.isfinite(getattr(metrics, n))]
        said = f"{', '.join(bad)} not finite; the step was not applied"
        limit = self.config.max_bad_steps
        logger.warning(f"step {self.position.step}: {said} ({len(self.bad_steps)} in a row, {limit} end the run)")
        if len(self.bad_steps) >= limit:
            self.saver.save_last(self.state, self.position)
            self._close("non_finite", steps=self.bad_steps, quantities=bad)
            steps = f"steps {self.bad_steps[0]} to {self.bad_steps[-1]}"
            raise NonFiniteError(f"{steps}: {said}; the state before them is saved in {self.log.folder}/checkpoints")

    def _finish(self, ended: Literal["finished", "stopped"], metrics: Metrics | None) -> RunResult:
        """The end of a run; `metrics`: of the last step, None if no step was left to do."""
        position, config, folder = self.position, self.config, self.log.folder
        if metrics is None:
            logger.info(
                f"nothing left to do: {folder} is at step {position.step}; more steps, or another folder (--out)"
            )
        else:
            if ended == "finished" and position.step % config.log.valid_every:
                self.log.event("validation", step=position.step, **self._validated())
            self.saver.save_last(self.state, position)
            self._draw(metrics)
        if position.valid_loss is not None and self.data.unigram_loss is not None:
            baseline = f"knowing only how often each token occurs: {self.data.unigram_loss:.4f}"
            logger.info(f"validation loss {position.valid_loss:.4f} nats per token ({baseline})")
        if ended == "finished" and config.log.sample_tokens:
            with self.phases("other"):
                logger.info(f"a sample after {config.log.prompt!r}:\n{config.log.prompt}{self._sample()}")
        self._close(ended, valid_loss=position.valid_loss, unigram_loss=self.data.unigram_loss)
        logger.info(f"{ended} at step {position.step}; pictures, metrics and checkpoints are in {folder}")
        return RunResult(folder, ended, position.step, position.tokens, self.loss, position.valid_loss)

    def _close(self, ended: str, **fields: Any) -> None:
        """Writes the end of the run, and where its time went."""
        ledger = self.phases.ledger
        self.saver.finish(ended == "stopped")
        ledger.note()
        self.log.finish(ended, **fields, time=ledger.summary())
        logger.info(ledger.table())

    def _sample(self) -> str:
        model = from_state(self.config, self.mesh, self.state.params, self.state.router_bias, self.data.tokenizer)
        log = self.config.log
        return model.generate(log.prompt, max_tokens=log.sample_tokens, temperature=0.8, seed=self.config.seed)


def _relative_load(counts: ArrayLike) -> np.ndarray:
    """Tokens of each expert relative to its layer's mean, [L, E]."""
    counts = np.asarray(counts)
    return counts / counts.mean(-1, keepdims=True)
