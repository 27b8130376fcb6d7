"""A Hugging Face folder as a run folder with one checkpoint, at step 0, for `--resume-from`, `moejax.load` and others.

Tensors are read one by one and written where they belong; memory holds a piece of an array, which is a layer or an
expert, and the tensors that it is made of. The master weights are float32: what the tensors stand for, exactly.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.copying import becoming
from moejax.checkpoint.piecewise import NewCheckpoint
from moejax.config import ONE_DEVICE, ConfigError, DataConfig, ModelConfig, RunConfig
from moejax.data.tokens import open_tokenizer
from moejax.mesh import one_device_mesh
from moejax.model.hf import Place, open_hf, parameter_shapes, tensor_places
from moejax.model.hf_files import Tensors, read_json
from moejax.serve.tokenizer_files import TOKENIZER, copy_tokenizer
from moejax.train.environment import versions
from moejax.train.state import abstract_state

logger = logging.getLogger("moejax")

BEFORE_TRAINING = 0  # the step of the checkpoint
DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class Imported:
    """What was read."""

    tensors: int
    bytes: int  # of the arrays that were written
    config: RunConfig


def import_hf(folder: Path, out: Path) -> Imported:
    """Writes a run folder, which appears when it is whole, with the model of a Hugging Face folder.

    Its settings have the model and the tokenizer; the others are the defaults. A model of FP32 tensors computes in
    FP32, any other in BF16. Without a tokenizer.json text is bytes, and the log says so.

    Args:
        folder: config.json and `.safetensors` files of DeepSeek-V3, V2 or V2-Lite's layout, FP8 or not.
        out: a place where nothing is yet.

    Raises:
        ConfigError: a file cannot be read; tensors are missing, unexpected or of another shape, all in one error; the
            tokenizer cannot be used; there is something at `out`, or it cannot be written.
    """
    with open_hf(folder) as (cfg, tensors), becoming(out) as part:
        config = _config(folder, out, cfg, tensors)
        (part / "config.json").write_text(config.to_json(), encoding="utf-8")
        if config.data.tokenizer != "bytes":
            copy_tokenizer(str(folder / TOKENIZER), part)
        count, size = _write_checkpoint(part / "checkpoints" / str(BEFORE_TRAINING), config, tensors)
    return Imported(count, size, config)


def _config(folder: Path, out: Path, cfg: ModelConfig, tensors: Tensors) -> RunConfig:
    """The settings of the run that the folder stands for."""
    there = (folder / TOKENIZER).is_file()
    try:
        open_tokenizer(str(folder / TOKENIZER) if there else "bytes", vocab_size=cfg.vocab_size)
    except ConfigError as error:
        wanted = error.wanted if there else f"a folder with a {TOKENIZER}: without one text is bytes, for which its"
        wanted = wanted if there else f"{wanted} vocabulary of {cfg.vocab_size} is too small"
        raise ConfigError("DIR", str(folder), wanted) from None
    if not there:
        logger.warning(f"{folder} has no {TOKENIZER}: text is taken as bytes")
    yarn = cfg.attention.yarn
    seen = read_json(folder / "config.json").get("max_position_embeddings") or DEFAULT_LENGTH
    length = seen if yarn is None else int(yarn.factor * yarn.original_length)
    tokenizer = str(out / TOKENIZER) if there else "bytes"
    return RunConfig(
        name=out.name,
        steps=1,
        precision="fp32" if tensors.kinds == {"F32"} else "bf16",
        model=cfg,
        mesh=ONE_DEVICE,
        data=dataclasses.replace(DataConfig(), tokenizer=tokenizer, sequence_length=length),
    )


def _write_checkpoint(folder: Path, config: RunConfig, tensors: Tensors) -> tuple[int, int]:
    """The number of tensors that were read, and the bytes of the arrays."""
    cfg = config.model
    state = abstract_state(config, one_device_mesh())
    meta: dict[str, Any] = {"step": BEFORE_TRAINING, "tokens": 0, "valid_loss": None, "data": None}
    meta |= {"layer_of_slot": list(range(cfg.num_moe_layers))}
    meta |= {"config": dataclasses.asdict(config), "versions": versions()}
    new = NewCheckpoint(folder, "model", {"params": state.params, "router_bias": state.router_bias}, meta)
    shapes, pieces = parameter_shapes(cfg), _pieces(cfg)
    leading = {name: len(next(iter(own))) for name, own in pieces.items()}  # dims along which an array is cut
    arrays = new.arrays(
        {_stored(name): (shape, (1,) * leading[name] + shape[leading[name] :]) for name, shape in shapes.items()}
    )
    count = 0
    for name, shape in shapes.items():
        for index, places in pieces[name].items():
            values = np.zeros(shape[leading[name] :], np.float32)
            for tensor, place in places:
                place.view(values)[...] = tensors.read(tensor)
            new.write(arrays[_stored(name)], index, values)
            count += len(places)
    new.finish()
    return count, sum(4 * math.prod(shape) for shape in shapes.values())


def _stored(name: str) -> str:
    """The path of a parameter's array in a checkpoint."""
    tree = "router_bias" if name.endswith(".router_bias") else "params"
    return f"{tree}.{name}.value"  # of a variable of NNX


def _pieces(cfg: ModelConfig) -> dict[str, dict[tuple[int, ...], list[tuple[str, Place]]]]:
    """Of each parameter the tensors that a piece is made of, by its index in the leading dims."""
    shapes = parameter_shapes(cfg)
    found: dict[str, dict[tuple[int, ...], list[tuple[str, Place]]]] = {name: {} for name in shapes}
    for tensor, place in tensor_places(shapes, cfg).items():
        if not place.copy:
            found[place.parameter].setdefault(place.index, []).append((tensor, place))
    return found
