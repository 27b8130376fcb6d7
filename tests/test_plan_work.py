"""Operations of a micro-batch, against the FLOP function and against what the traced passes keep."""

import dataclasses
from collections import Counter

import pytest

from moejax.config_source import load_config
from moejax.mesh import resolve
from moejax.model.count import forward_flops_per_token
from moejax.pipeline.layout import lay_out
from moejax.plan.memory import memory
from moejax.plan.work import block, head, kept_bytes, microbatch_tokens, mtp_module

MESH = ["--mesh.pipe", "16", "--mesh.data", "2", "--mesh.expert", "64", "--mesh.expert-nodes", "8"]
FP8, NONE = ["--precision", "fp8"], ["--model.remat", "none"]


def v3(*words):
    return resolve(load_config("configs/deepseek_v3.py", [*MESH, *words]), 2048)


def flops(operations):
    found = Counter()
    for op in operations:
        found[op.side] += op.flops
    return found


@pytest.mark.parametrize("words", [(), FP8, ["--precision", "fp32"]], ids=["bf16", "fp8", "fp32"])
def test_forward_flops_are_those_of_the_model(words):
    """The MTP module's head is a head of its own here; all sums are of whole numbers below 2^53."""
    config = v3(*words, *NONE)
    tokens, want = microbatch_tokens(config), forward_flops_per_token(config.model, 4096)
    assert tokens == 4096
    assert flops(block(config, "dense"))["F"] == tokens * want.dense_layer
    assert flops(block(config, "moe"))["F"] == tokens * want.moe_layer
    assert flops(head(config))["F"] == tokens * want.head
    assert flops(mtp_module(config))["F"] == tokens * (want.mtp - want.head)


def test_backward_of_products_is_twice_the_forward():
    operations = [op for op in block(v3(*NONE), "moe") if not op.kind.startswith("attention")]
    found = flops(operations)
    assert found["I"] == found["W"] == found["F"]


def test_what_is_computed_again():
    none, cheap, full = (flops(block(v3("--model.remat", remat), "moe")) for remat in ("none", "cheap", "full"))
    up_projections = 2 * 4096 * (1536 * 24576 + 512 * 32768)  # of queries, and of keys and values
    assert cheap["I"] - none["I"] == up_projections
    assert full["I"] - none["I"] == none["F"]
    assert none["F"] == cheap["F"] == full["F"] and none["W"] == cheap["W"] == full["W"]


def test_fp8_costs_casts_and_no_flops():
    plain, scaled = block(v3("--precision", "bf16"), "moe"), block(v3(*FP8), "moe")
    assert flops(plain) == flops(scaled)
    assert {op.name for op in scaled} - {op.name for op in plain} == {"casts to FP8"}
    kinds = {op.kind for op in scaled if op.flops} - {"fp32", "attention", "attention_backward"}
    assert kinds == {"dense_fp8", "grouped_fp8", "outer_fp8"}


def test_two_hops_move_more_rows_inside_a_device():
    def bytes_of_ways(words):
        return sum(op.bytes for op in block(v3(*words), "moe") if op.name == "rows to experts and back")

    assert bytes_of_ways([]) > bytes_of_ways(["--mesh.expert-nodes", "1"]) > 0


@pytest.mark.parametrize("remat", ["cheap", "full"])
def test_kept_bytes_are_those_of_the_traced_layer(remat, run_config, change):
    """Left out are integers, the router's numbers and scales: less than a tenth where rows are wide."""
    model = dataclasses.replace(
        run_config.model, hidden_size=512, num_dense_layers=1, num_layers=3, remat=remat, init_std=0.02
    )
    model = change(model, "moe.expert_width", 256)
    config = dataclasses.replace(run_config, model=model, precision="bf16", steps=1)
    config = change(change(config, "data.sequence_length", 256), "data.batch_size", 16)
    mesh = dataclasses.replace(config.mesh, pipe=2, data=1, expert=4, expert_nodes=2)
    pipeline = dataclasses.replace(config.pipeline, schedule="gpipe", microbatches=4)
    config = resolve(dataclasses.replace(config, mesh=mesh, pipeline=pipeline), 8)
    traced = next(part.bytes for part in memory(config) if part.name == "activations")
    want = max(lay_out(config).layers) * 4 * kept_bytes(config)  # GPipe keeps all 4 micro-batches
    assert 0.9 * traced < want <= traced
