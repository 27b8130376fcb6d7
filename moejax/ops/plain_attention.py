"""Exact causal attention in plain JAX, whose memory is linear in the length: queries in blocks of at most `block`.

A length of a few blocks is unrolled: each block of queries meets all keys before its end in one product, and on CPU a
few rows of the batch go at a time, so that their scores stay in the cache. Where there are more blocks, keys come in
blocks too, in loops; a running maximum and sum make the softmax exact (FlashAttention, arXiv:2205.14135). The backward
pass computes the probabilities again from the log-sum-exp of each query.

B batch, S positions, H heads, K query-key dim, V value dim; n blocks of b tokens, a query block is i, a key block j.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.platform import by_platform
from moejax.varying import zeros_varying

_NEVER = -1e30  # a score that no softmax sees; finite, so that differences of two are not NaN
_FEW = 8  # blocks of queries that are unrolled
_SCORES = 2**20  # bytes of scores at one time on CPU: about what the cache of a core holds

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    scale: float,
    block: int,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """The output, and the log-sum-exp of each query's scores."""
    arrays = q_BSHK, k_BSHK, v_BSHV, segment_ids_BS
    if q_BSHK.shape[1] > _FEW * block:
        return _forward_of_many(*arrays, scale=scale, block=block)
    return _in_cache(functools.partial(_forward_of_few, scale=scale, block=block), block, *arrays)


def backward(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    out_BSHV: Float[Array, "B S H V"],
    log_sum_BHS: Float[Array, "B H S"],
    dout_BSHV: Float[Array, "B S H V"],
    scale: float,
    block: int,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"], Float[Array, "B S H V"]]:
    """The gradients of q, k and v."""
    delta_BSH = (out_BSHV.astype(jnp.float32) * dout_BSHV.astype(jnp.float32)).sum(-1)
    arrays = q_BSHK, k_BSHK, v_BSHV, segment_ids_BS, dout_BSHV, delta_BSH, log_sum_BHS
    if q_BSHK.shape[1] > _FEW * block:
        return _backward_of_many(*arrays, scale=scale, block=block)
    return _in_cache(functools.partial(_backward_of_few, scale=scale, block=block), block, *arrays)


def _masked(scores: Array, i: Any, j: Any, segments_q: Array | None, segments_k: Array | None) -> Array:
    """Scores [B, H, b, m] of queries from position i on and keys from j on, those not to be seen replaced."""
    queries, keys = (start + jnp.arange(count) for start, count in ((i, scores.shape[2]), (j, scores.shape[3])))
    seen = queries[:, None] >= keys[None, :]
    if segments_q is not None and segments_k is not None:
        seen = seen & (segments_q[:, None, :, None] == segments_k[:, None, None, :])
    return jnp.where(seen, scores, _NEVER)


# ------------------------------------------------------------------------------------------------- a few query blocks


def _in_cache(form: Callable[..., Any], block: int, *arrays: Any) -> Any:
    """`form` of the arrays [B, ...]; on CPU of as many rows at a time as have `_SCORES` bytes of scores."""
    batch, length, heads, _ = arrays[0].shape
    fitting = max(1, _SCORES // (4 * heads * min(block, length) * length))
    rows = max(r for r in range(1, batch + 1) if batch % r == 0 and r <= fitting)

    def in_turns(*arrays: Any) -> Any:
        groups = jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), arrays)
        made = jax.lax.map(lambda group: form(*group), groups)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), made)

    return form(*arrays) if rows == batch else by_platform(form, in_turns, *arrays)


