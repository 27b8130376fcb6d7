"""Causal attention by cuDNN on NVIDIA Hopper, forward and backward, for `moejax.ops.attention`.

XLA passes custom calls of these names on to cuDNN's fused attention, which recomputes the probabilities from the
log-sum-exp of each query, as the plain form does. `jax.nn.dot_product_attention(implementation="cudnn")` makes the same
calls, but it takes equal head dims only, cannot be traced without a GPU, and keeps the log-sums to itself, so that a
policy of `jax.checkpoint` cannot save them. Here they are made with `jax.ffi`; a test compares them with JAX's own.

Latent attention has dims of 192 and 128, for which cuDNN has kernels since 9.11, and JAX for CUDA 13 takes none before
9.12; other values narrower than the keys are padded with zeros. The backward pass adds up dq in no fixed order, unless
XLA runs with --xla_gpu_deterministic_ops.

Documents in one row are kept apart by a bias of the scores, 0 or so low that the softmax sees nothing, bfloat16
[B, 1, S, S]: exact, but no block of the scores is left out. cuDNN's packed layout would leave them out; through XLA it
wants a bound on the documents of a row, and equal head dims.

Has not run on a GPU yet.

B batch, S positions, H heads, K query-key dim, V value dim.
"""

import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.launch import costing
from moejax.varying import vary_over

UNEQUAL_DIMS = ((192, 128),)  # of keys and values, that cuDNN takes as they are
LARGEST_DIM = 256
LONGEST_MASKED = 8192  # positions; a bias of twice as many takes four times the memory, 128 MiB a row here
_NEVER = -(2.0**41)  # a score that no softmax sees, in bfloat16

# which dims the products of the forward and the backward pass contract, and which are batch dims: left, right operand
_BHSS, _BSHX = (0, 1), (0, 2)
_FORWARD = {"bmm1": ((3, _BSHX), (3, _BSHX)), "bmm2": ((3, _BHSS), (1, _BSHX))}
_BACKWARD = {
    "bmm1_grad_gemm1": ((2, _BHSS), (1, _BSHX)),
    "bmm1_grad_gemm2": ((3, _BHSS), (1, _BSHX)),
    "bmm2_grad_gemm1": ((2, _BHSS), (1, _BSHX)),
    "bmm2_grad_gemm2": ((3, _BSHX), (3, _BSHX)),
}


def supports(q_BSHK: Array, k_BSHK: Array, v_BSHV: Array, segment_ids_BS: Array | None = None) -> bool:
    """Whether cuDNN takes such arrays on Hopper; told from shapes and dtypes alone."""
    (_, length, _, qk), v = q_BSHK.shape, v_BSHV.shape[-1]
    dtypes = all(x.dtype == jnp.bfloat16 for x in (q_BSHK, k_BSHK, v_BSHV))
    lengths = length > 1 and (segment_ids_BS is None or length <= LONGEST_MASKED)
    return dtypes and lengths and v <= qk <= LARGEST_DIM and qk % 8 == 0


