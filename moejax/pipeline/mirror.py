"""The second copy of the parameters, which exists during the step alone.

At rest rank r holds stage r (with the placement "v" the stages r and 2D-1-r). DualPipe's chunk 1 of rank r is stage
P-1-r: the shards of the two ranks change places before the step, and its gradients go back after it and are added.
Which chunk is copy 0 alternates from rank to rank (`table.copy_of`).

The stacks here have a leading dim of layers.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from moejax.pipeline.schedule import Program

Stack = TypeVar("Stack")


def to_copies(program: Program, own: Stack) -> list[Stack]:
    """The parameter copies of this rank, from what it holds at rest."""
    if program.placement == "line":
        return [own]
    if program.placement == "dual":
        return _alternating(own, _swapped(program, own))
    return _alternating(*_halves(own))


def from_copies(program: Program, copies: list[Stack]) -> Stack:
    """The sum of what the copies have gathered, as this rank holds it at rest; adds where `to_copies` copies."""
    if program.placement == "line":
        return copies[0]
    first, second = _alternating(*copies)
    if program.placement == "dual":
        return jax.tree.map(jnp.add, first, _swapped(program, second))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _swapped(program: Program, stack: Stack) -> Stack:
    last = program.num_ranks - 1
    pairs = [(rank, last - rank) for rank in range(program.num_ranks)]
    return jax.tree.map(lambda x: lax.ppermute(x, "pipe", pairs), stack)


def _alternating(first: Any, second: Any) -> list[Any]:
    """Both, in the other order on odd ranks."""
    odd = lax.axis_index("pipe") % 2 == 1
    pick = [lambda a, b: jnp.where(odd, b, a), lambda a, b: jnp.where(odd, a, b)]
    return [jax.tree.map(choose, first, second) for choose in pick]


def _halves(stack: Stack) -> tuple[Stack, Stack]:
    half = jax.tree.leaves(stack)[0].shape[0] // 2
    return jax.tree.map(lambda x: x[:half], stack), jax.tree.map(lambda x: x[half:], stack)
