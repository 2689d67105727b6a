"""Light birds by the ten thousand: started, called, their node killed, another joined; beside bare Ray actors, and xoscar's.

    python benchmarks/light.py [--json FILE] [--png FILE] [--birds N] [--nodes N] [--rounds N]

Claims measured, of `--birds` light birds on `--nodes` nodes (100,000 on 4):

- `start_many` until each has answered a `call_many`: at least 20,000 birds a second. Beside it, in turn with it: bare detached actors
  until each has answered, and actors that xoscar creates in a pool.
- one more `start` when they are there: at most 1.3x the time of one when there are some hundred.
- `call_many` of all: at least 150,000 calls a second.
- a call of one: at most 0.15x the median of a bare actor's, in turn.
- what a bird of an empty class costs its process: at most 2.5 KB.
- a node is killed: all answer again within 5 s. The time until the others have noticed is given apart.
- a node joins: it gets at most 1.15x its ideal share, and no bird moves between old nodes.

The processes of light birds are up before: some birds are started first. With `--cold` the first round has no such birds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import local  # first: it sets Ray's environment up
import psutil
import ray
from oscar import local_pool

import flock_ray

ACTORS = 8  # bare actors a round: a second of CPU for two of them
OSCARS = 5_000  # xoscar's a round
CALLS = 2_000  # of one bird, a round
STARTS = 300  # one by one
WARM = 130  # birds on each node, so that it has all its processes
ANSWER = 300.0
SETTLES = 5.0  # seconds: the nests have told each other of all

LIGHT = flock_ray.options(light=True)


class Empty:
    """A bird of no content."""

    def here(self) -> None:
        """It answers."""


class Counting:
    """What is called."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, k: int) -> int:
        self.n += k
        return self.n


def seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def births(names: list[Any]) -> float:
    """Birds a second, until each has answered."""

    def run() -> None:
        LIGHT.start_many([(name, Empty) for name in names])
        flock_ray.call_many([(name, "here") for name in names], timeout=ANSWER)

    return len(names) / seconds(run)


def starts(what: str) -> float:
    """The median time of a start, in seconds, and leaves none of these birds."""
    names = [(what, n) for n in range(STARTS)]
    taken = median(seconds(partial(LIGHT.start, name, Empty)) for name in names)
    flock_ray.wait(names, timeout=ANSWER)
    flock_ray.stop_many(names)
    flock_ray.wait(names, "gone", timeout=ANSWER)
    return taken


def actors() -> float:
    """Bare actors a second, until each has answered."""
    made: list[Any] = []

    def run() -> None:
        made.extend(ray.remote(Empty).options(num_cpus=0, lifetime="detached").remote() for _ in range(ACTORS))
        ray.get([actor.here.remote() for actor in made])

    taken = seconds(run)
    for actor in made:
        ray.kill(actor)
    time.sleep(1.0)  # their processes end
    return ACTORS / taken


