"""What a launcher does after a process has failed: whether, when and on which devices its run starts again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.config import CheckpointConfig, LaunchConfig, MeshConfig, MTPConfig, PipelineConfig
from moejax.config_source import override
from moejax.launch import local, restarts
from moejax.launch.local import is_launcher, run_processes
from moejax.launch.restarts import Restarts, fitted
from moejax.mesh import AXES, resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The environment says nothing of processes, new interpreters find moejax, and nothing waits long."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "CUDA_VIS", "JAX_NUM_PROC", "JAX_PROC", "JAX_COORD", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name in ("OWN_END_SECONDS", "KILLED_END_SECONDS", "TERMINATE_SECONDS"):
        monkeypatch.setattr(local, name, 0.3)


def of_mesh(config, processes, mesh, **changes):
    """`config` on a mesh of simulated devices, one a process, with a batch of 24 rows in as many parts."""
    data = replace(config.data, batch_size=24, virtual_shards=24)
    lengths = MeshConfig(**mesh)
    return replace(
        config,
        **{"simulate": processes, "launch": LaunchConfig(processes=processes), "mesh": lengths, "data": data} | changes,
    )


# ------------------------------------------------------------------------------------------- meshes of fewer devices


CASES = {
    "data shrinks": (4, {"data": 2, "expert": 2}, 3, (2, {"data": 1, "expert": 2})),
    "what is left is data": (4, {"expert": 2}, 3, (2, {"data": 1, "expert": 2})),
    "data shrinks before replica": (8, {"replica": 2, "data": 4}, 7, (4, {"replica": 2, "data": 2})),
    "replica shrinks before expert": (8, {"replica": 4, "data": 1, "expert": 2}, 7, (4, {"replica": 2, "expert": 2})),
    "replicas of shards": (6, {"replica": 3, "data": 2, "sharding": "hsdp"}, 5, (4, {"replica": 2, "data": 2})),
    "expert shrinks": (8, {"data": 1, "expert": 8}, 5, (4, {"expert": 4})),
    "expert divides the experts": (8, {"data": 1, "expert": 8}, 7, (6, {"expert": 2, "data": 3})),
    "nodes divide expert": (8, {"data": 1, "expert": 8, "expert_nodes": 4}, 3, (2, {"expert": 2, "expert_nodes": 1})),
    "expert shrinks before pipe": (8, {"pipe": 4, "data": 1, "expert": 2}, 7, (4, {"pipe": 4, "expert": 1})),
    "pipe shrinks": (4, {"pipe": 4, "data": 1}, 3, (2, {"pipe": 2})),
    "one device": (2, {}, 1, (1, {})),
    "all are there": (4, {"data": 2, "expert": 2}, 4, (4, {"data": 2, "expert": 2})),
}


@pytest.mark.parametrize(("processes", "mesh", "most", "want"), CASES.values(), ids=CASES.keys())
def test_run_is_fitted_to_fewer_processes(processes, mesh, most, want, run_config, change):
    config = of_mesh(run_config, processes, mesh)
    if want[0] == 6:  # a model of which 6 shards can be made
        config = change(change(config, "model.hidden_size", 48), "model.attention.kv_lora_rank", 24)
    got = fitted(config, most)
    assert got.launch.processes == got.simulate == want[0]
    defaults = {**dict.fromkeys(AXES, 1), "expert_nodes": config.mesh.expert_nodes, "sharding": config.mesh.sharding}
    assert got.mesh == MeshConfig(**defaults | want[1])
    assert got == resolve(got, want[0])
    assert resolve(override(config, list(restarts._flags(config, got))), want[0]) == got


def test_pipeline_takes_a_length_that_its_schedule_can_do(run_config):
    config = of_mesh(
        run_config, 4, {"pipe": 4, "data": 1}, pipeline=PipelineConfig(schedule="zb1p", layers=(0, 1, 1, 0))
    )
    got = fitted(config, 3)
    assert (got.mesh.pipe, got.pipeline.layers) == (3, None)


def test_processes_keep_their_number_of_devices(run_config):
    got = fitted(of_mesh(run_config, 4, {}, simulate=8), 3)
    assert (got.launch.processes, got.simulate, got.mesh.data) == (2, 4, 4)


@pytest.mark.parametrize(("processes", "rows"), [(4, 6), (2, 12)], ids=["as before", "half of the devices"])
def test_a_device_has_no_more_rows_at_a_time(processes, rows, run_config):
    config = of_mesh(run_config, 4, {}, pipeline=PipelineConfig(microbatches=1))
    got = fitted(config, processes)
    assert got.data == config.data
    assert got.data.batch_size // got.launch.processes == rows
    assert rows // got.pipeline.microbatches == 6


def test_parts_of_the_data_are_shared_out(run_config, change):
    """Six rows a part: three processes could not share four parts, though the model could be cut in three."""
    config = change(change(of_mesh(run_config, 4, {}), "model.hidden_size", 48), "model.attention.kv_lora_rank", 24)
    assert fitted(config, 3).launch.processes == 3
    assert fitted(change(config, "data.virtual_shards", 4), 3).launch.processes == 2


@pytest.mark.parametrize(("mesh", "most"), [({}, 0), ({"data": 3}, 1)], ids=["no process", "another mesh than it says"])
def test_nothing_fits(mesh, most, run_config):
    assert fitted(of_mesh(run_config, 2, mesh), most) is None


# ------------------------------------------------------------------------------------------------- after a failure


@pytest.fixture
def launched(run_config):
    """Settings of four processes that are started again up to nine times."""
    return of_mesh(run_config, 4, {"data": 1, "expert": 4}, launch=LaunchConfig(processes=4, restarts=9))


def reach(config, step):
    """Lets the run's metrics end at a step, in a line that is whole, and a part of the next."""
    Path(config.folder).mkdir(exist_ok=True)
    lines = [json.dumps({"step": n, "max_violation": [0.5] * 200}) for n in range(1, step + 2)]
    (Path(config.folder) / "metrics.jsonl").write_text("\n".join(lines)[:-300])


