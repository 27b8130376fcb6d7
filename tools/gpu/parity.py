"""Every kernel against plain JAX on the same GPU: float32, exact products, random numbers, groups of any size.

Bounds are of relative Frobenius errors. A rounding to BF16 adds 2^-9 / sqrt(3) = 1.1e-3 to one, so a bound of 2^-8
takes up to twelve of them. Sums in float32 of n terms are within n * 2^-24; tensor cores keep about 14 bits of sums of
E4M3 products. Quantisers give the very bits but for what a division by XLA may round otherwise. Where E4M3 numbers are
made from BF16 ones that may differ in the last bit, few round to the neighbour, 2^-3 away: 2^-6.

R rows, E experts, K and N dims of a product, D model dim, F expert width, T tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.bench import Bench, plain_form
from gpu.kernels import HIDDEN, WIDTH
from moejax.ops import attention as attention_op
from moejax.ops import fp8, grouped, swiglu
from moejax.ops.experts import routed_swiglu, sort_by_expert
from moejax.ops.fp8 import ScaledBlocks, ScaledColumns, ScaledRows
from moejax.ops.routing import expert_counts

GROUPS = (130, 0, 7, 640, 1, 300, 0, 127)  # uneven, empty, in no tile's place
ROWS = 1300  # some are beyond the groups
TOTAL = sum(GROUPS)
DIMS = {"V3": (HIDDEN, WIDTH), "parts of tiles": (200, 136)}  # D, F
BF16, BITS, SCALED, REQUANTISED = 2.0**-8, 2.0**-12, 2.0**-9, 2.0**-6
SEVERAL = 2.0**-6  # what passes through several products, rounded to BF16 between them
SUM = ROWS * 2.0**-24


def kernels(bench: Bench, dims: dict[str, tuple[int, int]] | None = None) -> None:
    """Each kernel alone, with V3's dims and with dims that no tile divides."""
    for shape, (dim, width) in (dims or DIMS).items():
        _grouped(bench, shape, dim, 2 * width)
        _grouped_fp8(bench, shape, dim, 2 * width)
        _quantisers(bench, shape, dim, 2 * width)
        _activations(bench, shape, width)


def _sizes(bench: Bench) -> Any:
    return bench.constant(np.asarray(GROUPS, np.int32))


