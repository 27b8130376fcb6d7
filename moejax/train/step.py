"""One training step: a single `jax.shard_map`, manual over every mesh axis, of plain functions of local arrays.

Parameters are made varying, so that gradients add up on each device over the micro-batches and are reduced once, after
the last one. A loss or gradient that is not finite leaves the state as it was, and the metrics say so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array

from moejax.config import RunConfig
from moejax.data.batches import Batch
from moejax.mesh import AXES, BATCH_AXES
from moejax.model.transformer import Losses
from moejax.ops.routing import update_bias
from moejax.pipeline.interleave import GPU_OPTIONS
from moejax.pipeline.stages import Objective, counts_of_biases, evaluate, gradients, in_order
from moejax.train.optimizer import clip, make_optimizer
from moejax.train.state import TrainState, model_structure, state_specs
from moejax.varying import vary_over


@jax.tree_util.register_dataclass
@dataclass
class StepSettings:
    """The scheduled numbers of one step (`schedules.StepPlan`), float32."""

    learning_rate: ArrayLike
    bias_update_speed: ArrayLike
    mtp_weight: ArrayLike


@jax.tree_util.register_dataclass
@dataclass
class Metrics:
    """What a step reports, of the whole global batch."""

    loss: Array  # float32 []: nats per predicted token
    mtp_loss: Array  # float32 []: the same of the MTP modules, unweighted
    balance_loss: Array  # float32 []: weighted
    grad_norm: Array  # float32 []: before clipping
    counts: Array  # int32 [L, E]: tokens per MoE layer (main, then MTP) and expert
    exchange_rounds: Array  # float32 []: of the expert exchange, the mean over layers and micro-batches
    finite: Array  # bool []: whether the step was applied


def place(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the devices, its rows shared out; of several processes each gives the rows of its own devices."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def make_train_step(
    config: RunConfig, mesh: Mesh
) -> Callable[[TrainState, Batch, StepSettings], tuple[TrainState, Metrics]]:
    """The compiled step `(state, batch, settings) -> (state, metrics)`; the state it is given is donated.

    The batch's rows are a multiple of a micro-batch's, `data.batch_size / pipeline.microbatches`.
    """
    structure, optimizer = model_structure(config), make_optimizer(config.optimizer)

    def step(state: TrainState, batch: Batch, settings: StepSettings) -> tuple[TrainState, Metrics]:
        predicted = jax.lax.psum(batch.loss_mask[:, 1:].sum(dtype=jnp.float32), BATCH_AXES)
        shards = jax.lax.axis_size(BATCH_AXES)
        num_micro = batch.tokens.shape[0] * shards // config.rows_of_microbatch
        params, biases = jax.tree.map(lambda x: vary_over(x, AXES), (state.params, state.router_bias))
        to = Objective(predicted, settings.mtp_weight, num_micro * shards)
        grads, losses = gradients(config, structure, params, biases, batch, to)
        return _apply(state, grads, jax.lax.psum(losses, AXES), num_micro * shards, settings)

    def _apply(
        state: TrainState, grads: nnx.State, losses: Losses, num_parts: int, settings: StepSettings
    ) -> tuple[TrainState, Metrics]:
        """The state after the step; `num_parts`: micro-batches of all devices."""
        grads, norm = clip(grads, config.optimizer.clip_norm)
        finite = (
            jnp.isfinite(losses.main) & jnp.isfinite(losses.mtp) & jnp.isfinite(losses.balance) & jnp.isfinite(norm)
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - settings.learning_rate * u, state.params, updates)
        counts = counts_of_biases(config, losses.counts)
        new = TrainState(
            step=state.step + 1,
            params=params,
            router_bias=_updated_bias(state.router_bias, counts, settings.bias_update_speed),
            opt_state=opt_state,
            ema=_averaged(state.ema, params, config.optimizer.ema_decay),
        )
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        by_layer = in_order(config, losses.counts)
        rounds = losses.rounds / max(len(by_layer) * num_parts, 1)
        return kept, Metrics(losses.main, losses.mtp, losses.balance, norm, by_layer, rounds, finite)

    specs = state_specs(config, mesh)
    inputs, outputs = (specs, P(BATCH_AXES), P()), (specs, P())
    local = jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=set(AXES))
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    return jax.jit(local, donate_argnums=0, compiler_options=GPU_OPTIONS if on_gpu else None)


def make_eval_step(config: RunConfig, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[Array, Array]]:
    """The compiled `(state, batch) -> (summed loss in nats, predicted tokens)` of the main model.

    A batch goes through in `pipeline.microbatches` parts, as in training.
    """
    structure = model_structure(config)

    def step(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        predicted = jax.lax.psum(batch.loss_mask[:, 1:].sum(dtype=jnp.float32), BATCH_AXES)
        params, biases = jax.tree.map(lambda x: vary_over(x, AXES), (state.params, state.router_bias))
        return jax.lax.psum(evaluate(config, structure, params, biases, batch).main, AXES), predicted

    specs = (state_specs(config, mesh), P(BATCH_AXES))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), axis_names=set(AXES)))


def _updated_bias(bias: nnx.State, counts: list[Array], speed: Any) -> nnx.State:
    """Every router's bias moved against its layer's load; `counts` has a part for each array of biases."""
    leaves, structure = jax.tree.flatten(bias)
    counts = counts if leaves else []  # a gate without biases is counted too
    return jax.tree.unflatten(structure, [update_bias(b, c, speed) for b, c in zip(leaves, counts, strict=True)])


def _averaged(ema: nnx.State | None, params: nnx.State, decay: float | None) -> nnx.State | None:
    if decay is None:
        return None
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
