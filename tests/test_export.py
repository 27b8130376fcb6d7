"""`moejax checkpoints RUN export`: Hugging Face folders of checkpoints, written array by array."""

import dataclasses
import json
import re
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from moejax.checkpoint.manager import Checkpoints
from moejax.checkpoint.stored import OpenArray
from moejax.cli import main
from moejax.config import DataConfig, MeshConfig, PipelineConfig
from moejax.data.tokens import train_tokenizer
from moejax.mesh import make_mesh
from moejax.serve.export import export
from moejax.serve.load import load
from moejax.train.loop import train
from moejax.train.resume import checkpoint_parts
from moejax.train.state import layer_of_slot, new_state

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def run(run_config, shared):
    """A run of 3 steps on one device, trained once for all tests."""
    config = dataclasses.replace(run_config, out=str(shared / "run"), steps=3)
    if not Path(config.folder).exists():
        train(config, devices=jax.devices()[:1])
    return Path(config.folder)


@pytest.fixture
def averaging(run_config, change):
    """The settings of a run on one device with 3 MoE layers that averages its weights."""
    config = change(change(run_config, "model.num_layers", 4), "optimizer.ema_decay", 0.9)
    return dataclasses.replace(config, mesh=MeshConfig(data=1))


@pytest.fixture
def untrained(averaging, shared):
    """The checkpoint of such a run, for each test its own; made once for all."""
    if not (shared / "untrained").exists():
        save(dataclasses.replace(averaging, out=str(shared / "untrained")))
    shutil.copytree(shared / "untrained", averaging.folder)
    return Path(averaging.folder) / "checkpoints" / "1"


def save(config):
    """A checkpoint of new parameters, with biases and averages that say where they belong; its folder."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.pipe * config.mesh.batch_shards])
    state, slots = new_state(config, mesh), layer_of_slot(config)

    def numbered(path, x):
        rows = np.asarray(slots if any(getattr(key, "key", None) == "moe_blocks" for key in path) else [50])
        values = np.where(rows >= 0, 10 * rows + 1, 0)[:, None] + np.arange(x.shape[1]) / 16
        return jax.device_put(values.astype(np.float32), x.sharding)

    biases = jax.tree_util.tree_map_with_path(numbered, state.router_bias)
    average = None if state.ema is None else jax.tree.map(lambda x: x / 4, state.ema)
    folder = Path(config.folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        parts = checkpoint_parts(dataclasses.replace(state, router_bias=biases, ema=average))
        checkpoints.save(1, parts, {"layer_of_slot": slots})
    (folder / "config.json").write_text(config.to_json())
    return folder / "checkpoints" / "1"


def tensors(folder):
    """Every tensor that the index names, out of the file that it names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, framework="np") as file:
            assert set(file.keys()) == {tensor for tensor, where in index["weight_map"].items() if where == name}
            found |= {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    return found


def test_an_export_is_the_model_of_the_run(run, tmp_path, capsys):
    assert main(["checkpoints", str(run), "export", "3", str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'hf'}: 135 tensors of {run / 'checkpoints' / '3'} in 1 files"
    )
    ours, theirs = load(run), load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(theirs.module), jax.tree.leaves(ours.module))
    tokens = np.random.default_rng(0).integers(264, size=(2, 24))
    np.testing.assert_array_equal(theirs.logits(tokens), ours.logits(tokens))
    assert theirs.config.mtp.depth == 1
    assert not list(tmp_path.glob(".*"))


