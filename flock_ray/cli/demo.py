"""Flock's demo, on Ray: names on a real local cluster of several raylets, a node's death, a node's joining, a crash, an exit.

Every step checks what it claims against the ring, and ends the run with a clear sentence and status 1 if it is not so. It is
`flock-ray demo`; in a checkout `scripts/demo` sets up all that needs. Bars on a terminal, plain lines elsewhere; Ctrl-C cleans up.
As scripts/on_cluster.py, for `ray submit` and `ray job submit`, it runs on the cluster that is there, and kills no node of it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

if not any(given.startswith("--address") for given in sys.argv):  # a cluster that is there has its own
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import psutil
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import flock_ray
from flock_ray.core.ring import ring_from

console = Console(highlight=False, soft_wrap=True)


class Chirper:
    """A bird that chirps every ten seconds and says where it is. It hands its count of chirps over when it moves."""

    def __init__(self) -> None:
        self.chirps = 0
        flock_ray.send_after(10, "chirp")

    def chirp(self) -> int:
        self.chirps += 1
        flock_ray.send_after(10, "chirp")
        return self.chirps

    def where_are_you(self) -> str:
        return flock_ray.me().node_id

    def how_many(self) -> int:
        return self.chirps

    def stumble(self) -> None:
        raise RuntimeError("I flew into a window")

    def retire(self) -> None:
        flock_ray.leave("normal", reply="goodbye")

    def hand_over(self) -> int:
        return self.chirps

    def take_over(self, chirps: int) -> None:
        self.chirps = chirps


class Broken(Exception):
    """A claim of the demo does not hold."""


def claim(holds: bool, text: str) -> None:
    if not holds:
        raise Broken(text)


def waiting(text: str, total: int, count: Callable[[], int], deadline: float = 90.0) -> float:
    """Waits, with a bar on a terminal, until `count` has reached `total`. Returns the seconds it took."""
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(f"{text} ...")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        while (done := count()) < total:
            progress.update(task, completed=done)
            if time.monotonic() - began > deadline:
                raise Broken(f"{text}: {done} of {total} after {deadline:g} s")
            time.sleep(0.05)
    return time.monotonic() - began


def short(node: str) -> str:
    return node[:8]


def owners(names: list[str]) -> dict[str, str]:
    """Where the ring of the nests' view puts the names."""
    ring = ring_from(tuple(sorted((nest.node_id, nest.weight) for nest in flock_ray.nests())))
    return {name: ring.owner(name) or "" for name in names}


def settled(names: list[str]) -> Callable[[], int]:
    """How many birds run where the ring puts them."""

    def count() -> int:
        target = owners(names)
        return sum(info.state == "running" and info.node_id == target.get(info.name) for info in flock_ray.birds())

    return count


def replies(names: list[str], show: bool = True) -> dict[str, str]:
    places = {name: flock_ray.call(name, "where_are_you", timeout=60) for name in names}
    expected = owners(names)
    for name, place in places.items():
        claim(place == expected[name], f"bird {name} answers from {short(place)}, but the ring puts it on {short(expected[name])}")
        if show:
            console.print(f"bird {name} replied {short(place)}")
    return places


def loads(places: dict[str, str]) -> None:
    for nest in flock_ray.nests():
        held = sum(place == nest.node_id for place in places.values())
        claim(nest.birds == held, f"nest {short(nest.node_id)} counts {nest.birds} birds, {held} answered from it")
        console.print(f"nest {short(nest.node_id)} has {100 * held / len(places):.1f} % of the load ({held} out of {len(places)})")


