"""Whether a run can go on from the state that a step left: numbers that are not finite, and spikes of the loss."""

import logging
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moejax.config import FaultConfig
from moejax.train.guard import EndError, MachineFaultError, NonFiniteError, SpikeError

logger = logging.getLogger("moejax")

FEWEST = 20  # steps before a spike can be told from noise
LEAST_DEVIATION = 1e-3  # relative to the mean: where the loss stands still, the noise of rounding is no spike


@dataclass(frozen=True)
class Fault:
    """Why a run is not to go on from its state."""

    error: type[EndError]  # that ends the run, where it cannot roll back
    words: str
    can_roll_back: bool
    is_good: bool  # the state: it may be saved


class Faults:
    """Judges the steps of a run, one after the other, and says what is wrong with them."""

    def __init__(self, config: FaultConfig, event: Callable[..., None]):
        """`event`: as `RunLog.event`."""
        self.bad_steps: list[int] = []  # in a row, up to the last step
        self._config, self._event = config, event
        self._machine_faults = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, step: int, loss: float, first: Sequence[str], again: Sequence[str]) -> Fault | None:
        """Given the quantities of a step that were not finite, at first, and when it was repeated for that reason."""
        if again:
            return self._of_the_model(step, again)
        self.bad_steps = []
        fault = self._of_the_machine(step, first) if first else None
        return fault or self._spike(step, loss)

    def of_some_processes(self, step: int) -> Fault:
        """The judgement where only some processes have numbers that are not finite, and so another state."""
        words = f"step {step}: numbers are not finite in some processes, and are in others: a fault of the machine"
        logger.warning(words)
        self._event("machine_fault", step=step, quantities=[])
        return Fault(MachineFaultError, words, can_roll_back=True, is_good=False)

    def rolled_back(self) -> None:
        """Says that the steps come again."""
        self.bad_steps = []

    def _of_the_model(self, step: int, bad: Sequence[str]) -> Fault | None:
        self.bad_steps.append(step)
        said, limit = f"{', '.join(bad)} not finite, also when repeated", self._config.max_bad_steps
        count = f"{len(self.bad_steps)} of {limit} in a row"
        logger.warning(f"step {step}: {said}; the step was not applied ({count})")
        if len(self.bad_steps) < limit:
            return None
        words = f"steps {self.bad_steps[0]} to {step}: {said}; they were not applied"
        return Fault(NonFiniteError, words, can_roll_back=True, is_good=True)

    def _of_the_machine(self, step: int, bad: Sequence[str]) -> Fault | None:
        self._machine_faults += 1
        said = f"{', '.join(bad)} not finite, and finite when repeated from the same data: a fault of the machine"
        limit = self._config.max_machine_faults
        logger.warning(f"step {step}: {said} ({self._machine_faults} of {limit})")
        self._event("machine_fault", step=step, quantities=list(bad))
        if self._machine_faults < limit:
            return None
        words = f"step {step}: {said}, as of {self._machine_faults} steps"
        return Fault(MachineFaultError, words, can_roll_back=False, is_good=True)

    def _spike(self, step: int, loss: float) -> Fault | None:
        """A loss far above those before it; it counts among them as one that is just no spike."""
        z_limit, before = self._config.spike_z, self._losses
        fault = None
        if z_limit is not None and len(before) >= min(FEWEST, before.maxlen or FEWEST):
            mean, deviation = statistics.fmean(before), statistics.stdev(before)
            deviation = max(deviation, LEAST_DEVIATION * abs(mean))
            z = (loss - mean) / deviation if deviation else 0.0
            if z > z_limit:
                words = (
                    f"step {step}: loss {loss:.4f} is {z:.1f} standard deviations above {mean:.4f}, the mean of "
                    f"{len(before)} steps"
                )
                logger.warning(words)
                self._event("spike", step=step, loss=loss, z=z)
                loss = mean + z_limit * deviation
                if self._config.on_spike == "roll_back":
                    fault = Fault(SpikeError, words, can_roll_back=True, is_good=False)
        before.append(loss)
        return fault
