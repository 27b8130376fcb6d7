"""The schedules of the published runs, at the test points of the reports."""

import dataclasses
import math
import runpy
from itertools import islice
from pathlib import Path

import naive
import numpy as np
import pytest

from moejax.config import Phase, RunConfig, ScheduleConfig
from moejax.train.schedules import batch_rows, plan_steps, value_at

CONFIGS = Path(__file__).parent.parent / "configs"


def published(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]()


def plan_after(config, tokens, step=10**6):
    """The plan of the step that follows `tokens` tokens."""
    return next(plan_steps(config, step, int(tokens)))


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(0.0, 2.2e-4), (5e12, 2.2e-4), (10e12, 2.2e-4), (12.15e12, 1.21e-4), (14.301e12, 2.2e-5), (14.634e12, 7.3e-6)],
)
def test_learning_rate_of_v3_at_the_published_points(tokens, rate):
    assert plan_after(published("deepseek_v3"), tokens).learning_rate == pytest.approx(rate, rel=1e-5)


def test_schedules_of_v3_match_naive_everywhere():
    config = published("deepseek_v3")
    for tokens in np.random.default_rng(0).uniform(0, 14.8e12, size=200).astype(np.int64):
        plan = plan_after(config, tokens)
        assert plan.learning_rate == pytest.approx(naive.v3_learning_rate(tokens), rel=1e-6)
        assert plan.bias_update_speed == naive.v3_bias_update_speed(tokens)
        assert plan.mtp_weight == naive.v3_mtp_weight(tokens)


def test_warm_up_of_v3_takes_2000_steps():
    config = published("deepseek_v3")
    rates = [plan.learning_rate for plan in islice(plan_steps(config), 2003)]
    np.testing.assert_allclose(rates, [naive.v3_learning_rate(0, step) for step in range(1, 2004)], rtol=1e-9)
    assert rates[1999] == rates[2002] == pytest.approx(2.2e-4)


@pytest.mark.parametrize(
    ("name", "start", "full", "ramp_tokens"),
    [("deepseek_v3", 3072, 15360, 469e9), ("deepseek_v2", 2304, 9216, 225e9), ("deepseek_v2_lite", 4608, 4608, 1.0)],
)
def test_batch_grows_from_start_to_full(name, start, full, ramp_tokens):
    config = published(name)
    shares = np.linspace(0, 1, 1000) * ramp_tokens / config.schedule.tokens
    rows = [batch_rows(config, share) for share in shares]
    assert rows[0] == start
    assert rows == sorted(rows)
    assert max(rows) <= full
    assert batch_rows(config, ramp_tokens / config.schedule.tokens) == full
    assert {r % (config.data.batch_size // config.pipeline.microbatches) for r in rows} == {0}


@pytest.mark.parametrize(
    ("name", "peak", "drops"),
    [("deepseek_v2", 2.4e-4, (0.6, 0.9)), ("deepseek_v2_lite", 4.2e-4, (0.8, 0.9))],
)
def test_learning_rate_of_v2_drops_twice(name, peak, drops):
    config = published(name)
    total = config.schedule.tokens
    rates = [
        plan_after(config, share * total).learning_rate for share in (drops[0] - 0.01, drops[0] + 0.01, drops[1] + 0.01)
    ]
    np.testing.assert_allclose(rates, [peak, peak * 0.316, peak * 0.316**2], rtol=1e-9)
    assert plan_after(config, total / 2).bias_update_speed == 0


def test_shapes_of_phases():
    phases = (
        Phase(until=0.2, value=1.0),
        Phase(until=0.4, value=3.0, shape="linear"),
        Phase(until=0.8, value=1.0, shape="cosine"),
    )
    got = [value_at(phases, share) for share in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)]
    np.testing.assert_allclose(got, [1, 1, 2, 3, 2 + math.cos(math.pi / 4), 2, 1, 1])


def test_a_run_counts_its_tokens_and_ends():
    config = published("deepseek_v3")
    data = dataclasses.replace(config.data, batch_size=16, sequence_length=10)
    pipeline = dataclasses.replace(config.pipeline, microbatches=2)
    ramp = ScheduleConfig(tokens=1600.0, warmup_steps=0, ramp_start=8, ramp_increment=8, ramp_until=0.2)
    short = RunConfig(data=data, pipeline=pipeline, schedule=ramp)
    plans = list(plan_steps(short))
    assert [plan.rows for plan in plans] == [8] * 4 + [16] * 8
    assert [plan.tokens for plan in plans] == [80 * i for i in range(4)] + [320 + 160 * i for i in range(8)]
    assert [plan.step for plan in plans] == list(range(1, 13))
    assert len(list(plan_steps(dataclasses.replace(short, steps=5)))) == 5
    assert list(plan_steps(short, step=7, tokens=800)) == plans[7:]
