"""A loaded model whose heavy experts lie several times: `with_placement(moejax.load(run), placement)`.

It gives the answers of the model as it was: a token's expert is the same in every replica, and no token is dropped.
Over a mesh with `expert` above 1 each device holds equally many places, of GPUs as `rebalance_experts` counts them.
"""

import dataclasses

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.model.moe import MoE, Replicas
from moejax.ops.placement import Placement, laid_out
from moejax.serve.load import Model


def with_placement(model: Model, placement: Placement) -> Model:
    """The model with its experts in the places of `placement`; the arrays that do not change are shared.

    Args:
        model: of one process.
        placement: with a row for each MoE layer, those of MTP modules last, as `moejax placement` makes it.

    Raises:
        ConfigError: it is of another model, or its places are no multiple of the devices of `expert`.
    """
    cfg, (layers, places) = model.config, placement.logical.shape
    stacks = [cfg.num_moe_layers, cfg.mtp.depth if cfg.num_moe_layers else 0]
    shape = sum(stacks), cfg.moe.num_experts
    if placement.count.shape != shape:
        raise ConfigError("placement", placement.count.shape, f"one of {shape[0]} layers with {shape[1]} experts")
    devices = model.mesh.shape["expert"]
    if places % devices:
        raise ConfigError("placement", places, f"a number of places that mesh.expert={devices} divides")
    module = jax.tree.map(lambda x: x, model.module)  # its own objects, the same arrays
    if module.moe_blocks is not None:
        _place(module.moe_blocks.ffn, placement, slice(0, stacks[0]))
    if module.mtp is not None and stacks[1]:
        _place(module.mtp.block.ffn, placement, slice(stacks[0], layers))
    return dataclasses.replace(model, module=module)


def _place(experts: object, placement: Placement, rows: slice) -> None:
    """Puts the experts of a stack of layers into their places."""
    assert isinstance(experts, MoE)
    logical = placement.logical[rows]
    for name in ("gate_up_EDG", "down_EFD"):
        variable = getattr(experts, name)
        weights = variable.get_value()
        placed = np.stack([laid_out(layer, own) for layer, own in zip(np.asarray(weights), logical, strict=True)])
        setattr(experts, name, variable.replace(jax.device_put(placed, weights.sharding)))
    tables = (placement.physical[rows].astype(np.int32), placement.count[rows].astype(np.int32))
    everywhere = jax.sharding.NamedSharding(weights.sharding.mesh, jax.sharding.PartitionSpec())
    experts.places_Em, experts.count_E = (Replicas(jax.device_put(table, everywhere)) for table in tables)
