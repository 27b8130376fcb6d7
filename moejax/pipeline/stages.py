"""A model cut into stages: which layers lie where, and what of the model is not part of a stage.

The MoE layers are spread over the stages. What comes before them (embedding, dense layers) runs with the first stage,
what comes after (final norm, head, loss, MTP modules) with the last; both are on every rank, in shards.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from moejax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from moejax.mesh import AXES
from moejax.model.block import Block, run_block
from moejax.model.moe import RouterBias
from moejax.model.shards import gather_for_step, gather_for_use, reduce
from moejax.model.transformer import Losses, Transformer
from moejax.ops.linear import FLOATS
from moejax.ops.varying import vary_over
from moejax.pipeline.executor import Outcome, Work, run
from moejax.pipeline.mirror import from_copies, to_copies
from moejax.pipeline.schedule import Program, forward_only, named
from moejax.pipeline.table import Table, build


@dataclass(frozen=True)
class Layout:
    """Where the MoE layers of a model lie. A rank has `chunks` stages of `depth` layers each."""

    num_ranks: int
    chunks: int  # stages of which a rank keeps the parameters: 2 with the placement "v", else 1
    depth: int  # layers of a stage

    @property
    def layer_of_slot(self) -> tuple[int, ...]:
        """The layer in each place of the stacked parameters, which are cut into equal parts over the ranks."""
        last = self.num_ranks * self.chunks - 1
        stages = [stage for rank in range(self.num_ranks) for stage in (rank, last - rank)[: self.chunks]]
        return tuple(stage * self.depth + layer for stage in stages for layer in range(self.depth))


def lay_out(model: ModelConfig, num_ranks: int, chunks: int) -> Layout:
    """The layout of a model's MoE layers.

    Raises:
        ConfigError: there are not as many layers for each stage.
    """
    stages, layers = num_ranks * chunks, model.num_moe_layers
    if layers == 0 or layers % stages:
        wanted = f"MoE layers (here {layers}) that are a multiple of the {stages} stages of mesh.pipe={num_ranks}"
        raise ConfigError("model.num_layers", model.num_layers, wanted)
    return Layout(num_ranks, chunks, layers // stages)


def mesh_of_extras(cfg: MeshConfig) -> MeshConfig:
    """How the parts outside of the stages are gathered: where they are used: all ranks hold them, few use them."""
    return replace(cfg, sharding="fsdp") if cfg.pipe > 1 and cfg.sharding == "zero1" else cfg


def program_of(config: RunConfig) -> Program:
    """The schedule that a run asks for, on a mesh and for micro-batches that are resolved."""
    cfg, pipe = config.pipeline, config.mesh.pipe
    stages = 2 * pipe if cfg.schedule == "dualpipe_v" else pipe
    return named(cfg.schedule, stages, cfg.num_microbatches, max_deferred_w=cfg.max_deferred_w)


def require_pipeline(config: RunConfig) -> None:
    """Raises ConfigError where the schedule, the layers or the batch do not fit a pipeline."""
    if config.mesh.pipe == 1:
        return
    program_of(config)
    layout_of(config)
    if config.schedule.ramp_start is not None:
        raise ConfigError("schedule.ramp_start", config.schedule.ramp_start, "None where mesh.pipe is above 1")


@functools.cache
def table_of(program: Program) -> Table:
    """The program laid out in slots."""
    return build(program)


def layout_of(config: RunConfig) -> Layout:
    """Where the MoE layers of a run lie."""
    return lay_out(config.model, config.mesh.pipe, 2 if config.pipeline.schedule == "dualpipe_v" else 1)


@dataclass(frozen=True)
class Objective:
    """What is differentiated: per-token losses of the whole step, weighted. Each micro-batch adds its part."""

    predicted: Array  # tokens of the whole step
    mtp_weight: Any  # a number
    num_parts: int  # micro-batches of all devices: the balance losses are means over them


def gradients(
    config: RunConfig,
    structure: nnx.GraphDef,
    params: nnx.State,
    biases: nnx.State,
    batch: Any,
    to: Objective,
) -> tuple[nnx.State, Losses]:
    """The gradients of a step's micro-batches, in shards, and its losses, of which each device has its part.

    It stands in `jax.shard_map`; all arrays vary over every mesh axis. The counts have the main layers in the order of
    the ranks (`Layout.layer_of_slot`), then the MTP modules'.
    """
    program = program_of(config)
    extras, copies = _parted(config, program, structure, params, biases)
    outcome = _run(config, program, extras, copies, batch, to)
    cut = replace(config.mesh, pipe=1)
    stacks = [reduce(_stacked(layers), cut) for layers in outcome.dcopies]
    dmodel = jax.tree.map(lambda g: lax.psum(g, "pipe"), reduce(outcome.dextras, mesh_of_extras(config.mesh)))
    dmodel.moe_blocks = from_copies(program, stacks)
    return nnx.split(dmodel, nnx.Param, RouterBias)[1], _losses(config, program, outcome)


def evaluate(config: RunConfig, structure: nnx.GraphDef, params: nnx.State, biases: nnx.State, batch: Any) -> Losses:
    """The losses of a batch, of which each device has its part, as in `gradients` but summed over the tokens."""
    program = forward_only(program_of(config))
    extras, copies = _parted(config, program, structure, params, biases)
    to = Objective(jnp.ones(()), jnp.ones(()), 1)
    return _losses(config, program, _run(config, program, extras, copies, batch, to))


def _run(
    config: RunConfig, program: Program, extras: Transformer, copies: list[list[Block]], batch: Any, to: Objective
) -> Outcome:
    table, rank = table_of(program), lax.axis_index("pipe")
    rows = jax.tree.map(lambda column: jnp.asarray(column)[:, rank], table.rows)
    return run(table, rows, _work(config, batch, to), copies, extras, _example(config, batch))


def _parted(
    config: RunConfig, program: Program, structure: nnx.GraphDef, params: nnx.State, biases: nnx.State
) -> tuple[Transformer, list[list[Block]]]:
    """The model without its MoE layers, and the layers of each copy that this rank holds."""
    model = nnx.merge(structure, params, biases)
    stack, model.moe_blocks = model.moe_blocks, None
    dtype = FLOATS[config.precision]
    copies = [_layers(own) for own in to_copies(program, stack)]
    return model, [[gather_for_step(layer, config.mesh, dtype) for layer in copy] for copy in copies]


def _layers(stack: Block) -> list[Block]:
    count = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(count)]


def _stacked(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _example(config: RunConfig, batch: Any) -> Array:
    """Zeros like what goes from stage to stage."""
    rows = batch.tokens.shape[0] // config.pipeline.num_microbatches
    shape = rows, batch.tokens.shape[1] - 1, config.model.hidden_size
    return vary_over(jnp.zeros(shape, FLOATS[config.precision]), AXES)


def _work(config: RunConfig, batch: Any, to: Objective) -> Work:
    count, dtype = config.pipeline.num_microbatches, FLOATS[config.precision]
    batch = jax.tree.map(lambda x: vary_over(x.reshape(count, -1, *x.shape[1:]), AXES), batch)

    def of(array: Array, microbatch: Array) -> Array:
        return lax.dynamic_index_in_dim(array, microbatch, keepdims=False)

    def segments(microbatch: Array) -> Array | None:
        return of(batch.segment_ids, microbatch) if config.data.mask_documents else None

    def integers(microbatch: Array) -> Any:
        found = segments(microbatch)
        return None if found is None else found[:, :-1]

    def layer(block: Block, given: tuple[Array, Any]) -> tuple[Array, tuple[Array, Array, Array]]:
        x, segment_ids = given
        block, positions = gather_for_use(block, config.mesh, dtype), jnp.arange(x.shape[1])[None]
        x, stats = run_block(block, x, positions, segment_ids, config.model.remat)
        assert stats is not None
        return x, (stats.balance_loss, stats.counts, stats.rounds)

    def embed(extras: Transformer, microbatch: Array) -> Array:
        return extras.embed(of(batch.tokens, microbatch)[:, :-1], dtype)

    def enter(extras: Transformer, microbatch: Array) -> Array:
        return extras.enter(embed(extras, microbatch), integers(microbatch))

    def leave(extras: Transformer, hidden: Array, microbatch: Array) -> tuple[Array, Losses]:
        tokens, mask = of(batch.tokens, microbatch), of(batch.loss_mask, microbatch)
        losses = extras.leave(hidden, embed(extras, microbatch), tokens, mask, segments(microbatch))
        scaled = replace(
            losses,
            main=losses.main / to.predicted,
            mtp=losses.mtp / to.predicted,
            balance=losses.balance / to.num_parts,
        )
        return scaled.main + to.mtp_weight * scaled.mtp + scaled.balance, scaled

    part = vary_over(jnp.full((), 1 / to.num_parts, jnp.float32), AXES)
    return Work(layer, integers, enter, leave, (part, None, None))


def _losses(config: RunConfig, program: Program, outcome: Outcome) -> Losses:
    """The sums of a step: those of `leave`, and what the layers of the stages report."""
    balance, own, rounds = from_copies(program, [_stacked(layers) for layers in outcome.stats])
    slots = len(own) * program.num_ranks
    counts = jnp.zeros((slots, own.shape[1]), jnp.int32)
    counts = lax.dynamic_update_slice_in_dim(counts, own, lax.axis_index("pipe") * len(own), 0)
    parts = config.mesh.batch_shards * config.pipeline.num_microbatches
    return replace(
        outcome.sums,
        balance=outcome.sums.balance + balance.sum() / parts,
        counts=jnp.concatenate([counts, outcome.sums.counts]),
        rounds=outcome.sums.rounds + rounds.sum(),
    )


def counts_of_biases(config: RunConfig, counts: Array) -> list[Array]:
    """The counts of `gradients`, summed over all devices, for the layers whose router biases this rank holds.

    Those of the main layers, then those of the MTP modules; without a pipeline the rank holds all.
    """
    slots, ranks = config.model.num_moe_layers, config.mesh.pipe
    own = counts[:slots]
    if ranks > 1:
        own = lax.dynamic_slice_in_dim(own, lax.axis_index("pipe") * (slots // ranks), slots // ranks, 0)
    return [part for part in (own, counts[slots:]) if part.size]


def in_order(config: RunConfig, counts: Array) -> Array:
    """The same counts in the order of the model's layers."""
    if config.mesh.pipe == 1:
        return counts
    slots = layout_of(config).layer_of_slot
    return counts[np.concatenate([np.argsort(slots), np.arange(len(slots), len(counts))])]
