"""moejax: training of DeepSeek-V3-style models in JAX. `__all__` below is the public surface.

Importing moejax starts no device, and what needs JAX is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moejax.config import (
    AttentionConfig,
    BalanceConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LaunchConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    Phase,
    PipelineConfig,
    RunConfig,
    ScheduleConfig,
    YarnConfig,
)
from moejax.config_source import load_config
from moejax.pipeline import schedule

if TYPE_CHECKING:
    from moejax.mesh import simulate
    from moejax.serve.load import load
    from moejax.train.run import RunResult

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "LaunchConfig",
    "LogConfig",
    "MTPConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Phase",
    "PipelineConfig",
    "RunConfig",
    "RunResult",
    "ScheduleConfig",
    "YarnConfig",
    "load",
    "load_config",
    "schedule",
    "simulate",
    "train",
]

_LOADED_ON_USE = {"RunResult": "moejax.train.run", "load": "moejax.serve.load", "simulate": "moejax.mesh"}

# The package of the same name would take the place of the function `train` when it is first imported: import it before.
importlib.import_module("moejax.train")


def train(config: RunConfig, **options: Any) -> "RunResult":
    """Trains as `config` says and returns what came of it; options and errors are `moejax.train.loop.train`'s.

    It simulates the devices and joins the processes that `config` asks for first.
    """
    config = importlib.import_module("moejax.launch.join").join(config)
    return importlib.import_module("moejax.train.loop").train(config, **options)


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)