@pytest.mark.parametrize("step", [0, 1, 3, 300])
def test_newest_step_is_read_from_the_metrics(step, run_config):
    if step:
        reach(run_config, step)
    assert restarts.last_step(run_config) == step


@pytest.mark.parametrize(
    ("codes", "goes_on"),
    [
        *(([code], True) for code in (-9, -11, -6, 1, 11, 13, 137)),
        *(([code], False) for code in (2, 3, 10, 12, 14, 130)),
        ([-9, 3], True),
        ([-9, 2], False),
    ],
    ids=str,
)
def test_exit_code_decides(codes, goes_on, launched):
    after = Restarts(launched)
    assert [after.after(0, code) for code in codes] == [True] * (len(codes) - 1) + [goes_on]


def test_waits_grow_until_a_step_is_done_and_restarts_are_counted_in_all(launched):
    after, waits = Restarts(launched), []
    for failure in range(9):
        if failure == 8:
            reach(launched, 1)
        assert after.after(0, -9)
        waits.append(after.wait)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 1]
    assert not after.after(0, -9) and after.word == "; launch.restarts=9 are used up"


def devices_after(config, failures):
    """Devices of the start after failures, each a process and the step that the run has reached."""
    after = Restarts(config)
    for process, step in failures:
        reach(config, step)
        assert after.after(process, -9)
    return after.start.devices


@pytest.mark.parametrize(
    ("failures", "devices"),
    [
        ([(1, 2)], (0, 1, 2, 3)),
        ([(1, 2), (1, 3)], (0, 1, 2, 3)),
        ([(1, 2), (2, 2)], (0, 1, 2, 3)),
        ([(1, 2), (1, 2)], (0, 2)),
        ([(1, 2), (1, 1)], (0, 2)),
        ([(1, 2), (2, 2), (1, 2)], (0, 2)),
        ([(1, 2)] * 3, (0, 2)),
        ([(1, 2)] * 4, (0, 3)),
        ([(1, 2)] * 4 + [(0, 2)] * 2, (3,)),
        ([(0, 2)] * 9, (3,)),
    ],
    ids=[
        "the first failure",
        "a step in between",
        "another process",
        "no step in between",
        "only steps done again",
        "again after another",
        "another takes its number",
        "a spare device takes the place of another",
        "one after the other",
        "the last one stays",
    ],
)
def test_device_that_fails_again_without_a_new_step_is_left_out(failures, devices, launched):
    assert devices_after(launched, failures) == devices


