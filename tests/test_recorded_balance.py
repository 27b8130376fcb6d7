"""What a run records of its router: the entropy of the load, and the biases beside the load of every expert."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from moejax.config import MeshConfig, PipelineConfig
from moejax.pipeline.layout import lay_out
from moejax.train.balance import load_entropy, relative_load
from moejax.train.record import biases_in_order

COUNTS = [[4, 4, 4, 4], [8, 8, 0, 0], [16, 0, 0, 0], [1, 2, 3, 10]]


def lines(folder, name):
    with open(Path(folder) / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def entropy(row):
    return -sum(n / sum(row) * math.log(n / sum(row)) for n in row if n)


def test_entropy_of_the_load_is_that_of_the_shares_of_tokens():
    want = [entropy(row) for row in COUNTS]
    np.testing.assert_allclose(load_entropy(relative_load(COUNTS)), want, atol=1e-15)
    np.testing.assert_allclose(want[:3], [math.log(4), math.log(2), 0])


def test_a_run_records_the_biases_that_its_loads_make(run_config, change):
    """Section 2.1.2: after each step the bias falls by gamma where the expert had too many tokens, else rises."""
    gamma = 0.01
    phases = (moejax.Phase(until=1.0, value=gamma),)
    config = change(change(run_config, "log.pictures_every", 1), "schedule.bias_update_speed", phases)
    moejax.train(change(config, "steps", 3), devices=jax.devices()[:1])
    records, metrics = lines(config.folder, "expert_load"), lines(config.folder, "metrics")
    want = 0.0
    for record, line in zip(records, metrics, strict=False):  # the last step's record comes twice
        load = np.array(record["load"])
        assert load.shape == (3, 8)  # two MoE layers and an MTP module
        want = want + gamma * np.sign(1 - load)
        np.testing.assert_allclose(record["bias"], want, atol=1e-6)
        np.testing.assert_allclose(line["load_entropy"], [entropy(row) for row in load], atol=1e-2)
    assert np.abs(want).max() > 2 * gamma


def test_a_gate_without_biases_records_none(run_config):
    assert biases_in_order(run_config, {}) is None


def test_biases_of_a_pipeline_are_in_the_order_of_the_layers(run_config, change):
    model = change(run_config.model, "num_layers", 6)  # 5 MoE layers on 2 stages: one place stays empty
    config = change(change(run_config, "model", model), "mesh", MeshConfig(pipe=2, data=1))
    config = change(config, "pipeline", PipelineConfig(schedule="zb1p", microbatches=2))
    slots = lay_out(config).layer_of_slot
    assert -1 in slots and slots != tuple(sorted(slots))
    stacked, mtp = jnp.array(slots)[:, None] * jnp.ones(8), jnp.full((1, 8), 99.0)
    found = biases_in_order(config, {"moe_blocks": stacked, "mtp": mtp})
    np.testing.assert_array_equal(found, np.repeat([[0], [1], [2], [3], [4], [99]], 8, axis=1))
