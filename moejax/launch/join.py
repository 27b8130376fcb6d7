"""How a process becomes part of its run, and how it leaves when it fails."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import threading

from moejax.config import ConfigError, RunConfig
from moejax.launch.host_memory import keep_freed_memory, will_run_on_cpu
from moejax.launch.meeting import meet
from moejax.launch.place import Place, find_place

LAUNCHER_PIPE = "MOEJAX_LAUNCHER_PIPE"  # variable with the number of a pipe whose other end the launcher holds
LEAVE_SECONDS = 5  # in which the others may leave too, for the same reason


def join(config: RunConfig) -> RunConfig:
    """Gives this process its simulated devices and joins the other processes of its run.

    On CPU it keeps what memory it frees, too (`host_memory.py`). It must come before anything that starts JAX. Where
    JAX has been joined to other processes already, it does nothing.

    Returns:
        The settings of the run, which are the same on every process: those given, without the number of this one.

    Raises:
        ConfigError: a setting does not fit; a process is missing after `launch.join_seconds`, or has other settings.
    """
    end_with_launcher()
    import jax

    run = dataclasses.replace(config, launch=dataclasses.replace(config.launch, process=None))
    if jax.distributed.is_initialized():
        return run
    place = find_place(config.launch, os.environ)
    processes = 1 if place is None else place.processes
    if config.launch.processes > processes:
        raise ConfigError(
            "launch.processes", config.launch.processes, "1: only `moejax train` starts several processes"
        )
    if config.simulate is not None:
        from moejax.mesh import simulate

        if config.simulate % processes:
            raise ConfigError("simulate", config.simulate, f"a multiple of the {processes} processes of this run")
        simulate(config.simulate // processes)
    if will_run_on_cpu():
        keep_freed_memory()
    if place is not None:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        settings = {**json.loads(run.to_json()), "processes": processes, "version": versions}
        meet(place, settings, config.launch.join_seconds)
        _start_jax(place, config.launch.join_seconds)
    return run


def _start_jax(place: Place, seconds: int) -> None:
    import jax

    handler = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=None if place.device is None else [place.device],
        cluster_detection_method="deactivate",  # it is done
        initialization_timeout=seconds,
        coordinator_bind_address=place.coordinator,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # JAX's own would swallow the signal


def end_with_launcher() -> None:
    """Lets this process end at once when the launcher that started it is gone, however that ended."""
    pipe = os.environ.pop(LAUNCHER_PIPE, None)
    if pipe is None:
        return

    def watch() -> None:
        os.read(int(pipe), 1)  # nothing is ever written: it returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_joined() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Ends this process, which has failed, with `code` if it is one of several; returns if it is alone.

    At its regular end a process waits for all others, which would wait for this one until JAX's time limit.
    """
    if not is_joined():
        return
    import jax

    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(LEAVE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
