"""Seconds by what they are for."""

from collections.abc import Iterator


class Parts(dict[str, float]):
    """Names and seconds, which add up."""

    def __add__(self, other: "Parts") -> "Parts":
        """The sums of both, name by name."""
        return Parts({name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}})

    def __mul__(self, factor: float) -> "Parts":
        """All of it `factor` times."""
        return Parts({name: factor * seconds for name, seconds in self.items()})

    def total(self) -> float:
        """All seconds."""
        return sum(self.values())

    def largest_first(self) -> Iterator[tuple[str, float]]:
        """The parts that take any time."""
        return iter(sorted(((n, s) for n, s in self.items() if s > 0), key=lambda part: -part[1]))
