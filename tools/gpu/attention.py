"""Multi-head latent attention at V3's size: the softmax part by itself, forward, backward, and with documents.

FLOPs count the causal half of two products forward, and twice that backward: what is computed again is not counted.
"""

from typing import Any

import jax
import numpy as np

from gpu.bench import Bench
from moejax.config import AttentionConfig
from moejax.ops.attention import attention as attend
from moejax.ops.rope import softmax_scale

LENGTH = 4096


def flops(batch: int, length: int, cfg: AttentionConfig) -> float:
    """Of the forward pass."""
    return float(batch * cfg.num_heads * length**2 * (cfg.qk_nope_dim + cfg.qk_rope_dim + cfg.v_dim))


def attention(bench: Bench, batch: int = 2, length: int = LENGTH, cfg: AttentionConfig | None = None) -> None:
    """One layer's."""
    cfg = cfg or AttentionConfig()
    heads, qk, scale = cfg.num_heads, cfg.qk_nope_dim + cfg.qk_rope_dim, softmax_scale(cfg)
    dims = (qk, qk, cfg.v_dim, cfg.v_dim)
    q, k, v, dout = (bench.draw((batch, length, heads, dim), seed=seed) for seed, dim in enumerate(dims, 1))
    documents = bench.constant(np.cumsum(np.arange(batch * length).reshape(batch, length) % 1000 == 0, axis=1))
    shape, count = f"{batch} x {length} x {heads}", flops(batch, length, cfg)
    for name, ids in {"attention": (), "attention of documents": (documents,)}.items():

        def forward(q: Any, k: Any, v: Any, *ids: Any) -> Any:
            return attend(q, k, v, scale, *ids, block=cfg.block)

        def saved(q: Any, k: Any, v: Any, *ids: Any) -> Any:
            return jax.vjp(lambda q, k, v: forward(q, k, v, *ids), q, k, v)[1]

        op = {"precision": "bf16", "of": "dense bf16 8192 x 8192 x 8192"} if not ids else {}
        about = {"shape": shape, **op}
        mine = {"op": "attention_forward"} if not ids else {}
        bench.speed(f"{name}, forward", forward, q, k, v, *ids, flops=count, **about, **mine)
        with bench.attempt(f"{name}, backward", shape):
            back = bench.make(saved, q, k, v, *ids)
            mine = {"op": "attention_backward"} if not ids else {}
            bench.speed(
                f"{name}, backward", lambda back, dout: back(dout), back, dout, flops=2 * count, **about, **mine
            )
