"""The blocks of the MTP modules in places of the last stage's stack that have no layer of its own.

The last stage has fewer layers than others, as it has the head, so that places of its stack are empty, yet take memory.
A block of an MTP module is like them. Put there before the step it is gathered with the stage's layers, once, and its
gradient is summed up and reduced with theirs: no time or memory goes to making it whole in every micro-batch.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.config import RunConfig
from moejax.pipeline.layout import lay_out

Stack = TypeVar("Stack")


def num_guests(config: RunConfig) -> int:
    """Blocks of MTP modules that lie with the layers of the last stage: all, or none where there are too few places.

    Weights that are gathered where they are used are no guests.
    """
    if config.mesh.pipe == 1 or config.mesh.sharding != "zero1":
        return 0
    layout, depth = lay_out(config), config.model.mtp.depth
    return depth if layout.layers[-1] + depth <= layout.depth else 0


def taken_in(config: RunConfig, own: Stack, guests: Stack) -> Stack:
    """The layers that this rank holds, on the last stage's rank with the guests in the places after its own."""
    here, place = _place(config)

    def one(layers: Array, more: Array) -> Array:
        return jnp.where(here, lax.dynamic_update_slice_in_dim(layers, more, place, 0), layers)

    leaves, structure = jax.tree.flatten(own)  # of layers like the guests, but what names them may differ
    return jax.tree.unflatten(structure, map(one, leaves, jax.tree.leaves(guests)))


def let_go(config: RunConfig, gradients: Stack) -> tuple[Stack, Stack]:
    """What has come of the layers, with zeros in place of the guests; and of the guests, summed over the ranks."""
    (here, place), count = _place(config), num_guests(config)

    def rest(layers: Array) -> Array:
        return jnp.where(here, layers.at[place : place + count].set(0), layers)

    def part(layers: Array) -> Array:
        return lax.psum(jnp.where(here, layers[place : place + count], 0), "pipe")

    return jax.tree.map(rest, gradients), jax.tree.map(part, gradients)


def _place(config: RunConfig) -> tuple[Array, int]:
    """Whether this rank keeps the last stage's parameters, and the first place after its layers there."""
    layout = lay_out(config)
    last = len(layout.layers) - 1
    rank = next(rank for rank in range(layout.num_ranks) if last in layout.stages_of_rank(rank))
    before = layout.stages_of_rank(rank).index(last) * layout.depth
    return lax.axis_index("pipe") == rank, before + layout.layers[-1]
