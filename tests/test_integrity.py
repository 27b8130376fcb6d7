import collections
import itertools
import json
import os
import random
import threading
import tracemalloc

import pytest

from moejax.checkpoint import integrity
from moejax.checkpoint.integrity import Damage, identity, is_complete, verify, write_manifest
from moejax.config import ConfigError

PAGE = 4096
PROCESSES = 4  # whose folders Orbax made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A file of the tree has several blocks, a block several chunks and no whole number of pages."""
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 1500)


@pytest.fixture
def tree(tmp_path):
    """A folder like a step of Orbax, without a manifest."""
    numbers = random.Random(0)
    sizes = {"_CHECKPOINT_METADATA": 264, "commit_success.txt": 58, "meta/metadata": 400, "meta/empty": 0}
    sizes |= {"state/_METADATA": 3960, "state/manifest.ocdbt": 115, "state/d/43c933771026ee8e": 4200}
    for process in range(PROCESSES):
        below = f"state/ocdbt.process_{process}"
        data = {f"{below}/d/{numbers.randbytes(4).hex()}": size for size in (278, 5000, 10000, 4 * PAGE + process)}
        sizes |= data | {f"{below}/manifest.ocdbt": 238}
    for name, size in sizes.items():
        path = tmp_path / "step" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(numbers.choices(range(1, 256), k=size)))  # no zeros: a zeroed page differs everywhere
    return tmp_path / "step"


@pytest.fixture
def reads(monkeypatch):
    """The blocks that were read."""

    def record(folder, block):
        blocks.append(block)
        return checksum(folder, block)

    blocks: list[integrity._Block] = []
    checksum = integrity._crc32
    monkeypatch.setattr(integrity, "_crc32", record)
    return blocks


def write(folder, parts=1):
    for part in range(parts):
        write_manifest(folder, part, parts)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_names(folder):
    return sorted(name for name in contents(folder) if not name.startswith("manifest."))


# ----------------------------------------------------------------------------------------------------------- damages
# Each changes the files `before` of a folder in one place, and returns them with the names a user should read.


def flip_bit(files, numbers):
    name = numbers.choice([name for name in files if files[name]])
    data = bytearray(files[name])
    data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return files | {name: bytes(data)}, {name}


def flip_bit_of_manifest(files, numbers):
    changed, names = flip_bit({name: files[name] for name in files if name.startswith("manifest.")}, numbers)
    return files | changed, names


def truncate(files, numbers):
    name = numbers.choice([name for name in files if files[name]])
    return files | {name: files[name][: numbers.randrange(len(files[name]))]}, {name}


def extend(files, numbers):
    name = numbers.choice(list(files))
    return files | {name: files[name] + bytes(numbers.randint(1, 2 * PAGE))}, {name}


def delete(files, numbers):
    name = numbers.choice(list(files))
    return {other: files[other] for other in files if other != name}, {name}


def swap_of_one_size(files, numbers):
    by_size = collections.defaultdict(list)
    for name, data in files.items():
        by_size[len(data)].append(name)
    one, other = numbers.sample(numbers.choice([names for names in by_size.values() if len(names) > 1]), 2)
    return files | {one: files[other], other: files[one]}, {one, other}


def swap_manifests(files, numbers):
    one, other = numbers.sample([name for name in files if name.startswith("manifest.")], 2)
    return files | {one: files[other], other: files[one]}, {one, other}


