"""What a step reports, as the line of metrics.jsonl; its keys are documented in runlog.py."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.config import RunConfig
from moejax.model.count import train_flops_per_token
from moejax.pipeline.stages import in_order
from moejax.train.balance import load_entropy, relative_load
from moejax.train.peak import peak_memory_bytes
from moejax.train.schedules import StepPlan
from moejax.train.step import Metrics
from moejax.train.together import whole


class Recorder:
    """Makes the lines of a run."""

    def __init__(self, config: RunConfig, peak: float):
        """`peak`: FLOP/s of all devices together, to which MFU is relative."""
        self._peak, self._row_tokens = peak, config.data.sequence_length
        self._flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)

    def line(self, plan: StepPlan, metrics: Metrics, step_time: float, waited: float) -> dict[str, Any]:
        """The line of a step; `step_time` and `waited` (for its batch) in seconds."""
        tokens = plan.rows * self._row_tokens
        speed, load_LE = tokens / step_time, relative_load(metrics.counts)
        return {
            "step": plan.step,
            "tokens": plan.tokens + tokens,
            "loss": float(metrics.loss),
            "mtp_loss": float(metrics.mtp_loss),
            "balance_loss": float(metrics.balance_loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": plan.learning_rate,
            "bias_update_speed": plan.bias_update_speed,
            "mtp_weight": plan.mtp_weight,
            "tokens_per_second": speed,
            "flops_per_second": speed * self._flops_per_token,
            "mfu": speed * self._flops_per_token / self._peak,
            "max_violation": (load_LE.max(-1) - 1).tolist(),
            "load_entropy": np.round(load_entropy(load_LE), 5).tolist(),
            "dead_experts": int((np.asarray(metrics.counts) == 0).sum()),
            "exchange_rounds": float(metrics.exchange_rounds),
            "data_wait": waited,
            "step_time": step_time,
            "memory_bytes": peak_memory_bytes(),
        }


def not_finite(metrics: Metrics) -> list[str]:
    """The quantities for which a step was not applied."""
    names = () if metrics.finite else ("loss", "mtp_loss", "balance_loss", "grad_norm")
    return [name for name in names if not np.isfinite(getattr(metrics, name))]


def biases_in_order(config: RunConfig, router_bias: nnx.State) -> np.ndarray | None:
    """The router's biases of a state, float32 [L, E], layers as in the metrics; None where the gate has none.

    All processes call it.
    """
    parts = [whole(leaf) for leaf in jax.tree.leaves(router_bias)]  # main layers, then MTP modules: as the counts
    return np.asarray(in_order(config, np.concatenate(parts))) if parts else None  # type: ignore[arg-type]
