"""The failure detector inside real nests: no false death while processes are being spawned, a real one in seconds."""

from __future__ import annotations

import time

import flock_ray
from flock_ray.notices import NestLeft, NestRecovered, NestSuspected
from tests.cluster import birds
from tests.cluster.test_promises import settled
from tests.support.waiting import eventually

NODES = 4


def noticed(but=""):
    """What the nests of the view have noticed, but that of one node."""
    return [notice for notice in flock_ray.events(follow=False) if notice.node_id != but]


def suspicions(node):
    """Who has given up the nest of a node, and who hears it again."""
    of_node = [notice for notice in noticed(but=node) if isinstance(notice, NestSuspected | NestRecovered) and notice.life.node == node]
    given_up = {notice.by.node for notice in of_node if isinstance(notice, NestSuspected)}
    return given_up, {notice.by.node for notice in of_node if isinstance(notice, NestRecovered)}


def departures():
    """All `NestLeft` among that."""
    return [notice for notice in noticed() if isinstance(notice, NestLeft)]


def test_no_false_death_while_16_processes_are_spawned(flyground, name):
    assert departures() == []
    names = [f"{name}/{i}" for i in range(16)]
    for own in names:
        flock_ray.start(own, birds.Counter)
    flock_ray.wait(names, timeout=180)
    assert departures() == []
    second_lives = [info for info in map(flock_ray.info, names) if info.incarnation != 1]
    assert not second_lives, [*second_lives, *(notice for notice in noticed() if getattr(notice, "name", "") in names)]
    for own in names:
        flock_ray.stop(own)


class Empty:
    def here(self):
        return None


def test_no_false_death_while_100_000_names_are_joined(flyground, name):
    before = len(departures())
    names = [(name, i) for i in range(100_000)]
    light = flock_ray.options(light=True)
    light.start_many([(own, Empty) for own in names])
    flock_ray.call_many([(own, "here") for own in names], timeout=120)
    assert len(departures()) == before
    flock_ray.stop_many(names)
    eventually(lambda: flock_ray.count() == 0, "they are gone")
    assert len(departures()) == before


def test_a_node_that_is_stopped_is_found_in_seconds_and_comes_back_by_itself(flyground, name):
    """SIGSTOP of a raylet with all its workers, for five seconds: its birds are where they were."""
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the newcomer's nest")
    names = [f"{name}/{i}" for i in range(60)]
    flock_ray.options(light=True).start_many([(own, birds.Counter, (i,)) for i, own in enumerate(names)])
    eventually(lambda: settled(names), "all at their owners")
    left = len(departures())
    began = time.monotonic()
    with flyground.stopped(node):
        eventually(lambda: len(suspicions(node.node_id)[0]) == NODES, "all others have given it up", 10)
        found = time.monotonic() - began
        time.sleep(max(0.0, began + 5 - time.monotonic()))
    eventually(lambda: len(suspicions(node.node_id)[1]) == NODES, "all others hear it again")
    print(f"given up by all after {found:.1f} s, heard again by all {time.monotonic() - began - 5:.1f} s after its return")
    assert found < 6, "about 2 s on a quiet machine"
    assert flock_ray.call_many([(own, "get") for own in names], timeout=30) == list(range(60))
    assert len(departures()) == left
    assert all(info.incarnation == 1 for info in flock_ray.birds(prefix=f"{name}/") if info.node_id == node.node_id)
    flock_ray.stop_many(names)
    flyground.crash(node)
    eventually(lambda: len(flock_ray.nests()) == NODES, "as before")


def test_a_killed_node_is_found_in_seconds(flyground):
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the newcomer's nest")
    began = time.monotonic()
    flyground.crash(node)
    eventually(lambda: len(flock_ray.nests()) == NODES, "it is out of the view")
    print(f"out of the view after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 10
    assert node.node_id in {notice.life.node for notice in departures()}
