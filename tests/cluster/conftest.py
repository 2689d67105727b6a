"""Real Ray clusters for tests: one for a module, with real raylets on this machine.

Authentication is chosen by the environment (`RAY_AUTH_MODE`), before Ray is imported: scripts/test runs these tests in both modes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import flock_ray
from flock_ray.runtime import cluster
from flock_ray.specs import Options
from tests.support.head import NO_REDIS, has_redis
from tests.support.waiting import eventually

DEADLINE = 60.0
LIGHT = os.environ.get("FLOCK_RAY_TEST_LIGHT") == "1"  # as above: all birds are light that do not ask for a process of their own
WIRE = os.environ.get("FLOCK_RAY_TEST_WIRE", "auto")  # scripts/test runs these tests over sockets, and over Ray


NEEDS_REDIS = pytest.mark.skipif(not has_redis() and os.environ.get("CI") != "true", reason=NO_REDIS)  # which fails in CI


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The same tests run over both kinds of birds, but those that are about a bird's own process: `own_process` says why."""
    own = [item for item in items if LIGHT and item.get_closest_marker("own_process")]
    config.hook.pytest_deselected(items=own)
    items[:] = [item for item in items if item not in own]


@pytest.fixture(autouse=True)
def hosting(monkeypatch: pytest.MonkeyPatch) -> None:
    if LIGHT:
        monkeypatch.setattr("flock_ray.api.options.Options", functools.partial(Options, light=True))


def views(flock: flock_ray.Flock) -> set[int]:
    """How many nests each nest has in its view."""
    record = cluster.flock_life(flock.name)
    query = pickle.dumps(("nests",))
    asked = [cluster.nest_handle(record.life, nest.node_id).read.remote(query) for nest in flock.nests()]
    return {len(pickle.loads(view)) for view in ray.get(asked, timeout=DEADLINE)}


def init_whole(flock: flock_ray.Flock, **settings: Any) -> None:
    """Starts a flock and waits until every node's nest has all others in its view: one that adopts it later moves birds then."""
    flock.init(**{"wire": WIRE, **settings})
    nodes = sum(node["Alive"] for node in ray.nodes())
    eventually(lambda: len(flock.nests()) == nodes, "a nest on every node in the view")
    eventually(lambda: views(flock) == {nodes}, "and in every nest's")


class Flyground:
    """A Ray cluster, and the flock on it."""

    def __init__(self, nodes: int, **node_args: Any) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **node_args})
        self.workers = [self.add(**node_args) for _ in range(nodes - 1)]
        ray.init(self.cluster.address, namespace="test", log_to_driver=False)

    def add(self, **node_args: Any) -> Any:
        return self.cluster.add_node(**{"num_cpus": 2, **node_args})

    def crash(self, node: Any) -> None:
        """kill -9 of a raylet; what belongs to it has to see that by itself."""
        self.cluster.remove_node(node, allow_graceful=False)

    @contextlib.contextmanager
    def stopped(self, node: Any) -> Iterator[None]:
        """SIGSTOP of a raylet with all its workers."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def close(self) -> None:
        try:
            if ray.is_initialized():
                flock_ray.destroy()
        except flock_ray.FlockNotRunning:
            pass  # the test destroyed it itself
        finally:
            ray.shutdown()
            self.cluster.shutdown()


@pytest.fixture(scope="module")
def flyground(request: pytest.FixtureRequest) -> Iterator[Flyground]:
    """Three nodes of 2 CPUs; a module that wants others says `NODES = n`."""
    ground = Flyground(getattr(request.module, "NODES", 3), **getattr(request.module, "NODE_ARGS", {}))
    try:
        init_whole(flock_ray.Flock("default"), **getattr(request.module, "SETTINGS", {}))
        yield ground
    finally:
        ground.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own, stopped after it."""
    own = f"{request.node.name}"
    yield own
    if flock_ray.alive(own):
        flock_ray.stop(own)
