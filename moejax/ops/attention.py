"""Exact causal attention whose memory is linear in the length.

On GPUs it is cuDNN's (`moejax/kernels/attention.py`), where that takes the arrays, else the plain form
(`plain_attention.py`). In both the backward pass computes the probabilities again from the log-sum-exp of each query,
so both save the same.

B batch, S positions, H heads, K query-key dim, V value dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels import attention as cudnn
from moejax.ops import plain_attention
from moejax.ops.e5m6 import pack, unpack
from moejax.ops.platform import by_platform


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
    plain = functools.partial(plain_attention.forward, scale=scale, block=block)
    out, log_sum = _either(kernel, plain, q, k, v, segments)
    kept = pack(out) if fp8 else out
    kept, log_sum = checkpoint_name(kept, "attention_out"), checkpoint_name(log_sum, "attention_out")
    out = unpack(kept).astype(out.dtype) if fp8 else kept
    return out, (q, k, v, segments, kept, log_sum)


def _backward(scale: float, block: int, fp8: bool, saved: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, kept, log_sum = saved
    out = unpack(kept).astype(v.dtype) if fp8 else kept
    kernel = functools.partial(cudnn.backward, scale=scale)
    plain = functools.partial(plain_attention.backward, scale=scale, block=block)
    dq, dk, dv = _either(kernel, plain, q, k, v, segments, out, log_sum, dout)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _either(kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """One of both, of q, k, v, segments and more: the same in the two passes."""
    return by_platform(kernel, plain, *arrays) if cudnn.supports(*arrays[:4]) else plain(*arrays)
