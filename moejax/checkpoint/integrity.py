"""Checksums of a checkpoint's files: written before its folder is committed, checked before a restore.

Orbax restores flipped bits silently. So the processes of a run add one file each to the folder of a step, and share
out the reading, both when they write and when they verify:

    manifest.<part>.json    {"format": 1, "part": 0, "parts": 2, "block_bytes": 67108864,
                             "files": {"state/_METADATA": {"bytes": 396, "crc32": [2774514218]}, ...},
                             "crc32": "8d1f2c7b"}

A file has one CRC-32 for each block of it, so that large files are read in parallel and sampled in part. The manifest's
own CRC-32, of all the text before it, comes last. A part's files are what its process wrote, those below a folder that
Orbax calls `ocdbt.process_<K>` with K % parts = part; all others are part 0's. Verifying takes any number of parts.

The manifests are files beside the parts of the checkpoint, since Orbax takes every folder there for such a part.
"""

import errno
import hashlib
import itertools
import json
import os
import random
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moejax.config import ConfigError

FORMAT = 1
BLOCK_BYTES = 64 << 20
CHUNK_BYTES = 1 << 18  # read at a time by each thread; larger ones fall out of its cache
THREADS = 8
POLL_SECONDS = 0.2
STRAY = "not written by the run"

_MANIFEST = re.compile(r"manifest\.[0-9]+\.json(\.part)?")
_PROCESS = re.compile(r"(?:^|/)ocdbt\.process_(?:replica_)?([0-9]+)/")


@dataclass(frozen=True, order=True)
class Damage:
    """What is wrong with one file of a checkpoint; `str(damage)` is one line for the user."""

    file: str  # relative to the checkpoint's folder
    what: str

    def __str__(self) -> str:
        return f"{repr(self.file)[1:-1]}: {self.what}"  # a damaged name may hold what does not print


@dataclass(frozen=True)
class Verified:
    """What `verify` found, and how much it looked at."""

    damages: tuple[Damage, ...]  # sorted by file
    files: int  # that the manifests name
    bytes: int  # of these files together
    bytes_read: int  # by this part


class _Block(NamedTuple):
    """The bytes [start, stop) of a file."""

    name: str
    start: int
    stop: int
    crc32: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start


# ------------------------------------------------------------------------------------------------------------- write


def write_manifest(folder: Path, part: int = 0, parts: int = 1, threads: int = THREADS) -> None:
    """Writes the manifest of a part's files, all of which must be closed; the file is whole or not there.

    Raises:
        OSError: a file cannot be read or is not a regular one, or the manifest cannot be written.
    """
    _require_part(part, parts)
    files: dict[str, dict[str, Any]] = {}
    for name, size in sorted(_walk(folder, own=(part, parts))):
        if isinstance(size, str):
            raise OSError(f"{folder / name}: {size}")
        files[name] = {"bytes": size, "crc32": []}
    blocks = [block for name, file in files.items() for block in _cut(name, file["bytes"], BLOCK_BYTES)]
    with ThreadPoolExecutor(threads) as pool:
        for block, crc32 in zip(blocks, pool.map(lambda block: _crc32(folder, block), blocks), strict=True):
            files[block.name]["crc32"].append(crc32)
    content = {"format": FORMAT, "part": part, "parts": parts, "block_bytes": BLOCK_BYTES, "files": files}
    text = json.dumps(content).encode()[:-1]
    temporary = folder / f"{_path(part)}.part"
    temporary.write_bytes(text + _seal(text))
    sync(temporary)
    os.replace(temporary, folder / _path(part))
    sync(folder)


def is_complete(folder: Path, wait: float = 0.0) -> bool:
    """Whether the manifests of all parts are there and whole, as soon as they are or after `wait` seconds.

    The folder must have been new when it was written to: manifests left by an earlier attempt count.
    """
    end = time.monotonic() + wait
    while True:
        if not _read_manifests(folder)[1]:
            return True
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(POLL_SECONDS, left))


def _seal(text: bytes) -> bytes:
    """The end of a manifest: the checksum of the text before it."""
    return b', "crc32": "%08x"}\n' % zlib.crc32(text)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ verify


