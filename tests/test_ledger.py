import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.config import LogConfig, RunConfig
from moejax.train.ledger import KINDS, Ledger, read_events
from moejax.train.runlog import RunLog

START = 1_700_000_000.0  # of the first attempt; all times here are multiples of 1/8 s, whose sums are exact


class Clock:
    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def attempt(tmp_path, clock):
    """Opens the ledger of another attempt, which writes as RunLog does."""
    path = tmp_path / "events.jsonl"

    def write(kind, **fields):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(clock.now, 3), "kind": kind, **fields}) + "\n")

    def opened(step=None, *, began=None, every=0.0):
        ledger = Ledger(path, began=clock.now if began is None else began, every=every, clock=clock)
        if step is not None:
            ledger.resume(step, write)
        return ledger, write

    opened.path = path
    return opened


def do_steps(ledger, clock, numbers, seconds=1.0):
    for number in numbers:
        with ledger.step(number):
            clock.pass_by(seconds)


def spend(ledger, clock, kind, seconds):
    with ledger.spend(kind):
        clock.pass_by(seconds)


def seconds_of(ledger):
    """The kinds that took time."""
    return {kind: seconds for kind, seconds in ledger.totals().items() if seconds}


# --------------------------------------------------------------------------------------------------------- one attempt


def test_every_kind_of_a_attempt_is_counted(attempt, clock):
    clock.pass_by(3)
    ledger, write = attempt(began=START)
    clock.pass_by(1)
    spend(ledger, clock, "restore", 2)
    ledger.resume(0, write)
    clock.pass_by(0.5)
    spend(ledger, clock, "compilation", 8)
    clock.pass_by(0.25)
    spend(ledger, clock, "data_wait", 0.5)
    do_steps(ledger, clock, [1, 2], 4.0)
    for kind, seconds in (("validation", 5), ("save_stall", 6), ("pictures", 7), ("other", 9)):
        spend(ledger, clock, kind, seconds)
    want = {"steps": 8, "data_wait": 0.5, "validation": 5, "save_stall": 6, "pictures": 7, "compilation": 8}
    want |= {"restore": 2, "initialisation": 4.5, "other": 9.25}
    assert seconds_of(ledger) == want
    assert ledger.goodput() == 8 / (clock.now - START)


def test_initialisation_ends_with_the_first_step_where_nothing_is_compiled(attempt, clock):
    ledger, _ = attempt(0)
    clock.pass_by(2)
    do_steps(ledger, clock, [1])
    clock.pass_by(4)
    assert seconds_of(ledger) == {"initialisation": 2, "steps": 1, "other": 4}


def test_inner_time_is_not_counted_for_the_outer(attempt, clock):
    ledger, _ = attempt(0)
    with ledger.step(1):
        clock.pass_by(1)
        with ledger.spend("compilation"):
            clock.pass_by(10)
            spend(ledger, clock, "data_wait", 100)
        clock.pass_by(2)
    assert seconds_of(ledger) == {"steps": 3, "compilation": 10, "data_wait": 100}


@pytest.mark.parametrize("kind", ["steps", "restart", "lunch"])
def test_kind_that_is_not_spent_is_refused(attempt, kind):
    ledger, _ = attempt(0)
    with pytest.raises(ValueError, match=f"{kind}.*validation"), ledger.spend(kind):
        pass


def test_clock_that_is_set_back_stands_still(attempt, clock):
    ledger, _ = attempt(0)
    do_steps(ledger, clock, [1], 4.0)
    clock.pass_by(-2)
    do_steps(ledger, clock, [2], 3.0)
    assert seconds_of(ledger) == {"steps": 5}


def test_lines_are_written_when_due(attempt, clock):
    ledger, _ = attempt(0, every=10.0)
    do_steps(ledger, clock, range(1, 26))
    assert [line["step"] for line in read_events(attempt.path)] == [0, 10, 20]
    spend(ledger, clock, "save_stall", 1)  # at once, since the next attempt may begin here
    spend(ledger, clock, "validation", 9)
    spend(ledger, clock, "validation", 1)  # 10 s after the save
    assert [line["seconds"].get("validation") for line in read_events(attempt.path)][3:] == [None, 10]


# ------------------------------------------------------------------------------------------------------- many attempts


