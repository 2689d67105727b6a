"""Light birds and batches on real nodes: who shares a process, what a process's death does, and how one that does not return is ended."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import flock_ray
from flock_ray.runtime import cluster
from tests.cluster.test_promises import nest_pid, runs
from tests.support.waiting import eventually

NODES = 2
LIGHT = flock_ray.options(light=True, stop_timeout=2.0)


class Room:
    """Counts, says where it is, and misbehaves."""

    def __init__(self, n=0):
        self.n = n

    def add(self, k=1):
        self.n += k
        return self.n

    def where(self):
        return flock_ray.me().node_id, os.getpid()

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def stuck(self):
        time.sleep(1000)

    def hand_over(self):
        return self.n

    def take_over(self, n):
        self.n = n


class Heavy(Room):
    """Can hand over more than fits into a frame."""

    size = 0

    def fatten(self):
        self.size = 5_000_000

    def hand_over(self):
        return self.n, bytes(self.size)

    def take_over(self, state):
        self.n = state[0]


class Poisonous(Room):
    """Kills its process whenever it is made."""

    def __init__(self):
        super().__init__()
        self.die()


class AsyncRoom:
    """With `async def` methods; one of them kills the process, after it has waited."""

    async def where(self):
        return flock_ray.me().node_id, os.getpid()

    async def die(self):
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)


class Chained:
    """Calls others together, in coroutines."""

    async def ask(self, names, deeper):
        calls = [(own, "ask", ((), ())) if not deeper else (own, "ask", (deeper[0], deeper[1:])) for own in names]
        return 1 + sum(await flock_ray.aio.call_many(calls, timeout=30.0)) if names else 1


class Sleeper:
    """Can be kept busy, and counts what it is told."""

    def __init__(self):
        self.notes = 0

    def rest(self, seconds):
        time.sleep(seconds)

    def note(self):
        self.notes += 1

    def noted(self):
        return self.notes


def processes(names):
    """The processes of birds, by name."""
    return dict(zip(names, flock_ray.call_many([(name, "where") for name in names], timeout=60), strict=True))


def restarts(names):
    return {info.name: info.restarts for info in flock_ray.birds() if info.name in set(names)}


def test_they_share_processes_as_many_as_a_node_has_cpus(flyground, name):
    names = [f"{name}/{n}" for n in range(600)]
    birds = LIGHT.start_many([(one, Room, (n,)) for n, one in enumerate(names)])
    assert [bird.name for bird in birds] == names
    assert flock_ray.call_many([(one, "add") for one in names], timeout=60) == list(range(1, 601))
    by_node: dict = {}
    for node, pid in processes(names).values():
        by_node.setdefault(node, set()).add(pid)
    assert {len(pids) for pids in by_node.values()} == {2}
    assert len(by_node) == NODES
    assert flock_ray.ask_all("add", 0, prefix=f"{name}/") == {one: n + 1 for n, one in enumerate(names)}
    assert flock_ray.ask_all("add", 0, of=Room, prefix=f"{name}/5") == {
        one: n + 1 for n, one in enumerate(names) if f"/{n}".startswith("/5")
    }
    flock_ray.stop_many(names)
    flock_ray.wait(names, "gone", timeout=60)
    assert flock_ray.ask_all("add", prefix=f"{name}/") == {}


def test_what_cannot_be_started_has_its_place(flyground, name):
    LIGHT.start(name, Room, 7)
    unpicklable = (f"{name}/2", Room, (threading.Lock(),))
    started = LIGHT.start_many([(name, Room), (f"{name}/1", Room, (1,)), unpicklable], return_exceptions=True)
    assert isinstance(started[2], TypeError)
    assert isinstance(started[0], flock_ray.BirdExists)
    assert started[1].add() == 2
    with pytest.raises(TypeError, match=r"item 1 is \('b',\)"):
        LIGHT.start_many([("a", Room), ("b",)])
    assert not flock_ray.alive("a")
    with pytest.raises(TypeError, match="item 0"):
        flock_ray.call_many([name])
    with pytest.raises(flock_ray.BirdNotFound):
        flock_ray.stop_many([f"{name}/1", "nobody"])
    assert not flock_ray.alive(f"{name}/1")
    again = flock_ray.options(light=True, if_exists="ok").start_many([(name, Room, (7,)), (name, Room, (8,))], return_exceptions=True)
    assert again[0] == flock_ray.bird(name)
    assert isinstance(again[1], flock_ray.BirdExists)
    for one in flock_ray.birds(prefix=name):
        flock_ray.stop(one.name)


def test_ones_own_writes_are_seen(flyground, name):
    """Other nests than this node's have accepted most of them."""
    for batch in range(3):
        names = [f"{name}/{batch}/{n}" for n in range(400)]
        before = flock_ray.count()
        LIGHT.start_many([(one, Room) for one in names])
        assert flock_ray.count() == before + len(names)
        assert set(flock_ray.ask_all("add", prefix=f"{name}/{batch}/")) == set(names)
    flock_ray.stop_many([info.name for info in flock_ray.birds(prefix=f"{name}/")])
    assert not flock_ray.birds(prefix=f"{name}/")


