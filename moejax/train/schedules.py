"""What changes in the course of a run, as functions of the tokens seen (arXiv:2412.19437, section 4.2).

They are plain Python numbers: the compiled step takes their values as arguments, and no count of tokens, which outgrows
32 bits, lives on a device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moejax.config import Phase, RunConfig


@dataclass(frozen=True)
class StepPlan:
    """What is known of a step before it runs."""

    step: int  # counted from 1
    tokens: int  # seen before it
    rows: int  # sequences of its batch
    learning_rate: float
    bias_update_speed: float  # gamma
    mtp_weight: float  # lambda


def value_at(phases: tuple[Phase, ...], progress: float) -> float:
    """The value of a schedule after the share `progress` of its tokens."""
    start, before = 0.0, phases[0].value
    for phase in phases:
        if progress < phase.until:
            share = (progress - start) / (phase.until - start)
            if phase.shape == "linear":
                return before + (phase.value - before) * share
            if phase.shape == "cosine":
                return phase.value + (before - phase.value) * (1 + math.cos(math.pi * share)) / 2
            return phase.value
        start, before = phase.until, phase.value
    return before


def schedule_tokens(config: RunConfig) -> float:
    """Length of the schedules in tokens: `schedule.tokens`, or those of `steps` steps with the full batch."""
    if config.schedule.tokens is not None:
        return config.schedule.tokens
    assert config.steps is not None  # RunConfig has seen to it
    return config.steps * config.data.batch_size * config.data.sequence_length


def batch_rows(config: RunConfig, progress: float) -> int:
    """Sequences of a step's batch: equal spans of tokens for each size from `ramp_start` to the full batch."""
    ramp, full = config.schedule, config.data.batch_size
    if ramp.ramp_start is None or progress >= ramp.ramp_until:
        return full
    sizes = math.ceil((full - ramp.ramp_start) / ramp.ramp_increment)
    return min(full, ramp.ramp_start + ramp.ramp_increment * int(progress / ramp.ramp_until * sizes))


def plan_steps(config: RunConfig, step: int = 0, tokens: int = 0) -> Iterator[StepPlan]:
    """The steps of a run after the first `step` steps and `tokens` tokens, until `steps` or `schedule.tokens`."""
    total, schedule = schedule_tokens(config), config.schedule
    while (step < config.steps) if config.steps is not None else (tokens < total):
        step += 1
        progress = tokens / total
        rows = batch_rows(config, progress)
        warm_up = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        yield StepPlan(
            step=step,
            tokens=tokens,
            rows=rows,
            learning_rate=config.optimizer.peak_lr * warm_up * value_at(schedule.learning_rate, progress),
            bias_update_speed=value_at(schedule.bias_update_speed, progress),
            mtp_weight=value_at(schedule.mtp_weight, progress),
        )
        tokens += rows * config.data.sequence_length