def test_steps_that_are_done_again_are_lost_work(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, range(1, 5))
    spend(first, clock, "save_stall", 2)
    do_steps(first, clock, range(5, 8), 2.0)
    clock.pass_by(60)  # in which the attempt was killed
    second, _ = attempt(4)
    do_steps(second, clock, range(5, 9), 1.0)
    assert seconds_of(second) == {"steps": 8, "save_stall": 2, "restart": 60, "lost_work": 6}
    assert (second.attempts, second.lost_steps) == (2, 3)
    assert second.goodput() == 8 / 76


def test_roll_back_loses_the_steps_since_its_checkpoint(attempt, clock):
    ledger, _ = attempt(0)
    do_steps(ledger, clock, range(1, 5))
    spend(ledger, clock, "save_stall", 2)
    do_steps(ledger, clock, range(5, 8), 2.0)
    spend(ledger, clock, "lost_work", 2.0)  # the last one, again
    with ledger.spend("restore"):
        clock.pass_by(3)
        ledger.roll_back(4)
        clock.pass_by(1)
    do_steps(ledger, clock, range(5, 9), 1.0)
    want = {"steps": 8, "save_stall": 2, "restore": 4, "lost_work": 8}
    assert seconds_of(ledger) == want
    assert (ledger.attempts, ledger.lost_steps) == (2, 3)
    ledger.note()
    later, _ = attempt(8)
    assert seconds_of(later) == want


def test_step_that_did_not_end_is_lost_work(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, [1])
    spend(first, clock, "save_stall", 1)
    with pytest.raises(KeyboardInterrupt), first.step(2):
        clock.pass_by(16)
        raise KeyboardInterrupt
    first.note()
    second, _ = attempt(1)
    assert seconds_of(second) == {"steps": 1, "save_stall": 1, "lost_work": 16}
    assert second.lost_steps == 0


def test_older_checkpoint_loses_the_work_of_two_attempts(attempt, clock):
    for resumed, steps, each in ((0, range(1, 7), 1.0), (4, range(5, 10), 8.0)):
        ledger, _ = attempt(resumed)
        for step in steps:
            do_steps(ledger, clock, [step], each)
            spend(ledger, clock, "save_stall", 0.125)
    third, _ = attempt(2)
    totals = third.totals()
    assert (totals["steps"], totals["lost_work"]) == (2, 4 + 5 * 8)
    assert third.lost_steps == 2 + 7


def test_attempt_that_was_killed_before_its_first_line_is_restart(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, [1])
    killed, _ = attempt()
    clock.pass_by(100)
    spend(killed, clock, "restore", 20)
    last, _ = attempt(1)
    assert seconds_of(last) == {"steps": 1, "restart": 120}


def test_checkpoint_newer_than_the_last_line_loses_nothing(attempt, clock):
    first, _ = attempt(0, every=1000.0)
    do_steps(first, clock, range(1, 6))
    second, _ = attempt(5)
    assert seconds_of(second) == {"restart": 5}  # nobody wrote down what the time went into
    assert second.lost_steps == 0


def test_two_runs_of_one_process_do_not_overlap(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, [1, 2])
    clock.pass_by(1)
    second, _ = attempt(2, began=START)  # when the process started is before all of that
    do_steps(second, clock, [3])
    assert seconds_of(second) == {"steps": 3, "initialisation": 1}


def test_run_of_many_attempts_sums_to_the_wall_clock(attempt, clock):
    """Against a list of all steps, of which those after the checkpoint are struck off."""
    draw, saved, kept, lost, starts = random.Random(0), 0, [], [], []
    for _ in range(20):
        clock.pass_by(draw.randrange(800) / 8)  # in which nothing runs
        starts.append(clock.now)
        clock.pass_by(draw.randrange(80) / 8)
        ledger, write = attempt(began=starts[-1])
        spend(ledger, clock, "restore", draw.randrange(40) / 8)
        ledger.resume(saved, write)
        lost += kept[saved:]
        del kept[saved:]
        spend(ledger, clock, "compilation", draw.randrange(80) / 8)
        for step in range(saved + 1, saved + draw.randrange(2, 12)):
            spend(ledger, clock, "data_wait", draw.randrange(3) / 8)
            kept.append(draw.randrange(1, 40) / 8)
            do_steps(ledger, clock, [step], kept[-1])
            clock.pass_by(draw.randrange(3) / 8)
            if draw.random() < 0.2:
                saved = step
                spend(ledger, clock, "save_stall", draw.randrange(8) / 8)
    totals = ledger.totals()
    assert (totals["steps"], totals["lost_work"]) == (sum(kept), sum(lost))
    assert ledger.lost_steps == len(lost) > 20
    assert sum(totals.values()) == clock.now - starts[0]
    assert min(totals.values()) >= 0