def test_line_says_what_comes_next(launched):
    after = Restarts(launched)
    assert after.after(1, -9)
    assert after.word == "; restart 1 of 9 in 1 s on 4 devices in 4 processes, mesh expert 4"
    assert after.after(1, -9)
    lost = " again, without a new step; its simulated devices are left out"
    assert after.word == f"{lost}; restart 2 of 9 in 2 s on 2 devices in 2 processes, mesh expert 2"


# -------------------------------------------------------------------------------------------------- started again


def run_code(code, config):
    """The exit code of processes that run `code`: `me` is their number, `start` counts the starts of it, `env` and
    `flags` are what they got."""
    start = """
        import os, signal, sys, time
        env, flags = os.environ, sys.argv[1:]
        me = int(env["JAX_PROCESS_ID"])
        mark = f"{folder}/starts{me}"
        start = os.path.getsize(mark) if os.path.exists(mark) else 0
        open(mark, "a").write("x")
    """
    Path(config.folder).mkdir(exist_ok=True)
    text = f"folder = {config.folder!r}\n" + textwrap.dedent(start) + textwrap.dedent(code)
    return run_processes([sys.executable, "-c", text], config)


def starts(config):
    """How often each process was started."""
    return [len(path.read_text()) for path in sorted(Path(config.folder).glob("starts*"))]


@pytest.fixture
def pair(run_config, monkeypatch):
    """Settings of two processes that are started again up to three times, without much of a wait."""
    monkeypatch.setattr(restarts, "FIRST_WAIT", 0.01)
    return of_mesh(run_config, 2, {}, launch=LaunchConfig(processes=2, restarts=3))


def test_run_ends_well_after_a_failure(pair, capfd):
    assert run_code("if me == 1 and start == 0: print('bad', flush=True); os.kill(os.getpid(), 9)", pair) == 0
    assert starts(pair) == [2, 2]
    line = "process 1 was ended by SIGKILL; restart 1 of 3 in 0.01 s on 2 devices in 2 processes, mesh data 2"
    assert capfd.readouterr().err == f"moejax: {line}\n[process 1] bad\n"


def test_process_that_always_dies_is_left_out(pair):
    code = "open(f'{folder}/flags', 'w').write(' '.join(flags))\nif me: os.kill(os.getpid(), 9)\ntime.sleep(0.3)"
    assert run_code(code, pair) == 0
    assert starts(pair) == [3, 2]
    flags = (Path(pair.folder) / "flags").read_text().split()
    assert flags[:6] == ["--simulate", "1", "--launch.processes", "1", "--mesh.data", "1"]


@pytest.mark.parametrize(("code", "count"), [(2, 1), (10, 1), (1, 4), (11, 4)])
def test_exit_code_is_that_of_the_last_start(code, count, pair):
    assert run_code(f"if not me: sys.exit({code})\ntime.sleep(20)", pair) == code
    assert starts(pair)[0] == count


def test_without_restarts_a_run_ends_with_its_process(pair):
    once = replace(pair, launch=LaunchConfig(processes=2))
    assert run_code("if me: os.kill(os.getpid(), 9)\ntime.sleep(20)", once) == 137
    assert starts(once) == [1, 1]


