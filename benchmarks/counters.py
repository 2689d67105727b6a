"""What all sides of the benchmarks of calls run, and how its answers are checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import local  # noqa: F401  # first: it sets Ray's environment up
import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import flock_ray

NAME = "counter"


class Counter:
    """What all sides run."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, k: int) -> int:
        self.n += k
        return self.n

    def get(self) -> int:
        return self.n

    def size(self, array: np.ndarray) -> int:
        return array.size

    def upto(self, n: int) -> Iterator[int]:
        for item in range(n):  # noqa: UP028  # Ray sends values into the generator, and a range takes none
            yield item


class Tally:
    """A counter that was told to count, and how far it must have come: that nothing was lost, doubled, or disordered."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.n = 0

    def expect(self, answers: list[int], quiet: int = 0) -> None:
        """Takes the answers to calls of `add(1)` in their order, after `quiet` casts of it."""
        right = list(range(self.n + quiet + 1, self.n + quiet + len(answers) + 1))
        if answers != right:
            raise SystemExit(f"{self.who} answered {answers[:3]} ... {answers[-3:]}, not {right[:3]} ... {right[-3:]}")
        self.n += quiet + len(answers)


def bare_actor(flock: flock_ray.Flock, bird: Any) -> Any:
    """The bird's twin, on the same node."""
    place = NodeAffinitySchedulingStrategy(flock.where(bird), soft=False)
    return ray.remote(Counter).options(num_cpus=0, scheduling_strategy=place).remote()
