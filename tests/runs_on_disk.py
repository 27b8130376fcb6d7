"""Run folders as the log writes them, for tests of what reads them: no training, all numbers made here."""

import dataclasses
import json
import math
from pathlib import Path

from moejax.config import ModelConfig, MoEConfig, MTPConfig, RunConfig

BEGAN = 1_700_000_000.0
LAYERS, EXPERTS = 3, 8  # two MoE layers and an MTP module


def settings(**changes) -> RunConfig:
    """Of a run of 40 steps."""
    model = ModelConfig(
        num_layers=3,
        num_dense_layers=1,
        moe=MoEConfig(num_experts=EXPERTS, top_k=2, num_groups=4, top_groups=2),
        mtp=MTPConfig(depth=1),
    )
    config = RunConfig(name="made", steps=40, model=model)
    schedule = dataclasses.replace(config.schedule, warmup_steps=10)
    return dataclasses.replace(config, schedule=schedule, **changes)


def line(step: int) -> dict:
    """Of metrics.jsonl."""
    found = {"step": step, "tokens": 1000 * step, "loss": 2 + 3 / step, "mtp_loss": 3 + 3 / step, "balance_loss": 1e-3}
    found |= {"grad_norm": 1 + 1 / step, "learning_rate": 1e-4 * min(1, step / 10), "bias_update_speed": 0.001}
    found |= {"mtp_weight": 0.3, "tokens_per_second": 1e4 + step, "flops_per_second": 1e9, "mfu": 0.2}
    found |= {"max_violation": [1 / step, 2 / step, 3.0], "load_entropy": [math.log(EXPERTS), 1.5, 1.0]}
    found |= {"dead_experts": 1, "exchange_rounds": 1.0, "data_wait": 0.001, "step_time": 0.1, "memory_bytes": 10**9}
    return found | ({"valid_loss": 2.5 + 1 / step, "valid_bits_per_byte": 1.0} if step % 10 == 0 else {})


def record(step: int) -> dict:
    """Of expert_load.jsonl."""
    load = [[1.0] * EXPERTS, [2.0, 0.0] * (EXPERTS // 2), [float(EXPERTS)] + [0.0] * (EXPERTS - 1)]
    bias = [[0.001 * step * (-1) ** expert for expert in range(EXPERTS)] for _ in range(LAYERS)]
    return {"step": step, "load": load, "bias": bias}


def ledger(attempt: float, resumed: int, step: int, until: float) -> dict:
    """An event that says where the time of an attempt went."""
    steps = 0.1 * (step - resumed)
    seconds = {"steps": steps, "compilation": until - attempt - steps}
    return {"kind": "ledger", "time": until, "attempt": attempt, "resumed": resumed, "step": step} | {
        "useful": steps,
        "until": until,
        "seconds": seconds,
    }


def events() -> list[dict]:
    """Of a run that was killed at step 24, went on from 20, and met a step that was not finite."""
    second = BEGAN + 100
    return [
        {"time": BEGAN, "kind": "started", "unigram_loss": 3.1, "parameters": 123456, "peak_flops": 1e10},
        {"time": BEGAN + 30, "kind": "checkpoint", "step": 20, "seconds": 0.5, "bytes": 1000, "deleted": []},
        ledger(BEGAN, 0, 20, BEGAN + 30),
        ledger(BEGAN, 0, 24, BEGAN + 40),
        {"time": second, "kind": "resumed", "step": 20, "files": 9, "seconds": 0.1, "unigram_loss": 3.1},
        {"time": second + 1, "kind": "non_finite", "step": 30, "quantities": ["loss"]},
        {"time": second + 2, "kind": "validation", "step": 40, "valid_loss": 2.525, "valid_bits_per_byte": 1.0},
        ledger(second, 20, 40, second + 10),
        {"time": second + 10, "kind": "finished", "step": 40},
    ]


def write_lines(path: Path, found: list[dict]) -> None:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(one) + "\n" for one in found))


def write_run(folder: Path, config: RunConfig | None = None) -> Path:
    """A finished run of 40 steps, and its folder."""
    (folder / "checkpoints" / "40").mkdir(parents=True)
    (folder / "config.json").write_text((config or settings()).to_json())
    (folder / "environment.json").write_text(json.dumps({"devices": {"cpu": 1}, "packages": {"jax": "0.10.2"}}))
    write_lines(folder / "metrics.jsonl", [line(step) for step in range(1, 41)])
    write_lines(folder / "expert_load.jsonl", [record(step) for step in (10, 20, 30, 40)])
    write_lines(folder / "events.jsonl", events())
    return folder