def one_call(bird: Any, actor: Any) -> dict[str, list[float]]:
    """Medians of a call of each, in turn."""
    times: dict[str, list[float]] = {"bird": [], "actor": []}
    for _ in range(5):
        times["bird"].append(median(seconds(lambda: bird.add(1)) for _ in range(CALLS // 5)))
        times["actor"].append(median(seconds(lambda: ray.get(actor.add.remote(1))) for _ in range(CALLS // 10)))
    return times


def hosts() -> list[psutil.Process]:
    """The processes of light birds."""
    found = []
    for process in psutil.process_iter():
        try:
            if "LightHostActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def memory() -> int:
    return sum(process.memory_info().rss for process in hosts())


def kill_a_node(cluster: Any, node: Any, names: list[Any], nodes: int) -> dict[str, float]:
    began = time.perf_counter()
    cluster.remove_node(node, allow_graceful=False)
    local.wait_until(lambda: len(flock_ray.nests()) == nodes - 1, "the others have noticed")
    noticed = time.perf_counter() - began
    flock_ray.call_many([(name, "here") for name in names], timeout=ANSWER, retry=True)
    return {"noticed": noticed, "all answer": time.perf_counter() - began}


def join_a_node(cluster: Any, names: list[Any], nodes: int) -> dict[str, float]:
    before = {info.name: info.node_id for info in flock_ray.birds()}
    began = time.perf_counter()
    node = cluster.add_node(num_cpus=1, object_store_memory=local.STORE)
    local.wait_until(lambda: len(flock_ray.nests()) == nodes + 1, "its nest")

    def settled() -> bool:
        infos = flock_ray.birds()
        return all(info.state == "running" for info in infos) and any(info.node_id == node.node_id for info in infos)

    time.sleep(1.0)  # the view settles
    local.wait_until(settled, "all run", 120.0)
    took = time.perf_counter() - began
    after = {info.name: info.node_id for info in flock_ray.birds()}
    moved = {name for name in names if after[name] != before[name]}
    astray = sum(after[name] != node.node_id for name in moved)
    share = len(moved) / len(names) * (nodes + 1)
    return {"seconds": took, "moved": len(moved), "of the ideal share": share, "between old nodes": astray}


def measure(nodes: int, birds: int, rounds: int, cold: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"birds": birds, "nodes": nodes, "births": [], "actors": [], "oscars": [], "calls": []}
    with local.cluster(nodes) as cluster, asyncio.Runner() as loop, local_pool(loop) as pool, local.flock(nodes):
        few = 0.0
        if not cold:
            warm = [("warm", n) for n in range(WARM * nodes)]
            LIGHT.start_many([(name, Empty) for name in warm])
            flock_ray.wait(warm, timeout=ANSWER)
        few = starts("few")
        names: list[Any] = []
        for number in range(rounds):
            if names:
                flock_ray.stop_many(names)
                flock_ray.wait(names, "gone", timeout=ANSWER)
            names = [(number, n) for n in range(birds)]
            before = memory()
            for side in sorted(("births", "actors", "oscars"), reverse=bool(number % 2)):
                if side == "births":
                    result[side].append(births(names))
                elif side == "actors":
                    result[side].append(actors())
                elif pool is not None:
                    result[side].append(pool.create(OSCARS))
            if not number:
                result["bytes of a bird"] = (memory() - before) / birds
                result["birds of a node"] = dict(Counter(info.node_id for info in flock_ray.birds()))
            calls = [(name, "here") for name in names]
            result["calls"] += [birds / seconds(partial(flock_ray.call_many, calls)) for _ in range(3)]
        time.sleep(SETTLES)
        if few:
            result["starts"] = {"few": few, "many": starts("many")}
        bird, actor = LIGHT.start("one", Counting), ray.remote(Counting).options(num_cpus=0).remote()
        bird.add(1), ray.get(actor.add.remote(1))
        result["one"] = one_call(bird, actor)
        flock_ray.stop(bird)
        victim = list(cluster.worker_nodes)[-1]
        result["kill"] = kill_a_node(cluster, victim, names, nodes)
        flock_ray.stop_many([info.name for info in flock_ray.birds() if info.name[0] == "warm"])
        result["join"] = join_a_node(cluster, names, nodes - 1)
    return result


def judged(result: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """What, its value, in what, its bound, and whether it is kept."""
    one = median(a / b for a, b in zip(result["one"]["bird"], result["one"]["actor"], strict=True))
    rows = []
    if "starts" in result:
        rows.append(("one more start, to one among few", result["starts"]["many"] / result["starts"]["few"], "x", 1.3, False))
    rows += [
        ("started until called", median(result["births"]), "birds/s", 20_000.0, True),
        ("call_many", median(result["calls"]), "calls/s", 150_000.0, True),
        ("a call of one, to a bare actor's", one, "x", 0.15, False),
        ("a bird of an empty class in its process", result["bytes of a bird"], "bytes", 2_500.0, False),
        ("a node is killed: all answer", result["kill"]["all answer"], "s", 5.0, False),
        ("a node joins: its share to the ideal", result["join"]["of the ideal share"], "x", 1.15, False),
        ("a node joins: birds moved between old nodes", result["join"]["between old nodes"], "birds", 0.0, False),
    ]
    return [(what, value, unit, bound, value >= bound if least else value <= bound) for what, value, unit, bound, least in rows]


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rates = {
        "bare Ray actors": median(result["actors"]),
        "Flock (1,000)": 64.0,
        "Horde (10,000)": 456.0,
        "Horde (1,000)": 857.0,
        **({"xoscar, in a pool": median(result["oscars"])} if result["oscars"] else {}),
        f"flock_ray ({result['birds']:,})": median(result["births"]),
    }
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    bars = axes.barh(list(rates), list(rates.values()), color=["#999999"] * (len(rates) - 1) + ["#2a6f97"])
    axes.set_xscale("log")
    axes.bar_label(bars, [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" for rate in rates.values()], padding=3)
    axes.set_xlim(right=max(rates.values()) * 6)
    axes.set_xlabel("started and answering, a second (log scale)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--png", metavar="FILE", help="draw the rates of starting into this file (needs matplotlib)")
    parser.add_argument("--birds", type=int, default=100_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="raylets of the local cluster (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--cold", action="store_true", help="no process of light birds is there in the first round")
    options = parser.parse_args()
    result = measure(options.nodes, options.birds, options.rounds, options.cold)
    births, bare = median(result["births"]), median(result["actors"])
    print(f"{options.birds:,} light birds on {options.nodes} nodes:")
    for what, value, unit, bound, met in judged(result):
        print(f"  {what:<46}{value:12,.3f} {unit:<8} target {bound:g}: {'met' if met else 'MISSED'}")
    print(f"  to bare actors ({bare:.2f}/s): {births / bare:,.0f}x")
    if result["oscars"]:
        print(f"  to xoscar creating actors in a pool ({median(result['oscars']):,.0f}/s): {births / median(result['oscars']):.2f}x")
    print(f"  the death of a node was noticed after {result['kill']['noticed']:.2f} s")
    print(f"  birds of a node that joined ran after {result['join']['seconds']:.1f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    if options.png:
        plot(result, options.png)


if __name__ == "__main__":
    main()
