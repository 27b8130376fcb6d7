"""What a whole run costs: steps, GPU-hours, dollars; how often it will fail, how often it should save, its goodput.

Failures are those of 16,384 H100s in the training of Llama 3 405B: 419 in 54 days, one in 3.1 hours (arXiv:2407.21783,
section 3.3.4), taken to grow with the number of devices. The interval between checkpoints that loses least is Young's
and Daly's: the root of twice the time that a save holds training up times the mean time between failures.
"""

import math
from collections import Counter
from dataclasses import dataclass

from moejax.config import RunConfig
from moejax.plan.arrays import ArrayRow
from moejax.plan.hardware import Hardware
from moejax.plan.time import Timing
from moejax.train.schedules import batch_rows, schedule_tokens

FAILURE_HOURS, FAILURE_DEVICES = 3.1, 16384
RESTART = 600.0  # seconds from a failure to the first new step, beside reading the checkpoint: assumed
HOST = 25e9  # bytes/s of a device to the memory of its host, while which training waits: half of PCIe 5.0 x16's 63 GB/s


@dataclass(frozen=True)
class Cost:
    """Of a whole run. Hours are of wall clock, GPU-hours of all devices together."""

    steps: int
    tokens: float
    hours: float  # without failures
    gpu_hours: float
    dollars: float
    gpu_hours_per_trillion: float  # tokens, at the full batch
    dollars_per_trillion: float
    days_per_trillion: float
    hours_between_failures: float
    failures: float  # expected in the run
    save_seconds: float  # a save holds training up
    write_seconds: float  # until it is on the storage, while training goes on
    interval: float  # seconds between saves that lose least
    goodput: float  # share of the wall clock that goes into steps that are kept
    gpu_hours_with_failures: float
    dollars_with_failures: float


def cost(config: RunConfig, hardware: Hardware, timing: Timing, arrays: list[ArrayRow]) -> Cost:
    """The cost of the run, with batches smaller than the full one where `schedule` has a ramp."""
    rows = steps_by_rows(config)
    seconds = sum(steps * seconds_of(config, timing, size) for size, steps in rows.items())
    tokens = sum(size * steps for size, steps in rows.items()) * config.data.sequence_length
    gpus, price = timing.devices, hardware.dollars_per_hour
    full = timing.step / timing.tokens * 1e12 / 3600
    state = sum(row.bytes_per_device for row in arrays)
    save, write = state / HOST, state * hardware.devices_per_node / hardware.storage
    between = FAILURE_HOURS * 3600 * FAILURE_DEVICES / gpus
    interval = max(math.sqrt(2 * save * between), write)
    goodput = (1 - (interval / 2 + RESTART + write) / between) / (1 + save / interval)
    goodput = max(goodput, 0.0)
    spent = gpus * seconds / 3600
    return Cost(
        steps=rows.total(),
        tokens=tokens,
        hours=seconds / 3600,
        gpu_hours=spent,
        dollars=spent * price,
        gpu_hours_per_trillion=full * gpus,
        dollars_per_trillion=full * gpus * price,
        days_per_trillion=full / 24,
        hours_between_failures=between / 3600,
        failures=seconds / max(goodput, 1e-9) / between,
        save_seconds=save,
        write_seconds=write,
        interval=interval,
        goodput=goodput,
        gpu_hours_with_failures=spent / goodput if goodput else math.inf,
        dollars_with_failures=spent * price / goodput if goodput else math.inf,
    )


def steps_by_rows(config: RunConfig) -> Counter[int]:
    """How many steps a run has of each size of its batch, in sequences.

    Between two sizes the step in which the batch grows has the smaller, so that each lasts until its tokens are seen.
    """
    total, length = schedule_tokens(config), config.data.sequence_length
    found: Counter[int] = Counter()
    tokens, left = 0.0, config.steps or math.inf
    while tokens < total and left > 0:
        rows = batch_rows(config, tokens / total)
        steps = min(left, _steps_of(config, rows, tokens, total))
        found[rows] += int(steps)
        tokens, left = tokens + steps * rows * length, left - steps
    return found


def _steps_of(config: RunConfig, rows: int, tokens: float, total: float) -> int:
    """Steps from `tokens` on until the batch has another size, found by halving."""
    each, most = rows * config.data.sequence_length, 1
    while tokens + most * each < total and batch_rows(config, (tokens + most * each) / total) == rows:
        most *= 2
    least = most // 2
    while least + 1 < most:
        middle = (least + most) // 2
        same = tokens + middle * each < total and batch_rows(config, (tokens + middle * each) / total) == rows
        least, most = (middle, most) if same else (least, middle)
    return most


def seconds_of(config: RunConfig, timing: Timing, rows: int) -> float:
    """A step with a smaller batch: what is beside the micro-batches, the bubble among it, stays."""
    return timing.step - (1 - rows / config.data.batch_size) * max(timing.busy)
