"""`moejax import-hf` and `moejax export-hf`: weights in and out, bitwise, in BF16, FP32 and FP8."""

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
import safetensors
from safetensors.numpy import save_file
from test_export import save

import moejax
from moejax.checkpoint import piecewise
from moejax.cli import main
from moejax.config import DataConfig, MeshConfig, ModelConfig, MTPConfig
from moejax.data.tokens import train_tokenizer
from moejax.model.hf import load_hf, named_leaves, parameter_shapes, tensor_places
from moejax.model.hf_files import Tensors
from moejax.model.hf_fp8 import dequantise, in_fp8, quantise
from moejax.serve.export import export
from moejax.serve.import_hf import import_hf
from moejax.serve.load import load

E4M3 = ml_dtypes.float8_e4m3fn
LAYOUTS = {
    "v3": {},
    "v2": {"gate": "group_limited_greedy", "normalize_weights": False},
    "v2_lite": {"gate": "greedy", "num_groups": 1, "top_groups": 1, "num_shared": 2, "normalize_weights": False},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def checkpoint(run_config, shared):
    """`checkpoint("v2")`: that of a run that did no step, of a model in that layout; made once for all tests."""

    def made(layout="v3"):
        folder = shared / layout / "checkpoints" / "1"
        if folder.exists():
            return folder
        model = run_config.model
        moe = dataclasses.replace(model.moe, **LAYOUTS[layout])
        model = dataclasses.replace(model, moe=moe, unroll=2)  # of which the layout says nothing
        if layout != "v3":
            model = dataclasses.replace(model, mtp=MTPConfig(depth=0))
        if layout == "v2_lite":
            model = dataclasses.replace(model, attention=dataclasses.replace(model.attention, q_lora_rank=None))
        return save(dataclasses.replace(run_config, out=str(shared / layout), model=model, mesh=MeshConfig(data=1)))

    return made


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def naive_tensors(folder):
    """Name, type and values of all tensors; those of FP8 as bytes. Read by the library's own parser, not by ours."""
    types = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": E4M3}
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            values = np.frombuffer(bytes(tensor["data"]), types[tensor["dtype"]]).reshape(tensor["shape"])
            found[name] = values
    return found


def naive_dequantised(values, scales):
    whole = np.zeros(values.shape, np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            whole[row, column] = np.float32(values[row, column]) * scales[row // 128, column // 128]
    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_goes_out_and_in_bitwise(layout, checkpoint, tmp_path, capsys):
    """Run, export, import, run: what BF16 keeps of each weight; and an export of that has the same files."""
    run = checkpoint(layout).parent.parent
    assert main(["export-hf", str(run), str(tmp_path / "hf")]) == 0
    assert main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert main(["export-hf", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    assert main(["checkpoints", str(tmp_path / "back"), "verify"]) == 0
    assert ", whole" in capsys.readouterr().out
    here, back = load(run), load(tmp_path / "back")
    assert back.config == dataclasses.replace(
        here.config,
        attention=dataclasses.replace(here.config.attention, block=back.config.attention.block),
        remat=back.config.remat,
        unroll=back.config.unroll,
        loss_chunk=back.config.loss_chunk,
        mtp=back.config.mtp,
    )
    want, got = named_leaves(here.module), named_leaves(back.module)
    assert set(got) == set(want)
    for name, x in want.items():
        rounded = x if name.endswith("router_bias") else np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(got[name], rounded, err_msg=name)
    assert content(tmp_path / "again") == content(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["fp8", "fp32"])
def test_what_was_exported_comes_back_the_same(dtype, checkpoint, tmp_path, monkeypatch):
    """The import of an FP8 export has what its numbers stand for, and its export has the same numbers and scales."""
    monkeypatch.chdir(tmp_path)
    export(checkpoint(), Path("hf"), dtype=dtype)
    import_hf(Path("hf"), Path("back"))
    export(Path("back/checkpoints/0"), Path("again"), dtype=dtype)
    assert content(tmp_path / "again") == content(tmp_path / "hf")
    back, model = load(tmp_path / "back"), load_hf(tmp_path / "hf")[1]
    for got, want in zip(jax.tree.leaves(back.module), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(got, want)


def test_fp8_has_the_tensors_that_the_published_checkpoint_has_in_it():
    """91,991 tensors, 45,808 of them scales; only embedding, head, norms, gates and MTP's projection are wider."""
    cfg = ModelConfig()
    names = set(tensor_places(parameter_shapes(cfg), cfg))
    scaled = {name for name in names if in_fp8(name)}
    assert (len(names) + len(scaled), len(scaled)) == (91_991, 45_808)
    wide = {re.sub(r"layers\.\d+", "layers.N", name) for name in names - scaled}
    assert wide == {
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *(f"model.layers.N.{name}_layernorm.weight" for name in ("input", "post_attention")),
        *(f"model.layers.N.self_attn.{name}_a_layernorm.weight" for name in ("q", "kv")),
        *("model.layers.N.mlp.gate.weight", "model.layers.N.mlp.gate.e_score_correction_bias"),
        *(f"model.layers.N.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "embed_tokens")),
        *(f"model.layers.N.shared_head.{name}.weight" for name in ("head", "norm")),
    }


def test_fp8_is_within_the_rounding_of_its_block(checkpoint, tmp_path):
    """Half an ulp of E4M3: 2^-4 of a number, or 2^-10 of the scale where it is below the least normal number, 2^-6.

    The scale itself is rounded a few times, 2^-24 each.
    """
    export(checkpoint(), tmp_path / "fp8", dtype="fp8")
    export(checkpoint(), tmp_path / "fp32", dtype="fp32")
    exact, found = naive_tensors(tmp_path / "fp32"), naive_tensors(tmp_path / "fp8")
    scaled = [name for name in exact if f"{name}_scale_inv" in found]
    assert len(scaled) == 104
    for name in scaled:
        values, scales = found[name], found[f"{name}_scale_inv"]
        assert values.dtype == E4M3 and scales.dtype == np.float32
        error = np.abs(naive_dequantised(values, scales) - exact[name])
        assert (error <= np.maximum(np.abs(exact[name]) * (2**-4 + 2**-21), scales * 2**-10)).all(), name
    rest = set(exact) - set(scaled)
    assert all(found[name].dtype == (np.float32 if name.endswith("bias") else ml_dtypes.bfloat16) for name in rest)
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert settings["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_blocks_of_fp8_are_quantised_alone_and_keep_what_they_stand_for():
    """Edges that are no whole block, a block of zeros, one of tiny numbers, one of huge ones."""
    w = np.random.default_rng(1).normal(size=(200, 300)).astype(np.float32)
    w[:128, :128], w[:128, 128:256], w[128:, :128] = 0, w[:128, 128:256] * 1e-30, w[128:, :128] * 1e30
    values, scales = quantise(w)
    assert (values.dtype, scales.dtype, scales.shape) == (E4M3, np.float32, (2, 3))
    for row in range(2):
        for column in range(3):
            block = w[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            np.testing.assert_allclose(scales[row, column], np.abs(block).max() / 448 or 1, rtol=3 * 2**-24)
    back = dequantise(values, scales)
    np.testing.assert_array_equal(back, naive_dequantised(values, scales))
    np.testing.assert_array_equal(back[:128, :128], 0)
    again = quantise(back)
    np.testing.assert_array_equal(again[0].view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(again[1], scales)


def test_scales_come_back_for_any_largest_number():
    """448 of a scale, rounded, divided by 448 and rounded again is the scale."""
    w = np.zeros((1, 128 * 2000), np.float32)  # a block each
    w[0, ::128] = np.random.default_rng(2).uniform(1, 2, size=2000)
    values, scales = quantise(w)
    np.testing.assert_array_equal(quantise(dequantise(values, scales))[1], scales)


def test_fp8_of_others_is_read(checkpoint, tmp_path):
    """Scales that are no maximum over 448, and an FP8 weight without its scales."""
    export(checkpoint(), tmp_path / "hf", dtype="bf16")
    found = naive_tensors(tmp_path / "hf")
    name = "model.layers.1.self_attn.o_proj.weight"
    scale = np.full((1, 1), 0.0123, np.float32)
    found[name] = (found[name].astype(np.float32) / 0.0123).astype(E4M3)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    save_file({**found, f"{name}_scale_inv": scale}, tmp_path / "theirs" / "model.safetensors")
    model = load_hf(tmp_path / "theirs")[1]
    want = naive_dequantised(found[name], scale)
    np.testing.assert_array_equal(model.moe_blocks.attention.out_HD[0], want.T)
    save_file(found, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(moejax.ConfigError, match=f"1 missing: {re.escape(name)}_scale_inv"):
        load_hf(tmp_path / "theirs")


def test_memory_holds_a_piece_and_what_it_is_made_of(checkpoint, tmp_path, monkeypatch):
    export(checkpoint(), tmp_path / "hf", dtype="fp8")
    read, write = Tensors.read, piecewise.NewCheckpoint.write
    tensors, pieces, shapes = [], [], set()

    def alive(references):
        return sum(reference() is not None for reference in references)

    def watched_read(self, name):
        assert alive(tensors) <= 1 and alive(pieces) == 0  # an array of which this is a part may be begun
        values = read(self, name)
        tensors.append(weakref.ref(values))
        return values

    def watched_write(self, array, index, values):
        shapes.add(values.shape)
        write(self, array, index, values)
        pieces.append(weakref.ref(values))

    monkeypatch.setattr(piecewise, "STAGED_BYTES", 0)
    monkeypatch.setattr(Tensors, "read", watched_read)
    monkeypatch.setattr(piecewise.NewCheckpoint, "write", watched_write)
    import_hf(tmp_path / "hf", tmp_path / "run2")
    assert len(tensors) > 100
    assert (32, 32) in shapes and (264, 32) in shapes  # an expert's gate and up; the embedding
    assert max(map(np.prod, shapes)) == 264 * 32


@pytest.fixture
def imported(checkpoint, run_config, shared):
    """A run folder that was imported, with a tokenizer of its own."""
    if not (shared / "imported").exists():
        file = shared / "own" / "tokenizer.json"
        train_tokenizer(run_config.data.train, 264, file, DataConfig())
        (file.parent / "special_tokens_map.json").write_text("{}")
        run = checkpoint().parent.parent
        shutil.copytree(run, shared / "with_tokenizer")
        config = moejax.load_config(run)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file)))
        (shared / "with_tokenizer" / "config.json").write_text(config.to_json())
        export(shared / "with_tokenizer" / "checkpoints" / "1", shared / "hf", dtype="fp32")
        import_hf(shared / "hf", shared / "imported")
    return shared / "imported"


def test_a_tokenizer_comes_along(imported, shared):
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (imported / name).read_bytes() == (shared / "own" / name).read_bytes()
    assert moejax.load(imported).tokenizer.encode("route each") == load(shared / "hf").tokenizer.encode("route each")


@pytest.mark.slow
def test_a_run_starts_with_the_weights_of_an_import(imported, run_config, tmp_path):
    config = moejax.load_config(imported)
    data = dataclasses.replace(run_config.data, tokenizer=config.data.tokenizer)
    tuned = dataclasses.replace(run_config, model=config.model, data=data, steps=1, resume_from=str(imported))
    assert moejax.train(tuned, devices=jax.devices()[:1]).step == 1
    assert f"started with the weights of step 0 of {imported}" in (Path(tuned.out) / "log.txt").read_text()
    with pytest.raises(moejax.ConfigError, match="this one has imported weights"):
        moejax.train(dataclasses.replace(tuned, resume_from=None, out=str(imported)), devices=jax.devices()[:1])


def test_bad_input_is_one_line(checkpoint, tmp_path, capsys):
    run = checkpoint().parent.parent
    export(run / "checkpoints" / "1", tmp_path / "hf")
    (tmp_path / "small").mkdir()
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    found = naive_tensors(tmp_path / "hf")
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings | {"hidden_size": 16, "num_hidden_layers": 2}))
    del found["lm_head.weight"]
    save_file(found, tmp_path / "small" / "model.safetensors")
    (tmp_path / "new").mkdir()
    cases = [
        (["import-hf", "small", "out"], r"5 missing: lm_head.weight, .*; \d+ unexpected: .*; \d+ of another shape: .*"),
        (["import-hf", "hf", "new"], "TO=.*new.*: wanted a place where nothing is yet"),
        (["import-hf", "new", "out"], "checkpoint=.*new.*: wanted a folder with .safetensors files"),
        (["import-hf", "hf"], "OUT"),
        (["export-hf", "RUN", "out", "--step", "4"], "STEP=4: wanted a checkpoint of .*, which has 1"),
        (["export-hf", "RUN", "out", "--ema"], "--ema=True: wanted averaged weights"),
        (["export-hf", "nowhere", "out"], "RUN=.*nowhere.*: wanted a run folder"),
    ]
    for words, line in cases:
        command, *rest = words
        rest = [str(run) if word == "RUN" else word for word in rest]
        places = [str(tmp_path / word) if word.isalpha() else word for word in rest]
        assert main([command, *places]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert re.search(line, said), said
        assert not (tmp_path / "out").exists()


def test_a_model_for_which_bytes_do_not_do_needs_a_tokenizer(tmp_path):
    golden = Path(__file__).parent / "golden" / "v2_lite.npz"
    with np.load(golden) as file:
        (tmp_path / "config.json").write_text(str(file["config"]))
        weights = {name.removeprefix("weight:"): file[name] for name in file.files if name.startswith("weight:")}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        moejax.ConfigError, match=r"DIR=.*: wanted a folder with a tokenizer.json: .* of 50 is too small"
    ):
        import_hf(tmp_path, tmp_path / "out")
