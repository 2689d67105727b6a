"""Which nest to ask about which of many names: the one that owns it, where that can be reached by a socket; else the nest of this node.

Any nest takes any request. But what the owner takes need not be told to it by another, and the nests share the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flock_ray.core.ring import ring_from
from flock_ray.errors import CallTimeout
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.links import Links, NestLink
from flock_ray.specs import Name

FEW = 64  # names that are not worth to be told apart
OLD = 2.0  # seconds until the ring is looked at anew: one that is old only costs the nests a message more for each name
PATIENCE = 2.0  # seconds this node's nest is given to tell the ring
AGAIN = 10.0  # seconds until a nest that could not be reached is tried again


class Owners:
    """The nests of one flock by what they own. A coroutine's, on the courier's thread.

    Args:
        read: looks into the replica of this node's nest.
    """

    def __init__(self, flock: str, links: Links, courier: Courier, clock: Callable[[], float], read: Callable[..., Awaitable[Any]]) -> None:
        self._flock = flock
        self._links = links
        self._courier = courier
        self._clock = clock
        self._read = read
        self._weights: tuple[tuple[str, int], ...] = ()
        self._doors: dict[str, str] = {}
        self._looked_at = float("-inf")
        self._nests: dict[str, NestLink] = {}
        self._not_before: dict[str, float] = {}

    async def of(self, names: Sequence[Name]) -> list[tuple[NestLink | None, list[int]]]:
        """The places of the names of each nest; `None` is this node's."""
        if len(names) < FEW:
            return [(None, list(range(len(names))))]
        if self._clock() - self._looked_at > OLD:
            self._looked_at = self._clock()
            try:
                self._weights, self._doors = await asyncio.wait_for(self._read("ring"), PATIENCE)
            except (TimeoutError, CallTimeout):
                self._weights, self._doors = (), {}  # this node's nest is to be asked, when it is there again
        ring = ring_from(self._weights)
        places: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(ring.owner(name), []).append(place)
        return [(await self._nest(node), there) for node, there in places.items()]

    async def _nest(self, node: str | None) -> NestLink | None:
        door = self._doors.get(node, "") if node is not None else ""
        if node is None or not door or self._clock() < self._not_before.get(node, 0.0):
            return None
        link = self._nests.get(node)
        if link is None or link.lost():
            found = await self._courier.blocking(self._links.nest_of, self._flock, node, door)
            if found is None:
                self._not_before[node] = self._clock() + AGAIN
                return None
            link = self._nests[node] = found
        return link

    def forget(self) -> None:
        """All is looked at anew."""
        self._looked_at = float("-inf")
        self._nests.clear()
        self._not_before.clear()
