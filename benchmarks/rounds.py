"""One thing done in several ways that take turns, and what comes of it: ratios, targets, a table.

All ways take turns within each round, in alternating order, and ratios are taken round by round, so that a noisy neighbour on the
machine hits all of them alike; medians and quartiles of the rounds are reported. The first way is the one to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Literal

Run = Callable[[], list[float]]  # seconds of each call, or of one call on average
Figure = Literal["median", "p99", "rate"]

RAY, XOSCAR, FLOCK, BY_RAY = "bare Ray", "xoscar", "flock_ray", "flock by Ray"


@dataclass(frozen=True)
class Way:
    """How one side does it."""

    side: str
    text: str
    run: Run


@dataclass(frozen=True)
class Target:
    """A bound for all of `FLOCK`'s ways: from above for times, from below for rates.

    Args:
        limit: of the ratio to the other side's figure; microseconds if there is no other side.
        beside: the other side.
    """

    limit: float
    figure: Figure
    beside: str | None = RAY

    def __str__(self) -> str:
        bound = f"{'>=' if self.figure == 'rate' else '<='} {self.limit:g}"
        return f"{self.figure} {bound}x {self.beside}'s" if self.beside else f"{self.figure} {bound} us"

    def judge(self, own: list[float], others: dict[str, list[float]]) -> dict[str, Any] | None:
        """What came of it, of the figures of each round; `None` if the other side did not run."""
        if self.beside is None:
            value, low, high = median(own) * 1e6, *(each * 1e6 for each in quartiles(own))
        elif self.beside in others:
            each = ratios(own, others[self.beside])
            value, (low, high) = median(each), quartiles(each)
        else:
            return None
        met = value >= self.limit if self.figure == "rate" else value <= self.limit
        return {"target": str(self), "limit": self.limit, "value": value, "quartiles": [low, high], "met": met}


def ratios(own: list[float], other: list[float]) -> list[float]:
    """Round by round."""
    return [mine / theirs for mine, theirs in zip(own, other, strict=True)]


def quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive")[::2]


def p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else values[0]


_OF_A_ROUND: dict[Figure, Callable[[list[float]], float]] = {"median": median, "p99": p99, "rate": lambda times: 1 / median(times)}


@dataclass
class Trial:
    """One thing done in several ways."""

    name: str
    ways: list[Way]
    targets: tuple[Target, ...] = ()
    is_rate: bool = False
    samples: dict[Way, list[list[float]]] = field(default_factory=dict)

    def round(self, number: int) -> None:
        for way in self.ways if number % 2 else reversed(self.ways):
            self.samples.setdefault(way, []).append(way.run())

    def result(self) -> dict[str, Any]:
        return {"name": self.name, "is_rate": self.is_rate, "ways": [self._way(way) for way in self.ways]}

    def _way(self, way: Way) -> dict[str, Any]:
        own = self._rounds(way, self._main)
        base = self._rounds(self.ways[0], self._main)
        each = ratios(own, base)
        row: dict[str, Any] = {"side": way.side, "way": way.text, "ratio": median(each), "quartiles": quartiles(each), "ratios": each}
        if self.is_rate:
            row["calls_a_second"] = median(own)
        else:
            pooled = [one for times in self.samples[way] for one in times]
            row |= {"microseconds": median(own) * 1e6, "p99_microseconds": p99(pooled) * 1e6}
        row["targets"] = [judged for judged in (self._judge(target, way) for target in self.targets) if judged]
        return row

    @property
    def _main(self) -> Figure:
        return "rate" if self.is_rate else "median"

    def _rounds(self, way: Way, figure: Figure) -> list[float]:
        return [_OF_A_ROUND[figure](times) for times in self.samples[way]]

    def _judge(self, target: Target, way: Way) -> dict[str, Any] | None:
        if way.side != FLOCK:
            return None
        first_of_sides = {other.side: self._rounds(other, target.figure) for other in reversed(self.ways)}
        return target.judge(self._rounds(way, target.figure), first_of_sides)


def show(results: list[dict[str, Any]]) -> None:
    for trial in results:
        print(f"{trial['name']}:")
        for index, row in enumerate(trial["ways"]):
            if trial["is_rate"]:
                rate = row["calls_a_second"]
                figure = f"{rate:10,.{0 if rate >= 100 else 2}f}/s"
            else:
                figure = f"{row['microseconds']:8,.0f} us (p99 {row['p99_microseconds']:6,.0f})"
            low, high = row["quartiles"]
            beside = f"{row['ratio']:.2f}x ({low:.2f} to {high:.2f})" if index else ""
            print(f"  {row['side']:<13}{row['way']:<46}{figure}  {beside}".rstrip())
            for judged in row["targets"]:
                low, high = judged["quartiles"]
                value = f"{judged['value']:.3g} ({low:.3g} to {high:.3g})"
                print(f"  {'':<13}  target {judged['target']}: {value}, {'met' if judged['met'] else 'MISSED'}")
        print()
