"""What a call of a bird costs beside a call of a bare Ray actor: latency, rate of futures, rate of casts.

    python benchmarks/calls.py [--json FILE] [--rounds N] [--nodes N]

Claims measured, each against the same class in a bare actor on the same node: a call with an argument takes at most 1.05x the
latency (one packed argument is cheaper for Ray than a plain one, and pays for the rest), one without arguments at most 1.25x, and
1,000 calls in flight come back at 1.0x the rate or more.

All ways take turns within each round, in alternating order, and ratios are taken round by round, so that a noisy neighbour on the
machine hits all of them alike; medians and quartiles of the rounds are reported. Every way is warmed up by one call first: a route
that rested is looked at before it is used, and what that costs is measured by itself ("after a pause", without a target). All
results are checked: a call that got lost, ran twice, or came out of order ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported: a local cluster of our own, whatever this user's default
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of it for each actor that has no GPUs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import flock_ray

CALLS = 300  # one after another, in each way and round
BURST = 1_000  # in flight at once
PAUSE = 0.5  # seconds; above `lanes.FRESH`
NAME = "counter"


class Counter:
    """What both sides run."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, k: int) -> int:
        self.n += k
        return self.n

    def get(self) -> int:
        return self.n


@contextmanager
def local_cluster(nodes: int) -> Iterator[Cluster]:
    """A Ray cluster of this many raylets, and this process in it, of which nothing is left afterwards."""
    me = psutil.Process()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        started = me.children(recursive=True)
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            process.kill()


@contextmanager
def local_flock(nodes: int) -> Iterator[None]:
    """The flock of a cluster, with all its nests in view."""
    flock_ray.init()
    try:
        wait_until(lambda: len(flock_ray.nests()) == nodes, f"{nodes} nests are in view")
        yield
    finally:
        flock_ray.destroy()


def wait_until(condition: Callable[[], Any], what: str, deadline: float = 90.0) -> None:
    end = time.monotonic() + deadline
    while not (last := condition()):
        if time.monotonic() > end:
            raise SystemExit(f"not within {deadline:g} s: {what}; last seen {last!r}")
        time.sleep(0.02)  # between looks


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


Run = Callable[[], list[float]]  # seconds of each call, or of one call on average


@dataclass
class Trial:
    """One thing done in several ways, bare Ray's first. A target is for the ratio to bare Ray's."""

    name: str
    ways: dict[str, Run]
    target: float | None
    is_rate: bool = False
    samples: dict[str, list[list[float]]] = field(default_factory=dict)

    def round(self, number: int) -> None:
        ways = list(self.ways.items())
        for way, run in ways if number % 2 else reversed(ways):
            self.samples.setdefault(way, []).append(run())

    def result(self) -> dict[str, Any]:
        base = [median(each) for each in self.samples[next(iter(self.ways))]]
        return {"name": self.name, "is_rate": self.is_rate, "target": self.target, "ways": [self._way(way, base) for way in self.ways]}

    def _way(self, way: str, base: list[float]) -> dict[str, Any]:
        rounds = [median(each) for each in self.samples[way]]
        pairs = zip(rounds, base, strict=True)
        ratios = [ray_s / own if self.is_rate else own / ray_s for own, ray_s in pairs]
        row = {"way": way, "ratio": median(ratios), "quartiles": quantiles(ratios, n=4, method="inclusive")[::2], "ratios": ratios}
        if self.is_rate:
            return {**row, "calls_a_second": median(1 / each for each in rounds)}
        pooled = [one for each in self.samples[way] for one in each]
        p99 = quantiles(pooled, n=100)[98] if len(pooled) > 1 else pooled[0]
        return {**row, "microseconds": median(rounds) * 1e6, "p99_microseconds": p99 * 1e6}


def one_by_one(once: Callable[[], int], tally: Tally | None = None) -> Run:
    def run() -> list[float]:
        answers, times = [once()], []
        for _ in range(CALLS):
            begin = time.perf_counter()
            answer = once()
            times.append(time.perf_counter() - begin)
            answers.append(answer)
        if tally is not None:
            tally.expect(answers)
        return times

    return run


def in_flight(burst: Callable[[], list[int]], warm_up: Callable[[], int], tally: Tally) -> Run:
    def run() -> list[float]:
        tally.expect([warm_up()])
        begin = time.perf_counter()
        answers = burst()
        taken = time.perf_counter() - begin
        tally.expect(answers)
        return [taken / BURST]

    return run


def cast_away(casts: Callable[[], object], last: Callable[[], int], tally: Tally) -> Run:
    def run() -> list[float]:
        tally.expect([last()])
        begin = time.perf_counter()
        casts()
        answer = last()
        taken = time.perf_counter() - begin
        tally.expect([answer], quiet=BURST)
        return [taken / (BURST + 1)]

    return run