# ------------------------------------------------------------------------------------------------------- damaged lines


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text[:-40],
        lambda text: text + '{"time": 17, "kind": "led',
        lambda text: text + '{"time": 17, "kind": "led' + '{"time": 18, "kind": "resumed"}\n',
        lambda text: text + "\0" * 4096,
        lambda text: text + '{"kind": "led\ud83d',
    ],
    ids=["no newline", "cut off", "half a line", "half a line and one behind it", "zeros", "half a character"],
)
def test_damaged_end_does_not_break_the_next_attempt(attempt, clock, spoil):
    first, _ = attempt(0)
    do_steps(first, clock, [1, 2])
    text = spoil(attempt.path.read_text())
    attempt.path.write_bytes(text.encode("utf-8", "surrogatepass"))
    second, _ = attempt(1)
    do_steps(second, clock, [2, 3])
    third, _ = attempt(3)
    assert sum(third.totals().values()) == clock.now - START
    assert third.totals()["steps"] == 3
    assert third.attempts == 3


def test_lost_line_costs_nothing(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, range(1, 6))
    whole = attempt(5)[0].totals()
    lines = attempt.path.read_text().splitlines(keepends=True)
    attempt.path.write_text("".join(lines[3:-1]))
    assert attempt(5)[0].totals() == whole


def test_killed_process_leaves_what_it_did(tmp_path):
    program = f"""
import json, time
from pathlib import Path
from moejax.train.ledger import Ledger
path = Path({str(tmp_path / "events.jsonl")!r})
def write(kind, **fields):
    with open(path, "a") as file:
        file.write(json.dumps({{"kind": kind, **fields}}) + "\\n")
ledger = Ledger(path, began=time.time(), every=0.0)
ledger.resume(0, write)
for step in range(1, 1000):
    with ledger.step(step):
        time.sleep(0.01)
    print(step, flush=True)
"""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=path) as child:
        while child.stdout.readline() != "5\n":
            pass
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    lines = read_events(tmp_path / "events.jsonl")
    assert lines[-1]["step"] >= 5
    ledger = Ledger(tmp_path / "events.jsonl", began=lines[-1]["until"] + 1, clock=lambda: lines[-1]["until"] + 1)
    totals = ledger.totals()
    assert totals["steps"] >= 0.05
    assert totals["restart"] == 1
    assert sum(totals.values()) == lines[-1]["until"] + 1 - lines[0]["attempt"]


# --------------------------------------------------------------------------------------------------------- its reports


def test_run_log_keeps_the_lines(tmp_path, clock):
    config = RunConfig(steps=2, out=str(tmp_path / "run"), log=LogConfig(tensorboard=False))
    path = tmp_path / "run" / "events.jsonl"
    ledger = Ledger(path, began=START, clock=clock)
    with RunLog(config, total_steps=2) as log:
        ledger.resume(0, log.event)
        do_steps(ledger, clock, [1, 2], 0.1)
        ledger.note()
        log.finish("finished", time=ledger.summary())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["time"]["seconds"]["steps"] == 0.2
    assert Ledger(path, began=clock.now, clock=clock).totals() == ledger.totals()


def test_summary_and_table_say_what_became_of_the_time(attempt, clock):
    first, _ = attempt(0)
    do_steps(first, clock, range(1, 1001), 2.0)
    clock.pass_by(400)
    second, _ = attempt(800)
    spend(second, clock, "compilation", 100)
    spend(second, clock, "validation", 100)
    assert second.summary() == {
        "goodput": 0.6154,
        "wall_seconds": 2600,
        "seconds": dict.fromkeys(KINDS, 0)
        | {"steps": 1600, "lost_work": 400, "restart": 400, "compilation": 100, "validation": 100},
        "attempts": 2,
        "lost_steps": 200,
    }
    assert second.table().splitlines() == [
        "steps                 1,600.0 s   61.5%",
        "validation              100.0 s    3.8%",
        "compilation             100.0 s    3.8%",
        "restart                 400.0 s   15.4%",
        "lost work               400.0 s   15.4%",
        "wall clock            2,600.0 s  100.0%",
        "2 attempts, 200 steps lost, goodput 61.5%",
    ]


def test_new_ledger_has_no_goodput(attempt):
    ledger, _ = attempt(0)
    assert ledger.goodput() == 0
    assert ledger.table().endswith("1 attempt, 0 steps lost, goodput 0.0%")
