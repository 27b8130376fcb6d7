"""The training loop: `train(config)` is what `moejax train` runs.

A run continues by itself: where its folder has a checkpoint, the same command goes on from there.
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from rich.console import Console

from moejax.checkpoint.manager import Checkpoints
from moejax.config import ConfigError, RunConfig
from moejax.data.batches import Batch, merge_states
from moejax.data.dataset import Data, open_data
from moejax.mesh import batch_part, make_mesh, resolve
from moejax.model.count import abstract_model, active_per_token, num_parameters, train_flops_per_token
from moejax.pipeline.stages import require_pipeline
from moejax.report.pictures import draw_pictures
from moejax.serve.load import from_state
from moejax.train.guard import NonFiniteError, StopSignal
from moejax.train.peak import memory_limit_bytes, peak_flops, peak_memory_bytes
from moejax.train.runlog import NoLog, RunLog
from moejax.train.schedules import StepPlan, plan_steps
from moejax.train.state import (
    TrainState,
    abstract_state,
    bytes_per_device,
    layer_of_slot,
    new_state,
    restacked,
    stacked_as,
)
from moejax.train.step import Metrics, StepSettings, make_eval_step, make_train_step, place
from moejax.train.together import CompiledTogether, everyones, is_main, main_first, together

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


@dataclass
class Position:
    """How far a run is; saved as a checkpoint's meta."""

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None  # of `Prefetcher.state`


