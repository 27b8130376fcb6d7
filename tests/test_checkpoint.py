import errno
import os
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import commit
from moejax.checkpoint.commit import Failure, Retention, State, failure_of
from moejax.checkpoint.manager import Checkpoints
from moejax.config import ConfigError


@pytest.fixture
def state():
    """Arrays of 4 MB in shards, and a small one."""
    mesh = jax.make_mesh((8,), ("data",))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return {"w": place(jnp.arange(2**20, dtype=jnp.float32), P("data")), "b": place(jnp.ones(3), P())}


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(checkpoints, state, *steps, **losses):
    for step in steps:
        checkpoints.save(step, {"model": state}, {"step": step, "valid_loss": losses.get(f"loss_{step}")})
    return checkpoints.wait()


def damage(checkpoints, step):
    """Flips one bit in the middle of the largest file, and returns its name."""
    folder = checkpoints.folder / str(step)
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return str(file.relative_to(folder))


def names(checkpoints):
    return sorted(os.listdir(checkpoints.folder))


# ----------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("retention", "losses", "doomed"),
    [
        (Retention(newest=2), {1: None, 2: None, 3: None}, [1]),
        (Retention(newest=1, every=10), {10: None, 15: None, 20: None, 25: None}, [15]),
        (Retention(newest=1), {1: 3.0, 2: 2.0, 3: 2.5, 4: None}, [1, 3]),
        (Retention(newest=1), {1: 2.0, 2: 2.0, 3: 2.0}, [2]),
        (Retention(newest=1), {1: float("nan"), 2: 2.0, 3: 3.0}, [1]),
        (Retention(newest=1, best=False), {1: 1.0, 2: 2.0}, [1]),
        (Retention(newest=3), {5: None}, []),
    ],
    ids=["newest", "every", "best", "first of equal losses", "loss not finite", "best is off", "fewer than kept"],
)
def test_retention(retention, losses, doomed):
    assert retention.doomed(losses) == doomed


def test_deletion_keeps_what_retention_says_and_other_files(tmp_path, state):
    with Checkpoints(tmp_path / "c", Retention(newest=1, every=4)) as checkpoints:
        save(checkpoints, state, 1, 2, loss_2=1.0)
        (checkpoints.folder / "notes.txt").write_text("of the user")
        (tmp_path / "elsewhere").mkdir()
        (checkpoints.folder / "0").symlink_to(tmp_path / "elsewhere")
        save(checkpoints, state, 3, 4, 5, loss_3=2.0)
        assert save(checkpoints, state, 6).deleted == (5,)
    assert names(checkpoints) == ["0", "2", "4", "6", "notes.txt"]


# -------------------------------------------------------------------------------------------------------- asynchronous


def test_save_holds_the_state_of_its_step_while_training_goes_on(tmp_path, state):
    """The next steps donate the arrays, and write over their memory, while they are being saved."""
    step = jax.jit(partial(jax.tree.map, lambda x: 1.5 * x + 1), donate_argnums=0)
    want = {}
    with Checkpoints(tmp_path, None) as checkpoints:
        for number in (1, 2, 3):
            want[number] = jax.tree.map(lambda x: np.array(x), state)
            checkpoints.save(number, {"model": state}, {})
            for _ in range(3):
                state = jax.block_until_ready(step(state))
        assert checkpoints.wait().failure is None
        for number in (1, 2, 3):
            got = checkpoints.load(number, {"model": shapes(state)})["model"]
            jax.tree.map(np.testing.assert_array_equal, got, want[number])


