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
