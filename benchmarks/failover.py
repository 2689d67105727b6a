"""How soon the birds of a killed node answer elsewhere, beside a Ray actor that was on the same node.

    python benchmarks/failover.py [--json FILE] [--rounds N] [--birds N]

Claim measured: after `kill -9` of a raylet, and with it of all its workers, the first of the node's birds with a process of its own answers
elsewhere after at most 0.25x the time that Ray needs for an actor with `soft=True` node affinity and `max_restarts=-1`. When the last one
answers is reported too, and when the first of the light birds does.

Each round adds a node, waits until it has its share of the birds and an actor, and kills it. Medians of the rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import local  # first: it sets Ray's environment up
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import flock_ray

TARGET = 0.25
NODES = 3  # beside the one that is killed
DEADLINE = 120.0


class Idler:
    """What all sides run."""

    def where(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def on_node(node: str, names: list[str]) -> list[str]:
    return [info.name for info in flock_ray.birds() if info.node_id == node and info.state == "running" and info.name in set(names)]


def answers(ask: Callable[[], str], node: str, began: float, times: list[float]) -> threading.Thread:
    """Asks again and again, in a thread, until the answer comes from another node; notes when that was."""

    def run() -> None:
        while time.perf_counter() - began < DEADLINE:
            try:
                if ask() != node:
                    times.append(time.perf_counter() - began)
                    return
            except (ray.exceptions.RayError, flock_ray.FlockError, TimeoutError):
                time.sleep(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def actor_on(node: str) -> Any:
    """A Ray actor on this node, which Ray starts anew elsewhere. With soft affinity it may begin elsewhere too, while the node is new."""
    pinned = NodeAffinitySchedulingStrategy(node, soft=True)
    for _ in range(20):
        actor = ray.remote(Idler).options(num_cpus=0, max_restarts=-1, scheduling_strategy=pinned).remote()
        if ray.get(actor.where.remote()) == node:
            return actor
        ray.kill(actor)
    raise SystemExit("Ray puts the actor on other nodes")


def once(cluster: Any, own: list[str], light: list[str]) -> dict[str, float]:
    """Kills a node; seconds until what was on it answers from another."""
    node = cluster.add_node(num_cpus=2, object_store_memory=local.STORE)
    local.wait_until(lambda: len(flock_ray.nests()) == NODES + 1, "its nest")
    local.wait_until(lambda: on_node(node.node_id, own) and on_node(node.node_id, light), "its share of the birds")
    time.sleep(3.0)  # the moves are over
    mine, mine_light = on_node(node.node_id, own), on_node(node.node_id, light)
    actor = actor_on(node.node_id)
    times: dict[str, list[float]] = {"actor": [], "own": [], "light": []}
    began = time.perf_counter()
    cluster.remove_node(node, allow_graceful=False)
    asked = [answers(lambda: str(ray.get(actor.where.remote(), timeout=5)), node.node_id, began, times["actor"])]
    for kind, names in (("own", mine), ("light", mine_light[:20])):
        asked += [answers(partial(ask, name), node.node_id, began, times[kind]) for name in names]
    for thread in asked:
        thread.join()
    ray.kill(actor)
    local.wait_until(lambda: len(flock_ray.nests()) == NODES, "as before")
    return {
        "actor": times["actor"][0], "own": min(times["own"]), "own, the last": max(times["own"]), "own birds": len(mine),
        "light": min(times["light"]), "light, the last": max(times["light"]),
    }  # fmt: skip


def ask(name: str) -> str:
    return str(flock_ray.bird(name).where.options(timeout=5, retry=True)())


def measure(rounds: int, birds: int) -> dict[str, Any]:
    with local.cluster(NODES) as cluster, local.flock(NODES, spares=1):
        own, light = [f"own/{n}" for n in range(birds)], [f"light/{n}" for n in range(200)]
        for name in own:
            flock_ray.start(name, Idler)
        flock_ray.options(light=True).start_many([(name, Idler) for name in light])
        flock_ray.wait([*own, *light], timeout=DEADLINE)
        each = [once(cluster, own, light) for _ in range(rounds)]
    ratios = [one["own"] / one["actor"] for one in each]
    return {
        "seconds": {key: median(one[key] for one in each) for key in each[0]},
        "ratio": median(ratios),
        "target": TARGET,
        "rounds": each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--birds", type=int, default=16, help="with processes of their own")
    given = parser.parse_args()
    figures = measure(given.rounds, given.birds)
    for key, value in figures["seconds"].items():
        print(f"{key:16} {value:8.2f}")
    print(f"first bird to Ray's actor: {figures['ratio']:.2f} (at most {TARGET})")
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