def test_a_name_that_was_stopped_is_free_at_once(flyground, name):
    names = [f"{name}/{n}" for n in range(300)]
    for batch in range(8):
        LIGHT.start_many([(one, Room, (batch,)) for one in names])
        assert flock_ray.call_many([(one, "add", (0,)) for one in names], timeout=60) == [batch] * len(names)
        flock_ray.stop_many(names)
    flock_ray.wait(names, "gone", timeout=60)


def neighbours(name, cls=Room, number=60):
    """Light birds that share a process, and the process."""
    names = [f"{name}/{n}" for n in range(number)]
    LIGHT.start_many([(one, cls) for one in names])
    there = processes(names)
    pid = there[names[0]][1]
    return [one for one in names if there[one][1] == pid], pid


@pytest.mark.parametrize("cls", [Room, AsyncRoom])
def test_a_process_that_dies_is_counted_to_the_bird_that_killed_it(flyground, name, cls):
    together, pid = neighbours(name, cls)
    assert len(together) > 5
    began = time.monotonic()
    with pytest.raises(flock_ray.BirdUnavailable):
        flock_ray.call(together[0], "die")
    assert flock_ray.call(together[1], "where", timeout=30)[1] != pid
    took = time.monotonic() - began
    flock_ray.wait(together, timeout=30)
    crashes = {one.name: one.last_error for one in flock_ray.birds(prefix=f"{name}/") if one.name in together}
    assert "its process died" in crashes.pop(together[0])
    assert all("the process that it shared ended" in error for error in crashes.values())
    print(f"again after {took:.2f} s")
    flock_ray.stop_many([one.name for one in flock_ray.birds(prefix=f"{name}/")])


def test_one_that_kills_its_process_again_and_again_fails_and_its_neighbours_go_on(flyground, name):
    together, _ = neighbours(name)
    flock_ray.options(light=True, max_restarts=2).start(name, Poisonous)
    eventually(lambda: flock_ray.info(name).state == "failed", "it has failed")
    flock_ray.wait(together, timeout=60)
    assert flock_ray.call_many([(one, "add") for one in together], timeout=60) == [1] * len(together)
    eventually(lambda: all(info.state == "running" for info in flock_ray.birds(prefix=f"{name}/")), "so does every replica")
    flock_ray.stop_many([one.name for one in flock_ray.birds(prefix=name)])


def test_one_that_does_not_return_is_ended_after_its_neighbours_have_left(flyground, name):
    together, pid = neighbours(name, Heavy, 30)
    flock_ray.call_many([(one, "add", (n,)) for n, one in enumerate(together)])
    flock_ray.call(together[2], "fatten")
    flock_ray.cast(together[0], "stuck")
    time.sleep(0.3)  # it is
    assert flock_ray.call(together[1], "add") == 2, "its neighbours are not held up"
    flock_ray.stop(together[0])
    flock_ray.wait(together[0], "gone", timeout=30)
    eventually(lambda: not runs(pid), "its process is ended")
    there = processes(together[1:])
    assert pid not in {one for _, one in there.values()}
    counts = flock_ray.call_many([(one, "add", (0,)) for one in together[1:]])
    assert counts == [2, *range(2, len(together))], "with what they handed over"
    flock_ray.stop_many([one.name for one in flock_ray.birds(prefix=f"{name}/")])