def test_one_process_is_watched_too(run_config, monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_WAIT", 0.01)
    alone = replace(run_config, launch=LaunchConfig(restarts=2))
    assert is_launcher(alone) and not is_launcher(run_config)
    code = (
        "if start < 2: os.kill(os.getpid(), 11)\nassert not {'JAX_LOCAL_DEVICE_IDS', 'CUDA_VISIBLE_DEVICES'} & set(env)"
    )
    assert run_code(code, alone) == 0
    assert starts(alone) == [3]


@pytest.mark.parametrize(
    ("processes", "lost", "given", "want"),
    [(4, 1, None, "0- 2-"), (2, 0, None, "-1"), (2, 0, "4,7", "-7")],
    ids=["two of four", "one of two", "one of two that the user chose"],
)
def test_processes_take_the_good_gpus(processes, lost, given, want, pair, monkeypatch):
    """Their variables in the last start; JAX does not read JAX_LOCAL_DEVICE_IDS of a process that is alone."""
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    config = replace(pair, simulate=None, launch=LaunchConfig(processes=processes, restarts=2))
    code = f"""
        if me == {lost} and start < 2: os.kill(os.getpid(), 9)
        ids = env.get("JAX_LOCAL_DEVICE_IDS", "") + "-" + env.get("CUDA_VISIBLE_DEVICES", "")
        open(f"{{folder}}/gpu{{me}}", "w").write(ids)
        if env["JAX_NUM_PROCESSES"] == "{processes}": time.sleep(20)
    """
    assert run_code(code, config) == 0
    count = len(want.split())
    got = [(Path(config.folder) / f"gpu{process}").read_text() for process in range(count)]
    assert " ".join(got) == want


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_between_two_starts_ends_the_run(number, pair, monkeypatch):
    waits = threading.Event()
    monkeypatch.setattr(restarts, "FIRST_WAIT", 60.0)
    monkeypatch.setattr(local, "_explain", lambda *words: waits.set())

    def send():
        waits.wait()
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert run_code("sys.exit(1)", pair) == 128 + number
    assert starts(pair) == [1, 1]


# ---------------------------------------------------------------------------------------------------- the whole way


PROGRAM = """
import os, pathlib, threading, time
from moejax import RunConfig

folder = pathlib.Path(__file__).parent


def die_after(step):
    while step and not (folder / "run" / "checkpoints" / str(step)).exists():
        time.sleep(0.002)
    os.kill(os.getpid(), 9)


def config():
    if os.environ.get("JAX_PROCESS_ID") == "1":
        number = len(list(folder.glob("death*")))
        if number < len(DEATHS):
            (folder / f"death{number}").touch()
            threading.Thread(target=die_after, args=DEATHS[number : number + 1], daemon=True).start()
    return RunConfig.from_json((folder / "config.json").read_text())
"""


@pytest.mark.parametrize(
    ("deaths", "devices"),
    [([2], 2), pytest.param([2, 0], 1, marks=pytest.mark.slow)],
    ids=["a process dies", "it dies again"],
)
def test_run_whose_process_is_killed_has_the_losses_of_one_that_is_not(deaths, devices, run_config, change, tmp_path):
    """Deaths: the steps with whose checkpoint process 1 kills itself, start by start; 0: at once."""
    small = replace(run_config.model, num_layers=2, mtp=MTPConfig(depth=0))
    log = replace(run_config.log, valid_every=100, pictures_every=100)
    config = replace(run_config, model=small, log=log, checkpoint=CheckpointConfig(every_steps=1))
    (tmp_path / "config.json").write_text(replace(config, simulate=2).to_json())
    (tmp_path / "program.py").write_text(f"DEATHS = {deaths}\n{PROGRAM}")
    flags = ["--launch.processes", "2", "--launch.restarts", "3"]
    command = [sys.executable, "-m", "moejax", "train", str(tmp_path / "program.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result
    said = [line for line in result.stderr.splitlines() if line.startswith("moejax: process 1 was ended by SIGKILL")]
    assert len(said) == len(deaths) and f" on {devices} device" in said[-1], result
    whole = moejax.train(change(config, "out", str(tmp_path / "whole")), devices=jax.devices()[:2])
    losses = [
        [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (config.folder, whole.folder)
    ]
    # float32: sums of two in either order, in one more micro-batch on one device; 6 steps of Adam let them grow
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=0)
    events = [json.loads(line) for line in (Path(config.folder) / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [deaths[0]]
