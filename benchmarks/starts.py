"""How long birds take from `start` to their first answer, beside bare Ray actors that are placed by hand.

    python benchmarks/starts.py [--json FILE] [--birds N] [--nodes N] [--rounds N]

Claim measured: a burst of birds has answered after at most 1.15x the time that as many bare detached actors of the same class take,
pinned to the same number of nodes in turn. Both are a new process each, which is most of the time; what flock_ray adds (a set that
is replicated, a barrier between the nests, one more hop to the process) has to fit into the rest. The flock is up before.

Birds and actors take turns within each round, in alternating order, and the processes of one must be gone before the other starts:
medians and quartiles of the rounds are reported, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import local  # first: it sets Ray's environment up
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import flock_ray

TARGET = 1.15
ANSWER = 300.0  # seconds a bird may take to answer: many processes start at once


class Idler:
    """What both sides run."""

    def pid(self) -> int:
        import os

        return os.getpid()


def start_birds(names: list[str]) -> tuple[float, list[int]]:
    """Returns the seconds until all have answered, and their processes, which are then gone again."""
    begin = time.perf_counter()
    birds = [flock_ray.start(name, Idler) for name in names]
    asked = [bird.pid.options(timeout=ANSWER).future() for bird in birds]
    pids = [future.result() for future in asked]
    taken = time.perf_counter() - begin
    for name in names:
        flock_ray.stop(name)
    flock_ray.wait(names, "gone", timeout=ANSWER)
    return taken, pids


def start_actors(names: list[str]) -> tuple[float, list[int]]:
    nodes = sorted(row["NodeID"] for row in ray.nodes() if row["Alive"])
    begin = time.perf_counter()
    actors = []
    for number, name in enumerate(names):
        place = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)
        actors.append(ray.remote(Idler).options(name=name, lifetime="detached", num_cpus=0, scheduling_strategy=place).remote())
    pids = ray.get([actor.pid.remote() for actor in actors])
    taken = time.perf_counter() - begin
    for actor in actors:
        ray.kill(actor)
    return taken, pids


def rest(pids: list[int]) -> None:
    """Waits until the processes are gone, and what they leave behind them has been cleared up."""
    if len(set(pids)) != len(pids):
        raise SystemExit(f"{len(pids)} starts have made {len(set(pids))} processes")
    local.wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"all of {len(pids)} processes are gone")
    time.sleep(1.0)


def measure(nodes: int, birds: int, rounds: int) -> dict[str, Any]:
    sides: dict[str, Callable[[list[str]], tuple[float, list[int]]]] = {"actors": start_actors, "birds": start_birds}
    times: dict[str, list[float]] = {side: [] for side in sides}
    with local.cluster(nodes), local.flock(nodes):
        for number in range(rounds + 1):
            for side in sorted(sides, reverse=bool(number % 2)):
                taken, pids = sides[side]([f"{side}/{number}/{index}" for index in range(birds if number else nodes)])
                rest(pids)
                if number:  # the first round, a small one, warms up
                    times[side].append(taken)
    ratios = [bird / actor for bird, actor in zip(times["birds"], times["actors"], strict=True)]
    return {
        "nodes": nodes,
        "birds": birds,
        "seconds": {side: median(each) for side, each in times.items()},
        "ratio": median(ratios),
        "quartiles": quantiles(ratios, n=4, method="inclusive")[::2],
        "target": TARGET,
        "rounds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--birds", type=int, default=16, metavar="N", help="started at once (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="raylets of the local cluster (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 2 or options.nodes < 1 or options.birds < 1:
        parser.error("the medians want at least 2 rounds, and these a node and a bird")
    result = measure(options.nodes, options.birds, options.rounds)
    low, high = result["quartiles"]
    print(f"{options.birds} starts on {options.nodes} nodes until all have answered:")
    print(f"  bare actors  {result['seconds']['actors']:6.2f} s")
    verdict = "met" if result["ratio"] <= TARGET else "MISSED"
    ratio = f"{result['ratio']:.2f}x ({low:.2f} to {high:.2f})"
    print(f"  birds        {result['seconds']['birds']:6.2f} s  {ratio}, target <= {TARGET}x: {verdict}")
    if options.json:
        Path(options.json).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