def _rows(bench: Bench, width: int, seed: int, beyond: float = float("nan")) -> Any:
    """BF16 rows; those beyond the groups hold `beyond`."""
    of_groups = (np.arange(ROWS) < TOTAL)[:, None]

    def make() -> jax.Array:
        x = jax.random.normal(jax.random.key(seed), (ROWS, width))
        return jnp.where(of_groups, x, beyond).astype(jnp.bfloat16)

    return bench.make(make)


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the same arrays in float32."""

    def call(*arrays: Any) -> Any:
        return function(*(a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays))

    return call


def _grouped(bench: Bench, shape: str, inner: int, columns: int) -> None:
    from moejax.kernels import grouped as kernel

    x, dy, sizes = _rows(bench, inner, 1), _rows(bench, columns, 2), _sizes(bench)
    w = bench.draw((len(GROUPS), inner, columns), seed=3, scale=0.02)
    onto = bench.draw((len(GROUPS), inner, columns), jnp.float32, seed=4)
    for name, rows, transposed in (("grouped product", x, False), ("grouped product, transposed", dy, True)):
        bench.parity(
            name,
            lambda x, w, sizes, t=transposed: kernel.grouped_dot(x, w, sizes, jnp.bfloat16, t),
            _single(lambda x, w, sizes, t=transposed: grouped.grouped_dot(x, w, sizes, jnp.float32, t)),
            *(rows, w, sizes),
            bound=BF16,
            shape=shape,
        )
    outer = _single(grouped.grouped_outer)
    bench.parity("gradient of matrices", kernel.grouped_outer, outer, x, dy, sizes, bound=SUM, shape=shape)
    bench.parity(
        "gradient of matrices, added",
        kernel.grouped_outer,
        lambda x, dy, sizes, onto: outer(x, dy, sizes) + onto,
        *(x, dy, sizes, onto),
        bound=SUM,
        shape=shape,
    )


def _grouped_fp8(bench: Bench, shape: str, inner: int, columns: int) -> None:
    from moejax.kernels import grouped_fp8, mosaic

    x, dy, sizes = _rows(bench, inner, 1), _rows(bench, columns, 2, beyond=0.0), _sizes(bench)
    w = bench.draw((len(GROUPS), inner, columns), seed=3, scale=0.02)
    onto = bench.draw((len(GROUPS), inner, columns), jnp.float32, seed=4)
    with plain_form():
        x_rows = bench.make(fp8.quantise_rows, x)
        x_columns, dy_columns = (bench.make(lambda a, s: fp8.quantise_columns(a, s), a, sizes) for a in (x, dy))
        blocks = bench.make(lambda w: fp8.quantise_blocks(w, True), w)

    def dot(x: ScaledRows, w: ScaledBlocks, sizes: Any) -> Any:
        return grouped.grouped_dot(fp8.dequantise_rows(x), fp8.dequantise_blocks(w).mT, sizes, jnp.float32)

    def outer(x: ScaledColumns, dy: ScaledColumns, sizes: Any) -> Any:
        padded = -(-sizes // fp8.TILE) * fp8.TILE
        return grouped.grouped_outer(fp8.dequantise_columns(x).T, fp8.dequantise_columns(dy).T, padded)

    whole = inner % fp8.TILE == 0 and columns % fp8.TILE == 0
    for by, module in {"Triton": grouped_fp8, **({"Mosaic": mosaic} if whole else {})}.items():
        bench.parity(
            f"FP8 grouped product, {by}",
            lambda x, w, sizes, m=module: m.scaled_grouped_dot(*x, *w, sizes, jnp.bfloat16),
            dot,
            *(x_rows, blocks, sizes),
            bound=BF16,
            shape=shape,
        )
    for name, more in (("FP8 gradient of matrices", ()), ("FP8 gradient of matrices, added", (onto,))):
        bench.parity(
            name,
            lambda x, dy, sizes, *onto: grouped_fp8.scaled_grouped_outer(*x, *dy, sizes, *onto),
            lambda x, dy, sizes, *onto: sum(onto, outer(x, dy, sizes)),
            *(x_columns, dy_columns, sizes, *more),
            bound=SCALED,
            shape=shape,
        )


def _quantisers(bench: Bench, shape: str, inner: int, columns: int) -> None:
    from moejax.kernels import quantise

    x, all_rows, sizes = _rows(bench, inner, 1), _rows(bench, inner, 1, beyond=3.0), _sizes(bench)
    w = bench.draw((len(GROUPS), inner, columns), seed=3, scale=0.02)
    with plain_form():
        rows = bench.make(lambda x: fp8.quantise_rows(x, True), x)

    def own(both: Any) -> Any:
        """Rows beyond the groups are undefined."""
        return jax.tree.map(lambda a: a[:TOTAL], tuple(both[0])), tuple(both[1])

    pairs: dict[str, tuple] = {
        "rows": (quantise.quantise_rows, fp8.quantise_rows, all_rows),
        "columns": (quantise.quantise_columns, fp8.quantise_columns, x, sizes),
        "columns of rows": (quantise.quantise_columns, fp8.quantise_columns, rows, sizes),
        "rows and columns": (
            lambda x, sizes, p: own(quantise.quantise_both(x, sizes, p)),
            lambda x, sizes, p: own(fp8.quantise_both(x, sizes, p)),
            *(x, sizes),
        ),
        "blocks": (quantise.quantise_blocks, fp8.quantise_blocks, w),
    }
    for name, (kernel, plain, *arrays) in pairs.items():
        for option in (False, True):  # powers of two; of blocks, transposed
            bench.parity(
                f"quantise {name}{', turned' if name == 'blocks' else ', powers of 2'}"
                if option
                else f"quantise {name}",
                lambda *a, k=kernel, o=option: k(*a, o),
                lambda *a, p=plain, o=option: p(*a, o),
                *arrays,
                bound=BITS,
                shape=shape,
            )


def _activations(bench: Bench, shape: str, width: int) -> None:
    from moejax.kernels import swiglu as kernel

    h, du, sizes = _rows(bench, 2 * width, 1, 0.0), _rows(bench, width, 2, 0.0), _sizes(bench)
    weights = bench.draw((ROWS,), jnp.float32, seed=3)
    with plain_form():
        h_rows = bench.make(fp8.quantise_rows, h)

    def own(made: Any) -> Any:
        """Rows beyond the groups are undefined, as they are of `quantise_both`."""
        dh, dh_columns, u_columns, dweights = made
        return [a[:TOTAL] for a in (*dh, dweights)], tuple(dh_columns), tuple(u_columns)

    def gradient(h: Any, du: Any, weights: Any) -> Any:
        return swiglu.weighted_swiglu_gradient(h, weights, du)

    pairs: dict[str, tuple] = {
        "SwiGLU": (kernel.weighted_swiglu, _single(swiglu.weighted_swiglu), BF16, h, weights),
        "SwiGLU gradient": (kernel.swiglu_gradient, _single(gradient), BF16, h, du, weights),
        "SwiGLU to FP8": (kernel.weighted_swiglu_rows, swiglu.scaled_swiglu, REQUANTISED, h, weights),
        "SwiGLU gradient, FP8": (
            lambda h, du, weights, sizes: own(kernel.swiglu_gradient_tiles(h, du, weights, sizes)),
            lambda h, du, weights, sizes: own(swiglu.scaled_swiglu_gradient(h, weights, du, sizes)),
            REQUANTISED,
            *(h_rows, du, weights, sizes),
        ),
    }
    for name, (function, plain, bound, *arrays) in pairs.items():
        bench.parity(name, function, plain, *arrays, bound=bound, shape=shape)


# -------------------------------------------------------------------------------------------------- whole operations


def operations(bench: Bench, dim: int = HIDDEN, width: int = WIDTH, attention: tuple[int, ...] = (2, 1000, 16)) -> None:
    """Routed experts in BF16 and FP8, and attention with documents and without: results and all gradients."""
    _experts(bench, dim, width)
    _attention(bench, *attention)


def _experts(bench: Bench, dim: int, width: int, tokens: int = 400, experts: int = 8, per_token: int = 4) -> None:
    def make() -> tuple:
        keys = jax.random.split(jax.random.key(0), 5)
        liking = jax.random.gumbel(keys[0], (tokens, experts)) - jnp.arange(experts)
        ids = jax.lax.top_k(liking.at[:, 2].set(-jnp.inf), per_token)[1]  # expert 2 has none
        x, dy = (jax.random.normal(key, (tokens, dim)).astype(jnp.bfloat16) for key in keys[1:3])
        weights = jax.random.uniform(keys[3], ids.shape)
        gate_up = jax.random.normal(keys[4], (experts, dim, 2 * width)) * 0.02
        down = jax.random.normal(keys[0], (experts, width, dim)) * 0.02
        # the matrices are master weights, which are rounded to BF16 before they are multiplied
        gate_up, down = (w.astype(jnp.bfloat16).astype(jnp.float32) for w in (gate_up, down))
        return (*sort_by_expert(ids), expert_counts(ids, experts)), dy, (x, weights, gate_up, down)

    def with_gradients(fp8: bool, dtype: Any) -> Callable[..., Any]:
        def call(rows: tuple, dy: Any, arrays: tuple) -> Any:
            x, *others = arrays
            y, back = jax.vjp(lambda *a: routed_swiglu(*a, *rows, fp8=fp8), x.astype(dtype), *others)
            return y, back(dy.astype(dtype))

        return call

    given, shape = bench.make(make), f"{dim} x {width}"
    bf16, single = with_gradients(False, jnp.bfloat16), with_gradients(False, jnp.float32)
    bench.parity("routed experts with gradients", bf16, single, *given, bound=SEVERAL, shape=shape)
    scaled = with_gradients(True, jnp.bfloat16)
    bench.parity("routed experts with gradients, FP8", scaled, scaled, *given, bound=2 * SEVERAL, shape=shape)


def _attention(bench: Bench, batch: int, length: int, heads: int, qk: int = 192, v: int = 128) -> None:
    q, k, values, dout = (
        bench.draw((batch, length, heads, dim), seed=seed) for seed, dim in enumerate((qk, qk, v, v), 1)
    )
    begins = np.isin(np.arange(batch * length), (1, 70, 71, 600)).reshape(batch, length)
    documents = bench.constant(np.cumsum(begins, axis=1))
    for name, ids in {"attention with gradients": (), "attention of documents with gradients": (documents,)}.items():

        def with_gradients(q: Any, k: Any, v: Any, dout: Any, *ids: Any) -> Any:
            out, back = jax.vjp(lambda *a: attention_op.attention(*a, 0.1, *ids), q, k, v)
            return out, back(dout)

        arrays = (q, k, values, dout, *ids)
        bench.parity(name, with_gradients, _single(with_gradients), *arrays, bound=SEVERAL, shape=f"{qk}, {v}")
