import contextlib
import json
import os
import signal
import socket
import string
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import psutil
import pytest
import yaml

import moejax
from moejax.config import ConfigError, LaunchConfig, RunConfig
from moejax.launch import local
from moejax.launch.join import join
from moejax.launch.local import is_launcher, run_processes
from moejax.launch.meeting import meet
from moejax.launch.place import Place, find_place
from moejax.launch.restarts import FINAL, HARDWARE

ROOT = Path(__file__).parents[1]
ALONE = RunConfig(steps=1)
TWO = replace(ALONE, launch=LaunchConfig(processes=2))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The environment says nothing of processes, and new interpreters find moejax."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_NUM_PROC", "JAX_PROC", "JAX_COORD", "JAX_LOCAL")):
            monkeypatch.delenv(name)


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


# ------------------------------------------------------------------------------------------------ simulated devices


def test_simulate_is_content_with_the_devices_there_are():
    moejax.simulate(len(jax.devices()))


def test_simulate_after_the_start_is_one_line():
    there = len(jax.devices())
    with pytest.raises(ConfigError, match=f"^simulate=3: wanted to be set before JAX starts; it has {there} cpu devic"):
        moejax.simulate(3)


@pytest.mark.parametrize("started", ["", "jax.devices(); "], ids=["before the start", "after the start"])
def test_simulate_in_a_new_interpreter(started):
    code = f"import jax, moejax; {started}moejax.simulate(3); print(len(jax.devices()), jax.devices()[0].platform)"
    variables = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert ("ConfigError: simulate=3" in result.stderr) if started else (result.stdout == "3 cpu\n"), result.stderr


# ----------------------------------------------------------------------------------------------------------- places


JAX_VARIABLES = {"JAX_COORDINATOR_ADDRESS": "pod-0:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[008-009,12]-ib,login",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": "5000",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "291504128.0;tcp://192.0.2.2,10.0.0.1:37287;tcp6://[fd00::2]:52073",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "JAX_COORDINATOR_PORT": "5000",
}


