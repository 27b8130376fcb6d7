"""What a compiled program sends between devices: its collectives, read from XLA's text of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # of KINDS
    dims: tuple[tuple[int, ...], ...]  # of each array that a device has after it
    bytes: int  # of these arrays
    groups: tuple[tuple[int, ...], ...]  # devices that exchange with each other; of a permute, pairs from and to
    looped: bool  # stands in a loop, or in what a loop calls

    def bytes_between(self, part_of_device: Sequence[int]) -> int:
        """Bytes that an all-to-all carries, once executed, between devices of different parts (nodes)."""
        assert self.kind == "all-to-all"
        part = np.asarray(part_of_device)
        pairs = sum(int((part[list(group)][:, None] != part[list(group)]).sum()) for group in self.groups)
        return self.bytes // len(self.groups[0]) * pairs


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program, `compiled.as_text()`; each stands there once, however often it is executed."""
    looped = _lines_in_loops(hlo)
    found = []
    for line in hlo.splitlines():
        match = _OPERATION.search(line)
        if match:
            result, kind, rest = match.groups()
            dims, sizes = zip(*arrays(result), strict=True)
            found.append(Collective(kind, dims, sum(sizes), _groups(rest), line in looped))
    return found


def arrays(result: str) -> list[tuple[tuple[int, ...], int]]:
    """The dims of each array of a result as XLA writes it, and its bytes."""
    found = re.findall(r"[a-z]+(\d*)[a-z0-9]*\[([\d,]*)\]", result)
    shapes = ((tuple(_numbers(dims)), int(bits or 8)) for bits, dims in found)
    return [(dims, math.prod(dims) * max(bits, 8) // 8) for dims, bits in shapes]


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if line.endswith("{") and "(" in line and "=" not in line.split("(")[0]:
            lines = found.setdefault(line.removeprefix("ENTRY ").split(" ")[0].lstrip("%"), [])
        lines.append(line)
    return found


def _lines_in_loops(hlo: str) -> set[str]:
    """The lines of all computations that a `while` calls, directly or not."""
    parts = computations(hlo)
    called = {name: set(re.findall(r"%([\w.\-]+)", " ".join(lines))) & parts.keys() for name, lines in parts.items()}
    reached: set[str] = set()
    bodies = set(re.findall(r"(?:body|condition)=%([\w.\-]+)", hlo)) & parts.keys()
    while bodies:
        name = bodies.pop()
        reached.add(name)
        bodies |= called[name] - reached
    return {line for name in reached for line in parts[name]}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective: written out, a range reshaped and transposed, or all along named axes of a mesh."""
    if "source_target_pairs=" in text:
        text = text.split("source_target_pairs=")[1]
        return tuple(tuple(_numbers(pair)) for pair in re.findall(r"\{(\d+,\d+)\}", text.split("}}")[0] + "}"))
    text = text.split("replica_groups=")[1]
    if text.startswith("{"):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}"))
    if text.startswith("mesh"):
        mesh, along = re.match(r"mesh\[(.*?)\] *\{(.*?)\}", text).groups()  # type: ignore[union-attr]
        lengths = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", mesh)}
        names, sizes = list(lengths), list(lengths.values())
        order = sorted(range(len(names)), key=lambda i: f"'{names[i]}'" in along)
        length = math.prod(size for name, size in zip(names, sizes, strict=True) if f"'{name}'" in along)
        rows = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, length)
    else:
        pattern = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
        shape, dims, transposed = re.match(pattern, text).groups()  # type: ignore[union-attr]
        devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        rows = devices.transpose(_numbers(transposed) if transposed else None).reshape(_numbers(shape))
    return tuple(tuple(row) for row in rows.tolist())
