"""Starts, stops, calls and node changes for minutes on end: does the memory of nests and hosts level off?

    python benchmarks/soak.py [--minutes N] [--birds N] [--nodes N] [--json FILE] [--png FILE]

A flock of about `--birds` light birds is kept busy: in each turn a tenth of them is stopped and as many are started under new names, all
are called and cast to, and some are streamed from. Every minute a node is killed, and another joins half a minute later. After each
half minute the memory of every nest and of every process of light birds is noted, by the private bytes that only it has.

Claim measured: the median process of each kind has at most 5 % more in the last quarter of the time than in the third.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import local  # first: it sets Ray's environment up
import psutil

import flock_ray

GROWTH = 1.05
LIGHT = flock_ray.options(light=True)


class Busy:
    """A bird with something to remember."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen: list[int] = []

    def add(self, k: int) -> int:
        self.n += k
        self.seen = [*self.seen[-9:], k]
        return self.n

    def last(self) -> Iterator[int]:
        yield from self.seen


def memory() -> dict[str, list[int]]:
    """The private bytes of nests and of processes of light birds."""
    found: dict[str, list[int]] = {"nests": [], "hosts": []}
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            kind = "nests" if "NestActor" in line else "hosts" if "LightHostActor" in line else ""
            if kind:
                found[kind].append(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return found


def turn(number: int, names: list[Any], tenth: int) -> int:
    """One round of work. Returns how many things were done."""
    old, new = names[:tenth], [("bird", number, n) for n in range(tenth)]
    flock_ray.stop_many(old, return_exceptions=True)
    LIGHT.start_many([(name, Busy, (number,)) for name in new])
    del names[:tenth]
    names += new
    answers = flock_ray.call_many([(name, "add", (number,)) for name in names], timeout=120, retry=True, return_exceptions=True)
    wrong = [answer for answer in answers if isinstance(answer, BaseException)]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(answers)} calls failed, the first with {wrong[0]!r}")
    flock_ray.cast_many([(name, "add", (0,)) for name in names])
    for name in names[:10]:
        try:
            list(flock_ray.stream(name, "last", timeout=60))
        except flock_ray.BirdUnavailable:  # its node was killed in the middle
            continue
    return 2 * len(names) + 2 * tenth


def measure(nodes: int, birds: int, minutes: float) -> dict[str, Any]:
    samples: list[dict[str, Any]] = []
    done = 0
    with local.cluster(nodes) as cluster, local.flock(nodes):
        names: list[Any] = [("first", n) for n in range(birds)]
        LIGHT.start_many([(name, Busy, (0,)) for name in names])
        flock_ray.wait(names, timeout=300)
        began, half_minutes, number = time.monotonic(), 0, 0
        while time.monotonic() - began < minutes * 60:
            number += 1
            done += turn(number, names, birds // 10)
            if time.monotonic() - began < (half_minutes + 1) * 30:
                continue
            half_minutes += 1
            samples.append({"seconds": time.monotonic() - began, "birds": flock_ray.count(), "done": done, **memory()})
            print(f"{samples[-1]['seconds']:6.0f} s: {done:,} done, {_text(samples[-1])}", flush=True)
            if half_minutes % 2:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            else:
                cluster.add_node(num_cpus=1, object_store_memory=local.STORE)
    return {"nodes": nodes, "birds": birds, "minutes": minutes, "samples": samples, "growth": growth(samples)}


def _text(sample: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {median(sample[kind]) / 1e6:.0f} MB" for kind in ("nests", "hosts") if sample[kind])


def growth(samples: list[dict[str, Any]]) -> dict[str, float]:
    """How the median process of the last quarter compares with that of the third, at the same size of the cluster."""
    even = samples[1::2]
    third, fourth = even[len(even) // 2 : 3 * len(even) // 4], even[3 * len(even) // 4 :]
    return {
        kind: median(median(one[kind]) for one in fourth) / median(median(one[kind]) for one in third)
        for kind in ("nests", "hosts")
        if third and fourth
    }


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    minutes = [sample["seconds"] / 60 for sample in result["samples"]]
    for kind, colour in (("nests", "#2a6f97"), ("hosts", "#e07a5f")):
        axes.plot(minutes, [median(sample[kind]) / 1e6 for sample in result["samples"]], color=colour, label=f"{kind} (median)")
        axes.plot(minutes, [max(sample[kind]) / 1e6 for sample in result["samples"]], color=colour, alpha=0.4, label=f"{kind} (largest)")
    axes.set(xlabel="minutes", ylabel="private memory of a process, MB", ylim=(0, None))
    axes.legend(ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="default: %(default)s")
    parser.add_argument("--birds", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="raylets of the local cluster (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples to this file")
    parser.add_argument("--png", metavar="FILE", help="draw the memory into this file (needs matplotlib)")
    options = parser.parse_args()
    result = measure(options.nodes, options.birds, options.minutes)
    for kind, factor in result["growth"].items():
        print(f"{kind}: {factor:.3f}x from the third quarter to the last, target <= {GROWTH}x: {'met' if factor <= GROWTH else 'MISSED'}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    if options.png:
        plot(result, options.png)


if __name__ == "__main__":
    main()
