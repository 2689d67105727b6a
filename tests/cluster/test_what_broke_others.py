"""What broke other registries and supervisors on the same machine (the last table of RAY_FACTS.md), each on real raylets.

Two of them have their tests beside what they are about: four crashes within seconds, in `test_promises`; a call from another node right
after a start, in `test_first_flight`. Splits are in `tests/splits`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time

import psutil
import pytest
import ray

import flock_ray
from tests.cluster import birds
from tests.cluster.test_promises import nest_pid, owners, settled
from tests.support.waiting import eventually

NODES = 3
LIGHT = flock_ray.options(light=True)


class Deadly:
    """Takes its process along whenever it is made."""

    def __init__(self):
        os._exit(7)


def nest_pids():
    return {nest.node_id: nest_pid(nest.node_id) for nest in flock_ray.nests()}


def stop_all(prefix):
    names = [info.name for info in flock_ray.birds(prefix=prefix)]
    flock_ray.stop_many(names)
    flock_ray.wait(names, "gone", timeout=60)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.own_process("which it is, is said here")
def test_a_bird_whose_start_fails_harms_no_nest_wherever_it_is_hatched(flyground, name, light):
    """In Flock it took the manager of its node down again and again, then the next node's: 2 of 4 nodes were lost."""
    well = [f"{name}/well/{i}" for i in range(9)]
    for own in well:
        flock_ray.options(light=light).start(own, birds.Counter)
    flock_ray.wait(well, timeout=60)
    before = nest_pids()
    bad = [f"{name}/{cls.__name__}/{i}" for cls in (birds.Unborn, Deadly) for i in range(4)]
    assert len(set(owners(bad).values())) > 1, "on several nodes"
    for own in bad:
        flock_ray.options(light=light, max_restarts=2).start(own, birds.Unborn if "Unborn" in own else Deadly)
    eventually(lambda: all(flock_ray.info(own).state == "failed" for own in bad), "they have failed", 120)
    assert nest_pids() == before
    flock_ray.wait(well, timeout=60)
    assert flock_ray.call_many([(own, "add") for own in well], timeout=60, return_exceptions=True) == [1] * len(well)
    stop_all(f"{name}/")


def test_a_node_whose_ray_is_up_long_before_its_nest_is(flyground, name):
    """In Flock 64 of 200 names were unreachable until somebody's next start."""
    names = [f"{name}/{i}" for i in range(200)]
    LIGHT.start_many([(own, birds.Counter, (i,)) for i, own in enumerate(names)])
    flock_ray.wait(names, timeout=60)
    node = flyground.add()
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)

    def its_nest():
        with contextlib.suppress(psutil.NoSuchProcess):
            return next((child for child in raylet.children(recursive=True) if child.name().startswith("ray::NestActor")), None)
        return None

    nest = eventually(its_nest, "the process of its nest")
    nest.suspend()
    try:
        until = time.monotonic() + 6
        while time.monotonic() < until:
            answers = flock_ray.call_many([(own, "get") for own in names], timeout=20)
            assert answers == list(range(200))
        more = [f"{name}/more/{i}" for i in range(50)]
        LIGHT.start_many([(own, birds.Counter, (i,)) for i, own in enumerate(more)])
        assert flock_ray.call_many([(own, "get") for own in more], timeout=20) == list(range(50))
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            nest.resume()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "its nest is there")
    eventually(lambda: settled(names + more), "and has its share")
    assert any(place == node.node_id for place in owners(names).values())
    assert flock_ray.call_many([(own, "get") for own in names], timeout=20) == list(range(200))
    flyground.crash(node)
    eventually(lambda: len(flock_ray.nests()) == NODES, "as before")
    stop_all(f"{name}/")


