"""The files of checkpoints at an address that fsspec knows: requests that are retried and end in time.

Credentials, endpoints and regions are the driver's own (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS).
"""

import contextlib
import json
import posixpath
import random
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from moejax.config import ConfigError

COMPLETE = "complete.json"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a transfer is tried, and how much of it goes on at a time."""

    retries: int = 8  # of one file or request, after which the whole transfer has failed
    delay: float = 1.0  # s before the first retry; doubled for each further one, half of it at random
    longest_delay: float = 60.0  # s
    answer: float = 60.0  # s that a server may take to answer
    slowest: float = 2.0**20  # bytes/s; a file that goes slower is tried again
    threads: int = 4  # files at a time


class Store:
    """The files below an address. Every request is retried, and raises what the driver raises when that is over."""

    def __init__(self, url: str, patience: Patience, tell: Callable[..., None], stop: threading.Event):
        self._url, self._patience, self._tell, self._stop = url, patience, tell, stop
        self._fs, self._root = _filesystem(url, patience)

    @contextlib.contextmanager
    def usable(self, verb: str) -> Iterator[None]:
        """Makes errors ConfigErrors."""
        try:
            yield
        except Exception as error:  # drivers have errors of their own kinds
            wanted = f"an address that can be {verb} ({one_line(error)})"
            raise ConfigError("checkpoint.remote", self._url, wanted) from error

    def probe(self) -> None:
        """Writes, reads and deletes a file, with the driver's own retries only."""
        path = f"{self._root}/.probe-{uuid.uuid4().hex}"
        self._once(self._fs.pipe_file, path, path.encode())
        if self._once(self._fs.cat_file, path) != path.encode():
            raise OSError("a file reads otherwise than it was written")
        self._once(self._fs.rm_file, path)

    def steps(self) -> list[int]:
        """Steps of which there is anything, ascending."""
        try:
            entries = self._try(None, self._root, self._fs.ls, self._root, detail=True)
        except FileNotFoundError:
            return []
        names = (posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def complete_steps(self) -> list[int]:
        """Steps that have a complete.json, ascending."""
        return [step for step in self.steps() if self.read(step, COMPLETE) is not None]

    def sizes(self, step: int) -> dict[str, int]:
        """Bytes of each file of a step."""
        folder = self._path(step)
        found = self._try(step, "", self._fs.find, folder, detail=True)
        return {path[len(folder) + 1 :]: entry["size"] for path, entry in found.items()}

    def read(self, step: int, name: str) -> dict[str, Any] | None:
        """A JSON object; None if there is none, or half of one, as a folder shows a file that is being written."""
        try:
            return json.loads(self._try(step, name, self._fs.cat_file, self._path(step, name)))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, step: int, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON object."""
        self._try(step, name, self._fs.pipe_file, self._path(step, name), json.dumps(content).encode())

    def send(self, step: int, path: str, source: Path, size: int) -> None:
        """Sends a file of so many bytes."""
        self._try(step, path, self._fs.put_file, str(source), self._path(step, path), size=size)

    def fetch(self, step: int, path: str, target: Path, size: int) -> None:
        """Brings a file, which gets its name when it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.half")

        def get(**options: Any) -> None:
            self._fs.get_file(self._path(step, path), str(half), **options)
            if half.stat().st_size != size:
                raise OSError(f"{path} came with {half.stat().st_size} bytes, and complete.json says {size}")

        self._try(step, path, get, size=size)
        half.replace(target)

    def remove(self, step: int) -> None:
        """Deletes all that there is of a step, complete.json first."""
        if not self.sizes(step):
            return
        with contextlib.suppress(FileNotFoundError):
            self._try(step, COMPLETE, self._fs.rm_file, self._path(step, COMPLETE))
        with contextlib.suppress(FileNotFoundError):
            self._try(step, "", self._fs.rm, self._path(step), recursive=True)
        if left := self.sizes(step):
            raise OSError(f"{len(left)} files of step {step} could not be deleted")

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/{step:d}/{name}".rstrip("/")

    def _once(self, request: Callable[..., Any], *args: Any, size: int = 0, **options: Any) -> Any:
        if self._fs.async_impl:  # the limits of a socket do not end a request that the server stops reading
            options["timeout"] = self._patience.answer + size / self._patience.slowest
        return request(*args, **options)

    def _try(self, step: int | None, path: str, request: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a request gives; one for a file that is not there is not tried again."""
        attempt = 1
        while True:
            try:
                return self._once(request, *args, **options)
            except FileNotFoundError:
                raise
            except Exception as error:  # drivers have errors of their own kinds
                if attempt > self._patience.retries:
                    raise
                self._tell("remote_retried", step=step, path=path, attempt=attempt, error=one_line(error))
                delay = min(self._patience.longest_delay, self._patience.delay * 2 ** (attempt - 1))
                if self._stop.wait(delay * random.uniform(0.5, 1.0)):
                    raise
                attempt += 1


def _filesystem(url: str, patience: Patience) -> tuple[Any, str]:
    """The driver of an address, none that others use too, and the address as its paths begin."""
    if re.search(r"[*?\[\]]|::", url):
        raise ConfigError("checkpoint.remote", url, "an address without *, ?, [, ] and ::")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    protocol = fsspec.utils.get_protocol(url)
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": min(10.0, patience.answer), "read_timeout": patience.answer}
        options |= {"config_kwargs": {**limits, "retries": {"total_max_attempts": 3}}, "max_concurrency": 4}
    if protocol in ("file", "local"):
        options["auto_mkdir"] = True
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = ': pip install "moejax[s3]"' if protocol in ("s3", "s3a") else ""
        raise ConfigError("checkpoint.remote", url, f"an address whose driver is there; {error}{extra}") from None
    except Exception as error:
        known = "an address such as s3://bucket/run, gs://bucket/run or a folder"
        raise ConfigError("checkpoint.remote", url, f"{known} ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """An error in one line, with its kind: some have no text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")
