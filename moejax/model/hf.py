"""Checkpoints of DeepSeek-V3, V2 and V2-Lite in the layout of Hugging Face: names and shapes of the tensors.

One table serves both directions. Every tensor of a checkpoint is a view of one of our parameters: a slice of a stack of
layers or experts, half of a joined matrix, transposed where theirs is [out, in] and ours [in, out]. Reading writes into
that view, writing reads from it. The rotated dims need no permutation: the released weights are interleaved, as is
`moejax.ops.rope`. Layers are numbered 0 to N - 1, then come the MTP modules.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.model.count import abstract_model
from moejax.model.hf_config import config_from_hf
from moejax.model.hf_files import Tensors, read_json
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

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor, given those of the parameters."""
        whole = shapes[self.parameter][len(self.index) :]
        return self.view(np.broadcast_to(np.float32(0), whole)).shape  # takes no memory


def named_leaves(model: Transformer) -> dict[str, Any]:
    """The model's arrays by path: `moe_blocks.ffn.router_DE`."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by `named_leaves`."""
    return {name: x.shape for name, x in named_leaves(abstract_model(cfg)).items()}


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
    """The model of a folder with `config.json` and `.safetensors` files (FP32, FP16, BF16 or FP8), in float32.

    Raises:
        ConfigError: a file cannot be read, or tensors are missing, unexpected or of another shape: all of them at once.
    """
    with open_hf(Path(folder)) as (cfg, tensors):
        abstract = abstract_model(cfg)
        values = {name: np.zeros(x.shape, np.float32) for name, x in named_leaves(abstract).items()}
        for name, place in tensor_places(values, cfg).items():
            if not place.copy:
                place.of(values)[...] = tensors.read(name)
    return cfg, jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(x) for x in values.values()])


@contextmanager
def open_hf(folder: Path) -> Iterator[tuple[ModelConfig, Tensors]]:
    """The model that a folder's config.json says, and its tensors, which are all of that model.

    `transformers` writes the number of MTP modules without the modules: if a folder has no tensor of any, the model
    has none either.

    Raises:
        ConfigError: as `load_hf`.
    """
    with Tensors(folder) as tensors:
        cfg = config_from_hf(read_json(folder / "config.json"))
        if not tensors.has_layer(cfg.num_layers):
            cfg = _without_mtp(cfg)
        shapes = parameter_shapes(cfg)
        places = tensor_places(shapes, cfg)
        copies = {name: place.parameter for name, place in places.items() if place.copy}
        tensors.require({name: place.shape(shapes) for name, place in places.items()}, set(copies))
        originals = {place.parameter: name for name, place in places.items() if not place.copy}
        for name, parameter in copies.items():
            if name in tensors and not np.array_equal(tensors.read(originals[parameter]), tensors.read(name)):
                raise ConfigError("checkpoint", str(folder), f"{name} to be a copy of the main model's tensor")
        yield cfg, tensors


def _without_mtp(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, depth=0))
