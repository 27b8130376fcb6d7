"""The executor on stages small enough to try every schedule: numbers of one device, and what ran.

A layer is y = x + tanh(x @ w) * factor of the micro-batch, and reports the mean square of x and a count.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.mesh import AXES, make_mesh
from moejax.pipeline.carry import KINDS, Work
from moejax.pipeline.cells import Cells
from moejax.pipeline.executor import run
from moejax.pipeline.mirror import from_copies, to_copies
from moejax.pipeline.replay import cells_of
from moejax.pipeline.schedule import named, unpiped
from moejax.pipeline.table import build
from moejax.pipeline.whole import WholePasses
from moejax.varying import vary_over

ROWS, DIM, DSTAT = 5, 8, 0.3


def layer(weights, given):
    x, number = given
    y = x + jnp.tanh(x @ weights["w"]) * (1 + 0.01 * number.astype(x.dtype))
    return y, (jnp.square(x).mean(), number * 0 + 1)


def enter(extras, microbatch):
    return extras["table"] * (1 + 0.1 * microbatch)


def leave(extras, guests, y, microbatch):
    y = y if guests is None else y + sum(jnp.sin(y @ w) for w in guests["w"])
    loss = jnp.square(y @ extras["head"] - microbatch).sum()
    return loss, {"loss": loss, "count": jnp.int32(microbatch * 0 + 1)}


def weights(layers, key=0):
    rng = np.random.default_rng(key)
    draw = functools.partial(rng.normal, 0, 0.2)
    extras = {"table": draw(size=(ROWS, DIM)), "head": draw(size=(DIM, 3))}
    return jax.tree.map(np.float32, ({"w": draw(size=(layers, DIM, DIM))}, extras))


@functools.partial(jax.jit, static_argnums=(2, 3))
def one_device(stack, extras, num_microbatches, num_guests=0):
    """Gradients and sums of the same work, layer after layer; the last ones may be guests of the last stage."""

    def objective(stack, extras):
        total, stats, sums = 0.0, [], []
        layers = len(stack["w"]) - num_guests
        guests = {"w": stack["w"][layers:]} if num_guests else None
        for microbatch in range(num_microbatches):
            x, own = enter(extras, microbatch), []
            for index in range(layers):
                x, found = layer({"w": stack["w"][index]}, (x, jnp.asarray(microbatch)))
                own.append(found)
            loss, found = leave(extras, guests, x, microbatch)
            total += loss + DSTAT * sum(square for square, _ in own)
            stats.append(jax.tree.map(lambda *s: jnp.stack(s), *own))
            sums.append(found)
        add = functools.partial(jax.tree.map, lambda *s: sum(s))
        return total, (add(*stats), add(*sums))

    (dstack, dextras), (stats, sums) = jax.grad(objective, argnums=(0, 1), has_aux=True)(stack, extras)
    return dstack, dextras, stats, sums


def slots_of(program, layers, guests=0):
    """The layer in each place of the stacked weights, -1 for none: rank by rank, stage by stage."""
    depth, first = max(layers), np.cumsum([0, *layers])
    chunks = 2 if program.placement == "v" else 1
    stages = [program.stage(rank, chunk) for rank in range(program.num_ranks) for chunk in range(chunks)]
    filled = [*layers[:-1], layers[-1] + guests]
    return np.array([first[s] + i if i < filled[s] else -1 for s in stages for i in range(depth)])


def compiled_for_mesh(program, layers, stack, extras, guests=0):
    """The table, the compiled program, its arguments, and the place of each layer in what it returns."""
    table, slots = build(program), slots_of(program, layers, guests)
    at_rest = jax.tree.map(lambda w: np.where(slots[:, None, None] < 0, 0, w[slots]), stack)

    def local(stack, extras, rows):
        stack, extras = jax.tree.map(lambda x: vary_over(x, AXES), (stack, extras))
        dstats = vary_over(jnp.float32(DSTAT), AXES), None
        work = Work(layer, lambda m: vary_over(m, AXES), enter, leave, dstats, layers, guests)
        rows, x = jax.tree.map(lambda column: column[:, 0], rows), vary_over(jnp.zeros((ROWS, DIM)), AXES)
        cells = Cells(table, work, to_copies(program, stack), extras, x)
        outcome = run(table, rows, cells, keep_record=True)
        dextras, sums = jax.lax.psum((outcome.dextras, outcome.sums), AXES)
        dstack, stats = (from_copies(program, copies) for copies in (outcome.dstack, outcome.stats))
        return dstack, dextras, stats, sums, outcome.ran[None]

    mesh = make_mesh(MeshConfig(pipe=program.num_ranks, data=1), jax.devices()[: program.num_ranks])
    inputs, outputs = (P(AXES), P(), P(None, "pipe")), (P(AXES), P(), P(AXES), P(), P(AXES))
    given = jax.device_put((at_rest, extras, table.rows), tuple(NamedSharding(mesh, spec) for spec in inputs))
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs))
    return table, step.lower(*given).compile(), given, np.argsort(slots)[(slots < 0).sum() :]


def run_on_mesh(program, layers, stack, extras, guests=0):
    table, compiled, given, places = compiled_for_mesh(program, layers, stack, extras, guests)
    dstack, dextras, stats, sums, ran = jax.device_get(compiled(*given))
    dstack, stats = jax.tree.map(lambda x: x[places], (dstack, stats))
    return dstack, dextras, stats, sums, ran, table


def assert_close(got, want):
    """Float32 sums of at most 1000 terms in another order; integers exactly."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() * np.issubdtype(b.dtype, np.floating))

    jax.tree.map(close, got, jax.device_get(want))


