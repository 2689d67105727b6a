"""Many processes that call at a time, each an actor and birds of its own.

They are Ray actors, start before the clock does, and all call from one moment on for the same time: their rates add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import local  # noqa: F401  # first: it sets Ray's environment up
import ray
from counters import NAME, Counter, Tally, bare_actor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rounds import FLOCK, RAY, Run

import flock_ray

CALLERS = 8
IN_FLIGHT = 100  # of each of the callers
SPELL = 0.7  # seconds that all callers call
RELEASE = 0.2  # seconds ahead of their common start, for the order to reach them


class Caller:
    """A process that calls: one of many, each with an actor and birds of its own."""

    def __init__(self, actor: Any, birds: dict[str, Any]) -> None:
        def one_of_ray() -> list[int]:
            return [ray.get(actor.add.remote(1))]

        def many_of_ray() -> list[int]:
            return ray.get([actor.add.remote(1) for _ in range(IN_FLIGHT)])

        self._ways: dict[tuple[str, int], Callable[[], list[int]]] = {(RAY, 1): one_of_ray, (RAY, IN_FLIGHT): many_of_ray}
        self._tallies = {side: Tally(f"{side}, with one of many callers,") for side in [RAY, *birds]}
        for side, bird in birds.items():
            self._ways[side, 1] = lambda bird=bird: [bird.add(1)]
            self._ways[side, IN_FLIGHT] = lambda bird=bird: [future.result() for future in [bird.add.future(1) for _ in range(IN_FLIGHT)]]

    def warm_up(self, side: str) -> None:
        self._tallies[side].expect(self._ways[side, 1]())

    def call(self, side: str, in_flight: int, begin: float) -> float:
        """Calls from this moment on, by the machine's clock, for `SPELL` seconds. Returns calls a second."""
        calls, answers = self._ways[side, in_flight], []
        time.sleep(max(0.0, begin - time.time()))
        while (taken := time.time() - begin) < SPELL:
            answers += calls()
        self._tallies[side].expect(answers)
        return len(answers) / taken


class Crowd:
    """All callers: they start with the first trial that needs them."""

    def __init__(self, flocks: dict[str, flock_ray.Flock]) -> None:
        self._flocks = flocks
        self._callers: list[Any] = []

    def _start(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        for number in range(CALLERS):
            birds = {side: flock.start((NAME, number), Counter) for side, flock in self._flocks.items()}
            for side, flock in self._flocks.items():
                flock.wait(birds[side])
            actor = bare_actor(self._flocks[FLOCK], birds[FLOCK])
            caller = ray.remote(Caller).options(num_cpus=0, scheduling_strategy=here).remote(actor, birds)
            ray.get([caller.warm_up.remote(side) for side in [RAY, *birds]])
            self._callers.append(caller)

    def run(self, side: str, in_flight: int) -> Run:
        def run() -> list[float]:
            if not self._callers:
                self._start()
            ray.get([caller.warm_up.remote(side) for caller in self._callers])
            begin = time.time() + RELEASE
            rates = ray.get([caller.call.remote(side, in_flight, begin) for caller in self._callers])
            return [1 / sum(rates)]

        return run
