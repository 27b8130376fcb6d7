"""The tensors of a Hugging Face folder, opened, compared with what its config.json says, and read one by one."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.config import ConfigError
from moejax.model.hf_fp8 import E4M3, SCALE, dequantise, scale_shape

_FP8, _FLOATS = "F8_E4M3", ("F32", "F16", "BF16")  # as the files name them


class Tensors:
    """The tensors in the `.safetensors` files of a folder: a context manager, which keeps the files open.

    A weight in FP8 and its scales are one tensor here.
    """

    def __init__(self, folder: Path):
        """Raises ConfigError where there are none, or a file cannot be read."""
        self._folder, self._open = folder, ExitStack()
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        with ExitStack() as stack:
            for path in _paths(folder):
                try:
                    file = stack.enter_context(safe_open(path, framework="np"))
                except (OSError, SafetensorError) as error:
                    raise ConfigError("checkpoint", str(path), f"a whole safetensors file ({error})") from None
                names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
                self._files.update(dict.fromkeys(names, file))
                self._paths.update(dict.fromkeys(names, path))
            self._open = stack.pop_all()
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # of files with FP8: where it ends, and what it says

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def has_layer(self, layer: int) -> bool:
        """Whether there is any tensor of a layer."""
        return any(name.startswith(f"model.layers.{layer}.") for name in self._files)

    @property
    def kinds(self) -> set[str]:
        """The types of all tensors, as the files name them: F32, BF16, F8_E4M3."""
        return {file.get_slice(name).get_dtype() for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor; float32 of one in FP8, otherwise in its own dtype."""
        file = self._files[name]
        if file.get_slice(name).get_dtype() != _FP8:
            return file.get_tensor(name)
        return dequantise(self._read_fp8(name), self._files[name + SCALE].get_tensor(name + SCALE))

    def require(self, shapes: dict[str, tuple[int, ...]], optional: set[str]) -> None:
        """Raises one error with every tensor that is missing, unexpected or of another shape or type than it should be.

        `shapes`: what the folder's config.json says; `optional`: names of these that may be missing.
        """
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
        wanted = dict(shapes) | {
            name + SCALE: scale_shape(shape)
            for name, shape in shapes.items()
            if kinds.get(name) == _FP8 and len(shape) == 2
        }
        misshapen = [
            f"{name} {got} where its config.json says {list(shape)}"
            for name, shape in wanted.items()
            if name in slices and (got := slices[name].get_shape()) != list(shape)
        ]
        strange = [
            f"{name} ({kind})"
            for name, kind in kinds.items()
            if name in wanted and not (kind in _FLOATS or (kind == _FP8 and name + SCALE in wanted))
        ]
        wrong = {
            "missing": [name for name in wanted if name not in slices and name not in optional],
            "unexpected": [name for name in slices if name not in wanted],
            "of another shape": misshapen,
            f"of another type than {', '.join(_FLOATS)}, or {_FP8} with scales": strange,
        }
        if any(wrong.values()):
            parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in wrong.items() if names]
            wanted_words = "the tensors that its config.json says; " + "; ".join(parts)
            raise ConfigError("checkpoint", str(self._folder), wanted_words)

    def _read_fp8(self, name: str) -> np.ndarray:
        """Its E4M3 numbers, for which `safetensors` has no NumPy type."""
        path = self._paths[name]
        if path not in self._headers:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + length, json.loads(file.read(length))
        start, header = self._headers[path]
        first, past = header[name]["data_offsets"]
        numbers = np.fromfile(path, np.uint8, past - first, offset=start + first)
        return numbers.view(E4M3).reshape(header[name]["shape"])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a folder; ConfigError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("checkpoint", str(path), "a JSON object")
    return values


def _paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = sorted({folder / file for file in read_json(index).get("weight_map", {}).values()})
    else:
        found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConfigError("checkpoint", str(folder), "a folder with .safetensors files")
    return found


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
