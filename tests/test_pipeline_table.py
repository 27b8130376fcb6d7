import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_schedule import programs

from moejax.pipeline.replay import cells_of, check, execute
from moejax.pipeline.schedule import SCHEDULES, dualpipe, dualpipe_v, forward_only, gpipe, named, one_f_one_b
from moejax.pipeline.simulate import Costs, ScheduleError, deferred_w, simulate
from moejax.pipeline.table import Transfer, build

PREFIX = {"F": "f", "B": "b", "I": "b", "W": "w"}


def most_kept(program):
    """Most micro-batches of any rank that are between F and B or W."""
    peak = 0
    for cells in program.cells:
        kept = 0
        for cell in cells:
            kept += sum(op.kind == "F" for op in cell)
            peak = max(peak, kept)
            kept -= sum(op.kind in "BW" for op in cell)
    return peak


def changed(table, column, slot, rank, value):
    """The table with another number in one place."""
    array = getattr(table.rows, column).copy()
    array[slot, rank] = value
    return dataclasses.replace(table, rows=dataclasses.replace(table.rows, **{column: array}))


def meaningful(table):
    """Every (column, slot, rank) whose number matters."""
    last = table.program.num_stages - 1
    for slot in range(table.num_slots):
        for what, edges in zip("xg", table.transfers[table.transfer[slot]], strict=True):
            for source, target in edges:
                yield from ((f"send_{what}", slot, source), (f"receive_{what}", slot, target))
        for rank in range(table.program.num_ranks):
            for kind in table.kinds[table.rows.cell[slot, rank]]:
                stage = int(getattr(table.rows, f"{PREFIX[kind]}_stage")[slot, rank])
                names = {
                    "F": ["residual"] + ["x"] * (stage > 0) + ["y"],
                    "B": ["g", "residual"] + ["x"] * (stage > 0),
                    "I": ["g", "residual", "deferred"] + ["x"] * (stage > 0),
                    "W": ["residual", "deferred"],
                }[kind]
                if table.program.is_forward_only:
                    names = ["x"] * (stage > 0) + ["y"] * (stage < last)
                yield "cell", slot, rank
                yield from ((f"{PREFIX[kind]}_{name}", slot, rank) for name in [*names, "stage", "copy", "microbatch"])


# ---------------------------------------------------------------------------------------------------------- the same


@settings(deadline=None)
@given(programs())
def test_table_does_what_its_program_says(program):
    check(build(program))


@settings(deadline=None)
@given(programs(), st.data())
def test_check_finds_any_number_that_is_changed(program, data):
    table = build(program)
    column, slot, rank = data.draw(st.sampled_from(list(meaningful(table))))
    before = getattr(table.rows, column)[slot, rank]
    most = {"cell": len(table.kinds) - 1, "stage": program.num_stages - 1, "microbatch": program.num_microbatches - 1}
    most |= {"copy": 1, "residual": table.num_residual, "deferred": table.num_deferred}
    values = set(range(most.get(column.rpartition("_")[2], table.num_hidden) + 1)) - {before}
    if values:
        with pytest.raises(ScheduleError):
            check(changed(table, column, slot, rank, data.draw(st.sampled_from(sorted(values)))))