def zero_page(files, numbers):
    name = numbers.choice([name for name in files if len(files[name]) >= PAGE])
    at = PAGE * numbers.randrange(len(files[name]) // PAGE)
    return files | {name: files[name][:at] + bytes(PAGE) + files[name][at + PAGE :]}, {name}


def stray(files, numbers):
    name = numbers.choice(list(files)) + numbers.choice([".tmp", ".part"])
    return files | {name: numbers.randbytes(numbers.randrange(9))}, {name}


def rename(files, numbers):
    name = numbers.choice(list(files))
    names = [f"{name}.part", f"manifest.{numbers.randint(4, 9)}.json"]
    new = numbers.choice(names if name.startswith("manifest.") else [f"{name}1", "lost+found/#1"])
    return {new if other == name else other: data for other, data in files.items()}, {name, new}


def rename_over(files, numbers):
    one, other = numbers.sample([name for name in files if not name.startswith("manifest.")], 2)
    return {name: files[one] if name == other else data for name, data in files.items() if name != one}, {one, other}


DAMAGES = [flip_bit, flip_bit_of_manifest, truncate, extend, delete, swap_of_one_size, swap_manifests, zero_page, stray]
DAMAGES += [rename, rename_over]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.replace("_", " "))
def test_every_damage_is_found_and_named(tree, damage):
    numbers = random.Random(damage.__name__)
    write(tree, parts=3)
    before = contents(tree)
    for _ in range(50):
        after, names = damage(before, numbers)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed == names
        put(tree, after, changed)
        parts = numbers.randint(1, 3)
        found = [verify(tree, part, parts, threads=2).damages for part in range(parts)]
        assert {damage.file for damages in found for damage in damages} == names, found
        put(tree, before, changed)
    assert not verify(tree).damages


def put(folder, files, names):
    """Makes the files of those names as they are in `files`."""
    for name in names:
        path = folder / name
        if name in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda data: data[:-8], "8 bytes shorter than written"),
        (lambda data: data + b"x", "1 byte longer than written"),
        (lambda data: b"\0" + data[1:], "content differs in bytes 0 to 4999"),
        (lambda data: data[:-1] + b"\0", "content differs in bytes 5000 to 9999"),
        (lambda data: bytes(10000), "content differs in bytes 0 to 4999, and 1 more of its blocks are damaged"),
    ],
    ids=["shorter", "longer", "first block", "last block", "both blocks"],
)
def test_damage_is_one_line_of_words(tree, change, wanted):
    write(tree)
    name = next(name for name in data_names(tree) if (tree / name).stat().st_size == 10000)
    (tree / name).write_bytes(change((tree / name).read_bytes()))
    assert [str(damage) for damage in verify(tree).damages] == [f"{name}: {wanted}"]


@pytest.mark.parametrize(
    ("put_there", "wanted"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.symlink_to("_METADATA"), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.mkdir(), "missing"),
    ],
    ids=["nothing", "link", "pipe", "folder"],
)
def test_file_that_became_something_else_is_one_damage(tree, put_there, wanted):
    write(tree)
    (tree / "state" / "manifest.ocdbt").unlink()
    put_there(tree / "state" / "manifest.ocdbt")
    assert verify(tree).damages == (Damage("state/manifest.ocdbt", wanted),)


def test_files_and_links_that_the_run_did_not_write_are_strays(tree):
    write(tree)
    (tree / "none" / "below").mkdir(parents=True)  # an empty folder is no damage
    (tree / "state" / "line\nfeed").touch()
    (tree / "d").symlink_to(tree / "state" / "d")
    (tree / "state" / "manifest.0.json").touch()
    (tree / "manifest.1.json.part").touch()
    assert [str(damage) for damage in verify(tree).damages] == [
        "d: not a regular file",
        "manifest.1.json.part: not written by the run",
        r"state/line\nfeed: not written by the run",
        "state/manifest.0.json: not written by the run",
    ]


@pytest.mark.parametrize("writing", [1, 2, 3, 4], ids="written by {}".format)
@pytest.mark.parametrize("verifying", [1, 2, 3, 4], ids="verified by {}".format)
def test_shares_of_a_whole_folder_are_every_byte_once(tree, reads, writing, verifying):
    write(tree, writing)
    assert is_complete(tree)
    reads.clear()  # of the writing
    found = [verify(tree, part, verifying) for part in range(verifying)]
    assert [result.damages for result in found] == [()] * verifying
    at: collections.Counter[str] = collections.Counter()
    for block in sorted(reads):
        assert block.start == at[block.name]
        at[block.name] = block.stop
    sizes = {name: (tree / name).stat().st_size for name in data_names(tree)}
    assert at == sizes
    total = sum(sizes.values())
    assert {(result.files, result.bytes) for result in found} == {(len(sizes), total)}
    assert sum(result.bytes_read for result in found) == total
    assert all(abs(result.bytes_read - total / verifying) <= integrity.BLOCK_BYTES for result in found)


