"""A state saved on one mesh goes on, on another: other lengths of the axes, schedule, sharding, number of processes."""

import gc
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_processes import moejax_command

from moejax.checkpoint import reading
from moejax.checkpoint.manager import Checkpoints
from moejax.config import CheckpointConfig, MeshConfig, OptimizerConfig, PipelineConfig, RunConfig
from moejax.mesh import make_mesh, resolve
from moejax.train import resume
from moejax.train.state import TrainState, _taken, abstract_state, layer_of_slot
from moejax.train.together import everyones

SCHEDULED = {"pipe 4, data 2": "dualpipe", "pipe 2, dualpipe_v": "dualpipe_v", "pipe 2, data 2": "dualpipe_v"}
MESHES = {
    "one device": MeshConfig(data=1),
    "data 8": MeshConfig(data=8),
    "data 6": MeshConfig(data=6, sharding="fsdp"),
    "data 2, expert 2": MeshConfig(data=2, expert=2, sharding="fsdp"),
    "expert 8": MeshConfig(data=1, expert=8),
    "expert 2": MeshConfig(data=1, expert=2),
    "replica 2, data 2, expert 2": MeshConfig(replica=2, data=2, expert=2, sharding="hsdp"),
    "pipe 4, data 2": MeshConfig(pipe=4, data=2),
    "pipe 2, expert 4": MeshConfig(pipe=2, data=1, expert=4, sharding="hsdp"),
    "pipe 2, dualpipe_v": MeshConfig(pipe=2, data=1),
    "pipe 3, data 2": MeshConfig(pipe=3, data=2, sharding="fsdp"),
}
SAVED_ON = ("data 8", "pipe 4, data 2", "pipe 2, expert 4", "expert 8", "replica 2, data 2, expert 2", "pipe 3, data 2")
FAST = {
    ("data 8", "data 6"),
    ("pipe 4, data 2", "one device"),
    ("pipe 4, data 2", "pipe 2, dualpipe_v"),
    ("pipe 4, data 2", "pipe 3, data 2"),
    ("expert 8", "expert 2"),
    ("data 8", "replica 2, data 2, expert 2"),
}


@pytest.fixture
def config(run_config) -> RunConfig:
    """Five MoE layers, which neither 2, 3 nor 4 stages divide; dims that 6 and 16 devices divide."""
    model = replace(run_config.model, num_layers=6, hidden_size=48, vocab_size=288)
    attention = replace(model.attention, q_lora_rank=48, kv_lora_rank=48)
    return replace(
        run_config,
        model=replace(model, attention=attention),
        data=replace(run_config.data, batch_size=48, virtual_shards=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, moments="bf16", eps=1e-4, ema_decay=0.9),
    )


def on(name, config):
    """The settings on a mesh of MESHES, and the mesh."""
    lengths, schedule = MESHES[name], SCHEDULED.get(name, "zb1p")
    devices = lengths.pipe * lengths.batch_shards
    config = replace(config, mesh=lengths, pipeline=PipelineConfig(schedule=schedule))
    return resolve(config, devices), make_mesh(lengths, jax.devices()[:devices])


_values: dict[str, np.ndarray] = {}  # they are the same in every test


def values_of(config) -> dict[str, np.ndarray]:
    """Every array of a state as one device has it, of random bits: among them are -0.0 and NaN."""
    for path, like in (
        jax.tree_util.tree_leaves_with_path(abstract_state(*on("one device", config))) if not _values else ()
    ):
        name = jax.tree_util.keystr(path)
        bits = np.random.default_rng(zlib.crc32(name.encode())).bytes(max(like.size, 1) * like.dtype.itemsize)
        _values[name] = np.frombuffer(bits, like.dtype).reshape(like.shape).copy()
        if like.ndim:
            _values[name].flat[:2] = -0.0, np.nan
    return _values


def state_of(config, mesh, values) -> TrainState:
    """A state on a mesh, with these values; the empty places of its stacks have some of the others."""
    slots = layer_of_slot(config)

    def one(path, like):
        value = values[jax.tree_util.keystr(path)]
        value = value[list(slots)] if "moe_blocks" in jax.tree_util.keystr(path) else value
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(one, abstract_state(config, mesh))


def in_layers(config, state) -> dict[str, np.ndarray]:
    """Every array of a state as one device would have it; the empty places of stacks must be zeros."""
    slots, found = layer_of_slot(config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name, value = jax.tree_util.keystr(path), whole(leaf)
        if "moe_blocks" in name:
            assert not any(value[place].any() for place, layer in enumerate(slots) if layer < 0), name
            value = value[[slots.index(layer) for layer in range(config.model.num_moe_layers)]]
        found[name] = value
    return found


def whole(leaf) -> np.ndarray:
    """An array of all processes."""
    return np.asarray(jax.device_get(jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P()))))


