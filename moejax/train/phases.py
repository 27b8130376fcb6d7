"""The phases of a run that are not steps: their time goes into the ledger, and the watchdog gives them more of it."""

import contextlib
from collections.abc import Iterator

from moejax.train.ledger import Ledger
from moejax.train.watchdog import Watchdog

LONGER = 4  # how many times the limit of a step a phase may take


class Phases:
    """Opens phases on the ledger and the watchdog of a process."""

    def __init__(self, ledger: Ledger, watchdog: Watchdog):
        self.ledger, self.watchdog = ledger, watchdog

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """A phase of a kind that `Ledger.spend` takes."""
        limit = self.watchdog.seconds
        words = kind.replace("_", " ")
        with self.ledger.spend(kind), self.watchdog.allow(None if limit is None else LONGER * limit, words):
            yield
