"""Ray's autoscaler and a flock: nodes come for birds that need them, and go when they have none. Both of Ray's autoscalers, for real."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status

import flock_ray
from tests.cluster.birds import Counter
from tests.cluster.conftest import Flyground
from tests.support.autoscaling import Autoscaled
from tests.support.waiting import eventually

SOON = 120.0  # seconds: a node that comes is a new raylet, on a machine that has other things to do
PERCH = {"resources": {"perch": 1.0}}


@ray.remote(num_cpus=0, resources={"perch": 0.1})
def add_there(name: str) -> int:
    return flock_ray.call(name, "add", timeout=SOON)


@pytest.fixture(scope="module", params=[1, 2])
def scaled(request: pytest.FixtureRequest) -> Iterator[Autoscaled]:
    temp = Path(f"/tmp/fra{os.getpid()}-{request.param}")
    try:
        cluster = Autoscaled(request.param, temp)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        shutil.rmtree(temp)


@pytest.mark.own_process("birds with demands have a process of their own")
def test_a_nest_at_rest_comes_back_for_a_bird_that_fits_nowhere_else() -> None:
    """The first in this file: `scaled` stays connected until its end."""
    ground = Flyground(2, resources={"head": 1})
    try:
        node = ground.add(resources={"perch": 1}).node_id
        flock_ray.init(rest_after=1.0)
        eventually(lambda: len(flock_ray.nests()) == 3, "all nests are there", SOON)
        eventually(lambda: len(flock_ray.nests()) == 1, "those of nodes without birds have left, but the head's has not", SOON)
        plain = flock_ray.start("plain", Counter)
        assert plain.add.options(timeout=SOON)(1) == 1
        assert ray.get(add_there.remote("plain"), timeout=SOON) == 2, "who is on a node without a nest asks another's"
        assert len(flock_ray.nests()) == 1
        flock_ray.stop(plain)  # else the ring might give it to a nest that comes back, which would stay for it
        bird = flock_ray.options(**PERCH).start("perching", Counter)
        assert bird.add.options(timeout=SOON)(1) == 1
        assert flock_ray.where(bird) == node
        flock_ray.stop(bird)
        eventually(lambda: node not in {nest.node_id for nest in flock_ray.nests()}, "its nest leaves again", SOON)
    finally:
        ground.close()


@pytest.mark.own_process("birds with demands have a process of their own")
def test_birds_that_need_nodes_bring_them_and_without_birds_they_go(scaled: Autoscaled) -> None:
    flock = flock_ray.Flock("resting")
    flock.init(rest_after=2.0)
    first = flock.options(**PERCH).start("first", Counter)
    assert first.add.options(timeout=SOON)(1) == 1
    assert len(scaled.workers()) == 1
    second = flock.options(**PERCH).start("second", Counter)  # what the autoscaler is asked for includes what is there
    assert second.add.options(timeout=SOON)(1) == 1
    assert len(scaled.workers()) == 2
    flock.stop("first")
    eventually(lambda: len(scaled.workers()) == 1, "the node that has no bird any more is removed", SOON)
    assert second.add(1) == 2
    flock.stop("second")
    eventually(lambda: scaled.workers() == [], "so is the other", SOON)
    assert flock.options(**PERCH).start("third", Counter).add.options(timeout=SOON)(1) == 1
    flock.destroy()
    eventually(lambda: scaled.workers() == [], "a flock that is destroyed leaves no node busy", SOON)


@pytest.mark.own_process("birds with demands have a process of their own")
def test_a_nest_that_stays_keeps_its_node_busy(scaled: Autoscaled) -> None:
    """What Ray makes impossible: an actor keeps its node, though it asks for no resources. So `rest_after` is there."""
    flock = flock_ray.Flock("staying")
    flock.init()
    assert flock.options(**PERCH).start("bird", Counter).add.options(timeout=SOON)(1) == 1
    flock.stop("bird")
    eventually(lambda: ray.available_resources().get("perch") == 1.0, "nothing of the node is in use", SOON)
    (worker,) = [node for node in get_cluster_status(scaled.address).active_nodes if node.node_id in scaled.workers()]
    assert "Busy workers on node." in worker.node_activity
    flock.destroy()
    eventually(lambda: scaled.workers() == [], "without its nest the node is removed", SOON)
