"""A run that has started: its steps, what is due between them, and its end."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.checkpoint.manager import Checkpoints
from moejax.config import RunConfig
from moejax.data.batches import Batch
from moejax.data.dataset import Data
from moejax.kernels.launch import available
from moejax.model.count import abstract_model, active_per_token, num_parameters
from moejax.report.pictures import draw_pictures, read_lines
from moejax.serve.load import from_state
from moejax.train.balance import relative_load
from moejax.train.faults import Fault, Faults
from moejax.train.guard import StopSignal
from moejax.train.peak import peak_flops
from moejax.train.phases import Phases
from moejax.train.record import Recorder, biases_in_order, not_finite
from moejax.train.resume import Found, Position, find, start, tell, tell_damaged
from moejax.train.runlog import NoLog, RunLog
from moejax.train.saving import Saver
from moejax.train.schedules import StepPlan, plan_steps
from moejax.train.state import TrainState
from moejax.train.step import Metrics, StepSettings, make_eval_step, make_train_step, place
from moejax.train.together import CompiledTogether, everyones, is_main, together
from moejax.train.validation import Validation

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

    def metrics(self) -> list[dict[str, Any]]:
        """Every step's line of metrics.jsonl, of earlier starts of the run too; the keys are `runlog.METRICS`."""
        return read_lines(self.folder / "metrics.jsonl")