def after_pause(what: Callable[[], list[int]], tally: Tally) -> Run:
    def run() -> list[float]:
        time.sleep(PAUSE)
        begin = time.perf_counter()
        answers = what()
        taken = time.perf_counter() - begin
        tally.expect(answers)
        return [taken / len(answers)]

    return run


def trials(actor: Any, bird: Any) -> list[Trial]:
    mine, birds = Tally("the bare actor"), Tally("the bird")

    def ray_add() -> int:
        return ray.get(actor.add.remote(1))

    def ray_burst() -> list[int]:
        return ray.get([actor.add.remote(1) for _ in range(BURST)])

    def ray_casts() -> None:
        for _ in range(BURST):
            actor.add.remote(1)

    def bird_add() -> int:
        return bird.add(1)

    def bird_burst() -> list[int]:
        return [future.result() for future in [bird.add.future(1) for _ in range(BURST)]]

    def bird_casts() -> None:
        for _ in range(BURST):
            flock_ray.cast(NAME, "add", 1)

    with_argument: dict[str, Run] = {
        "ray.get(actor.add.remote(1))": one_by_one(ray_add, mine),
        'flock_ray.call(name, "add", 1)': one_by_one(lambda: flock_ray.call(NAME, "add", 1), birds),
        "bird.add(1)": one_by_one(bird_add, birds),
    }
    without: dict[str, Run] = {
        "ray.get(actor.get.remote())": one_by_one(lambda: ray.get(actor.get.remote())),
        "bird.get()": one_by_one(bird.get),
    }
    futures: dict[str, Run] = {
        "actor.add.remote(1), ray.get(refs)": in_flight(ray_burst, ray_add, mine),
        "bird.add.future(1), .result()": in_flight(bird_burst, bird_add, birds),
    }
    casts: dict[str, Run] = {
        "actor.add.remote(1), refs dropped": cast_away(ray_casts, ray_add, mine),
        'flock_ray.cast(name, "add", 1)': cast_away(bird_casts, bird_add, birds),
    }
    first: dict[str, Run] = {
        "ray.get(actor.add.remote(1))": after_pause(lambda: [ray_add()], mine),
        "bird.add(1)": after_pause(lambda: [bird_add()], birds),
    }
    first_burst: dict[str, Run] = {
        "actor.add.remote(1), ray.get(refs)": after_pause(ray_burst, mine),
        "bird.add.future(1), .result()": after_pause(bird_burst, birds),
    }
    return [
        Trial("one call at a time, one argument", with_argument, 1.05),
        Trial("one call at a time, without arguments", without, 1.25),
        Trial(f"{BURST:,} calls in flight", futures, 1.0, is_rate=True),
        Trial(f"{BURST:,} casts, and a call after them", casts, None, is_rate=True),
        Trial("the first call after a pause", first, None),
        Trial(f"{BURST:,} calls in flight after a pause", first_burst, None, is_rate=True),
    ]


def measure(nodes: int, rounds: int) -> list[dict[str, Any]]:
    with local_cluster(nodes), local_flock(nodes):
        bird = flock_ray.start(NAME, Counter)
        flock_ray.wait(bird)
        place = NodeAffinitySchedulingStrategy(flock_ray.where(bird), soft=False)
        actor = ray.remote(Counter).options(num_cpus=0, scheduling_strategy=place).remote()
        measured = trials(actor, bird)
        for trial in measured:
            trial.round(0)
            trial.samples.clear()  # the first round warms up
        for number in range(rounds):
            for trial in measured:
                trial.round(number)
    return [trial.result() for trial in measured]


def show(results: list[dict[str, Any]]) -> None:
    for trial in results:
        print(f"{trial['name']}:")
        for index, row in enumerate(trial["ways"]):
            if trial["is_rate"]:
                figure = f"{row['calls_a_second']:8,.0f}/s"
            else:
                figure = f"{row['microseconds']:8,.0f} us" + (f" (p99 {row['p99_microseconds']:6,.0f})" if trial["target"] else "")
            low, high = row["quartiles"]
            beside = f"{row['ratio']:.2f}x ({low:.2f} to {high:.2f})" if index else ""
            if index and trial["target"] is not None:
                sign = ">=" if trial["is_rate"] else "<="
                met = row["ratio"] >= trial["target"] if trial["is_rate"] else row["ratio"] <= trial["target"]
                beside += f", target {sign} {trial['target']:.2f}x: {'met' if met else 'MISSED'}"
            print(f"  {row['way']:<36}{figure}  {beside}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="raylets of the local cluster (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 2 or options.nodes < 1:
        parser.error("the medians want at least 2 rounds, and the cluster a node")
    results = measure(options.nodes, options.rounds)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps({"nodes": options.nodes, "rounds": options.rounds, "trials": results}))


if __name__ == "__main__":
    main()