def test_bf16_rounds_once_and_leaves_the_biases_of_routers(run, tmp_path):
    exact, rounded = tmp_path / "fp32", tmp_path / "bf16"
    export(run / "checkpoints" / "3", exact, dtype="fp32")
    assert main(["checkpoints", str(run), "export", "3", str(rounded)]) == 0
    got, want = tensors(rounded), tensors(exact)
    assert set(got) == set(want)
    for name, x in want.items():
        assert x.dtype == np.float32
        wanted = x if name.endswith(BIAS) else x.astype(ml_dtypes.bfloat16)
        assert got[name].dtype == wanted.dtype
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)
    assert any(np.any(x) for name, x in got.items() if name.endswith(BIAS))
    assert json.loads((rounded / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_pipeline_with_empty_places_exports_what_one_device_does(averaging, untrained, tmp_path, change, monkeypatch):
    """And memory holds one piece of an array at a time."""
    config = dataclasses.replace(
        change(averaging, "optimizer.ema_decay", None),
        mesh=MeshConfig(pipe=2, data=2, expert=2),
        pipeline=PipelineConfig(schedule="one_f_one_b", microbatches=2),
        out=str(tmp_path / "staged"),
    )
    assert layer_of_slot(config) in ((0, 1, 2, -1), (0, -1, 1, 2))
    read, blocks = OpenArray.read, []

    def watched(array, corner):
        assert not [shape for ref, shape in blocks if ref() is not None]
        block = read(array, corner)
        blocks.append((weakref.ref(block), block.shape))
        return block

    export(untrained, tmp_path / "one", dtype="fp32")
    monkeypatch.setattr(OpenArray, "read", watched)
    export(save(config), tmp_path / "two", dtype="fp32")
    want, got = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert set(got) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    firsts = [got[f"model.layers.{layer}.mlp.gate.{BIAS}"][0] for layer in (1, 2, 3, 4)]
    assert firsts == [1, 11, 21, 501]
    assert [shape for _, shape in blocks].count((2, 4, 32, 32)) == 4  # gate_up_EDG: of 2 stages, half of the experts


def test_small_shards_have_the_same_tensors_in_the_order_of_the_layers(run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(run / "checkpoints" / "3", whole)
    assert main(["checkpoints", str(run), "export", "3", str(cut), "--shard-size", "2e-5"]) == 0
    want, got = tensors(whole), tensors(cut)
    assert set(got) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(file, framework="np") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_the_averaged_weights(untrained, tmp_path):
    run = str(untrained.parent.parent)
    assert main(["checkpoints", run, "export", "1", str(tmp_path / "ema"), "--ema", "--dtype", "fp32"]) == 0
    export(untrained, tmp_path / "last", dtype="fp32")
    last, average = tensors(tmp_path / "last"), tensors(tmp_path / "ema")
    for name, x in last.items():
        np.testing.assert_array_equal(average[name], x if name.endswith(BIAS) else x / 4, err_msg=name)


def test_a_model_of_bytes_gets_a_tokenizer_of_bytes(untrained, tmp_path):
    export(untrained, tmp_path / "hf", dtype="fp32")
    assert load(tmp_path / "hf").generate("route", max_tokens=4) == load(untrained).generate("route", max_tokens=4)


def test_the_tokenizer_comes_along(averaging, untrained, tmp_path):
    (tmp_path / "own").mkdir()
    file, run = tmp_path / "own" / "bpe.json", untrained.parent.parent
    train_tokenizer(averaging.data.train, 264, file, DataConfig())
    (tmp_path / "own" / "tokenizer_config.json").write_text("{}")
    data = dataclasses.replace(averaging.data, tokenizer=str(file))
    (run / "config.json").write_text(dataclasses.replace(averaging, data=data).to_json())
    export(untrained, tmp_path / "hf")
    model = load(tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (model.tokenizer.begin_id, model.tokenizer.end_id)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert (tmp_path / "hf" / "tokenizer_config.json").read_text() == "{}"
    file.unlink()
    assert main(["checkpoints", str(run), "export", "1", str(tmp_path / "again")]) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["3", "RUN"], "TO=.*: wanted a place where nothing is yet"),
        (["3", "/dev/null/hf"], "TO=.*: wanted a folder that can be written"),
        (["3"], "TO=None: wanted a place"),
        (["4", "NEW"], "STEP=4: wanted a checkpoint of .*, which has 3"),
        (["3", "NEW", "--ema"], "--ema=True: wanted averaged weights"),
        (["3", "NEW", "--dtype", "fp16"], "dtype.*fp16"),
        (["3", "NEW", "--shard-size", "0"], "shard size=0"),
    ],
    ids=["something there", "cannot be written", "no place", "no such step", "no averages", "no such dtype", "no size"],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, words, line):
    places = {"RUN": str(run), "NEW": str(tmp_path / "new")}
    assert main(["checkpoints", str(run), "export", *(places.get(word, word) for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
    assert not list(tmp_path.glob("*new*"))


def test_what_is_damaged_or_of_another_model_is_refused(averaging, untrained, tmp_path, change, capsys):
    run = untrained.parent.parent
    words = ["checkpoints", str(run), "export", "1", str(tmp_path / "new")]
    for place, value, line in (
        ("model.mtp.after_final_norm", False, "model.mtp.after_final_norm=False: wanted True"),
        ("model.dense_width", 40, r"dense_blocks.ffn.gate_up_DG is \(1, 32, 96\) where .* say \(1, 32, 80\)"),
        ("model.num_layers", 5, "layer_of_slot=.*: wanted the 4 MoE layers"),
    ):
        (run / "config.json").write_text(change(averaging, place, value).to_json())
        assert main(words) == 2
        assert re.search(line, capsys.readouterr().err)
    (run / "config.json").write_text(averaging.to_json())
    (file, *_) = sorted((untrained / "model" / "d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"model/d/{file.name}" in said
    assert not list(tmp_path.glob("*new*"))
