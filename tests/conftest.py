"""Fixtures, and JAX set up for many small programs: compiled quickly rather than well, and kept on disk."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import dataclasses
import time

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from moejax.config import (
    AttentionConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
)

_STARTED = time.monotonic()
WORDS = ("route", "each", "token", "to", "a", "few", "experts", "and", "drop", "none")


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", type=float, help="begin no test after so many seconds; the rest is skipped, and named"
    )
    parser.addoption("--turn", type=int, default=0, help="start with another of the tests, in turn")


def pytest_collection_modifyitems(config, items):
    start = config.getoption("--turn") * 7 % max(len(items), 1)
    items[:] = items[start:] + items[:start]


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - _STARTED > seconds:
        pytest.skip(f"{item.nodeid} is left for another day: {seconds:.0f} s are over")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def model_config() -> ModelConfig:
    """Every part of V3, as small as it gets."""
    return ModelConfig(
        vocab_size=264,
        hidden_size=32,
        num_layers=3,
        num_dense_layers=1,
        dense_width=48,
        attention=AttentionConfig(
            num_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_dim=16, qk_rope_dim=8, v_dim=16
        ),
        moe=MoEConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2, expert_width=16),
        mtp=MTPConfig(depth=1),
        init_std=0.05,
        loss_chunk=100,
    )


@pytest.fixture
def run_config(model_config, tmp_path) -> RunConfig:
    """A run of 6 steps on text that it makes itself."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(60)]
        (text / f"{number:02}.txt").write_text(" ".join(words))
    return RunConfig(
        out=str(tmp_path / "run"),
        steps=6,
        precision="fp32",
        model=model_config,
        optimizer=OptimizerConfig(peak_lr=3e-3, moments="fp32"),
        schedule=ScheduleConfig(warmup_steps=2, learning_rate=(Phase(until=1.0, value=1.0),)),
        data=DataConfig(
            train=(str(text),), valid_fraction=0.1, sequence_length=32, batch_size=4, virtual_shards=2, fim_rate=0.0
        ),
        log=LogConfig(
            valid_every=3, valid_batches=1, pictures_every=3, sample_tokens=0, tensorboard=False, peak_flops=1e9
        ),
    )


@pytest.fixture
def change():
    """`change(config, "data.batch_size", 8)`: the config with one field replaced, at any depth."""

    def changed(config, place, value):
        first, _, rest = place.partition(".")
        return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})

    return changed


@pytest.fixture
def no_cache():
    """What is compiled for devices that are not there cannot be loaded again."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()
