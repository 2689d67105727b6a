"""The failure detector inside real nests: no false death while processes are being spawned, a real one in seconds."""

from __future__ import annotations

import pickle
import time

import ray

import flock_ray
from flock_ray.core.notices import NestLeft
from flock_ray.runtime import cluster
from tests.cluster import birds
from tests.cluster.conftest import eventually

NODES = 4


def noticed():
    """What the nests of the view have noticed."""
    record = cluster.flock_life("default")
    found = []
    for nest in flock_ray.nests():
        packed = ray.get(cluster.nest_handle(record.life, nest.node_id).read.remote(pickle.dumps(("notices",))), timeout=60)
        found += pickle.loads(packed)
    return found


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


def test_a_killed_node_is_found_in_seconds(flyground):
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the newcomer's nest")
    began = time.monotonic()
    flyground.crash(node)
    eventually(lambda: len(flock_ray.nests()) == NODES, "it is out of the view")
    assert time.monotonic() - began < 10
    assert {notice.life.node for notice in departures()} == {node.node_id}
