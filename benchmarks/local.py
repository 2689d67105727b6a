"""Where benchmarks run: a Ray cluster on this machine, and flocks in it, of which nothing is left afterwards.

Import this before Ray: it sets Ray's environment up.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported: a local cluster of our own, whatever this user's default
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of it for each actor that has no GPUs
os.environ.pop("FLOCK_RAY_FLOCK", None)  # the functions of `flock_ray` mean the flock "default"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import psutil
import ray
from ray.cluster_utils import Cluster

import flock_ray

STORE = 1 << 30  # bytes of each node's object store: several arrays of 100 MB, for what is not needed any more is freed a little later
END = 5.0  # seconds for processes to end by themselves


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """A Ray cluster of this many raylets, and this process in it, of which nothing is left afterwards."""
    me = psutil.Process()
    settings = {"num_cpus": 1, "object_store_memory": STORE}
    found = Cluster()
    try:
        found.add_node(include_dashboard=False, **settings)
        for _ in range(nodes - 1):
            found.add_node(**settings)
        ray.init(found.address, log_to_driver=False, logging_level="error")
        yield found
    finally:
        started = me.children(recursive=True)
        if ray.is_initialized():
            ray.shutdown()
        found.shutdown()
        _, alive = psutil.wait_procs(started, timeout=END)
        for process in alive:
            process.kill()


@contextmanager
def flock(nodes: int, name: str = "default", **config: Any) -> Iterator[flock_ray.Flock]:
    """A flock of the cluster, with all its nests in view."""
    found = flock_ray.Flock(name)
    found.init(**config)
    try:
        wait_until(lambda: len(found.nests()) == nodes, f"{nodes} nests are in view")
        yield found
    finally:
        found.destroy()


def wait_until(condition: Callable[[], Any], what: str, deadline: float = 90.0) -> None:
    end = time.monotonic() + deadline
    while not (last := condition()):
        if time.monotonic() > end:
            raise SystemExit(f"not within {deadline:g} s: {what}; last seen {last!r}")
        time.sleep(0.02)  # between looks
