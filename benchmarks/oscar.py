"""xoscar's side: a counter in a process of its own, called from an event loop of this one, as xoscar is used.

Calls cross processes over the Unix socket that xoscar opens between the processes of one pool. Both sides run on uvloop if it is
installed, which is xoscar's default. What is timed runs in one coroutine: to enter and leave the loop is not in it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


def event_loops() -> dict[str, Any]:
    """What makes an event loop, by its name; asyncio's own first."""
    loops: dict[str, Any] = {"asyncio": asyncio.SelectorEventLoop}
    if find_spec("uvloop"):
        import uvloop

        loops["uvloop"] = uvloop.new_event_loop
    else:
        print("uvloop is not installed, and left out", file=sys.stderr)
    return loops


@dataclass(frozen=True)
class Oscar:
    """The counter, and the loop to call it on. It has the methods of `calls.Counter` that return at once."""

    actor: Any
    loop: asyncio.Runner


def _counter_class(actor_class: type) -> type:
    class Counter(actor_class):  # made here, so that it is pickled whole: the other process need not find this file
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def add(self, k: int) -> int:
            self.n += k
            return self.n

        def get(self) -> int:
            return self.n

        def size(self, array: Any) -> int:
            return array.size

    return Counter


@contextmanager
def local_oscar(loop: asyncio.Runner) -> Iterator[Oscar | None]:
    """A pool of two processes, this one and the counter's; `None` if xoscar is not installed."""
    if not find_spec("xoscar"):
        print("xoscar is not installed, and left out", file=sys.stderr)
        yield None
        return
    import xoscar

    pool = loop.run(xoscar.create_actor_pool("127.0.0.1:0", n_process=1))
    try:
        other = xoscar.allocate_strategy.ProcessIndex(1)
        made = xoscar.create_actor(_counter_class(xoscar.Actor), address=pool.external_address, uid="counter", allocate_strategy=other)
        yield Oscar(loop.run(made), loop)
    finally:
        loop.run(pool.stop())


@dataclass(frozen=True)
class Pool:
    """A pool of xoscar's with two processes beside this one, in which actors are created."""

    address: str
    loop: asyncio.Runner
    kind: type

    def create(self, number: int) -> float:
        """Actors created a second, a thousand at a time; they are destroyed again."""
        import xoscar

        async def run() -> float:
            begin = asyncio.get_running_loop().time()
            made: list[Any] = []
            for at in range(0, number, 1_000):
                places = (xoscar.allocate_strategy.ProcessIndex(1 + n % 2) for n in range(min(1_000, number - at)))
                made += await asyncio.gather(
                    *(xoscar.create_actor(self.kind, address=self.address, allocate_strategy=place) for place in places)
                )
            taken = asyncio.get_running_loop().time() - begin
            for at in range(0, number, 1_000):
                await asyncio.gather(*map(xoscar.destroy_actor, made[at : at + 1_000]))
            return number / taken

        return self.loop.run(run())


@contextmanager
def local_pool(loop: asyncio.Runner) -> Iterator[Pool | None]:
    """A pool to create actors in; `None` if xoscar is not installed."""
    if not find_spec("xoscar"):
        print("xoscar is not installed, and left out", file=sys.stderr)
        yield None
        return
    import xoscar

    pool = loop.run(xoscar.create_actor_pool("127.0.0.1:0", n_process=2))
    try:
        yield Pool(pool.external_address, loop, _counter_class(xoscar.Actor))
    finally:
        loop.run(pool.stop())
