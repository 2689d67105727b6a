"""Metrics for Ray's Prometheus endpoints, through `ray.util.metrics`: what nests hold and notice, and how long calls take.

Rules kept here: each name is `METRICS`' and nowhere else; a nest gives what it has every `EVERY` seconds; a call is only noted in its
process, for 0.5 us of its 40 (measured), and told to Ray by the courier's thread, for Ray takes 3 us for each value. So the times are
those of a sample, `SAMPLES` a second, and the number of calls is that of all, but for a
few that two threads count at the same moment.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from flock_ray import notices
from flock_ray.runtime import cluster

if TYPE_CHECKING:
    from flock_ray.runtime.asks import Asks
    from flock_ray.runtime.courier import Courier

EVERY = 10.0  # seconds between what a nest gives; Ray gathers every 10
NAMES_A_SECOND = 10_000  # a nest counts birds this often at most: 100,000 take it 0.1 s
SECOND = 1.0
SAMPLES = 100  # calls of a process whose times are given to Ray, a second
BOUNDARIES = [0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0]  # seconds
STATES = ("pending", "starting", "running", "moving", "restarting", "failed")


class Metric(NamedTuple):
    """What Ray calls `ray_<name>` (a counter: `ray_<name>_total`), with the flock's name among its tags."""

    kind: str
    text: str
    tags: tuple[str, ...]


METRICS = {
    "flock_birds": Metric("Gauge", "birds that this nest holds, or that wait for it", ("flock", "node", "state")),
    "flock_nest_load_share": Metric("Gauge", "the part of all birds that this nest holds, 0 to 1", ("flock", "node")),
    "flock_bird_crashes": Metric("Counter", "lives that crashed here", ("flock", "node")),
    "flock_bird_restarts": Metric("Counter", "lives that began where the one before was", ("flock", "node")),
    "flock_bird_moves": Metric("Counter", "lives that began here, the one before on another node", ("flock", "node")),
    "flock_nest_suspicions": Metric("Counter", "nests that this nest's failure detector gave up", ("flock", "node")),
    "flock_sync_bytes": Metric("Counter", "bytes that this nest has sent to others to keep their replicas equal", ("flock", "node")),
    "flock_calls": Metric("Counter", "calls that were answered", ("flock", "path")),
    "flock_call_seconds": Metric("Histogram", "seconds from a call to its answer, of some of the calls", ("flock", "path")),
}

_COUNTED: dict[type[notices.Notice], str] = {
    notices.BirdCrashed: "flock_bird_crashes",
    notices.BirdRestarted: "flock_bird_restarts",
    notices.BirdMoved: "flock_bird_moves",
    notices.NestSuspected: "flock_nest_suspicions",
}


class _Given:
    """What one process gives to Ray of one flock."""

    def __init__(self, **tags: str) -> None:
        self._tags = tags
        self._made: dict[str, Any] = {}

    def metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics  # loaded when it is needed: a host is a new process

            kind, text, tags = METRICS[name]
            more = {"boundaries": BOUNDARIES} if kind == "Histogram" else {}
            self._made[name] = getattr(metrics, kind)(name, text, tag_keys=tags, **more).set_default_tags(self._tags)
        return self._made[name]


class NestMetrics(_Given):
    """A nest's. On its event loop."""

    def __init__(self, flock: str, node: str) -> None:
        super().__init__(flock=flock, node=node)
        self._counted: Counter[str] = Counter()

    def noticed(self, notice: notices.Notice) -> None:
        name = _COUNTED.get(type(notice))
        if name is not None:
            self._counted[name] += 1

    def sent(self, size: int) -> None:
        self._counted["flock_sync_bytes"] += size

    def give(self, states: Counter[str], share: float) -> None:
        """Gives Ray all that was counted, the birds by their states, and the share of all that are here."""
        for state in STATES:
            self.metric("flock_birds").set(states[state], {"state": state})
        self.metric("flock_nest_load_share").set(share)
        counted, self._counted = self._counted, Counter()
        for name, value in counted.items():
            self.metric(name).inc(value)


class CallMetrics(_Given):
    """Those of the calls of one process to one flock. `note` may be called from any thread, and costs little."""

    def __init__(self, flock: str, asks: Asks, courier: Courier) -> None:
        super().__init__(flock=flock)
        self._asks = asks
        self._courier = courier
        self._calls: Counter[str] = Counter()
        self._times: list[tuple[str, float]] = []
        self._armed = False

    def note(self, path: str, seconds: float) -> None:
        """A call was answered."""
        self._calls[path] += 1
        if len(self._times) < SAMPLES:
            self._times.append((path, seconds))
        if not self._armed:
            self._armed = True
            self._courier.post(self._arm)

    def _arm(self) -> None:
        asyncio.get_running_loop().call_later(SECOND, self._give)

    def _give(self) -> None:
        config = self._asks.known_config
        if (config is not None and not config.metrics) or cluster.is_ray_client():
            return  # armed for ever: what comes is noted for nobody, and costs no more
        calls, times = self._calls, self._times
        self._calls, self._times, self._armed = Counter(), [], False
        if not ray.is_initialized():
            return
        for path, count in tuple(calls.items()):
            self.metric("flock_calls").inc(count, {"path": path})
        for path, seconds in times:
            self.metric("flock_call_seconds").observe(seconds, {"path": path})