def forward(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    scale: float,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """softmax(scale * q k^T) v over earlier positions (of the same segment) and the position itself.

    The arrays are such that `supports` says yes.

    Returns:
        out: bfloat16.
        log_sum: the log-sum-exp of each query's scores, float32.
    """
    (_, length, _, qk), v = q_BSHK.shape, v_BSHV.shape[-1]
    operands = [*_padded(segment_ids_BS, qk, q_BSHK, k_BSHK, v_BSHV), *_bias(segment_ids_BS)]
    batch, padded, heads, width = operands[2].shape
    shapes = (batch, heads, padded, width), (batch, heads, padded)
    name = "Softmax" if segment_ids_BS is None else "ScaleBiasSoftmax"
    with costing(batch * heads * length**2 * (qk + v)):
        out, log_sum = _call(name, operands, shapes, _config(operands[0], scale, _FORWARD))
    return out[:, :length, :, :v], log_sum[:, :, :length]


def backward(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    out_BSHV: Float[Array, "B S H V"],
    log_sum_BHS: Float[Array, "B H S"],
    dout_BSHV: Float[Array, "B S H V"],
    scale: float,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"], Float[Array, "B S H V"]]:
    """The gradients of q, k and v, from those and what `forward` made of them.

    A position added at the end has a log-sum of 0 and scores of 0 or far below: its probabilities are 1 or 0, and its
    gradient is 0.
    """
    (_, length, _, qk), v = q_BSHK.shape, v_BSHV.shape[-1]
    q, k, values, out, dout = _padded(segment_ids_BS, qk, q_BSHK, k_BSHK, v_BSHV, out_BSHV, dout_BSHV)
    log_sum = jnp.pad(log_sum_BHS, ((0, 0), (0, 0), (0, q.shape[1] - length)))
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, values)]
    operands = (q, k, values, log_sum, dout, *_bias(segment_ids_BS), out)
    name = "SoftmaxBackward" if segment_ids_BS is None else "ScaleBiasSoftmaxBackward"
    with costing(q.shape[0] * q.shape[2] * length**2 * (3 * qk + 2 * v)):
        dq, dk, dv = _call(name, operands, shapes, _config(q, scale, _BACKWARD))
    return dq[:, :length], dk[:, :length], dv[:, :length, :, :v]


def _padded(segment_ids_BS: Array | None, qk: int, *arrays_BSHX: Array) -> list[Array]:
    """With zeros: to an even length where there is a bias, and values to the width of keys where cuDNN wants that."""
    odd = 0 if segment_ids_BS is None else segment_ids_BS.shape[1] % 2
    widest = 0 if (qk, arrays_BSHX[2].shape[-1]) in UNEQUAL_DIMS else qk
    return [jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, max(widest - x.shape[-1], 0)))) for x in arrays_BSHX]


def _bias(segment_ids_BS: Array | None) -> list[Float[Array, "B 1 S S"]]:
    """0 where two positions are of one segment; S is even. Nothing, where there are no segments."""
    if segment_ids_BS is None:
        return []
    ids_BS = jnp.pad(segment_ids_BS, ((0, 0), (0, segment_ids_BS.shape[1] % 2)))
    same = ids_BS[:, None, :, None] == ids_BS[:, None, None, :]
    return [jnp.where(same, 0.0, _NEVER).astype(jnp.bfloat16)]


def _call(name: str, operands: Sequence[Array], shapes: Sequence[tuple[int, ...]], config: Mapping) -> list[Array]:
    """Results of cuDNN's call `name`: of four dims [B, H, S, X], bfloat16, returned as [B, S, H, X]; else float32."""
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    whole = [len(shape) == 4 for shape in shapes]
    results = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if w else jnp.float32) for s, w in zip(shapes, whole, strict=True)]
    call = jax.ffi.ffi_call(
        f"__cudnn$fmha{name}",
        [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],  # the last is work space, which XLA sizes
        output_layouts=[(0, 2, 1, 3) if w else None for w in whole] + [None],  # they lie as the operands do
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
    )
    found = call(*(vary_over(x, axes) for x in operands))
    return [vary_over(x.swapaxes(1, 2) if w else x, axes) for x, w in zip(found, whole, strict=False)]


def _config(q: Array, scale: float, products: Mapping[str, tuple]) -> dict:
    """XLA's `CudnnfMHABackendConfig` (xla/service/gpu/backend_configs.proto); what is not named has its default."""
    batch, length, heads, _ = q.shape

    def numbers(left: tuple, right: tuple) -> dict[str, list[str]]:
        found = {}
        for side, (contracted, batch_dims) in (("lhs", left), ("rhs", right)):
            found[f"{side}_contracting_dimensions"] = [str(contracted)]
            found[f"{side}_batch_dimensions"] = [str(dim) for dim in batch_dims]
        return found

    config = {
        "algorithm": {
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
        },
        "fmha_scale": float(scale),
        "intermediate_tensor_shape": {
            "element_type": "BF16",
            "dimensions": [str(n) for n in (batch, heads, length, length)],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        "max_seg_per_batch": 1,
        **{f"{name}_dot_dimension_numbers": numbers(*sides) for name, sides in products.items()},
    }
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": config}
