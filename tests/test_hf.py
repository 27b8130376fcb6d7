"""Hugging Face checkpoints: the golden models of `transformers` (tools/make_golden.py), reading, writing, refusing."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import naive
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from moejax.config import ConfigError, ModelConfig, MoEConfig, MTPConfig, RunConfig, YarnConfig
from moejax.model.count import abstract_model
from moejax.model.hf import load_hf, to_hf_tensors
from moejax.model.hf_config import config_from_hf, config_to_hf, strange_to_transformers
from moejax.model.moe import RouterBias

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
FAST = {"xla_backend_optimization_level": 0}  # compiles in less time
CONFIGS = Path(__file__).parent.parent / "configs"


def golden(path):
    """config.json, tokens, logits, weights and gradients by name."""
    with np.load(path) as file:
        arrays = dict(file)
    parts = [{k.removeprefix(p): x for k, x in arrays.items() if k.startswith(p)} for p in ("weight:", "grad:")]
    weights = {name: w.astype(np.float32) for name, w in parts[0].items()}
    return json.loads(str(arrays["config"])), arrays["tokens"], arrays["logits"], weights, parts[1]


def write_folder(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_gradients_match(model, cfg, tokens, want):
    """The gradient of the mean next-token loss agrees within 1e-3 of each array's largest entry."""
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)

    def loss(params, bias, tokens):
        losses = nnx.merge(graph, params, bias).losses(tokens, jnp.ones_like(tokens, bool), None, jnp.float32)
        return losses.main / (tokens.shape[0] * (tokens.shape[1] - 1))

    grads = jax.jit(jax.grad(loss), compiler_options=FAST)(params, bias, tokens)
    got = dict(to_hf_tensors(nnx.merge(graph, jax.device_get(grads), bias), cfg))
    assert {name for name in got if not name.endswith("correction_bias")} == set(want)
    for name, array in want.items():
        error, size = np.abs(got[name] - array).max(), np.abs(array).max()
        assert error <= 1e-3 * size, f"{name}: error {error:.3g}, largest gradient {size:.3g}"


def test_there_are_golden_models():
    assert {path.stem for path in GOLDEN} == {
        "v3",
        "v3_bias_below_zero",
        "v3_no_groups_no_q_lora",
        "v3_three_dense_no_yarn",
        "v2",
        "v2_lite",
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_and_gradients_match_transformers(path, tmp_path):
    config, tokens, logits, weights, grads = golden(path)
    cfg, model = load_hf(write_folder(tmp_path, config, weights))
    got = jax.jit(lambda model, tokens: model.logits(tokens, jnp.float32), compiler_options=FAST)(model, tokens)
    assert np.abs(got - logits).max() <= 1e-4 * np.abs(logits).max()
    assert_gradients_match(model, cfg, tokens, grads)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_naive_model_matches_transformers(path):
    """The reference that the other tests trust."""
    config, tokens, logits, weights, _ = golden(path)
    weights = {name: w.astype(float) for name, w in weights.items()}
    got = naive.model(weights, config, tokens[0])
    assert np.abs(got - logits[0]).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_is_read_is_written(path, tmp_path):
    config, _, _, weights, _ = golden(path)
    cfg, model = load_hf(write_folder(tmp_path, config, weights))
    written = dict(to_hf_tensors(model, cfg))
    assert set(written) == set(weights)
    for name, w in weights.items():
        np.testing.assert_array_equal(written[name], w, err_msg=name)
    again = config_to_hf(cfg)
    assert {key: again[key] for key in config if key != "max_position_embeddings"} == {
        key: value for key, value in config.items() if key != "max_position_embeddings"
    }


def test_mtp_modules_follow_the_layers_with_copies_of_the_tables(tmp_path):
    cfg = config_from_hf(golden(GOLDEN[0].with_name("v3.npz"))[0])
    cfg = dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, depth=2))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_model(cfg))
    tensors = dict(to_hf_tensors(model, cfg))
    for layer in (3, 4):
        assert tensors[f"model.layers.{layer}.eh_proj.weight"].shape == (24, 48)
        assert f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in tensors
        np.testing.assert_array_equal(
            tensors[f"model.layers.{layer}.embed_tokens.weight"], tensors["model.embed_tokens.weight"]
        )
        np.testing.assert_array_equal(
            tensors[f"model.layers.{layer}.shared_head.head.weight"], tensors["lm_head.weight"]
        )
    assert config_to_hf(cfg)["num_nextn_predict_layers"] == 2
    read_cfg, read = load_hf(write_folder(tmp_path, config_to_hf(cfg), tensors))
    assert read_cfg.mtp.depth == 2
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))

    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.layers.3.embed_tokens.weight"] + 1
    with pytest.raises(ConfigError, match=r"model\.layers\.3\.embed_tokens\.weight to be a copy"):
        load_hf(write_folder(tmp_path, config_to_hf(cfg), tensors))


def test_folder_without_the_mtp_modules_it_counts_has_none(tmp_path):
    config, _, _, weights, _ = golden(GOLDEN[0].with_name("v3.npz"))
    cfg, model = load_hf(write_folder(tmp_path, config | {"num_nextn_predict_layers": 1}, weights))
    assert cfg.mtp.depth == 0
    assert model.mtp is None


