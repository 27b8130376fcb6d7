"""Uploads to a store in memory and, where marked `emulator`, to an S3 emulator on loopback that fails as it is told."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from moejax.checkpoint.remote import Patience, Uploader, download, remote_steps
from moejax.config import ConfigError

SIZES = {
    "commit_success.txt": 0,
    "meta/data.json": 30,
    "state/d/0c1e": 70_000,
    "state/d/5b0d": 70_001,
    "state/manifest": 100,
    "state/process_0/d/77": 300_000,
    "state/process_0/manifest": 99,
}
QUICK = Patience(retries=3, delay=0.02, answer=5.0, threads=3)


def make(folder, seed):
    """A checkpoint's folder; the files of each seed have the same sizes and other bytes."""
    for path, size in SIZES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(bytes((seed * 31 + i * 7 + i // 251) % 256 for i in range(size)))
    return folder


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Events(list):
    def __call__(self, kind, **fields):
        self.append((kind, fields))

    def kinds(self):
        return [kind for kind, _ in self]

    def steps(self, kind):
        return [fields["step"] for name, fields in self if name == kind]

    def last(self, kind):
        return [fields for name, fields in self if name == kind][-1]


class Wire:
    """The requests between the uploader and a store, and the place to delay one, to fail it, and to look after it."""

    remote: str
    before: Callable[[str, str], bool]  # verb and path -> whether it is done; may wait
    after: Callable[[str, str], None]

    def __init__(self):
        self.requests = []
        self.clear()

    def clear(self):
        self.requests.clear()
        self.before, self.after = (lambda verb, path: True), (lambda verb, path: None)

    def puts(self):
        """Files of checkpoints that were sent whole or in vain, without the probes and the uploader's own."""
        own = ("identity.json", "complete.json")
        return [path for verb, path in self.requests if verb == "put" and not path.endswith(own) and "/." not in path]


class MemoryWire(Wire):
    remote = "memory://bucket/run"

    def __init__(self, monkeypatch):
        super().__init__()
        verbs = {"put_file": "put", "pipe_file": "put", "cat_file": "get", "get_file": "get", "rm_file": "remove"}
        for method, verb in {**verbs, "rm": "remove"}.items():
            monkeypatch.setattr(MemoryFileSystem, method, self._through(getattr(MemoryFileSystem, method), verb))
        monkeypatch.setattr(MemoryFileSystem, "store", {})
        monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])

    def _through(self, method, verb):
        def request(fs, *args, **options):
            path = next(arg for arg in args if "/bucket/" in arg).split("/bucket/")[1]
            self.requests.append((verb, path))
            if not self.before(verb, path):
                raise OSError("503 of the test")
            got = method(fs, *args, **options)
            self.after(verb, path)
            return got

        return request


class S3Wire(Wire):
    """An S3 emulator, which keeps its objects while its server is stopped."""

    remote = "s3://bucket/run"

    def __init__(self, monkeypatch):
        from moto.server import DomainDispatcherApplication, create_backend_app

        super().__init__()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = None
        self.port = 0
        self.start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        if fs.exists("bucket"):
            fs.rm("bucket", recursive=True)
        fs.mkdir("bucket")
        self.clear()

    def start(self):
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def __call__(self, environ, start_response):
        verb = {"PUT": "put", "GET": "get", "HEAD": "get"}.get(environ["REQUEST_METHOD"], "remove")
        path = environ["PATH_INFO"].removeprefix("/bucket/")
        self.requests.append((verb, path))
        if not self.before(verb, path):
            if self._server is None:
                raise ConnectionError("the server is down")
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>of the test</Message></Error>"]
        answer = list(self._app(environ, start_response))
        self.after(verb, path)
        return answer


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.emulator)])
def wire(request, monkeypatch):
    made = MemoryWire(monkeypatch) if request.param == "memory" else S3Wire(monkeypatch)
    yield made
    made.clear()
    if isinstance(made, S3Wire):
        made.stop()


@pytest.fixture
def s3(monkeypatch):
    made = S3Wire(monkeypatch)
    yield made
    made.clear()
    made.stop()