def assert_bitwise_equal(got, want):
    assert got.keys() == want.keys()
    wrong = [
        name for name in want if got[name].dtype != want[name].dtype or got[name].tobytes() != want[name].tobytes()
    ]
    assert not wrong


def save(folder, config, state, step=1):
    meta = asdict(resume.Position(step=step, data={"at": step})) | {"layer_of_slot": layer_of_slot(config)}
    with Checkpoints(folder, agree=everyones) as checkpoints:
        checkpoints.save(step, resume.checkpoint_parts(state), meta)
        saved = checkpoints.wait()
        assert saved.failure is None, saved


def restore(folder, config, mesh):
    """The state that a run goes on with, and what was found."""
    position = []
    data = SimpleNamespace(train=SimpleNamespace(restore=position.append))
    with Checkpoints(folder, agree=everyones) as checkpoints:
        found = resume.find(config, checkpoints)
        state, at = resume.start(config, mesh, data, found)
    assert position == [{"at": at.step}]
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return state, found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


def saved_on(name, folders, config):
    """The folder of a checkpoint that is saved on a mesh; once."""
    if not (folders / name).exists():
        config, mesh = on(name, config)
        save(folders / name, config, state_of(config, mesh, values_of(config)))
    return folders / name


PAIRS = [  # of those that are not fast, a quarter
    pytest.param(a, b, id=f"{a} to {b}", marks=() if (a, b) in FAST else pytest.mark.slow)
    for i, a in enumerate(SAVED_ON)
    for j, b in enumerate(MESHES)
    if (a, b) in FAST or ((i + j) % 4 == 0 and a != b)
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_array_is_the_same_on_another_mesh(config, folders, before, after):
    folder = saved_on(before, folders, config)
    moved, mesh = on(after, config)
    state, found = restore(folder, moved, mesh)
    assert_bitwise_equal(in_layers(moved, state), values_of(config))
    assert found.read_bytes[0] > 0 and not any(found.read_bytes[1:])


def held(device) -> int:
    """Bytes of all arrays on a device."""
    there = (array for array in jax.live_arrays() if device in array.sharding.device_set)
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in there)


def test_stacks_change_their_slots_a_few_at_a_time(config, folders, monkeypatch):
    """Before each group is read a device holds nothing but what is done; a group is small, or one array."""
    folder = saved_on("pipe 4, data 2", folders, config)
    moved, mesh = on("pipe 3, data 2", config)
    gc.collect()
    read, groups, before = Checkpoints._read, [], held(mesh.devices.flat[0])

    def spied(self, step, parts, *others):
        asked = [x for x in jax.tree.leaves(parts) if x is not ...]
        groups.append(([reading.device_bytes(x) for x in asked], held(mesh.devices.flat[0]) - before))
        return read(self, step, parts, *others)

    monkeypatch.setattr(Checkpoints, "_read", spied)
    monkeypatch.setattr(reading, "STAGED_BYTES", 60_000)
    state, shapes = restore(folder, moved, mesh)[0], abstract_state(moved, mesh)
    assert_bitwise_equal(in_layers(moved, state), values_of(config))
    groups = groups[1:]  # the first is `meta`
    finals, done = [reading.device_bytes(x) for x in jax.tree.leaves(resume.checkpoint_parts(shapes))], 0
    for sizes, there in groups:
        assert sum(sizes) <= 60_000 or len(sizes) == 1
        assert there == sum(finals[:done])
        done += len(sizes)
    assert len(groups) > 3 and done == len(finals)


def test_a_stack_that_changes_its_slots_takes_one_whole_stack(config):
    """The program's own memory, beside its argument and its result."""
    mesh = on("pipe 4, data 2", config)[1]
    like = jax.ShapeDtypeStruct((8, 64, 64), np.float32, sharding=NamedSharding(mesh, P("pipe", None, "data")))
    with jax.set_mesh(mesh):
        program = _taken.lower(like, (3, 1, -1, 0, 7, 6, -1, 2), like.sharding.spec).compile()
    memory, stack = program.memory_analysis(), 8 * 64 * 64 * 4 // 2  # cut over `data`
    assert memory.argument_size_in_bytes == memory.output_size_in_bytes == stack // 4
    assert 0 < memory.temp_size_in_bytes <= 1.5 * stack


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32], ids=["float32", "bfloat16", "int32"])
def test_replicas_get_every_bit_of_the_first(dtype):
    """As between processes: here all devices are those of one, of which replica 0 has the array."""
    mesh = make_mesh(MeshConfig(replica=4, data=2))
    first = Mesh(mesh.devices[:, :1], mesh.axis_names, axis_types=mesh.axis_types)
    bits = np.random.default_rng(0).bytes(6 * 4 * np.dtype(dtype).itemsize)
    value, spec = np.frombuffer(bits, dtype).reshape(6, 4).copy(), P(None, ("data", "expert"))
    if dtype != np.int32:
        value[0, :2] = -0.0, np.nan
    like = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
    got = reading.spread(jax.device_put(value, NamedSharding(first, spec)), like)
    assert got.sharding == like.sharding
    for shard in got.addressable_shards:
        assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
    assert reading.as_read(like) is like  # in one process nobody is spared the reading
    assert reading.by_replica(mesh, [5]) == [5, 0, 0, 0]


