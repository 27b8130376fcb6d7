"""A model cut into stages: which layers lie where, and what of the model is not part of a stage.

The MoE layers are spread over the stages. What comes before them (embedding, dense layers) runs with the first stage,
what comes after (final norm, head, loss, MTP modules) with the last; both are on every rank, in shards, but for the
blocks of MTP modules, which lie with the last stage's layers where it has places for them (`guests`).
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from moejax.config import ConfigError, MeshConfig, RunConfig
from moejax.mesh import AXES, BATCH_AXES
from moejax.model.block import Block, run_block
from moejax.model.moe import RouterBias
from moejax.model.shards import gather_for_step, gather_for_use, narrowed, reduce
from moejax.model.transformer import Losses, Transformer
from moejax.ops.linear import FLOATS
from moejax.pipeline.carry import Outcome, Work
from moejax.pipeline.cells import Cells
from moejax.pipeline.executor import run
from moejax.pipeline.guests import let_go, num_guests, taken_in
from moejax.pipeline.layout import lay_out
from moejax.pipeline.mirror import from_copies, to_copies
from moejax.pipeline.schedule import Program, forward_only, named, unpiped
from moejax.pipeline.table import Table, build
from moejax.pipeline.whole import WholePasses
from moejax.varying import vary_over


def mesh_of_extras(cfg: MeshConfig) -> MeshConfig:
    """How the parts outside of the stages are gathered: where they are used: all ranks hold them, few use them."""
    return replace(cfg, sharding="fsdp") if cfg.pipe > 1 and cfg.sharding == "zero1" else cfg


def program_of(config: RunConfig, microbatches: int | None = None) -> Program:
    """The schedule that a run asks for, on a mesh that is resolved; None: of a full batch's micro-batches.

    Without a pipeline every micro-batch passes through the whole model and back, whatever the schedule's name.

    Raises:
        ConfigError: the mesh or the micro-batches do not fit the schedule.
    """
    cfg, pipe = config.pipeline, config.mesh.pipe
    if pipe == 1:
        return unpiped(microbatches or cfg.num_microbatches)
    stages = 2 * pipe if cfg.schedule == "dualpipe_v" else pipe
    try:
        return named(cfg.schedule, stages, microbatches or cfg.num_microbatches, max_deferred_w=cfg.max_deferred_w)
    except ConfigError as error:
        places = {"stages": "mesh.pipe", "microbatches": "pipeline.microbatches"}
        raise ConfigError(places.get(error.place, error.place), error.value, error.wanted) from None


def require_pipeline(config: RunConfig, batch_sizes: Iterable[int]) -> None:
    """Raises ConfigError where the schedule, the layers or a batch, of sizes in sequences, do not fit a pipeline."""
    if config.mesh.pipe == 1:
        return
    lay_out(config)
    program_of(config)
    for rows in sorted(set(batch_sizes)):
        try:
            program_of(config, rows // config.rows_of_microbatch)
        except ConfigError as error:
            wanted = f"{config.rows_of_microbatch} sequences for each of the micro-batches, of which {error.wanted}"
            raise ConfigError("schedule.ramp_start", rows, wanted) from None


@functools.cache
def table_of(program: Program) -> Table:
    """The program laid out in slots."""
    return build(program)


@dataclass(frozen=True)
class Objective:
    """What is differentiated: per-token losses of the whole step, weighted. Each micro-batch adds its part."""

    predicted: Array  # tokens of the whole step
    mtp_weight: Any  # a number
    num_parts: int  # micro-batches of all devices: the balance losses are means over them

    def of(self, losses: Losses) -> tuple[Array, Losses]:
        """What a micro-batch's losses add to the objective, and the losses in its units."""
        scaled = replace(
            losses,
            main=losses.main / self.predicted,
            mtp=losses.mtp / self.predicted,
            balance=losses.balance / self.num_parts,
        )
        return scaled.main + self.mtp_weight * scaled.mtp + scaled.balance, scaled


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
    program = program_of(config, to.num_parts // lax.axis_size(BATCH_AXES))
    outcome = _run(config, program, nnx.merge(structure, params, biases), batch, to)
    dmodel = jax.tree.map(lambda g: lax.psum(g, "pipe"), reduce(outcome.dextras, mesh_of_extras(config.mesh)))
    if program.num_ranks > 1:
        dstack = from_copies(program, reduce(outcome.dstack, replace(config.mesh, pipe=1)))
        if num_guests(config):
            dstack, dmodel.mtp.block = let_go(config, dstack)
        dmodel.moe_blocks = dstack
    return nnx.split(dmodel, nnx.Param, RouterBias)[1], _losses(config, program, outcome)


def evaluate(config: RunConfig, structure: nnx.GraphDef, params: nnx.State, biases: nnx.State, batch: Any) -> Losses:
    """The losses of a batch, of which each device has its part, as in `gradients` but summed over the tokens."""
    program = forward_only(program_of(config))
    to = Objective(jnp.ones(()), jnp.ones(()), 1)
    return _losses(config, program, _run(config, program, nnx.merge(structure, params, biases), batch, to))


def _run(config: RunConfig, program: Program, model: Transformer, batch: Any, to: Objective) -> Outcome:
    table, rank = table_of(program), lax.axis_index("pipe")
    columns = jax.tree.map(lambda column: jnp.asarray(column)[:, rank], table.rows)
    rows, length = batch.tokens.shape[0] // program.num_microbatches, batch.tokens.shape[1] - 1
    batch = jax.tree.map(lambda x: vary_over(x.reshape(-1, rows, *x.shape[1:]), AXES), batch)
    dtype = FLOATS[config.precision]
    if program.num_ranks == 1:
        whole = gather_for_step(model, config.mesh, dtype)
        return run(table, columns, WholePasses(_whole(config, batch, to), whole))
    own, model.moe_blocks = model.moe_blocks, None
    if num_guests(config):
        modules: Any = model.mtp
        own, modules.block = taken_in(config, own, modules.block), None
    stack = gather_for_step(to_copies(program, narrowed(own, config.mesh, dtype)), config.mesh, dtype)
    x = vary_over(jnp.zeros((rows, length, config.model.hidden_size), dtype), AXES)
    return run(table, columns, Cells(table, _work(config, batch, to), stack, model, x))


def _whole(config: RunConfig, batch: Any, to: Objective) -> Callable[[Transformer, Array], tuple[Array, Losses]]:
    """The objective of one of the micro-batches, `batch`'s first dim."""

    def objective(model: Transformer, microbatch: Array) -> tuple[Array, Losses]:
        tokens, segment_ids, mask = _micro_batch(config, batch, microbatch)
        return to.of(model.losses(tokens, mask, segment_ids, FLOATS[config.precision]))

    return objective


def _micro_batch(config: RunConfig, batch: Any, number: Array) -> tuple[Array, Array | None, Array]:
    """Tokens, segments and mask of one of `batch`'s first dim; without segments where documents are not masked."""
    one = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), batch)
    return one.tokens, one.segment_ids if config.data.mask_documents else None, one.loss_mask


