"""A checkpoint as a Hugging Face folder, which `transformers` and `moejax.load` read: written tensor by tensor.

    config.json                       the model, in the fields of the published ones
    model-00001-of-00002.safetensors  the tensors, in the order of the layers; the biases of routers come first
    model.safetensors.index.json      the file of each tensor
    tokenizer.json                    and what is beside it, where the run has one

The arrays of a checkpoint are read in the pieces in which they lie there, and the tensors of one are written before the
next is read: memory holds one, twice while it is read, and never the model. A run on one device has a piece for each
stack of layers; where the weights are cut over devices, one has a stage's layers and a device's experts.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moejax.checkpoint.commit import read_meta
from moejax.checkpoint.copying import becoming, require_whole
from moejax.checkpoint.stored import OpenArray, arrays
from moejax.config import ConfigError, ModelConfig, RunConfig
from moejax.data.tokens import open_tokenizer
from moejax.model.count import abstract_model
from moejax.model.hf import Place, named_leaves, tensor_places
from moejax.model.hf_config import config_to_hf, strange_to_transformers
from moejax.ops.linear import FLOATS
from moejax.train.source import saved_config

logger = logging.getLogger("moejax")

_NAMES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}  # in safetensors and in config.json
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    tensors: int
    files: int  # of tensors
    bytes: int  # of tensors


@dataclass(frozen=True)
class _Tensor:
    name: str
    row: tuple[int, ...]  # in the block that was read
    place: Place
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype]).itemsize

    def of(self, block: np.ndarray) -> np.ndarray:
        """The values, contiguous, rounded once."""
        return self.place.view(block[self.row]).astype(FLOATS[self.dtype], order="C")


@dataclass(frozen=True)
class _Block:
    """A piece of an array, and the tensors that are in it."""

    array: OpenArray
    corner: tuple[int, ...]
    tensors: list[_Tensor]


def export(
    checkpoint: Path, to: Path, *, dtype: Dtype = "bf16", ema: bool = False, shard_bytes: float = 5e9
) -> Exported:
    """Writes the model of a run's checkpoint to a new folder, which appears when it is whole.

    Args:
        checkpoint: a run's checkpoints/<step>, or a copy of it, which is verified first.
        to: a place where nothing is yet.
        dtype: of the weights; the biases of routers are FP32, as in the published checkpoints.
        ema: the averaged weights, instead of those of the last step.
        shard_bytes: of the tensors of a file at most; a tensor is never cut.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model than its settings say; the layout does not
            have a setting of the model; the run's tokenizer is missing; there is something at `to`, or it cannot be
            written.
    """
    if not shard_bytes > 0:
        raise ConfigError("shard size", shard_bytes, "a number of bytes above 0")
    config = saved_config(checkpoint)
    settings = _settings(config, dtype)
    with becoming(to) as part:
        require_whole(checkpoint, f"checkpoint {checkpoint}")
        blocks = _blocks(checkpoint, config.model, dtype, ema)
        files = _files([tensor for block in blocks for tensor in block.tensors], shard_bytes)
        _write_tensors(part, files, _values(blocks))
        _write_json(part / "config.json", settings)
        _copy_tokenizer(config.data.tokenizer, part)
    for line in strange_to_transformers(config.model):
        logger.warning(f"{to}: {line}: its answers will differ there")
    tensors = [tensor for file in files for tensor in file]
    return Exported(len(tensors), len(files), sum(tensor.bytes for tensor in tensors))


# --------------------------------------------------------------------------------------------------------- what is read


def _blocks(checkpoint: Path, cfg: ModelConfig, dtype: Dtype, ema: bool) -> list[_Block]:
    """All tensors, by the piece of an array that they are in; pieces in the order of their first tensors.

    The biases of routers come first: FP32 among BF16 would not be aligned.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract_model(cfg)).items()}
    slots = _slots(checkpoint, cfg)
    opened = _open(checkpoint, shapes, len(slots), ema)
    blocks: dict[tuple, _Block] = {}
    for name, place in sorted(tensor_places(shapes, cfg).items(), key=lambda item: not item[1].is_router_bias):
        index = place.index
        if _is_stack(place.parameter):
            index = (slots.index(index[0]), *index[1:])
        array = opened[place.parameter]
        corner = tuple(i // length * length for i, length in zip(index, array.cut, strict=False))
        row = tuple(i - start for i, start in zip(index, corner, strict=True))
        one = np.broadcast_to(np.float32(0), shapes[place.parameter][len(index) :])
        own: Dtype = "fp32" if place.is_router_bias else dtype
        block = blocks.setdefault((place.parameter, corner), _Block(array, corner, []))
        block.tensors.append(_Tensor(name, row, place, place.view(one).shape, own))
    return list(blocks.values())


def _slots(checkpoint: Path, cfg: ModelConfig) -> list[int]:
    """The layer in each place of the stack of MoE blocks."""
    slots = read_meta(checkpoint).get("layer_of_slot")
    if not isinstance(slots, list) or {slot for slot in slots if slot != -1} != set(range(cfg.num_moe_layers)):
        wanted = f"the {cfg.num_moe_layers} MoE layers of the settings"
        raise ConfigError(f"checkpoint {checkpoint}, layer_of_slot", slots, wanted)
    return slots


def _open(checkpoint: Path, shapes: dict[str, tuple[int, ...]], num_slots: int, ema: bool) -> dict[str, OpenArray]:
    """The array of each parameter."""
    there = {(array.part, array.name): array.shape for array in arrays(checkpoint)}
    if ema and not any(part == "optimizer" and name.startswith("ema.") for part, name in there):
        raise ConfigError("--ema", True, f"averaged weights (optimizer.ema_decay), of which {checkpoint} has none")
    weights = ("optimizer", "ema") if ema else ("model", "params")
    keys, wrong = {}, []
    for name, shape in shapes.items():
        part, tree = ("model", "router_bias") if name.endswith(".router_bias") else weights
        keys[name] = part, f"{tree}.{name}.value"  # of a variable of NNX
        found, want = there.get((part, f"{tree}.{name}")), (num_slots, *shape[1:]) if _is_stack(name) else shape
        if found != want:
            wrong.append(f"{part}/{tree}.{name} is {found or 'missing'} where the settings say {want}")
    if wrong:
        raise ConfigError("checkpoint", str(checkpoint), "; ".join(["the arrays of the model", *wrong[:5]]))
    return {name: OpenArray(checkpoint, *key) for name, key in keys.items()}


def _is_stack(name: str) -> bool:
    """Whether the layers of a parameter lie in the order of the slots of a pipeline."""
    return name.startswith("moe_blocks.")


def _values(blocks: list[_Block]) -> Iterator[np.ndarray]:
    for block in blocks:
        values = block.array.read(block.corner)
        for tensor in block.tensors:
            yield tensor.of(values)
        del values  # before the next is read


# ------------------------------------------------------------------------------------------------------ what is written


def _files(tensors: list[_Tensor], most: float) -> list[list[_Tensor]]:
    """The tensors of each file, in their order."""
    files: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > most:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return files


def _write_tensors(folder: Path, files: list[list[_Tensor]], values: Iterator[np.ndarray]) -> None:
    """Files of safetensors, and their index; `values`: of all tensors, in their order."""
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys((tensor.name for tensor in tensors), name))
        with open(folder / name, "wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                array = next(values)
                assert array.nbytes == tensor.bytes
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    total = sum(tensor.bytes for tensors in files for tensor in tensors)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(tensors: list[_Tensor]) -> bytes:
    """What stands before the tensors in a file (github.com/huggingface/safetensors): its length, and where each is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype][0],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _settings(config: RunConfig, dtype: Dtype) -> dict[str, Any]:
    """What stands in config.json; the tokens that begin and end a document are the tokenizer's."""
    tokenizer = open_tokenizer(config.data.tokenizer, vocab_size=config.model.vocab_size)
    tokens = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    return {**config_to_hf(config.model, config.data.sequence_length), **tokens, "torch_dtype": _NAMES[dtype][1]}


def _copy_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer.json of a run, and what describes it beside it; nothing for bytes."""
    if name == "bytes":
        return
    file = Path(name).expanduser()
    shutil.copyfile(file, folder / "tokenizer.json")
    for beside in _BESIDE_TOKENIZER:
        if (file.parent / beside).is_file():
            shutil.copyfile(file.parent / beside, folder / beside)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
