"""Files of safetensors (github.com/huggingface/safetensors) and their index, written tensor by tensor.

A file begins with the length of its header, 8 bytes; the header says, in JSON, where each tensor is. In a file those of
wider numbers come first, so that each begins at a multiple of its width: readers map them as they lie there.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from moejax.checkpoint.integrity import sync
from moejax.model.hf_fp8 import E4M3

Dtype = Literal["fp32", "bf16", "fp8"]

_NAMES = {"fp32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}  # in the files
_DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp8": np.dtype(E4M3)}


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def numpy(self) -> np.dtype:
        """Its dtype."""
        return _DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.numpy.itemsize


def write_tensors(
    folder: Path, entries: Sequence[Entry], values: Iterable[tuple[str, np.ndarray]], shard_bytes: float
) -> int:
    """Writes all tensors and their index, and returns the number of files.

    Args:
        folder: that exists.
        entries: all tensors; a file has those that follow each other.
        values: name and array of each, in any order.
        shard_bytes: of the tensors of a file at most; a tensor is never cut.
    """
    files = _files(entries, shard_bytes)
    places: dict[str, tuple[Path, int]] = {}  # file and offset of each tensor
    for number, own in enumerate(files, 1):
        path = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        begins = _begins(own)
        header = _header(own, begins)
        path.write_bytes(header)
        places |= {name: (path, len(header) + begin) for name, begin in begins.items()}
    wanted = {entry.name: (entry.numpy, entry.shape) for entry in entries}
    for name, array in values:
        assert wanted.pop(name) == (array.dtype, array.shape)
        path, offset = places[name]
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array  # before the next is made
    assert not wanted
    for path in sorted({path for path, _ in places.values()}):
        sync(path)
    total = sum(entry.bytes for entry in entries)
    weight_map = {entry.name: places[entry.name][0].name for entry in entries}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(files)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(entries: Sequence[Entry], most: float) -> list[list[Entry]]:
    """The tensors of each file, in their order."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.bytes > most:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    return files


def _begins(entries: Sequence[Entry]) -> dict[str, int]:
    """Where each tensor of a file begins, behind the header."""
    begins, end = {}, 0
    for entry in sorted(entries, key=lambda entry: -entry.numpy.itemsize):
        begins[entry.name] = end
        end += entry.bytes
    return begins


def _header(entries: Sequence[Entry], begins: dict[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in sorted(entries, key=lambda entry: begins[entry.name]):
        start = begins[entry.name]
        offsets = (start, start + entry.bytes)
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
