"""configs/small_moe.py trained for 100 steps, and `transformers` beside it.

The compiled step of `moejax train` is fed with batches made here: no files, no tokenizer, no checkpoints. The text is a
Markov chain over a Zipf distribution: half of the tokens follow from the one before, so that there is something to
learn, and frequent tokens crowd the experts that they choose. Each step is waited for. MFU is relative to the BF16 peak
of the data sheet, also that of FP8, and counts what `moejax.model.count` does.

With forced-balanced routing token t sends its k-th choice to expert (t * K + k) % E, with the weight that the gate
gives it: what a perfectly balanced gate would cost. Both are one program: the biases of the gates are infinite where
balance is forced.
"""

import contextlib
import dataclasses
import runpy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpu.bench import Bench
from moejax.config import BalanceConfig, MTPConfig, RunConfig
from moejax.mesh import BATCH_AXES, make_mesh, resolve
from moejax.model import moe
from moejax.model.count import train_flops_per_token
from moejax.train.peak import peak_flops

CONFIG = Path(__file__).parents[2] / "configs" / "small_moe.py"
STEPS, FEW_STEPS = 100, 40
MFU_AIM, PEER_AIM = 0.3, 2.0
WARM_UP = 20  # steps of the learning rate


def small_moe_bf16(bench: Bench) -> None:
    """Learned and forced-balanced routing; and, with learned, the model as `transformers` has it: without MTP."""
    config = small_moe("bf16")
    train(bench, "small_moe, bf16", config)
    train(bench, "small_moe as the peer's", as_peer(config), with_peer=True)


def small_moe_fp8(bench: Bench) -> None:
    """Learned and forced-balanced routing."""
    train(bench, "small_moe, fp8", small_moe("fp8"))


def small_moe(precision: str) -> RunConfig:
    """The config, for one device and few steps."""
    config = runpy.run_path(str(CONFIG))["config"]()
    schedule = dataclasses.replace(config.schedule, warmup_steps=WARM_UP)
    return resolve(dataclasses.replace(config, precision=precision, steps=STEPS, schedule=schedule), 1)


def as_peer(config: RunConfig) -> RunConfig:
    """Without what `transformers` lacks: MTP modules and balance losses."""
    experts = dataclasses.replace(config.model.moe, balance=BalanceConfig(sequence=0.0))
    model = dataclasses.replace(config.model, moe=experts, mtp=MTPConfig(depth=0))
    return dataclasses.replace(config, model=model)


def train(bench: Bench, name: str, config: RunConfig, with_peer: bool = False) -> None:
    """Trains for `STEPS` steps with learned routing, then for a few with forced-balanced routing.

    `with_peer`: a few steps with learned routing alone, for the ratio to `transformers`.
    """
    from moejax.train.state import abstract_state, new_state
    from moejax.train.step import make_train_step

    shape = f"{config.data.batch_size} x {config.data.sequence_length}"
    with bench.attempt(name, shape):
        mesh = make_mesh(config.mesh, [bench.device])
        with forcible_balance():
            step = make_train_step(config, mesh)
            arguments = abstract_state(config, mesh), _batch_shape(config, mesh), next(_settings(config))
            program = bench.compile(name, step, *arguments, shape=shape)
        if bench.dry:
            return
        state = new_state(config, mesh)
        if with_peer:
            _steps(bench, name, program, config, state, FEW_STEPS, of=f"transformers {shape}", aim=PEER_AIM)
            return
        state = _steps(bench, f"{name}, learned", program, config, state, STEPS, mfu_aim=MFU_AIM)
        _steps(bench, f"{name}, balanced", program, config, force_balance(state), FEW_STEPS)


