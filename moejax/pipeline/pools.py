"""What an executor does in place: conditions and loops around arrays that it keeps, and their entries."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.mesh import AXES
from moejax.varying import vary_over

Tree = TypeVar("Tree")


def when(condition: Array, function: Callable[[Tree, Array], Tree], state: Tree) -> Tree:
    """`function(state, 0)` if the condition holds, else `state`, in place.

    The 0 is not known before the program runs. Added to every index that the function uses it keeps XLA from moving
    work out of the loop, which does not depend on what the loop changes.
    """
    trips = condition.astype(jnp.int32)

    def body(carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
        return carry[0] + 1, function(carry[1], carry[0])

    return lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.zeros_like(trips), state))[1]


def loop(start: Any, end: Any, function: Callable[[Any, Tree], Tree], state: Tree) -> Tree:
    """`lax.fori_loop`, whose counter may vary over the mesh."""
    if isinstance(end, Array):
        start = jnp.zeros_like(end) + start
    elif start == end:
        return state
    return lax.fori_loop(start, end, function, state)


def get(pool: Array, *place: Array) -> Array:
    """The entry of a pool whose first dims `place` names."""
    shape = pool.shape[len(place) :]
    return lax.dynamic_slice(pool, _start(pool, place), (*(1,) * len(place), *shape)).reshape(shape)


def put(pool: Array, value: Array, *place: Array) -> Array:
    """The pool with another entry where `place` names it."""
    entry = value.astype(pool.dtype).reshape((1,) * len(place) + value.shape)
    return lax.dynamic_update_slice(pool, entry, _start(pool, place))


def _start(pool: Array, place: tuple[Array, ...]) -> list[Array | int]:
    return [*place, *(0,) * (pool.ndim - len(place))]


def layer_of(stack: Tree, index: Any) -> Tree:
    """One layer of stacked ones."""
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), stack)


def added(stack: Tree, index: Array, more: Tree) -> Tree:
    """The stack with something added to one of its layers; in one go, as the layer keeps its leading dim."""

    def one(whole: Array, part: Array) -> Array:
        start = _start(whole, (index,))
        entry = lax.dynamic_slice(whole, start, (1, *part.shape)) + part.reshape(1, *part.shape)
        return lax.dynamic_update_slice(whole, entry.astype(whole.dtype), start)

    return jax.tree.map(one, stack, more)


def zeros(tree: Any) -> Any:
    """Zeros of the same shapes, float32 for floating-point numbers."""
    inexact = jnp.issubdtype
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32 if inexact(x.dtype, jnp.inexact) else x.dtype), tree)


def zero_results(function: Callable[..., tuple[Array, Any]], *arguments: Any) -> Any:
    """Zeros like the second result of a function."""
    structure = None

    def leaves(*arguments: Any) -> list[Array]:
        nonlocal structure
        found, structure = jax.tree.flatten(function(*arguments)[1])
        return found

    shapes = jax.eval_shape(leaves, *arguments)
    return jax.tree.unflatten(structure, zeros(shapes))


def varying(tree: Tree) -> Tree:
    """The arrays, marked as varying over every mesh axis."""
    return jax.tree.map(lambda x: vary_over(x, AXES), tree)