def assert_ran_as_planned(program, table, ran):
    """The record of the devices is the table's cells, op for op, in its slots."""
    for rank in range(program.num_ranks):
        want = np.zeros_like(ran[rank])
        for slot, cell in cells_of(table, rank):
            for place, op in enumerate(cell):
                first = op.chunk * program.microbatches_per_chunk if program.placement == "dual" else 0
                want[slot, place] = 1 + KINDS.index(op.kind), program.stage(rank, op.chunk), first + op.microbatch
        np.testing.assert_array_equal(ran[rank], want)
    cells = [tuple(cell for _, cell in cells_of(table, rank)) for rank in range(program.num_ranks)]
    assert tuple(cells) == program.cells


SCHEDULES = ["gpipe", "one_f_one_b", "zb1p", "dualpipe", "dualpipe_v"]


def cases():
    for ranks in (2, 4, 8):
        for schedule in SCHEDULES:
            for count in (2 * ranks, 3 * ranks, 4 * ranks):
                marks = pytest.mark.slow if ranks == 8 and count > 16 else ()
                yield pytest.param(ranks, schedule, count, id=f"{schedule}-{ranks}-{count}", marks=marks)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb1p", "dualpipe"])
def test_no_slot_copies_a_pool(schedule):
    """In-place: XLA copies a pool at most before the first slot, when it fills it with zeros."""
    layers = (3, 3)
    stack, extras = weights(sum(layers))
    table, compiled, _, _ = compiled_for_mesh(named(schedule, 2, 6), layers, stack, extras)
    pools = [(3, size) for size in (table.num_residual, table.num_deferred) if size] + [(table.num_hidden + 1,)]
    shapes = {",".join(map(str, (*sizes, ROWS, DIM))) for sizes in pools}
    before, _ = compiled.as_text().split("\nENTRY ")
    assert all(f"f32[{shape}]" in before for shape in shapes)
    copied = [line for line in before.splitlines() if re.search(rf"= f32\[({'|'.join(shapes)})\]\S* copy\(", line)]
    assert copied == []


@pytest.mark.parametrize(("ranks", "schedule", "microbatches"), list(cases()))
def test_gradients_sums_and_what_ran(ranks, schedule, microbatches):
    program = named(schedule, 2 * ranks if schedule == "dualpipe_v" else ranks, microbatches)
    layers = (
        tuple(1 + stage % 2 for stage in range(program.num_stages))
        if microbatches == 2 * ranks
        else (1,) * program.num_stages
    )
    stack, extras = weights(sum(layers))
    *got, ran, table = run_on_mesh(program, layers, stack, extras)
    assert_close(tuple(got), one_device(stack, extras, microbatches))
    assert_ran_as_planned(program, table, ran)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "layers"),
    [
        ("dualpipe", 8, (0, 2, 1, 0)),
        ("dualpipe", 8, (1, 0, 0, 3)),
        ("dualpipe_v", 4, (1, 0, 2, 1)),
        ("zb1p", 4, (0, 2)),
    ],
)
def test_stages_without_layers(schedule, microbatches, layers):
    program = named(schedule, len(layers), microbatches)
    stack, extras = weights(sum(layers))
    *got, ran, table = run_on_mesh(program, layers, stack, extras)
    assert_close(tuple(got), one_device(stack, extras, microbatches))
    assert_ran_as_planned(program, table, ran)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "layers", "guests"),
    [("dualpipe", 8, (1, 3, 3, 1), 2), ("dualpipe_v", 4, (1, 2, 2, 1), 1), ("zb1p", 4, (2, 0), 1)],
)
def test_guests_of_the_last_stage_are_read_after_its_layers(schedule, microbatches, layers, guests):
    program = named(schedule, len(layers), microbatches)
    stack, extras = weights(sum(layers) + guests)
    dstack, dextras, stats, sums, ran, table = run_on_mesh(program, layers, stack, extras, guests)
    stats = jax.tree.map(lambda s: s[: sum(layers)], stats)  # guests have none
    assert_close((dstack, dextras, stats, sums), one_device(stack, extras, microbatches, guests))
    assert_ran_as_planned(program, table, ran)


def test_without_stages_micro_batches_pass_forward_and_back_one_after_the_other():
    program = unpiped(3)
    table, (stack, extras) = build(program), weights(4)
    rows = jax.tree.map(lambda column: jnp.asarray(column)[:, 0], table.rows)

    def objective(model, microbatch):
        x, stats = enter(model["extras"], microbatch), []
        for index in range(4):
            x, found = layer({"w": model["stack"]["w"][index]}, (x, microbatch))
            stats.append(found)
        loss, sums = leave(model["extras"], None, x, microbatch)
        return loss + DSTAT * sum(square for square, _ in stats), sums

    def local(stack, extras):
        model = jax.tree.map(lambda x: vary_over(x, AXES), {"stack": stack, "extras": extras})
        outcome = run(table, rows, WholePasses(objective, model), keep_record=True)
        return jax.lax.psum((outcome.dextras, outcome.sums), AXES), outcome.ran[None]

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    on_mesh = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=(P(), P(AXES)))
    given = jax.device_put((stack, extras), NamedSharding(mesh, P()))
    (gradients, sums), ran = jax.device_get(jax.jit(on_mesh)(*given))
    want_stack, want_extras, _, want_sums = one_device(stack, extras, 3)
    assert_close((gradients["stack"], gradients["extras"], sums), (want_stack, want_extras, want_sums))
    assert_ran_as_planned(program, table, ran)
