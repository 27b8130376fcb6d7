"""Whole training steps, with the kernels that a GPU would run, compiled for an H200 that need not be there."""

import math
import re
from collections import Counter

import pytest

from moejax import load_config
from moejax.mesh import AXES, resolve
from moejax.plan.compile import traced_step
from moejax.plan.hopper import h200_devices

GB = 1e9


def lowered_step(config):
    """The step of a run, as XLA gets it."""
    devices = math.prod(max(getattr(config.mesh, axis), 1) for axis in AXES)
    return traced_step(resolve(config, devices), list(h200_devices(devices))).lower()


def products(lowered):
    """Dims of the operands and the result of each product, before XLA cuts sums into parts of its own."""
    lines = [line.rsplit(" : ", 1)[-1] for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    return [[tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([\w]+)>", line)] for line in lines]


def require_no_dense_grouped_product(lowered, experts):
    """That no product has all experts of a device as a batch dim."""
    found = products(lowered)
    assert len(found) > 10
    assert not [one for one in found if any(len(dims) > 2 and dims[0] == experts for dims in one)]


def held(step):
    """Bytes of a device: the state, the batch, and what the step needs."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.hopper
@pytest.mark.parametrize(("precision", "kernels"), [("bf16", 12), ("fp8", 200)])
def test_small_moe_fits_and_has_no_dense_grouped_product(precision, kernels, no_cache):
    """Six grouped products for the stack of MoE blocks and six for the MTP module; in FP8 all layers and quantisers."""
    config = load_config("configs/small_moe.py", ["--precision", precision])
    lowered = lowered_step(config)
    assert "ragged_dot" not in lowered.as_text()
    require_no_dense_grouped_product(lowered, config.model.moe.num_experts)
    step = lowered.compile()
    assert held(step) < 80 * GB
    text = step.as_text()
    assert len(re.findall('custom_call_target="triton_kernel_call', text)) >= kernels
    attention = Counter(re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text))
    assert attention == {"Softmax": 3, "SoftmaxBackward": 3}  # of dense layers, MoE layers and the MTP module


@pytest.mark.hopper
def test_a_stage_of_v3_fits_and_has_no_dense_grouped_product(no_cache):
    """Four MoE layers, as most ranks of 16 have, on 64 H200s in 8 nodes: 4 experts each, tokens in two hops, FP8."""
    words = """--precision fp8 --model.num-layers 4 --model.num-dense-layers 0 --model.mtp.depth 0
        --schedule.ramp-start None --mesh.expert 64 --mesh.expert-nodes 8 --data.batch-size 256
        --pipeline.microbatches 4"""
    config = load_config("configs/deepseek_v3.py", words.split())
    lowered = lowered_step(config)
    assert "ragged_dot" not in lowered.as_text()
    require_no_dense_grouped_product(lowered, config.model.moe.num_experts // config.mesh.expert)
    step = lowered.compile()
    assert held(step) < 80 * GB
    assert len(re.findall('custom_call_target="triton_kernel_call', step.as_text())) > 50
