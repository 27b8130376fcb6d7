"""Which process of a run this is: from the settings, or from what its launcher left in the environment.

JAX reads the same variables, but would let its coordinator listen on every interface, and a process that stays away
would end the others with an abort. So the place is found here, and handed to JAX whole.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moejax.config import ConfigError, LaunchConfig

FIRST_PORT, NUM_PORTS = 61440, 4096  # above those that Linux gives to outgoing connections; JAX uses the same


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process of a run of several."""

    coordinator: str  # HOST:PORT at which process 0 listens
    processes: int
    process: int  # number of this one
    device: int | None = None  # the one device of its host that it takes; None: all that it sees


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a launcher says."""

    launcher: str
    processes: int
    process: int
    coordinator: str | None = None
    on_host: int | None = None  # number among several processes of this host; None: it is alone there


def find_place(cfg: LaunchConfig, variables: Mapping[str, str]) -> Place | None:
    """This process's place in its run; None if it is alone, or is to start the others.

    In this order: `launch.process`; JAX_PROCESS_ID and its kin, which Kubeflow, tools/launch/jobset.yaml and the
    launcher of this package set; Open MPI; a step of Slurm. `launch.coordinator` goes before what they say.

    Args:
        cfg: the settings of this process.
        variables: its environment.

    Raises:
        ConfigError: what is given does not go together, or is not enough.
    """
    found: _Found | None
    if cfg.process is not None:
        found = _Found(launcher="launch.process", processes=cfg.processes, process=cfg.process)
    else:
        found = _from_variables(variables) or _from_open_mpi(variables) or _from_slurm(variables)
    if found is None or found.processes == 1:
        if cfg.coordinator is not None and cfg.process is None:
            wanted = "the number of this process, as neither JAX_PROCESS_ID nor Open MPI nor Slurm says it"
            raise ConfigError("launch.process", None, wanted)
        return None
    if cfg.processes not in (1, found.processes):
        raise ConfigError("launch.processes", cfg.processes, f"{found.processes}, as {found.launcher} says")
    coordinator = cfg.coordinator or variables.get("JAX_COORDINATOR_ADDRESS") or found.coordinator
    if coordinator is None:
        raise ConfigError("launch.coordinator", None, f"HOST:PORT of process 0, which {found.launcher} does not say")
    replace(cfg, coordinator=coordinator, processes=found.processes, process=found.process)  # for its checks
    device = None if _is_bound(variables) else found.on_host
    return Place(coordinator=coordinator, processes=found.processes, process=found.process, device=device)


def _is_bound(variables: Mapping[str, str]) -> bool:
    """Whether the launcher has chosen this process's devices."""
    visible = variables.get("CUDA_VISIBLE_DEVICES", "")
    return "JAX_LOCAL_DEVICE_IDS" in variables or (visible != "" and "," not in visible)


def _from_variables(variables: Mapping[str, str]) -> _Found | None:
    if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= variables.keys():
        return None
    return _Found(
        launcher="JAX_NUM_PROCESSES",
        processes=_number(variables, "JAX_NUM_PROCESSES"),
        process=_number(variables, "JAX_PROCESS_ID"),
    )


def _from_open_mpi(variables: Mapping[str, str]) -> _Found | None:
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    size, rank, local_size, local_rank = (_number(variables, f"OMPI_COMM_WORLD_{name}") for name in names)
    uri = variables.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; not in Open MPI 5
    address = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", uri)
    host = None if address is None else address[1] or f"{address[2]}]"
    host = "127.0.0.1" if local_size == size else host
    return _Found(
        launcher="Open MPI",
        processes=size,
        process=rank,
        coordinator=host and f"{host}:{_port(variables, uri or variables.get('PMIX_NAMESPACE', ''))}",
        on_host=local_rank if local_size > 1 else None,
    )


def _from_slurm(variables: Mapping[str, str]) -> _Found | None:
    """None in an allocation without a step: there is no other process."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= variables.keys():
        return None
    names = ("STEP_NUM_TASKS", "PROCID", "LOCALID", "STEP_NUM_NODES")
    tasks, number, on_host, nodes = (_number(variables, f"SLURM_{name}") for name in names)
    # the first of node7, node[001-015]-ib,login, node[3,7-9]
    first = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", variables["SLURM_STEP_NODELIST"])
    host = "127.0.0.1" if nodes == 1 or first is None else "".join(part or "" for part in first.groups())
    step = f"{variables['SLURM_JOB_ID']}.{variables.get('SLURM_STEP_ID')}"
    return _Found(
        launcher="Slurm",
        processes=tasks,
        process=number,
        coordinator=f"{host}:{_port(variables, step)}",
        on_host=on_host if tasks > nodes else None,
    )


def _port(variables: Mapping[str, str], run: str) -> str:
    """The same port on every process of a run, and mostly another for another run."""
    return variables.get("JAX_COORDINATOR_PORT") or str(FIRST_PORT + zlib.crc32(run.encode()) % NUM_PORTS)


def _number(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables.get(name, ""))
    except ValueError:
        raise ConfigError(name, variables.get(name), "a whole number in this variable of the environment") from None