def upload(wire, events, step, folder, identity, **options):
    """Puts one checkpoint and waits for its end."""
    with Uploader(wire.remote, events, patience=options.pop("patience", QUICK), **options) as uploader:
        uploader.put(step, folder, identity)
        assert uploader.close(60) == []


def assert_there(wire, step, folder, tmp_path):
    back = tmp_path / f"back-{step}-{len(list(tmp_path.iterdir()))}"
    download(wire.remote, step, back, QUICK)
    assert tree(back) == tree(folder)


# ------------------------------------------------------------------------------------------------------ what is whole


def test_checkpoint_comes_back_byte_equal(wire, tmp_path):
    events, folder = Events(), make(tmp_path / "5", seed=1)
    upload(wire, events, 5, folder, "a")
    assert remote_steps(wire.remote, QUICK) == [5]
    assert_there(wire, 5, folder, tmp_path)
    fields = events.last("uploaded")
    assert (fields["step"], fields["files"], fields["sent"], fields["bytes"]) == (5, 7, 7, sum(SIZES.values()))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_content_that_is_there_is_not_sent_again(wire, tmp_path):
    events, folder = Events(), make(tmp_path / "5", seed=1)
    upload(wire, events, 5, folder, "a")
    wire.clear()
    upload(wire, events, 5, folder, "a")
    assert wire.puts() == []
    assert events.last("uploaded")["sent"] == 0


def test_every_named_step_is_whole_at_every_moment(wire, tmp_path):
    """Two contents of step 5, then step 6, which removes step 5; after each change everything named is downloaded."""
    contents = [make(tmp_path / f"content{seed}", seed) for seed in (1, 2, 3)]
    allowed = [tree(folder) for folder in contents]
    seen, wrong, one, count = Counter(), [], threading.Lock(), itertools.count()

    def look(verb, path):
        if verb == "get" or ".probe" in path:
            return
        with one:
            steps = remote_steps(wire.remote, QUICK)
            seen[tuple(steps)] += 1
            for step in steps:
                back = tmp_path / f"look{next(count)}"
                download(wire.remote, step, back, QUICK)
                if tree(back) not in (allowed[2:] if step == 6 else allowed[:2]):
                    wrong.append((verb, path, step))

    wire.after, events = look, Events()
    upload(wire, events, 5, contents[0], "a", keep=1)
    upload(wire, events, 5, contents[1], "b", keep=1)
    upload(wire, events, 6, contents[2], "c", keep=1)
    assert wrong == []
    assert seen[()] > 14 and seen[(5,)] > 8 and seen[(5, 6)] and seen[(6,)]  # none, one, both: every case was looked at
    assert events.kinds() == ["uploaded"] * 3 + ["remote_removed"]
    assert_there(wire, 6, contents[2], tmp_path)


def test_other_content_of_a_step_replaces_it_marker_first(wire, tmp_path):
    events, old, new = Events(), make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2)
    (old / "only_old").write_bytes(b"old")
    upload(wire, events, 5, old, "a")
    wire.clear()
    upload(wire, events, 5, new, "b")
    changes = [(verb, path) for verb, path in wire.requests if verb != "get" and ".probe" not in path]
    assert changes[0] == ("remove", "run/5/complete.json")
    assert changes[-1] == ("put", "run/5/complete.json")
    assert len(wire.puts()) == len(SIZES)
    assert_there(wire, 5, new, tmp_path)
    fs, root = fsspec.url_to_fs(wire.remote, use_listings_cache=False, skip_instance_cache=True)
    assert len(fs.find(f"{root}/5")) == len(SIZES) + 2  # the file that only the old content had is gone


