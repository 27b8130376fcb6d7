"""What a compiled program computes while it sends: the reader, and woven cells compiled for NVIDIA H200s."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig
from moejax.mesh import AXES, make_mesh
from moejax.model.block import Block, run_block
from moejax.model.shards import widened
from moejax.pipeline.backward import trace_stage
from moejax.pipeline.carry import Work
from moejax.pipeline.cells import Cells
from moejax.pipeline.executor import run
from moejax.pipeline.interleave import GPU_OPTIONS, interleave_stages
from moejax.pipeline.schedule import dualpipe
from moejax.pipeline.table import build
from moejax.plan.hopper import h200_devices
from moejax.plan.overlap import flights
from moejax.plan.overlap import table as table_of_flights
from moejax.varying import vary_over

# ---------------------------------------------------------------------------------------------------------- the reader

PRODUCT = 2 * 8 * 16 * 4  # of an [8, 4] by a [4, 16] array
PROGRAM = """
%fused (a: bf16[8,4], b: bf16[4,16]) -> bf16[8,16] {{
  %a = bf16[8,4]{{1,0}} parameter(0)
  %b = bf16[4,16]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[8,16]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%body (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %x = bf16[8,4]{{1,0}} get-tuple-element(%carry), index=1
  %w = bf16[4,16]{{1,0}} constant({{...}})
  %y = bf16[8,16]{{1,0}} fusion(%x, %w), kind=kCustom, calls=%fused
  ROOT %next = (s32[], bf16[8,4]{{1,0}}) tuple(%i, %x)
}}

%outer (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  ROOT %inner = (s32[], /*index=1*/bf16[8,4]{{1,0}}) while(%carry), condition=%less, body=%body
}}