def _steps(
    bench: Bench,
    name: str,
    program: Any,
    config: RunConfig,
    state: Any,
    steps: int,
    mfu_aim: float | None = None,
    **about: Any,
) -> Any:
    """Records tokens/s and MFU of the median of the later half of the steps, losses, memory; returns the last state."""
    from moejax.train.step import place

    rows, length = config.data.batch_size, config.data.sequence_length
    mesh, seconds, losses = make_mesh(config.mesh, [bench.device]), [], []
    for tokens, setting in zip(text(config.model.vocab_size, steps, rows, length + 1), _settings(config), strict=False):
        batch = place(_batch(tokens), mesh)
        begin = time.perf_counter()
        state, metrics = program(state, batch, setting)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begin)
    second = statistics.median(seconds[steps // 2 :])
    rate = rows * length / second
    bench.record(name, rate, "tokens/s", shape=f"{rows} x {length}", note=f"{second:.4f} s a step", **about)
    mfu = train_flops_per_token(config.model, length) * rate / peak_flops(1)
    bench.record(f"{name}: MFU", mfu, aim=mfu_aim)
    last = statistics.mean(losses[-5:])
    bench.record(f"{name}: loss", last, "nats", note=f"last 5 of {steps} steps; the first: {losses[0]:.4f}")
    crowded = float(metrics.counts.max() / metrics.counts.mean())
    bench.record(f"{name}: fullest expert", crowded, note="rows over the mean, last step")
    peak = (bench.device.memory_stats() or {}).get("peak_bytes_in_use")
    bench.record(f"{name}: most memory in use", peak, "bytes", note="of this section so far")
    return state


def _settings(config: RunConfig) -> Iterator[Any]:
    """The scheduled numbers of the steps."""
    from moejax.train.schedules import plan_steps
    from moejax.train.step import StepSettings

    for plan in plan_steps(config):
        yield StepSettings(*map(np.float32, (plan.learning_rate, plan.bias_update_speed, plan.mtp_weight)))


def text(vocab_size: int, steps: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Tokens of all batches, int32 [steps, rows, length]; the same for the same numbers."""
    rng = np.random.default_rng(seed)
    shares = 1 / (np.arange(vocab_size) + 10.0)
    drawn = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random((length, steps * rows)))
    follower = rng.permutation(vocab_size)
    follows = rng.random(drawn.shape) < 0.5
    tokens = np.minimum(drawn, vocab_size - 1)
    for place in range(1, length):
        tokens[place] = np.where(follows[place], follower[tokens[place - 1]], tokens[place])
    return np.ascontiguousarray(tokens.T.reshape(steps, rows, length), np.int32)


def _batch(tokens: np.ndarray) -> Any:
    from moejax.data.batches import Batch

    return Batch(tokens, np.zeros_like(tokens), np.ones(tokens.shape, bool))


def _batch_shape(config: RunConfig, mesh: jax.sharding.Mesh) -> Any:
    shape, sharding = (config.data.batch_size, config.data.sequence_length + 1), NamedSharding(mesh, P(BATCH_AXES))
    batch = _batch(np.zeros((1, 1), np.int32))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(shape, a.dtype, sharding=sharding), batch)


@contextlib.contextmanager
def forcible_balance() -> Iterator[None]:
    """In it programs are traced whose gates, where their biases are infinite, give every expert as many rows.

    The choices of a batch must divide by the experts.
    """
    route = moe.route

    def forced(logits_TE: Any, bias_E: Any, cfg: Any) -> tuple[Any, Any, Any]:
        ids_TK, weights_TK, scores_TE = route(logits_TE, bias_E, cfg)
        in_turn_TK = (jnp.arange(ids_TK.size) % cfg.num_experts).reshape(ids_TK.shape)
        gates_TK = jnp.take_along_axis(scores_TE, in_turn_TK, axis=-1)
        if cfg.normalize_weights:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + 1e-20)
        is_forced = jnp.isinf(bias_E[0])
        ids_TK = jnp.where(is_forced, in_turn_TK, ids_TK).astype(ids_TK.dtype)
        return ids_TK, jnp.where(is_forced, gates_TK * cfg.route_scale, weights_TK), scores_TE

    with patch.object(moe, "route", forced):
        yield


def force_balance(state: Any) -> Any:
    """The state with infinite biases, which stay so."""
    biases = jax.tree.map(lambda bias: bias + jnp.inf, state.router_bias)
    return dataclasses.replace(state, router_bias=biases)


# ----------------------------------------------------------------------------------------------------------- the peer


def transformers(bench: Bench) -> None:
    """The same model in `transformers`, on torch, with its fastest settings that run."""
    config = as_peer(small_moe("bf16"))
    rows, length, steps = config.data.batch_size, config.data.sequence_length, FEW_STEPS
    if bench.dry:
        model = dataclasses.replace(config.model, vocab_size=512, hidden_size=64, num_layers=2, dense_width=64)
        config, rows, length, steps = dataclasses.replace(config, model=model), 2, 16, 4
    path = bench.out / "tokens.npy"
    np.save(path, text(config.model.vocab_size, steps, rows, length))
    flops = train_flops_per_token(config.model, length)
    bench.with_torch("transformers", model=dataclasses.asdict(config.model), tokens=str(path), flops=flops)
