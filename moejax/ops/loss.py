"""Cross entropy whose logits exist for one chunk of the vocabulary at a time.

The head lies in columns over the devices of some mesh axes. A chunk of the vocabulary is the same range of every
device's columns, gathered for its product; its gradient is reduce-scattered. So neither the head nor the logits are
whole on one device. The backward pass computes each chunk's logits again, unless one chunk holds the vocabulary: then
it keeps them.

T tokens, D model dim, V vocabulary, C columns of this device: V over the number of devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.varying import zeros_varying


def cross_entropy(
    x_TD: Float[Array, "T D"],
    head_DC: Float[Array, "D C"],
    targets_T: Int[Array, "T"],
    chunk: int,
    axes: tuple[str, ...] = (),
) -> Float[Array, "T"]:
    """-log softmax(x @ head)[target] of each token, float32, in nats.

    Products are in `x`'s dtype with float32 sums; the head's gradient is float32. Memory: T x chunk.

    Args:
        x_TD: what the head reads, of this device's tokens.
        head_DC: this device's columns of the head, float32.
        targets_T: tokens that are predicted.
        chunk: columns of the vocabulary that are gathered at one time; on several devices at most half of them are.
        axes: the mesh axes over which the columns, and the tokens, are spread; none: the head is here.
    """
    devices = lax.axis_size(axes) if axes else 1
    columns = head_DC.shape[1]
    own = min(max(chunk // devices, 1), columns if not axes else -(-columns // 2))
    return _chunked(x_TD, head_DC, targets_T, own, axes)


def _gathered(
    head: Array, index: Array | int, own: int, axes: tuple[str, ...], dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Chunk `index`: `own` columns of each device in `dtype`, and their vocabulary ids.

    The last chunk of columns that do not divide starts earlier; columns met before have the id -1.
    """
    w, here = lax.dynamic_slice_in_dim(head, _start(head, index, own), own, 1), head.shape[1]
    local = _start(head, index, own) + jnp.arange(own)
    local = jnp.where(local >= index * own, local, -1)
    if not axes:
        return w.astype(dtype), local
    ids = jnp.where(local >= 0, jnp.arange(lax.axis_size(axes))[:, None] * here + local, -1)
    return lax.all_gather(w.astype(dtype), axes, axis=1, tiled=True), ids.reshape(-1)


def _start(head: Array, index: Array | int, own: int) -> Array:
    return jnp.minimum(index * own, head.shape[1] - own)


def _logits(x: Array, w: Array, ids: Array) -> Array:
    logits = jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.where(ids >= 0, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(x: Array, head: Array, targets: Array, own: int, axes: tuple[str, ...]) -> Array:
    return _forward(x, head, targets, own, axes)[0]


def _forward(x: Array, head: Array, targets: Array, own: int, axes: tuple[str, ...]) -> tuple[Array, tuple]:
    def body(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, picked = carry
        w, ids = _gathered(head, index, own, axes, x.dtype)
        logits = _logits(x, w, ids)
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(-1)
        return (new_top, total, picked + jnp.where(ids == targets[:, None], logits, 0).sum(-1)), None

    if own == head.shape[1]:
        logits = _logits(x, head, jnp.arange(own))
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return log_sum - picked, (x, head, targets, log_sum, logits)
    zeros = zeros_varying(x.shape[:1], jnp.float32, x)
    (top, total, picked), _ = lax.scan(body, (zeros - jnp.inf, zeros, zeros), _chunks(head, own))
    log_sum = top + jnp.log(total)
    return log_sum - picked, (x, head, targets, log_sum, None)


def _chunks(head: Array, own: int) -> Array:
    return jnp.arange(-(-head.shape[1] // own))


def _backward(own: int, axes: tuple[str, ...], saved: tuple, dloss: Array) -> tuple[Array, Array, None]:
    x, head, targets, log_sum, kept = saved

    def gradients(w: Array, ids: Array, logits: Array) -> tuple[Array, Array]:
        """What a chunk adds to dx, and its columns of dhead; float32."""
        probs = jnp.exp(logits - log_sum[:, None])
        dlogits = ((probs - (ids == targets[:, None])) * dloss[:, None]).astype(x.dtype)
        dx = jnp.dot(dlogits, w.astype(x.dtype).T, preferred_element_type=jnp.float32)
        return dx, jnp.dot(x.T, dlogits, preferred_element_type=jnp.float32)

    if kept is not None:
        dx, dhead = gradients(head, jnp.arange(own), kept)
        return dx.astype(x.dtype), dhead, None

    def body(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        dx, dhead = carry
        w, ids = _gathered(head, index, own, axes, x.dtype)
        dx_part, dw = gradients(w, ids, _logits(x, w, ids))
        if axes:
            dw = lax.psum_scatter(dw, axes, scatter_dimension=1, tiled=True)
        start = _start(head, index, own)
        old = lax.dynamic_slice_in_dim(dhead, start, own, 1)
        return (dx + dx_part, lax.dynamic_update_slice_in_dim(dhead, old + dw, start, 1)), None

    start = zeros_varying(x.shape, jnp.float32, x), zeros_varying(head.shape, jnp.float32, x)
    (dx, dhead), _ = lax.scan(body, start, _chunks(head, own))
    return dx.astype(x.dtype), dhead, None


_chunked.defvjp(_forward, _backward)
