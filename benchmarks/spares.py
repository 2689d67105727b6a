"""How soon a bird answers that takes a spare, beside a bare Ray actor that is started cold.

    python benchmarks/spares.py [--json FILE] [--rounds N]

Claim measured: a bird with a process of its own, for which a spare is ready, has answered its first call after at most 0.1x the time that a
bare detached actor of the same class takes. A bird of a second flock in the cluster, which keeps no spares, shows what it saves.

All take turns within each round, in alternating order; before each of them the machine rests until the spare is there and what the one
before has left behind is gone. Medians and quartiles of the rounds are reported, and ratios are taken round by round.
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
import ray

import flock_ray
from flock_ray.runtime import cluster

TARGET = 0.1
REST = 4.0  # seconds: a host that was stopped has gone, and another spare is started


class Idler:
    """What all sides run."""

    def answer(self) -> int:
        return 42


def of_flock(flock: flock_ray.Flock, spares: int) -> Callable[[str], float]:
    def start(name: str) -> float:
        ready(flock.name, spares)
        begin = time.perf_counter()
        if flock.start(name, Idler).answer() != 42:
            raise SystemExit("a wrong answer")
        taken = time.perf_counter() - begin
        flock.stop(name)
        return taken

    return start


def ready(flock: str, spares: int) -> None:
    """Waits until so many hosts wait for a bird, and no other is there. Each leaves a file with its pid."""
    folder = cluster.session_directory(cluster.flock_life(flock).life)
    local.wait_until(lambda: len(list(folder.glob("*.json"))) == spares, f"{spares} spares of flock {flock!r}")
    time.sleep(1.0)  # until it has said that it is up


def actor(name: str) -> float:
    begin = time.perf_counter()
    started = ray.remote(Idler).options(name=name, lifetime="detached", num_cpus=0).remote()
    if ray.get(started.answer.remote()) != 42:
        raise SystemExit("a wrong answer")
    taken = time.perf_counter() - begin
    ray.kill(started)
    return taken


def measure(rounds: int) -> dict[str, Any]:
    with local.cluster(1), local.flock(1, spares=1) as ahead, local.flock(1, "cold") as cold:
        sides = {"actor": actor, "spare": of_flock(ahead, 1), "cold": of_flock(cold, 0)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side in sorted(sides, reverse=bool(number % 2)):
                time.sleep(REST)
                taken = sides[side](f"{side}/{number}")
                if number:  # the first round warms up
                    times[side].append(taken)
    ratios = {side: [one / bare for one, bare in zip(times[side], times["actor"], strict=True)] for side in ("spare", "cold")}
    return {
        "seconds": {side: median(each) for side, each in times.items()},
        "ratios": {side: [median(each), *quantiles(each, n=4, method="inclusive")[::2]] for side, each in ratios.items()},
        "target": TARGET,
        "rounds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("the medians want at least 2 rounds")
    result = measure(options.rounds)
    seconds = result["seconds"]
    print("one start until its first answer:")
    print(f"  bare actor, cold        {seconds['actor'] * 1e3:7.0f} ms")
    for side, what in (("spare", "bird, spare ready "), ("cold", "bird, no spare    ")):
        middle, low, high = result["ratios"][side]
        verdict = "" if side == "cold" else f", target <= {TARGET}x: {'met' if middle <= TARGET else 'MISSED'}"
        print(f"  {what}      {seconds[side] * 1e3:7.0f} ms  {middle:.3f}x ({low:.3f} to {high:.3f}){verdict}")
    if options.json:
        Path(options.json).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
