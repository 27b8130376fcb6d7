"""`moejax checkpoints`: what it lists, verifies, shows and copies."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint.listing import arrays, entries
from moejax.checkpoint.manager import Checkpoints
from moejax.cli import main
from moejax.config import MeshConfig
from moejax.mesh import make_mesh


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


def test_arrays_are_those_that_were_saved(saved):
    rows = {
        array.name: (array.part, array.shape, array.dtype, array.spec, array.bytes)
        for array in arrays(saved / "checkpoints" / "10")
    }
    assert rows == {
        "w": ("model", (4, 8), "float32", "pipe | expert", 128),
        "count": ("optimizer", (), "int32", "", 4),
    }


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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["RUN", "show", "3"], "STEP=3: wanted a checkpoint of .*, which has 2, 10"),
        (["nowhere"], "RUN='nowhere': wanted a run folder with checkpoints"),
        (["RUN", "copy", "2"], "TO=None: wanted a folder for the copy"),
        (["RUN", "copy", "2", "RUN"], "TO=.*: wanted a place where nothing is yet"),
        (["RUN", "copy", "2", "/dev/null/2"], "TO=.*: wanted a folder that can be written"),
        (["RUN", "burn"], "checkpoints=.*burn"),
    ],
    ids=["no such step", "no run", "no place", "something there", "cannot be written", "no such action"],
)
def test_bad_input_is_one_line(saved, capsys, words, line):
    assert main(["checkpoints", *(str(saved) if word == "RUN" else word for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
