"""Injects faults into real runs of a tiny model, and checks what must hold after each.

    python tools/chaos.py kills --number 200 --seed 0   SIGKILL at random moments, spread over the phases of a run
    python tools/chaos.py stops                         SIGTERM; SIGSTOP and SIGKILL of one of two processes
    python tools/chaos.py disk                          a disk that is full while a run saves
    python tools/chaos.py damages --number 500          damaged files of a checkpoint
    python tools/chaos.py all                           all of them, some 20 minutes on two cores

It prints a line for each fault and a table at the end; the exit code is 1 where anything was not as it must be.

Every run is `moejax train` on a text and settings made here, of 30 steps with a save after every third. Runs that are
killed are forks of one process that has imported everything and started no device. A kill for a phase comes from a
thread of the run itself, at a random moment of that phase; one for "any moment" comes from outside, at a random moment
of the run. The runs note the phases that they are in, so it is known which ones a kill has hit.

After each kill every committed checkpoint must be whole, the steps so far must be those of an uninterrupted run,
and the next start must go on from the newest checkpoint. That one is of the save begun last, which may not have been
committed yet: then it is of the save before, since saves do not overlap. In steps: at most an interval before the save
begun last is lost, and those since it began. A run that comes to its end has all losses and the final state of the
uninterrupted one, bitwise.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from faults.bench import Bench, Report
from faults.damages import DAMAGES, damages
from faults.disk import disk
from faults.kills import kills
from faults.stops import stops

FAST = "--xla_backend_optimization_level=0"  # of XLA_FLAGS: compiled quickly rather than well


def main() -> None:
    """Runs what is asked for, prints the table, and ends with 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "stops", "disk", "damages", "all"])
    parser.add_argument("--number", type=int, help="of kills (200), SIGTERMs (5) or damages (500); not with all")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--jobs", type=int, default=2, help="runs that are killed side by side")
    parser.add_argument("--work", type=Path, help="folder that is made, and kept; else one that is deleted at the end")
    options = parser.parse_args()
    if options.what == "all" and options.number is not None:
        parser.error("--number is of one kind of fault")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()
    report, numbers, began = Report(), random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench((options.work or Path(temporary) / "chaos").absolute())
        if options.what in ("kills", "all"):
            kills(bench, report, options.number or 200, numbers, options.jobs)
        if options.what in ("stops", "all"):
            stops(bench, report, options.number or 5, numbers)
        if options.what in ("disk", "all"):
            disk(bench, report)
        if options.what in ("damages", "all"):
            damages(bench, report, options.number or 500, numbers, resumes=len(DAMAGES))
    report.rows.append(("seconds", f"{time.monotonic() - began:.0f}"))
    print(report.table())
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