def test_content_that_is_replaced_in_the_middle_of_an_upload_leaves_no_mixture(wire, tmp_path):
    events, old, new = Events(), make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2)
    wire.before = lambda verb, path: verb != "put" or len(wire.puts()) < 5
    upload(wire, events, 5, old, "a", patience=Patience(retries=0))
    assert events.steps("upload_failed") == [5]
    wire.clear()
    upload(wire, events, 5, new, "b")
    assert len(wire.puts()) == len(SIZES)
    assert_there(wire, 5, new, tmp_path)


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_requests_that_fail_now_and_then_are_retried(wire, tmp_path):
    tries, events, folder = Counter(), Events(), make(tmp_path / "5", seed=1)

    def fail(verb, path):
        tries[verb, path] += 1
        return ".probe" in path or tries[verb, path] > (
            4 if "state" in path else 1
        )  # the driver of S3 has retries of its own

    wire.before = fail
    upload(wire, events, 5, folder, "a", patience=Patience(retries=5, delay=0.01))
    assert events.kinds().count("uploaded") == 1 and events.kinds()[-1] == "uploaded"
    retried = events.last("remote_retried")
    assert retried["step"] == 5 and retried["attempt"] >= 1 and "of the test" in retried["error"]
    wire.clear()
    assert_there(wire, 5, folder, tmp_path)


def test_failed_upload_harms_nothing_and_sends_only_what_is_missing_later(wire, tmp_path):
    events, good, folder = Events(), make(tmp_path / "4", seed=1), make(tmp_path / "5", seed=2)
    upload(wire, events, 4, good, "a")
    wire.clear()
    done = []
    wire.before = lambda verb, path: verb != "put" or "/." in path or len(done) < 4  # identity.json and three files
    wire.after = lambda verb, path: done.append(path) if verb == "put" and "/." not in path else None
    patience = Patience(retries=1, delay=0.01, threads=1)
    upload(wire, events, 5, folder, "b", patience=patience)
    assert events.steps("upload_failed") == [5]
    wire.clear()
    assert remote_steps(wire.remote, QUICK) == [4]
    assert_there(wire, 4, good, tmp_path)

    fs, root = fsspec.url_to_fs(wire.remote, use_listings_cache=False, skip_instance_cache=True)
    half = sorted(SIZES)[2]
    fs.pipe_file(f"{root}/5/{half}", b"half of it")
    wire.clear()
    upload(wire, events, 5, folder, "b")
    assert sorted(wire.puts()) == sorted(
        f"run/5/{path}" for path in SIZES if path == half or path not in sorted(SIZES)[:3]
    )
    assert events.last("uploaded")["sent"] == 5
    assert_there(wire, 5, folder, tmp_path)


def test_retries_wait_longer_each_time_and_end(tmp_path, monkeypatch):
    wire, events = MemoryWire(monkeypatch), Events()
    wire.before = lambda verb, path: not path.endswith("data.json")
    began = time.monotonic()
    upload(wire, events, 5, make(tmp_path / "5", seed=1), "a", patience=Patience(retries=3, delay=0.2, threads=1))
    assert 0.1 + 0.2 + 0.4 <= time.monotonic() - began < 4
    assert [fields["attempt"] for kind, fields in events if kind == "remote_retried"] == [1, 2, 3]
    assert events.kinds()[-1] == "upload_failed"


def test_file_that_the_store_cut_short_is_found_before_the_marker(tmp_path, monkeypatch):
    wire, events = MemoryWire(monkeypatch), Events()

    def cut(verb, path):
        if verb == "put" and path.endswith("manifest"):
            fsspec.filesystem("memory").store[f"/bucket/{path}"].truncate(9)

    wire.after = cut
    upload(wire, events, 5, make(tmp_path / "5", seed=1), "a")
    assert events.last("upload_failed")["error"] == "OSError: state/manifest has 9 bytes there and 100 here"
    assert remote_steps(wire.remote) == []


def test_several_files_are_on_their_way_at_a_time(wire, tmp_path):
    meeting = threading.Barrier(3)

    def meet(verb, path):
        if path.endswith(("0c1e", "5b0d", "data.json")):
            meeting.wait(20)  # raises if the others do not come
        return True

    wire.before = meet
    upload(wire, Events(), 5, make(tmp_path / "5", seed=1), "a")
    assert_there(wire, 5, tmp_path / "5", tmp_path)


def test_local_folder_that_is_removed_ends_its_upload_only(wire, tmp_path):
    events, gone, folder = Events(), make(tmp_path / "5", seed=1), make(tmp_path / "6", seed=2)

    def remove(verb, path):
        if verb == "put" and path.startswith("run/5/") and len(wire.puts()) == 2:
            shutil.rmtree(gone)
        return True

    wire.before = remove
    upload(wire, events, 5, gone, "a", patience=Patience(threads=1))
    assert events.kinds() == ["upload_failed"] and "FileNotFoundError" in events.last("upload_failed")["error"]
    upload(wire, events, 6, folder, "b")
    assert remote_steps(wire.remote, QUICK) == [6]


