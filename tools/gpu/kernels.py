"""Speed of every kernel at V3's sizes, as a share of what the library reaches for a dense product, or of a copy.

A call is timed as the model makes it: with what prepares the tiles of rows. FLOPs are those of the rows; bytes those of
each input and each output once. A dense product of the same size has as many rows; its gradients, which have as many
FLOPs, are not measured.

R rows, E experts, K and N dims of a product, M tiles of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.bench import Bench
from moejax.kernels.sizes import TILE

E4M3 = jnp.float8_e4m3fn
HIDDEN, WIDTH = 7168, 2048
PRODUCTS = {"gate and up": (HIDDEN, 2 * WIDTH), "down": (WIDTH, HIDDEN)}
SIZES = ((4, 4096), (8, 4096), (4, 32768), (8, 32768))  # experts, rows
LARGE = (8, 32768)
BF16_AIM, FP8_AIM, MEMORY_AIM = 0.75, 1.35, 0.8


def group_sizes(experts: int, rows: int, skewed: bool) -> np.ndarray:
    """Rows of each expert: alike; or as 1 : 1/2 : 1/3 and so on, which no tile divides, shuffled."""
    if not skewed:
        return np.full(experts, rows // experts, np.int32)
    share = 1 / np.arange(1, experts + 1)
    sizes = np.floor(rows * share / share.sum()).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return np.random.default_rng(0).permutation(sizes)


def dense_shape(rows: int, inner: int, columns: int) -> str:
    """What a dense product of that size is called in the results."""
    return f"{rows} x {inner} x {columns}"


# ----------------------------------------------------------------------------------------------------------------- BF16


def grouped_bf16(bench: Bench, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Forward, gradient of the rows, gradient of the matrices."""
    from moejax.kernels import grouped

    def forward(x: Any, w: Any, sizes: Any) -> Any:
        return grouped.grouped_dot(x, w, sizes, jnp.bfloat16)

    def back(dy: Any, w: Any, sizes: Any) -> Any:
        return grouped.grouped_dot(dy, w, sizes, jnp.bfloat16, transposed=True)

    for experts, rows in sizes:
        for product, (inner, columns) in PRODUCTS.items():
            x, dy = bench.draw((rows, inner), seed=1), bench.draw((rows, columns), seed=2)
            w = bench.draw((experts, inner, columns), seed=3, scale=0.02)
            time = functools.partial(_time, bench, "bf16", product, (rows, inner, columns))
            time("grouped_forward", forward, (x, w), experts)
            time("grouped_dx", back, (dy, w), experts)
            time("grouped_dw", grouped.grouped_outer, (x, dy), experts)


# ------------------------------------------------------------------------------------------------------------------ FP8


