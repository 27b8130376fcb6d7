"""The `config.json` of DeepSeek-V3, V2 and V2-Lite in the layout of Hugging Face, read and written."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.config import (
    HOW_COMPUTED,
    AttentionConfig,
    BalanceConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    YarnConfig,
)

# settings of the training alone, which the layout does not have
_TRAINING = ("model.moe.balance", *HOW_COMPUTED)


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The model of a `config.json`: `model_type` deepseek_v3 or deepseek_v2, `rope_scaling` or `rope_parameters`.

    `initializer_range` is the published one, which is not what DeepSeek trained with (0.02, not 0.006). A group's score
    is the sum of its best num_experts_per_tok / topk_group experts, as reported; `transformers` always takes 2. A field
    that is left out has V3's value, or in V2 means that there is no such thing.

    Raises:
        ConfigError: a field says something that this model does not have, or is missing.
    """
    kind = hf.get("model_type")
    _want(kind in ("deepseek_v3", "deepseek_v2"), "model_type", kind, "deepseek_v3 or deepseek_v2")
    gates = ("noaux_tc",) if kind == "deepseek_v3" else ("greedy", "group_limited_greedy")
    gate: Any = hf.get("topk_method") or gates[0]
    _want(gate in gates, "topk_method", gate, f"{' or '.join(gates)} with {kind}")
    heads = _need(hf, "num_attention_heads")
    for name, only in (
        ("hidden_act", "silu"),
        ("scoring_func", "sigmoid" if gate == "noaux_tc" else "softmax"),
        ("num_key_value_heads", heads),
        ("moe_layer_freq", 1),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("tie_word_embeddings", False),
        ("rope_interleave", True),
    ):
        value = only if hf.get(name) is None else hf[name]
        _want(value == only, name, value, repr(only))
    theta, yarn = _rotary(hf)
    return ModelConfig(
        vocab_size=_need(hf, "vocab_size"),
        hidden_size=_need(hf, "hidden_size"),
        num_layers=_need(hf, "num_hidden_layers"),
        num_dense_layers=hf.get("first_k_dense_replace", 3 if kind == "deepseek_v3" else 0),
        dense_width=_need(hf, "intermediate_size"),
        attention=AttentionConfig(
            num_heads=heads,
            q_lora_rank=hf.get("q_lora_rank"),
            kv_lora_rank=_need(hf, "kv_lora_rank"),
            qk_nope_dim=_need(hf, "qk_nope_head_dim"),
            qk_rope_dim=_need(hf, "qk_rope_head_dim"),
            v_dim=_need(hf, "v_head_dim"),
            rope_theta=theta,
            yarn=yarn,
        ),
        moe=MoEConfig(
            num_experts=_need(hf, "n_routed_experts"),
            num_shared=hf.get("n_shared_experts") or 0,
            top_k=_need(hf, "num_experts_per_tok"),
            num_groups=1 if gate == "greedy" else hf.get("n_group") or 1,
            top_groups=1 if gate == "greedy" else hf.get("topk_group") or 1,
            expert_width=_need(hf, "moe_intermediate_size"),
            gate=gate,
            normalize_weights=hf.get("norm_topk_prob", kind == "deepseek_v3"),
            route_scale=float(hf.get("routed_scaling_factor", 2.5 if kind == "deepseek_v3" else 1.0)),
            balance=BalanceConfig(sequence=hf.get("aux_loss_alpha", 1e-4 if kind == "deepseek_v3" else 0.001)),
        ),
        mtp=MTPConfig(depth=hf.get("num_nextn_predict_layers") or 0),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        init_std=hf.get("initializer_range", 0.02),
    )


def _want(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"config.json {name}", value, wanted)


def _need(hf: dict[str, Any], name: str) -> Any:
    _want(hf.get(name) is not None, name, None, "a value")
    return hf[name]