def test_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    wire, events = MemoryWire(monkeypatch), Events()
    (tmp_path / "empty").mkdir()
    reserved = make(tmp_path / "reserved", seed=1)
    (reserved / "complete.json").write_text("{}")
    with Uploader(wire.remote, events) as uploader:
        for step, name in enumerate(("absent", "empty", "reserved")):
            uploader.put(step, tmp_path / name, "a")
    assert events.steps("upload_failed") == [0, 1, 2]
    assert wire.puts() == []


def test_event_that_cannot_be_told_does_not_end_the_thread(tmp_path, monkeypatch, caplog):
    wire, told = MemoryWire(monkeypatch), []

    def tell(kind, **fields):
        told.append(fields["step"])
        raise OSError("the disk is full")

    with Uploader(wire.remote, tell) as uploader:
        for step in (1, 2):
            uploader.put(step, make(tmp_path / str(step), seed=step), "a")
            while len(told) < step:
                time.sleep(0.01)
    assert remote_steps(wire.remote) == [1, 2]
    assert "the disk is full" in caplog.text


# ------------------------------------------------------------------------------------------------- queue and closing


def test_newer_step_supersedes_those_that_wait(wire, tmp_path):
    events, free, began = Events(), threading.Event(), threading.Event()

    def hold(verb, path):
        if verb == "put" and path.startswith("run/1/"):
            began.set()
            assert free.wait(30)
        return True

    folders = {step: make(tmp_path / str(step), seed=step) for step in (1, 2, 3, 4)}
    with Uploader(wire.remote, events, patience=Patience(answer=30.0)) as uploader:
        wire.before = hold
        uploader.put(1, folders[1], "1")
        assert began.wait(10)
        for step in (2, 3, 4):
            uploader.put(step, folders[step], str(step))
        free.set()
        assert uploader.close(30) == []
    assert remote_steps(wire.remote) == [1, 4]
    assert [fields for kind, fields in events if kind == "upload_superseded"] == [
        {"step": 2, "by": 3},
        {"step": 3, "by": 4},
    ]


