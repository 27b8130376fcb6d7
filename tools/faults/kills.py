"""SIGKILL at random moments of a run, until it comes to its end."""

import itertools
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.bench import DUE, EVERY, LONGEST_SECONDS, STEPS, Bench, Report, committed, damaged, events_of, exact, tail
from faults.fork import PHASES, RESTORE, Kill
from moejax.checkpoint.commit import SAVING

ANY = "any moment"


@dataclass
class Killed:
    """What the kills came to."""

    aimed: Counter = field(default_factory=Counter)  # kills for a phase
    hit: Counter = field(default_factory=Counter)  # kills that were in it; a save goes on beside steps
    resumes: int = 0
    finished: int = 0  # runs that came to their end
    most_lost: int = 0  # steps
    most_lost_before: int = 0  # of them before the save begun last
    seconds: list[float] = field(default_factory=list)  # of attempts
    typical: dict[str, deque] = field(default_factory=lambda: defaultdict(lambda: deque([0.02], maxlen=9)))


class Life:
    """A run that is killed again and again until it comes to its end."""

    def __init__(self, bench: Bench, report: Report, killed: Killed, folder: Path):
        self.bench, self.report, self.killed, self.folder = bench, report, killed, folder
        self.output = folder.parent / "output.txt"
        folder.parent.mkdir(parents=True)
        self.newest = self.attempts = 0  # the newest checkpoint's step
        self.finished = False

    def attempt(self, kill: Kill | None) -> bool:
        """One start. Returns whether the kill came: a run may finish before it."""
        events, began = len(events_of(self.folder, "started", "resumed", "damaged")), time.monotonic()
        self.attempts += 1
        from_outside = kill is not None and kill.phase == ANY
        process = self.bench.fork(self.folder, self.output, kill=None if from_outside else kill)
        process.join(kill.seconds if from_outside and kill is not None else LONGEST_SECONDS)
        process.kill()
        process.join()
        self.killed.seconds.append(time.monotonic() - began)
        new = events_of(self.folder, "started", "resumed", "damaged")[events:]
        self._require_start(new)
        done = self.require_whole()
        if process.exitcode == 0:
            self._require_end(done)
        elif kill is not None and process.exitcode == -signal.SIGKILL:
            self._count(kill, done)
        else:
            self._require(False, f"exit code {process.exitcode}; it is not tried again")
            self.finished = True
        return process.exitcode != 0

    def _require(self, good: bool, what: str) -> None:
        self.report.require(
            good, "" if good else f"{self.folder}, attempt {self.attempts}: {what}\n{tail(self.output)}"
        )

    def _require_start(self, events: list[dict[str, Any]]) -> None:
        """It went on from the newest checkpoint there was, if it came so far."""
        wanted = [("resumed", self.newest)] if self.newest else [("started", None)]
        got = [(event["kind"], event.get("step")) for event in events]
        self._require(got in ([], wanted), f"events {got}, wanted {wanted}")
        self.killed.resumes += got == wanted and self.newest > 0

    def require_whole(self) -> int:
        """What must hold at any moment; the steps done."""
        done, steps = exact(self.folder), committed(self.folder)
        self._require(done == self.bench.steps[: len(done)], "the steps are not those of the uninterrupted run")
        self._require(not (found := damaged(self.folder)), f"damaged: {found}")
        newest, last = max(steps, default=0), len(done)
        saving = {path.name.split(".")[0] for path in (self.folder / "checkpoints").glob(f"*{SAVING}*")}
        begun = [0, 0, *(step for step in DUE if step < last or (step == last and str(step) in saving))]
        oldest = max(begun[-2], self.newest)
        self._require(newest >= oldest, f"the newest checkpoint is {newest}, wanted {oldest} or later after {last}")
        self.killed.most_lost = max(self.killed.most_lost, last - newest)
        self.killed.most_lost_before = max(self.killed.most_lost_before, begun[-1] - newest)
        self.newest = newest
        return last

    def _require_end(self, done: int) -> None:
        self.finished = True
        self.killed.finished += 1
        self._require(done == self.newest == STEPS, f"ended at step {done} with checkpoint {self.newest}")
        equal = self.bench.fingerprint(self.folder) == self.bench.state
        self._require(equal, "the final state is another one")
        words = "bitwise equal" if equal else "not equal"
        self.report.say(f"{self.folder.parent.name}: finished after {self.attempts} attempts, {words}")
        shutil.rmtree(self.folder.parent, ignore_errors=bool(self.report.wrong))

    def _count(self, kill: Kill, done: int) -> None:
        phases = self.output.with_suffix(".phases")
        inside = Counter[str]()
        for line in phases.read_text().splitlines() if phases.exists() else ():
            sign, phase, *seconds = line.split("\t")
            inside[phase] += 1 if sign == "+" else -1
            self.killed.typical[phase].extend(map(float, seconds))
        hit = [phase for phase, count in inside.items() if count > 0]
        hit = hit or (["between them"] if inside else ["start of the process"])
        self._require(kill.phase in (ANY, *hit), f"the kill for {kill.phase} came in {hit}")
        self.killed.aimed[kill.phase] += 1
        self.killed.hit.update(hit)
        number, where = sum(self.killed.aimed.values()), f"step {done}, newest checkpoint {self.newest}"
        self.report.say(
            f"kill {number}, {self.folder.parent.name}: for {kill.phase}, came in {', '.join(hit)}; {where}"
        )


