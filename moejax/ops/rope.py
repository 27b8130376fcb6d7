"""Rotary positions in the interleaved convention of the released weights, and their extension by YaRN.

B batch, S positions, H heads, R rotated dims, P = R / 2 pairs: dims (2j, 2j + 1) are a pair, which turns by position *
frequency_j.
Reference: inference/model.py of deepseek-ai/DeepSeek-V3 (`precompute_freqs_cis`); YaRN, arXiv:2309.00071.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig, YarnConfig


def frequencies(dim: int, theta: float, yarn: YarnConfig | None) -> np.ndarray:
    """Radians per position of each of the dim / 2 pairs, float64 [dim / 2].

    With YaRN, pairs that turn more than `beta_fast` times within the original length keep their frequency, those that
    turn less than `beta_slow` times have it divided by `factor`, and a linear ramp lies between.
    """
    pairs = np.arange(dim // 2)
    plain = theta ** (-2 * pairs / dim)
    if yarn is None:
        return plain

    def pair_turning(times: float) -> float:
        return dim * math.log(yarn.original_length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(cfg: AttentionConfig) -> float:
    """What query-key products are multiplied by: (nope + rope)^-0.5, and with YaRN the square of its magnitude."""
    scale = (cfg.qk_nope_dim + cfg.qk_rope_dim) ** -0.5
    if cfg.yarn is not None and cfg.yarn.mscale_all_dim:
        scale *= _magnitude(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2
    return scale


def rotation(
    positions_BS: Int[Array, "#B S"], cfg: AttentionConfig
) -> tuple[Float[Array, "#B S 1 P"], Float[Array, "#B S 1 P"]]:
    """Cosine and sine, float32, of the angle of every pair at every position."""
    angle = positions_BS[:, :, None, None] * frequencies(cfg.qk_rope_dim, cfg.rope_theta, cfg.yarn).astype(np.float32)
    scale = 1.0
    if cfg.yarn is not None:
        scale = _magnitude(cfg.yarn.factor, cfg.yarn.mscale) / _magnitude(cfg.yarn.factor, cfg.yarn.mscale_all_dim)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(
    x_BSHR: Float[Array, "B S H R"], turn: tuple[Float[Array, "#B S 1 P"], Float[Array, "#B S 1 P"]]
) -> Float[Array, "B S H R"]:
    """`x` with each pair turned by `rotation(...)`; computed in float32, in `x`'s dtype."""
    cos, sin = turn
    pairs = x_BSHR.astype(jnp.float32).reshape(*x_BSHR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BSHR.shape).astype(x_BSHR.dtype)