def test_close_returns_in_time_and_says_what_is_undone(wire, tmp_path):
    events, free, began = Events(), threading.Event(), threading.Event()

    def hang(verb, path):
        if verb == "put" and "identity" not in path:
            began.set()
            assert free.wait(30)
        return True

    uploader = Uploader(wire.remote, events, patience=Patience(answer=30.0, threads=1))
    wire.before = hang
    uploader.put(1, make(tmp_path / "1", seed=1), "1")
    assert began.wait(10)
    uploader.put(2, make(tmp_path / "2", seed=2), "2")
    start = time.monotonic()
    assert uploader.close(0.3) == [1, 2]
    assert time.monotonic() - start < 2
    assert events.steps("upload_undone") == [1, 2]
    uploader.put(3, tmp_path / "2", "2")
    assert events.steps("upload_undone") == [1, 2, 3]
    free.set()
    while any(thread.name == "uploader" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert len(events) == 3 and uploader.close(0) == []
    assert len(wire.puts()) == 1  # the file that hung
    assert remote_steps(wire.remote) == []


def test_process_ends_while_an_upload_hangs(tmp_path):
    script = f"""
import sys, threading
from pathlib import Path
from fsspec.implementations.memory import MemoryFileSystem
from moejax.checkpoint.remote import Uploader
began = threading.Event()
MemoryFileSystem.put_file = lambda *args, **options: (began.set(), threading.Event().wait())
uploader = Uploader("memory://bucket/run", lambda kind, **fields: print(kind))
uploader.put(1, Path({str(make(tmp_path / "1", seed=1))!r}), "a")
assert began.wait(30)
print(uploader.close(0.1))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "upload_undone\n[1]\n", "")


# -------------------------------------------------------------------------------------------------------- retention


def test_retention_keeps_the_newest_and_touches_steps_only(wire, tmp_path):
    events, fs_root = Events(), fsspec.url_to_fs(wire.remote, use_listings_cache=False, skip_instance_cache=True)
    fs, root = fs_root
    others = ["notes/1", "12abc/1", "007/1", "-3/1", "2.txt"]
    for path in others:
        fs.pipe_file(f"{root}/{path}", b"not a step")
    fs.pipe_file(f"{root}/1/state/left", b"of an upload that never ended")
    folders = {step: make(tmp_path / str(step), seed=step) for step in (2, 10, 20, 100, 3)}
    for step in (2, 10, 20, 100):
        upload(wire, events, step, folders[step], str(step), keep=2)
    assert remote_steps(wire.remote) == [20, 100]
    assert events.steps("remote_removed") == [1, 2, 10]
    assert sorted(path for path in fs.find(root) if "/20/" not in path and "/100/" not in path) == sorted(
        f"{root}/{path}" for path in others
    )
    upload(
        wire, events, 3, folders[3], "3", keep=2
    )  # of a run that was resumed from before: 20 and 100 are ahead of it
    assert remote_steps(wire.remote) == [3, 20, 100]
    for step in (3, 20, 100):
        assert_there(wire, step, folders[step], tmp_path)


def test_retention_that_fails_is_reported(wire, tmp_path):
    events = Events()
    upload(wire, events, 1, make(tmp_path / "1", seed=1), "1", keep=1)
    wire.before = lambda verb, path: verb != "remove" or "probe" in path
    upload(wire, events, 2, make(tmp_path / "2", seed=2), "2", keep=1, patience=Patience(retries=0))
    assert events.kinds()[-1] == "remote_remove_failed" and events.steps("uploaded") == [1, 2]


# ---------------------------------------------------------------------------------------------------------- download


def test_download_goes_on_where_it_ended_and_only_reads(wire, tmp_path):
    folder, half = make(tmp_path / "5", seed=1), tmp_path / "back"
    upload(wire, Events(), 5, folder, "a")
    wire.clear()
    files = lambda: [path for verb, path in wire.requests if verb == "get" and path.removeprefix("run/5/") in SIZES]  # noqa: E731
    wire.before = lambda verb, path: path not in files() or len(set(files())) < 4
    with pytest.raises(ConfigError, match="an address that can be read"):
        download(wire.remote, 5, half, Patience(retries=0, threads=1))
    assert not half.exists()
    wire.clear()
    download(wire.remote, 5, half, QUICK)
    assert len(set(files())) == len(SIZES) - 3
    assert tree(half) == tree(folder)
    assert {verb for verb, _ in wire.requests} == {"get"}
    with pytest.raises(FileExistsError):
        download(wire.remote, 5, half, QUICK)


def test_download_that_began_with_other_content_begins_anew(wire, tmp_path):
    old, new, back = make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2), tmp_path / "back"
    upload(wire, Events(), 5, old, "a")
    wire.before = lambda verb, path: not path.endswith("process_0/d/77")
    with pytest.raises(ConfigError):
        download(wire.remote, 5, back, Patience(retries=0, threads=1))
    wire.clear()
    upload(wire, Events(), 5, new, "b")
    download(wire.remote, 5, back, QUICK)
    assert tree(back) == tree(new)


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        (b'{"identity": "a", "files": {"state/d/0c1e": 5}}', "came with 70000 bytes, and complete.json says 5"),
        (b'{"identity": "a", "files": {"../elsewhere": 5}}', "not below the checkpoint's folder"),
        (b'{"identity": "a", "files": {"/etc/elsewhere": 5}}', "not below the checkpoint's folder"),
        (b'{"identity": "a", "fi', "a step that was uploaded whole"),
    ],
    ids=["wrong size", "path out of the folder", "absolute path", "half a marker"],
)
def test_download_refuses_what_the_marker_does_not_describe(marker, why, tmp_path, monkeypatch):
    wire = MemoryWire(monkeypatch)
    upload(wire, Events(), 5, make(tmp_path / "5", seed=1), "a")
    fsspec.filesystem("memory").pipe_file("/bucket/run/5/complete.json", marker)
    with pytest.raises(ConfigError, match=why):
        download(wire.remote, 5, tmp_path / "back", Patience(retries=0))
    assert not (tmp_path / "back").exists()


def test_download_of_a_step_that_is_replaced_meanwhile_fails(tmp_path, monkeypatch):
    wire, replaced = MemoryWire(monkeypatch), []
    old, new = make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2)
    upload(wire, Events(), 5, old, "a")

    def replace(verb, path):
        if verb == "get" and path in {f"run/5/{name}" for name in SIZES} and not replaced:
            replaced.append(path)
            upload(wire, Events(), 5, new, "b")

    wire.after = replace
    with pytest.raises(ConfigError, match="was replaced while it was downloaded"):
        download(wire.remote, 5, tmp_path / "back", Patience(threads=1))
    download(wire.remote, 5, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(new)


def test_nothing_is_at_an_address_where_nothing_was_put(wire, tmp_path):
    assert remote_steps(wire.remote, QUICK) == []
    with pytest.raises(ConfigError, match="a step that was uploaded whole"):
        download(wire.remote, 5, tmp_path / "back", QUICK)


# ---------------------------------------------------------------------------------------------------------- addresses


def test_folder_as_address(tmp_path):
    events, folder, remote = Events(), make(tmp_path / "5", seed=1), tmp_path / "far" / "run"
    with Uploader(f"file://{remote}", events, keep=1) as uploader:
        uploader.put(5, folder, "a")
    with Uploader(str(remote), events, keep=1) as uploader:
        uploader.put(6, folder, "a")
    assert remote_steps(str(remote)) == [6]
    assert [path.name for path in remote.iterdir()] == ["6"]
    download(str(remote), 6, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("nowhere://bucket/run", "Protocol not known: nowhere"),
        ("s3://bucket/run", r'Install s3fs to access S3: pip install "moejax\[s3\]"'),
        ("s3://bucket/run*", "an address without"),
        ("simplecache::memory://bucket", "an address without"),
        ("file:///dev/null/run", "an address that can be written .NotADirectoryError"),
    ],
    ids=["unknown scheme", "no driver", "pattern", "chain", "cannot be written"],
)
def test_address_that_cannot_be_used_is_one_line(url, wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=wanted) as caught:
        Uploader(url, Events(), patience=QUICK)
    assert (caught.value.place, caught.value.value) == ("checkpoint.remote", url)
    assert "\n" not in str(caught.value)


def test_no_driver_is_imported_before_it_is_used():
    script = (
        "import sys, moejax, moejax.checkpoint.remote\n"
        "print([name for name in ('s3fs', 'gcsfs', 'adlfs', 'aiohttp', 'botocore', 'jax') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.emulator
@pytest.mark.parametrize("what", ["no bucket", "no server", "server that never answers"])
def test_s3_address_that_cannot_be_used_is_found_at_once(what, s3, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    if what == "no server":
        s3.stop()
    if what == "server that never answers":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="an address that can be written"):
        Uploader("s3://other/run" if what == "no bucket" else s3.remote, Events(), patience=Patience(answer=2.0))
    assert time.monotonic() - began < 20
    silent.close()


# ------------------------------------------------------------------------------------------------ servers that fail


@pytest.mark.emulator
def test_slow_server(s3, tmp_path):
    """Every answer takes 0.2 s, and the first to one file longer than is waited."""
    events, folder, tries = Events(), make(tmp_path / "5", seed=1), Counter()

    def slow(verb, path):
        tries[verb, path] += 1
        time.sleep(6 if (verb, tries[verb, path]) == ("put", 1) and path.endswith("state/manifest") else 0.2)
        return True

    s3.before = slow
    upload(s3, events, 5, folder, "a", patience=Patience(retries=3, delay=0.1, answer=2.0))
    assert events.steps("uploaded") == [5]
    s3.clear()
    assert_there(s3, 5, folder, tmp_path)


@pytest.mark.emulator
def test_server_that_stops_reading(s3, tmp_path):
    """A body that is larger than what sockets hold is not taken: no answer is due, so no limit of the socket counts."""
    events, folder, free = Events(), tmp_path / "5", threading.Event()
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(2**20) * 60)
    s3.before = lambda verb, path: not path.endswith("large") or len(s3.puts()) > 1 or free.wait(30)
    began = time.monotonic()
    patience = Patience(retries=1, delay=0.1, answer=2.0, slowest=2.0**26)
    upload(s3, events, 5, folder, "a", patience=patience)
    assert time.monotonic() - began < 15
    assert "FSTimeoutError" in events.last("remote_retried")["error"]
    free.set()
    assert_there(s3, 5, folder, tmp_path)


@pytest.mark.emulator
def test_server_that_comes_back_within_the_retries(s3, tmp_path):
    events, folder = Events(), make(tmp_path / "5", seed=1)

    def die(verb, path):
        if len(s3.puts()) == 3 and s3.port and events.kinds().count("remote_retried") == 0:
            s3.stop()
        return s3._server is not None

    with Uploader(s3.remote, events, patience=Patience(retries=6, delay=0.2, answer=5.0, threads=1)) as uploader:
        s3.before = die
        uploader.put(5, folder, "a")
        while not events.kinds():
            time.sleep(0.05)
        s3.start()
        assert uploader.close(60) == []
    assert events.steps("uploaded") == [5] and "remote_retried" in events.kinds()
    assert_there(s3, 5, folder, tmp_path)


@pytest.mark.emulator
def test_server_that_comes_back_after_the_retries(s3, tmp_path):
    events, folder = Events(), make(tmp_path / "5", seed=1)

    def die(verb, path):
        if len(s3.puts()) == 4:
            s3.stop()
        return s3._server is not None

    patience = Patience(retries=1, delay=0.05, answer=5.0, threads=1)
    with Uploader(s3.remote, events, patience=patience) as uploader:
        s3.before = die
        uploader.put(5, folder, "a")
        while "upload_failed" not in events.kinds():
            time.sleep(0.05)
        s3.clear()
        s3.start()
        uploader.put(5, folder, "a")
        assert uploader.close(60) == []
    assert len(s3.puts()) == len(SIZES) - 3
    assert events.last("uploaded")["sent"] == len(SIZES) - 3
    assert_there(s3, 5, folder, tmp_path)


@pytest.mark.emulator
def test_upload_of_a_killed_process_goes_on_in_the_next(s3, tmp_path):
    folder, free = make(tmp_path / "5", seed=1), threading.Event()
    script = f"""
from pathlib import Path
from moejax.checkpoint.remote import Patience, Uploader
with Uploader({s3.remote!r}, print, patience=Patience(threads=1)) as uploader:
    uploader.put(5, Path({str(folder)!r}), "a")
"""
    s3.before = lambda verb, path: len(s3.puts()) < 4 or (free.wait(60) and False)
    child = subprocess.Popen([sys.executable, "-c", script])
    while len(s3.puts()) < 4:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    s3.clear()
    free.set()
    assert remote_steps(s3.remote, QUICK) == []
    events = Events()
    upload(s3, events, 5, folder, "a")
    assert len(s3.puts()) == len(SIZES) - 3
    assert_there(s3, 5, folder, tmp_path)


@pytest.mark.emulator
def test_process_ends_while_the_server_hangs(s3, tmp_path):
    free = threading.Event()
    script = f"""
import time
from pathlib import Path
from moejax.checkpoint.remote import Uploader
uploader = Uploader({s3.remote!r}, lambda kind, **fields: print(kind))
uploader.put(1, Path({str(make(tmp_path / "1", seed=1))!r}), "a")
time.sleep(1)
print(uploader.close(0.5))
"""
    s3.before = lambda verb, path: "/." in path or free.wait(60)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not [path for _, path in s3.requests if path.startswith("run/1")]:
        assert child.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    out, err = child.communicate(timeout=30)
    assert (out, child.returncode, err) == ("upload_undone\n[1]\n", 0, "")
    assert time.monotonic() - began < 10
    free.set()


@pytest.mark.emulator
def test_large_file_goes_in_parts_and_comes_back(s3, tmp_path):
    folder = tmp_path / "5"
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(2**20) * 110)
    upload(s3, Events(), 5, folder, "a", patience=Patience())
    assert s3.puts().count("run/5/large") == 3  # of 50 MiB
    assert_there(s3, 5, folder, tmp_path)