def kills(
    bench: Bench, report: Report, number: int, numbers: random.Random, jobs: int = 2, phases: Sequence[str] = ()
) -> Killed:
    """Kills runs so often, and lets the last ones come to their end; `phases`: of the kills, else a mixture of all."""
    mixture = [*PHASES, ANY, ANY, ANY, ANY]
    blocks = itertools.chain.from_iterable(numbers.sample(mixture, len(mixture)) for _ in itertools.count())
    todo = list(phases or itertools.islice(blocks, number))
    killed, lock, began, names = Killed(), threading.Lock(), time.monotonic(), itertools.count(1)

    def next_phase(life: Life) -> str | None:
        with lock:
            phase = next((phase for phase in todo if life.newest or phase not in RESTORE), None)
            if phase is None:  # one more where there is no checkpoint yet to be restored
                return "deletion" if todo else None
            todo.remove(phase)
            return phase

    def work(seed: int) -> None:
        own = random.Random(seed)
        while todo:
            life = Life(bench, report, killed, bench.work / f"life-{next(names)}" / "run")
            while not life.finished:
                phase = next_phase(life)
                came = life.attempt(None if phase is None else _drawn(phase, killed, own))
                if phase is not None and not came:
                    with lock:
                        todo.insert(0, phase)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, numbers.getrandbits(32)) for _ in range(jobs)]:
            done.result()
    _tell_kills(report, killed, time.monotonic() - began)
    return killed


def _drawn(phase: str, killed: Killed, numbers: random.Random) -> Kill:
    """A random moment of a phase."""
    if phase == ANY:
        return Kill(ANY, 1, numbers.uniform(0, max(killed.seconds[-20:], default=5.0)))
    if phase == "rename":
        return Kill(phase, numbers.randint(1, 4), 0.0)
    most = {"step": 8, "copy to host": 4, "write": 4, "checksums": 4, "commit": 4, "deletion": 4}.get(phase, 1)
    return Kill(phase, numbers.randint(1, most), numbers.uniform(0, statistics.median(killed.typical[phase])))


def _tell_kills(report: Report, killed: Killed, seconds: float) -> None:
    number = sum(killed.aimed.values())
    report.rows.append(("SIGKILL", f"{number} in {seconds:.0f} s, {statistics.mean(killed.seconds):.1f} s an attempt"))
    for phase in (ANY, *PHASES, *sorted(killed.hit.keys() - {*PHASES})):
        report.rows.append((f"  {phase}", f"{killed.aimed[phase]} meant, {killed.hit[phase]} came in it"))
    report.rows.append(("  resumes", f"{killed.resumes}, each from the newest checkpoint"))
    words = f"{killed.most_lost}, {killed.most_lost_before} before the save begun last; a save after every {EVERY}"
    report.rows.append(("  most steps lost", words))
    report.rows.append(("  runs to the end, compared", f"{killed.finished}"))