def train(config: RunConfig, console: Console | None = None, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Trains until `steps` or `schedule.tokens`, a signal, or too many steps that are not finite.

    Args:
        config: all settings; `config.folder` is made, or continued.
        console: where the run is shown; None: stdout.
        devices: of the mesh; None: all.

    Raises:
        ConfigError: a setting or a file that cannot be used.
        NonFiniteError: `max_bad_steps` steps in a row had a loss or gradient that is not finite; the last good state
            is saved.
    """
    asked, config = config, resolve(config, len(devices or jax.devices()))
    mesh, folder = make_mesh(config.mesh, devices), Path(config.folder)
    require_pipeline(config, (plan.rows for plan in plan_steps(config, 0, 0)))
    together(lambda: _require_same_model(config, folder))
    together(lambda: _require_memory(config, abstract_state(config, mesh)))
    with ExitStack() as stack:
        data = main_first(lambda: _open_data(config, mesh, folder))
        stack.callback(data.train.close)
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint.keep))
        state, position = together(lambda: _start(config, mesh, data, checkpoints))
        plans = list(plan_steps(config, position.step, position.tokens))
        total_steps = position.step + len(plans)
        log = _open_log(asked, total_steps, position.step, console)
        stack.enter_context(log)
        run = _Run(config, mesh, data, checkpoints, log, state, position)
        run.announce(total_steps)
        stop = stack.enter_context(StopSignal())
        return run.go(plans, stop)


def _open_data(config: RunConfig, mesh: Mesh, folder: Path) -> Data:
    """The rows of this process's devices."""
    host, num_hosts = batch_part(mesh)
    cache = config.data.cache or folder.parent / "tokens"
    vocab_size, seed = config.model.vocab_size, config.seed
    return open_data(config.data, vocab_size=vocab_size, seed=seed, cache=cache, host=host, num_hosts=num_hosts)


def _open_log(config: RunConfig, total_steps: int, resumed_step: int, console: Console | None) -> RunLog | NoLog:
    def opened() -> RunLog | NoLog:
        if is_main():
            return RunLog(config, total_steps=total_steps, resumed_step=resumed_step, console=console)
        return NoLog(Path(config.folder))

    return together(opened)


def _require_same_model(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError where the run folder holds a run of another model."""
    file = folder / "config.json"
    if not (file.is_file() and (folder / "checkpoints").is_dir()):
        return
    before = RunConfig.from_json(file.read_text(encoding="utf-8"))
    if before.model != config.model:
        raise ConfigError("out", str(folder), "a folder of its own: this one has a run of another model")


def _require_memory(config: RunConfig, state: TrainState) -> None:
    """Raises ConfigError where a device's part of the state alone is larger than its memory."""
    needed, limit = bytes_per_device(state), memory_limit_bytes()
    if jax.devices()[0].platform == "cpu":  # simulated devices share the machine's memory
        needed *= jax.local_device_count()
    if needed > limit:
        model = f"{num_parameters(abstract_model(config.model)):,} parameters"
        wanted = (
            f"a model whose training state, here {needed / 1e9:,.1f} GB, fits in the {limit / 1e9:,.1f} GB of memory"
        )
        raise ConfigError("model", model, wanted)


def _start(config: RunConfig, mesh: Mesh, data: Data, checkpoints: Checkpoints) -> tuple[TrainState, Position]:
    """The state and position to go on from."""
    step = checkpoints.latest
    if step is not None:  # 1. the newest checkpoint of this run folder
        shapes = checkpoint_parts(abstract_state(config, mesh))
        meta = checkpoints.load_meta(step)
        before, after = tuple(meta.pop("layer_of_slot")), layer_of_slot(config)
        parts = checkpoints.load(step, shapes if before == after else stacked_as(before, shapes))
        parts = parts if before == after else restacked(parts, before, after, shapes)
        position = Position(**meta)
        assert position.data is not None  # saved by `_Run._save`
        data.train.restore(position.data)
        return TrainState(**parts["model"], **parts["optimizer"]), position
    return new_state(config, mesh), Position()  # 2. parameters drawn from the seed


def checkpoint_parts(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint has it: what a reader of the model needs, and the rest."""
    return {
        "model": {"params": state.params, "router_bias": state.router_bias},
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "ema": state.ema},
    }


class _Run:
    """A run that has started: its state, and what is done between the steps."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        data: Data,
        checkpoints: Checkpoints,
        log: RunLog | NoLog,
        state: TrainState,
        position: Position,
    ):
        self.config, self.mesh, self.data, self.checkpoints, self.log = config, mesh, data, checkpoints, log
        self.state, self.position = state, position
        self.train_step = CompiledTogether(make_train_step(config, mesh))
        self.eval_step = CompiledTogether(make_eval_step(config, mesh))
        self.valid = self._place_validation()
        self.flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)
        self.peak = config.log.peak_flops or peak_flops(mesh.size)
        self.bad_steps: list[int] = []  # in a row, up to the last step
        self.loss: float | None = None
        self.valid_loss: float | None = None

    def announce(self, total_steps: int) -> None:
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
        if self.position.step:
            logger.info(f"resumed at step {self.position.step}/{total_steps} of {self.log.folder}")
            self.log.event("resumed", step=self.position.step, **fields)
        else:
            self.log.event("started", **fields)

    def go(self, plans: Iterable[StepPlan], stop: StopSignal) -> RunResult:
        """The steps, one after the other, and what is due after each."""
        config, log = self.config, self.log
        clock = time.perf_counter()
        for plan in plans:
            waited = self.data.train.waited
            batch = place(self.data.train.next(plan.rows), self.mesh)
            waited = self.data.train.waited - waited
            settings = StepSettings(
                learning_rate=np.float32(plan.learning_rate),
                bias_update_speed=np.float32(plan.bias_update_speed),
                mtp_weight=np.float32(plan.mtp_weight),
            )
            self.state, metrics = self.train_step(self.state, batch, settings)
            metrics = jax.device_get(metrics)
            step_time = time.perf_counter() - clock
            tokens = plan.tokens + plan.rows * config.data.sequence_length
            self.position = Position(plan.step, tokens, self.data.train.state())
            record = self._record(plan, metrics, step_time, waited)
            if plan.step % config.log.valid_every == 0:  # once in a while: validate
                record |= self._validate()
            log.step(record)
            if plan.step % config.log.pictures_every == 0:  # once in a while: show
                self._draw(metrics)
            self._watch(metrics)
            every = config.checkpoint.every_steps
            if every is not None and plan.step % every == 0:  # once in a while: save
                self._save()
            signal = next((name for name in everyones(stop.name) if name is not None), None)
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

    def _place_validation(self) -> list[tuple[Batch, float]]:
        """The validation batches on the devices, with the bytes of text that each predicts."""
        token_bytes = self.data.tokenizer.token_bytes
        batches = self.data.valid_batches(self.config.log.valid_batches, self.config.data.batch_size)
        own = [float(token_bytes[batch.tokens[:, 1:]][batch.loss_mask[:, 1:]].sum()) for batch in batches]
        parts = dict(everyones((self.data.host, own))).values()  # processes that hold the same rows say the same
        return [(place(batch, self.mesh), sum(texts)) for batch, *texts in zip(batches, *parts, strict=True)]

    def _validate(self) -> dict[str, float]:
        if not self.valid:
            return {}
        nats, tokens, text_bytes = 0.0, 0.0, 0.0
        for batch, batch_bytes in self.valid:
            batch_nats, batch_tokens = jax.device_get(self.eval_step(self.state, batch))
            nats, tokens, text_bytes = nats + float(batch_nats), tokens + float(batch_tokens), text_bytes + batch_bytes
        self.valid_loss = nats / tokens
        return {"valid_loss": self.valid_loss, "valid_bits_per_byte": nats / math.log(2) / text_bytes}

    def _draw(self, metrics: Metrics) -> None:
        if metrics.counts.size:
            self.log.expert_load(self.position.step, np.round(_relative_load(metrics.counts), 3).tolist())
        if is_main():
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
            self._save()
            self.log.finish("non_finite", steps=self.bad_steps, quantities=bad)
            steps = f"steps {self.bad_steps[0]} to {self.bad_steps[-1]}"
            raise NonFiniteError(f"{steps}: {said}; the state before them is saved in {self.checkpoints.folder}")

    def _save(self) -> None:
        position = self.position
        data = merge_states(everyones(position.data))
        meta = {"step": position.step, "tokens": position.tokens, "data": data}
        meta["layer_of_slot"] = layer_of_slot(self.config)
        self.checkpoints.save(position.step, checkpoint_parts(self.state), meta)
        self.log.event("checkpoint", step=position.step)

    def _finish(self, ended: Literal["finished", "stopped"], metrics: Metrics | None) -> RunResult:
        position, config, folder = self.position, self.config, self.log.folder
        if metrics is None:
            logger.info(
                f"nothing left to do: {folder} is at step {position.step}; more steps, or another folder (--out)"
            )
        else:
            self._save()
            if ended == "finished":
                self.log.event("validation", step=position.step, **self._validate())
            self._draw(metrics)
        if self.valid_loss is not None and self.data.unigram_loss is not None:
            baseline = f"knowing only how often each token occurs: {self.data.unigram_loss:.4f}"
            logger.info(f"validation loss {self.valid_loss:.4f} nats per token ({baseline})")
        if ended == "finished" and config.log.sample_tokens:
            logger.info(f"a sample after {config.log.prompt!r}:\n{config.log.prompt}{self._sample()}")
        self.log.finish(ended, valid_loss=self.valid_loss, unigram_loss=self.data.unigram_loss)
        logger.info(f"{ended} at step {position.step}; pictures, metrics and checkpoints are in {folder}")
        return RunResult(folder, ended, position.step, position.tokens, self.loss, self.valid_loss)

    def _sample(self) -> str:
        model = from_state(self.config, self.mesh, self.state.params, self.state.router_bias, self.data.tokenizer)
        log = self.config.log
        return model.generate(log.prompt, max_tokens=log.sample_tokens, temperature=0.8, seed=self.config.seed)


def _relative_load(counts: ArrayLike) -> np.ndarray:
    """Tokens of each expert relative to its layer's mean, [L, E]."""
    counts = np.asarray(counts)
    return counts / counts.mean(-1, keepdims=True)
