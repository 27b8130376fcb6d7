"""`moejax checkpoints`: what it lists, verifies, shows and copies."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint.listing import entries
from moejax.checkpoint.manager import Checkpoints
from moejax.checkpoint.remote import remote_steps
from moejax.checkpoint.stored import OpenArray, arrays
from moejax.cli import main
from moejax.config import CheckpointConfig, ConfigError, MeshConfig
from moejax.mesh import make_mesh
from moejax.train.loop import train


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with the checkpoints 2 and 10, one that is being written, and one kept aside."""
    run = tmp_path_factory.mktemp("saved") / "run"
    mesh = make_mesh(MeshConfig(pipe=2, data=1, expert=2), jax.devices()[:4])
    weights = jax.device_put(np.arange(32, dtype=np.float32).reshape(4, 8), NamedSharding(mesh, P("pipe", "expert")))
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step, loss in ((2, None), (10, 1.25)):
            parts = {"model": {"w": weights + step}, "optimizer": {"count": jax.numpy.int32(step)}}
            checkpoints.save(step, parts, {"step": step, "tokens": 100 * step, "valid_loss": loss})
    for name in ("12.saving.orbax-checkpoint-tmp", "8.damaged.1"):
        shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / name)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def address(monkeypatch):
    """Of a store in memory, which is empty."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return "memory://bucket/run"


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(run, step):
    """The name of the file of which a bit was flipped."""
    (file, *_) = sorted((run / "checkpoints" / str(step) / "model" / "d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"model/d/{file.name}"


def test_all_are_listed(saved):
    found = entries(saved)
    states = [(entry.step, entry.state, entry.tokens, entry.valid_loss) for entry in found]
    assert states == [
        (2, "committed", 200, None),
        (8, "damaged", 200, None),
        (10, "committed", 1000, 1.25),
        (12, "saving", 200, None),
    ]
    files = [file for file in (saved / "checkpoints" / "10").rglob("*") if file.is_file()]
    assert found[2].bytes == sum(file.stat().st_size for file in files)
    assert {axis: length for axis, length in found[2].mesh.items() if length > 1} == {"pipe": 2, "expert": 2}


def test_a_relative_folder_is_read_as_well(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert [entry.mesh for entry in entries(saved.name)] == [entry.mesh for entry in entries(saved)]


def test_arrays_are_those_that_were_saved(saved):
    rows = {
        array.name: (array.part, array.shape, array.dtype, array.spec, array.bytes)
        for array in arrays(saved / "checkpoints" / "10")
    }
    assert rows == {
        "w": ("model", (4, 8), "float32", "pipe | expert", 128),
        "count": ("optimizer", (), "int32", "", 4),
    }


def test_pieces_of_an_array_are_read_alone(saved):
    array = OpenArray(saved / "checkpoints" / "10", "model", "w")
    assert (array.shape, array.cut) == ((4, 8), (2, 4))
    np.testing.assert_array_equal(array.read((2,)), np.arange(16, 32).reshape(2, 8) + 10)
    np.testing.assert_array_equal(array.read((2, 4)), np.arange(32).reshape(4, 8)[2:, 4:] + 10)
    with pytest.raises(ConfigError, match="model/v': wanted an array"):
        OpenArray(saved / "checkpoints" / "10", "model", "v")


def test_list_and_show_as_tables_and_json(saved, capsys):
    assert main(["checkpoints", str(saved)]) == 0
    assert "pipe 2 x expert 2" in capsys.readouterr().out
    assert main(["checkpoints", str(saved), "--json"]) == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [2, 8, 10, 12]
    assert main(["checkpoints", str(saved), "show", "2", "--json"]) == 0
    assert [array["name"] for array in json.loads(capsys.readouterr().out)] == ["w", "count"]
    assert main(["checkpoints", str(saved), "show"]) == 0
    assert "4 x 8" in capsys.readouterr().out


def test_verify_names_the_damaged_file(run, capsys):
    assert main(["checkpoints", str(run), "verify"]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    name = damaged(run, 10)
    assert main(["checkpoints", str(run), "verify"]) == 12
    out = capsys.readouterr().out
    assert "checkpoint 2: " in out and out.count("whole") == 1 and name in out
    assert main(["checkpoints", str(run), "verify", "2"]) == 0


def test_a_copy_is_checked(run, tmp_path, capsys):
    assert main(["checkpoints", str(run), "copy", "2", str(tmp_path / "there" / "2")]) == 0
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == ["2"]
    name = damaged(run, 10)
    assert main(["checkpoints", str(run), "copy", "10", str(tmp_path / "there" / "10")]) == 2
    assert name in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == ["2"]


def test_a_copy_at_an_address_comes_back(saved, address, tmp_path, capsys):
    assert main(["checkpoints", str(saved), "copy", "2", address]) == 0
    files = len(tree(saved / "checkpoints" / "2"))
    assert capsys.readouterr().out.startswith(f"{address}/2: {files} files sent")
    assert main(["checkpoints", str(saved), "copy", "10", address]) == 0
    assert remote_steps(address) == [2, 10]
    assert main(["checkpoints", str(saved), "copy", "10", address]) == 0
    assert f"{address}/10: 0 files sent" in capsys.readouterr().out
    for words, step in ((["2"], 2), (["10"], 10)):
        assert main(["checkpoints", address, "copy", *words, str(tmp_path / "back" / words[0])]) == 0
        assert tree(tmp_path / "back" / words[0]) == tree(saved / "checkpoints" / str(step))
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["10", "2"]


def test_an_address_lists_what_is_complete(saved, address, capsys):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/11/model/d/half", b"12345")
    assert main(["checkpoints", str(saved), "copy", "10", address]) == 0
    capsys.readouterr()
    assert main(["checkpoints", address, "--json"]) == 0
    files = tree(saved / "checkpoints" / "10")
    size = sum(map(len, files.values()))
    assert json.loads(capsys.readouterr().out) == [
        {"step": 10, "state": "complete", "files": len(files), "bytes": size},
        {"step": 11, "state": "uploading", "files": 1, "bytes": 5},
    ]
    assert main(["checkpoints", address]) == 0
    assert "uploading" in capsys.readouterr().out


def test_what_is_damaged_is_not_copied_either_way(run, address, tmp_path, capsys):
    assert main(["checkpoints", str(run), "copy", "2", address]) == 0
    name = damaged(run, 10)
    assert main(["checkpoints", str(run), "copy", "10", address]) == 2
    assert name in capsys.readouterr().err
    fs = fsspec.filesystem("memory")
    (file, *_) = fs.glob("/bucket/run/2/model/d/*")
    fs.pipe_file(file, fs.cat_file(file)[::-1])
    assert main(["checkpoints", address, "copy", "2", str(tmp_path / "back")]) == 2
    assert "files as they were written" in capsys.readouterr().err
    assert remote_steps(address) == [2] and not list(tmp_path.glob("*back*"))


def test_another_checkpoint_at_an_address_stays(saved, run, address, capsys):
    assert main(["checkpoints", str(saved), "copy", "2", address]) == 0
    shutil.rmtree(run / "checkpoints" / "2")
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(2, {"model": {"w": jax.numpy.ones(3)}}, {"step": 2})
    assert main(["checkpoints", str(run), "copy", "2", address]) == 2
    assert f"TO='{address}/2': wanted a place where no other checkpoint is yet" in capsys.readouterr().err
    assert main(["checkpoints", str(saved), "copy", "2", address]) == 0


def test_a_run_goes_on_from_an_uploaded_checkpoint(run_config, tmp_path):
    config, address = dataclasses.replace(run_config, steps=2), f"file://{tmp_path / 'bucket'}"
    train(config, devices=jax.devices()[:1])
    assert main(["checkpoints", config.folder, "copy", "2", address]) == 0
    config = dataclasses.replace(run_config, out=str(tmp_path / "other"), checkpoint=CheckpointConfig(remote=address))
    train(dataclasses.replace(config, steps=2), devices=jax.devices()[:1])
    events = map(json.loads, (Path(config.folder) / "events.jsonl").read_text().splitlines())
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["RUN", "show", "3"], "STEP=3: wanted a checkpoint of .*, which has 2, 10"),
        (["nowhere"], "RUN='nowhere': wanted a run folder with checkpoints"),
        (["RUN", "copy", "2"], "TO=None: wanted a place for it"),
        (["RUN", "copy", "2", "RUN"], "TO=.*: wanted a place where nothing is yet"),
        (["RUN", "copy", "2", "/dev/null/2"], "TO=.*: wanted a folder that can be written"),
        (["RUN", "burn"], "checkpoints=.*burn"),
        (["RUN", "copy", "2", "nowhere://bucket/run"], "TO='nowhere://bucket/run': wanted an address"),
        (["RUN", "copy", "2", "file:///dev/null/run"], "TO='file:///dev/null/run': wanted an address that can be wri"),
        (["memory://bucket/run"], "RUN='memory://bucket/run': wanted an address with copies"),
        (["nowhere://bucket/run"], "RUN='nowhere://bucket/run': wanted an address"),
        (["memory://bucket/run", "show"], "ACTION='show': wanted list or copy"),
        (["memory://bucket/run", "copy", "2"], "TO=None: wanted a folder"),
        (["memory://bucket/run", "copy", "2", "there"], "RUN='memory://bucket/run': wanted an address with copies"),
    ],
    ids=[
        "no such step",
        "no run",
        "no place",
        "something there",
        "cannot be written",
        "no such action",
        "unknown protocol",
        "address cannot be written",
        "nothing at the address",
        "unknown protocol of the run",
        "not of an address",
        "no folder for a copy",
        "no copies",
    ],
)
def test_bad_input_is_one_line(saved, address, capsys, words, line):
    assert main(["checkpoints", *(str(saved) if word == "RUN" else word for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