class Show:
    """The demo's steps."""

    def __init__(self, names: list[str], light: bool) -> None:
        self.names, self.light = names, light

    def start(self, nodes: int) -> dict[str, str]:
        flock_ray.init()
        console.rule("birds start")
        waiting("nests", nodes, lambda: len(flock_ray.nests()))
        starter = flock_ray.options(on_error="crash", light=self.light)
        starter.start_many([(name, Chirper) for name in self.names], progress=console.is_terminal)
        took = waiting("birds", len(self.names), settled(self.names))
        places = replies(self.names)
        console.print(f"{len(self.names)} birds answered {took:.1f} s after they were started")
        loads(places)
        return places

    def kill(self, places: dict[str, str], cluster: Cluster, workers: list[Any]) -> dict[str, str]:
        console.rule("a node is killed")
        counts = {node.node_id: sum(place == node.node_id for place in places.values()) for node in workers}
        victim = max(workers, key=lambda node: counts[node.node_id])
        lost = [name for name, place in places.items() if place == victim.node_id]
        nests = len(flock_ray.nests())
        began = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        console.print(f"kill -9 of node {short(victim.node_id)}, where {len(lost)} birds were")
        waiting("the others notice", 1, lambda: int(len(flock_ray.nests()) == nests - 1))
        waiting("its birds elsewhere", len(self.names), settled(self.names))
        after = replies(self.names, show=False)
        for name in lost:
            console.print(f"bird {name} replied {short(after[name])} now")
        stayed = [name for name in self.names if name not in lost]
        claim(all(after[n] == places[n] for n in stayed), "a bird moved that was not on the killed node")
        console.print(f"all {len(self.names)} answer {time.monotonic() - began:.1f} s after the kill (Ray itself notices after 15 s)")
        loads(after)
        return after

    def join(self, places: dict[str, str], cluster: Cluster) -> dict[str, str]:
        console.rule("a node joins")
        before = {info.name: info for info in flock_ray.birds()}
        flock_ray.call_many([(name, "chirp") for name in self.names])
        chirps = flock_ray.ask_all("how_many", of=Chirper)
        nests = len(flock_ray.nests())
        newcomer = cluster.add_node(num_cpus=1)
        waiting("the newcomer's nest", nests + 1, lambda: len(flock_ray.nests()))
        waiting("birds move", len(self.names), settled(self.names))
        after = replies(self.names, show=False)
        moved = [name for name in self.names if after[name] != places[name]]
        claim(all(after[name] == newcomer.node_id for name in moved), "a bird moved between two old nodes")
        infos = {info.name: info for info in flock_ray.birds()}
        stayed = [name for name in self.names if name not in moved]
        claim(all(infos[n].incarnation == before[n].incarnation for n in stayed), "a bird that stayed was restarted")
        for name in moved:
            count = flock_ray.call(name, "how_many")
            claim(count >= chirps[name], f"bird {name} had chirped {chirps[name]} times, and forgot it when it moved")
            console.print(f"bird {name} moved to {short(after[name])}, with its {count} chirps handed over")
        console.print(f"{len(moved)} of {len(self.names)} birds moved, all to the newcomer; the others never noticed")
        loads(after)
        return after

    def crash(self, places: dict[str, str]) -> None:
        console.rule("a bird crashes")
        name = self.names[0]
        before = flock_ray.info(name)
        try:
            flock_ray.call(name, "stumble")
            raise Broken(f"bird {name} was to crash and did not")
        except RuntimeError as error:
            console.print(f"bird {name} crashed: {error}")
        waiting("it is restarted", 1, lambda: int(flock_ray.info(name).restarts == before.restarts + 1))
        place = flock_ray.call(name, "where_are_you", timeout=30)
        claim(place == places[name], f"bird {name} was restarted on {short(place)}, not where it was")
        claim(flock_ray.info(name).incarnation > before.incarnation, f"bird {name} has no new incarnation")
        console.print(f"bird {name} replied {short(place)}: restarted in place, incarnation {flock_ray.info(name).incarnation}")

    def end(self, places: dict[str, str]) -> None:
        self.crash(places)
        self.exit()
        console.rule("the end")
        flock_ray.destroy()

    def exit(self) -> None:
        console.rule("a bird leaves")
        name = self.names[-1]
        claim(flock_ray.call(name, "retire") == "goodbye", f"bird {name} did not say goodbye")
        waiting("it is gone everywhere", 1, lambda: int(not flock_ray.alive(name)))
        console.print(f"bird {name} left in good order; its name is free, {flock_ray.count()} birds are left")


@contextmanager
def local_cluster(nodes: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A Ray cluster of this many raylets, of which nothing is left afterwards."""
    me = psutil.Process()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield cluster, workers
    finally:
        started = me.children(recursive=True)
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types here
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            process.kill()


@contextmanager
def running_cluster(address: str, nodes: int) -> Iterator[None]:
    """A connection to a Ray cluster that runs; waits until it has this many nodes."""
    ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        waiting("nodes", nodes, lambda: sum(node["Alive"] for node in ray.nodes()), deadline=600.0)  # type: ignore[no-untyped-call]  # as above
        yield
    finally:
        ray.shutdown()


def run(nodes: int, birds: int, light: bool, address: str = "") -> int:
    """Shows it all.

    Args:
        nodes: raylets, the head's included; at least 2.
        birds: to start; at least 2.
        light: light birds.
        address: of a Ray cluster that runs, or `auto`: the demo waits until it has so many nodes. Empty: a cluster of its own.

    Returns:
        The exit code: 1 if a claim did not hold.
    """
    names = [f"bird:{i}" for i in range(1, birds + 1)]
    try:
        show = Show(names, light)
        if address:
            with running_cluster(address, nodes):
                show.end(show.start(nodes))
        else:
            console.print(f"starting a Ray cluster of {nodes} nodes")
            with local_cluster(nodes) as (cluster, workers):
                places = show.kill(show.start(nodes), cluster, workers)
                show.end(show.join(places, cluster))
    except Broken as broken:
        console.print(f"The demo failed: {broken}.", style="bold red")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started is ended.")
        return 130
    console.print("Everything was as the ring says.", style="bold green")
    return 0