MOVE = """
import json, sys
from pathlib import Path
import jax
import numpy as np

folder, process, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, process)
from moejax.config import ConfigError, RunConfig
from test_elastic import *

config, mesh = on("replica 2, data 2, expert 2", RunConfig.from_json((folder / "config.json").read_text()))
values, read = values_of(config), {}
for name in sys.argv[4:]:
    state, found = restore(folder / name, config, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == values[jax.tree_util.keystr(path)][shard.index].tobytes(), path
    read[name] = found.read_bytes
save(folder / "two", config, state)
try:
    restore(folder / name, replace(config, model=replace(config.model, dense_width=64)), mesh)
except ConfigError as error:
    print(error)
print(json.dumps(read))
"""


@pytest.mark.slow
def test_one_replica_reads_for_two_processes(config, folders, tmp_path):
    """From one process to two, whose second reads nothing and has every bit, and back; also through other slots."""
    names = ["data 8", "pipe 4, data 2"]
    for name in names:
        shutil.copytree(saved_on(name, folders, config), tmp_path / name)
    (tmp_path / "config.json").write_text(config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(Path(__file__).parent)}
    commands = [[sys.executable, "-c", MOVE, tmp_path, str(process), address, *names] for process in range(2)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert all(" arrays differ" in words for words in said), said  # none waits for the other
    values, (alone, mesh) = values_of(config), on("one device", config)
    for read in json.loads(said[0].splitlines()[-1]).values():
        assert read[0] > sum(value.nbytes for value in values.values()) and read[1] == 0
    assert_bitwise_equal(in_layers(alone, restore(tmp_path / "two", alone, mesh)[0]), values)


HOPS = (  # devices, steps at the end, flags; each run goes on from the one before
    (8, 2, ["--mesh.pipe", 4, "--mesh.data", 2, "--pipeline.schedule", "dualpipe"]),
    (4, 4, ["--mesh.pipe", 2, "--mesh.data", 2, "--pipeline.schedule", "dualpipe_v"]),
    (6, 6, ["--mesh.data", 6, "--mesh.sharding", "fsdp"]),
    (16, 8, ["--mesh.data", 2, "--mesh.expert", 8, "--launch.processes", 2]),
    (4, 10, ["--mesh.data", 1, "--mesh.replica", 2, "--mesh.expert", 2, "--mesh.sharding", "hsdp"]),
)
NUMBERS = ("loss", "mtp_loss", "balance_loss", "grad_norm")


@pytest.mark.slow
def test_a_run_goes_from_mesh_to_mesh_as_if_it_stayed(config, tmp_path):
    """8 devices to 4 to 6 to 16 to 4, pipe 4 to 2 to 1, expert 8 to 2, one process to two to one."""
    config = replace(
        config,
        schedule=replace(config.schedule, tokens=10 * 48 * 32),
        data=replace(config.data, valid_fraction=0.0),
        log=replace(config.log, pictures_every=100),
        checkpoint=CheckpointConfig(every_steps=2, keep=10),
    )
    file = tmp_path / "config.json"
    file.write_text(config.to_json())

    def train(out, steps, *flags):
        words = moejax_command("train", file, "--out", tmp_path / out, "--steps", steps, *flags)
        subprocess.run(words, check=True, timeout=1200)
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    whole = train("whole", 10, "--simulate", 8, "--mesh.data", 8)
    for devices, steps, flags in HOPS:
        moved = train("moved", steps, "--simulate", devices, *flags)
    assert [line["tokens"] for line in moved] == [line["tokens"] for line in whole]
    with Checkpoints(tmp_path / "whole/checkpoints") as one, Checkpoints(tmp_path / "moved/checkpoints") as other:
        assert one.steps == other.steps == [2, 4, 6, 8, 10]
        for step in one.steps:  # where every shard of the text is
            assert one.load_meta(step)["data"] == other.load_meta(step)["data"]
    for name in NUMBERS:
        got, want = ([line[name] for line in lines] for lines in (moved, whole))
        # float32: in each of 10 steps, sums of 8 parts in another order
        np.testing.assert_allclose(got, want, rtol=10 * 8 * 2**-23, atol=0, err_msg=name)
    for step in (6, 8, 10):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / str(step))
    again = train("whole", 6, "--simulate", 8, "--mesh.data", 8)  # the same mesh
    assert [[line[name] for name in NUMBERS] for line in again] == [
        [line[name] for name in NUMBERS] for line in whole[:6]
    ]
