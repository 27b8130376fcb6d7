import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.pipeline.schedule import SCHEDULES, bounded, dualpipe, dualpipe_v, forward_only, named, zb1p

# deepseek-ai/DualPipe's dualpipe.py for 8 ranks and 20 micro-batches; the digit is a phase, not a chunk
GOLDEN = {
    0: "F0x7 F1 (I1 W F1)x3 (F0&B1 F1&B0)x3 (B1 F1&B0)x3 B1 I0 (W I0)x3 W",
    1: "F0x5 F1 F0 F1 (I1 W F1)x2 (F0&B1 F1&B0)x4 (B1 F1&B0)x2 B1 B0 I1 I0 (W I0)x2 W W",
    2: "F0x3 F1 F0 F1 F0 F1 I1 W F1 (F0&B1 F1&B0)x5 B1 F1&B0 B1 B0 B1 I0 I1 I0 W I0 W W W",
    3: "(F0 F1)x4 F0 B1 F1&B0 (F0&B1 F1&B0)x5 B1 B0 B1 B0 I1 I0 I1 I0 Wx4",
}
GOLDEN_SMALL = {
    0: "F0x3 F1 I1 W F1 F0&B1 F1&B0 B1 F1&B0 B1 I0 W I0 W",
    1: "F0 F1 F0 F1 F0 B1 F1&B0 F0&B1 F1&B0 B1 B0 I1 I0 W W",
}
# Figure 5 of the report, read off the picture: colour of every unit of time of devices 0 to 3, B for both greens
FIGURE_5 = (
    "FFFFFFFFBWFBWFBWFFBB...FBBFBBFBBFBBFBB.BBFBB.BBFBB.BBFBBBBBWBWBWBW",
    ".FFFFFFFFBWFBWFFBB..FBBFBBFBBFBBFBBFBBFBB.BBFBB.BBFBB.BBBBBBWBWBWW",
    "..FFFFFFFFBWFFBB.FBBFBBFBBFBBFBBFBBFBBFBBFBB.BBFBB.BB.BBBBBBBWBWWW",
    "...FFFFFFFFFBBFBBFBBFBBFBBFBBFBBFBBFBBFBBFBBFBB.BB.BB.BBBBBBBBWWWW",
)


@st.composite
def programs(draw):
    """Any schedule that exists, also with a bound on W put off, also without its backward passes."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    stages = draw(st.integers(1, 5)) * (2 if "dualpipe" in name else 1)
    least = {"dualpipe": 2 * stages, "dualpipe_v": stages}.get(name, 1)
    microbatches = least + draw(st.integers(0, 9)) * (2 if name == "dualpipe" else 1)
    program = named(name, stages, microbatches, max_deferred_w=draw(st.none() | st.integers(0, 5)))
    return forward_only(program) if draw(st.integers(0, 4)) == 0 else program


def phases(program, rank):
    """The rank's cells in the notation of dualpipe.py."""
    flip = rank >= program.num_ranks / 2 and program.name == "dualpipe"
    return [
        "&".join("W" if op.kind == "W" else f"{op.kind}{op.chunk ^ flip}" for op in cell)
        for cell in program.cells[rank]
    ]


def expanded(text):
    """Words of a text in which (...)xN or wordxN stands for N times."""
    text = re.sub(r"\(([^)]*)\)x(\d+)", lambda m: f"{m[1]} " * int(m[2]), text)
    return re.sub(r"(\S+)x(\d+)", lambda m: f"{m[1]} " * int(m[2]), text).split()


# --------------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("rank", range(8))
def test_dualpipe_follows_the_published_steps(rank):
    assert phases(dualpipe(8, 20), rank) == expanded(GOLDEN[min(rank, 7 - rank)])


@pytest.mark.parametrize("rank", range(4))
def test_dualpipe_of_4_stages_follows_the_published_steps(rank):
    assert phases(dualpipe(4, 8), rank) == expanded(GOLDEN_SMALL[min(rank, 3 - rank)])


@pytest.mark.parametrize("rank", range(4))
def test_dualpipe_v_is_the_upper_half_of_dualpipe(rank):
    assert phases(dualpipe_v(8, 10), rank) == phases(dualpipe(8, 20), rank)


@pytest.mark.parametrize("rank", range(8))
def test_dualpipe_has_the_cells_of_figure_5(rank):
    units = {"F": "F", "B": "BB", "I": "B", "W": "W"}
    drawn = "".join(units[op.kind] for cell in dualpipe(8, 20).cells[rank] for op in cell)
    assert drawn == FIGURE_5[min(rank, 7 - rank)].replace(".", "")


def test_zb1p_is_the_hand_written_one():
    ranks = "F F F I W F I W I W I W", "F F I F I W F I W I W W", "F I F I F I W F I W W W"
    for rank, words in enumerate(ranks):
        assert [cell[0].kind for cell in zb1p(3, 4).cells[rank]] == words.split()
    assert str(zb1p(2, 2)).splitlines()[1] == "F0.0 I0.0 F0.1 I0.1 W0.0 W0.1"


