"""Exact causal attention whose memory is linear in the length.

On GPUs it is cuDNN's (`moejax/kernels/attention.py`), where that takes the arrays. The plain form takes queries and
keys in blocks of at most `block` tokens; a running maximum and sum make the softmax exact (FlashAttention,
arXiv:2205.14135). In both the backward pass computes the probabilities again from the log-sum-exp of each query, so
both save the same. A length of one block is the plain product of matrices.

B batch, S positions, H heads, K query-key dim, V value dim; n blocks of b tokens, a query block is i, a key block j.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels import attention as cudnn
from moejax.ops.e5m6 import pack, unpack
from moejax.ops.platform import by_platform
from moejax.varying import zeros_varying

_NEVER = -1e30  # a score that no softmax sees; finite, so that differences of two are not NaN


def attention(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    scale: float,
    segment_ids_BS: Int[Array, "B S"] | None = None,
    block: int = 512,
    fp8: bool = False,
) -> Float[Array, "B S H V"]:
    """softmax(scale * q k^T) v over earlier positions (of the same segment) and the position itself.

    The softmax is float32; products take their operands in `q`'s dtype and sum in float32. With `fp8` the output is
    rounded to E5M6, as which the backward pass keeps it.
    """
    return _attention(q_BSHK, k_BSHK, v_BSHV, segment_ids_BS, scale, block, fp8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q: Array, k: Array, v: Array, segments: Array | None, scale: float, block: int, fp8: bool) -> Array:
    return _forward(q, k, v, segments, scale, block, fp8)[0]


def _forward(
    q: Array, k: Array, v: Array, segments: Array | None, scale: float, block: int, fp8: bool
) -> tuple[Array, tuple]:
    kernel = functools.partial(cudnn.forward, scale=scale)
    plain = functools.partial(_plain_forward, scale=scale, block=block)
    out, log_sum = _either(kernel, plain, q, k, v, segments)
    kept = pack(out) if fp8 else out
    kept, log_sum = checkpoint_name(kept, "attention_out"), checkpoint_name(log_sum, "attention_out")
    out = unpack(kept).astype(out.dtype) if fp8 else kept
    return out, (q, k, v, segments, kept, log_sum)


def _backward(scale: float, block: int, fp8: bool, saved: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, kept, log_sum = saved
    out = unpack(kept).astype(v.dtype) if fp8 else kept
    kernel = functools.partial(cudnn.backward, scale=scale)
    plain = functools.partial(_plain_backward, scale=scale, block=block)
    dq, dk, dv = _either(kernel, plain, q, k, v, segments, out, log_sum, dout)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _either(kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """One of both, of q, k, v, segments and more: the same in the two passes."""
    return by_platform(kernel, plain, *arrays) if cudnn.supports(*arrays[:4]) else plain(*arrays)


# ----------------------------------------------------------------------------------------------------- the plain form


def _blocks(x: Array, block: int) -> Array:
    """[B, S, H, ...] -> [n, B, H, b, ...], or [B, S] -> [n, B, b]; zeros beyond the end."""
    batch, length, *rest = x.shape
    size = min(block, length)
    n = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - length), *[(0, 0)] * len(rest)))
    x = x.reshape(batch, n, size, *rest).swapaxes(0, 1)
    return x.swapaxes(2, 3) if rest else x


def _whole(x: Array, length: int) -> Array:
    """[n, B, H, b, ...] -> [B, S, H, ...]."""
    n, batch, heads, size, *rest = x.shape
    return x.swapaxes(2, 3).swapaxes(0, 1).reshape(batch, n * size, heads, *rest)[:, :length]


def _scores(q: Array, k: Array, i: Any, j: Any, segments: Array | None, scale: float) -> Array:
    """Scaled, masked scores of query block i and key block j, float32 [B, H, b, b]."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    place = jnp.arange(q.shape[2])
    seen = (i * q.shape[2] + place)[:, None] >= (j * q.shape[2] + place)[None, :]
    if segments is not None:
        seen = seen & (segments[i][:, None, :, None] == segments[j][:, None, None, :])
    return jnp.where(seen, scores, _NEVER)


def _plain_forward(
    q: Array, k: Array, v: Array, segments: Array | None, scale: float, block: int
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """The output, and the log-sum-exp of each query's scores."""
    length = q.shape[1]
    q, k, v, segments = jax.tree.map(lambda x: _blocks(x, block), (q, k, v, segments))
    n, batch, heads, size, _ = q.shape

    def query_block(i: Any) -> tuple[Array, Array]:
        def key_block(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            scores = _scores(q[i], k[j], i, j, segments, scale)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + part

        rows = zeros_varying((batch, heads, size), jnp.float32, q)
        start = (rows + _NEVER, rows, zeros_varying((batch, heads, size, v.shape[-1]), jnp.float32, q))
        top, total, out = key_block(0, start) if n == 1 else jax.lax.fori_loop(0, i + 1, key_block, start)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

    if n == 1:
        out, log_sum = jax.tree.map(lambda x: x[None], query_block(0))
    else:
        out, log_sum = jax.lax.map(query_block, jnp.arange(n))
    return _whole(out, length), _whole(log_sum, length).swapaxes(1, 2)


def _plain_backward(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    out: Array,
    log_sum: Array,
    dout: Array,
    scale: float,
    block: int,
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v."""
    length = q.shape[1]
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
    arrays = q, k, v, segments, dout, delta, log_sum.swapaxes(1, 2)
    q, k, v, segments, dout, delta, log_sum = jax.tree.map(lambda x: _blocks(x, block), arrays)
    n = len(q)

    def pair(i: Any, j: Any) -> tuple[Array, Array, Array]:
        """What query block i and key block j add to dq[i], dk[j] and dv[j], float32."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        weights = jnp.exp(_scores(q[i], k[j], i, j, segments, scale) - log_sum[i][..., None])
        dv = product("bhqk,bhqd->bhkd", weights.astype(dout.dtype), dout[i])
        dweights = product("bhqd,bhkd->bhqk", dout[i], v[j])
        dscores = (weights * (dweights - delta[i][..., None]) * scale).astype(q.dtype)
        return product("bhqk,bhkd->bhqd", dscores, k[j]), product("bhqk,bhqd->bhkd", dscores, q[i]), dv

    if n == 1:
        dq, dk, dv = (x[None] for x in pair(0, 0))
    else:

        def query_block(carry: tuple[Array, Array], i: Any) -> tuple[tuple[Array, Array], Array]:
            def key_block(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dk, dv = carry
                dq_part, dk_part, dv_part = pair(i, j)
                return dq + dq_part, dk.at[j].add(dk_part), dv.at[j].add(dv_part)

            dq, dk, dv = jax.lax.fori_loop(0, i + 1, key_block, (zeros_varying(q[0].shape, jnp.float32, q), *carry))
            return (dk, dv), dq

        start = zeros_varying(k.shape, jnp.float32, q), zeros_varying(v.shape, jnp.float32, q)
        (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(n))
    dq, dk, dv = (_whole(x.astype(like.dtype), length) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv
