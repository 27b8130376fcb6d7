"""A checkpoint as a Hugging Face folder, which `transformers` and `moejax.load` read: written tensor by tensor.

    config.json                       the model, in the fields of the published ones
    model-00001-of-00002.safetensors  the tensors, in the order of the layers
    model.safetensors.index.json      the file of each tensor
    tokenizer.json                    and what is beside it, where the run has one

In FP8 are the tensors that the published checkpoint of V3 has in it (`moejax.model.hf_fp8`), the others in BF16.

The arrays of a checkpoint are read in the pieces in which they lie there, and the tensors of one are written before the
next is read: memory holds one, twice while it is read, and never the model. A run on one device has a piece for each
stack of layers; where the weights are cut over devices, one has a stage's layers and a device's experts.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.commit import read_meta
from moejax.checkpoint.copying import becoming, require_whole
from moejax.checkpoint.stored import OpenArray, arrays
from moejax.config import ConfigError, ModelConfig, RunConfig
from moejax.data.tokens import open_tokenizer
from moejax.model.hf import Place, parameter_shapes, tensor_places
from moejax.model.hf_config import config_to_hf, strange_to_transformers
from moejax.model.hf_fp8 import QUANTIZATION, SCALE, in_fp8, quantise, scale_shape
from moejax.serve.tensor_files import Dtype, Entry, write_json, write_tensors
from moejax.serve.tokenizer_files import copy_tokenizer
from moejax.train.source import saved_config

logger = logging.getLogger("moejax")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    tensors: int
    files: int  # of tensors
    bytes: int  # of tensors


@dataclass(frozen=True)
class _Tensor:
    name: str
    array: OpenArray
    corner: tuple[int, ...]  # of the piece of the array that has it
    row: tuple[int, ...]  # in that piece
    place: Place
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def entries(self) -> list[Entry]:
        """What is written of it: in FP8 also its scales."""
        own = [Entry(self.name, self.shape, self.dtype)]
        if self.dtype == "fp8":
            own.append(Entry(self.name + SCALE, scale_shape(self.shape), "fp32"))
        return own

    def of(self, block: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of the entries, rounded once."""
        values = self.place.view(block[self.row])
        arrays = quantise(values) if self.dtype == "fp8" else (values.astype(self.entries[0].numpy),)
        return zip((entry.name for entry in self.entries), arrays, strict=True)


def export(
    checkpoint: Path, to: Path, *, dtype: Dtype = "bf16", ema: bool = False, shard_bytes: float = 5e9
) -> Exported:
    """Writes the model of a run's checkpoint to a new folder, which appears when it is whole.

    Args:
        checkpoint: a run's checkpoints/<step>, or a copy of it, which is verified first.
        to: a place where nothing is yet.
        dtype: of the weights; "fp8": of those that the published checkpoint has so, of the others BF16. The biases of
            routers are FP32, as in the published checkpoints.
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
        tensors = _tensors(checkpoint, config.model, dtype, ema)
        entries = [entry for tensor in tensors for entry in tensor.entries]
        files = write_tensors(part, entries, _values(tensors), shard_bytes)
        write_json(part / "config.json", settings)
        copy_tokenizer(config.data.tokenizer, part)
    for line in strange_to_transformers(config.model):
        logger.warning(f"{to}: {line}: its answers will differ there")
    return Exported(len(entries), files, sum(entry.bytes for entry in entries))


# --------------------------------------------------------------------------------------------------------- what is read


def _tensors(checkpoint: Path, cfg: ModelConfig, dtype: Dtype, ema: bool) -> list[_Tensor]:
    """All tensors, in the order of the layers."""
    shapes, found = parameter_shapes(cfg), []
    slots = _slots(checkpoint, cfg)
    opened = _open(checkpoint, shapes, len(slots), ema)
    for name, place in tensor_places(shapes, cfg).items():
        index = place.index
        if _is_stack(place.parameter):
            index = (slots.index(index[0]), *index[1:])
        array = opened[place.parameter]
        corner = tuple(i // length * length for i, length in zip(index, array.cut, strict=False))
        row = tuple(i - start for i, start in zip(index, corner, strict=True))
        own: Dtype = "fp32" if place.is_router_bias else "bf16" if dtype == "fp8" and not in_fp8(name) else dtype
        found.append(_Tensor(name, array, corner, row, place, place.shape(shapes), own))
    return found


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


def _values(tensors: Sequence[_Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all entries, piece by piece."""
    blocks: dict[tuple, list[_Tensor]] = {}
    for tensor in tensors:
        blocks.setdefault((tensor.place.parameter, tensor.corner), []).append(tensor)
    for own in blocks.values():
        values = own[0].array.read(own[0].corner)
        for tensor in own:
            yield from tensor.of(values)
        del values  # before the next is read


def _settings(config: RunConfig, dtype: Dtype) -> dict[str, Any]:
    """What stands in config.json; the tokens that begin and end a document are the tokenizer's."""
    tokenizer = open_tokenizer(config.data.tokenizer, vocab_size=config.model.vocab_size)
    tokens = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    hf = {**config_to_hf(config.model, config.data.sequence_length), **tokens}
    if dtype == "fp8":
        hf["quantization_config"] = QUANTIZATION
    return {**hf, "torch_dtype": "float32" if dtype == "fp32" else "bfloat16"}
