"""The FP8 of DeepSeek-V3's published checkpoint: which tensors are in it, and how it is made and undone.

A weight in E4M3 has beside it `weight_scale_inv`, float32: one factor for each block of 128 x 128, by which the numbers
are multiplied, whatever the name says. Blocks at the edges are smaller. It is the matrices of attention, of the dense
networks and of the experts, routed and shared, also of MTP modules; the rest is BF16, and the routers' biases FP32.

N and K dims of a matrix, n and k its blocks.
"""

import re

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

SCALE = "_scale_inv"  # behind the name of a weight
BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
QUANTIZATION = {  # of config.json
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}

_LARGEST = np.float32(448)  # of E4M3
_NAMES = re.compile(r"\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.([\w.]+\.)?(gate|up|down)_proj)\.weight$")


def in_fp8(name: str) -> bool:
    """Whether the published checkpoint has the tensor in FP8."""
    return _NAMES.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales of a matrix."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantise(w_NK: Float32[np.ndarray, "N K"]) -> tuple[Float[np.ndarray, "N K"], Float32[np.ndarray, "n k"]]:
    """Numbers in E4M3, rounded to nearest even, and their scales; the largest of a block becomes 448.

    What `dequantise` makes of them gives the same again, bit by bit.
    """
    n, k = scale_shape(w_NK.shape)
    padded = np.zeros((n * BLOCK, k * BLOCK), np.float32)
    padded[: w_NK.shape[0], : w_NK.shape[1]] = np.abs(w_NK)
    largest_nk = padded.reshape(n, BLOCK, k, BLOCK).max((1, 3))
    scales_nk = largest_nk / _LARGEST
    scales_nk = scales_nk * _LARGEST / _LARGEST  # 448 of a scale is rounded: take one that comes back from it
    scales_nk = np.where(scales_nk > 0, scales_nk, np.float32(1))
    scaled_NK = w_NK / _spread(scales_nk, w_NK.shape)
    return np.clip(scaled_NK, -_LARGEST, _LARGEST).astype(E4M3), scales_nk


def dequantise(
    values_NK: Float[np.ndarray, "N K"], scales_nk: Float32[np.ndarray, "n k"]
) -> Float32[np.ndarray, "N K"]:
    """What the numbers stand for."""
    return values_NK.astype(np.float32) * _spread(scales_nk, values_NK.shape)


def _spread(scales_nk: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each number."""
    return scales_nk.repeat(BLOCK, axis=0)[: shape[0]].repeat(BLOCK, axis=1)[:, : shape[1]]
