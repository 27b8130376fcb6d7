"""The compiled programs of generation: three for a batch's shape, each compiled once.

A batch's rows are spread over the axes over which training spreads them; where their number does not divide, there are
rows more that nobody asked for. Weights lie as `decoder.taken_apart` put them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt32

from moejax.mesh import BATCH_AXES
from moejax.model.decoder import Decoder, new_cache
from moejax.ops.latent import BLOCK
from moejax.serve.rows import Rows, prefill, step
from moejax.serve.sampling import Sampling
from moejax.train.together import everyones
from moejax.varying import vary_over

_LEAST_SLOTS, _LEAST_CHUNK, _MOST_CHUNK = 64, 16, 256

Kind = Literal["greedy", "plain", "filtered"]


@dataclass(frozen=True)
class Shape:
    """What the programs of a batch are compiled for."""

    rows: int
    slots: int  # tokens of a row
    chunk: int  # positions of a prefill
    depth: int  # drafts of a step
    kind: Kind

    @classmethod
    def of(cls, rows: int, prompt: int, tokens: int, depth: int, kind: Kind, shards: int) -> "Shape":
        """For so many rows of at most `tokens` tokens; `prompt`: of the longest. Few sizes serve many batches."""
        wanted = tokens + depth + 1
        slots = max(_LEAST_SLOTS, _power_of_two(wanted)) if wanted <= 2 * BLOCK else -(-wanted // BLOCK) * BLOCK
        chunk = min(_MOST_CHUNK, slots, max(_LEAST_CHUNK, _power_of_two(prompt - 1)))
        return cls(-(-rows // shards) * shards, slots, chunk, depth, kind)


class Engine:
    """The programs, on the weights of a model."""

    def __init__(self, decoder: Decoder, mesh: Mesh, dtype: DTypeLike):
        self.leaves, self.structure = jax.tree.flatten(decoder)
        self.specs = [leaf.sharding.spec for leaf in self.leaves]
        self.cfg, self.mesh, self.dtype = decoder.cfg, mesh, dtype
        self.shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        self.compile_seconds = 0.0  # of all programs so far
        self._programs: dict[tuple, Any] = {}

    def start(
        self,
        shape: Shape,
        tokens: Int[np.ndarray, "R T"],
        length: Int[np.ndarray, "R"],
        number: Int[np.ndarray, "R"],
        keys: UInt32[np.ndarray, "R W"],
    ) -> Rows:
        """Rows with empty caches; see `Rows`."""
        return self._program("start", shape, tokens, length, number, keys)(tokens, length, number, keys)

    def ready(self, shape: Shape, rows: Rows) -> None:
        """Compiles what rows of this shape will need."""
        self._program("prefill", shape, self.leaves, rows, np.int32(0))
        self._program("step", shape, self.leaves, rows, _numbers(Sampling()))

    def prefill(self, shape: Shape, rows: Rows, start: int) -> Rows:
        """`rows.prefill` of a chunk; the rows that it is given are donated."""
        where = np.int32(start)
        return self._program("prefill", shape, self.leaves, rows, where)(self.leaves, rows, where)

    def step(self, shape: Shape, rows: Rows, sampling: Sampling) -> tuple[Rows, tuple[Array, Array]]:
        """`rows.step`; the rows that it is given are donated, the tokens are on every device."""
        numbers = _numbers(sampling)
        return self._program("step", shape, self.leaves, rows, numbers)(self.leaves, rows, numbers)

    def _program(self, name: str, shape: Shape, *arguments: Any) -> Any:
        size = {"prefill": shape.chunk, "step": shape.kind}.get(name)
        key = name, shape.rows, shape.slots, shape.depth, size
        if key not in self._programs:
            began = time.perf_counter()
            made = getattr(self, f"_make_{name}")(shape)
            self._programs[key] = made.lower(*arguments).compile()
            everyones(None)  # where they meet for the first time, nobody is to come late
            self.compile_seconds += time.perf_counter() - began
        return self._programs[key]

    def _make_start(self, shape: Shape) -> Any:
        def start(*whole: Array) -> Rows:
            each, index = shape.rows // self.shards, lax.axis_index(BATCH_AXES)
            own = (lax.dynamic_slice_in_dim(vary_over(x, BATCH_AXES), index * each, each) for x in whole)
            tokens, length, number, keys = own
            cache = new_cache(self.cfg, each, shape.slots, shape.depth, self.dtype)
            recent = jnp.zeros((each, max(2 * shape.depth, 1), self.cfg.hidden_size), self.dtype)
            cache, recent = jax.tree.map(lambda x: vary_over(x, BATCH_AXES), (cache, recent))
            return Rows(tokens, length, number, keys, cache, recent)

        return jax.jit(self._on_each_device(start, (P(), P(), P(), P()), P(BATCH_AXES)))

    def _make_prefill(self, shape: Shape) -> Any:
        def run(leaves: list[Array], rows: Rows, start: Array) -> Rows:
            return prefill(self._decoder(leaves), rows, start, shape.chunk)

        return self._compiled(run, P(), P(BATCH_AXES))

    def _make_step(self, shape: Shape) -> Any:
        def run(leaves: list[Array], rows: Rows, numbers: tuple) -> tuple[Rows, Any]:
            rows, new = step(self._decoder(leaves), rows, shape.kind, numbers)
            return rows, jax.tree.map(_of_all_devices, new)

        return self._compiled(run, (P(), P(), P()), (P(BATCH_AXES), P()))

    def _compiled(self, run: Callable, numbers: Any, outputs: Any) -> Any:
        inputs = self.specs, P(BATCH_AXES), numbers
        return jax.jit(self._on_each_device(run, inputs, outputs), donate_argnums=1)

    def _on_each_device(self, run: Callable, inputs: Any, outputs: Any) -> Callable:
        return jax.shard_map(run, mesh=self.mesh, in_specs=inputs, out_specs=outputs)

    def _decoder(self, leaves: list[Array]) -> Decoder:
        return jax.tree.unflatten(self.structure, [vary_over(leaf, BATCH_AXES) for leaf in leaves])


def _of_all_devices(x: Array) -> Array:
    """The rows of all devices, in order, on each."""
    whole = jnp.zeros((lax.axis_size(BATCH_AXES), *x.shape), x.dtype)
    whole = vary_over(whole, BATCH_AXES).at[lax.axis_index(BATCH_AXES)].set(x)
    return lax.psum(whole, BATCH_AXES).reshape(-1, *x.shape[1:])


def _numbers(sampling: Sampling) -> tuple[np.float32, np.int32, np.float32]:
    """What a compiled step is given of it."""
    return np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