def grouped_fp8(bench: Bench, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """The same of E4M3 numbers, in Triton; beside it the products of rows by the warp-specialised kernel."""
    from moejax.kernels import grouped_fp8, mosaic

    def dot(by: Any) -> Any:
        return lambda x, w, sizes: by.scaled_grouped_dot(*x, *w, sizes, jnp.bfloat16)

    def outer(x: Any, dy: Any, sizes: Any) -> Any:
        return grouped_fp8.scaled_grouped_outer(*x, *dy, sizes)

    for experts, rows in sizes:
        for product, (inner, columns) in PRODUCTS.items():
            time = functools.partial(_time, bench, "fp8", product, (rows, inner, columns))
            for op, k, n in (("grouped_forward", inner, columns), ("grouped_dx", columns, inner)):
                factors = rows_and_blocks(bench, rows, experts, k, n)
                time(op, dot(grouped_fp8), factors, experts, by="Triton")
                time(op, dot(mosaic), factors, experts, by="Mosaic")
            tiles = (rows + (TILE - 1) * experts) // TILE
            factors = tuple(_scaled(bench, (dim, tiles * TILE), (tiles, dim)) for dim in (inner, columns))
            time("grouped_dw", outer, factors, experts, by="Triton")


def rows_and_blocks(bench: Bench, rows: int, experts: int, inner: int, columns: int) -> tuple:
    """Rows [R, K] and matrices [E, N, K], each with its scales."""
    tiles = -(-inner // TILE)
    matrices = (experts, columns, inner), (experts, -(-columns // TILE), tiles)
    return _scaled(bench, (rows, inner), (rows, tiles)), _scaled(bench, *matrices)


def _scaled(bench: Bench, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple:
    def make() -> tuple:
        values = jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16) * 60  # 7 deviations fit into E4M3
        return values.astype(E4M3), jax.random.uniform(jax.random.key(9), scales, minval=1e-3, maxval=2e-3)

    return bench.make(make)


def _time(
    bench: Bench,
    precision: str,
    product: str,
    dims: tuple[int, int, int],
    op: str,
    function: Any,
    factors: tuple,
    experts: int,
    by: str = "",
) -> None:
    """One product with balanced and with skewed groups, which are numbers that the program is given."""
    rows, flops = dims[0], 2.0 * np.prod(dims, dtype=float)
    name, shape = f"{precision} {op}", f"{product}, {rows} rows, {experts} experts"
    with bench.attempt(name, shape):
        groups = {kind: group_sizes(experts, rows, kind == "skewed") for kind in ("balanced", "skewed")}
        sizes = {kind: bench.constant(found) for kind, found in groups.items()}
        program = bench.compile(f"{name} {by}".strip(), function, *factors, sizes["balanced"], shape=shape)
        for kind, found in sizes.items():
            own, dense = f"{shape}, {kind}", f"dense {precision} {dense_shape(*dims)}"
            about: dict[str, Any] = {"shape": own, "by": by, "op": op, "precision": precision, "of": dense}
            about["aim"] = BF16_AIM if precision == "bf16" else None
            seconds = bench.rate(name, flops, "FLOP/s", program, *factors, found, **about)
            if precision == "fp8" and seconds:
                versus = {"of": f"bf16 {op} {own}", "aim": FP8_AIM}
                bench.record(f"{name} beside BF16", flops / seconds, "FLOP/s", shape=own, by=by, **versus)


# -------------------------------------------------------------------------------------------------------- memory-bound


def memory_bound(bench: Bench, experts: int = LARGE[0], rows: int = LARGE[1]) -> None:
    """Quantisers and activations, with skewed groups; and what XLA makes of the ways to experts and back."""
    from moejax.kernels import quantise, swiglu
    from moejax.ops.experts import sort_by_expert
    from moejax.ops.norm import rms_norm

    sizes = bench.constant(group_sizes(experts, rows, skewed=True))
    x, w = bench.draw((rows, HIDDEN), seed=1), bench.draw((experts, HIDDEN, 2 * WIDTH), seed=2)
    h, du = bench.draw((rows, 2 * WIDTH), seed=3), bench.draw((rows, WIDTH), seed=4)
    weights = bench.draw((rows,), jnp.float32, seed=5)
    x_rows, h_rows = bench.make(quantise.quantise_rows, x), bench.make(quantise.quantise_rows, h)
    shape = f"{rows} rows, {experts} experts"
    kernels: dict[str, tuple] = {
        "quantise rows": (quantise.quantise_rows, x),
        "quantise rows and columns": (quantise.quantise_both, x, sizes),
        "quantise columns": (quantise.quantise_columns, x, sizes),
        "quantise columns of rows": (quantise.quantise_columns, x_rows, sizes),
        "quantise blocks": (quantise.quantise_blocks, w),
        "quantise blocks, transposed": (functools.partial(quantise.quantise_blocks, transposed=True), w),
        "SwiGLU": (swiglu.weighted_swiglu, h, weights),
        "SwiGLU to FP8": (swiglu.weighted_swiglu_rows, h, weights),
        "SwiGLU gradient": (swiglu.swiglu_gradient, h, du, weights),
        "SwiGLU gradient, FP8": (swiglu.swiglu_gradient_tiles, h_rows, du, weights, sizes),
    }
    copy: dict[str, Any] = {"of": "copy", "op": "memory_bound"}
    for name, (function, *arrays) in kernels.items():
        bench.speed(name, function, *arrays, shape=shape, aim=MEMORY_AIM, **copy)

    tokens, per_token = rows // experts, experts
    ids = bench.make(lambda: jax.random.permutation(jax.random.key(6), jnp.arange(rows) % experts).reshape(tokens, -1))
    order, row = bench.make(sort_by_expert, ids)
    of_xla: dict[str, tuple] = {
        "tokens to rows (XLA)": (lambda x, order: x[order // per_token], bench.make(lambda x: x[:tokens], x), order),
        "rows to tokens (XLA)": (lambda y, row: sum(y[r].astype(jnp.float32) for r in row.T), x, row),
        "RMSNorm (XLA)": (lambda x, scale: rms_norm(x, scale, 1e-6), x, bench.draw((HIDDEN,), jnp.float32)),
    }
    for name, (function, *arrays) in of_xla.items():
        bench.speed(name, function, *arrays, shape=shape, of="copy")
