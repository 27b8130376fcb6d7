"""Arrays that vary over the mesh axes their neighbours vary over, which `jax.shard_map` checks."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def vary_over(x: Array, axes: Iterable[str]) -> Array:
    """`x`, marked as varying over the manual mesh axes `axes` too; the values are the same."""
    missing = set(axes) - set(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x  # a set has no order of its own


def vary_like(x: Array, like: Array) -> Array:
    """`x`, marked as varying over every manual mesh axis over which `like` varies."""
    return vary_over(x, jax.typeof(like).manual_axis_type.varying)


def zeros_varying(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """Zeros to start a loop's carry that will hold values computed from `like`."""
    return vary_like(jnp.zeros(shape, dtype), like)