def test_a_join_right_after_a_death(flyground, name):
    """Views of four, three and four nests within seconds: every name answers, and runs once."""
    victim = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "a fourth nest")
    names = [f"{name}/{i}" for i in range(300)]
    LIGHT.start_many([(own, birds.Counter) for own in names])
    eventually(lambda: settled(names), "all at their owners")
    flyground.crash(victim)
    newcomer = flyground.add()
    assert flock_ray.call_many([(own, "add", (0,)) for own in names], timeout=60, retry=True) == [0] * 300
    eventually(lambda: {nest.node_id for nest in flock_ray.nests()} >= {newcomer.node_id}, "the newcomer's nest")
    eventually(lambda: len(flock_ray.nests()) == NODES + 1 and settled(names), "all at their owners")
    pids = flock_ray.call_many([(own, "where") for own in names], timeout=60)
    assert pids == [flock_ray.where(own) for own in names]
    flyground.crash(newcomer)
    eventually(lambda: len(flock_ray.nests()) == NODES, "as before")
    stop_all(f"{name}/")


def test_one_name_with_two_specs_from_two_nests(flyground, name):
    """In Flock both stay in the set, and a later stop crashes the manager."""

    @ray.remote(num_cpus=0.1, scheduling_strategy="SPREAD")
    def start(own, k):
        try:
            flock_ray.start(own, birds.Counter if k % 2 else birds.Box[str], k)
            return k
        except flock_ray.BirdExists:
            return None

    before = nest_pids()
    names = [f"{name}/{i}" for i in range(5)]
    started = ray.get([start.remote(own, k) for own in names for k in range(4)])
    assert sum(one is not None for one in started) >= len(names)
    flock_ray.wait(names, timeout=60)
    eventually(lambda: settled(names), "one bird of each at its owner")
    first = flock_ray.call_many([(own, "get") for own in names], timeout=30)
    assert first == flock_ray.call_many([(own, "get") for own in names], timeout=30)
    for own in names:
        flock_ray.stop(own)
    flock_ray.wait(names, "gone", timeout=60)
    assert nest_pids() == before
    assert not flock_ray.birds(prefix=f"{name}/")


def test_a_thousand_starts_and_stops_leave_no_trace(flyground, name):
    """In Flock they left 79 kB of tombstones that went with every change for ever, and later starts were 2 to 4 times slower."""
    processes = [psutil.Process(pid) for pid in nest_pids().values()]

    def written():
        """Bytes that the nests have handed to sockets and to their journals."""
        return sum(process.io_counters().write_chars for process in processes)

    def starts(label):
        """Seconds and bytes of one start, and its stop, in the middle of five rounds."""
        rounds = []
        for turn in range(5):
            names = [f"{name}/{label}/{turn}/{i}" for i in range(20)]
            began, bytes_before = time.perf_counter(), written()
            for own in names:
                LIGHT.start(own, birds.Counter)
            seconds = time.perf_counter() - began
            flock_ray.wait(names, timeout=60)
            flock_ray.stop_many(names)
            flock_ray.wait(names, "gone", timeout=60)
            rounds.append((seconds / 20, (written() - bytes_before) / 20))
        return statistics.median(row[0] for row in rounds), statistics.median(row[1] for row in rounds)

    LIGHT.start(f"{name}/first", birds.Counter)  # its code is known from now on, and hosts are there
    flock_ray.wait(f"{name}/first", timeout=60)
    starts("warm")
    count, sizes = flock_ray.count(), [process.memory_info().rss for process in processes]
    seconds, size = starts("before")
    for batch in range(10):
        names = [f"{name}/{batch}/{i}" for i in range(100)]
        LIGHT.start_many([(own, birds.Counter) for own in names])
        flock_ray.stop_many(names)
        flock_ray.wait(names, "gone", timeout=60)
    assert flock_ray.count() == count
    later_seconds, later_size = starts("after")
    grown = max(process.memory_info().rss - before for process, before in zip(processes, sizes, strict=True))
    print(f"time {later_seconds / seconds:.2f}, bytes {later_size / size:.2f} of what they were; {grown / 1e6:.1f} MB more")
    assert later_size < 1.3 * size
    assert later_seconds < 1.5 * seconds
    assert grown < 20e6
    stop_all(f"{name}/")
