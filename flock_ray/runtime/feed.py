"""What a caller holds of `events()`: an iterator over what all nests notice, each of which is asked by a long poll (`core/board.py`).

Rules kept here: nests are asked straight, so the head is not needed where sockets can be had; a nest is asked for more when what it has
said was read, so a slow reader keeps a page of each nest and no more; all of it happens on the courier's thread.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, TypeVar

from flock_ray.core.board import Kinds, Page, Reader
from flock_ray.errors import CallTimeout
from flock_ray.notices import Notice
from flock_ray.runtime import inside
from flock_ray.runtime.asks import Asks
from flock_ray.runtime.client import Client
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.links import Links, NestLink
from flock_ray.runtime.replies import Down, NoAnswer, answer_of

N_co = TypeVar("N_co", bound=Notice, covariant=True)

LOOK = 1.0  # seconds between looks at which nests there are
POLL = 20.0  # seconds that a nest may wait for something to say
PATIENCE = 3.0  # seconds longer until it counts as silent, and the others are not kept waiting for it
AGAIN = 1.0  # seconds before a nest that was silent is asked again


class Feed(Generic[N_co], Iterator[N_co], AsyncIterator[N_co]):
    """Iterates over what the nests of a flock notice, with `for` or `async for`. For one reader at a time.

    Those of one nest come in their order and never twice. Those of before come in the order of their times, by the nodes' clocks; what
    happens later, as it is heard. A nest keeps its latest 10,000; what was dropped before it was read is a `Missed`. What a nest has
    noticed in the last moments before its own death may be lost with it.

    Raises:
        CallTimeout: no nest has answered at first: is this node cut off?
        FlockNotRunning: Ray or the flock is not up, or not any more.
    """

    def __init__(self, client: Client, follow: bool, since: float, kinds: Kinds) -> None:
        self._client = client
        self._items: deque[Notice] = deque()
        self._source = _Source(client.asks, client.links, client.courier, follow, since, kinds)
        self._ended = False

    def __iter__(self) -> Iterator[N_co]:
        return self

    def __next__(self) -> N_co:
        while not self._items:
            if self._ended:
                raise StopIteration
            if inside.in_async_method():
                raise RuntimeError("reading events with `for` would stop the event loop of this bird; use `async for`")
            self._client.check_process()
            self._ended = not self._client.courier.run(self._source.fill(self._items))
        return self._items.popleft()  # type: ignore[return-value]  # nests were asked for these

    def __aiter__(self) -> AsyncIterator[N_co]:
        return self

    async def __anext__(self) -> N_co:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._ended = not await self._client.courier.run_async(self._source.fill(self._items))
        return self._items.popleft()  # type: ignore[return-value]  # nests were asked for these

    def close(self) -> None:
        """Ends it: what was not read is dropped."""
        self._items.clear()
        self._ended = True
        self._client.courier.post(self._source.close)

    async def aclose(self) -> None:
        """As `close`, which does not wait; for `contextlib.aclosing`."""
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._client.courier.post(self._source.close)


class _Source:
    """Asks the nests. On the courier's thread."""

    def __init__(self, asks: Asks, links: Links, courier: Courier, follow: bool, since: float, kinds: Kinds) -> None:
        self._asks = asks
        self._links = links
        self._courier = courier
        self._follow = follow
        self._since = since
        self._kinds = kinds
        self._reader = Reader()
        self._doors: dict[str, str] | None = None  # of the nests there are, by node; `None` before the first look
        self._look: asyncio.Task[dict[str, str]] | None = None
        self._look_at = 0.0
        self._nests: dict[str, NestLink] = {}
        self._polls: dict[str, asyncio.Task[Page | None]] = {}
        self._not_before: dict[str, float] = {}
        self._read: set[str] = set()  # nodes whose nests need not be asked any more
        self._closed = False

    async def fill(self, items: deque[Notice]) -> bool:
        """Waits for some notices, and adds them. False if there will be none."""
        while True:
            pause = self._ask()
            tasks: list[asyncio.Task[Any]] = [*self._polls.values(), *((self._look,) if self._look is not None else ())]
            if tasks:
                await asyncio.wait(tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(pause)
            if self._closed:
                return False
            self._take()
            items += self._reader.gather()
            if items:
                return True
            if not self._follow and self._doors is not None and self._read >= self._doors.keys() and self._reader.done:
                self.close()
                return False

    def _ask(self) -> float:
        """Asks whoever is to be asked now. Returns in how many seconds there may be somebody else."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._look is None and self._look_at <= now and (self._follow or self._doors is None):
            self._look = loop.create_task(self._nests_there())
            self._look_at = now + LOOK
        later = [self._look_at if self._look is None and self._follow else now + LOOK]
        for node in self._doors or ():
            if node in self._polls or node in self._read or self._reader.wants(node) is None:
                continue
            if self._not_before.get(node, 0.0) <= now:
                self._polls[node] = loop.create_task(self._poll(node))
            else:
                later.append(self._not_before[node])
        return max(0.0, min(later) - now)

    def _take(self) -> None:
        """Takes in what was answered."""
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            try:
                self._doors = look.result()
            except CallTimeout:  # this node's nest is away; the others go on
                if self._doors is None:
                    raise
            for node in self._doors:
                self._reader.follow(node)
        for node in [node for node, poll in self._polls.items() if poll.done()]:
            self._answered(node, self._polls.pop(node).result())

    def _answered(self, node: str, page: Page | None) -> None:
        if page is not None:
            self._reader.take(node, page)
        elif self._follow:
            self._reader.silent(node)
            self._not_before[node] = asyncio.get_running_loop().time() + AGAIN
        else:
            self._reader.give_up(node)
        if not self._follow and not self._reader.is_behind(node):
            self._read.add(node)

    async def _nests_there(self) -> dict[str, str]:
        weights, doors = await self._asks.read("ring")
        return {node: doors.get(node, "") for node, _ in weights}

    async def _poll(self, node: str) -> Page | None:
        """Asks the nest of a node, and waits until it has something to say; `None` if it is silent."""
        seconds = 0.0 if self._reader.is_behind(node) or not self._follow else POLL
        query = pickle.dumps(("notices", self._reader.wants(node), self._kinds, self._since, seconds), protocol=5)
        try:
            nest = self._nests.get(node)
            if nest is None or nest.lost():
                door = (self._doors or {}).get(node, "")
                nest = self._nests[node] = await self._courier.blocking(self._links.nest_on, self._asks.flock, node, door)
            raw = await answer_of(nest.read(query), seconds + PATIENCE)
        except (Down, NoAnswer):
            self._nests.pop(node, None)
            return None
        page: Page = pickle.loads(raw.message)
        return page

    def close(self) -> None:
        """Asks nobody any more."""
        self._closed = True
        for task in (*self._polls.values(), *((self._look,) if self._look is not None else ())):
            task.cancel()
        self._polls.clear()
        self._nests.clear()
        self._look = None