def test_they_outlive_their_nest(flyground, name):
    together, pid = neighbours(name)
    flock_ray.call_many([(one, "add", (n,)) for n, one in enumerate(together)])
    node = flock_ray.where(together[0])
    os.kill(nest_pid(node), signal.SIGKILL)
    assert flock_ray.call(together[2], "add", 0) == 2
    eventually(lambda: any(nest.node_id == node and nest.birds for nest in flock_ray.nests()), "the nest's next life")
    assert flock_ray.call_many([(one, "add", (0,)) for one in together], timeout=60) == list(range(len(together)))
    assert {one for _, one in processes(together).values()} == {pid}
    LIGHT.start(f"{name}/more", Room)
    assert flock_ray.call(f"{name}/more", "add") == 1
    flock_ray.stop_many([one.name for one in flock_ray.birds(prefix=f"{name}/")])
    flock_ray.wait(together, "gone", timeout=60)


def test_a_nodes_death_moves_them(flyground, name):
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "its nest")
    names = [f"{name}/{n}" for n in range(500)]
    LIGHT.start_many([(one, Room) for one in names])
    flock_ray.wait(names, timeout=60)
    there = [one for one in names if flock_ray.where(one) == node.node_id]
    assert there
    flyground.crash(node)
    answers = flock_ray.call_many([(one, "add") for one in names], timeout=60, retry=True)
    assert answers == [1] * 500
    assert not any(flock_ray.where(one) == node.node_id for one in there)
    flock_ray.stop_many(names)


def test_nothing_is_left_of_a_process_that_died(flyground, name):
    together, pid = neighbours(name)
    folder = Path(cluster.session_directory(cluster.flock_life("default").life)).parent
    assert list(folder.glob(f"*/{pid}.*"))
    with pytest.raises(flock_ray.BirdUnavailable):
        flock_ray.call(together[0], "die")
    flock_ray.wait(together, timeout=30)
    eventually(lambda: not list(folder.glob(f"*/{pid}.*")), "its files are gone")
    flock_ray.stop_many([one.name for one in flock_ray.birds(prefix=f"{name}/")])


def test_coroutines_do_the_same(flyground, name):
    async def go():
        names = [f"{name}/{n}" for n in range(20)]
        aio = flock_ray.aio
        await aio.options(light=True).start_many([(one, Room) for one in names])
        await aio.cast_many([(one, "add") for one in names])
        assert await aio.call_many([(one, "add") for one in names]) == [2] * 20
        assert set((await aio.ask_all("add", 0, prefix=f"{name}/")).values()) == {2}
        await aio.stop_many(names)

    asyncio.run(go())


def test_birds_whose_batches_wait_for_batches_do_not_wait_for_threads(flyground, name):
    """Found by a reader: a pool of threads was taken by those who waited for what only it could run."""
    levels = [[(name, level, n) for n in range(30)] for level in range(3)]
    for birds in levels:
        LIGHT.start_many([(own, Chained) for own in birds])
    calls = [(own, "ask", ([levels[1][n]], ([levels[2][n]],))) for n, own in enumerate(levels[0])]
    assert flock_ray.call_many(calls, timeout=30.0) == [3] * 30
    flock_ray.stop_many([own for birds in levels for own in birds])


def test_casts_wait_for_nobody(flyground, name):
    busy, idle = (name, "busy"), (name, "idle")
    LIGHT.start_many([(busy, Sleeper), (idle, Sleeper)])
    held = flock_ray.bird(busy).rest.future(3.0)  # and from another thread, whose lanes have nothing to do with it:
    began = time.monotonic()
    for thread in [threading.Thread(target=flock_ray.cast_many, args=([(busy, "note"), (idle, "note")],)) for _ in range(2)]:
        thread.start()
        thread.join(10)
    assert time.monotonic() - began < 2.0
    eventually(lambda: flock_ray.call(idle, "noted") == 2, "an idle one is not kept waiting")
    held.result(10)
    eventually(lambda: flock_ray.call(busy, "noted") == 2, "a busy one runs them when it can")
    flock_ray.stop_many([busy, idle])


def test_who_is_left_alone_takes_over_although_a_bird_has_demands(flyground, name):
    """The last one here: found by a reader, when one nest was left and any bird had demands nothing of the others' was hatched again."""
    (node,) = flyground.cluster.worker_nodes
    flock_ray.options(num_cpus=0.5).start((name, "placed"), Room)
    names = [(name, n) for n in range(40)]
    LIGHT.start_many([(own, Room) for own in names])
    flock_ray.wait([*names, (name, "placed")])
    assert any(info.node_id == node.node_id for info in flock_ray.birds(prefix=(name,)))
    flyground.crash(node)
    assert flock_ray.call_many([(own, "add") for own in names], retry=True) == [1] * 40
    flock_ray.stop_many([*names, (name, "placed")])