# -------------------------------------------------------------------------------------------------------- properties


@settings(deadline=None)
@given(programs())
def test_every_microbatch_passes_every_stage_once_and_in_order(program):
    backwards = 0 if program.is_forward_only else 1
    for cells in program.cells:
        place = {(op.kind, op.chunk, op.microbatch): at for at, cell in enumerate(cells) for op in cell}
        assert len(place) == sum(map(len, cells))  # no op twice
        count = Counter((kind, chunk) for kind, chunk, _ in place)
        for chunk in range(program.num_chunks):
            assert count["F", chunk] == program.microbatches_per_chunk
            assert count["B", chunk] + count["I", chunk] == backwards * program.microbatches_per_chunk
            assert count["W", chunk] == count["I", chunk]
        for (kind, chunk, microbatch), at in place.items():
            before = {"F": None, "B": "F", "I": "F", "W": "I"}[kind]
            assert before is None or place[before, chunk, microbatch] < at


@settings(deadline=None)
@given(programs())
def test_what_is_sent_is_received(program):
    last = program.num_stages - 1
    sent, wanted = Counter(), Counter()
    for rank, cells in enumerate(program.cells):
        for op in (op for cell in cells for op in cell):
            what = "F" if op.kind == "F" else "B"
            stage = program.stage(rank, op.chunk)
            target = program.sends(rank, op)
            assert (target is None) == (op.kind == "W" or stage == (last if op.kind == "F" else 0))
            if target is not None:
                assert abs(target[0] - rank) <= 1
                assert program.stage(*target) == stage + (1 if what == "F" else -1)
                sent[what, rank, op.chunk, *target, op.microbatch] += 1
            for event in program.needs(rank, op):
                if op.kind != "W" and (event.rank, event.chunk) != (rank, op.chunk):
                    wanted[event.kind, event.rank, event.chunk, rank, op.chunk, op.microbatch] += 1
    assert sent == wanted and max(sent.values(), default=1) == 1


@settings(deadline=None)
@given(programs(), st.integers(0, 4))
def test_bound_on_w_put_off_moves_nothing_else(program, limit):
    after = bounded(program, limit)
    for old, new in zip(program.cells, after.cells, strict=True):
        waiting = 0
        for cell in new:
            waiting += {"I": 1, "W": -1}.get(cell[0].kind, 0)
            assert 0 <= waiting <= limit
        without_w = [[cell for cell in cells if cell[0].kind != "W"] for cells in (old, new)]
        if limit == 0:
            without_w[0] = [tuple(op._replace(kind=op.kind.replace("I", "B")) for op in cell) for cell in without_w[0]]
        assert without_w[0] == without_w[1]


def test_bound_that_is_never_reached_changes_nothing():
    assert bounded(dualpipe(8, 20), 4) == dualpipe(8, 20) == bounded(dualpipe(8, 20), None)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "limit", "line"),
    [
        ("dualpipe", 7, 20, None, "stages=7: wanted an even number; the nearest: 6 or 8"),
        ("dualpipe_v", 1, 20, None, "stages=1: wanted an even number; the nearest: 2"),
        ("dualpipe", 8, 14, None, "microbatches=14: wanted an even number, at least 2 * stages = 16; the nearest: 16"),
        (
            "dualpipe",
            8,
            19,
            2,
            "microbatches=19: wanted an even number, at least 2 * stages = 16; the nearest: 18 or 20",
        ),
        ("dualpipe_v", 8, 7, None, "microbatches=7: wanted at least as many as stages; the nearest: 8"),
        ("one_f_one_b", 0, 4, None, "stages=0: wanted 1 or more"),
        ("gpipe", 4, 0, None, "microbatches=0: wanted 1 or more"),
        ("zb1p", 4, -1, None, "microbatches=-1: wanted 1 or more"),
        ("zb1p", 4, 8, -1, "max_deferred_w=-1: wanted 0 or more"),
        ("1f1b", 4, 8, None, "schedule='1f1b': wanted one of gpipe, one_f_one_b, zb1p, dualpipe, dualpipe_v"),
    ],
)
def test_bad_numbers_name_the_nearest_good_ones(name, stages, microbatches, limit, line):
    with pytest.raises(ConfigError) as error:
        named(name, stages, microbatches, max_deferred_w=limit)
    assert str(error.value) == line


@settings(deadline=None)
@given(st.sampled_from(["dualpipe", "dualpipe_v"]), st.integers(-3, 20), st.integers(-3, 50))
def test_the_nearest_good_numbers_are_good(name, stages, microbatches):
    numbers = {"stages": stages, "microbatches": microbatches}
    for _ in numbers:  # each is put right at most once
        try:
            named(name, **numbers)
        except ConfigError as error:
            numbers[error.place] = int(error.wanted.split()[-1])
    named(name, **numbers)