ENTRY %main (p: bf16[8,4], q: bf16[4,16]) -> bf16[8,4] {{
  %p = bf16[8,4]{{1,0}} parameter(0)
  %q = bf16[4,16]{{1,0}} parameter(1)
  {start}
  {between}
  {done}
  %after = bf16[8,16]{{1,0}} fusion(%p, %q), kind=kCustom, calls=%fused, metadata={{op_name="jit(f)/B/dot"}}
}}
"""
START = (
    "%start = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) all-to-all-start(%p), dimensions={0}, "
    'metadata={op_name="jit(f)/shard_map/F/all_to_all"}, backend_config={"collective_backend_config":{"is_sync":false}}'
)
DONE = "%done = bf16[8,4]{1,0} all-to-all-done(%start)"
FUSION = '%z = bf16[8,16]{1,0} fusion(%p, %q), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/SIDE/dot"}'
LOOP = '%z = (s32[], bf16[8,4]{1,0}) while(%t), condition=%less, body=BODY, metadata={op_name="jit(f)/B/while"}'
CUBLAS = (
    '%z = (bf16[8,16]{1,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", '
    'metadata={op_name="f/B/dot"}, backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)
KERNEL = (
    '%z = bf16[8,16]{1,0} custom-call(%p, %q), custom_call_target="triton_kernel_call", '
    f'metadata={{op_name="f/B/flops={PRODUCT}/triton_kernel_call"}}'
)
FIVE_TRIPS = LOOP + ', backend_config={"known_trip_count":{"n":"5"}}'


def program(between, start=START, done=DONE):
    return PROGRAM.format(start=start, between=between, done=done)


@pytest.mark.parametrize(
    ("between", "flops"),
    [
        pytest.param(FUSION.replace("SIDE", "B"), {"B": PRODUCT}, id="a fusion of the other side"),
        pytest.param(FUSION.replace("SIDE", "F"), {"F": PRODUCT}, id="a fusion of its own side"),
        pytest.param(CUBLAS, {"B": PRODUCT}, id="a call of cuBLAS"),
        pytest.param(KERNEL, {"B": PRODUCT}, id="a kernel"),
        pytest.param(FIVE_TRIPS.replace("BODY", "%body"), {"B": 5 * PRODUCT}, id="a loop"),
        pytest.param(FIVE_TRIPS.replace("BODY", "%outer"), {"B": 5 * PRODUCT}, id="a loop in a loop"),
        pytest.param(LOOP.replace("BODY", "%body"), {}, id="a loop that may have no trips"),
        pytest.param("%c = bf16[8,4]{1,0} copy(%p)", {}, id="a copy"),
        pytest.param("", {}, id="nothing"),
    ],
)
def test_products_in_flight_are_counted(between, flops):
    (flight,) = flights(program(between))
    assert (flight.kind, flight.side, flight.computation, flight.bytes) == ("all-to-all", "F", "main", 64)
    assert flight.flops == flops
    assert flight.state == ("hidden" if "B" in flops else "exposed")


@pytest.mark.parametrize(
    ("start", "done"),
    [
        pytest.param(START.replace('"is_sync":false', '"is_sync":true'), DONE, id="marked so"),
        pytest.param("", '%done = bf16[8,4]{1,0} all-to-all(%p), metadata={op_name="f/F/a"}', id="one instruction"),
    ],
)
def test_what_waits_is_not_hidden(start, done):
    (flight,) = flights(program(FUSION.replace("SIDE", "B"), start, done))
    assert (flight.side, flight.state) == ("F", "sync")


def test_wrapped_collectives_are_read():
    wrapped = (
        "%wrapped (x: bf16[8,4]) -> bf16[8,4] {\n  ROOT %a = bf16[8,4]{1,0} reduce-scatter(%x), dimensions={0}\n}\n"
    )
    start = '%start = ((bf16[8,4]), bf16[8,4]) async-start(%p), calls=%wrapped, metadata={op_name="f/F/a"}'
    done = "%done = bf16[8,4]{1,0} async-done(%start)"
    (flight,) = flights(wrapped + program(FUSION.replace("SIDE", "B"), start, done))
    assert (flight.kind, flight.state, flight.flops) == ("reduce-scatter", "hidden", {"B": PRODUCT})


def test_table_has_a_line_for_each():
    text = table_of_flights(flights(program(FUSION.replace("SIDE", "B"))))
    assert text.splitlines() == [
        "| collective | of | MB | GFLOP of B | state |",
        "| --- | --- | ---: | ---: | --- |",
        "| all-to-all | F | 0.0 | 0.0 | hidden |",
    ]


# ------------------------------------------------------------------------------------------- a cell, compiled for H200s

MODEL = ModelConfig(
    hidden_size=1024,
    num_layers=1,
    num_dense_layers=0,
    attention=AttentionConfig(
        num_heads=8, q_lora_rank=512, kv_lora_rank=256, qk_nope_dim=128, qk_rope_dim=64, v_dim=128
    ),
    moe=MoEConfig(num_experts=16, top_k=4, num_groups=4, top_groups=2, expert_width=512),
)
ROWS, LENGTH = 2, 2048
LEAST = 10**9  # operations that make a product worth the name; of the smallest block of 64 rows it has a sixteenth


def compiled_cell(nodes, woven):
    """F of one layer and B of another, on 4 stages x 4 devices that exchange tokens, as XLA compiles them."""
    config = MeshConfig(pipe=4, data=1, expert=4, expert_nodes=nodes)
    mesh = make_mesh(config, list(h200_devices(16)))
    graph, params = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0), MODEL, config, "moe")))
    params = jax.tree.map(functools.partial(local, config), params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, MODEL.hidden_size), jnp.bfloat16)

    def layer(params, given):
        x, _ = given
        x, stats = run_block(nnx.merge(graph, params), x, jnp.arange(LENGTH)[None], None, MODEL.remat)
        return x, (stats.balance_loss, stats.counts, stats.rounds)

    def traced(params, x):
        found.append(trace_stage(layer, widened(params), (x, None)))
        return x

    def cell(ahead, x, behind, residuals, dy):
        (f,), ahead, behind = found, widened(ahead), widened(behind)
        daux = (vary_over(jnp.ones(()), AXES), None, None)
        if woven:
            return interleave_stages(f, ahead, (x, None), f, behind, residuals, dy, daux)
        with jax.named_scope("F"):
            outputs = f.forward(ahead, (x, None))
        with jax.named_scope("B"):
            return outputs, f.backward(behind, residuals, dy, daux)

    def on_devices(function):
        def one(*args):
            return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

        return jax.shard_map(one, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), axis_names=set(AXES))

    def spread(a):
        return jax.ShapeDtypeStruct((mesh.size, *a.shape), a.dtype, sharding=NamedSharding(mesh, P(AXES)))

    found = []
    jax.eval_shape(on_devices(traced), *jax.tree.map(spread, (params, x)))
    arguments = jax.tree.map(spread, (params, x, params, list(found[0].residuals), x))
    return jax.jit(on_devices(cell), compiler_options=GPU_OPTIONS).lower(*arguments).compile()


def local(config, variable):
    """The shape that a weight has on a device of a step with ZeRO-1."""
    shape, metadata = variable.get_value().shape, variable.get_metadata()
    if metadata.get("spec", P(None))[0] == "expert":
        shape = (shape[0] // config.expert, *shape[1:])
    dtype = jnp.bfloat16 if metadata.get("gather") == "compute" else jnp.float32
    return variable.replace(jax.ShapeDtypeStruct(shape, dtype))


def exchanges(cell):
    """The all-to-alls of both sides' first rounds; the loops of later rounds have one side's only."""
    found = [flight for flight in flights(cell.as_text()) if flight.kind == "all-to-all"]
    sides = {f.computation: {g.side for g in found if g.computation == f.computation} for f in found}
    return [flight for flight in found if sides[flight.computation] == {"F", "B"}]


@pytest.mark.hopper
@pytest.mark.parametrize("nodes", [1, 2], ids=["one hop", "two hops"])
def test_woven_all_to_alls_are_all_hidden(nodes, no_cache):
    found = exchanges(compiled_cell(nodes, woven=True))
    # the rows and what is sent with them, there; the rows, back
    assert Counter(f.side for f in found) == {"F": 3 * nodes, "B": 3 * nodes}
    assert [f for f in found if f.state != "hidden" or f.hiding_flops < LEAST] == [], table_of_flights(found)


@pytest.mark.hopper
@pytest.mark.parametrize("nodes", [1, 2], ids=["one hop", "two hops"])
def test_without_weaving_some_are_exposed(nodes, no_cache):
    found = exchanges(compiled_cell(nodes, woven=False))
    assert len(found) == 6 * nodes
    assert any(f.state != "hidden" for f in found), table_of_flights(found)


def compiled_pipeline(ranks, microbatches):
    """DualPipe with two small layers a stage, as XLA compiles it."""
    table, dim = build(dualpipe(ranks, microbatches)), 1024
    mesh = make_mesh(MeshConfig(pipe=ranks, data=1), list(h200_devices(ranks)))

    def layer(weights, given):
        x, _ = given
        return x + jnp.tanh(x @ weights.astype(x.dtype)), jnp.zeros(())

    def leave(extras, guests, y, microbatch):
        loss = y.astype(jnp.float32).sum()
        return loss, loss

    def local(stack, x):
        stack, x = jax.tree.map(lambda a: vary_over(a, AXES), (stack, x))
        rows = jax.tree.map(lambda column: jnp.asarray(column)[:, jax.lax.axis_index("pipe")], table.rows)
        work = Work(layer, lambda m: None, lambda extras, m: x, leave, vary_over(jnp.ones(()), AXES), (2,) * ranks)
        return jax.lax.psum(run(table, rows, Cells(table, work, stack, x, x)).dstack, AXES)

    shapes = (4, dim, dim), (2048, dim)
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for shape in shapes]
    step = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=set(AXES))
    return jax.jit(step, compiler_options=GPU_OPTIONS).lower(*given).compile(), table, 2 * 2048 * dim * dim


@pytest.mark.hopper
def test_sends_of_the_steady_state_hide_behind_weight_gradients(no_cache):
    compiled, table, product = compiled_pipeline(8, 32)
    found = [f for f in flights(compiled.as_text()) if f.kind == "collective-permute"]
    hidden = [f for f in found if f.state == "hidden"]
    assert len(hidden) == 2 and len(found) > 2, table_of_flights(found)
    assert all(f.flops == {"W": product} for f in hidden), table_of_flights(found)
    # those are the two transfers with which most of the joined cells end
    joined = table.rows.cell == table.kinds.index(("F", "B"))
    cells = sorted((int(joined[table.transfer == index].sum()) for index in range(len(table.transfers))), reverse=True)
    assert sum(cells[:2]) > 0.75 * joined.sum()