def test_check_finds_a_transfer_that_is_left_out_or_doubled():
    table = build(dualpipe(4, 8))
    slot = next(slot for slot in range(table.num_slots) if table.transfers[table.transfer[slot]].x)
    edges = table.transfers[table.transfer[slot]]
    for wrong in (Transfer((), edges.g), Transfer(edges.x + edges.x[:1], edges.g)):
        transfer = table.transfer.copy()
        transfer[slot] = len(table.transfers)
        with pytest.raises(ScheduleError):
            check(dataclasses.replace(table, transfer=transfer, transfers=(*table.transfers, wrong)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_cells_are_read_back_from_the_numbers(name):
    program = named(name, 4, 10)
    table = build(program)
    for rank, cells in enumerate(program.cells):
        assert tuple(cell for _, cell in cells_of(table, rank)) == cells


# -------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("limit", [None, 0, 2], ids=lambda limit: f"max_deferred_w {limit}")
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sends_that_wait_for_their_partner_take_no_longer(name, stages, limit):
    for microbatches in (2 * stages, 3 * stages + stages % 4, 60):
        program = named(name, stages, microbatches, max_deferred_w=limit)
        for each in (program, forward_only(program)):
            assert execute(build(each)).makespan == simulate(each).makespan


@pytest.mark.parametrize("stages", [4, 8, 16])
def test_transfers_between_all_neighbours_in_every_slot_double_the_bubble(stages):
    table = build(dualpipe(stages, 4 * stages))
    down = tuple((rank, rank + 1) for rank in range(stages - 1))
    lock_step = dataclasses.replace(table, transfers=(Transfer(down, down),) * len(table.transfers))
    assert execute(lock_step).bubble.max() >= 2 * execute(table).bubble.max()


def test_transfers_that_take_time_are_paid_by_both_ends():
    table = build(one_f_one_b(2, 1))
    assert execute(table, Costs(send=5)).makespan == 1 + 5 + 1 + 2 + 5 + 2
    assert execute(table, Costs(send=5)).spans[0][0].end == 1


def test_table_timed_for_other_costs_does_the_same():
    for costs in (Costs(I=1.13, W=0.48, FB=2.3), Costs(F=1e-3, I=2e-3, W=1e-3), Costs(FB=2, send=0.5)):
        for program in (dualpipe(8, 20), dualpipe_v(8, 9), named("zb1p", 5, 9)):
            check(build(program, costs))
    costs = Costs(I=1.13, W=0.48)
    program = named("zb1p", 8, 32)
    ideal = simulate(program, costs).makespan
    assert execute(build(program, costs), costs).makespan == pytest.approx(ideal)
    assert execute(build(program), costs).makespan > 1.1 * ideal


def test_published_size_is_laid_out_in_a_second():
    start = time.process_time()
    build(dualpipe(16, 120))
    assert time.process_time() - start < 1


# ------------------------------------------------------------------------------------------------------------- memory


@settings(deadline=None)
@given(programs())
def test_pools_are_as_small_as_the_program_allows(program):
    table = build(program)
    assert table.num_residual == (0 if program.is_forward_only else most_kept(program))
    assert table.num_deferred == deferred_w(program).max()
    for pool, columns in (
        ("residual", ("f_residual", "b_residual", "w_residual")),
        ("deferred", ("b_deferred", "w_deferred")),
        ("hidden", ("f_x", "f_y", "b_g", "b_x", "send_x", "receive_x", "send_g", "receive_g")),
    ):
        size = getattr(table, f"num_{pool}")
        used = np.concatenate([getattr(table.rows, column).ravel() for column in columns])
        assert set(used) | {size} == set(range(size + 1))


@pytest.mark.parametrize("stages", [4, 8, 16])
def test_dualpipe_keeps_stages_plus_1_residuals_and_4_hidden_states_at_most(stages):
    for program in (dualpipe(stages, 4 * stages), dualpipe_v(stages, 2 * stages)):
        table = build(program)
        assert (table.num_residual, table.num_deferred) == (stages + 1, stages // 2)
        assert table.num_hidden <= 4


# -------------------------------------------------------------------------------------------------------------- facts


@settings(deadline=None)
@given(programs())
def test_every_microbatch_of_the_step_passes_every_stage(program):
    table = build(program)
    names = {"f"} if program.is_forward_only else {"f", "b"}
    for name in names:
        runs = np.array([[any(PREFIX[kind] == name for kind in kinds)] for kinds in table.kinds])[table.rows.cell, 0]
        stage, microbatch = (getattr(table.rows, f"{name}_{what}")[runs] for what in ("stage", "microbatch"))
        want = {(s, m) for s in range(program.num_stages) for m in range(program.num_microbatches)}
        assert sorted(zip(stage, microbatch, strict=True)) == sorted(want)


def test_rows_are_int32_of_slots_and_ranks():
    table = build(dualpipe(4, 8))
    for field in dataclasses.fields(table.rows):
        array = getattr(table.rows, field.name)
        assert (array.dtype, array.shape) == (np.int32, (table.num_slots, 4))
        assert array.min() >= 0
    assert table.transfer.dtype == np.int32 and table.transfers[0] == ((), ()) and table.kinds[0] == ()


def test_one_rank_accumulates_gradients():
    for program in (one_f_one_b(1, 3), gpipe(1, 3)):
        assert build(program).transfers == (Transfer((), ()),)
    table = build(one_f_one_b(1, 3))
    assert [table.kinds[cell] for cell in table.rows.cell[:, 0]] == [("F",), ("B",)] * 3
    assert (table.num_residual, table.num_hidden) == (1, 1)


def test_forwards_alone_keep_nothing():
    table = build(forward_only(dualpipe(8, 16)))
    assert table.kinds == ((), ("F",))
    assert (table.num_residual, table.num_deferred) == (0, 0)


def test_half_of_the_microbatches_goes_up():
    rows = build(dualpipe(2, 4)).rows
    assert (rows.f_microbatch[0, 0], rows.f_microbatch[0, 1]) == (0, 2)
    assert (rows.f_stage[0, 0], rows.f_stage[0, 1]) == (0, 0)
