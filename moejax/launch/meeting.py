"""Where the processes of a run meet before JAX starts: all are there, with the same settings, or none goes on.

Process 0 listens at the coordinator's address. The others connect and say, in one line of JSON, which process they are
and what their settings are. When all are there, or time is up, or one does not fit, process 0 gives everyone the same
answer in one line, and leaves the address to JAX's coordinator.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moejax.config import ConfigError
from moejax.launch.place import Place

RETRY_SECONDS = 0.2
CONNECT_SECONDS = 5.0
LONGEST_HELLO = 1 << 20  # bytes
Trouble = tuple[str, Any, str]  # the arguments of a ConfigError


def meet(place: Place, settings: dict[str, Any], seconds: float) -> None:
    """Returns when all processes of the run are there.

    Args:
        place: of this process.
        settings: what must be the same on all processes; a tree of dicts that JSON can hold.
        seconds: how long to wait for the others.

    Raises:
        ConfigError: the same on every process: one has other settings or another's number, or is missing.
    """
    deadline = time.monotonic() + seconds
    if place.process == 0:
        trouble = _receive(place, settings, seconds, deadline)
    else:
        trouble = _visit(place, settings, seconds, deadline)
    if trouble is not None:
        raise ConfigError(*trouble)


def _missing(place: Place, seconds: float, numbers: list[int]) -> Trouble:
    names = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    names = f"process{'es' if len(numbers) > 1 else ''} {names}"
    wanted = f"all of them at {place.coordinator} within launch.join_seconds={seconds:g}; missing: {names}"
    return "launch.processes", place.processes, wanted


def _address(place: Place) -> tuple[str, int]:
    host, _, port = place.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


# -------------------------------------------------------------------------------------------------------- process 0


@dataclass
class _Guest:
    """A connection: what it has sent so far, and who it is once that is known."""

    connection: socket.socket
    text: bytearray = field(default_factory=bytearray)
    process: int | None = None


def _receive(place: Place, settings: dict[str, Any], seconds: float, deadline: float) -> Trouble | None:
    """Waits for all others, and gives them the answer that is returned."""
    guests: dict[socket.socket, _Guest] = {}
    trouble = None
    with _listen(place, deadline) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(there := [g.process for g in guests.values() if g.process is not None]) < place.processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                trouble = trouble or _missing(place, seconds, sorted(set(range(1, place.processes)) - set(there)))
                break
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    guests[connection] = _Guest(connection)
                    selector.register(connection, selectors.EVENT_READ)
                elif _read(guest := guests[key.fileobj]):  # type: ignore[index]
                    trouble = _greet(guest, guests, settings) or trouble
                else:  # it has gone, or is not one of ours
                    selector.unregister(guest.connection)
                    guests.pop(guest.connection).connection.close()
        for guest in guests.values():
            with contextlib.suppress(OSError), guest.connection:  # one that has just gone needs no answer
                if guest.process is not None:
                    guest.connection.sendall(json.dumps({"answer": trouble}).encode() + b"\n")
    return trouble


def _listen(place: Place, deadline: float) -> socket.socket:
    host, port = _address(place)
    while True:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as error:  # the name of a pod is known a little after it has started
            if time.monotonic() > deadline:
                raise ConfigError("launch.coordinator", place.coordinator, f"a known host ({error.strerror})") from None
            time.sleep(RETRY_SECONDS)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        wanted = f"a free port of an address of process 0's machine ({error.strerror})"
        raise ConfigError("launch.coordinator", place.coordinator, wanted) from None
    listener.listen(place.processes)
    return listener


def _read(guest: _Guest) -> bool:
    """Whether the connection, which has something to read, goes on."""
    try:
        part = guest.connection.recv(1 << 16)
    except OSError:
        return False
    guest.text += part
    return bool(part) and len(guest.text) < LONGEST_HELLO


def _greet(guest: _Guest, guests: dict[socket.socket, _Guest], settings: dict[str, Any]) -> Trouble | None:
    """What is wrong with a guest that has said its hello."""
    hello = _line(guest.text)
    if guest.process is not None or "hello" not in hello:
        return None
    twins = [other for other in guests.values() if other.process == hello["hello"]]
    guest.process = hello["hello"]
    if twins or guest.process == 0:
        return "launch.process", guest.process, "a number of its own for each process: two have this one"
    return _difference(settings, hello["settings"], guest.process)


def _difference(here: dict[str, Any], there: dict[str, Any], process: int | None) -> Trouble | None:
    """The first setting that process `process` has otherwise than process 0."""
    mine, other = dict(_flat(here)), dict(_flat(there))
    for place in sorted(mine.keys() | other.keys()):
        if mine.get(place) != other.get(place):
            return place, other.get(place), f"{mine.get(place)!r} on process {process}, as on process 0"
    return None


def _flat(tree: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


# ------------------------------------------------------------------------------------------------------- the others


def _visit(place: Place, settings: dict[str, Any], seconds: float, deadline: float) -> Trouble | None:
    """Says hello to process 0 as soon as it is there, and waits for its answer."""
    hello = json.dumps({"hello": place.process, "settings": settings}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        timeout = min(left, CONNECT_SECONDS)
        with contextlib.suppress(OSError), socket.create_connection(_address(place), timeout) as connection:
            connection.settimeout(seconds + RETRY_SECONDS)  # process 0 may have come much later than this one
            connection.sendall(hello)
            answer = _line(bytearray(connection.makefile("rb").readline(LONGEST_HELLO)))
            if "answer" in answer:
                return answer["answer"]
        time.sleep(RETRY_SECONDS)  # nobody there yet, or another program
    return _missing(place, seconds, [0])


def _line(text: bytearray) -> dict[str, Any]:
    """The object of one line of JSON; empty if it is not whole, or something else."""
    try:
        value = json.loads(text) if text.endswith(b"\n") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
