"""Product of grouped FP8 rows with expert weights by a warp-specialised kernel (Pallas Mosaic GPU), for NVIDIA Hopper.

It computes what `grouped_fp8.scaled_grouped_dot` does. One thread block stays on each SM and takes tiles of 128 x 128
outputs one after another. Its third warp group only brings 128 x 128 tiles of the operands into a ring in shared memory
(TMA), up to `slots` steps ahead and on into the next tile; the other two multiply (wgmma), 64 rows each. After every
128 of the contraction the tensor cores' sums are scaled and added up in float32 registers (arXiv:2412.19437, section
3.3.2).

Groups are not padded. Operands that lie in shared memory as wgmma wants them are read from a multiple of 8 rows on, so
the tiles of a group begin there, up to 7 rows before the group does. Rows of another group are not stored: 64 rows of
one group go out as one copy, fewer in copies of 32, 16, ..., 1 rows, since TMA copies a fixed number.

Has not run on a GPU yet.

R rows, K contraction dim, N columns, E experts, C = K / 128; T row tiles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.kernels.tiles import num_tiles, offsets
from moejax.varying import vary_over

TILE = 128  # rows, columns and contraction of a step
HALF = TILE // 2  # rows that one warp group multiplies
WORKERS = 2  # warp groups that multiply; one more brings the operands
ALIGNED = 8  # rows that lie together in shared memory: tiles begin at a multiple
PANEL = 16  # row tiles that go through all columns together, so that operands are found in the L2 cache
SMS = 132  # of an H100 or H200
_BRINGER_REGISTERS, _WORKER_REGISTERS = 40, 232  # a thread; 65536 on an SM


class _Tiles(NamedTuple):
    """Tiles of rows, those that are used first; int32 [T]."""

    expert: Array  # -1: its rows belong to none, and are 0
    row: Array  # the first, in units of ALIGNED
    start: Array  # rows that belong to the group
    end: Array


class _Item(NamedTuple):
    """One tile of the output, in the kernel."""

    expert: Array
    row: Array  # the first
    column: Array  # the first
    start: Array
    end: Array
    steps: Array  # tiles of the contraction


def scaled_grouped_dot(
    x_values_RK: Array,
    x_scales_RC: Array,
    w_values_ENK: Array,
    w_scales_ENC: Array,
    sizes_E: Array,
    dtype: DTypeLike = jnp.bfloat16,
    blocks: int = SMS,
) -> Array:
    """Rows times their group's weight, `dtype` [R, N]; rows beyond the groups give 0, whatever they hold.

    Values are float8_e4m3fn, scales float32: of x for 1 x 128 tiles, of w for 128 x 128 blocks.

    Args:
        blocks: thread blocks, one for each SM.

    Raises:
        ValueError: K or N is no multiple of 128.
    """
    (rows, depth), columns = x_values_RK.shape, w_values_ENK.shape[1]
    if depth % TILE or columns % TILE:
        raise ValueError(f"contraction {depth} and columns {columns}: both must be multiples of {TILE}")
    operands = x_values_RK, x_scales_RC, w_values_ENK, w_scales_ENC, sizes_E
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    x, x_scales, w, w_scales, sizes = (vary_over(x, axes) for x in operands)
    tiles, count = _tiles(sizes, rows)
    fill = max(TILE, rows + -rows % ALIGNED) - rows  # copies are aligned, and no larger than the array
    x, x_scales = (jnp.pad(a, ((0, fill), (0, 0))) for a in (x, x_scales))
    out = _program(rows + fill, columns, depth // TILE, dtype, blocks)(x, x_scales.T, w, w_scales, *tiles, count)
    return vary_over(out, axes)[:rows]


def _tiles(sizes_E: Array, rows: int) -> tuple[_Tiles, Array]:
    """Tiles of all rows, and how many are used [1]; of rows beyond the groups, too."""
    groups = sizes_E.shape[0] + 1
    start = offsets(jnp.append(sizes_E, rows - sizes_E.sum()))
    row = start // ALIGNED
    counts = num_tiles(start[1:] - row[:-1] * ALIGNED, TILE) * (jnp.diff(start) > 0)
    firsts = offsets(counts)
    tile_T = jnp.arange(rows // TILE + groups, dtype=jnp.int32)  # enough: all but one of a group's go TILE rows on
    group_T = jnp.minimum((tile_T[:, None] >= firsts[1:]).sum(1), groups - 1)
    row_T = row[group_T] + (tile_T - firsts[group_T]) * (TILE // ALIGNED)
    expert_T = jnp.where(group_T < groups - 1, group_T, -1).astype(jnp.int32)
    return _Tiles(expert_T, row_T, start[group_T], start[group_T + 1]), firsts[-1:]


def _program(rows: int, columns: int, depth_tiles: int, dtype: DTypeLike, blocks: int) -> Callable[..., Array]:
    """The kernel for these shapes."""
    slots = min(4 if jnp.dtype(dtype).itemsize == 2 else 3, depth_tiles)  # what fits into 227 KiB
    tile = (slots, TILE, TILE)
    width = 128 // jnp.dtype(dtype).itemsize
    swizzled = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)
    return plgpu.kernel(
        functools.partial(_body, blocks, columns // TILE, depth_tiles),
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WORKERS + 1,
        thread_name="group",
        scratch_types=(
            plgpu.SMEM(tile, jnp.float8_e4m3fn),
            plgpu.SMEM(tile, jnp.float8_e4m3fn),
            plgpu.SMEM(tile[:2], jnp.float32),
            plgpu.SMEM((WORKERS, HALF, TILE), dtype, transforms=swizzled),
            plgpu.SMEM((WORKERS, HALF, TILE), dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=slots),
        ),
        kernel_name="scaled_grouped_dot",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _body(blocks: int, column_tiles: int, depth_tiles: int, *refs: Any) -> None:
    """What each warp group of each block does.

    Refs in global memory: x, its scales [C, R], w, its scales; what `_Tiles` holds, and how many are used; out. In
    shared memory: rings of x, w and scales, out in two layouts, barriers "loaded" and "free" of each slot.
    """
    x_g, x_scales_g, w_g, w_scales_g, expert_g, row_g, start_g, end_g, count_g, out_g = refs[:10]
    x_s, w_s, x_scales_s, out_s, part_s, loaded, free = refs[10:]
    group, block = lax.axis_index("group"), lax.axis_index("block")
    slots, count = x_s.shape[0], count_g[0]
    own = lax.div(count * column_tiles - block + blocks - 1, jnp.int32(blocks))  # items of this block

    def item(index: Array) -> _Item:
        """Panels of row tiles, in each of them columns, in each of these the panel's row tiles."""
        index = block + index * blocks
        panel = lax.div(index, jnp.int32(PANEL * column_tiles))
        height = jnp.minimum(PANEL, count - panel * PANEL)
        rest = index - panel * (PANEL * column_tiles)
        tile, column = panel * PANEL + lax.rem(rest, height), lax.div(rest, height) * TILE
        steps = jnp.where(expert_g[tile] < 0, 0, depth_tiles)
        return _Item(expert_g[tile], row_g[tile] * ALIGNED, column, start_g[tile], end_g[tile], steps)

    def until_free(step: Array) -> None:
        @pl.when(step >= slots)
        def _() -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, slots)])

    def bring() -> None:
        plgpu.set_max_registers(_BRINGER_REGISTERS, action="decrease")

        def bring_item(index: Array, step: Array) -> Array:
            at = item(index)
            rows, columns = pl.ds(at.row, TILE), pl.ds(at.column, TILE)

            def bring_step(k: Array, step: Array) -> Array:
                slot, depth = lax.rem(step, slots), pl.ds(k * TILE, TILE)
                until_free(step)
                plgpu.copy_gmem_to_smem(x_g.at[rows, depth], x_s.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(w_g.at[at.expert, columns, depth], w_s.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(x_scales_g.at[k, rows], x_scales_s.at[slot], loaded.at[slot])
                return step + 1

            return lax.fori_loop(0, at.steps, bring_step, step)

        total = lax.fori_loop(0, own, bring_item, jnp.int32(0))
        lax.fori_loop(total, total + slots, lambda step, _: until_free(step), None)

    def work() -> None:
        plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        half = pl.ds(group * HALF, HALF)

        def work_item(index: Array, step: Array) -> Array:
            at = item(index)

            def add(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                sums, step = carry
                slot = lax.rem(step, slots)
                w_scale = w_scales_g[at.expert, lax.div(at.column, TILE), k]
                plgpu.barrier_wait(loaded.at[slot])

                def product(acc: Any) -> tuple[Array, Array]:
                    plgpu.wgmma(acc, x_s.at[slot, half], w_s.at[slot].T)
                    scale = x_scales_s[slot, half] * w_scale
                    plgpu.commit_smem()  # the scales are read before the next may come
                    return acc[...], scale

                part, scale = pl.run_scoped(product, plgpu.ACC((HALF, TILE)))
                plgpu.barrier_arrive(free.at[slot])
                return sums + part * lax.broadcast_in_dim(scale, part.shape, [0]), step + 1

            sums, step = lax.fori_loop(0, at.steps, add, (jnp.zeros((HALF, TILE), jnp.float32), step))
            _store(sums, at, group, out_g, out_s.at[group], part_s.at[group])
            return step

        lax.fori_loop(0, own, work_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(group < WORKERS, work, bring)


def _store(sums: Array, at: _Item, group: Array, out_g: Any, out_s: Any, part_s: Any) -> None:
    """Stores the warp group's half of a tile, or the rows of it that belong to the tile's group."""
    values, row, columns = sums.astype(out_g.dtype), at.row + group * HALF, pl.ds(at.column, TILE)
    first, past = (jnp.clip(end - row, 0, HALF) for end in (at.start, at.end))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before

    @pl.when(past - first == HALF)
    def _() -> None:
        out_s[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_g.at[pl.ds(row, HALF), columns])

    @pl.when((past > first) & (past - first < HALF))
    def _() -> None:
        part_s[...] = values
        plgpu.commit_smem()
        done = first
        for power in reversed(range(HALF.bit_length() - 1)):
            size = 1 << power

            @pl.when((past - first) & size != 0)
            def _(size: int = size, done: Array = done) -> None:
                plgpu.copy_smem_to_gmem(part_s.at[pl.ds(done, size)], out_g.at[pl.ds(row + done, size), columns])

            done += (past - first) & size
