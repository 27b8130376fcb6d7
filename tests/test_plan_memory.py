"""The estimate of memory against XLA's own count for small compiled steps, and its parts by arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moejax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
)
from moejax.mesh import resolve
from moejax.plan.compile import compile_step
from moejax.plan.liveness import peak
from moejax.plan.memory import memory
from moejax.plan.traced import Shapes, layer_functions

ONE, TWO = MeshConfig(data=1), PipelineConfig(microbatches=2)


def run_of(mesh, pipeline=TWO, layers=18, rows=16, moments="fp32"):
    """Long enough and deep enough that what is kept for the backward pass outweighs how XLA packs small arrays."""
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        num_layers=layers + 2,
        num_dense_layers=2,
        dense_width=256,
        attention=AttentionConfig(
            num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32, block=128
        ),
        moe=MoEConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2, expert_width=128),
        loss_chunk=256,  # four chunks: XLA for CPUs computes both of two at one time
    )
    config = RunConfig(
        steps=1,
        precision="fp32",
        model=model,
        optimizer=OptimizerConfig(moments=moments),
        pipeline=pipeline,
        mesh=dataclasses.replace(mesh, exchange_slack=8.0),
        data=DataConfig(sequence_length=256, batch_size=rows, virtual_shards=2),
    )
    return resolve(config, mesh.pipe * mesh.batch_shards)


@pytest.mark.parametrize(
    ("mesh", "pipeline", "layers"),
    [
        (MeshConfig(data=2, expert=2), TWO, 18),
        pytest.param(MeshConfig(data=2, expert=2, sharding="fsdp"), TWO, 18, marks=pytest.mark.slow),
        pytest.param(
            MeshConfig(pipe=2, data=2, expert=2),
            PipelineConfig(schedule="one_f_one_b", microbatches=4),
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MeshConfig(pipe=2, data=1, expert=2),
            PipelineConfig(schedule="zb1p", microbatches=4),
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MeshConfig(pipe=2, data=1, expert=2),
            PipelineConfig(microbatches=4, layers=(4, 4)),
            8,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ZeRO-1", "FSDP", "1F1B", "ZB1P", "DualPipe"],
)
def test_estimate_is_within_10_percent_of_xla(mesh, pipeline, layers):
    config = run_of(mesh, pipeline, layers, rows=32 if mesh.pipe > 1 else 16)
    parts = [part for part in memory(config, "cpu") if part.rank == 0]
    compiled = compile_step(config, "cpu", {"xla_backend_optimization_level": 0})
    given = {"parameters", "optimizer", "batch"}
    assert sum(part.bytes for part in parts if part.name in given) == pytest.approx(compiled.argument_bytes, rel=1e-3)
    estimated = {part.name: part.bytes for part in parts}
    assert sum(estimated.values()) == pytest.approx(compiled.bytes, rel=0.1), estimated


# ------------------------------------------------------------------------------------------------------------ the parts


def by_name(config, rank=0):
    return {part.name: part for part in memory(config) if part.rank == rank}


def test_every_rank_allocates_the_same_and_fills_what_it_has():
    pipeline = PipelineConfig(schedule="one_f_one_b", microbatches=8, layers=(1, 2, 2, 2))
    ranks = [by_name(run_of(MeshConfig(pipe=4, data=1), pipeline, 7), rank) for rank in range(4)]
    assert all({n: p.bytes for n, p in rank.items()} == {n: p.bytes for n, p in ranks[0].items()} for rank in ranks)
    assert all(0 < part.used <= part.bytes for rank in ranks for part in rank.values())
    filled = [rank["activations"].used / rank["activations"].bytes for rank in ranks]
    # in 1F1B as many micro-batches are in flight as there are ranks from this one on; the first has half of the layers
    assert filled == pytest.approx([4 / 4 * 1 / 2, 3 / 4, 2 / 4, 1 / 4])


def test_dualpipe_has_a_second_copy_and_twice_the_gradients_of_layers():
    line, dual = (
        by_name(run_of(MeshConfig(pipe=2, data=2), PipelineConfig(schedule=name, microbatches=4, layers=(4, 4)), 8))
        for name in ("one_f_one_b", "dualpipe")
    )
    copy = dual["second copy"].bytes
    assert "second copy" not in line
    assert dual["gradients"].bytes == line["gradients"].bytes + copy
    assert dual["parameters"].bytes == line["parameters"].bytes


def test_state_is_cut_over_the_shards_and_moments_have_their_dtype():
    whole, cut = (by_name(run_of(mesh)) for mesh in (ONE, MeshConfig(data=4)))
    assert whole["parameters"].bytes == pytest.approx(4 * cut["parameters"].bytes, rel=1e-3)  # biases are not cut
    halved = by_name(run_of(ONE, moments="bf16"))
    assert halved["optimizer"].bytes == pytest.approx(whole["optimizer"].bytes / 2, rel=1e-3)


def test_layers_are_traced_once_for_all_lengths_of_the_pipeline():
    """Here the last stage has a place for MTP's block on 4 and on 8 ranks; on 2 it has none."""
    shapes = {Shapes.of(run_of(MeshConfig(pipe=p, data=2), PipelineConfig(microbatches=8))) for p in (4, 8)}
    assert len(shapes) == 1
    (only,) = shapes
    assert layer_functions(only) is layer_functions(only)


# ------------------------------------------------------------------------------------------------------------- liveness

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
SIZE = 4 * 64


@pytest.mark.parametrize(
    ("function", "count", "arrays"),
    [
        (lambda x: jnp.tanh(x) * 2 + 1, 0, 1),
        (lambda x: (x @ x) @ x, 0, 2),
        (lambda x: ((x @ x) @ x) @ x, 0, 2),
        (lambda x: (x @ x, x @ x), 0, 2),
        (lambda x: jnp.tanh(x) @ jnp.sin(x), 0, 3),
        (lambda x: jnp.tanh(x).T @ jnp.tanh(x), 1, 1),
        (lambda x: lax.fori_loop(0, 4, lambda i, y: y + 1, x @ x), 0, 1),
        (lambda x: lax.fori_loop(0, 4, lambda i, y: y + y @ y, x @ x), 0, 2),
        (lambda x: lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ (y @ y), x @ x), 0, 3),
        (lambda x: lax.scan(lambda y, _: (y @ y, y), x, None, length=3)[1], 0, 5),
        (jax.jit(lambda x: x @ x), 0, 1),
    ],
    ids=[
        "what fuses has one result",
        "one product after another",
        "and another in the first one's place",
        "two results",
        "what products read",
        "what follows from weights costs nothing",
        "a loop in place",
        "a loop that computes beside its carry",
        "a loop of any length",
        "a stack of results, and the carry twice",
        "a call",
    ],
)
def test_peak_of_small_programs(function, count, arrays):
    """Arrays beside the argument; loop counters have 4 bytes each."""
    assert peak(jax.make_jaxpr(function)(X), count).bytes // SIZE == arrays


def test_what_is_exchanged_is_told_apart():
    def body(x):
        return lax.all_to_all(jnp.tanh(x), "i", 0, 0, tiled=True) @ x

    found = peak(jax.make_jaxpr(body, axis_env=[("i", 2)])(X))
    assert (found.bytes, found.exchanged) == (2 * SIZE, 2 * SIZE)
