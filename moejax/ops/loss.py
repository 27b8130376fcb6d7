"""Cross entropy whose logits exist for one chunk of the vocabulary at a time.

The head lies in columns over the devices of some mesh axes. A chunk of the vocabulary is the same range of every
device's columns, gathered for its product while the chunk before it is computed with; its gradient is reduce-scattered
while the next is. So neither the head nor the logits are whole on one device, and both ways are hidden. The backward
pass computes each chunk's logits again, unless it is to keep them, or one chunk holds the vocabulary.

T tokens, D model dim, V vocabulary, C columns of this device: V over the number of devices; N chunks, W columns of one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.varying import zeros_varying

State = TypeVar("State")


def cross_entropy(
    x_TD: Float[Array, "T D"],
    head_DC: Float[Array, "D C"],
    targets_T: Int[Array, "T"],
    chunk: int,
    axes: tuple[str, ...] = (),
    keep: bool = False,
) -> Float[Array, "T"]:
    """-log softmax(x @ head)[target] of each token, float32, in nats.

    Products are in `x`'s dtype with float32 sums; the head's gradient is float32. Memory: T x chunk, with `keep` T x V.

    Args:
        x_TD: what the head reads, of this device's tokens.
        head_DC: this device's columns of the head, float32.
        targets_T: tokens that are predicted.
        chunk: columns of the vocabulary that are gathered at one time; on several devices at most half of them are.
        axes: the mesh axes over which the columns, and the tokens, are spread; none: the head is here.
        keep: whether the backward pass reads the logits of the forward, rather than computing them again.
    """
    devices = lax.axis_size(axes) if axes else 1
    columns = head_DC.shape[1]
    own = min(max(chunk // devices, 1), columns if not axes else -(-columns // 2))
    return _chunked(x_TD, head_DC, targets_T, own, axes, keep)


@dataclass(frozen=True)
class _Chunks:
    """The vocabulary in chunks of `own` columns of each device.

    The last chunk of columns that do not divide starts earlier; columns met before have the id -1. No chunk is gathered
    before `after` is there, of this micro-batch: XLA may neither gather once for all nor once for both passes.
    """

    head: Array
    own: int
    axes: tuple[str, ...]
    dtype: jnp.dtype
    after: Array

    @property
    def count(self) -> int:
        return -(-self.head.shape[1] // self.own)

    def start(self, index: Array | int) -> Array:
        """The first of this device's columns."""
        return jnp.minimum(index * self.own, self.head.shape[1] - self.own)

    def gathered(self, index: Array | int) -> Array:
        """The columns of all devices, in the dtype of the compute."""
        w = lax.dynamic_slice_in_dim(self.head, self.start(index), self.own, 1).astype(self.dtype)
        if not self.axes:
            return w
        return lax.all_gather(lax.optimization_barrier((w, self.after))[0], self.axes, axis=1, tiled=True)

    def ids(self, index: Array | int) -> Array:
        """Their vocabulary ids."""
        local, here = self.start(index) + jnp.arange(self.own), self.head.shape[1]
        local = jnp.where(local >= index * self.own, local, -1)
        if not self.axes:
            return local
        return jnp.where(local >= 0, jnp.arange(lax.axis_size(self.axes))[:, None] * here + local, -1).reshape(-1)

    def added(self, dhead: Array, index: Array | int, dw: Array) -> Array:
        """The head's gradient with that of a chunk, summed over the devices."""
        if self.axes:
            dw = lax.psum_scatter(dw, self.axes, scatter_dimension=1, tiled=True)
        start = self.start(index)
        old = lax.dynamic_slice_in_dim(dhead, start, self.own, 1)
        return lax.dynamic_update_slice_in_dim(dhead, old + dw, start, 1)

    def walk(self, use: Callable[[State, Array | int, Array], State], state: State, first: int = 0) -> State:
        """`use(state, index, columns)` of each chunk from `first` on, the next being gathered meanwhile."""
        last = self.count - 1
        if not self.axes:
            body = lambda state, index: (use(state, index, self.gathered(index)), None)  # noqa: E731
            return lax.scan(body, state, jnp.arange(first, last + 1))[0]

        def ahead(carry: tuple[State, Array], index: Array) -> tuple[tuple[State, Array], None]:
            following = self.gathered(index + 1)
            return (use(carry[0], index, carry[1]), following), None

        (state, w), _ = lax.scan(ahead, (state, self.gathered(first)), jnp.arange(first, last))
        return use(state, last, w)