def slurm(**changes):
    return SLURM | {f"SLURM_{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("flags", "variables", "place"),
    [
        ({}, {}, None),
        ({"processes": 2, "process": 1, "coordinator": "a:1"}, SLURM, ("a:1", 2, 1, None)),
        ({}, JAX_VARIABLES | SLURM, ("pod-0:1", 4, 3, None)),
        ({"processes": 4}, JAX_VARIABLES, ("pod-0:1", 4, 3, None)),
        ({}, SLURM, ("node008-ib:5000", 4, 2, None)),
        ({"coordinator": "a:1"}, SLURM, ("a:1", 4, 2, None)),
        ({}, slurm(STEP_NODELIST="a1,a2"), ("a1:5000", 4, 2, None)),
        ({}, slurm(STEP_NUM_TASKS="8", LOCALID="1"), ("node008-ib:5000", 8, 2, 1)),
        ({}, slurm(STEP_NUM_TASKS="8", LOCALID="1") | {"CUDA_VISIBLE_DEVICES": "5"}, ("node008-ib:5000", 8, 2, None)),
        ({}, slurm(STEP_NUM_NODES="1", LOCALID="2"), ("127.0.0.1:5000", 4, 2, 2)),
        ({}, slurm(STEP_NUM_TASKS="1", PROCID="0"), None),
        ({}, {name: value for name, value in SLURM.items() if "STEP" not in name}, None),
        ({}, OPEN_MPI | SLURM, ("192.0.2.2:5000", 4, 3, 1)),
        ({}, OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fd00::2,fd00::3]:1"}, ("[fd00::2]:5000", 4, 3, 1)),
        ({}, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": ""}, ("127.0.0.1:5000", 4, 3, 1)),
        ({"processes": 4}, {}, None),
        ({"processes": 4}, slurm(STEP_NUM_TASKS="1", PROCID="0"), None),
    ],
    ids=[
        "alone",
        "flags before Slurm",
        "variables before Slurm",
        "flag and variables agree",
        "Slurm",
        "Slurm with a coordinator",
        "Slurm with a plain list of nodes",
        "Slurm with several processes a node",
        "Slurm that has bound the devices",
        "Slurm on one node",
        "Slurm with one task",
        "Slurm without a step",
        "Open MPI before Slurm",
        "Open MPI on IPv6",
        "Open MPI 5 on one host",
        "to be started",
        "to be started in a step of Slurm",
    ],
)
def test_place_of_a_process(flags, variables, place):
    found = find_place(LaunchConfig(**flags), variables)
    assert (found and (found.coordinator, found.processes, found.process, found.device)) == place


@pytest.mark.parametrize(
    ("flags", "variables", "line"),
    [
        ({"coordinator": "a:1"}, {}, "launch.process=None: wanted the number of this process"),
        ({"processes": 3}, SLURM, "launch.processes=3: wanted 4, as Slurm says"),
        ({}, OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "launch.coordinator=None: wanted HOST:PORT of process 0, which"),
        ({}, JAX_VARIABLES | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x': wanted a whole number"),
        ({}, JAX_VARIABLES | {"JAX_PROCESS_ID": "4"}, "launch.process=4: wanted a number from 0 to 3"),
        ({}, JAX_VARIABLES | {"JAX_COORDINATOR_ADDRESS": "pod"}, "launch.coordinator='pod': wanted HOST:PORT"),
        ({"processes": 2, "process": 1}, {}, "launch.coordinator=None: wanted HOST:PORT of process 0"),
        ({"process": 0, "coordinator": "fd00::2:1"}, {}, "launch.coordinator='fd00::2:1': wanted HOST:PORT, or [ADDR"),
        ({"processes": 2, "process": 2, "coordinator": "a:1"}, {}, "launch.process=2: wanted a number from 0 to 1"),
    ],
)
def test_place_that_does_not_fit_is_one_line(flags, variables, line):
    with pytest.raises(ConfigError) as error:
        find_place(LaunchConfig(**flags), variables)
    assert str(error.value).startswith(line)


def test_one_process_joins_nobody():
    assert join(ALONE) == ALONE
    assert not is_launcher(ALONE) and is_launcher(TWO)


def test_only_the_command_starts_processes():
    with pytest.raises(ConfigError, match=r"^launch.processes=2: wanted 1: only `moejax train` starts"):
        join(TWO)


def test_devices_that_do_not_divide_are_one_line(monkeypatch):
    for name, value in JAX_VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^simulate=6: wanted a multiple of the 4 processes of this run$"):
        join(replace(ALONE, simulate=6))


# ---------------------------------------------------------------------------------------------------------- meeting


def outcomes(address, settings, *, processes, seconds):
    """What `meet` raises in each of the processes that come, whose numbers and settings are `settings`."""

    def outcome(process, own):
        place = Place(coordinator=address, processes=processes, process=process)
        try:
            return meet(place, own, seconds)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(outcome, *zip(*settings, strict=True)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_processes_meet(host):
    address = free_address().replace("127.0.0.1", host)
    same = {"steps": 3, "model": {"layers": [1, 2]}}
    assert outcomes(address, [(n, same) for n in (3, 1, 2, 0)], processes=4, seconds=20) == [None] * 4


def test_missing_processes_are_named_to_all():
    address = free_address()
    line = f"launch.processes=5: wanted all of them at {address} within launch.join_seconds=1; missing: processes 1, 3"
    assert outcomes(address, [(n, {}) for n in (0, 2, 4)], processes=5, seconds=1) == [line] * 3


def test_process_0_is_missed_by_all():
    address = free_address()
    line = f"launch.processes=3: wanted all of them at {address} within launch.join_seconds=0.5; missing: process 0"
    assert outcomes(address, [(n, {}) for n in (1, 2)], processes=3, seconds=0.5) == [line] * 2


def test_other_settings_are_named_to_all():
    mine = {"steps": 3, "model": {"layers": 2, "width": 8}}
    other = {"steps": 3, "model": {"layers": 4, "width": 8}}
    line = "model.layers=4: wanted 2 on process 2, as on process 0"
    assert outcomes(free_address(), [(0, mine), (1, mine), (2, other)], processes=3, seconds=20) == [line] * 3


def test_one_number_given_twice_is_one_line():
    line = "launch.process=1: wanted a number of its own for each process: two have this one"
    assert outcomes(free_address(), [(0, {}), (1, {}), (1, {})], processes=3, seconds=20) == [line] * 3


def test_address_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        (line,) = outcomes(address, [(0, {})], processes=2, seconds=1)
    assert line.startswith(f"launch.coordinator='{address}': wanted a free port of an address of process 0's machine")


def connect(address):
    host, port = address.split(":")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize("text", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 2'], ids=["nothing", "HTTP", "a part"])
def test_strangers_do_not_disturb_the_meeting(text):
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(outcomes, address, [(0, {})], processes=2, seconds=20)
        with connect(address) as stranger:
            stranger.sendall(text)
            assert outcomes(address, [(1, {})], processes=2, seconds=20) == [None]
        assert first.result() == [None]


def test_process_that_has_gone_again_is_missing():
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(outcomes, address, [(0, {})], processes=3, seconds=1.5)
        with connect(address) as gone:
            gone.sendall(b'{"hello": 1, "settings": {}}\n')
        time.sleep(0.3)
        second = outcomes(address, [(2, {})], processes=3, seconds=1.5)
        assert all(line.endswith("missing: process 1") for line in first.result() + second)


def test_another_server_at_the_address_is_not_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(100)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        pool.submit(answer)
        (line,) = outcomes(f"127.0.0.1:{server.getsockname()[1]}", [(1, {})], processes=2, seconds=0.5)
        server.shutdown(socket.SHUT_RDWR)
    assert line.endswith("missing: process 0")


# ------------------------------------------------------------------------------------------ processes of one machine


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(local, "OWN_END_SECONDS", 0.3)
    monkeypatch.setattr(local, "KILLED_END_SECONDS", 0.3)
    monkeypatch.setattr(local, "TERMINATE_SECONDS", 0.3)


def run_code(code, config=TWO):
    """The exit code of processes that each run `code`, where `me` is their number."""
    start = "import os, signal, sys, time\nme = int(os.environ['JAX_PROCESS_ID'])\n"
    return run_processes([sys.executable, "-c", start + textwrap.dedent(code)], config)


@pytest.mark.parametrize(
    ("code", "result", "said"),
    [
        ("print(me)", 0, ""),
        ("if me: sys.exit('bad')", 1, "moejax: process 1 ended with exit code 1\n[process 1] bad\n"),
        (
            "if me: print('no such file', file=sys.stderr); sys.exit(2)\ntime.sleep(60)",
            2,
            "moejax: process 1 ended with exit code 2\n[process 1] no such file\n",
        ),
        ("if me: print('all say this')\nsys.exit(2)", 2, ""),
        ("if not me: sys.exit(10)\ntime.sleep(60)", 10, ""),
        ("if me: os.kill(os.getpid(), 9)\ntime.sleep(60)", 137, "moejax: process 1 was ended by SIGKILL\n"),
        ("signal.signal(15, signal.SIG_IGN)\nif not me: sys.exit(3)\ntime.sleep(60)", 3, ""),
    ],
    ids=["good", "one fails", "the rest waits", "all fail alike", "process 0 fails", "killed", "SIGTERM is ignored"],
)
def test_exit_code_is_that_of_the_first_failure(code, result, said, quick, capfd):
    assert run_code(code) == result
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(
    ("codes", "first"),
    [((None, 2), 1), ((-6, 10), 1), ((1, -9), 1), ((-6, 1), 1), ((2, 2), 0), ((-6, -6), 0), ((0, 0), None)],
)
def test_consequences_are_not_the_first_failure(codes, first):
    processes = [SimpleNamespace(poll=lambda code=code: code) for code in codes]
    assert local._first_failure(processes) == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signals_are_passed_on(number, tmp_path):
    """Once each: a second Ctrl-C would end a run without its checkpoint."""
    code = f"""
        got = []
        signal.signal({int(number)}, lambda *a: got.append(a))
        open(f"{tmp_path}/{{me}}", "w").close()
        while not got: time.sleep(0.01)
        time.sleep(0.3)
        sys.exit(0 if len(got) == 1 else 5)
    """

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    assert run_code(code) == 0
    assert signal.getsignal(number) is before


def test_no_process_outlives_its_launcher(tmp_path):
    code = f"""
        import os, sys, time
        from moejax.config import LaunchConfig, RunConfig
        from moejax.launch.join import end_with_launcher
        from moejax.launch.local import run_processes
        if "JAX_PROCESS_ID" in os.environ:
            end_with_launcher()
            open(f"{tmp_path}/{{os.getpid()}}", "w").close()
            time.sleep(100)
        run_processes([sys.executable, __file__], RunConfig(steps=1, launch=LaunchConfig(processes=2)))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    launcher = subprocess.Popen([sys.executable, script])
    while len(numbers := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    processes = [psutil.Process(number) for number in numbers]
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(processes, timeout=20)[1]


# ---------------------------------------------------------------------------------------------------- the whole way


PROGRAM = """
import json, pathlib, sys, types
from moejax import RunConfig


def train(config, began):
    import jax, psutil
    import numpy as np
    from jax.experimental import multihost_utils

    own = jax.process_index()
    seen = {
        "sum": int(multihost_utils.process_allgather(np.asarray([10**own])).sum()),
        "devices": [len(jax.local_devices()), jax.device_count()],
        "listening": [str(c.laddr.ip) for c in psutil.Process().net_connections() if c.status == "LISTEN"],
        "launch": [config.launch.processes, config.launch.process],
    }
    pathlib.Path(__file__).with_name(f"{own}.json").write_text(json.dumps(seen))


sys.modules["moejax.train.loop"] = types.SimpleNamespace(train=train)  # instead of a training run


def config():
    return RunConfig(steps=1)
"""


@pytest.fixture
def program(tmp_path):
    """A config file whose run notes what each process sees."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def seen_by_two(folder):
    seen = [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]
    loopback = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert all(one["sum"] == 11 and one["devices"] == [2, 4] for one in seen), seen
    assert seen[0]["listening"] and {ip for one in seen for ip in one["listening"]} <= loopback, seen
    return seen


def moejax_command(*words):
    return [sys.executable, "-m", "moejax", *map(str, words)]


def test_command_starts_processes_that_are_one_run(program, tmp_path):
    command = moejax_command("train", program, "--simulate", 4, "--launch.processes", 2)
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    assert all(one["launch"] == [2, None] for one in seen_by_two(tmp_path))


@pytest.mark.parametrize("process", [0, 1])
def test_missing_process_is_one_line_and_code_2(process, program):
    flags = f"--launch.processes 2 --launch.process {process} --launch.join-seconds 1 --launch.coordinator"
    command = moejax_command("train", program, *flags.split(), free_address())
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    assert result.stderr.startswith("moejax: launch.processes=2: wanted all of them at 127.0.0.1:")
    assert result.stderr.endswith(f"within launch.join_seconds=1; missing: process {1 - process}\n")


SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=nowhere SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def test_slurm_script_starts_one_run(program, tmp_path):
    """With what Slurm sets for two tasks of a node."""
    srun, command = tmp_path / "srun", tmp_path / "moejax"
    srun.write_text(SRUN)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moejax "$@"\n')
    for path in (srun, command):
        path.chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MOEJAX": str(command), "SLURM_JOB_ID": "77"}
    script = [ROOT / "tools/launch/slurm.sh", program, "--simulate", "4"]
    result = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    seen_by_two(tmp_path)


@pytest.mark.parametrize(
    ("code", "count", "requeued"),
    [(137, "", True), (1, "", True), (11, "19", True), (11, "20", False)]
    + [(code, "", False) for code in (0, HARDWARE, *FINAL)],
)
def test_slurm_script_requeues_what_another_attempt_may_change(code, count, requeued, tmp_path):
    for name, text in (("srun", f"exit {code}"), ("scontrol", f"echo $@ > {tmp_path}/said")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    variables |= {"SLURM_RESTART_COUNT": count} if count else {}
    assert subprocess.run([ROOT / "tools/launch/slurm.sh", "config.py"], env=variables).returncode == code
    said = tmp_path / "said"
    assert (said.read_text() if said.exists() else "") == ("requeue 77\n" if requeued else "")


def test_jobset_says_the_same_everywhere():
    values = {"NAME": "v3", "HOSTS": 4, "GPUS": 8, "IMAGE": "i", "CLAIM": "c", "CONFIG": "configs/deepseek_v3.py"}
    text = (ROOT / "tools/launch/jobset.yaml").read_text()
    manifest = yaml.safe_load(string.Template(text.replace("'$NAME", "'")).safe_substitute(values))
    name, (workers,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", "0") for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(variables["JAX_NUM_PROCESSES"]) == 4
    pod = f"{name}-{workers['name']}-0-0.{name}"  # the name that JobSet gives to the first pod
    words = [*container["command"], *container["args"]]
    config = moejax.load_config(ROOT / words[2], words[3:])
    assert find_place(config.launch, variables) == Place(coordinator=f"{pod}:55527", processes=4, process=0)
    ends = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert ends["containerName"] == container["name"]
    assert {*ends["values"], 130} == {HARDWARE, *FINAL}  # a terminal's second Ctrl-C does not come to a pod
