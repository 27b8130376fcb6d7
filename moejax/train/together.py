"""What the processes of a run say to each other outside of the compiled step. One process says it to itself.

Every function here is called by all processes in the same order.
"""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.config import ConfigError

Result = TypeVar("Result")


def is_main() -> bool:
    """Whether this is the process that writes the run folder and the console."""
    return jax.process_index() == 0


def everyones(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size)).reshape(-1)
    padded = np.pad(own, (0, int(sizes.max()) - own.size))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(action: Callable[[], Result]) -> Result:
    """`action()` on every process; a ConfigError of one is raised on all of them, with the same words."""
    error, result = None, None
    try:
        result = action()
    except ConfigError as raised:
        error = raised
    first = next((e for e in everyones(error and (error.place, error.value, error.wanted)) if e is not None), None)
    if first is not None:
        raise ConfigError(*first) from error
    return result  # type: ignore[return-value]


def main_first(action: Callable[[], Result]) -> Result:
    """`action()` on the main process, then on the others, which find what it left on a disk that they share."""
    done = together(lambda: action() if is_main() else None)
    return together(lambda: action() if done is None else done)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array that may lie in shards on the devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class CompiledTogether:
    """A jitted function of which a new program runs once all processes have compiled it.

    Where they meet for the first time, some transports give up when the other process is half a minute late.
    """

    def __init__(self, function: Any, compiling: Callable[[], AbstractContextManager] = nullcontext):
        """`function`: as `jax.jit` returns it; `compiling`: a context in which each of its programs is compiled."""
        self._function, self._compiling = function, compiling
        self._programs: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        shapes = tuple(_shape(leaf) for leaf in jax.tree.leaves(arguments))
        if shapes not in self._programs:
            with self._compiling():
                self._programs[shapes] = self._function.lower(*arguments).compile()
                everyones(None)
        # one process may call the function itself, which finds the program and takes other shardings too
        return (self._function if jax.process_count() == 1 else self._programs[shapes])(*arguments)


def _shape(leaf: Any) -> tuple:
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else (type(leaf),)
