"""What checkpoints a run has, here or at an address, and what is in them: the tables of `moejax checkpoints`."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moejax.checkpoint.commit import SAVING, read_meta
from moejax.checkpoint.integrity import verify
from moejax.checkpoint.manager import DAMAGED
from moejax.checkpoint.remote import Copy
from moejax.checkpoint.stored import StoredArray, leaves
from moejax.config import ConfigError


@dataclass(frozen=True)
class Entry:
    """One folder of checkpoints/."""

    name: str
    step: int
    state: str  # committed; saving, or left by a run that was killed; damaged, and kept aside
    bytes: int
    saved: float  # seconds since the epoch
    mesh: dict[str, int]  # lengths of the axes on which it was saved
    tokens: int | None
    valid_loss: float | None


def entries(run: str | Path) -> list[Entry]:
    """The checkpoints of a run folder, oldest step first.

    Raises:
        ConfigError: it has none.
    """
    folder = checkpoints_of(run)
    found = []
    for path in folder.iterdir():
        if path.name.split(".")[0].isdigit() and path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # the run has just renamed or deleted it
                found.append(_entry(path))
    return sorted(found, key=lambda entry: (entry.step, entry.name))


def folders(run: str | Path, step: int | None) -> list[Path]:
    """The checkpoints of a run that were committed, oldest first; only that of `step`, unless it is None.

    Raises:
        ConfigError: there is none.
    """
    steps = [entry.step for entry in entries(run) if entry.state == "committed"]
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none yet"
        raise ConfigError("STEP", step, f"a checkpoint of {run}, which has {there}")
    return [checkpoints_of(run) / str(number) for number in (steps if step is None else [step])]


def report(folder: Path) -> tuple[list[str], bool]:
    """What a comparison of a checkpoint's files with their checksums says, and whether it is whole."""
    found = verify(folder)
    facts = f"checkpoint {folder.name}: {found.files} files, {found.bytes / 1e6:,.1f} MB"
    if not found.damages:
        return [f"{facts}, whole"], True
    return [f"{facts}, damaged", *(f"  {damage}" for damage in found.damages)], False


def checkpoints_of(run: str | Path) -> Path:
    """The folder with a run's checkpoints.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        raise ConfigError("RUN", str(run), "a run folder with checkpoints")
    return folder


def as_table(found: Sequence[Entry]) -> Table:
    """A row for each checkpoint."""
    table = Table("step", "state", "saved", "MB", "mesh", "tokens", "valid. loss")
    for entry in found:
        mesh = " x ".join(f"{axis} {length}" for axis, length in entry.mesh.items() if length > 1) or "one device"
        numbers = f"{entry.bytes / 1e6:,.1f}", mesh, "" if entry.tokens is None else f"{entry.tokens:,}"
        loss = "" if entry.valid_loss is None else f"{entry.valid_loss:.4f}"
        table.add_row(str(entry.step), entry.state, _age(time.time() - entry.saved), *numbers, loss)
    return table


def as_copy_table(found: Sequence[Copy]) -> Table:
    """A row for each copy at an address."""
    table = Table("step", "state", "files", "MB")
    for copy in found:
        table.add_row(str(copy.step), copy.state, f"{copy.files:,}", f"{copy.bytes / 1e6:,.1f}")
    return table


def as_array_table(found: Sequence[StoredArray]) -> Table:
    """A row for each array, and their sum."""
    table = Table("part", "array", "shape", "dtype", "cut over", "MB")
    for array in found:
        shape = " x ".join(map(str, array.shape)) or "scalar"
        table.add_row(array.part, array.name, shape, array.dtype, array.spec, f"{array.bytes / 1e6:,.3f}")
    table.add_row("", "all", "", "", "", f"{sum(array.bytes for array in found) / 1e6:,.3f}")
    return table


def as_json(found: Sequence[Entry] | Sequence[Copy] | Sequence[StoredArray]) -> list[dict[str, Any]]:
    """The same as objects."""
    return [asdict(row) for row in found]


def _mesh(path: Path) -> dict[str, int]:
    """Lengths of the axes on which a checkpoint was saved; none where it cannot be read."""
    with contextlib.suppress(ConfigError):
        for _, _, leaf in leaves(path):
            if hasattr(leaf.sharding_metadata, "axis_names"):
                lengths = np.asarray(leaf.sharding_metadata.shape).tolist()
                return dict(zip(leaf.sharding_metadata.axis_names, lengths, strict=True))
    return {}


def _entry(path: Path) -> Entry:
    word, _, rest = path.name.partition(".")
    state = "damaged" if rest.startswith(DAMAGED[1:]) else "saving" if rest.startswith(SAVING[1:]) else "committed"
    meta = read_meta(path)
    return Entry(
        name=path.name,
        step=int(word),
        state=state,
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        saved=path.stat().st_mtime,
        mesh=_mesh(path),
        tokens=meta.get("tokens"),
        valid_loss=meta.get("valid_loss"),
    )


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
