"""The search, against all candidates tried one by one; what memory a plan needs is a formula here."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest

from moejax.config import ConfigError
from moejax.plan import search as module
from moejax.plan.hardware import load_hardware
from moejax.plan.search import _candidates, _checked, _smaller, as_json, as_table, search

LIMIT = 1e6
CHIP = dataclasses.replace(load_hardware("h800"), memory=LIMIT)


@pytest.fixture
def config(run_config, change):
    config = change(run_config, "data.batch_size", 32)
    return dataclasses.replace(change(config, "model.mtp.depth", 0), precision="bf16")


@pytest.fixture
def sized(monkeypatch):
    """Memory of a plan: less with more stages, with more computed again, with FSDP; `scale` times that."""
    state = SimpleNamespace(scale=1.0, asked=0)

    def size(config):
        factor = {"none": 4, "cheap": 2, "full": 1}[config.model.remat] * (2 if config.mesh.sharding == "zero1" else 1)
        return state.scale * LIMIT * factor / 4 / config.mesh.pipe

    def memory(config):
        state.asked += 1
        return [SimpleNamespace(rank=0, bytes=size(config))]

    monkeypatch.setattr(module, "memory", memory)
    monkeypatch.setattr(module, "_least_bytes", lambda config: 0.9 * size(config))
    state.size = size
    return state


def all_that_fit(config, sized):
    """Of each candidate the first that fits on the way to less memory; on that way FSDP and recompute part."""
    fit, queue = [], [_checked(config, given, 4, Counter()) for given in _candidates(config, 4)]
    while queue:
        one = queue.pop()
        if one is not None and sized.size(one) <= 0.95 * LIMIT:
            fit.append(one)
        elif one is not None:
            queue += _smaller(one)
    return fit


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0], ids=["all fit", "some fit", "few fit"])
def test_the_ten_best_are_those_of_trying_all(scale, config, sized):
    sized.scale = scale
    steps = sorted(module._step(one, CHIP) for one in all_that_fit(config, sized))
    found = search(config, CHIP, 4)
    assert [one.step for one in found.best] == pytest.approx(steps[:10], rel=1e-12)
    assert all(one.bytes <= 0.95 * LIMIT for one in found.best)
    assert all(one.bytes > 0.95 * LIMIT for one in found.misses)
    assert found.candidates == len(found.best) + sum(found.rejected.values())


def test_like_layers_are_not_traced_again_to_be_too_large(config, sized, monkeypatch):
    monkeypatch.setattr(module, "_least_bytes", lambda config: sized.size(config) - 0.5 * LIMIT)
    sized.scale = 2.0
    found = search(config, CHIP, 4)
    steps = sorted(module._step(one, CHIP) for one in all_that_fit(config, sized))
    assert [one.step for one in found.best] == pytest.approx(steps[:10], rel=1e-12)
    assert sized.asked < found.rejected["does not fit in memory"] + len(found.best)


def test_bound_is_no_more_than_the_step(config, sized):
    sized.scale = 0.1
    for one in all_that_fit(config, sized):
        assert module._bound(one, CHIP) <= module._step(one, CHIP) * (1 + 1e-12)


def test_reasons_and_json(config, sized):
    found = search(config, CHIP, 4)
    assert "does not fit in memory" in found.rejected and as_table(found)
    facts = as_json(found)
    assert facts["best"][0]["step"] == found.best[0].step and facts["best"][0]["mesh.sharding"] == "zero1"
    price = 4 * found.best[0].step * 2 / 3600 / (32 * 32) * 1e12
    assert found.best[0].dollars_per_trillion == pytest.approx(price, rel=1e-12)


def test_where_nothing_fits_the_least_is_named(config, sized):
    sized.scale = 100.0
    with pytest.raises(ConfigError, match=r"--search=4: wanted more devices or more memory"):
        search(config, CHIP, 4)
