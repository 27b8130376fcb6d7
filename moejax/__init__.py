"""moejax: training of DeepSeek-V3-style models in JAX. `__all__` below is the public surface, with the functions of
`moejax.ops`.

Importing moejax starts no device, and what needs JAX is loaded when it is first used. In a notebook results show
themselves (`moejax.notebook`).
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
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
from moejax.notebook import show_results
from moejax.pipeline import schedule

if TYPE_CHECKING:
    from moejax.mesh import simulate
    from moejax.pipeline.simulate import Timeline
    from moejax.plan.plan import Plan
    from moejax.serve.evaluate import Evaluation, evaluate
    from moejax.serve.load import load
    from moejax.train.run import RunResult

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Evaluation",
    "LaunchConfig",
    "LogConfig",
    "MTPConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Phase",
    "PipelineConfig",
    "Plan",
    "RunConfig",
    "RunResult",
    "ScheduleConfig",
    "Timeline",
    "YarnConfig",
    "compare_schedules",
    "evaluate",
    "load",
    "load_config",
    "plan",
    "report",
    "schedule",
    "simulate",
    "timeline",
    "train",
]

_LOADED_ON_USE = {
    "Evaluation": "moejax.serve.evaluate",
    "Plan": "moejax.plan.plan",
    "RunResult": "moejax.train.run",
    "Timeline": "moejax.pipeline.simulate",
    "evaluate": "moejax.serve.evaluate",
    "load": "moejax.serve.load",
    "simulate": "moejax.mesh",
}

# The packages of the same names would take the places of these functions when first imported: import them before.
importlib.import_module("moejax.train")
importlib.import_module("moejax.report")
importlib.import_module("moejax.plan")

show_results()


def train(config: RunConfig, **options: Any) -> "RunResult":
    """Trains as `config` says and returns what came of it; options and errors are `moejax.train.loop.train`'s.

    It simulates the devices and joins the processes that `config` asks for first.
    """
    config = importlib.import_module("moejax.launch.join").join(config)
    return importlib.import_module("moejax.train.loop").train(config, **options)


def plan(config: RunConfig, hardware: Any = "h800", devices: int | None = None) -> "Plan":
    """The memory, the time and the cost of a run; arguments and errors are `moejax.plan.plan.plan`'s."""
    return importlib.import_module("moejax.plan.plan").plan(config, hardware, devices)


def report(folders: "str | Path | Sequence[str | Path]", out: "str | Path | None" = None) -> Path:
    """Writes a page on one or several runs and returns its path; see `moejax.report.page.write_report`."""
    one = isinstance(folders, str | Path)
    return importlib.import_module("moejax.report.page").write_report([folders] if one else folders, out)


def timeline(program: schedule.Program, **costs: float) -> "Timeline":
    """When each rank of a pipeline runs what, and its bubble.

    Args:
        program: of `moejax.schedule`, such as `moejax.schedule.dualpipe(8, 20)`.
        costs: times of F, I, W, B, FB (a joined pair) and send, in any unit; F, I and W are 1 by default, B is I + W
            and FB is F + B.
    """
    simulator = importlib.import_module("moejax.pipeline.simulate")
    return simulator.simulate(program, simulator.Costs.of(costs))


def compare_schedules(stages: int, microbatches: int, **costs: float) -> list[dict[str, Any]]:
    """What each schedule costs for the same stages and micro-batches, beside Table 2 of the V3 report.

    `costs` as of `timeline`; the keys are those of `moejax.report.compare.compare`.
    """
    made = importlib.import_module("moejax.pipeline.simulate").Costs.of(costs)
    return importlib.import_module("moejax.report.compare").compare(stages, microbatches, made)


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)
