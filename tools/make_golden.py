"""Makes tests/golden/*.npz: tiny random models with the logits and gradients that `transformers` gives them.

    pip install torch==2.13.0 transformers==5.23.0
    python tools/make_golden.py [FOLDER]

Each file is one of `MODELS`: `config` (config.json as text), `tokens`, `logits`, and for every tensor of the
checkpoint, by its name there, `weight:NAME` (float16, exactly what the model was run with in FP32) and `grad:NAME`, its
gradient of the mean next-token cross entropy. Weights are new random numbers in every run of the tool. The files that
are committed are the test; a new run is needed only for a new model here. It prints the files and their sizes.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 11,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 2560,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
}
NO_GROUPS = {"n_group": 1, "topk_group": 1}
PLAIN_ROTARY = {"rope_scaling": None, "max_position_embeddings": 64}
OTHER_MSCALE = {"rope_scaling": {**SMALL["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.5}}
V2 = {
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
    "rope_scaling": {**SMALL["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
}

# name -> (configuration, mean of the correction bias)
MODELS = {
    "v3": (SMALL, 0.0),
    "v3_bias_below_zero": (SMALL | OTHER_MSCALE, -3.0),
    "v3_no_groups_no_q_lora": (SMALL | NO_GROUPS | {"q_lora_rank": None, "num_experts_per_tok": 3}, 0.0),
    "v3_three_dense_no_yarn": (SMALL | PLAIN_ROTARY | {"num_hidden_layers": 4, "first_k_dense_replace": 3}, 0.0),
    "v2": (SMALL | V2 | {"routed_scaling_factor": 16.0}, 0.0),
    "v2_lite": (
        SMALL | V2 | NO_GROUPS | {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.0},
        0.0,
    ),
}


def empty_model(config: dict) -> torch.nn.Module:
    """The `transformers` model of a config.json in FP32, with its plainest attention and experts."""
    kind = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}[config["model_type"]]
    settings = getattr(transformers, f"{kind}Config")(**copy.deepcopy(config))
    settings._attn_implementation = settings._experts_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(settings).float().eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, bias_mean: float) -> None:
    """Fills all weights with numbers that float16 holds: norms about 1, matrices 1 / sqrt(columns), biases as given."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn_like(weight)
        if name.endswith("e_score_correction_bias"):
            weight.copy_((bias_mean + 0.2 * noise).half().float())
        elif name.endswith("norm.weight"):
            weight.copy_((1 + 0.2 * noise).half().float())
        elif "inv_freq" not in name:
            weight.copy_((noise / weight.shape[-1] ** 0.5).half().float())


def run(model: torch.nn.Module, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [rows, length, vocab], and every parameter's gradient of the mean next-token cross entropy."""
    model.zero_grad()
    ids = torch.from_numpy(tokens).long()
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return logits.detach().numpy(), checkpoint_names(grads)


def checkpoint_names(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same numbers by the names of the files: there each expert stands alone, gate and up apart."""
    named = {}
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            for expert, pair in enumerate(array):
                stem = name.removesuffix("gate_up_proj")
                named[f"{stem}{expert}.gate_proj.weight"], named[f"{stem}{expert}.up_proj.weight"] = np.split(pair, 2)
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(array):
                named[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = matrix
        else:
            named[name] = array
    return named


def main(folder: Path) -> None:
    """Writes one file for each of `MODELS`."""
    for name, (config, bias_mean) in MODELS.items():
        model = empty_model(config)
        randomize(model, bias_mean)
        tokens = np.random.default_rng().integers(config["vocab_size"], size=(2, 24)).astype(np.int32)
        logits, grads = run(model, tokens)
        weights = checkpoint_names(model.state_dict())
        path = folder / f"{name}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(config),
            tokens=tokens,
            logits=logits,
            **{f"weight:{key}": value.astype(np.float16) for key, value in weights.items()},
            **{f"grad:{key}": value for key, value in grads.items()},
        )
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB  {sum(w.size for w in weights.values())} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests" / "golden")
