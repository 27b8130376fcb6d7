"""Numbers on their way into a figure: scales, ticks, short names of numbers, and curves of fewer points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SMOOTHING = 100  # steps over which a curve is averaged, at most; a tenth of a shorter run


@dataclass(frozen=True)
class Scale:
    """An axis: the numbers from `low` to `high` on a line of `length` units."""

    low: float
    high: float
    length: float
    log: bool = False
    down: bool = False  # the larger number has the smaller coordinate, as on a y axis

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        """Coordinates of values; NaN where one has no place on the axis."""
        values = np.asarray(values, np.float64)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0, np.log(np.where(values > 0, values, 1)), np.nan)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = (values - low) / (high - low)
        return self.length * (1 - share if self.down else share)

    def ticks(self, most: int) -> list[float]:
        """About `most` round numbers on the axis."""
        if self.log:
            return log_ticks(self.low, self.high, most)
        step = round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, also times 2 and 5 where they are few, or every second, third, ... where they are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    found = found[:: math.ceil(len(found) / most)]
    return found if len(found) > 1 else [low, high]


def scale_over(
    values: np.ndarray, length: float, *, log: bool = False, zero: bool = False, down: bool = True
) -> tuple[Scale, bool]:
    """A scale on which the usual values fill the figure, and whether some are above it.

    The largest 3 in 100, or the largest, are unusual if they reach more than twice as far from the least as all else.
    `zero`: the axis begins at 0.
    """
    values = np.asarray(values, np.float64)
    good = values[np.isfinite(values) & (values > 0 if log else True)]
    if not good.size:
        return Scale(0.1 if log else 0.0, 1.0, length, log, down), False
    low, high = float(good.min()), float(good.max())
    if log:
        low, high = (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
        return Scale(low, high, length, True, down), False
    low = min(0.0, low) if zero else low
    usual = float(np.sort(good)[-1 - max(1, good.size // 33)]) if good.size >= 20 else high
    cut = high - low > 2 * (usual - low) > 0
    top = usual + 0.15 * (usual - low) if cut else high
    flat = top - low <= 1e-9 * abs(top)  # but for rounding
    room = (0.1 * abs(top) or 1.0) if flat else 0.05 * (top - low)
    return Scale(low if zero and low == 0 else low - room, top + room, length, False, down), bool(cut)


def short(value: float) -> str:
    """A number in few letters: 12.3k, 0.0457, 3.2e-05."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.3g}{letter}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"


def tick_names(ticks: Sequence[float]) -> list[str]:
    """The ticks of an axis, with as many digits as tell them apart."""
    for digits in (3, 4, 5, 6):
        names = [_tick(tick, digits) for tick in ticks]
        if len(set(names)) == len(names):
            break
    return names


def _tick(value: float, digits: int) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else unit):
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{max(digits, 4)}g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the steps around each, half of them on either side where there are as many; NaN is left out."""
    half = min(SMOOTHING, len(values) // 10) // 2
    good = np.isfinite(values)
    totals = np.cumsum(np.concatenate([np.zeros(1), np.where(good, values, 0)]))
    counts = np.cumsum(np.concatenate([np.zeros(1), good]))
    here = np.arange(len(values))
    first, last = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (totals[last] - totals[first]) / (counts[last] - counts[first])


def thinned(values: np.ndarray, buckets: int) -> np.ndarray:
    """Indices of at most two values from each of so many equal parts: its least and its greatest; ascending.

    The first and the last value are always there. A part in which all are NaN leaves one of them, which shows as a gap.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for first, last in _parts(len(values), buckets):
        part = values[first:last]
        if np.isfinite(part).any():
            kept |= {first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}
        else:
            kept.add(first)
    return np.array(sorted(kept))


def reduced(values: np.ndarray, buckets: int, how: np.ufunc) -> np.ndarray:
    """The values along the first dim, in at most so many equal parts, each reduced to one by `how`, as `np.fmax`."""
    if len(values) <= buckets:
        return values
    return how.reduceat(values, [first for first, _ in _parts(len(values), buckets)], axis=0)


def _parts(count: int, buckets: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, count, buckets + 1).astype(int)
    return [(int(first), int(last)) for first, last in pairwise(edges) if last > first]
