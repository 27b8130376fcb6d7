import dataclasses
from collections import Counter

import pytest

from moejax.config_source import load_config
from moejax.mesh import resolve
from moejax.plan.arrays import ArrayRow
from moejax.plan.cost import HOST, RESTART, cost, seconds_of, steps_by_rows
from moejax.plan.hardware import load_hardware
from moejax.plan.parts import Parts
from moejax.plan.time import Timing
from moejax.train.schedules import plan_steps

STATE = [ArrayRow("params", "w", (4,), "float32", "-", 16, 4_000_000_000)]


def timing(step, devices=2048, outside=0.3, bubble=2.0, tokens=15360 * 4096):
    return Timing(step, Parts(), Parts(), (bubble, bubble + 1), outside, tokens, devices, 1.0, 1.0, None)


def v3():
    return load_config("configs/deepseek_v3.py")


@pytest.mark.parametrize("steps", [None, 7], ids=["until the tokens are seen", "a number of steps"])
def test_steps_of_each_batch_size_are_those_of_the_run(steps, run_config, change):
    config = change(change(run_config, "data.batch_size", 32), "pipeline.microbatches", 4)
    ramp = dataclasses.replace(config.schedule, ramp_start=8, ramp_increment=8, ramp_until=0.5, tokens=40_000.0)
    config = dataclasses.replace(config, schedule=ramp, steps=steps)
    assert steps_by_rows(config) == Counter(step.rows for step in plan_steps(config))


def test_steps_of_v3_are_those_of_the_run():
    assert steps_by_rows(v3()) == Counter(step.rows for step in plan_steps(v3()))


def test_published_step_gives_the_published_cost():
    """Section 2.7 of the fact sheet and Table 1: 180K GPU-hours per trillion tokens, 2664K and $5.328M in all."""
    config = dataclasses.replace(v3(), schedule=dataclasses.replace(v3().schedule, ramp_start=None))
    found = cost(config, load_hardware("h800"), timing(19.926), STATE)
    assert found.gpu_hours_per_trillion == pytest.approx(180e3, rel=0.005)
    assert found.days_per_trillion == pytest.approx(3.7, rel=0.01)
    assert found.gpu_hours == pytest.approx(2664e3, rel=0.005)
    assert found.dollars == pytest.approx(5.328e6, rel=0.005)


def test_smaller_batches_keep_what_is_beside_the_micro_batches():
    config = resolve(load_config("configs/deepseek_v3.py", ["--mesh.pipe", "16", "--mesh.expert", "64"]), 2048)
    whole = timing(20.0)
    assert whole.busy == (17.7, 16.7)
    assert seconds_of(config, whole, 15360) == 20.0
    assert seconds_of(config, whole, 3840) == pytest.approx(20.0 - 0.75 * 17.7, rel=1e-12)


def test_failures_grow_with_devices_as_published():
    small, large = (cost(v3(), load_hardware("h100"), timing(20.0, n), STATE) for n in (2048, 16384))
    assert large.hours_between_failures == pytest.approx(3.1, rel=1e-12)
    assert small.hours_between_failures == pytest.approx(8 * 3.1, rel=1e-12)
    assert large.goodput < small.goodput < 1
    assert small.gpu_hours_with_failures * small.goodput == pytest.approx(small.gpu_hours, rel=1e-12)


def test_interval_loses_least():
    found = cost(v3(), load_hardware("h100"), timing(20.0, 16384), STATE)
    between = found.hours_between_failures * 3600

    def lost(interval):
        """Of a second: what saves take, and what a failure sets back by half an interval on average."""
        return found.save_seconds / interval + interval / 2 / between

    assert found.save_seconds == 4e9 / HOST and found.interval > found.write_seconds
    assert lost(found.interval) < min(lost(1.02 * found.interval), lost(0.98 * found.interval))
    again = 1 - lost(found.interval) - (RESTART + found.write_seconds) / between
    assert found.goodput == pytest.approx(again, abs=1e-3)  # second-order terms


def test_interval_is_no_shorter_than_the_write():
    state = [dataclasses.replace(STATE[0], bytes_per_device=400_000_000_000)]
    slow = dataclasses.replace(load_hardware("h100"), storage=1e8)
    found = cost(v3(), slow, timing(20.0, 16384), state)
    assert found.interval == found.write_seconds and found.goodput == 0
