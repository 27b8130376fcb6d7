"""A checkpoint whose arrays come piece by piece, from elsewhere: memory never holds them.

Orbax writes arrays that are on devices. So it writes the same tree with one number for each array, and then each array
takes the place of its number, in pieces, in the same OCDBT database. What Orbax notes of shapes beside it is put right.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint.commit import orbax_settings
from moejax.checkpoint.integrity import write_manifest

STAGED_BYTES = 2**28  # of pieces that are written together


class NewCheckpoint:
    """One part of arrays, and `meta`, of a checkpoint that is being written; `finish` ends it."""

    def __init__(self, folder: Path, part: str, shapes: Any, meta: dict[str, Any]):
        """Makes the folder.

        Args:
            folder: where nothing is yet; it gets its name when it is whole, by whoever made its parent.
            part: of the arrays.
            shapes: a pytree of `jax.ShapeDtypeStruct` with shardings of one device.
            meta: plain JSON.
        """
        folder = folder.absolute()  # as Orbax wants it
        ones = jax.tree.map(lambda x: jax.device_put(np.zeros((1,) * x.ndim, x.dtype), x.sharding), shapes)
        with orbax_settings():
            ocp.save_checkpointables(folder, {part: ones, "meta": meta})
        self._folder, self._part = folder, folder / part
        self._noted: dict[str, dict[str, list[int]]] = {}
        self._writes: list[Any] = []  # that go on; the database joins those into one file
        self._staged = 0

    def arrays(self, wanted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Any]:
        """Arrays, float32, by their paths in the tree (`params.embed_VD.value`), given shapes, theirs and a piece's."""
        shared = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2**26}})  # else each array is another writer
        database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._part.absolute()}/"}}
        made = {}
        for name, (shape, piece) in wanted.items():
            self._noted[name] = {"write_shape": list(piece), "chunk_shape": list(piece)}
            made[name] = tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {**database, "path": f"{name}/"},
                    "cache_pool": {"total_bytes_limit": 0},
                },
                context=shared,
                create=True,
                delete_existing=True,  # the number
                dtype=tensorstore.float32,
                shape=shape,
                chunk_layout=tensorstore.ChunkLayout(chunk_shape=piece),
            )
        return {name: array.result() for name, array in made.items()}

    def write(self, array: Any, index: tuple[int, ...], values: np.ndarray) -> None:
        """Writes the piece at an index of the leading dims; `values` must not change any more."""
        self._writes.append(array[index].write(values, can_reference_source_data_indefinitely=True))
        self._staged += values.nbytes
        if self._staged >= STAGED_BYTES:
            self._wait()

    def finish(self) -> None:
        """Writes what is left, and the checksums."""
        self._wait()
        shutil.rmtree(self._part / "ocdbt.process_0", ignore_errors=True)  # of the numbers alone
        for file, rows in (("_METADATA", _tree_rows), ("array_metadatas/process_0", _array_rows)):
            content = json.loads((self._part / file).read_text(encoding="utf-8"))
            for name, row in rows(content):
                row.update({key: value for key, value in self._noted[name].items() if key in row})
            (self._part / file).write_text(json.dumps(content), encoding="utf-8")
        write_manifest(self._folder)

    def _wait(self) -> None:
        for write in self._writes:
            write.result()
        self._writes, self._staged = [], 0


def _tree_rows(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [(row["key_metadata"], row["value_metadata"]) for row in content["tree_metadata"].values()]
    return [(".".join(key["key"] for key in keys), value) for keys, value in rows if "write_shape" in value]


def _array_rows(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [row["array_metadata"] for row in content["array_metadatas"]]
    return [(row["param_name"], row) for row in rows]
