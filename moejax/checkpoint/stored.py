"""The arrays of one checkpoint: what there is, from what is written beside them, and their parts, without devices."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint.commit import orbax_settings
from moejax.config import ConfigError


@dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint."""

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str  # mesh axes over which each dim was cut
    bytes: int


def arrays(folder: Path) -> list[StoredArray]:
    """The arrays of one checkpoint.

    Raises:
        ConfigError: that cannot be read.
    """
    return [_array(part, path, leaf) for part, path, leaf in leaves(folder)]


def leaves(folder: Path) -> list[tuple[str, tuple, Any]]:
    """Part, path and Orbax's description of every array; ConfigError where they cannot be read."""
    try:
        with orbax_settings():
            parts = ocp.checkpointables_metadata(folder.absolute()).metadata
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError("checkpoint", str(folder), f"one that Orbax can read ({type(error).__name__})") from None
    found = ((part, jax.tree_util.tree_leaves_with_path(tree)) for part, tree in parts.items())
    return [(part, path, leaf) for part, tree in found for path, leaf in tree]


class OpenArray:
    """An array of a checkpoint of which blocks can be read: an OCDBT database of Orbax's has it as Zarr 3."""

    def __init__(self, folder: Path, part: str, name: str):
        """`name`: its path in the tree of the part, `params.embed_VD.value`.

        Raises:
            ConfigError: it is not there.
        """
        self._place = f"checkpoint {folder}", f"{part}/{name}"
        database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute() / part}/"}}
        spec = {"driver": "zarr3", "kvstore": {**database, "path": f"{name}/"}}
        try:
            self._array = tensorstore.open(spec, open=True, read=True).result()
        except ValueError:
            raise ConfigError(*self._place, "an array of the checkpoint") from None
        self.shape: tuple[int, ...] = tuple(self._array.shape)
        piece: Any = self._array.chunk_layout.read_chunk.shape
        self.cut: tuple[int, ...] = tuple(piece)  # the shape of the pieces in which it lies there

    def read(self, corner: tuple[int, ...]) -> np.ndarray:
        """The block that begins at `corner` and is as long as a piece in the dims of `corner`, whole in the others.

        Raises:
            ConfigError: its files are gone, or damaged.
        """
        block = tuple(
            slice(start, min(start + length, size))
            for start, length, size in zip(corner, self.cut, self.shape, strict=False)
        )
        try:
            return self._array[block].read().result()
        except ValueError as error:
            wanted = f"an array whose files stay as they were written ({str(error).splitlines()[0]})"
            raise ConfigError(*self._place, wanted) from None


def _array(part: str, path: tuple, leaf: Any) -> StoredArray:
    names = (str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
    spec = getattr(leaf.sharding_metadata, "partition_spec", None) or ()
    axes = (entry if isinstance(entry, str) else ", ".join(entry or ()) for entry in spec)
    dtype = np.dtype(leaf.dtype)
    return StoredArray(
        part=part,
        name=".".join(name for name in names if name != "value"),
        shape=tuple(leaf.shape),
        dtype=dtype.name,
        spec=" | ".join(axis or "-" for axis in axes),
        bytes=math.prod(leaf.shape) * dtype.itemsize,
    )
