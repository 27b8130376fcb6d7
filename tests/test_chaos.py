"""The faults of tools/py, in short."""

import random
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from faults import disk, stops
from faults.bench import DUE, KEEP, LONGEST_SECONDS, STEPS, Bench, Report, committed
from faults.damages import DAMAGES, damages
from faults.disk import full
from faults.fork import PHASES
from faults.kills import ANY, Killed, Life, kills


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The run that nothing happens to."""
    return Bench(tmp_path_factory.mktemp("chaos") / "work")


@pytest.fixture
def report():
    """In which nothing may be wrong when the test is over."""
    report = Report()
    yield report
    assert not report.wrong


@pytest.fixture
def numbers():
    return random.Random(0)


def test_every_damage_is_found_and_fallen_back_from(bench, report, numbers):
    found = damages(bench, report, 40, numbers)
    assert found == dict.fromkeys(DAMAGES, 40 // len(DAMAGES))


@pytest.mark.parametrize(
    "phases",
    [["rename", "load"], pytest.param([ANY, *PHASES], marks=pytest.mark.slow)],
    ids=["before a commit and in a restore", "in every phase"],
)
def test_killed_run_goes_on_from_its_newest_checkpoint_bitwise_equal(phases, bench, report, numbers):
    killed = kills(bench, report, len(phases), numbers, jobs=1, phases=phases)
    assert all(killed.aimed[phase] >= 1 for phase in phases)
    assert all(killed.hit[phase] >= 1 for phase in phases if phase != ANY)
    assert killed.resumes >= 1 and killed.finished >= 1


def test_terminated_run_leaves_a_checkpoint_of_its_last_step(bench, report, numbers, monkeypatch):
    monkeypatch.setattr(stops, "GRACE_SECONDS", LONGEST_SECONDS)  # other tests share the machine
    stops.terminated(bench, report, bench.work / "terminated", numbers)


def test_full_disk_ends_saves_and_nothing_else(bench, report):
    full(bench, report, "disk", keep=KEEP, room=KEEP, freed=False)


@pytest.mark.slow
def test_saves_go_on_when_a_full_disk_has_space_again(bench, report):
    full(bench, report, "disk-freed", keep=100, room=3, freed=True)


@pytest.mark.slow
def test_full_disk_can_be_had_without_a_mount(bench, report, monkeypatch):
    monkeypatch.setattr(disk.shutil, "which", lambda name: None)
    how = full(bench, report, "disk-injected", keep=KEEP, room=KEEP, freed=False)
    assert "errors put into the run" in how


def flip(folder):
    file = folder / "checkpoints" / str(STEPS) / "meta" / "data.json"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def lose(folder):
    for step in committed(folder):
        shutil.rmtree(folder / "checkpoints" / str(step))


def retell(folder):
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"loss": ', '"loss": 1', 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: None, []),
        (flip, ["damaged: .*meta/data.json: content differs"]),
        (lose, [f"newest checkpoint is 0, wanted {DUE[-3]} or later"]),
        (retell, ["steps are not those"]),
    ],
    ids=["nothing", "a damaged checkpoint", "lost checkpoints", "another loss"],
)
def test_what_a_kill_must_not_do_is_noticed(change, said, bench, tmp_path):
    report = Report()
    life = Life(bench, report, Killed(), tmp_path / "life" / "run")
    life.output.touch()
    shutil.copytree(bench.whole, life.folder)
    change(life.folder)
    life.require_whole()
    assert len(report.wrong) == len(said)
    for line, pattern in zip(report.wrong, said, strict=True):
        assert re.search(pattern, line), line
