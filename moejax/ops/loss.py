"""Cross entropy whose logits exist for one chunk of the vocabulary at a time.

The backward pass computes each chunk's logits again, unless one chunk holds the vocabulary: then it keeps them. T
tokens, D model dim, V vocabulary; the head is cut along V into chunks of at most `chunk` columns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.varying import zeros_varying


def cross_entropy(
    x_TD: Float[Array, "T D"], head_DV: Float[Array, "D V"], targets_T: Int[Array, "T"], chunk: int
) -> Float[Array, "T"]:
    """-log softmax(x @ head)[target] of each token, float32, in nats.

    Products are in `x`'s dtype with float32 sums; the head's gradient is float32. Memory: T x chunk.
    """
    return _chunked(x_TD, head_DV, targets_T, min(chunk, head_DV.shape[1]))


def _columns(head: Array, index: Array | int, chunk: int) -> tuple[Array, Array]:
    """Chunk `index` of the head, and the vocabulary ids of its columns.

    The last chunk of a vocabulary that does not divide starts earlier; columns met before have the id -1.
    """
    wanted = index * chunk
    start = jnp.minimum(wanted, head.shape[1] - chunk)
    ids = start + jnp.arange(chunk)
    return jax.lax.dynamic_slice(head, (0, start), (head.shape[0], chunk)), jnp.where(ids >= wanted, ids, -1)


def _logits(x: Array, w: Array, ids: Array) -> Array:
    logits = jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(x: Array, head: Array, targets: Array, chunk: int) -> Array:
    return _forward(x, head, targets, chunk)[0]


def _forward(x: Array, head: Array, targets: Array, chunk: int) -> tuple[Array, tuple]:
    def body(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, picked = carry
        w, ids = _columns(head, index, chunk)
        logits = _logits(x, w, ids)
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(-1)
        return (new_top, total, picked + jnp.where(ids == targets[:, None], logits, 0).sum(-1)), None

    if chunk == head.shape[1]:
        logits = _logits(x, head, jnp.arange(chunk))
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return log_sum - picked, (x, head, targets, log_sum, logits)
    zeros = zeros_varying(x.shape[:1], jnp.float32, x)
    chunks = jnp.arange(-(-head.shape[1] // chunk))
    (top, total, picked), _ = jax.lax.scan(body, (zeros - jnp.inf, zeros, zeros), chunks)
    log_sum = top + jnp.log(total)
    return log_sum - picked, (x, head, targets, log_sum, None)


def _backward(chunk: int, saved: tuple, dloss: Array) -> tuple[Array, Array, None]:
    x, head, targets, log_sum, kept = saved

    def gradients(w: Array, ids: Array, logits: Array) -> tuple[Array, Array]:
        """What a chunk adds to dx, and its columns of dhead; float32."""
        probs = jnp.exp(logits - log_sum[:, None])
        dlogits = ((probs - (ids == targets[:, None])) * dloss[:, None]).astype(x.dtype)
        dx = jnp.dot(dlogits, w.astype(x.dtype).T, preferred_element_type=jnp.float32)
        return dx, jnp.dot(x.T, dlogits, preferred_element_type=jnp.float32)

    if kept is not None:
        dx, dhead = gradients(head, jnp.arange(chunk), kept)
        return dx.astype(x.dtype), dhead, None

    def body(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        dx, dhead = carry
        w, ids = _columns(head, index, chunk)
        dx_part, dw = gradients(w, ids, _logits(x, w, ids))
        dx += dx_part
        start = jnp.minimum(index * chunk, head.shape[1] - chunk)
        old = jax.lax.dynamic_slice(dhead, (0, start), dw.shape)
        return (dx, jax.lax.dynamic_update_slice(dhead, old + dw, (0, start))), None

    start = zeros_varying(x.shape, jnp.float32, x), zeros_varying(head.shape, jnp.float32, x)
    (dx, dhead), _ = jax.lax.scan(body, start, jnp.arange(-(-head.shape[1] // chunk)))
    return dx.astype(x.dtype), dhead, None


_chunked.defvjp(_forward, _backward)
