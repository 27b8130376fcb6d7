"""What each device sends in a step, before any program is compiled: every collective, its bytes, how often it runs.

The sizes are those of the code that runs: `ops.hops.plan_exchange` for the expert exchange, the shapes and places of
the weights (`weights.py`), the schedule's program for what is sent between stages. Slots of the exchange count whether
a token is in them or not. Routing is taken to be balanced: no token waits for a later round.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from moejax.config import RunConfig
from moejax.mesh import AXES, BATCH_AXES
from moejax.model.prefetch import UNROLLED
from moejax.ops.fp8 import TILE
from moejax.ops.hops import Hop, plan_exchange
from moejax.ops.linear import FLOATS
from moejax.pipeline.layout import lay_out
from moejax.pipeline.stages import mesh_of_extras, program_of
from moejax.plan.nodes import Nodes
from moejax.plan.weights import Weight, by_axes, weights_of

# Where a collective stands. step: once a step. layer: a pass of a micro-batch through one MoE layer of a stage; stack:
# through all MoE layers, without a pipeline. enter, leave: a pass of what runs before the MoE layers, and after them.
# stages: a value between two stages
Place = Literal["step", "layer", "stack", "enter", "leave", "stages"]
Platform = Literal["gpu", "cpu"]

_MERGES = jax.__version_info__ < (0, 11)  # whether XLA for CPUs takes the same gathers of one cell for one


@dataclass(frozen=True)
class Transfer:
    """A collective, or like ones of several arrays, as one device takes part in it."""

    axis: str  # the mesh axes, longer than 1, over which it runs: "pipe", "expert", "data x expert"
    kind: str  # of collectives.KINDS
    what: str  # dispatch, combine, choices, rounds, embedding, head, weights, gradients, mirror, stage outputs, sums
    place: Place
    side: str  # F; B, in which I counts; W, in the places of passes; "" in the place "step"
    bytes: int  # of the arrays that a device has after one execution
    times: int  # executions; of a permute those by which the device gets something
    inter_node_share: float  # of these bytes, those that come from devices of other nodes


def transfers(config: RunConfig, rank: int = 0, per_node: int = 8, platform: Platform = "gpu") -> list[Transfer]:
    """The collectives of one training step, with the times that a device of pipeline rank `rank` runs them.

    Args:
        config: a run whose mesh `mesh.resolve` has resolved.
        rank: of the pipeline.
        per_node: devices of a node; the nodes hold them in the order of the mesh.
        platform: XLA for CPUs moves a gather that nothing in a loop changes out of it, XLA for GPUs does not.
    """
    times = _times(config, rank)
    of_pass = passes(config, per_node, platform)
    found = (dataclasses.replace(t, times=t.times * times[t.place, t.side]) for t in of_pass)
    return [transfer for transfer in found if transfer.times]


def passes(config: RunConfig, per_node: int = 8, platform: Platform = "gpu") -> list[Transfer]:
    """The same with the times of one pass of each place and side: one layer's forward, and so on."""
    nodes, hoists = Nodes(config.mesh, per_node), platform == "cpu"
    found = [*_once(config, nodes), *_beside(config, nodes, hoists), *_between_stages(config, nodes)]
    if config.model.num_moe_layers:
        layer = _exchange(config, nodes, "layer", config.data.sequence_length)
        found += [*layer, *_weights_of_layers(config, nodes, hoists)]
    return [transfer for transfer in found if transfer.axis and transfer.bytes]


# ------------------------------------------------------------------------------------------------------------ how often


def _times(config: RunConfig, rank: int) -> dict[tuple[str, str], int]:
    """How often a device of a rank runs a pass of each place and side in a step."""
    program, whole = program_of(config), (config.model.num_moe_layers,)
    layers: tuple[int, ...] = lay_out(config).layers if config.mesh.pipe > 1 else whole
    each, last = program.microbatches_per_chunk, program.num_stages - 1
    stages = [program.stage(rank, chunk) for chunk in range(program.num_chunks)]
    sides = ("F", "B", "W")
    found = {("step", ""): 1}
    found |= {("layer", side): each * sum(layers[stage] for stage in stages) for side in sides}
    found |= {("stack", side): each if config.mesh.pipe == 1 else 0 for side in sides}
    found |= {("enter", side): each * stages.count(0) for side in sides}
    found |= {("leave", side): each * stages.count(last) for side in sides}
    received = [program.beside(rank, chunk, -1) for chunk in range(program.num_chunks)]
    returned = [program.beside(rank, chunk, 1) for chunk in range(program.num_chunks)]
    for side, sources in (("F", received), ("B", returned)):
        found["stages", side] = each * sum(source is not None and source[0] != rank for source in sources)
    return found


# --------------------------------------------------------------------------------------------------------------- layers


def _exchange(config: RunConfig, nodes: Nodes, place: Place, length: int) -> Iterator[Transfer]:
    """Of one MoE layer's forward and backward, on micro-batches of `length` tokens a row."""
    moe, mesh, dim, fp8 = config.model.moe, config.mesh, config.model.hidden_size, config.precision == "fp8"
    tokens, item = _rows(config) * length, _itemsize(config)
    plan = plan_exchange(moe, tokens, mesh.expert, mesh.expert_nodes, mesh.exchange_slack, fp8)
    again = config.model.remat == "full"  # the backward pass runs the forward's way to the experts once more
    for hop in plan.hops:
        to_experts = hop.rows * (dim + 4 * -(-dim // TILE) if fp8 else dim * item)
        sizes = {
            "dispatch": (to_experts, hop.rows * dim * item, again),  # forward, backward, whether again
            "combine": (hop.rows * dim * item, to_experts, False),
            "choices": (hop.rows * 2 * moe.top_k * 4, hop.rows * moe.top_k * 4, again),
        }
        share = nodes.share(["expert"], hop.groups)
        for what, (forward, backward, repeated) in sizes.items():
            one = Transfer("expert", "all-to-all", what, place, "F", forward, 1, share)
            yield one if place == "layer" else dataclasses.replace(one, side="B")
            yield dataclasses.replace(one, side="B", bytes=backward)
            if repeated:
                yield dataclasses.replace(one, side="B")
        yield from _agreement(nodes, hop, tokens, place, mesh.expert, again)
        tokens = hop.rows


def _agreement(nodes: Nodes, hop: Hop, tokens: int, place: Place, devices: int, again: bool) -> Iterator[Transfer]:
    """The number of rounds, on which all devices of the axis agree where one may not be enough."""
    if hop.slots < tokens:
        one = Transfer("expert", "all-gather", "rounds", place, "F", 4 * devices, 1, nodes.share(["expert"]))
        yield one if place == "layer" else dataclasses.replace(one, side="B")
        if again:
            yield dataclasses.replace(one, side="B")


def _weights_of_layers(config: RunConfig, nodes: Nodes, hoists: bool) -> Iterator[Transfer]:
    """With FSDP and HSDP, of the MoE layers: each layer gathered in either pass, its gradient scattered."""
    if config.mesh.sharding == "zero1":
        return
    layers = [weight for weight in weights_of(config) if weight.part == "moe_blocks"]
    if config.mesh.pipe == 1:
        yield from _scanned(config, nodes, layers, "stack", [("F", False), ("B", True)], hoists)
        return
    yield from _gathered(nodes, layers, "layer", "F", 1)
    yield from _gathered(nodes, layers, "layer", "B", 1)
    yield from _scattered(config, nodes, layers, "layer", "W", 1)


def _scanned(
    config: RunConfig, nodes: Nodes, stack: list[Weight], place: Place, ways: Iterable[tuple[str, bool]], hoists: bool
) -> Iterator[Transfer]:
    """A stack whose layers are gathered one ahead (`model.prefetch`); of each way through: side, whether it scatters.

    Of more than a few the layer that is last on the way is gathered once more, for nothing; `hoists`: the one that is
    first once a step. Of a few, which are not scanned, XLA for CPUs may take the same gathers of one cell for one, and
    what no result needs is not gathered.
    """
    count = stack[0].layers if stack else 0
    few, full = count <= UNROLLED, config.model.remat == "full"
    if hoists and not few:
        yield from _gathered(nodes, stack, "step", "", 2)  # the first forward, and the first back
    cells: set[str] = set()
    for side, scatters in ways:
        cell = side if config.mesh.pipe > 1 else ""  # without a pipeline one does both passes
        merges = hoists and _MERGES and few
        again = few and not merges and side == "B" and not scatters  # the forward, but for the last layer's result
        needless = [weight for weight in stack if again and (full or weight.name == "down_FD")]
        if not (merges and cell in cells):
            times = count + (not few and not hoists)
            yield from _gathered(nodes, (weight for weight in stack if weight not in needless), place, side, times)
            yield from _gathered(nodes, needless, place, side, times - 1)
        cells.add(cell)
        yield from _scattered(config, nodes, stack, place, side, count if scatters else 0)


# ---------------------------------------------------------------------------------------------- before and after layers


def _beside(config: RunConfig, nodes: Nodes, hoists: bool) -> Iterator[Transfer]:
    """What runs before the MoE layers and after them."""
    model, mesh, weights = config.model, mesh_of_extras(config.mesh), weights_of(config)
    piped, axes = mesh.pipe > 1, mesh.gather_axes
    dense = [weight for weight in weights if weight.part == "dense_blocks"]
    gathers_here = mesh.sharding != "zero1"
    yield from _embedding(config, nodes, "enter", "F", 1, 0)
    if piped:  # the backward pass computes what enters again; the MTP modules read embeddings of their own
        yield from _embedding(config, nodes, "enter", "B", int(bool(dense)), 1)
        yield from _embedding(config, nodes, "leave", "B", min(model.mtp.depth, 1), min(model.mtp.depth, 1))
    else:
        yield from _embedding(config, nodes, "enter", "B", 0, 1, looked_up=False)
    if dense and gathers_here:
        again = [("B", False)] if piped else []
        yield from _scanned(config, nodes, dense, "enter", [("F", False), *again, ("B", True)], hoists)
    after = [weight.stacked() for weight in weights if weight.part in ("norm", "mtp")]
    if gathers_here:
        yield from _gathered(nodes, after, *(("step", "") if hoists else ("leave", "B")), 1)  # type: ignore[arg-type]
        yield from _scattered(config, nodes, after, "leave", "B", 1)
    yield from _head(config, nodes, axes, hoists)
    for depth in range(1, model.mtp.depth + 1):
        if model.num_moe_layers:
            yield from _exchange(config, nodes, "leave", config.data.sequence_length - depth)


def _embedding(
    config: RunConfig, nodes: Nodes, place: Place, side: str, forward: int, backward: int, looked_up: bool = True
) -> Iterator[Transfer]:
    """Columns of all tokens' rows, and their gradients back; `looked_up`: the tokens are sent, too."""
    axes = mesh_of_extras(config.mesh).gather_axes
    tokens, label, share = _rows(config) * config.data.sequence_length, nodes.label(axes), nodes.share(axes)
    devices = math.prod(nodes.lengths[axis] for axis in axes)
    sent = int(looked_up and forward + backward > 0)
    yield Transfer(label, "all-gather", "embedding", place, side, 4 * tokens * devices, sent, share)
    size = tokens * config.model.hidden_size * _itemsize(config)
    yield Transfer(label, "all-to-all", "embedding", place, side, size, forward + backward, share)


def _head(config: RunConfig, nodes: Nodes, axes: tuple[str, ...], hoists: bool) -> Iterator[Transfer]:
    """Chunks of the head's columns (`ops.loss`), for all losses and again for their gradient, which is scattered.

    XLA for CPUs may gather the first one, which stands outside of the loops over chunks, once for both.
    """
    devices = math.prod(nodes.lengths[axis] for axis in axes)
    columns, dim = config.model.vocab_size // devices, config.model.hidden_size
    own = min(max(config.model.loss_chunk // devices, 1), -(-columns // 2))
    label, share, chunks = nodes.label(axes), nodes.share(axes), -(-columns // own)
    gathered = dim * own * devices * _itemsize(config)
    for times in (chunks, chunks - (hoists and _MERGES)):
        yield Transfer(label, "all-gather", "head", "leave", "B", gathered, times, share)
    yield Transfer(label, "reduce-scatter", "head", "leave", "B", 4 * dim * own, chunks, share)


def _between_stages(config: RunConfig, nodes: Nodes) -> Iterator[Transfer]:
    ranks = config.mesh.pipe
    if ranks > 1:
        size = _rows(config) * config.data.sequence_length * config.model.hidden_size * _itemsize(config)
        share = nodes.share_of_pairs([(rank, rank + 1) for rank in range(ranks - 1)])
        for side, what in (("F", "stage outputs"), ("B", "gradients of stage outputs")):
            yield Transfer("pipe", "collective-permute", what, "stages", side, size, 1, share)


# ---------------------------------------------------------------------------------------------------------- once a step


def _once(config: RunConfig, nodes: Nodes) -> Iterator[Transfer]:
    """The mirror, the weights and gradients of ZeRO-1, what is summed over ranks and replicas, and sums of numbers."""
    mesh, weights, piped = config.mesh, weights_of(config), config.mesh.pipe > 1
    stack = [weight for weight in weights if weight.part == "moe_blocks"]
    guests = [weight for weight in weights if weight.part == "guests"]
    extras = [weight for weight in weights if weight.part not in ("moe_blocks", "guests")]
    depth = lay_out(config).depth * lay_out(config).chunks if piped else config.model.num_moe_layers
    copies = 2 if piped and config.pipeline.schedule == "dualpipe" else 1
    if copies == 2:
        yield from _mirror(config, nodes, stack, depth)
    if mesh.sharding == "zero1":
        own = [weight.stacked(copies * depth) for weight in stack] + [weight.stacked() for weight in extras]
        own = own[: len(stack)] if piped else own
        yield from _gathered(nodes, own, "step", "", 1)
        yield from _scattered(config, nodes, own, "step", "", 1)
    left = [axis for axis in BATCH_AXES if axis not in mesh.shard_axes]
    numbers = copies * depth * sum(weight.shard for weight in stack if weight.trained)
    numbers += sum(weight.shard * weight.layers for weight in extras if weight.trained)
    size = _gradient_bytes(config) * numbers
    yield Transfer(nodes.label(left), "all-reduce", "gradients", "step", "", size, 1, nodes.share(left))
    if piped:
        size = 4 * sum(weight.shard * weight.layers for weight in (*extras, *guests) if weight.trained)
        yield Transfer(nodes.label(["pipe"]), "all-reduce", "gradients", "step", "", size, 1, nodes.share(["pipe"]))
    places = len(lay_out(config).layer_of_slot) if piped else config.model.num_moe_layers
    counts = (places + config.model.mtp.depth) * config.model.moe.num_experts if config.model.num_moe_layers else 0
    norms = [("pipe", *mesh.shard_axes), mesh.shard_axes] if piped else [mesh.shard_axes]
    for axes, size in [(BATCH_AXES, 4), *((axes, 4) for axes in norms), (AXES, 4 * (4 + counts))]:
        yield Transfer(nodes.label(axes), "all-reduce", "sums", "step", "", size, 1, nodes.share(axes))


def _mirror(config: RunConfig, nodes: Nodes, stack: list[Weight], depth: int) -> Iterator[Transfer]:
    """The second copy of the parameters, and what comes back: its gradients, and what its layers report."""
    last = config.mesh.pipe - 1
    share = nodes.share_of_pairs([(rank, last - rank) for rank in range(last + 1)])
    narrow = config.mesh.sharding == "zero1"
    weights = depth * sum(weight.shard * (weight.use_bytes if narrow else 4) for weight in stack)
    gradients = 4 * depth * sum(weight.shard for weight in stack if weight.trained)
    reports = 4 * depth * (config.model.moe.num_experts + 2)
    for size in (weights, gradients, reports):
        yield Transfer("pipe", "collective-permute", "mirror", "step", "", size, 1, share)


# --------------------------------------------------------------------------------------------------------------- pieces


def _gathered(nodes: Nodes, weights: Iterable[Weight], place: Place, side: str, times: int) -> Iterator[Transfer]:
    """Weights made whole, one layer of each."""
    for axes, size in by_axes((w, w.whole * w.use_bytes) for w in weights).items():
        yield Transfer(nodes.label(axes), "all-gather", "weights", place, side, size, times, nodes.share(axes))


def _scattered(
    config: RunConfig, nodes: Nodes, weights: Iterable[Weight], place: Place, side: str, times: int
) -> Iterator[Transfer]:
    """Gradients of whole weights summed, of which each device keeps its shard."""
    item = _gradient_bytes(config)
    for axes, size in by_axes((w, w.shard * item) for w in weights).items():
        yield Transfer(nodes.label(axes), "reduce-scatter", "gradients", place, side, size, times, nodes.share(axes))


def _rows(config: RunConfig) -> int:
    """Rows of a micro-batch on a device."""
    return config.rows_of_microbatch // config.mesh.batch_shards


def _itemsize(config: RunConfig) -> int:
    """Bytes of a number as it is computed with."""
    return jnp.dtype(FLOATS[config.precision]).itemsize


def _gradient_bytes(config: RunConfig) -> int:
    """Bytes of a gradient's number as it travels."""
    return jnp.dtype(FLOATS[config.mesh.gradient_dtype]).itemsize
