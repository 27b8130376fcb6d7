"""The second copy of the parameters, which exists during the step alone.

At rest rank r holds stage r (with the placement "v" the stages r and 2D-1-r). DualPipe's chunk 1 of rank r is stage
P-1-r: the shards of the two ranks change places before the step, and its gradients go back after it and are added.

The stacks here have a leading dim of layers; that of the copies has the layers of chunk 0, then those of chunk 1.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from moejax.pipeline.schedule import Program

Stack = TypeVar("Stack")


def to_copies(program: Program, own: Stack) -> Stack:
    """The layers of all parameter copies of this rank, from what it holds at rest."""
    if program.placement != "dual":
        return own
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, _swapped(program, own))


def from_copies(program: Program, copies: Stack) -> Stack:
    """The sum of what the copies have gathered, as this rank holds it at rest; adds where `to_copies` copies."""
    if program.placement != "dual":
        return copies
    depth = jax.tree.leaves(copies)[0].shape[0] // 2
    first, second = (jax.tree.map(lambda x, part=part: x[part], copies) for part in (slice(depth), slice(depth, None)))
    return jax.tree.map(jnp.add, first, _swapped(program, second))


def _swapped(program: Program, stack: Stack) -> Stack:
    last = program.num_ranks - 1
    pairs = [(rank, last - rank) for rank in range(program.num_ranks)]
    return jax.tree.map(lambda x: lax.ppermute(x, "pipe", pairs), stack)
