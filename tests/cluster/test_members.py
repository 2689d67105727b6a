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


def departures():
    """All `NestLeft` that any nest of the view has noticed."""
    record = cluster.flock_life("default")
    left = []
    for nest in flock_ray.nests():
        packed = ray.get(cluster.nest_handle(record.life, nest.node_id).read.remote(pickle.dumps(("notices",))), timeout=60)
        left += [notice for notice in pickle.loads(packed) if isinstance(notice, NestLeft)]
    return left


def test_no_false_death_while_16_processes_are_spawned(flyground, name):
    assert departures() == []
    names = [f"{name}/{i}" for i in range(16)]
    for own in names:
        flock_ray.start(own, birds.Counter)
    flock_ray.wait(names, timeout=180)
    assert departures() == []
    assert {flock_ray.info(own).incarnation for own in names} == {1}
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
