"""Checkpoints of DeepSeek-V3, V2 and V2-Lite in the layout of Hugging Face: names and shapes of the tensors.

One table serves both directions. Every tensor of a checkpoint is a view of one of our parameters: a slice of a stack of
layers or experts, half of a joined matrix, transposed where theirs is [out, in] and ours [in, out]. Reading writes into
that view, writing reads from it. The rotated dims need no permutation: the released weights are interleaved, as is
`moejax.ops.rope`. Layers are numbered 0 to N - 1, then come the MTP modules.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.config import ConfigError, ModelConfig
from moejax.model.count import abstract_model
from moejax.model.hf_config import config_from_hf
from moejax.model.transformer import Transformer

# ------------------------------------------------------------------------------------------------------- tensor names


def _same(w: np.ndarray) -> np.ndarray:
    return w


def _turned(w: np.ndarray) -> np.ndarray:
    return w.T


def _gate(w: np.ndarray) -> np.ndarray:
    return w[:, : w.shape[1] // 2].T


def _up(w: np.ndarray) -> np.ndarray:
    return w[:, w.shape[1] // 2 :].T


# name below model.layers.{i}., parameter of `Block`, view of that parameter's layer (and expert)
_BLOCK = (
    ("input_layernorm.weight", "attention_norm.scale", _same),
    ("self_attn.q_proj.weight", "attention.q_DH", _turned),
    ("self_attn.q_a_proj.weight", "attention.q_down_DQ", _turned),
    ("self_attn.q_a_layernorm.weight", "attention.q_norm.scale", _same),
    ("self_attn.q_b_proj.weight", "attention.q_up_QH", _turned),
    ("self_attn.kv_a_proj_with_mqa.weight", "attention.kv_down_DC", _turned),
    ("self_attn.kv_a_layernorm.weight", "attention.kv_norm.scale", _same),
    ("self_attn.kv_b_proj.weight", "attention.kv_up_CH", _turned),
    ("self_attn.o_proj.weight", "attention.out_HD", _turned),
    ("post_attention_layernorm.weight", "ffn_norm.scale", _same),
    ("mlp.gate_proj.weight", "ffn.gate_up_DG", _gate),
    ("mlp.up_proj.weight", "ffn.gate_up_DG", _up),
    ("mlp.down_proj.weight", "ffn.down_FD", _turned),
    ("mlp.gate.weight", "ffn.router_DE", _turned),
    ("mlp.gate.e_score_correction_bias", "ffn.router_bias", _same),
    ("mlp.experts.{expert}.gate_proj.weight", "ffn.gate_up_EDG", _gate),
    ("mlp.experts.{expert}.up_proj.weight", "ffn.gate_up_EDG", _up),
    ("mlp.experts.{expert}.down_proj.weight", "ffn.down_EFD", _turned),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared.gate_up_DG", _gate),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared.gate_up_DG", _up),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared.down_FD", _turned),
)
# of an MTP module, beside its block
_MTP = (
    ("enorm.weight", "embed_norm.scale", _same),
    ("hnorm.weight", "hidden_norm.scale", _same),
    ("eh_proj.weight", "join_2DD", _turned),
    ("shared_head.norm.weight", "norm.scale", _same),
)
# every MTP module of a checkpoint has its copies of these
_MTP_COPIES = (("embed_tokens.weight", "embed_VD", _same), ("shared_head.head.weight", "head_DV", _turned))
_TOP = (
    ("model.embed_tokens.weight", "embed_VD", _same),
    ("model.norm.weight", "norm.scale", _same),
    ("lm_head.weight", "head_DV", _turned),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies in our model."""

    parameter: str
    index: tuple[int, ...]  # along the parameter's leading dims: layer, expert
    view: Callable[[np.ndarray], np.ndarray]
    copy: bool = False  # another tensor is the same place; this one may be missing

    @property
    def is_router_bias(self) -> bool:
        """Whether it is one of the biases that balance the experts' loads, which are FP32 in every checkpoint."""
        return self.parameter.endswith(".router_bias")

    def of(self, parameters: dict[str, Any]) -> np.ndarray:
        """The tensor as a view, if the parameter is a NumPy array, else as a copy."""
        return self.view(np.asarray(parameters[self.parameter][self.index]))


