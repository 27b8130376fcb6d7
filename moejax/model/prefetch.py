"""A stack of layers whose weights lie in shards: each layer's are gathered while the layer before it computes.

Autodiff of a scan would keep what its carry holds, and so every layer's whole weights. Here the forward pass keeps
what a layer's own backward pass needs except its weights, and the backward pass gathers them again, from the last
layer to the first, and reduce-scatters each layer's gradient.

A scan gathers the layer that is last on its way once more, for nothing, as all its rounds are alike. A few layers
stand one after the other instead.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.config import MeshConfig
from moejax.model.shards import gathered, scattered, widened

Stats = TypeVar("Stats")

UNROLLED = 4  # layers that are not scanned: one gather more would be a fifth of all, or more


def is_scanned(shards: Any) -> bool:
    """Whether a stack has more layers than those that stand one after the other."""
    return _count(shards) > UNROLLED


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scan_gathered(
    layer: Callable[..., tuple[Array, Stats]], cfg: MeshConfig, dtype: DTypeLike, shards: Any, x: Array, fixed: tuple
) -> tuple[Array, Stats]:
    """`x` after every layer, and the layers' stats, stacked.

    Args:
        layer: `(weights, x, *fixed) -> (x, stats)`, a pure function that closes over no array.
        cfg: how the weights are gathered.
        dtype: of the compute, in which weights travel.
        shards: the layers' parameters, stacked along a first dim, in shards over the other dims.
        x: what the first layer reads.
        fixed: integer arrays that every layer reads.
    """
    return _forward(layer, cfg, dtype, shards, x, fixed)[0]


def _forward(
    layer: Callable, cfg: MeshConfig, dtype: DTypeLike, shards: Any, x: Array, fixed: tuple
) -> tuple[tuple[Array, Any], tuple]:
    weights_of, last = _weights(shards, cfg, dtype)

    def one(x: Array, weights: Any) -> tuple[Array, Any, Any]:
        return _pulled(layer, widened(weights), x, fixed)

    if not is_scanned(shards):
        stats, pulls = [], []
        weights = weights_of(0, x)
        for index in range(last + 1):
            following = weights_of(index + 1, x) if index < last else None
            x, own, pull = one(x, weights)
            stats.append(own)
            pulls.append(pull)
            weights = following
        return (x, jax.tree.map(lambda *s: jnp.stack(s), *stats)), (shards, fixed, pulls)

    def body(carry: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], tuple[Any, Any]]:
        x, weights = carry
        following = weights_of(jnp.minimum(index + 1, last))
        y, stats, pull = one(x, weights)
        return (y, following), (stats, pull)

    (x, _), (stats, pulls) = lax.scan(body, (x, weights_of(0)), jnp.arange(last + 1))
    return (x, stats), (shards, fixed, pulls)


def _backward(
    layer: Callable, cfg: MeshConfig, dtype: DTypeLike, saved: tuple, cotangent: tuple[Array, Any]
) -> tuple[Any, Array, None]:
    shards, fixed, pulls = saved
    dx, dstats = cotangent
    weights_of, last = _weights(shards, cfg, dtype)
    dstats = _inexact(dstats)

    if not is_scanned(shards):
        dshards: list[Any] = [None] * (last + 1)
        weights = weights_of(last, dx)
        for index in reversed(range(last + 1)):
            following = weights_of(index - 1, dx) if index else None
            dweights, dx = pulls[index](widened(weights), fixed, (dx, [d[index] for d in dstats]))
            dshards[index] = scattered(dweights, cfg)
            weights = following
        return jax.tree.map(lambda *d: jnp.stack(d), *dshards), dx, None

    def body(carry: tuple[Array, Any], this: tuple[Array, Any, Any]) -> tuple[tuple[Array, Any], Any]:
        dx, weights = carry
        index, pull, dstats = this
        following = weights_of(jnp.maximum(index - 1, 0))
        dweights, dx = pull(widened(weights), fixed, (dx, dstats))
        return (dx, following), scattered(dweights, cfg)

    inputs = (jnp.arange(last + 1), pulls, dstats)
    (dx, _), dshards = lax.scan(body, (dx, weights_of(last)), inputs, reverse=True)
    return dshards, dx, None


scan_gathered.defvjp(_forward, _backward)


def _weights(shards: Any, cfg: MeshConfig, dtype: DTypeLike) -> tuple[Callable[..., Any], int]:
    """The whole weights of layer number `index`, not before `after` is there; and the number of the last layer."""

    def of(index: Any, after: Array | None = None) -> Any:
        own = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), shards)
        own = own if after is None else lax.optimization_barrier((own, after))[0]
        return gathered(own, cfg, dtype)

    return of, _count(shards) - 1


def _count(shards: Any) -> int:
    return jax.tree.leaves(shards)[0].shape[0]


def _inexact(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _pulled(layer: Callable, weights: Any, x: Array, fixed: tuple) -> tuple[Array, Any, Callable]:
    """A layer's results, and `pull(weights, fixed, (dx, dstats)) -> (dweights, dx)`, a pytree without weights.

    `dstats`: cotangents of the stats that are floating-point numbers.
    """

    def differentiable(weights: Any, x: Array) -> tuple[tuple[Array, list[Array]], Any]:
        y, stats = layer(weights, x, *fixed)
        return (y, _inexact(stats)), stats

    (y, _), pull, stats = jax.vjp(differentiable, weights, x, has_aux=True)
    leaves, structure = jax.tree.flatten(pull)
    given = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves((weights, fixed)))}
    places = [given.get(id(leaf)) for leaf in leaves]
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return y, stats, jax.tree_util.Partial(functools.partial(_pull, structure, tuple(places)), kept)


def _pull(structure: Any, places: tuple[int | None, ...], kept: list[Any], weights: Any, fixed: Any, d: Any) -> Any:
    """Calls the pullback whose leaves are `kept`, and where a place is given that leaf of (weights, fixed)."""
    given, rest = jax.tree.leaves((weights, fixed)), iter(kept)
    leaves = [next(rest) if place is None else given[place] for place in places]
    return jax.tree.unflatten(structure, leaves)(d)