def _logits(x: Array, w: Array, ids: Array) -> Array:
    logits = jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked(x: Array, head: Array, targets: Array, own: int, axes: tuple[str, ...], keep: bool) -> Array:
    return _forward(x, head, targets, own, axes, False)[0]


def _forward(x: Array, head: Array, targets: Array, own: int, axes: tuple[str, ...], keep: bool) -> tuple[Array, tuple]:
    if own == head.shape[1]:
        logits = _logits(x, head, jnp.arange(own))
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return log_sum - picked, (x, head, targets, log_sum, logits[None])
    chunks = _Chunks(head, own, axes, x.dtype, after=x)

    def add(sums: tuple, index: Array | int, w: Array) -> tuple:
        top, total, picked, kept = sums
        ids = chunks.ids(index)
        logits = _logits(x, w, ids)
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(-1)
        picked = picked + jnp.where(ids == targets[:, None], logits, 0).sum(-1)
        kept = None if kept is None else lax.dynamic_update_index_in_dim(kept, logits, index, 0)
        return new_top, total, picked, kept

    zeros, width = zeros_varying(x.shape[:1], jnp.float32, x), own * (lax.axis_size(axes) if axes else 1)
    kept = zeros_varying((chunks.count, len(x), width), jnp.float32, x) if keep else None
    top, total, picked, kept = chunks.walk(add, (zeros - jnp.inf, zeros, zeros, kept))
    log_sum = top + jnp.log(total)
    return log_sum - picked, (x, head, targets, log_sum, kept)


def _backward(own: int, axes: tuple[str, ...], keep: bool, saved: tuple, dloss: Array) -> tuple[Array, Array, None]:
    x, head, targets, log_sum, kept = saved
    chunks = _Chunks(head, own, axes, x.dtype, after=targets)

    def gradients(index: Array | int, w: Array) -> tuple[Array, Array]:
        """What a chunk adds to dx, and the gradient of its columns; float32."""
        ids = chunks.ids(index)
        logits = _logits(x, w, ids) if kept is None else lax.dynamic_index_in_dim(kept, index, keepdims=False)
        probs = jnp.exp(logits - log_sum[:, None])
        dlogits = ((probs - (ids == targets[:, None])) * dloss[:, None]).astype(x.dtype)
        dx = jnp.dot(dlogits, w.astype(x.dtype).T, preferred_element_type=jnp.float32)
        return dx, jnp.dot(x.T, dlogits, preferred_element_type=jnp.float32)

    if own == head.shape[1]:
        dx, dhead = gradients(0, head)
        return dx.astype(x.dtype), dhead, None
    dhead = zeros_varying(head.shape, jnp.float32, x)
    if not axes:

        def at_once(state: tuple[Array, Array], index: Array | int, w: Array) -> tuple[Array, Array]:
            dx, dw = gradients(index, w)
            return state[0] + dx, chunks.added(state[1], index, dw)

        dx, dhead = chunks.walk(at_once, (zeros_varying(x.shape, jnp.float32, x), dhead))
        return dx.astype(x.dtype), dhead, None

    def later(state: tuple[Array, Array, Array], index: Array | int, w: Array) -> tuple[Array, Array, Array]:
        dx, dhead, before = state
        dhead = chunks.added(dhead, index - 1, before)
        more, dw = gradients(index, w)
        return dx + more, dhead, dw

    dx, dw = gradients(0, chunks.gathered(0))
    dx, dhead, dw = chunks.walk(later, (dx, dhead, dw), first=1)
    return dx.astype(x.dtype), chunks.added(dhead, chunks.count - 1, dw), None


_chunked.defvjp(_forward, _backward)