def test_saves_follow_each_other_and_each_is_told_once(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        assert checkpoints.save(1, {"model": state}, {}) is None
        first = checkpoints.save(2, {"model": state}, {})
        assert (first.step, first.failure) == (1, None) and checkpoints.steps[0] == 1
        assert first.bytes > 4 * 2**20 and first.seconds > 0
        assert checkpoints.wait().step == 2 and checkpoints.state is None
        assert checkpoints.wait() is None
        assert checkpoints.save(2, {"model": state}, {}) is None and checkpoints.state is None  # it has that step
        assert checkpoints.load_meta(1) == {}


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_newest_whole_skips_the_damaged_and_keeps_them_aside(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        for aside in ("3.damaged.1", "3.damaged.2"):
            save(checkpoints, state, 1, 2, 3)
            file = damage(checkpoints, 3)
            whole, damaged = checkpoints.newest_whole(1.0, set_aside=False)
            assert whole.step == 2 and damaged[0].aside == "" and checkpoints.steps == [1, 2, 3]
            whole, (damaged,) = checkpoints.newest_whole(1.0, set_aside=True)
            assert (damaged.step, damaged.aside, damaged.damages[0].file) == (3, aside, file)
            assert whole.bytes_read == whole.bytes > 4 * 2**20
        assert names(checkpoints) == ["1", "2", "3.damaged.1", "3.damaged.2"]


def test_sample_of_no_bytes_sees_names_and_sizes_only(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        save(checkpoints, state, 1)
        file = damage(checkpoints, 1)
        checked = checkpoints.check(1, sample=0.0)
        assert (checked.damages, checked.bytes_read) == ((), 0)
        with open(checkpoints.folder / "1" / file, "ab") as opened:
            opened.write(b"x")
        assert "1 byte longer" in str(checkpoints.check(1, sample=0.0).damages[0])


def test_none_whole_renames_none(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        assert checkpoints.newest_whole(1.0, set_aside=True) == (None, [])
        save(checkpoints, state, 1, 2)
        damage(checkpoints, 1), damage(checkpoints, 2)
        whole, damaged = checkpoints.newest_whole(1.0, set_aside=True)
        assert whole is None and [checked.step for checked in damaged] == [2, 1]
        assert names(checkpoints) == ["1", "2"]


def test_folder_of_a_killed_save_is_no_checkpoint_and_goes_with_the_next(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        save(checkpoints, state, 1)
        os.rename(tmp_path / "1", tmp_path / "2.saving")
        save(checkpoints, state, 1)
        assert checkpoints.latest == 1
        os.makedirs(tmp_path / "5.saving.orbax-checkpoint-tmp" / "model")
        save(checkpoints, state, 2)
        assert names(checkpoints) == ["1", "2"]


@pytest.mark.parametrize("place", ["write_manifest", "os.rename", "ocp.save_checkpointables_async"])
def test_full_disk_ends_a_save_only(place, tmp_path, state, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, Retention(newest=1)) as checkpoints:
        save(checkpoints, state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(f"moejax.checkpoint.commit.{place}", full)
            for step in (2, 3):
                saved = save(checkpoints, state, step)
                assert (saved.step, saved.deleted) == (step, ())
                assert saved.failure.wanted == "a disk with space left for a checkpoint"
                assert names(checkpoints) == ["1"] and not checkpoints.check(1).damages
        saved = save(checkpoints, state, 4)
        assert saved.failure is None and names(checkpoints) == ["4"]


def test_a_failure_is_said_by_its_cause():
    wrapped = RuntimeError("of Orbax")
    wrapped.__cause__ = ValueError("a shape\n  that differs")
    assert failure_of(wrapped) == Failure("ValueError: a shape that differs", None)
    assert failure_of(PermissionError(errno.EACCES, "no")).wanted == "a folder that can be written"


def test_failure_of_another_process_ends_a_save_that_waits_for_it(tmp_path, state, monkeypatch):
    """This one is the first of two, and would wait for the checksums of the other."""
    other = Failure("wanted a disk with space left for a checkpoint", "a disk with space left for a checkpoint")
    agree = lambda value: [value, State(False, other) if isinstance(value, State) else value]  # noqa: E731
    waits, gone_on = threading.Event(), threading.Event()

    def is_complete(path, wait):
        waits.set()
        return gone_on.wait(wait)

    monkeypatch.setattr(commit, "is_complete", is_complete)
    with Checkpoints(tmp_path, None, agree) as checkpoints:
        checkpoints.save(1, {"model": state}, {})
        saving = checkpoints._saving
        assert waits.wait(60)  # its own files are written: what is given up is deleted
        assert checkpoints.wait().failure == other and saving.is_alive()
        gone_on.set()
        saving.join()
        assert checkpoints.latest is None
        monkeypatch.undo()
        checkpoints._agree = lambda value: [value]
        assert save(checkpoints, state, 1).failure is None and names(checkpoints) == ["1"]


def test_old_checkpoint_that_cannot_be_deleted_is_said(tmp_path, state, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with Checkpoints(tmp_path, Retention(newest=1)) as checkpoints:
        save(checkpoints, state, 1)
        monkeypatch.setattr(commit.shutil, "rmtree", refuse)
        saved = save(checkpoints, state, 2)
    assert (saved.failure, saved.deleted, checkpoints.latest) == (None, (), 2)
    assert "checkpoint 1 could not be deleted: [Errno 13] Permission denied" in caplog.text


def test_other_arrays_are_one_line(tmp_path, state):
    with Checkpoints(tmp_path, None) as checkpoints:
        save(checkpoints, state, 1)
        other = {**shapes(state), "more": shapes(state)["b"]}
        with pytest.raises(ConfigError, match="wanted a whole checkpoint of the model that the config describes"):
            checkpoints.load(1, {"model": other})
