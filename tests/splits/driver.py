"""A driver on one host, which does what it is told: JSON lines in, JSON lines out. What takes long keeps nothing else waiting.

usage: python -m tests.splits.driver IP, with FLOCK_RAY_SPLIT_TEMP set to Ray's temp folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from typing import Any

import ray

import flock_ray
from flock_ray import Flock
from flock_ray.runtime import cluster
from flock_ray.runtime.client import client_of
from tests.support.callers import Callers
from tests.support.diary import Diary


def join(hosts: int) -> str:
    """Connects to Ray, once all hosts are there. Returns the id of this node."""
    temp = os.environ["FLOCK_RAY_SPLIT_TEMP"]
    ray.init("10.77.0.1:6379", _node_ip_address=sys.argv[1], _temp_dir=temp, log_to_driver=False)
    while sum(node["Alive"] for node in ray.nodes()) < hosts:
        time.sleep(0.1)  # between looks
    return str(ray.get_runtime_context().get_node_id())


def init(flock: str, **settings: Any) -> None:
    Flock(flock).init(**settings)


def start(flock: str, name: str, path: str, tag: str, light: bool) -> None:
    Flock(flock).options(light=light).start(name, Diary, path, tag)


def stop(flock: str, name: str) -> None:
    Flock(flock).stop(name)


def call(flock: str, name: str, method: str, timeout: float) -> Any:
    return Flock(flock).call(name, method, timeout=timeout)


def answer(flock: str, names: list[str], until: float) -> dict[str, Any]:
    """Calls birds until each has answered, or it is `until`. Returns who answered (node and tag), and the errors of the others."""
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        while name not in found or isinstance(found[name], str):
            try:
                found[name] = Flock(flock).call(name, "who", timeout=5)
            except flock_ray.FlockError as error:
                found[name] = f"{type(error).__name__} (by {client_of(flock).path(name)}): {error}"
                if time.monotonic() > until:
                    return
                time.sleep(0.1)

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def birds(flock: str) -> list[dict[str, Any]]:
    return sorted((dataclasses.asdict(info) for info in Flock(flock).birds()), key=lambda info: str(info["name"]))


def alive(flock: str, name: str) -> bool:
    return Flock(flock).alive(name)


def nests(flock: str) -> list[list[Any]]:
    return sorted([nest.node_id, nest.weight] for nest in Flock(flock).nests())


def notices(flock: str) -> list[list[Any]]:
    """What the nest of this node has noticed: kind, name (of a bird), text."""
    here = ray.get_runtime_context().get_node_id()
    found = [notice for notice in Flock(flock).events(follow=False) if notice.node_id == here]
    return [[type(notice).__name__, getattr(notice, "name", None), notice.text] for notice in found]


def processes(flock: str) -> int:
    """How many processes this node has for birds, with its spares."""
    record = cluster.record_left(flock)
    return 0 if record is None else len(list(cluster.session_directory(record.life).glob("*.json")))


_callers: list[Callers] = []


def begin_calls(flock: str, names: list[str], retry: bool) -> None:
    _callers.append(Callers([[name] for name in names], "run", flock=flock, tickets=True, pace=0.3, retry=retry))


def end_calls() -> list[dict[str, Any]]:
    """What came of each `begin_calls`, in order."""
    for callers in _callers:
        callers.end()
    ended = [{"told": str(one), "calls": one.calls, "outcomes": one.outcomes, "fates": one.fates} for one in _callers]
    _callers.clear()
    return ended


DOES = {
    one.__name__: one for one in (join, init, start, stop, call, answer, birds, alive, nests, notices, processes, begin_calls, end_calls)
}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    writing = threading.Lock()

    def work(order: dict[str, Any]) -> None:
        try:
            said = {"id": order["id"], "value": DOES[order["do"]](*order["args"], **order["kwargs"])}
        except Exception as error:
            said = {"id": order["id"], "error": type(error).__name__, "text": str(error)}
        with writing:
            out.write(json.dumps(said) + "\n")
            out.flush()

    for line in sys.stdin:
        threading.Thread(target=work, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # Ray's own end may wait for a head that cannot be reached


if __name__ == "__main__":
    main()
