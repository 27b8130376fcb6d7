import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_pipeline_schedule import programs

from moejax.config import ConfigError
from moejax.pipeline.replay import execute
from moejax.pipeline.schedule import SCHEDULES, Op, dualpipe, named, one_f_one_b
from moejax.pipeline.simulate import (
    Costs,
    ScheduleError,
    StageCosts,
    activations,
    deferred_w,
    event_of,
    published_activations,
    published_bubble,
    simulate,
)
from moejax.pipeline.table import build

QUARTERS = st.integers(1, 12).map(lambda quarters: quarters / 4)  # sums of them are exact
COSTS = st.builds(Costs, F=QUARTERS, I=QUARTERS, W=QUARTERS, FB=st.none() | QUARTERS, send=QUARTERS | st.just(0.0))


def with_cells(program, rank, cells):
    """The program with another list of cells on one rank."""
    return dataclasses.replace(program, cells=(*program.cells[:rank], tuple(cells), *program.cells[rank + 1 :]))


def assert_runs(timeline, costs):
    """Written from the rules: no rank does two things at a time, and nothing starts before what it needs."""
    program = timeline.program
    ended = {event_of(r, op): end for r, spans in enumerate(timeline.spans) for _, end, cell in spans for op in cell}
    for rank, spans in enumerate(timeline.spans):
        assert tuple(span.cell for span in spans) == program.cells[rank]
        now = 0.0
        for start, end, cell in spans:
            assert start >= now and end == start + costs.cell(cell)
            now = end
            for event in (event for op in cell for event in program.needs(rank, op)):
                assert start >= ended[event] + (costs.send if event.rank != rank else 0)


# ----------------------------------------------------------------------------------------------------------- Table 2


@pytest.mark.parametrize("stages", range(2, 17, 2))
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_and_activations_are_table_2s(name, stages):
    for microbatches in (2 * stages, 2 * stages + 2, 3 * stages, 60):
        program = named(name, stages, microbatches)
        assert set(simulate(program).bubble) == {published_bubble(name, stages)}
        held, wanted = activations(program), published_activations(name, stages, microbatches)
        assert held.max() == wanted
        if name.startswith("dualpipe"):
            assert set(held) == {stages + 1} == {wanted}


@pytest.mark.parametrize("stages", range(2, 17, 2))
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_is_table_2s_where_a_joined_pair_takes_less(name, stages):
    costs = Costs(FB=2)
    assert simulate(named(name, stages, 3 * stages), costs).bubble.max() == published_bubble(name, stages, costs)


def test_published_bubbles_are_the_formulas_of_table_2():
    costs = Costs(F=2, I=3, W=5, FB=9)  # B = 8
    want = {"gpipe": 70, "one_f_one_b": 70, "zb1p": 0, "dualpipe": 6, "dualpipe_v": 6}
    assert {name: published_bubble(name, 8, costs) for name in SCHEDULES} == want


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "makespan"),
    [
        ("dualpipe", 4, 8, 26),
        ("dualpipe", 8, 20, 66),
        ("dualpipe", 16, 32, 110),
        ("dualpipe_v", 4, 4, 26),
        ("dualpipe_v", 8, 8, 54),
        ("dualpipe_v", 16, 16, 110),
        ("one_f_one_b", 8, 20, 81),
        ("gpipe", 8, 20, 81),
        ("zb1p", 8, 20, 67),
        ("one_f_one_b", 1, 5, 15),
    ],
)
def test_makespan(name, stages, microbatches, makespan):
    assert simulate(named(name, stages, microbatches)).makespan == makespan


def test_each_value_of_max_deferred_w_has_its_bubble_and_memory():
    limits = (0, 1, 2, 4, 6, 8, 9, None)
    bounded = [named("dualpipe", 16, 64, max_deferred_w=limit) for limit in limits]
    assert [simulate(program).bubble.max() for program in bounded] == [34, 18, 17, 16, 15, 14, 14, 14]
    assert [deferred_w(program).max() for program in bounded] == [0, 1, 2, 4, 6, 8, 8, 8]
    assert {activations(program).max() for program in bounded} == {17}


# ------------------------------------------------------------------------------------------------------------- times


@settings(deadline=None)
@given(programs(), COSTS)
def test_nothing_starts_before_what_it_needs(program, costs):
    assert_runs(simulate(program, costs), costs)


def test_sends_take_their_time_between_ranks_only():
    costs = Costs(F=1, I=2, W=3, send=10)
    assert simulate(one_f_one_b(4, 1), costs).makespan == 4 * 1 + 4 * 5 + 6 * 10
    assert simulate(named("dualpipe_v", 2, 2), costs) == simulate(named("dualpipe_v", 2, 2), Costs(F=1, I=2, W=3))


def test_bubble_is_what_is_left_of_the_makespan():
    timeline = simulate(one_f_one_b(3, 2), Costs(F=1, I=1, W=2))
    np.testing.assert_array_equal(timeline.bubble, [8, 8, 8])
    assert timeline.makespan == 16


# ---------------------------------------------------------------------------------------------------- broken programs


