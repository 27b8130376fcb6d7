"""The warp-specialised FP8 product: in Pallas' interpreter for GPUs, and compiled for an H200."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params
from jax._src.state.types import TransposeTransform
from jax.sharding import AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.mosaic import TILE, _tiles, scaled_grouped_dot
from moejax.plan.hopper import h200_devices

E4M3 = jnp.float8_e4m3fn


product = jax.jit(functools.partial(scaled_grouped_dot, blocks=2), static_argnames="dtype")


def draw(sizes, rows, depth, columns, seed=0):
    """Operands; rows beyond the groups hold NaN."""
    rng = np.random.default_rng(seed)
    experts, tiles = len(sizes), depth // 128
    x, w = (rng.normal(size=s).astype(E4M3) for s in ((rows, depth), (experts, columns, depth)))
    x_scales = rng.uniform(0.5, 2, (rows, tiles)).astype(np.float32)
    w_scales = rng.uniform(0.5, 2, (experts, columns // 128, tiles)).astype(np.float32)
    x[sum(sizes) :], x_scales[sum(sizes) :] = np.nan, np.nan
    return x, x_scales, w, w_scales, np.array(sizes, np.int32)


def reference(x, x_scales, w, w_scales, sizes):
    """In float64, and the sum of the magnitudes of what is added up."""
    out, magnitude = (np.zeros((len(x), w.shape[1])) for _ in range(2))
    wide = w.astype(float) * np.repeat(np.repeat(w_scales.astype(float), 128, 1), 128, 2)
    ends = np.cumsum(sizes)
    for expert, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = x[start:end].astype(float) * np.repeat(x_scales[start:end].astype(float), 128, 1)
        out[start:end], magnitude[start:end] = rows @ wide[expert].T, np.abs(rows) @ np.abs(wide[expert]).T
    return out, magnitude


@pytest.fixture
def interpreter(monkeypatch):
    """Pallas' interpreter, which also looks for races; what is read outside of an array is NaN."""
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(callbacks, "wgmma", _wgmma)
    with params.force_gpu_interpret_mode(
        params.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
    ):
        yield
    races = interpret_pallas_call.get_races()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races.races_found


def _wgmma(*, token, device_id, grid_point_coords, thread_id, acc_dtype, source_info=None, **of):
    """The interpreter's product with a transposed second operand, which that of jax 0.10 cannot read."""

    def place(name):
        return token, device_id, grid_point_coords, thread_id, of[f"{name}_allocation_key_as_array"]

    *before, transpose = of["b_transforms"]
    assert transpose == TransposeTransform((1, 0))
    acc, a = (np.asarray(callbacks._get(*place(n), of[f"{n}_transforms"])[1]) for n in ("acc", "a"))
    b = np.asarray(callbacks._get(*place("b"), tuple(before))[1]).T
    callbacks._swap(*place("acc"), of["acc_transforms"], acc + np.matmul(a, b, dtype=acc_dtype), None)
    return token