def _parts(length: int, block: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries; the keys that it meets are those before its end."""
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _heads_first(x: Array) -> Array:
    """[B, S, H, ...] -> [B, H, S, ...], or back."""
    return x.swapaxes(1, 2)


def _forward_of_few(
    q: Array, k: Array, v: Array, segments: Array | None, *, scale: float, block: int
) -> tuple[Array, Array]:
    q, k, v = (_heads_first(x) for x in (q, k, v))
    outs, log_sums = [], []
    for start, end in _parts(q.shape[2], block):
        scores = _scores_before(q, k, segments, start, end, scale)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, :end])
        outs.append((out / total).astype(v.dtype))
        log_sums.append((top + jnp.log(total))[..., 0])
    return _heads_first(jnp.concatenate(outs, 2)), jnp.concatenate(log_sums, 2)


def _backward_of_few(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    dout: Array,
    delta: Array,
    log_sum: Array,
    *,
    scale: float,
    block: int,
) -> tuple[Array, Array, Array]:
    q, k, v, dout, delta = (_heads_first(x) for x in (q, k, v, dout, delta))
    q_BHKS, dout_BHVS = q.mT, dout.mT  # products of turned factors would be slow ones on CPU
    dqs, dks, dvs = [], [], []
    for start, end in _parts(q.shape[2], block):
        queries = slice(start, end)
        scores = _scores_before(q, k, segments, start, end, scale)
        weights = jnp.exp(scores - log_sum[:, :, queries, None])
        dvs.append(_product("bhdq,bhqk->bhdk", dout_BHVS[..., queries], weights.astype(dout.dtype)))
        dweights = _product("bhqd,bhkd->bhqk", dout[:, :, queries], v[:, :, :end])
        dscores = (weights * (dweights - delta[:, :, queries, None]) * scale).astype(q.dtype)
        dqs.append(_product("bhqk,bhkd->bhqd", dscores, k[:, :, :end]))
        dks.append(_product("bhdq,bhqk->bhdk", q_BHKS[..., queries], dscores))
    sums = jnp.concatenate(dqs, 2), _sum_of_starts(dks, block).mT, _sum_of_starts(dvs, block).mT
    dq, dk, dv = (_heads_first(x.astype(like.dtype)) for x, like in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv


def _scores_before(q: Array, k: Array, segments: Array | None, start: int, end: int, scale: float) -> Array:
    """Scaled, masked scores of the queries from start to end and all keys before the end, float32 [B, H, b, end]."""
    scores = _product("bhqd,bhkd->bhqk", q[:, :, start:end], k[:, :, :end]) * scale
    return _masked(scores, start, 0, *(None if segments is None else segments[:, s:end] for s in (start, 0)))


def _sum_of_starts(parts: list[Array], block: int) -> Array:
    """The sum of arrays [B, H, d, end] of growing ends, each of which is short of zeros."""
    blocks = [
        functools.reduce(jnp.add, (part[..., start : start + block] for part in parts[start // block :]))
        for start in range(0, parts[-1].shape[3], block)
    ]
    return jnp.concatenate(blocks, 3)


# ------------------------------------------------------------------------------------------------- many of both kinds


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
    scores = _product("bhqd,bhkd->bhqk", q[i], k[j]) * scale
    places = (index * scores.shape[2] for index in (i, j))
    return _masked(scores, *places, *(None if segments is None else segments[index] for index in (i, j)))


def _forward_of_many(
    q: Array, k: Array, v: Array, segments: Array | None, *, scale: float, block: int
) -> tuple[Array, Array]:
    length = q.shape[1]
    q, k, v, segments = jax.tree.map(lambda x: _blocks(x, block), (q, k, v, segments))
    n, batch, heads, size, _ = q.shape

    def query_block(i: Any) -> tuple[Array, Array]:
        def key_block(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            scores = _scores(q, k, i, j, segments, scale)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[j])
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + part

        rows = zeros_varying((batch, heads, size), jnp.float32, q)
        start = (rows + _NEVER, rows, zeros_varying((batch, heads, size, v.shape[-1]), jnp.float32, q))
        top, total, out = jax.lax.fori_loop(0, i + 1, key_block, start)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

    out, log_sum = jax.lax.map(query_block, jnp.arange(n))
    return _whole(out, length), _whole(log_sum, length).swapaxes(1, 2)


def _backward_of_many(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    dout: Array,
    delta: Array,
    log_sum: Array,
    *,
    scale: float,
    block: int,
) -> tuple[Array, Array, Array]:
    length = q.shape[1]
    arrays = q, k, v, segments, dout, delta, log_sum.swapaxes(1, 2)
    q, k, v, segments, dout, delta, log_sum = jax.tree.map(lambda x: _blocks(x, block), arrays)

    def pair(i: Any, j: Any) -> tuple[Array, Array, Array]:
        """What query block i and key block j add to dq[i], dk[j] and dv[j], float32."""
        weights = jnp.exp(_scores(q, k, i, j, segments, scale) - log_sum[i][..., None])
        dv = _product("bhqk,bhqd->bhkd", weights.astype(dout.dtype), dout[i])
        dweights = _product("bhqd,bhkd->bhqk", dout[i], v[j])
        dscores = (weights * (dweights - delta[i][..., None]) * scale).astype(q.dtype)
        return _product("bhqk,bhkd->bhqd", dscores, k[j]), _product("bhqk,bhqd->bhkd", dscores, q[i]), dv

    def query_block(carry: tuple[Array, Array], i: Any) -> tuple[tuple[Array, Array], Array]:
        def key_block(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            dq_part, dk_part, dv_part = pair(i, j)
            return dq + dq_part, dk.at[j].add(dk_part), dv.at[j].add(dv_part)

        dq, dk, dv = jax.lax.fori_loop(0, i + 1, key_block, (zeros_varying(q[0].shape, jnp.float32, q), *carry))
        return (dk, dv), dq

    start = zeros_varying(k.shape, jnp.float32, q), zeros_varying(v.shape, jnp.float32, q)
    (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(len(q)))
    dq, dk, dv = (_whole(x.astype(like.dtype), length) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv
