"""Where the MoE layers of a model lie on the stages of a pipeline.

The embedding and the leading dense layers always run with the first stage; the final norm, the head, the loss and the
MTP modules with the last. The MoE layers are spread so that the stage that takes longest takes as little as it can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moejax.config import ConfigError, RunConfig
from moejax.model.count import forward_flops_per_token


@dataclass(frozen=True)
class Layout:
    """Where the layers of a model lie on the stages of a pipeline."""

    num_ranks: int
    chunks: int  # stages of which a rank keeps the parameters: 2 with the placement "v", else 1
    layers: tuple[int, ...]  # MoE layers of each stage, in the order of the stages; some may have none

    @property
    def depth(self) -> int:
        """The most layers of a stage: places that each stage has in the stacked parameters."""
        return max(self.layers)

    @property
    def first_layer(self) -> tuple[int, ...]:
        """The index of each stage's first MoE layer."""
        return tuple(accumulate(self.layers[:-1], initial=0))

    @property
    def layer_of_slot(self) -> tuple[int, ...]:
        """The layer in each place of the stacked parameters, which are cut into equal parts over the ranks.

        -1: the place stays empty. A stage's empty places come after its layers.
        """
        stages = [stage for rank in range(self.num_ranks) for stage in self.stages_of_rank(rank)]
        places = [(stage, place) for stage in stages for place in range(self.depth)]
        first = self.first_layer
        return tuple(first[stage] + place if place < self.layers[stage] else -1 for stage, place in places)

    @property
    def slot_of_layer(self) -> tuple[int, ...]:
        """The place of each layer in the stacked parameters."""
        slots = self.layer_of_slot
        return tuple(slots.index(layer) for layer in range(sum(self.layers)))

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """The stages of which a rank keeps the parameters, in the order in which they are stacked."""
        return (rank, len(self.layers) - 1 - rank)[: self.chunks]


def lay_out(config: RunConfig) -> Layout:
    """The layout that a run asks for (`pipeline.layers`), or the balanced one; `mesh.pipe` is resolved.

    Raises:
        ConfigError: there are more stages than layers, or `pipeline.layers` does not fit the model and the stages.
    """
    chunks = 2 if config.pipeline.schedule == "dualpipe_v" else 1
    ranks, given, count = config.mesh.pipe, config.pipeline.layers, config.model.num_moe_layers
    stages = ranks * chunks
    _require_layers(config, stages)
    if given is None:
        each = forward_flops_per_token(config.model, config.data.sequence_length).moe_layer
        return Layout(ranks, chunks, balanced(_costs_beside(config, stages), each, count))
    if len(given) != stages:
        wanted = f"{stages} numbers, one for each stage of mesh.pipe={ranks} with {config.pipeline.schedule}"
        raise ConfigError("pipeline.layers", given, wanted)
    if sum(given) != count:
        raise ConfigError(
            "pipeline.layers", given, f"numbers whose sum is the model's {count} MoE layers, not {sum(given)}"
        )
    return Layout(ranks, chunks, given)


def costs(config: RunConfig, layout: Layout) -> tuple[int, ...]:
    """FLOPs per token of each stage's forward pass; looking up an embedding costs nothing."""
    each = forward_flops_per_token(config.model, config.data.sequence_length).moe_layer
    beside = _costs_beside(config, len(layout.layers))
    return tuple(cost + each * layers for cost, layers in zip(beside, layout.layers, strict=True))


def balanced(beside: Sequence[int], each: int, count: int) -> tuple[int, ...]:
    """How many of `count` equal layers each stage has, so that the largest cost of a stage is as small as it can be.

    Among such spreads the one whose largest number is smallest, as every stage has room for so many layers in memory;
    among those the most even one: with the least sum of squared costs.

    Layer after layer goes to the stage that costs least. That gives the most even spread of all, also where the layers
    of a stage are limited, since a stage's next layer never costs less than its last: the limit is the smallest with
    which no stage costs more.

    Args:
        beside: what each stage costs without the layers.
        each: the cost of a layer, above 0.
        count: layers.
    """
    least = _filled(beside, each, count, count)
    largest = max(cost + each * layers for cost, layers in zip(beside, least, strict=True))
    room = [(largest - cost) // each for cost in beside]
    depth = next(depth for depth in range(count + 1) if sum(min(depth, layers) for layers in room) >= count)
    return _filled(beside, each, count, depth)


def _filled(beside: Sequence[int], each: int, count: int, depth: int) -> tuple[int, ...]:
    """`count` layers, each given to the stage that costs least of those with fewer than `depth`.

    Of several to the latest: 1F1B keeps fewer micro-batches there, and DualPipe's ranks, which run stage s and the s-th
    from the end, do not get a layer more for both before all have one for either.
    """
    costs, layers = list(beside), [0] * len(beside)
    for _ in range(count):
        open_ = [stage for stage in range(len(costs)) if layers[stage] < depth]
        best = min(open_, key=lambda stage: (costs[stage], -stage))
        costs[best] += each
        layers[best] += 1
    return tuple(layers)


def _costs_beside(config: RunConfig, stages: int) -> list[int]:
    """FLOPs per token of what runs with each stage besides its MoE layers."""
    model = config.model
    flops = forward_flops_per_token(model, config.data.sequence_length)
    costs = [0] * stages
    costs[0] += model.num_dense_layers * flops.dense_layer
    costs[-1] += flops.head + model.mtp.depth * flops.mtp
    return costs


def _require_layers(config: RunConfig, stages: int) -> None:
    """Raises ConfigError where there is nothing to spread, or more stages than layers of any kind."""
    model, pipe = config.model, config.mesh.pipe
    layers = model.num_layers + model.mtp.depth
    if model.num_moe_layers == 0:
        raise ConfigError("mesh.pipe", pipe, f"1, as none of the {model.num_layers} layers is an MoE layer to spread")
    if stages > layers:
        most = layers * pipe // stages
        most -= most % 2 if config.pipeline.schedule == "dualpipe" else 0
        wanted = f"at most {max(most, 1)}: {stages} stages are more than the {layers} layers, MTP modules among them"
        raise ConfigError("mesh.pipe", pipe, wanted)
