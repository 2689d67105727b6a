"""A real host and a real client in one process, with a real socket between them, or with actor calls as Ray makes them."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle

from flock_ray.core.wire import HatchOrder, HostReport, LifeCrashed, LifeRunning, Orders, Welcome, Words, encode
from flock_ray.runtime.client import Client
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.host import HostBoot
from flock_ray.runtime.life_async import AsyncHost
from flock_ray.runtime.life_light import LightHost
from flock_ray.runtime.life_sync import SyncHost
from flock_ray.runtime.links import RayLink
from flock_ray.runtime.replies import Down, NoAnswer, Raw
from flock_ray.runtime.ways import DirectLink
from flock_ray.specs import Dot, Life, Options, Route, Spec, Stamp
from tests.support.fakelinks import World

SECRET, LIFE = b"s" * 32, "0123456789ab"
DOT = Dot(Life("node", 1), 1)
COURIER = Courier()


class Nest:
    """Hears what the host says."""

    def __init__(self) -> None:
        self.words: deque[Any] = deque(maxlen=1_000)  # the latest: hosts are fuzzed too

    def say(self, word: bytes, timeout: float) -> bytes | None:
        said = pickle.loads(word)
        self.words += said.words if isinstance(said, Words) else (said,)
        return pickle.dumps(Welcome(Life("node", 1))) if isinstance(self.words[-1], HostReport) else None

    def pid(self, timeout: float) -> int:
        return os.getpid()

    def alone(self, timeout: float) -> bool:
        return True


class ActorReply:
    """The answer of an actor call."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def get(self, timeout: float | None) -> Raw:
        try:
            answer = self._future.result(timeout)
        except TimeoutError as error:
            raise NoAnswer from error
        return Raw(answer) if isinstance(answer, bytes) else Raw(answer[0], answer[1:])

    def on_done(self, callback: Callable[[Any], object], loop: object = None) -> None:
        self._future.add_done_callback(lambda _: callback(self))

    def forget(self) -> None: ...

    def tell(self, callback: Callable[[Any], object]) -> None: ...


class ActorLink(RayLink):
    """The host as Ray would call it: each message in a thread of the actor's."""

    def __init__(self, host: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self._host, self._loop = host, loop
        self._pool = ThreadPoolExecutor(8)
        self.used_at = float("inf")
        self._gone = False

    def lost(self) -> bool:
        return self._gone

    def send(self, message: bytes, extra: Sequence[Any], urgency: object = None) -> Any:
        if self._loop is None:
            return ActorReply(self._pool.submit(self._host.call, message, extra))
        return ActorReply(asyncio.run_coroutine_threadsafe(self._host.call(message, extra), self._loop))

    def pull(self, message: bytes, items: int) -> Any:
        return self.send(message, ())

    def control(self, message: bytes) -> Any:
        return ActorReply(self._pool.submit(self._host.control, message))

    def fetch(self, parcel: str) -> Any:
        return ActorReply(self._pool.submit(self._host.fetch, parcel))


class Pair:
    """A bird named "a" of a class, and `client`, which calls it.

    Args:
        wire: "unix", "tcp", or "ray".
    """

    light = False  # the bird is a light one

    def __init__(
        self,
        folder: Path,
        wire: str,
        cls: type,
        *,
        is_async: bool = False,
        mailbox: int = 100_000,
        name: str = "h",
        state: bytes | None = None,
        slots: int = 1,
        threads: int = 16,
        **config: Any,
    ) -> None:
        self.nest = Nest()
        self.codes: list[int] = []
        host = f"async:{name}" if is_async else name
        boot = HostBoot(host, "default", LIFE, 1e6, str(folder), os.getpid(), Life("node", 1), mailbox, SECRET, threads=threads)
        brought = f'{{"async": {json.dumps(is_async)}}}'
        options = Options(max_concurrency=slots, light=self.light)
        spec = Spec("m", "C", "digest", pickle.dumps(((), {})), options, brought, Stamp(0, 0), "r")
        order = HatchOrder("default", "a", DOT, 1, spec, cloudpickle.dumps(cls), 0, 0, state, state is not None, "01")
        self.loop: asyncio.AbstractEventLoop | None = None
        kind = LightHost if self.light else AsyncHost if is_async else SyncHost
        self.host: Any = kind(boot, self.nest, "node", None, self.codes.append)
        if is_async or self.light:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
            first = b"" if self.light else pickle.dumps(order)
            asyncio.run_coroutine_threadsafe(self.host.hatch(first), self.loop).result(10)
        else:
            self.host.hatch(pickle.dumps(order))
        if self.light:
            self.host.control(encode(Orders((order,))))
            until = time.monotonic() + 10
            while not any(isinstance(word, LifeRunning | LifeCrashed) for word in list(self.nest.words)):
                assert time.monotonic() < until, "it is not hatched"
                time.sleep(0.001)
        self.actor = ActorLink(self.host, self.loop)
        self.world = World(**config)
        self.client = Client("default", self.world, COURIER)
        COURIER.run(self.client.asks.config())
        self.route = Route("a", DOT, 1, "node", boot.host, self.host.address, is_async)
        where = folder if wire == "unix" else folder / "nowhere"
        self.link: Any = self.actor if wire == "ray" else DirectLink(SECRET, LIFE, self.host.address, where, COURIER, lambda: self.actor)
        self.world.hosts[boot.host] = self.link
        self.world.routes["a"] = self.route
        self.client.learn(self.route, self.link)

    def also(self, other: Pair) -> None:
        """The bird is in another host now."""
        self.world.hosts[other.route.host] = other.link
        self.world.routes["a"] = other.route
        self.world.the_nest.look()

    def call(self, method: str, *args: Any, timeout: float | None = 10.0) -> Any:
        return self.client.call("a", None, method, args, {}, timeout, False)

    async def aio(self, method: str, *args: Any, timeout: float | None = 10.0) -> Any:
        return await self.client.aio("a", None, method, args, {}, timeout, False)

    def future(self, method: str, *args: Any, timeout: float | None = 10.0) -> Any:
        return self.client.future("a", None, method, args, {}, timeout, False)

    def cast(self, method: str, *args: Any) -> None:
        self.client.cast("a", None, method, args, {})

    def stream(self, method: str, *args: Any, timeout: float | None = 10.0) -> Any:
        return self.client.stream("a", None, method, args, {}, timeout, False)

    def break_connections(self) -> None:
        """As the end of the host's process does."""
        listener = self.host._listener
        for caller in list(listener._callers.values()):
            listener._drop(caller)
        self.actor._gone = True

    def close(self) -> None:
        if self.host._listener is not None:
            self.host._listener.close()
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)


__all__ = ["DOT", "Down", "Pair"]
