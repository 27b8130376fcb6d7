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
from moejax.model.shards import gather_for_step, reduce
from moejax.model.transformer import Losses
from moejax.ops.linear import FLOATS
from moejax.ops.routing import update_bias
from moejax.ops.varying import vary_over
from moejax.pipeline.interleave import GPU_OPTIONS
from moejax.pipeline.stages import Objective, counts_of_biases, evaluate, gradients, in_order
from moejax.train.optimizer import clip, make_optimizer
from moejax.train.state import TrainState, model_structure, state_specs


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
    dtype = FLOATS[config.precision]

    def step(state: TrainState, batch: Batch, settings: StepSettings) -> tuple[TrainState, Metrics]:
        predicted = jax.lax.psum(batch.loss_mask[:, 1:].sum(dtype=jnp.float32), BATCH_AXES)
        shards = jax.lax.axis_size(BATCH_AXES)
        num_micro = batch.tokens.shape[0] * shards // config.rows_of_microbatch
        axes = BATCH_AXES if config.mesh.pipe == 1 else AXES
        params, router_bias = jax.tree.map(lambda x: vary_over(x, axes), (state.params, state.router_bias))
        if config.mesh.pipe > 1:
            to = Objective(predicted, settings.mtp_weight, num_micro * shards)
            grads, losses = gradients(config, structure, params, router_bias, batch, to)
            return _apply(state, grads, jax.lax.psum(losses, AXES), num_micro * shards, settings)
        weights = gather_for_step(params, config.mesh, dtype)

        def objective(weights: nnx.State, micro: Batch) -> tuple[Array, Losses]:
            losses = nnx.merge(structure, weights, router_bias).losses(
                micro.tokens, micro.loss_mask, _segments(config, micro), dtype
            )
            per_token = Losses(
                main=losses.main / predicted,
                mtp=losses.mtp / predicted,
                balance=losses.balance / (num_micro * shards),
                counts=losses.counts,
                rounds=losses.rounds,
            )
            return per_token.main + settings.mtp_weight * per_token.mtp + per_token.balance, per_token

        grads, losses = _accumulate(objective, weights, batch, num_micro)
        losses = jax.lax.psum(losses, BATCH_AXES)
        return _apply(state, reduce(grads, config.mesh), losses, num_micro * shards, settings)

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
    structure, dtype = model_structure(config), FLOATS[config.precision]

    def step(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        predicted = jax.lax.psum(batch.loss_mask[:, 1:].sum(dtype=jnp.float32), BATCH_AXES)
        if config.mesh.pipe > 1:
            params, biases = jax.tree.map(lambda x: vary_over(x, AXES), (state.params, state.router_bias))
            return jax.lax.psum(evaluate(config, structure, params, biases, batch).main, AXES), predicted
        weights = gather_for_step(state.params, config.mesh, dtype)
        model = nnx.merge(structure, weights, state.router_bias)

        def nats(micro: Batch) -> Array:
            return model.losses(micro.tokens, micro.loss_mask, _segments(config, micro), dtype).main

        summed = jax.lax.map(nats, _micro_batches(batch, config.pipeline.num_microbatches)).sum()
        return jax.lax.psum(summed, BATCH_AXES), predicted

    specs = (state_specs(config, mesh), P(BATCH_AXES))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), axis_names=set(AXES)))


def _segments(config: RunConfig, batch: Batch) -> Any:
    return batch.segment_ids if config.data.mask_documents else None


def _accumulate(objective: Callable, params: nnx.State, batch: Batch, num_micro: int) -> tuple[nnx.State, Losses]:
    """Gradients and losses of the objective, summed over the micro-batches."""
    gradient = jax.grad(objective, has_aux=True)
    if num_micro == 1:
        return gradient(params, batch)

    def add(total: nnx.State, micro: Batch) -> tuple[nnx.State, Losses]:
        grads, losses = gradient(params, micro)
        return jax.tree.map(jnp.add, total, grads), losses

    grads, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), _micro_batches(batch, num_micro))
    return grads, jax.tree.map(lambda x: x.sum(0), losses)


def _micro_batches(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def _updated_bias(bias: nnx.State, counts: list[Array], speed: Any) -> nnx.State:
    """Every router's bias moved against its layer's load; `counts` has a part for each array of biases."""
    leaves, structure = jax.tree.flatten(bias)
    counts = counts if leaves else []  # a gate without biases is counted too
    return jax.tree.unflatten(structure, [update_bias(b, c, speed) for b, c in zip(leaves, counts, strict=True)])


def _averaged(ema: nnx.State | None, params: nnx.State, decay: float | None) -> nnx.State | None:
    if decay is None:
        return None
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