def named_leaves(model: Transformer) -> dict[str, Any]:
    """The model's arrays by path: `moe_blocks.ffn.router_DE`."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}


def tensor_places(parameters: dict[str, Any], cfg: ModelConfig) -> dict[str, Place]:
    """The whole table: the name of every tensor of a checkpoint, and its place among `parameters` by `named_leaves`."""
    places = {name: Place(parameter, (), view) for name, parameter, view in _TOP}

    def add(layer: int, stack: str, index: int, rows: tuple) -> None:
        for name, parameter, view in rows:
            parameter = f"{stack}.{parameter}"
            if parameter not in parameters:
                continue
            for expert in range(cfg.moe.num_experts) if "{expert}" in name else (None,):
                where = (index,) if expert is None else (index, expert)
                places[f"model.layers.{layer}.{name.format(expert=expert)}"] = Place(parameter, where, view)

    for layer in range(cfg.num_layers):
        dense = layer < cfg.num_dense_layers
        stack, index = ("dense_blocks", layer) if dense else ("moe_blocks", layer - cfg.num_dense_layers)
        add(layer, stack, index, _BLOCK)
    for depth in range(cfg.mtp.depth):
        layer = cfg.num_layers + depth
        add(layer, "mtp", depth, _MTP)
        add(layer, "mtp.block", depth, _BLOCK)
        for name, parameter, view in _MTP_COPIES:
            places[f"model.layers.{layer}.{name}"] = Place(parameter, (), view, copy=True)
    return places


# --------------------------------------------------------------------------------------------------------- the weights


def to_hf_tensors(model: Transformer, cfg: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, one after the other: its name and its values, float32, [out, in], on the host."""
    parameters = named_leaves(model)
    for name, place in tensor_places(parameters, cfg).items():
        yield name, np.ascontiguousarray(place.of(parameters))


def load_hf(folder: str | Path) -> tuple[ModelConfig, Transformer]:
    """The model of a folder with `config.json` and `.safetensors` files (FP32, FP16 or BF16), in float32.

    `transformers` writes the number of MTP modules without the modules: if a folder has no tensor of any, the model
    has none either.

    Raises:
        ConfigError: a file cannot be read, or tensors are missing, unexpected or of another shape: all of them at once.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        cfg = config_from_hf(_read_json(folder / "config.json"))
        if not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in tensors):
            cfg = _without_mtp(cfg)
        abstract = abstract_model(cfg)
        shapes = named_leaves(abstract)
        places = tensor_places(shapes, cfg)
        _check(folder, tensors, places, {name: np.broadcast_to(np.float32(0), x.shape) for name, x in shapes.items()})
        values = {name: np.zeros(x.shape, np.float32) for name, x in shapes.items()}
        for name, place in places.items():
            if name in tensors and not place.copy:
                place.of(values)[...] = tensors[name].get_tensor(name)
        for name, place in places.items():
            if name in tensors and place.copy and not np.array_equal(place.of(values), tensors[name].get_tensor(name)):
                raise ConfigError("checkpoint", str(folder), f"{name} to be a copy of the main model's tensor")
    return cfg, jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(x) for x in values.values()])


def _without_mtp(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, depth=0))


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name in the folder's files, and the open file it is in."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = sorted({folder / file for file in _read_json(index).get("weight_map", {}).values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError("checkpoint", str(folder), "a folder with .safetensors files")
    tensors = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="np"))
        except (OSError, SafetensorError) as error:
            raise ConfigError("checkpoint", str(path), f"a whole safetensors file ({error})") from None
        tensors.update(dict.fromkeys(file.keys(), file))
    return {name: file for name, file in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _check(folder: Path, tensors: dict[str, Any], places: dict[str, Place], shapes: dict[str, np.ndarray]) -> None:
    """Raises one error with every tensor that is missing, unexpected or of another shape or type than it should be."""
    slices = {name: file.get_slice(name) for name, file in tensors.items()}
    for name, part in slices.items():
        if name.endswith("weight_scale_inv") or part.get_dtype().startswith("F8"):
            wanted = f"weights in BF16, FP16 or FP32; {name} is of an FP8 checkpoint (weight_scale_inv)"
            raise ConfigError("checkpoint", str(folder), wanted)
    misshapen = []
    for name, place in places.items():
        want = list(place.of(shapes).shape)
        if name in slices and (got := slices[name].get_shape()) != want:
            misshapen.append(f"{name} {got} where its config.json says {want}")
    wrong = {
        "missing": [name for name, place in places.items() if name not in tensors and not place.copy],
        "unexpected": [name for name in tensors if name not in places],
        "of another shape": misshapen,
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in wrong.items() if names]
        raise ConfigError("checkpoint", str(folder), "the tensors that its config.json says; " + "; ".join(parts))


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("checkpoint", str(path), "a JSON object")
    return values