def test_writers_share_out_the_files_by_process(tree):
    write(tree, parts=3)
    owners: dict[str, int] = {}
    for part in range(3):
        owners |= dict.fromkeys(json.loads((tree / f"manifest.{part}.json").read_text())["files"], part)
    processes = [f"state/ocdbt.process_{process}/" for process in range(PROCESSES)]
    wanted = {name: [name.startswith(below) for below in processes] for name in data_names(tree)}
    assert owners == {name: at.index(True) % 3 if any(at) else 0 for name, at in wanted.items()}


# ------------------------------------------------------------------------------------------------------------ sample


def test_sample_reads_its_part_and_all_over_seeds(tree, reads):
    write(tree, parts=2)
    reads.clear()  # of the writing
    whole = [verify(tree, part, 2).bytes_read for part in range(2)]
    every = set(reads)
    reads.clear()
    for seed, part in itertools.product(range(30), range(2)):
        found = verify(tree, part, 2, sample=0.3, seed=seed)
        assert not found.damages
        assert 0.3 * whole[part] <= found.bytes_read <= 0.3 * whole[part] + integrity.BLOCK_BYTES
    assert set(reads) == every


def test_sample_of_nothing_compares_names_and_sizes(tree):
    write(tree)
    first, second, third = data_names(tree)[:3]
    (tree / first).unlink()
    (tree / second).write_bytes(b"")
    (tree / third).write_bytes(bytes((tree / third).stat().st_size))
    found = verify(tree, sample=0)
    assert {damage.file for damage in found.damages} == {first, second}
    assert found.bytes_read == 0


def test_sample_finds_a_flipped_bit_with_some_seeds(tree):
    write(tree)
    name = max(data_names(tree), key=lambda name: (tree / name).stat().st_size)
    (tree / name).write_bytes(bytes([(tree / name).read_bytes()[0] ^ 1]) + (tree / name).read_bytes()[1:])
    found = [verify(tree, sample=0.5, seed=seed).damages for seed in range(40)]
    assert found == [verify(tree, sample=0.5, seed=seed).damages for seed in range(40)]
    assert 5 < sum(map(bool, found)) < 35  # 20 are expected, and 5 or 35 are 4.7 deviations away