def test_shards_and_bf16(tmp_path):
    config, _, _, weights, _ = golden(GOLDEN[0])
    names = sorted(weights)
    files = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n].astype(ml_dtypes.bfloat16) for n in names if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg, model = load_hf(tmp_path)
    for name, w in to_hf_tensors(model, cfg):
        np.testing.assert_array_equal(w, weights[name].astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)

    (tmp_path / files[names[0]]).unlink()
    with pytest.raises(ConfigError, match="of-00002"):
        load_hf(tmp_path)


def test_all_wrong_tensors_are_in_one_error(tmp_path):
    config, _, _, weights, _ = golden(GOLDEN[0].with_name("v3.npz"))
    weights = dict(weights)
    del weights["model.norm.weight"], weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    weights["model.layers.0.self_attn.o_proj.weight"] = np.zeros((18, 24), np.float32)
    weights["model.layers.0.self_attn.q_proj.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ConfigError) as error:
        load_hf(write_folder(tmp_path, config, weights))
    text = str(error.value)
    assert "2 missing: model.norm.weight, model.layers.1.mlp.experts.3.up_proj.weight" in text
    assert "1 unexpected: model.layers.0.self_attn.q_proj.weight" in text
    assert "o_proj.weight [18, 24] where its config.json says [24, 18]" in text
    assert "\n" not in text


def test_scales_of_a_weight_that_is_not_in_fp8_are_refused(tmp_path):
    config, _, _, weights, _ = golden(GOLDEN[0])
    weights = weights | {"model.layers.0.self_attn.o_proj.weight_scale_inv": np.ones((1, 1), np.float32)}
    with pytest.raises(ConfigError, match="weight_scale_inv"):
        load_hf(write_folder(tmp_path, config, weights))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_damaged_file_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden(GOLDEN[0])[0]))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_hf(tmp_path)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        load_hf(tmp_path)


PUBLISHED_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def test_published_v3_config_is_the_default_config_with_yarn():
    default = ModelConfig()
    attention = dataclasses.replace(default.attention, yarn=YarnConfig())
    assert config_from_hf(PUBLISHED_V3) == dataclasses.replace(default, attention=attention, init_std=0.02)


def test_newer_rope_parameters_mean_the_same():
    newer = {key: value for key, value in PUBLISHED_V3.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {**PUBLISHED_V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    assert config_from_hf(newer) == config_from_hf(PUBLISHED_V3)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite"])
def test_published_models_keep_their_sizes(name):
    cfg = runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]().model
    same = config_from_hf(config_to_hf(cfg))
    balance = dataclasses.replace(cfg.moe.balance, device=0.0, communication=0.0)
    assert same == dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, balance=balance))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model.mtp.after_final_norm", False),
        ("model.attention.yarn.mscale", 0.0),
        ("model.moe.top_groups", 2),
    ],
    ids=["MTP before the norm", "no mscale", "V2-Lite's gate with groups"],
)
def test_a_setting_that_the_layout_lacks_is_named(place, value, model_config, change):
    attention = dataclasses.replace(model_config.attention, yarn=YarnConfig())
    run = RunConfig(steps=1, model=dataclasses.replace(model_config, attention=attention))
    if place == "model.moe.top_groups":
        moe = dataclasses.replace(run.model.moe, gate="greedy", num_groups=1, top_groups=1)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    config_to_hf(run.model)
    with pytest.raises(ConfigError, match=rf"\b{place.split('.')[-1]}="):
        config_to_hf(change(run, place, value).model)


def test_a_setting_without_a_part_that_reads_it_is_not_refused(model_config):
    config_to_hf(dataclasses.replace(model_config, mtp=MTPConfig(depth=0, after_final_norm=False)))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 0),
        ({"top_k": 2}, 1),
        ({"num_groups": 1, "top_groups": 1, "top_k": 3}, 0),
        ({"top_k": 2, "top_groups": 4}, 0),
    ],
    ids=["as V3", "groups by their best", "no groups", "all groups"],
)
def test_what_transformers_does_otherwise_is_known(config, count):
    moe = MoEConfig(**{"num_experts": 8, "num_groups": 4, "top_groups": 2, "top_k": 4, **config})
    assert len(strange_to_transformers(ModelConfig(moe=moe))) == count


def test_transformers_has_no_normalized_weights_of_v2():
    moe = MoEConfig(gate="greedy", num_groups=1, top_groups=1)
    assert "greedy" in strange_to_transformers(ModelConfig(moe=moe))[0]
    assert not strange_to_transformers(ModelConfig(moe=dataclasses.replace(moe, normalize_weights=False)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("topk_method", "greedy"),
        ("scoring_func", "softmax"),
        ("hidden_act", "gelu"),
        ("num_key_value_heads", 8),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 4}),
        ("hidden_size", None),
        ("n_group", 7),
    ],
)
def test_config_that_is_not_ours_is_refused(field, value):
    with pytest.raises(ConfigError):
        config_from_hf(PUBLISHED_V3 | {field: value})
