"""The order of collectives between which no data flows, in a run of several processes on CPUs.

XLA for CPU runs whatever is ready, collectives too, in an order that may differ from process to process; gloo then
takes the data of one collective for those of another, or waits for ever. GPUs keep the order of the program, and CPU
devices of one process do not need one. XLA for CPU drops optimization barriers, so that the order is made of data. And
gloo's all-reduce stops now and then where many threads wait for few cores: sums are gathered instead.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = TypeVar("Tree")


def is_needed() -> bool:
    """Whether this is one of several processes on CPUs."""
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def sum_over(tree: Tree, axes: Sequence[str]) -> Tree:
    """`jax.lax.psum(tree, axes)`."""
    if not is_needed():
        return jax.lax.psum(tree, tuple(axes))
    before: Any = None

    def one(x: Array) -> Array:
        nonlocal before
        before = jax.lax.all_gather(after(before, x), tuple(axes), to="invarying").sum(0)
        return before

    return jax.tree.map(one, tree)


def after(first: Any, then: Tree) -> Tree:
    """The arrays of `then`, which wait for the floating-point ones of `first`, whose gradients wait for theirs.

    As they are where no order is needed. A number of `first` that is not finite makes the floating-point ones so too.
    """
    leaves = [leaf for leaf in jax.tree.leaves(first) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not (is_needed() and leaves):
        return then
    zero = sum(0 * leaf.reshape(-1)[0].astype(jnp.float32) for leaf in leaves)

    def later(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x + zero.astype(x.dtype)
        return x + (0 * jnp.isfinite(zero).astype(jnp.float32)).astype(x.dtype)

    return jax.tree.map(later, then)
