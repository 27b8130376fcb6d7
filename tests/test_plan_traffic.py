"""Estimated collectives against those that a step runs: the profiler counts executions, the program says their bytes.

All counts are integers and compare exactly. The steps that run are in float32, as XLA for CPUs widens BF16 collectives;
the bytes of BF16 and FP8 are compared with the traced passes of a layer.
"""

import dataclasses
import math
import re
from collections import Counter

import jax
import numpy as np
import pytest

from moejax.config import AttentionConfig, DataConfig, MeshConfig, ModelConfig, MoEConfig, PipelineConfig, RunConfig
from moejax.data.batches import Batch
from moejax.mesh import AXES, make_mesh, resolve
from moejax.ops.hops import plan_exchange
from moejax.plan.collectives import collectives
from moejax.plan.compile import axes_of
from moejax.plan.traced import Shapes, layer_functions
from moejax.plan.traffic import passes, transfers
from moejax.train.state import new_state
from moejax.train.step import StepSettings, make_train_step, place

MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    num_layers=6,
    num_dense_layers=2,
    dense_width=48,
    attention=AttentionConfig(num_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_dim=16, qk_rope_dim=8, v_dim=16),
    moe=MoEConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2, expert_width=16),
    init_std=0.05,
    loss_chunk=100,
)
TWO = PipelineConfig(microbatches=2)
ENOUGH = 8.0  # slots, relative to balanced routing: as many as there are tokens, so that there is one round


def run_of(mesh, pipeline=TWO, precision="fp32", **model):
    config = RunConfig(
        steps=1,
        precision=precision,
        model=dataclasses.replace(MODEL, **model),
        pipeline=pipeline,
        mesh=mesh,
        data=DataConfig(sequence_length=32, batch_size=16, virtual_shards=2),
    )
    return resolve(config, mesh.pipe * mesh.batch_shards)


def sent(config, folder):
    """Bytes that each device has after the collectives of a step, by axis and kind: a list of counters."""
    devices = config.mesh.pipe * config.mesh.batch_shards
    mesh, shape = make_mesh(config.mesh, jax.devices()[:devices]), (config.data.batch_size, 33)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = place(Batch(tokens, np.zeros(shape, np.int32), np.ones(shape, bool)), mesh)
    arguments = new_state(config, mesh), batch, StepSettings(*map(np.float32, (1e-3, 1e-3, 0.3)))
    step = make_train_step(config, mesh).lower(*arguments).compile()
    with jax.profiler.trace(folder):
        metrics = jax.block_until_ready(step(*arguments)[1])
    assert metrics.exchange_rounds == 1
    text = step.as_text()
    found = dict(zip(re.findall(NAME, text, re.MULTILINE), collectives(text), strict=True))
    (profile,) = folder.rglob("*.xplane.pb")
    lines = (line for plane in jax.profiler.ProfileData.from_file(str(profile)).planes for line in plane.lines)
    runs = [(e.name, dict(e.stats)["device_ordinal"]) for line in lines for e in line.events if e.name in found]
    totals = [Counter() for _ in range(devices)]
    for name, device in runs:
        collective = found[name]
        permutes = collective.kind == "collective-permute"
        gets = not permutes or device in {target for _, target in collective.groups}
        totals[device][axes_of(collective, config.mesh), collective.kind] += gets * collective.bytes
    return [Counter({key: size for key, size in total.items() if key[0] and size}) for total in totals]


NAME = r"^\s*(?:ROOT )?%([\w.\-]+) = .*? (?:all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\("


def assert_sent_as_estimated(config, folder):
    per_rank = config.mesh.batch_shards
    for device, counted in enumerate(sent(config, folder)):
        estimated = Counter()
        for transfer in transfers(config, device // per_rank, platform="cpu"):
            estimated[transfer.axis, transfer.kind] += transfer.bytes * transfer.times
        assert counted == estimated, f"device {device}"


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=2, expert=2, exchange_slack=ENOUGH), marks=pytest.mark.slow),
        pytest.param(
            MeshConfig(replica=2, data=2, expert=2, sharding="hsdp", exchange_slack=ENOUGH), marks=pytest.mark.slow
        ),
        pytest.param(MeshConfig(data=2, expert=2, sharding="fsdp", exchange_slack=ENOUGH), marks=pytest.mark.slow),
    ],
    ids=["ZeRO-1", "HSDP", "FSDP"],
)
def test_step_sends_what_is_estimated(mesh, tmp_path):
    assert_sent_as_estimated(run_of(mesh), tmp_path)


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        (MeshConfig(pipe=2, data=2, expert=2, exchange_slack=ENOUGH), "dualpipe"),
        pytest.param(
            MeshConfig(pipe=2, data=1, expert=4, expert_nodes=2, sharding="fsdp", exchange_slack=ENOUGH),
            "zb1p",
            marks=pytest.mark.slow,
        ),
        pytest.param(MeshConfig(pipe=2, data=1, expert=2, exchange_slack=ENOUGH), "dualpipe_v", marks=pytest.mark.slow),
    ],
    ids=["DualPipe", "ZB1P with FSDP in two hops", "DualPipeV"],
)
def test_pipeline_sends_what_is_estimated(mesh, schedule, tmp_path):
    assert_sent_as_estimated(run_of(mesh, PipelineConfig(schedule=schedule, microbatches=4)), tmp_path)


