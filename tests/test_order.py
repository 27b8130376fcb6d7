"""Collectives of a step in several processes on CPUs: data flows between any two of them, so they keep their order."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from moejax.config import MeshConfig, PipelineConfig
from moejax.data.batches import Batch
from moejax.mesh import make_mesh, resolve
from moejax.ops import order
from moejax.plan.collectives import KINDS, computations
from moejax.train.state import abstract_state
from moejax.train.step import StepSettings, make_train_step, place

OPERATION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)")
COLLECTIVE = re.compile(rf" (?:{'|'.join(KINDS)})(?:-start)?\(")


def without_order(hlo):
    """Pairs of operations of one computation that are, or contain, collectives, and do not wait for each other."""
    parts = computations(hlo)
    names = {name: [set(re.findall(r"%([\w.\-]+)", line)) for line in lines] for name, lines in parts.items()}
    sends = {name for name, lines in parts.items() if any(map(COLLECTIVE.search, lines))}
    while True:
        more = {name for name, lines in names.items() if set().union(*lines) & sends} - sends
        if not more:
            break
        sends |= more
    found = []
    for lines in parts.values():
        before, sending = {}, []
        for name, rest in (match.groups() for match in map(OPERATION.match, lines) if match):
            operands = set(re.findall(r"%([\w.\-]+)", rest.split("metadata=")[0]))
            before[name] = set().union(*({o} | before[o] for o in operands if o in before))
            if COLLECTIVE.search(rest) or operands & sends:
                sending.append(name)
        found += [(a, b) for a, b in itertools.combinations(sending, 2) if a not in before[b]]
    return found


def compiled_step(config, sharding):
    sizes = {"replica": 2, "data": 1} if sharding == "hsdp" else {"data": 2}
    mesh_config = MeshConfig(expert=2, sharding=sharding, **sizes)
    data = dataclasses.replace(config.data, train=(), batch_size=8)
    config = resolve(
        dataclasses.replace(config, mesh=mesh_config, data=data, pipeline=PipelineConfig(microbatches=2)), 4
    )
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    shape = data.batch_size, data.sequence_length + 1
    batch = place(Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, bool))), mesh)
    settings = StepSettings(*[np.float32(1)] * 3)
    return make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, settings).compile().as_text()


@pytest.mark.parametrize("sharding", ["zero1", "fsdp", "hsdp"])
def test_collectives_of_several_processes_have_one_order(run_config, sharding, monkeypatch):
    monkeypatch.setattr(order, "is_needed", lambda: True)
    assert without_order(compiled_step(run_config, sharding)) == []


def test_collectives_of_one_process_have_none(run_config):
    assert without_order(compiled_step(run_config, "fsdp"))
