"""Whole training steps, with the kernels that a GPU would run, compiled for an H200 that need not be there."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import load_config
from moejax.data.batches import Batch
from moejax.mesh import BATCH_AXES, make_mesh, resolve
from moejax.plan.hopper import h200_devices
from moejax.train.state import abstract_state
from moejax.train.step import StepSettings, make_train_step

GB = 1e9


def lowered_step(config):
    """The step of a run on one device, as XLA gets it."""
    config = resolve(config, 1)
    mesh = make_mesh(config.mesh, list(h200_devices(1)))
    shape, rows = (config.data.batch_size, config.data.sequence_length + 1), NamedSharding(mesh, P(BATCH_AXES))
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.int32, jnp.bool_)))
    settings = StepSettings(*map(np.float32, (1e-3, 1e-3, 0.3)))
    return make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, settings)


def products(lowered):
    """Dims of the operands and the result of each product, before XLA cuts sums into parts of its own."""
    lines = [line.rsplit(" : ", 1)[-1] for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    return [[tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([\w]+)>", line)] for line in lines]


@pytest.mark.hopper
@pytest.mark.parametrize(("precision", "kernels"), [("bf16", 12), ("fp8", 200)])
def test_small_moe_fits_and_has_no_dense_grouped_product(precision, kernels, no_cache):
    """Six grouped products for the stack of MoE blocks and six for the MTP module; in FP8 all layers and quantisers."""
    config = load_config("configs/small_moe.py", ["--precision", precision])
    lowered = lowered_step(config)
    assert "ragged_dot" not in lowered.as_text()
    found = products(lowered)
    assert len(found) > 10
    assert not [one for one in found if any(len(dims) > 2 and dims[0] == config.model.moe.num_experts for dims in one)]
    step = lowered.compile()
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 80 * GB
    text = step.as_text()
    assert len(re.findall('custom_call_target="triton_kernel_call', text)) >= kernels
    attention = Counter(re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text))
    assert attention == {"Softmax": 3, "SoftmaxBackward": 3}  # of dense layers, MoE layers and the MTP module