def verify(
    folder: Path, part: int = 0, parts: int = 1, sample: float = 1.0, seed: int = 0, threads: int = THREADS
) -> Verified:
    """Compares the folder with its manifests: names and sizes of all files, and the contents of this part's share.

    The shares of all parts together are every byte once. A file that cannot be read is a damage. Where a manifest is
    damaged itself, nothing is said of the files that only it can name.

    Args:
        folder: of a checkpoint that was committed.
        part: of those that verify, in [0, parts).
        parts: that verify; need not be as many as wrote.
        sample: how much of the share is read, in [0, 1]: whole blocks, at least so many of its bytes.
        seed: chooses the blocks of a sample.
        threads: that read.
    """
    _require_part(part, parts)
    if not 0 <= sample <= 1:
        raise ValueError(f"sample={sample} is not in [0, 1]")
    manifests, damages = _read_manifests(folder)
    sizes: dict[str, int] = {}
    blocks: list[_Block] = []
    for manifest in manifests.values():
        for name, file in manifest["files"].items():
            if name in sizes:
                damages.append(Damage(name, "in the manifests of two parts"))
                continue
            sizes[name] = file["bytes"]
            cut = _cut(name, file["bytes"], manifest["block_bytes"])
            blocks += [block._replace(crc32=crc32) for block, crc32 in zip(cut, file["crc32"], strict=True)]
    found = dict(_walk(folder))
    damages += _compare(sizes, found, manifests)
    share = _share(sorted(blocks), part, parts, sample, seed)
    share = [block for block in share if found.get(block.name) == sizes[block.name]]
    damages += _read(folder, share, threads)
    return Verified(tuple(sorted(set(damages))), len(sizes), sum(sizes.values()), sum(block.size for block in share))


def identity(folder: Path) -> str:
    """A short hash of what the manifests say: the same for the same files, however many parts wrote them.

    Raises:
        ConfigError: a manifest is missing or damaged.
    """
    manifests, damages = _read_manifests(folder)
    if damages:
        raise ConfigError("checkpoint", str(folder), f"one with whole manifests ({damages[0]})")
    files = {name: (file, m["block_bytes"]) for m in manifests.values() for name, file in m["files"].items()}
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=12).hexdigest()


def _read_manifests(folder: Path) -> tuple[dict[int, dict[str, Any]], list[Damage]]:
    """The whole manifests by part, and what is wrong with the others."""
    manifests: dict[int, dict[str, Any]] = {}
    damages = []
    names = {name: size for name, size in sorted(_list(folder)) if name == "." or _MANIFEST.fullmatch(name)}
    for name, size in names.items():
        content = size if isinstance(size, str) else _read_manifest(folder, name)
        if isinstance(content, str):
            damages.append(Damage(name, content))
        else:
            manifests[content["part"]] = content
    parts = manifests[min(manifests)]["parts"] if manifests else 1
    for part, manifest in sorted(manifests.items()):
        if manifest["parts"] != parts:
            what = f"written by one of {manifest['parts']} parts, {_path(min(manifests))} by one of {parts}"
            damages.append(Damage(_path(part), what))
            del manifests[part]
    if "." not in names:
        damages += [Damage(_path(part), "missing") for part in range(parts) if _path(part) not in names]
    return manifests, damages


def _read_manifest(folder: Path, name: str) -> dict[str, Any] | str:
    """The content of a manifest, or what is wrong with it."""
    if name.endswith(".part"):
        return STRAY
    try:
        raw = (folder / name).read_bytes()
    except OSError as error:
        return _words(error)
    text = raw[: -len(_seal(b""))]
    if raw != text + _seal(text):
        return "damaged"
    content = json.loads(raw)
    if content.get("format") != FORMAT:
        return f"of format {content.get('format')}; this version reads format {FORMAT}"
    if _path(content["part"]) != name:
        return f"written as {_path(content['part'])} of {content['parts']} parts"
    return content


def _compare(sizes: dict[str, int], found: dict[str, int | str], manifests: dict[int, dict]) -> Iterator[Damage]:
    """What names and sizes tell."""
    for name, size in sizes.items():
        now = found.get(name)
        if now is None:
            if not any(str(parent) in found for parent in PurePosixPath(name).parents):  # else that is the damage
                yield Damage(name, "missing")
        elif isinstance(now, str):
            yield Damage(name, now)
        elif now != size:
            count = f"{abs(now - size)} byte{'' if abs(now - size) == 1 else 's'}"
            yield Damage(name, f"{count} {'longer' if now > size else 'shorter'} than written")
    parts = next((manifest["parts"] for manifest in manifests.values()), 1)
    for name in found.keys() - sizes.keys():
        now = found[name]
        if isinstance(now, str):
            yield Damage(name, now)
        elif _owner(name, parts) in manifests:
            yield Damage(name, STRAY)


