"""Placement of experts: the published example, what holds for any load, and a layer with replicated experts."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_experts import every_expert_for_every_token, layer

from moejax.cli import main
from moejax.config import ConfigError, MeshConfig, MoEConfig
from moejax.mesh import BATCH_AXES, make_mesh
from moejax.ops.hops import plan_exchange
from moejax.ops.placement import gpu_load, laid_out, placement_of, plain_placement, rebalance_experts, to_replicas
from moejax.ops.rounds import exchanged_swiglu

# the example of EPLB's README, and its answer; the last line is one layer of it without groups and nodes
LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)
HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]


def test_the_published_example():
    placement = rebalance_experts(LOAD, num_physical=16, num_groups=4, num_nodes=2, num_gpus=8)
    np.testing.assert_array_equal(placement.logical, HIERARCHICAL)
    np.testing.assert_array_equal(placement.count[0], np.bincount(HIERARCHICAL[0]))
    np.testing.assert_array_equal(placement.physical[0, [4, 7]], [[5, 7], [3, -1]])


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (3, 2)], ids=["one group", "groups that do not divide"])
def test_without_groups_all_gpus_are_balanced_together(groups, nodes):
    placement = rebalance_experts(LOAD[:1], num_physical=16, num_groups=groups, num_nodes=nodes, num_gpus=8)
    np.testing.assert_array_equal(placement.logical, [GLOBAL])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_expert_has_a_place_and_every_gpu_as_many(data):
    nodes, gpus_each, groups_each, size = (data.draw(st.integers(1, n)) for n in (3, 3, 2, 4))
    groups, gpus = nodes * groups_each, nodes * gpus_each
    experts = groups * size
    physical = -(-experts // gpus) * gpus + gpus * data.draw(st.integers(0, 2))
    numbers = st.lists(st.floats(0, 100), min_size=experts, max_size=experts)
    load = np.array([data.draw(numbers)])
    placement = rebalance_experts(load, physical, groups, nodes, gpus)
    assert placement.logical.shape == (1, physical)
    assert placement.count.min() >= 1 and placement.count.sum() == physical
    for expert in range(experts):
        own = placement.physical[0, expert, : placement.count[0, expert]]
        assert (placement.logical[0, own] == expert).all()
    node_of_group = placement.logical.reshape(nodes, -1) // size
    assert sum(len(set(row)) for row in node_of_group) == groups  # each on one node
    np.testing.assert_allclose(gpu_load(load, placement, gpus).sum(), load.sum(), rtol=1e-12, atol=1e-12)


def test_load_of_gpus_is_that_of_their_replicas():
    """3 experts in 4 places on 2 GPUs: expert 0 twice."""
    placement = placement_of(np.array([[0, 1, 0, 2]]), 3)
    np.testing.assert_allclose(gpu_load(np.array([[10.0, 3.0, 1.0]]), placement, 2), [[8, 6]])
    np.testing.assert_allclose(gpu_load(LOAD, plain_placement(2, 12), 3).sum(1), LOAD.sum(1))


def test_tokens_are_spread_over_replicas():
    placement = rebalance_experts(LOAD[:1], 16, 4, 2, 8)
    ids = np.array([[4, 7], [4, -1], [4, 10], [1, 4]])
    places = to_replicas(ids, placement.physical[0], placement.count[0])
    np.testing.assert_array_equal(places, [[5, 3], [7, -1], [5, 8], [15, 5 if 3 % 2 == 0 else 7]])
    present = ids >= 0
    np.testing.assert_array_equal(placement.logical[0, places[present]], ids[present])


@pytest.mark.parametrize("slack", [1.25, 0.1], ids=["slots suffice", "several rounds"])
def test_a_layer_with_replicas_gives_what_the_plain_one_does(slack):
    """12 experts in 16 places on 4 devices; no token is dropped."""
    tokens, cfg = 128, MoEConfig(num_experts=16, num_groups=1, top_groups=1, top_k=3)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, 12)) - (np.arange(12) == 5), axis=1)[:, :3].astype(np.int32)
    x, weights, gate_up, down = layer(ids, 12)
    placement = rebalance_experts(np.bincount(ids.ravel(), minlength=12)[None].astype(float), 16, 1, 1, 4)
    assert placement.count[0, 5] > 1
    exchange = plan_exchange(cfg, tokens // 4, 4, slack=slack)
    mesh, rows, shares = make_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4]), P(BATCH_AXES), P("expert")
    tables = jnp.asarray(placement.physical[0]), jnp.asarray(placement.count[0])

    def one(x, weights, ids, gate_up, down):
        y, rounds = exchanged_swiglu(x, weights, to_replicas(ids, *tables), gate_up, down, exchange)
        return y, jax.lax.pmax(rounds, BATCH_AXES)

    run = jax.shard_map(one, mesh=mesh, in_specs=(rows, rows, rows, shares, shares), out_specs=(rows, P()))
    placed = [laid_out(w, placement.logical[0]) for w in (gate_up, down)]
    inputs = [jax.device_put(a, NamedSharding(mesh, rows)) for a in (x, weights, ids)]
    inputs += [jax.device_put(w, NamedSharding(mesh, shares)) for w in placed]
    y, rounds = jax.jit(run)(*inputs)
    want = every_expert_for_every_token(ids, x, weights, gate_up, down)
    np.testing.assert_allclose(y, want, rtol=0, atol=4e-6 * float(jnp.abs(want).max()))
    assert (int(rounds[0]) > 1) == (slack < 1)


@pytest.fixture
def run(run_config, tmp_path):
    """The folder of a run that recorded the loads of two layers and an MTP module's, of 8 experts each."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(run_config.to_json())
    old, new = np.ones((3, 8)), np.array([[4, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [2, 2, 1, 1, 1, 1, 0, 0]])
    lines = [{"step": step, "load": load.tolist()} for step, load in ((1, 9 * old), (2, new), (3, new))]
    (tmp_path / "run" / "expert_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


def test_the_command_says_what_the_fullest_gpu_gains(run, capsys):
    """8 experts and 4 more places on 4 GPUs. Plain: experts 0 and 1 make 5 of 8, 2 of 8 and 4 of 8."""
    words = ["placement", str(run), "--gpus", "4", "--redundant", "4", "--last", "2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["plain"], [2.5, 1, 2])
    load = np.array([[4, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [2, 2, 1, 1, 1, 1, 0, 0]], float)
    assert (np.array(found["placed"]) <= found["plain"]).all() and found["placed"][0] < 1.5
    for layer_load, row, most in zip(load, found["placement"], found["placed"], strict=True):
        each = layer_load / np.bincount(row, minlength=8)
        np.testing.assert_allclose(each[row].reshape(4, 3).sum(1).max() / 2, most)
    assert found["layers"] == [1, 2, 3] and found["places_per_gpu"] == 3
    assert main(words) == 0
    assert re.search(r"mean of the layers 1\.833 plain, 1\.\d+ placed: [\d.]+% less load", capsys.readouterr().out)
    assert main(["placement", str(run), "--gpus", "3", "--redundant", "1"]) == 0
    assert "a plain placement needs GPUs that divide the experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--gpus", "4", "--redundant", "3"],
            "--redundant=3: wanted so many that they and the 8 experts are a multiple",
        ),
        (["--gpus", "4", "--nodes", "3"], "--nodes=3: wanted a divisor of num_gpus=4"),
        (["--gpus", "0"], "--gpus=0: wanted a number above 0"),
        (["--gpus", "4", "--last", "0"], "--last=0"),
        ([], "--gpus"),
    ],
    ids=["places", "nodes", "no GPUs", "no records", "GPUs not said"],
)
def test_bad_input_is_one_line(run, capsys, words, line):
    assert main(["placement", str(run), *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said, said


def test_a_run_without_records_is_named(run, capsys):
    (run / "expert_load.jsonl").write_text("")
    assert main(["placement", str(run), "--gpus", "4"]) == 2
    assert "a run that has recorded loads" in capsys.readouterr().err
    (run / "expert_load.jsonl").unlink()
    assert main(["placement", str(run), "--gpus", "4"]) == 2
    assert "expert_load.jsonl that can be read" in capsys.readouterr().err


def test_an_expert_without_a_place_is_named():
    with pytest.raises(ConfigError, match="expert 2"):
        placement_of(np.array([[0, 1, 1]]), 3)