@settings(deadline=None)
@given(programs(), st.data())
def test_a_missing_or_repeated_op_is_found(program, data):
    rank = data.draw(st.integers(0, program.num_ranks - 1))
    cells = list(program.cells[rank])
    at = data.draw(st.integers(0, len(cells) - 1))
    repeated = [*cells, cells[at]]
    changed = data.draw(st.sampled_from([cells[:at] + cells[at + 1 :], repeated]))
    changed = with_cells(program, rank, changed)
    assume(changed.is_forward_only == program.is_forward_only)  # without its only backward it is one of evaluation
    with pytest.raises(ScheduleError, match=f"rank {rank} runs"):
        simulate(changed)


@settings(deadline=None)
@given(programs(), st.data())
def test_another_order_runs_by_the_rules_or_is_refused(program, data):
    rank = data.draw(st.integers(0, program.num_ranks - 1))
    cells = list(program.cells[rank])
    one, other = (data.draw(st.integers(0, len(cells) - 1)) for _ in range(2))
    cells[one], cells[other] = cells[other], cells[one]
    swapped = with_cells(program, rank, cells)
    try:
        timeline = simulate(swapped)
    except ScheduleError as error:
        assert "wait for ever" in str(error)
    else:
        assert_runs(timeline, Costs())


def test_deadlock_says_who_waits_for_what():
    program = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match=r"rank 1 for F0\.0 of rank 0") as error:
        simulate(with_cells(program, 0, program.cells[0][::-1]))
    assert "rank 0 for F0.1 of rank 0" in str(error.value)


@pytest.mark.parametrize(
    "cell",
    [(Op("B", 0, 0), Op("F", 0, 1)), (Op("F", 0, 1), Op("I", 0, 0)), (), (Op("X", 0, 0),)],
    ids=["backward first", "joined I", "empty", "unknown"],
)
def test_a_cell_that_is_none_is_found(cell):
    program = dualpipe(2, 4)
    with pytest.raises(ScheduleError, match="rank 1 has the cell"):
        simulate(with_cells(program, 1, (*program.cells[1], cell)))


def test_an_op_of_no_microbatch_is_found():
    program = dualpipe(2, 4)
    with pytest.raises(ScheduleError, match=r"rank 0 runs F0\.2, of no micro-batch"):
        simulate(with_cells(program, 0, (*program.cells[0], (Op("F", 0, 2),))))


# --------------------------------------------------------------------------------------------------------- bad input


def test_costs_are_read_from_words():
    assert Costs.parsed(["F=2", "FB=4.5", "send=0"]) == Costs(F=2, FB=4.5)
    assert Costs(F=2).joined == 4 and Costs(B=5).joined == 6 and Costs(B=5, FB=3).joined == 3


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("X=1", "costs='X': wanted one of F, I, W, B, FB, send"),
        ("F", "costs='F': wanted KIND=TIME, as in F=1.5"),
        ("F=a", "costs='F=a': wanted KIND=TIME, as in F=1.5"),
        ("W=0", "costs.W=0.0: wanted a time above 0"),
        ("I=nan", "costs.I=nan: wanted a time above 0"),
        ("send=-1", "costs.send=-1.0: wanted a time above 0"),
        ("F=inf", "costs.F=inf: wanted a time above 0"),
    ],
)
def test_bad_cost_is_one_line(word, line):
    with pytest.raises(ConfigError) as error:
        Costs.parsed([word])
    assert str(error.value) == line


# ------------------------------------------------------------------------------------------------- stages that differ


def per_stage(program, costs, scale=lambda stage: 1.0, after=0.0):
    """`costs` for each stage, times what `scale` says of it."""
    stages = range(program.num_stages)
    times = {"F": costs.F, "B": costs.full_backward, "I": costs.I, "W": costs.W}
    single = {(kind, stage): time * scale(stage) for kind, time in times.items() for stage in stages}
    joined = {(a, b): single["F", a] + single["B", b] for a in stages for b in stages}
    return StageCosts(single=single, joined=joined, after=dict.fromkeys(joined, after), send=costs.send)


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_stages_cost_what_a_single_number_says(name):
    program, costs = named(name, 4, 8), Costs(F=1.5, I=2.0, W=0.5, send=0.25)
    assert simulate(program, per_stage(program, costs)) == simulate(program, costs)
    table = build(program)
    assert execute(table, per_stage(program, costs)) == execute(table, costs)


def test_every_cell_takes_the_time_of_its_own_stages():
    program = dualpipe(4, 8)
    costs = per_stage(program, Costs(), scale=lambda stage: 1.0 + stage)
    for rank, spans in enumerate(simulate(program, costs).spans):
        for start, end, cell in spans:
            units = {"F": 1, "B": 2, "I": 1, "W": 1}
            want = sum(units[op.kind] * (1 + (rank if op.chunk == 0 else 3 - rank)) for op in cell)
            assert end - start == pytest.approx(want, abs=1e-9)


def test_a_slow_stage_sets_the_pace():
    program = one_f_one_b(4, 32)
    slow = simulate(program, per_stage(program, Costs(), scale=lambda stage: 3.0 if stage == 3 else 1.0))
    assert slow.bubble[3] == simulate(program).bubble[3] and slow.makespan > 3 * 32 * 3


def test_what_comes_after_a_joined_cells_results_holds_no_other_rank_up():
    program = dualpipe(4, 8)
    late = simulate(program, per_stage(program, Costs(send=0.5), after=0.5))
    assert late.makespan < simulate(program, per_stage(program, Costs(send=0.5))).makespan
    table = build(program)
    assert (
        execute(table, per_stage(program, Costs(send=0.5), after=0.5)).makespan
        <= execute(table, Costs(send=0.5)).makespan
    )