@pytest.mark.parametrize(
    ("sizes", "rows", "depth", "dtype"),
    [
        pytest.param([72, 1, 0, 128, 39], 264, 384, jnp.bfloat16, id="unaligned, one empty, some rows beyond"),
        pytest.param([128, 0, 64, 0, 64], 264, 384, jnp.bfloat16, id="whole tiles and halves"),
        pytest.param([0, 0, 0, 0, 0], 264, 384, jnp.bfloat16, id="all rows beyond"),
        pytest.param([3, 7], 21, 640, jnp.float32, id="float32, fewer rows than a tile, more steps than slots"),
    ],
)
def test_product_matches_the_definition(sizes, rows, depth, dtype, interpreter):
    operands = draw(sizes, rows, depth, 256)
    got = np.asarray(product(*operands, dtype=dtype)).astype(float)
    want, magnitude = reference(*operands)
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    atol = (128 + depth // 128) * 2.0**-24 * magnitude + rounding * np.abs(want)  # sums in float32, then rounded
    np.testing.assert_array_less(np.abs(got - want), atol + 1e-30)
    assert (got[sum(sizes) :] == 0).all()


@pytest.mark.parametrize(
    ("least", "most", "beyond"),
    [(0, 3, 0), (0, 400, 5), (121, 128, 0), (122, 122, 3), (128, 128, 0), (0, 0, 700)],
    ids=["tiny", "any", "one over at best", "all alike", "whole tiles", "all rows beyond"],
)
def test_each_row_is_in_one_tile(least, most, beyond):
    sizes = np.random.default_rng(0).integers(least, most + 1, 64)
    rows = sizes.sum() + beyond
    tiles, (count,) = jax.tree.map(np.asarray, _tiles(jnp.array(sizes, jnp.int32), int(rows)))
    assert 0 < count <= len(tiles.row)
    found = np.full(rows, -2)
    for expert, row, start, end in zip(*(x[:count] for x in tiles), strict=True):
        own = slice(max(row * 8, start), min(row * 8 + TILE, end))
        assert own.start < own.stop and (found[own] == -2).all()
        found[own] = expert
    np.testing.assert_array_equal(found, np.repeat([*range(64), -1], [*sizes, beyond]))


@pytest.mark.parametrize(("depth", "columns"), [(192, 128), (128, 576)], ids=["contraction", "columns"])
def test_dims_must_be_multiples_of_128(depth, columns):
    rows = jax.ShapeDtypeStruct((8, depth), E4M3), jax.ShapeDtypeStruct((8, 2), jnp.float32)
    weights = jax.ShapeDtypeStruct((2, columns, depth), E4M3), jax.ShapeDtypeStruct((2, 5, 2), jnp.float32)
    with pytest.raises(ValueError, match=rf"contraction {depth} and columns {columns}: .* multiples of 128"):
        jax.eval_shape(scaled_grouped_dot, *rows, *weights, jax.ShapeDtypeStruct((2,), jnp.int32))


# ------------------------------------------------------------------------------------------------------ for an H200


def shapes(rows, experts, depth, columns, **how):
    """Operands that need not exist."""
    tiles = depth // 128
    dims = (rows, depth), (rows, tiles), (experts, columns, depth), (experts, columns // 128, tiles), (experts,)
    dtypes = E4M3, jnp.float32, E4M3, jnp.float32, jnp.int32
    return [jax.ShapeDtypeStruct(d, t, **how) for d, t in zip(dims, dtypes, strict=True)]


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("depth", "columns"), [(7168, 4096), (2048, 7168)], ids=["gate and up", "down"])
def test_compiles_for_h200_without_spills(depth, columns, dtype, no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    operands = shapes(8192, 8, depth, columns, sharding=SingleDeviceSharding(h200_devices(1)[0]))
    jax.jit(functools.partial(scaled_grouped_dot, dtype=dtype)).lower(*operands).compile()
    found = {path.suffix: path.read_text() for path in tmp_path.iterdir()}
    assert ".ptxas" in found, "ptxas, of the CUDA toolkit or the package nvidia-cuda-nvcc, is not installed"
    program, report = found[".ptx"], found[".ptxas"]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert int(re.search(r"Used (\d+) registers", report)[1]) * 3 * 128 <= 65536
    assert program.count("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3") == 4  # 128 of the contraction
    # three operands come, and a half goes out whole or in copies of 32, 16, 8, 4, 2 and 1 rows
    copies = (r"cp\.async\.bulk\.tensor\.\wd\." + way for way in (r"shared::\w+\.global", r"global\.shared"))
    assert [len(re.findall(copy, program)) for copy in copies] == [3, 7]


@pytest.mark.hopper
def test_lowers_in_a_loop_on_a_mesh():
    def local(*operands):
        def step(carry, _):
            out = scaled_grouped_dot(*(x[0] for x in operands))
            assert jax.typeof(out).manual_axis_type.varying == {"x"}
            return carry, out[None]

        return jax.lax.scan(step, None, length=2)[1]

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    operands = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in shapes(1024, 4, 1024, 512)]
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P(None, "x")))
    text = mapped.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
