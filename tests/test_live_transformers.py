"""Live comparison with `transformers` on torch: logits, gradients, and checkpoints in both directions.

    pip install torch==2.13.0 transformers==5.23.0
    python -m pytest -m live

The models are those of tools/make_golden.py with other random weights.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.config import MeshConfig
from moejax.model.hf import load_hf, to_hf_tensors
from moejax.model.hf_config import config_to_hf
from moejax.serve.export import export
from moejax.serve.import_hf import import_hf
from moejax.serve.load import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent.parent / "tools"))
import make_golden  # noqa: E402
from test_export import save  # noqa: E402
from test_hf import FAST, assert_gradients_match  # noqa: E402

pytestmark = pytest.mark.live


def assert_same_logits(got, want):
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", make_golden.MODELS)
def test_saved_pretrained_folder(name, tmp_path):
    """What `save_pretrained` wrote gives the same logits and gradients here; what we write gives the same there."""
    torch.manual_seed(0)
    config, bias_mean = make_golden.MODELS[name]
    theirs = make_golden.empty_model(config)
    make_golden.randomize(theirs, bias_mean)
    tokens = np.random.default_rng(0).integers(config["vocab_size"], size=(3, 40)).astype(np.int32)
    logits, grads = make_golden.run(theirs, tokens)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()

    cfg, model = load_hf(tmp_path / "theirs")
    run = jax.jit(lambda model, tokens: model.logits(tokens, jnp.float32), compiler_options=FAST)
    assert_same_logits(run(model, tokens), logits)
    assert_gradients_match(model, cfg, tokens, grads)

    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config_to_hf(cfg)))
    save_file(dict(to_hf_tensors(model, cfg)), ours / "model.safetensors", metadata={"format": "pt"})
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        ours, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert_same_logits(again(torch.from_numpy(tokens).long()).logits.detach().numpy(), logits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_checkpoint(dtype, run_config, tmp_path, change):
    """`transformers` gives an export the logits that the model has here, and tells of the MTP module that it leaves.

    The biases of the routers are far apart, so that they choose the experts; their widths are odd, so that the BF16
    tensors do not end where an FP32 one may begin.
    """
    config = change(change(run_config, "model.moe.top_k", 4), "model.attention.kv_lora_rank", 15)
    checkpoint = save(dataclasses.replace(config, mesh=MeshConfig(data=1)))
    export(checkpoint, tmp_path / "hf", dtype=dtype, shard_bytes=1e5)
    tokens = np.random.default_rng(0).integers(264, size=(3, 30)).astype(np.int32)
    here = load(config.folder if dtype == "fp32" else tmp_path / "hf").logits(tokens)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert all(name.startswith("model.layers.3.") for name in loading.pop("unexpected_keys"))
    assert not any(loading.values()), loading
    assert_same_logits(here, theirs(torch.from_numpy(tokens).long()).logits.detach().numpy())


def test_greedy_answers_of_an_export_are_the_same_there(run_config, tmp_path, change):
    """64 tokens, of which each is the likeliest here and there."""
    config = change(change(run_config, "model.moe.top_k", 4), "model.init_std", 0.3)
    export(save(dataclasses.replace(config, mesh=MeshConfig(data=1))), tmp_path / "hf", dtype="bf16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    prompt = list(b"route each")
    theirs.generation_config.eos_token_id = None  # go on after the end of a document
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0].tolist()
    model, ids = load(tmp_path / "hf"), np.zeros((1, len(prompt) + 64), np.int32)
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), ids.shape[1]):
        ids[0, place] = model.logits(ids)[0, place - 1].argmax()
    assert ids[0].tolist() == answer
    assert len(set(answer)) > 8


@pytest.mark.parametrize("name", ["v3", "v2", "v2_lite"])
def test_what_they_save_is_imported(name, tmp_path):
    torch.manual_seed(1)
    config, bias_mean = make_golden.MODELS[name]
    theirs = make_golden.empty_model(config | {"vocab_size": 264})
    make_golden.randomize(theirs, bias_mean)
    tokens = np.random.default_rng(0).integers(264, size=(2, 30)).astype(np.int32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    import_hf(tmp_path / "theirs", tmp_path / "run")
    want = theirs(torch.from_numpy(tokens).long()).logits.detach().numpy()
    assert_same_logits(load(tmp_path / "run").logits(tokens), want)