@pytest.mark.slow
def test_whole_blocks_computed_again_send_again(tmp_path):
    mesh = MeshConfig(data=1, expert=4, expert_nodes=2, exchange_slack=ENOUGH)
    assert_sent_as_estimated(run_of(mesh, remat="full", num_dense_layers=1, num_layers=3), tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("nodes", [1, 2], ids=["one hop", "two hops"])
def test_layer_sends_in_the_dtype_of_the_traced_passes(precision, nodes):
    mesh = MeshConfig(pipe=2, data=2, expert=4, expert_nodes=nodes)
    config = run_of(mesh, PipelineConfig(schedule="zb1p", microbatches=2), precision=precision, hidden_size=160)
    layer = layer_functions(Shapes.of(config))
    for side, program in (("F", layer.forward_jaxpr), ("B", layer.input_jaxpr)):
        equations = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "all_to_all"]
        sizes = [math.prod(v.aval.shape) * v.aval.dtype.itemsize for eqn in equations for v in eqn.outvars]
        own = [t for t in passes(config) if (t.place, t.side, t.kind) == ("layer", side, "all-to-all")]
        assert {t.what for t in own} == {"dispatch", "combine", "choices"}
        assert sum(sizes) == sum(t.bytes * t.times for t in own)


# ---------------------------------------------------------------------------------------------------- without a program

V3 = RunConfig(
    steps=1,
    precision="fp8",
    mesh=MeshConfig(pipe=16, data=2, expert=64, expert_nodes=8),
    pipeline=PipelineConfig(microbatches=120),
)


def test_published_mesh_sends_tokens_in_fp8_to_nodes_and_on():
    """256 experts on 64 devices of 8 nodes; a row in FP8 has 7168 bytes and 56 scales, in BF16 14336."""
    far, near = plan_exchange(V3.model.moe, 4096, 64, 8, fp8=True).hops
    found = {(t.what, t.inter_node_share > 0): t for t in passes(V3) if (t.place, t.side) == ("layer", "F")}
    for hop, is_far in ((far, True), (near, False)):
        assert found["dispatch", is_far].bytes == hop.rows * (7168 + 4 * 56)
        assert found["combine", is_far].bytes == hop.rows * 2 * 7168
        assert found["dispatch", is_far].inter_node_share == (7 / 8 if is_far else 0)


@pytest.mark.parametrize(
    ("rank", "passes_of"),
    [(0, {"enter": 60, "leave": 60}), (7, {}), (15, {"enter": 60, "leave": 60})],
    ids=["first", "middle", "last"],
)
def test_both_ends_of_dualpipe_run_the_first_and_the_last_stage(rank, passes_of):
    own = transfers(V3, rank)
    assert {t.place for t in own} - {"step", "layer", "stages"} == passes_of.keys()
    assert all(t.times % 60 == 0 for t in own if t.place in passes_of)
    (outputs,) = [t for t in own if t.what == "stage outputs"]
    assert outputs.times == (120 if rank == 7 else 60)
    assert outputs.bytes == 4096 * 7168 * 2
    assert outputs.inter_node_share == 1


def test_gpus_gather_for_every_microbatch_what_cpus_gather_once():
    """MTP's join with the norms; not two dense layers, on three ways, of which one needs the last's last product not.

    CPUs may take that way's gathers and those of the next for one.
    """
    config = run_of(MeshConfig(pipe=2, data=2), PipelineConfig(microbatches=4))
    gpu, cpu = (
        {(t.place, t.side, t.times) for t in passes(config, platform=name) if (t.what, t.axis) == ("weights", "data")}
        for name in ("gpu", "cpu")
    )
    always = {("step", "", 1), ("enter", "F", 2), ("enter", "B", 2)}
    assert gpu == always | {("enter", "B", 1), ("leave", "B", 1)}
    assert cpu | {("enter", "B", 1)} == always | {("enter", "B", 1)}


def test_more_layers_than_a_few_are_gathered_once_more_on_each_way():
    config = run_of(MeshConfig(pipe=2, data=2), PipelineConfig(microbatches=4), num_dense_layers=5, num_layers=9)
    own = [t for t in passes(config) if (t.place, t.what, t.axis) == ("enter", "weights", "data")]
    assert {t.times for t in own} == {6}


def test_the_block_of_mtp_is_gathered_with_the_layers_of_the_last_stage():
    """For each micro-batch are left the joining product in BF16, and the scales of four norms."""
    sizes = {t.what: t.bytes * t.times for t in passes(V3) if t.place == "leave" and t.kind == "all-gather"}
    assert sizes["weights"] == 2 * 2 * 7168**2 + 4 * 4 * 7168
    without = dataclasses.replace(V3, pipeline=dataclasses.replace(V3.pipeline, layers=(2, *[4] * 10, *[3] * 4, 4)))
    assert sum(t.bytes for t in passes(without) if (t.place, t.what) == ("leave", "weights")) > 1e9


def test_one_device_sends_nothing():
    assert transfers(resolve(dataclasses.replace(V3, mesh=MeshConfig()), 1)) == []


def test_axes_are_those_longer_than_1():
    axes = {t.axis for t in passes(V3)}
    assert axes == {"pipe", "expert", "data", "data x expert", "pipe x data x expert"}
    assert all(set(axis.split(" x ")) <= set(AXES) for axis in axes)
