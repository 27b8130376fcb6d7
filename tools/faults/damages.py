"""Damaged files of a checkpoint."""

import itertools
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from faults.bench import LONGEST_SECONDS, Bench, Report, committed, damaged, events_of, require_equal, tail
from moejax.checkpoint.integrity import verify
from moejax.checkpoint.manager import Checkpoints

PAGE = 4096

# Each changes the files of a checkpoint, name -> content, and returns them with the names of those it changed.

Files = dict[str, bytes]


def _flip(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name = numbers.choice(sorted(name for name in files if files[name]))
    data = bytearray(files[name])
    data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return files | {name: bytes(data)}, {name}


def _truncate(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name = numbers.choice(sorted(name for name in files if files[name]))
    return files | {name: files[name][: numbers.randrange(len(files[name]))]}, {name}


def _delete(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name = numbers.choice(sorted(files))
    return {other: data for other, data in files.items() if other != name}, {name}


def _swap(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    one, other = numbers.sample(sorted(files), 2)
    return files | {one: files[other], other: files[one]}, {one, other}


def _swap_of_one_size(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    by_size = defaultdict(list)
    for name in sorted(files):
        by_size[len(files[name])].append(name)
    one, other = numbers.sample(numbers.choice([names for names in by_size.values() if len(names) > 1]), 2)
    return files | {one: files[other], other: files[one]}, {one, other}


def _zero_page(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name, number = numbers.choice([(name, n) for name in sorted(files) for n in range(-(-len(files[name]) // PAGE))])
    data = files[name]
    size = min(PAGE, len(data) - number * PAGE)
    return files | {name: data[: number * PAGE] + bytes(size) + data[number * PAGE + size :]}, {name}


def _append(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name = numbers.choice(sorted(files))
    return files | {name: files[name] + numbers.randbytes(numbers.randint(1, 2 * PAGE))}, {name}


def _stray(files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    name = f"{numbers.choice(sorted(files))}.{numbers.randrange(100)}"
    return files | {name: numbers.randbytes(numbers.randrange(100))}, {name}


DAMAGES = {
    "bit flipped": _flip,
    "truncated": _truncate,
    "deleted": _delete,
    "two files swapped": _swap,
    "two of one size swapped": _swap_of_one_size,
    "page zeroed": _zero_page,
    "bytes appended": _append,
    "stray file": _stray,
}


def _content(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _put(folder: Path, files: Files, names: set[str]) -> None:
    """Makes the files of those names as they are in `files`."""
    for name in names:
        if name in files:
            (folder / name).write_bytes(files[name])
        else:
            (folder / name).unlink()


def _damage(kind: str, files: Files, numbers: random.Random) -> tuple[Files, set[str]]:
    """A damage that changes something."""
    while True:
        after, names = DAMAGES[kind](files, numbers)
        if after != files:
            return after, names


def damages(bench: Bench, report: Report, number: int, numbers: random.Random, resumes: int = 0) -> Counter:
    """Damages the newest of two checkpoints `number` times; the first `resumes` kinds also before a run goes on.

    A damage is found where a changed file is named. Of a swap that is both, unless one is the manifest: what a damaged
    manifest says of other files counts no more.

    Returns:
        How many were found, by kind.
    """
    folder = bench.work / "damaged"
    shutil.copytree(bench.whole, folder)
    *_, older, newest = committed(folder)
    checkpoint, found = folder / "checkpoints" / str(newest), Counter[str]()
    before = _content(checkpoint)
    for one, kind in zip(range(number), itertools.cycle(DAMAGES), strict=False):
        after, names = _damage(kind, before, numbers)
        _put(checkpoint, after, names)
        named = {damage.file for damage in verify(checkpoint).damages}
        manifest = any(name.startswith("manifest.") for name in names)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            whole, aside = checkpoints.newest_whole(1.0, set_aside=False)
        fell_back = whole is not None and whole.step == older and [checked.step for checked in aside] == [newest]
        good = (bool(named & names) if manifest else names <= named) and fell_back
        found[kind] += good
        report.require(good, f"damage {one + 1}, {kind} of {names}: named {named}, newest whole {whole}")
        _put(checkpoint, before, names)
    report.require(not (left := damaged(folder)), f"damaged after all was put back: {left}")
    report.rows.append(("Damages", f"{sum(found.values())} of {number} found, and fallen back from"))
    for kind in DAMAGES:
        made = len(range(number)[list(DAMAGES).index(kind) :: len(DAMAGES)])
        report.rows.append((f"  {kind}", f"{found[kind]} of {made}"))
    report.say(f"damages: {sum(found.values())} of {number} found")
    for kind in list(DAMAGES)[:resumes]:
        _resume_from_damaged(bench, report, kind, numbers)
    if resumes:
        report.rows.append(("  runs that went on", f"{resumes}, from the older checkpoint, bitwise equal"))
    return found


def _resume_from_damaged(bench: Bench, report: Report, kind: str, numbers: random.Random) -> None:
    """A run whose newest checkpoint is damaged does its last steps again."""
    folder = bench.work / f"fallen-back-{kind.replace(' ', '-')}"
    output = folder.with_suffix(".txt")
    shutil.copytree(bench.whole, folder)
    *_, older, newest = committed(folder)
    checkpoint = folder / "checkpoints" / str(newest)
    before = _content(checkpoint)
    after, names = _damage(kind, before, numbers)
    _put(checkpoint, after, names)
    process = bench.fork(folder, output)
    process.join(LONGEST_SECONDS)
    got = [(event["kind"], event["step"]) for event in events_of(folder, "damaged", "resumed")]
    report.require(got == [("damaged", newest), ("resumed", older)], f"{folder}: events {got}\n{tail(output)}")
    report.require(process.exitcode == 0, f"{folder}: exit code {process.exitcode}\n{tail(output)}")
    require_equal(bench, report, folder, bench.whole)
    report.say(f"{kind}: resumed at {older} instead of {newest}")