# --------------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_manifest_is_not_complete(tree, monkeypatch, call):
    def die(*arguments):
        raise KeyboardInterrupt

    write_manifest(tree, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(integrity.os, call, die)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(tree, 1, 2)
    assert not is_complete(tree)
    assert Damage("manifest.1.json", "missing") in verify(tree).damages
    write_manifest(tree, 1, 2)
    assert is_complete(tree)
    assert not verify(tree).damages


def test_folder_is_complete_with_the_last_part(tree):
    assert not is_complete(tree)
    for part in (2, 0, 1):
        assert not is_complete(tree)
        write_manifest(tree, part, 3)
    assert is_complete(tree)


def test_complete_waits_for_the_other_parts(tree):
    write_manifest(tree, 0, 2)
    assert not is_complete(tree, wait=0.01)
    late = threading.Timer(0.3, write_manifest, (tree, 1, 2))
    late.start()
    assert is_complete(tree, wait=60)
    late.join()


def test_folder_without_manifests_says_only_that(tree):
    assert verify(tree).damages == (Damage("manifest.0.json", "missing"),)
    assert verify(tree / "none").damages == (Damage(".", "missing"),)
    assert not is_complete(tree / "none")


def test_manifests_of_another_count_of_parts_are_damages(tree):
    write(tree, parts=2)
    write_manifest(tree, 2, 3)
    what = "written by one of 3 parts, manifest.0.json by one of 2"
    assert verify(tree).damages == (Damage("manifest.2.json", what),)
    assert not is_complete(tree)


def reseal(path, change):
    """A manifest with a right checksum of wrong content."""
    content = json.loads(path.read_text())
    del content["crc32"]
    change(content)
    text = json.dumps(content).encode()[:-1]
    path.write_bytes(text + integrity._seal(text))


def test_file_in_two_manifests_is_a_damage(tree):
    write(tree, parts=2)
    name, file = next(iter(json.loads((tree / "manifest.0.json").read_text())["files"].items()))
    reseal(tree / "manifest.1.json", lambda content: content["files"].update({name: file}))
    assert verify(tree).damages == (Damage(name, "in the manifests of two parts"),)


def test_manifest_of_another_format_is_a_damage(tree):
    write(tree)
    reseal(tree / "manifest.0.json", lambda content: content.update(format=2))
    assert verify(tree).damages == (Damage("manifest.0.json", "of format 2; this version reads format 1"),)


def test_identity_is_of_the_content_alone(tree):
    identities = []
    for parts in (1, 2, 4):
        write(tree, parts)
        identities.append(identity(tree))
    assert len(set(identities)) == 1
    name = data_names(tree)[0]
    (tree / name).write_bytes((tree / name).read_bytes()[::-1])
    write(tree, parts=4)
    assert identity(tree) != identities[0]
    (tree / "manifest.3.json").unlink()
    with pytest.raises(ConfigError, match=r"whole manifests \(manifest.3.json: missing\)"):
        identity(tree)


# ------------------------------------------------------------------------------------------------------------ errors


def test_unreadable_file_is_a_damage_and_ends_the_writing(tree, monkeypatch):
    write(tree)
    bad = data_names(tree)[-1]

    def open_on_a_bad_disk(path, *arguments, **options):
        if path == tree / bad:
            raise OSError(5, "Input/output error")
        return open(path, *arguments, **options)

    monkeypatch.setattr(integrity, "open", open_on_a_bad_disk, raising=False)
    assert verify(tree).damages == (Damage(bad, "cannot be read (Input/output error)"),)
    with pytest.raises(OSError, match="Input/output error"):
        write_manifest(tree)


def test_unreadable_folder_is_one_damage(tree, monkeypatch):
    write(tree)

    def scan_on_a_bad_disk(path):
        if path == tree / "state" / "d":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(integrity.os, "scandir", scan_on_a_bad_disk)
    assert verify(tree).damages == (Damage("state/d", "cannot be read (Permission denied)"),)
    with pytest.raises(OSError, match="Permission denied"):
        write_manifest(tree)


def test_writer_does_not_look_into_the_folders_of_others(tree, monkeypatch):
    def record(path):
        seen.append(path.name)
        return scan(path)

    seen: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(integrity.os, "scandir", record)
    write_manifest(tree, 1, PROCESSES)
    assert sorted(seen) == ["d", "d", "meta", "ocdbt.process_1", "state", "step"]


def test_folder_of_empty_files_is_whole(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}").touch()
    write_manifest(tmp_path)
    assert [verify(tmp_path, part, 2).damages for part in range(2)] == [(), ()]


def test_link_ends_the_writing(tree):
    (tree / "state" / "link").symlink_to(tree)
    with pytest.raises(OSError, match="link: not a regular file"):
        write_manifest(tree)


@pytest.mark.parametrize(
    "wrong", [{"part": 2, "parts": 2}, {"part": -1}, {"sample": 1.5}], ids=["part too high", "part below 0", "sample"]
)
def test_share_that_cannot_be_is_refused(tree, wrong):
    write(tree)
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* is not in \[0"):
        verify(tree, **wrong)


def test_large_file_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.undo()
    size = 3 * integrity.BLOCK_BYTES + 1
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", size)  # takes no space
    tracemalloc.start()
    try:
        write_manifest(tmp_path, threads=2)
        found = verify(tmp_path, threads=2)
        assert tracemalloc.get_traced_memory()[1] < 2 * integrity.CHUNK_BYTES + (1 << 20)
    finally:
        tracemalloc.stop()
    assert (found.damages, found.bytes_read) == ((), size)