def _work(config: RunConfig, batch: Any, to: Objective) -> Work:
    dtype = FLOATS[config.precision]

    def integers(microbatch: Array) -> Any:
        _, segment_ids, _ = _micro_batch(config, batch, microbatch)
        return None if segment_ids is None else segment_ids[:, :-1]

    def layer(block: Block, given: tuple[Array, Any]) -> tuple[Array, tuple[Array, Array, Array]]:
        x, segment_ids = given
        block, positions = gather_for_use(block, config.mesh, dtype), jnp.arange(x.shape[1])[None]
        x, stats = run_block(block, x, positions, segment_ids, config.model.remat)
        assert stats is not None
        return x, (stats.balance_loss, stats.counts, stats.rounds)

    def embed(extras: Transformer, microbatch: Array) -> Array:
        return extras.embed(_micro_batch(config, batch, microbatch)[0][:, :-1], dtype)

    def enter(extras: Transformer, microbatch: Array) -> Array:
        return extras.enter(embed(extras, microbatch), integers(microbatch))

    def leave(extras: Transformer, guests: Block | None, hidden: Array, microbatch: Array) -> tuple[Array, Losses]:
        tokens, segment_ids, mask = _micro_batch(config, batch, microbatch)
        return to.of(extras.leave(hidden, embed(extras, microbatch), tokens, mask, segment_ids, guests))

    part = vary_over(jnp.full((), 1 / to.num_parts, jnp.float32), AXES)
    return Work(layer, integers, enter, leave, (part, None, None), lay_out(config).layers, num_guests(config))


def _losses(config: RunConfig, program: Program, outcome: Outcome) -> Losses:
    """The sums of a step: those of `leave`, and what the layers of the stages report."""
    if program.num_ranks == 1:
        return outcome.sums
    balance, own, rounds = from_copies(program, outcome.stats)
    slots = len(own) * program.num_ranks
    counts = jnp.zeros((slots, own.shape[1]), jnp.int32)
    counts = lax.dynamic_update_slice_in_dim(counts, own, lax.axis_index("pipe") * len(own), 0)
    parts = config.mesh.batch_shards * program.num_microbatches
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
    ranks = config.mesh.pipe
    places = config.model.num_moe_layers if ranks == 1 else len(lay_out(config).layer_of_slot)
    own, extra = counts[:places], counts[places:]
    if ranks > 1:
        own = lax.dynamic_slice_in_dim(own, lax.axis_index("pipe") * (places // ranks), places // ranks, 0)
    return [part for part in (own, extra) if part.size]


def in_order(config: RunConfig, counts: Array) -> Array:
    """The same counts in the order of the model's layers."""
    if config.mesh.pipe == 1:
        return counts
    layout = lay_out(config)
    extra = np.arange(len(layout.layer_of_slot), len(counts))
    return counts[np.concatenate([layout.slot_of_layer, extra])]
