"""`moejax show`: the arrays of a training state on meshes that need not exist."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import cli
from moejax.config import ConfigError, MeshConfig
from moejax.config_source import load_config
from moejax.mesh import make_mesh, resolve
from moejax.model.count import abstract_model, num_parameters
from moejax.plan.arrays import as_json, stage_rows, state_arrays
from moejax.train.state import new_state

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_whole_of_v3_is_cut_into_128(capsys):
    words = ["show", str(CONFIGS / "deepseek_v3.py"), "--mesh.data", "2", "--mesh.expert", "64", "--json"]
    assert cli.main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    config = load_config(CONFIGS / "deepseek_v3.py")
    rows, biases = shown["arrays"], 59 * 256 * 4  # 58 MoE layers and the MTP module
    parameters = num_parameters(abstract_model(config.model)) - biases // 4
    assert sum(row["bytes"] for row in rows if row["part"] == "params") == 4 * parameters
    assert sum(row["bytes"] for row in rows if row["part"] == "opt_state") == 2 * 2 * parameters + 4  # moments in BF16
    assert shown["bytes"] == 8 * parameters + biases + 8
    assert shown["bytes_per_device"] == 8 * parameters // 128 + biases + 8  # all but the biases and two counts
    (experts,) = (row for row in rows if row["name"] == "moe_blocks.ffn.gate_up_EDG" and row["part"] == "params")
    assert experts["shape"] == [58, 256, 7168, 4096] and experts["spec"] == "-, expert, data, -"


@pytest.mark.parametrize("sharding", ["zero1", "hsdp"])
def test_what_is_shown_is_what_is_made(run_config, sharding):
    mesh = MeshConfig(replica=2, data=2, expert=2, sharding=sharding)
    config = dataclasses.replace(run_config, mesh=mesh, data=dataclasses.replace(run_config.data, batch_size=8))
    rows = state_arrays(config)
    state = new_state(resolve(config, 8), make_mesh(mesh))
    assert len(rows) == len(jax.tree.leaves(state))
    for row, leaf in zip(rows, jax.tree.leaves(state), strict=True):
        assert (row.shape, row.dtype, row.bytes) == (leaf.shape, leaf.dtype.name, leaf.nbytes)
        assert row.bytes_per_device == leaf.addressable_shards[0].data.nbytes
    assert as_json(rows)["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_the_table_has_every_array_and_the_sums(capsys):
    assert cli.main(["show", str(CONFIGS / "tiny.py"), "--simulate", "8", "--mesh.expert", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = state_arrays(load_config(CONFIGS / "tiny.py", ["--mesh.expert", "4"]), 8)
    assert len([line for line in lines if line.strip()]) == len(rows) + 5  # a heading, three parts' sums and the whole
    (line,) = (line for line in lines if "params moe_blocks.ffn.gate_up_EDG" in line)
    assert line.split()[2:] == [
        "8",
        "x",
        "16",
        "x",
        "128",
        "x",
        "128",
        "float32",
        "-,",
        "expert,",
        "data,",
        "-",
        "8.389",
        "1.049",
    ]
    assert np.isclose(float(lines[-1].split()[-1]), sum(row.bytes_per_device for row in rows) / 1e6, atol=1e-3)


def test_the_stages_of_v3_are_shown_and_their_empty_places_counted(capsys):
    words = ["show", str(CONFIGS / "deepseek_v3.py"), "--mesh.pipe", "16", "--mesh.data", "2", "--mesh.expert", "64"]
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (experts,) = (
        row for row in shown["arrays"] if row["name"] == "moe_blocks.ffn.down_EFD" and row["part"] == "params"
    )
    assert experts["shape"] == [16 * 4, 256, 2048, 7168] and experts["spec"] == "pipe, expert, -, data"
    first, second, *_, last = shown["layout"]
    assert first["layers"] == "embedding, dense 0-2, MoE 3" and first["ranks"] == [0, 15]
    assert second["layers"] == "MoE 4-7" and second["ranks"] == [1, 14]
    assert last["layers"] == "MoE 60, head, MTP 61" and last["ranks"] == [0, 15] and last["share"] == 1
    assert sum(stage["moe_layers"] for stage in shown["layout"]) == 58
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["0", "0,", "15", "embedding,", "dense", "0-2,", "MoE", "3", "81.1"],
        ["1", "1,", "14", "MoE", "4-7", "81.2"],
    ]
    assert lines[17].split() == ["mean", f"{100 * np.mean([stage['share'] for stage in shown['layout']]):.1f}"]


@pytest.mark.parametrize(
    ("schedule", "ranks", "layers"),
    [
        ("one_f_one_b", [(0,), (1,)], ["embedding, dense 0, MoE 1-4", "MoE 5-8, head, MTP 9"]),
        ("dualpipe", [(0, 1), (0, 1)], ["embedding, dense 0, MoE 1-4", "MoE 5-8, head, MTP 9"]),
        (
            "dualpipe_v",
            [(0,), (1,), (1,), (0,)],
            ["embedding, dense 0, MoE 1", "MoE 2-4", "MoE 5-7", "MoE 8, head, MTP 9"],
        ),
    ],
)
def test_stages_are_run_by_the_ranks_of_the_schedule(schedule, ranks, layers):
    config = load_config(CONFIGS / "tiny.py", ["--mesh.pipe", "2", "--pipeline.schedule", schedule])
    stages = stage_rows(config)
    assert [stage.ranks for stage in stages] == ranks
    assert [stage.layers for stage in stages] == layers


def test_stages_without_layers_and_runs_without_stages_show_none(change):
    config = load_config(CONFIGS / "tiny.py", ["--mesh.pipe", "4", "--pipeline.layers", "0", "5", "0", "3"])
    config = change(change(config, "model.num_dense_layers", 0), "model.num_layers", 8)
    config = change(config, "model.mtp.depth", 0)
    assert [stage.layers for stage in stage_rows(config)] == ["embedding", "MoE 0-4", "", "MoE 5-7, head"]
    assert [stage.share for stage in stage_rows(config)][::2] == [0, 0]
    config = change(config, "mesh.pipe", 1)
    assert stage_rows(config) == [] and "layout" not in as_json(state_arrays(config), stage_rows(config))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "CONFIG='': wanted a config first: moejax show CONFIG"),
        (["--json"], "CONFIG='': wanted a config first"),
        ([str(CONFIGS / "tiny.py"), "--mesh.data", "3"], "model.hidden_size=128: wanted a multiple of the 3 shards"),
        (
            [str(CONFIGS / "tiny.py"), "--simulate", "8", "--mesh.data", "3"],
            "wanted .*mesh.data=3 .* to be the 8 devices",
        ),
    ],
    ids=["nothing", "no config", "a mesh that the model does not divide over", "another number of devices"],
)
def test_what_cannot_be_shown_is_one_line(words, line):
    with pytest.raises(ConfigError, match=line):
        cli._show(words)