class Run:
    """A run that has started: its state, and what is done between the steps."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        data: Data,
        checkpoints: Checkpoints,
        local: Checkpoints | None,
        saver: Saver,
        log: RunLog | NoLog,
        phases: Phases,
        state: TrainState,
        position: Position,
    ):
        self.config, self.mesh, self.data, self.log, self.phases = config, mesh, data, log, phases
        self.state, self.position = state, position
        self.checkpoints, self.local, self.saver = checkpoints, local, saver
        compiling = partial(phases, "compilation")
        self.train_step = CompiledTogether(make_train_step(config, mesh), compiling)
        self.validate = Validation(config, mesh, data, CompiledTogether(make_eval_step(config, mesh), compiling))
        self.peak = config.log.peak_flops or peak_flops(mesh.size)
        self.recorder = Recorder(config, self.peak)
        self.faults, self.roll_backs = Faults(config.faults, log.event), 0

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
        if jax.default_backend() == "gpu" and not available():
            logger.warning("no Triton kernels (a Hopper GPU and pip install 'moejax[cuda]' have them): plain JAX runs")
        if lengths:
            processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
            logger.info(f"mesh: {lengths}{processes}; {config.mesh.sharding}")
        text = f"{data.num_train_tokens:,} training tokens, {data.num_valid_tokens:,} for validation"
        if data.unigram_loss is not None:
            text += f", where knowing only how often each token occurs gives a loss of {data.unigram_loss:.4f}"
        logger.info(text)
        fields = {"unigram_loss": data.unigram_loss, "parameters": total, "peak_flops": self.peak}
        tell(found, total_steps, self.log, **fields)

    def go(self, stop: StopSignal) -> RunResult:
        """The steps, one after the other, and what is due after each."""
        config, log, ledger = self.config, self.log, self.phases.ledger
        clock, metrics = time.perf_counter(), None
        while (plan := self._next_plan()) is not None:
            waited = self.data.train.waited
            with ledger.spend("data_wait"):
                batch = place(self.data.train.next(plan.rows), self.mesh)
            waited = self.data.train.waited - waited
            with ledger.step(plan.step):
                metrics = self._step(plan, batch)
            said = everyones((stop.name, self.saver.due(plan.step), self.saver.state, bool(metrics.finite)))
            signals, due, saves, finites = zip(*said, strict=True)
            metrics, fault = self._judged(plan, batch, metrics, finites)
            step_time = time.perf_counter() - clock
            tokens = plan.tokens + plan.rows * config.data.sequence_length
            self.position = Position(plan.step, tokens, self.data.train.state(), self.position.valid_loss)
            record = self.recorder.line(plan, metrics, step_time, waited)
            if fault is not None:  # never, one hopes
                log.step(record)
                if not self._roll_back(fault):
                    self._end(fault)
                clock = time.perf_counter()
                continue
            if plan.step % config.log.valid_every == 0:  # once in a while: validate
                record |= self._validated()
            log.step(record)
            if plan.step % config.log.pictures_every == 0:  # once in a while: show
                self._draw(metrics)
            self.saver.look(saves)
            if due[0] and not self.faults.bad_steps:  # once in a while, by the main process's clock: save
                self.saver.save(self.state, self.position, due[0])
            self.phases.watchdog.beat(plan.step)
            signal = next((name for name in signals if name is not None), None)
            if signal is not None:
                logger.info(f"{signal}: stopping after step {plan.step}; the same command goes on from there")
                return self._finish("stopped", metrics)
            clock = time.perf_counter()
        return self._finish("finished", metrics)

    # ------------------------------------------------------------------------------------------------------- pieces

    def _next_plan(self) -> StepPlan | None:
        return next(plan_steps(self.config, self.position.step, self.position.tokens), None)

    def _step(self, plan: StepPlan, batch: Batch) -> Metrics:
        settings = StepSettings(
            learning_rate=np.float32(plan.learning_rate),
            bias_update_speed=np.float32(plan.bias_update_speed),
            mtp_weight=np.float32(plan.mtp_weight),
        )
        self.state, metrics = self.train_step(self.state, batch, settings)
        return jax.device_get(metrics)

    def _judged(
        self, plan: StepPlan, batch: Batch, metrics: Metrics, finites: Sequence[bool]
    ) -> tuple[Metrics, Fault | None]:
        """What a step reports, which is repeated where it was not finite, and what is wrong with the state it left.

        `finites`: whether it was finite, of every process.
        """
        first = not_finite(metrics)
        if not any(finites):  # it was not applied: the state is as before, and the data is the same
            with self.phases("lost_work"):
                metrics = self._step(plan, batch)
            finites = everyones(bool(metrics.finite))
        if any(finites) and not all(finites):
            return metrics, self.faults.of_some_processes(plan.step)
        return metrics, self.faults.judge(plan.step, float(metrics.loss), first, not_finite(metrics))

    def _roll_back(self, fault: Fault) -> bool:
        """Goes back to the newest whole checkpoint, which is older than what is wrong; False: it cannot."""
        settings, failed = self.config.faults, self.position
        if not fault.can_roll_back or self.roll_backs == settings.roll_backs:
            return False
        with self.phases("restore"):
            self.saver.settle()
            found = find(self.config, self.checkpoints, self.local)
            if found.whole is None:
                return False
            del self.state  # its memory is needed
            self.state, self.position = together(lambda: start(self.config, self.mesh, self.data, found))
            if settings.skip_batches:
                assert failed.data is not None
                self.data.train.restore(failed.data)
                self.position.data = failed.data
        self.roll_backs += 1
        self.faults.rolled_back()
        tell_damaged(found, self.log)
        step, skipped = self.position.step, "skipped" if settings.skip_batches else "done again"
        self.phases.ledger.roll_back(step)
        self.log.roll_back(step)
        self.log.event("rolled_back", step=step, from_step=failed.step, skipped=settings.skip_batches)
        count = f"{self.roll_backs} of {settings.roll_backs}"
        logger.warning(f"rolled back from step {failed.step} to {step} ({count}); the batches in between are {skipped}")
        return True

    def _end(self, fault: Fault) -> NoReturn:
        """The end of a run that cannot go on."""
        if fault.is_good:
            self.saver.save_last(self.state, self.position)
        self._close(fault.error.kind, fault=fault.words)
        latest = self.checkpoints.latest
        rest = "there is no checkpoint" if latest is None else f"the newest checkpoint is {latest} of {self.log.folder}"
        raise fault.error(f"{fault.words}; {rest}")

    def _validated(self) -> dict[str, float]:
        with self.phases("validation"):
            found = self.validate(self.state)
        self.position.valid_loss = found.get("valid_loss")
        return found

    def _draw(self, metrics: Metrics) -> None:
        if metrics.counts.size:
            bias = biases_in_order(self.config, self.state.router_bias)
            rounded = None if bias is None else np.round(bias.astype(np.float64), 6).tolist()
            self.log.expert_load(self.position.step, np.round(relative_load(metrics.counts), 3).tolist(), rounded)
        if is_main():
            with self.phases("pictures"), self.log.full_disk_borne():
                self.log.pictures(draw_pictures(self.log.folder))

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
        loss = None if metrics is None else float(metrics.loss)
        return RunResult(folder, ended, position.step, position.tokens, loss, position.valid_loss)

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
