"""AdamW on FP32 master weights, its moments stored in BF16 or FP32 (arXiv:2412.19437, sections 3.3 and 4.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from moejax.config import OptimizerConfig
from moejax.ops.linear import FLOATS


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Turns clipped gradients into steps that the caller multiplies by -learning_rate.

    Decay is decoupled and goes to matrices (`decays`); it is part of the step, so the learning rate scales it too.
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    return optax.chain(
        _store_state_as(adam, FLOATS[cfg.moments]),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
    )


def decays(params: Any) -> Any:
    """For each parameter, whether weight decay acts on it: on all but the scales of norms."""

    def is_matrix(path: tuple, _: Any) -> bool:
        return "scale" not in (getattr(key, "key", None) for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def clip(grads: Any, limit: float) -> tuple[Any, jax.Array]:
    """The gradients scaled so that their common L2 norm is at most `limit`, and the norm before that.

    Inside `jax.shard_map` the gradients are this device's shards, and the norm is that of all shards.
    """
    norm = jnp.sqrt(_sum_of_squares(grads))
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads), norm


def _sum_of_squares(tree: Any) -> jax.Array:
    by_axes: dict[frozenset, Any] = {}
    for leaf in jax.tree.leaves(tree):
        axes = frozenset(jax.typeof(leaf).manual_axis_type.varying)
        by_axes[axes] = by_axes.get(axes, 0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    # sorted: the order of a set differs between processes, and with it who is who in a sum over devices
    return sum((jax.lax.psum(part, tuple(sorted(axes))) for axes, part in by_axes.items()), jnp.zeros(()))


def _store_state_as(inner: optax.GradientTransformation, dtype: DTypeLike) -> optax.GradientTransformation:
    """`inner`, computing in FP32 with its floating-point state kept in `dtype` between steps."""

    def cast(tree: Any, to: DTypeLike) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