def _share(blocks: list[_Block], part: int, parts: int, sample: float, seed: int) -> list[_Block]:
    """The blocks that a part reads: a run of them by bytes, and at random `sample` of those."""
    starts = _starts(blocks)
    total = max(starts[-1], 1)
    share = [b for b, start in zip(blocks, starts, strict=False) if min(start * parts // total, parts - 1) == part]
    if sample == 1:
        return share
    random.Random(seed).shuffle(share)
    starts = _starts(share)
    return sorted(b for b, start in zip(share, starts, strict=False) if start < sample * starts[-1])


def _starts(blocks: list[_Block]) -> list[int]:
    """The bytes before each block, and last those of all."""
    return list(itertools.accumulate((block.size for block in blocks), initial=0))


def _read(folder: Path, blocks: list[_Block], threads: int) -> Iterator[Damage]:
    """What the contents of blocks tell, one damage a file."""

    def look(block: _Block) -> str:
        try:
            same = _crc32(folder, block) == block.crc32
        except OSError as error:
            return _words(error)
        return "" if same else f"content differs in bytes {block.start} to {block.stop - 1}"

    with ThreadPoolExecutor(threads) as pool:
        seen = zip(blocks, pool.map(look, blocks), strict=True)
        for name, wrong in itertools.groupby((pair for pair in seen if pair[1]), key=lambda pair: pair[0].name):
            first, *others = [what for _, what in wrong]
            yield Damage(name, first + (f", and {len(others)} more of its blocks are damaged" if others else ""))


# ------------------------------------------------------------------------------------------------------------- files


def _require_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise ValueError(f"part={part} is not in [0, parts={parts})")


def _owner(name: str, parts: int) -> int:
    """The part that writes the manifest of a file."""
    process = _PROCESS.search(name)
    return int(process[1]) % parts if process else 0


def _walk(folder: Path, own: tuple[int, int] | None = None, below: str = "") -> Iterator[tuple[str, int | str]]:
    """All files below a folder but the manifests, with their bytes, or in words what is wrong.

    `own`: (part, parts), to walk only the files of that part, and to look into no folder of another one.
    """
    for name, size in _list(folder, below):
        if size is None:
            others = own and _PROCESS.search(f"{name}/") and _owner(f"{name}/", own[1]) != own[0]
            if not others:
                yield from _walk(folder, own, f"{name}/")
        elif not _MANIFEST.fullmatch(name) and (not own or _owner(name, own[1]) == own[0]):
            yield name, size


def _list(folder: Path, below: str = "") -> list[tuple[str, int | str | None]]:
    """What is in `folder / below`, by names relative to `folder`; if it cannot be listed, its own name and why."""
    try:
        return [(below + entry.name, _size(entry)) for entry in os.scandir(folder / below)]
    except OSError as error:
        return [(below.rstrip("/") or ".", _words(error))]


def _size(entry: os.DirEntry) -> int | str | None:
    """Bytes of a file, None of a folder, or in words why it is neither."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return None
        regular = entry.is_file(follow_symlinks=False)
        return entry.stat(follow_symlinks=False).st_size if regular else "not a regular file"
    except OSError as error:
        return _words(error)


def _cut(name: str, size: int, block_bytes: int) -> list[_Block]:
    """A file in blocks; an empty file is one empty block."""
    return [_Block(name, at, min(at + block_bytes, size)) for at in range(0, max(size, 1), block_bytes)]


def _crc32(folder: Path, block: _Block) -> int:
    """Reads a block."""
    crc32, left = 0, block.size
    buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
    with open(folder / block.name, "rb", buffering=0) as file:
        file.seek(block.start)
        while left:
            count = file.readinto(buffer[:left])
            if not count:
                raise OSError(errno.EIO, "ends while it is read")
            crc32 = zlib.crc32(buffer[:count], crc32)
            left -= count
    return crc32


def _words(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _path(part: int) -> str:
    return f"manifest.{part}.json"