def _rotary(hf: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """The base of the frequencies and YaRN, of the published `rope_scaling` or the newer `rope_parameters`."""
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _want(kind in ("default", "yarn"), "rope_scaling.type", kind, "yarn or none")
    if kind == "default":
        return float(rope["rope_theta"]), None
    _want(rope.get("attention_factor") is None, "rope_scaling.attention_factor", rope.get("attention_factor"), "none")
    mscale, mscale_all_dim = rope.get("mscale") or 1.0, rope.get("mscale_all_dim") or 0.0
    paired = bool(rope.get("mscale")) if mscale_all_dim else mscale == 1
    _want(paired, "rope_scaling.mscale", rope.get("mscale"), f"a value that goes with mscale_all_dim={mscale_all_dim}")
    return float(rope["rope_theta"]), YarnConfig(
        factor=float(_need(rope, "factor")),
        original_length=_need(rope, "original_max_position_embeddings"),
        beta_fast=float(rope.get("beta_fast", 32)),
        beta_slow=float(rope.get("beta_slow", 1)),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def config_to_hf(cfg: ModelConfig, length: int = 4096) -> dict[str, Any]:
    """The `config.json` of a model that has seen sequences of `length` tokens, in the fields of the published ones.

    `config_from_hf` of it gives the same model; of the balance losses it has the first.

    Raises:
        ConfigError: the model has a setting that the layout does not have.
    """
    hf = _fields(cfg, length)
    for place, value, read in _differences(cfg, config_from_hf(hf), "model"):
        without_mtp = place.startswith("model.mtp.") and cfg.mtp.depth == 0
        if not place.startswith(_TRAINING) and not without_mtp:
            raise ConfigError(place, value, f"{read!r}, which is all that the layout of Hugging Face can say")
    return hf


def _differences(here: Any, there: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Place and both values of the settings that are not equal."""
    for name in (field.name for field in dataclasses.fields(here)):
        value, other = getattr(here, name), getattr(there, name)
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(other):
            yield from _differences(value, other, f"{place}.{name}")
        elif value != other:
            yield f"{place}.{name}", value, other


def strange_to_transformers(cfg: ModelConfig) -> list[str]:
    """What `transformers` computes otherwise than this model, of all that the layout can say; a line each."""
    m = cfg.moe
    limited = m.gate == "noaux_tc" and m.top_groups < m.num_groups
    found = []
    if limited and m.group_score_size != 2:
        size = f"{m.group_score_size} (model.moe.top_k={m.top_k}, top_groups={m.top_groups})"
        found.append(f"transformers scores a group by its best 2 experts, this model by {size}")
    if m.gate != "noaux_tc" and m.normalize_weights:
        found.append(f"transformers does not normalize the weights of experts with model.moe.gate={m.gate!r}")
    return found


def _fields(cfg: ModelConfig, length: int) -> dict[str, Any]:
    a, m = cfg.attention, cfg.moe
    v3 = m.gate == "noaux_tc"
    scaling = None
    if a.yarn is not None:
        length = int(a.yarn.factor * a.yarn.original_length)
        scaling = {
            "type": "yarn",
            "factor": a.yarn.factor,
            "original_max_position_embeddings": a.yarn.original_length,
            "beta_fast": a.yarn.beta_fast,
            "beta_slow": a.yarn.beta_slow,
            "mscale": a.yarn.mscale,
            "mscale_all_dim": a.yarn.mscale_all_dim,
        }
    return {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.dense_width,
        "moe_intermediate_size": m.expert_width,
        "num_hidden_layers": cfg.num_layers,
        "first_k_dense_replace": cfg.num_dense_layers,
        "moe_layer_freq": 1,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_dim,
        "qk_rope_head_dim": a.qk_rope_dim,
        "v_head_dim": a.v_dim,
        "n_routed_experts": m.num_experts,
        "n_shared_experts": m.num_shared,
        "num_experts_per_tok": m.top_k,
        "n_group": m.num_groups,
        "topk_group": m.top_groups,
        "topk_method": m.gate,
        "scoring_func": "sigmoid" if v3 else "softmax",
        "norm_topk_prob": m.normalize_weights,
        "routed_scaling_factor": m.route_scale,
        "aux_loss_alpha": m.balance.sequence,
        "seq_aux": True,
        "num_nextn_predict_layers": cfg.mtp.depth,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "max_position_embeddings": length,
        "rope_theta": a.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
