"""A process's client in the simulated cluster: the real one, with links that lead to objects, and a courier that runs in virtual time."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import pickle
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flock_ray.config import Config
from flock_ray.errors import FlockNotRunning
from flock_ray.runtime.client import Client, Process
from flock_ray.runtime.cluster import Origin
from flock_ray.runtime.courier import ROUND, Courier, Gate, logger
from flock_ray.runtime.life import Response
from flock_ray.runtime.links import Link, NestLink
from flock_ray.runtime.pending import CallFuture, Pending
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, Urgency
from flock_ray.runtime.streams import Stream
from flock_ray.specs import Name, Route
from flock_ray.testing import virtual
from flock_ray.testing.virtual import VirtualLoop, here

if TYPE_CHECKING:
    from flock_ray.testing.node import LocalHost, LocalNest, Node

R = TypeVar("R")

LATENCY = 0.0005  # seconds from node to node


class Cluster(Protocol):
    """What of the world clients need."""

    loop: VirtualLoop

    def node_here(self) -> Node:
        """The node on which the code runs."""

    nodes: dict[str, Node]

    def reaches(self, one: Node, other: Node) -> bool: ...

    def host_of(self, route: Route) -> LocalHost | None: ...

    def config(self, flock: str) -> Config | None: ...

    async def ensure(self, flock: str, settings: Mapping[str, Any]) -> Config: ...

    async def destroy(self, flock: str) -> None: ...

    def connected(self, link: HostLink) -> None:
        """Has it told when the network is split or healed."""


class LocalReply:
    """The answer to a message, when it is there."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._outcome: Raw | Exception | None = None
        self._callbacks: list[Callable[[], object]] = []

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def set(self, outcome: Raw | Exception) -> None:
        """The first counts."""
        if self._outcome is None:
            self._outcome = outcome
            for callback in self._callbacks:
                self._loop.call_soon(callback, context=contextvars.Context())

    def get(self, timeout: float | None) -> Raw:
        if self._outcome is None and (timeout == 0 or not self._loop.wait(self._callbacks.append, timeout)):
            raise NoAnswer
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome or Raw(b"")

    def on_done(self, callback: Callable[[Reply], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        del loop
        if self._outcome is None:
            self._callbacks.append(lambda: callback(self))
        else:
            self._loop.call_soon(callback, self, context=contextvars.Context())

    def tell(self, callback: Callable[[Reply], object]) -> None:
        """All are answered, and whoever watches the newest learns of those before it."""

    def forget(self) -> None:
        """It goes with its last reference."""


class Way:
    """One direction of a connection: what is sent arrives in order, if the network is whole, else when it is healed."""

    def __init__(self, cluster: Cluster, source: Node, target: Node) -> None:
        self._cluster, self._source, self._target = cluster, source, target
        self._under_way: deque[Callable[[], object]] = deque()
        self._stalled = 0

    def send(self, arrive: Callable[[], object]) -> None:
        self._under_way.append(arrive)
        delay = 0.0 if self._source is self._target else LATENCY
        self._cluster.loop.call_later(delay, self._arrive, context=contextvars.Context())

    def _arrive(self) -> None:
        if self._cluster.reaches(self._source, self._target):
            self._under_way.popleft()()
        else:
            self._stalled += 1

    def healed(self) -> None:
        stalled, self._stalled = self._stalled, 0
        for _ in range(stalled):
            self._arrive()


class HostLink:
    """The way to a process of birds, as Ray's actor calls are one: a message is answered by one."""

    path = "ray"

    def __init__(self, cluster: Cluster, source: Node, host: LocalHost) -> None:
        self._cluster, self._loop = cluster, cluster.loop
        self.source, self.host = source, host
        self.used_at = float("inf") if source is host.node else self._loop.time()  # on one machine the kernel tells at once of an end
        self._gone = False
        self._out, self._in = Way(cluster, source, host.node), Way(cluster, host.node, source)
        self._waiting: dict[LocalReply, None] = {}
        host.links.append(self)
        cluster.connected(self)

    def lost(self) -> bool:
        return self._gone

    def retire(self) -> None:
        self._gone = True

    def heard(self, now: float) -> None:
        self.used_at = max(self.used_at, now)

    def look(self) -> None:
        """Answers come by themselves."""

    def flush(self) -> None:
        """All has left."""

    def send(self, message: bytes, extra: Sequence[Any], urgency: Urgency = Urgency.NOW) -> LocalReply:
        del urgency
        reply = self._reply()
        copies = [bytes(each) if isinstance(each, pickle.PickleBuffer) else each for each in extra]
        self._out.send(lambda: self.host.take(message, copies, lambda response: self._in.send(lambda: self._answer(reply, response))))
        return reply

    def pull(self, message: bytes, items: int) -> LocalReply:
        del items
        return self.send(message, ())

    def control(self, message: bytes) -> LocalReply:
        reply = self._reply()

        def arrive() -> None:
            if not self.host.dead:
                answer = self.host.control(message)
                self._in.send(lambda: self._answer(reply, answer))

        self._out.send(arrive)
        return reply

    def fetch(self, parcel: str) -> LocalReply:
        raise NotImplementedError(f"answers are never put aside here, so there is no {parcel!r}")

    def _reply(self) -> LocalReply:
        reply = LocalReply(self._loop)
        if self._gone:
            reply.set(Down("its process is gone", ran=False))
        else:
            self._waiting[reply] = None
        return reply

    def _answer(self, reply: LocalReply, response: Response) -> None:
        if self._waiting.pop(reply, reply) is None:
            copies = response[1:] if isinstance(response, tuple) else ()
            extra = [bytes(each) if isinstance(each, pickle.PickleBuffer) else each for each in copies]
            reply.set(Raw(response[0] if isinstance(response, tuple) else response, extra))

    def process_died(self) -> None:
        """Whoever is on this side of a split hears of it at once."""
        if self._cluster.reaches(self.source, self.host.node):
            self.break_off("its process died")

    def healed(self) -> None:
        if self.host.dead:
            self.break_off("its process died")
            return
        self._out.healed()
        self._in.healed()

    def break_off(self, why: str) -> None:
        """The connection is gone, and nobody knows what became of messages that were not answered."""
        self._gone = True
        waiting, self._waiting = self._waiting, {}
        for reply in waiting:
            reply.set(Down(why, ran=True))


class LocalNestLink:
    """The way to the nest of the same node."""

    def __init__(self, loop: VirtualLoop, nest: LocalNest) -> None:
        self._loop, self._nest = loop, nest

    def lost(self) -> bool:
        return self._nest._ending

    def ask(self, request: bytes) -> LocalReply:
        return self._answered(self._nest.ask(request))

    def read(self, query: bytes) -> LocalReply:
        return self._answered(self._nest.read(query))

    def routes(self, query: bytes) -> LocalReply:
        return self._answered(self._nest.routes(query))

    def _answered(self, work: Coroutine[Any, Any, bytes]) -> LocalReply:
        reply = LocalReply(self._loop)
        if self._nest.is_dead:
            work.close()
            reply.set(Down("its nest has ended", ran=False))
            return reply
        task = self._loop.create_task(work, context=contextvars.Context())
        self._nest.asked[task] = None

        def done(task: asyncio.Task[bytes]) -> None:
            self._nest.asked.pop(task, None)
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or error is not None:
                reply.set(Down(f"its nest has ended ({error})", ran=True))
                if error is not None:
                    self._loop.fail(error)
            else:
                reply.set(Raw(task.result()))

        task.add_done_callback(done)
        return reply


class LocalLinks:
    """Implements `links.Links` for one process on a node."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self._cluster, self._node = cluster, node
        self._hosts: dict[str, HostLink] = {}

    def session(self) -> object:
        return self._cluster

    def is_up(self) -> bool:
        return True

    def host(self, route: Route) -> Link:
        link = self._hosts.get(route.host)
        if link is None or link.lost():
            host = self._cluster.host_of(route)
            if host is None or not self._cluster.reaches(self._node, host.node):
                raise Down(f"the process of {route.name!r} cannot be reached", ran=False)
            link = self._hosts[route.host] = HostLink(self._cluster, self._node, host)
        return link

    def nest_of(self, flock: str, node: str, door: str) -> NestLink | None:
        del flock, node, door
        return None

    def nest_on(self, flock: str, node: str, door: str) -> NestLink:
        del door
        place = self._cluster.nodes[node]
        nest = place.nests.get(flock)
        if nest is None or nest._ending or not self._cluster.reaches(self._node, place):
            raise Down(f"the nest of {node!r} cannot be reached", ran=False)
        return LocalNestLink(self._cluster.loop, nest)

    def nest(self, flock: str, timeout: float) -> NestLink:
        del timeout
        nest = self._node.nests.get(flock)
        if nest is None or nest._ending:
            raise FlockNotRunning(f"flock {flock!r} is not running; call flock_ray.init() or start a bird")
        return LocalNestLink(self._cluster.loop, nest)

    def config(self, flock: str) -> Config:
        config = self._cluster.config(flock)
        if config is None:
            raise FlockNotRunning(f"flock {flock!r} is not running; call flock_ray.init() or start a bird")
        return config

    def ensure(self, flock: str, settings: Mapping[str, Any]) -> Any:
        """A coroutine, for `LocalCourier.blocking`."""
        return self._cluster.ensure(flock, settings)

    def destroy(self, flock: str) -> Any:
        """A coroutine, for `LocalCourier.blocking`."""
        return self._cluster.destroy(flock)

    def forget(self, flock: str) -> None:
        """Nothing is kept of nests."""

    def forget_hosts(self) -> None:
        self._hosts = {}


class LocalCourier(Courier):
    """Runs on the loop of virtual time, which has all there is."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop: VirtualLoop = loop

    def post(self, what: Callable[..., object], *args: Any) -> None:
        if not self._loop.is_closed():  # else it is of a stream that has outlived its flock
            self._loop.call_soon(what, *args)

    def post_later(self, what: Callable[..., object], *args: Any) -> None:
        self._loop.call_later(ROUND, what, *args)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        return self._loop.wait_for(work)  # type: ignore[no-any-return]  # what the coroutine returns

    async def run_async(self, work: Coroutine[Any, Any, R]) -> R:
        if self._loop.is_here:
            return await work
        try:
            await asyncio.sleep(0)  # on a loop of the test's own: others that were begun together begin together
        except BaseException:
            work.close()
            raise
        return self.run(work)

    async def in_thread(self, work: Callable[..., R], *args: Any) -> R:
        if self._loop.is_here:
            return await self._loop.run_in_executor(None, work, *args)  # type: ignore[no-any-return]  # what the work returns
        await asyncio.sleep(0)
        return work(*args)

    async def blocking(self, what: Callable[..., R], *args: Any) -> R:
        outcome: Any = what(*args)
        return await outcome if inspect.isawaitable(outcome) else outcome  # type: ignore[no-any-return]  # as `what` says

    def sleep(self, seconds: float) -> None:
        self._loop.sleep(seconds)

    def gate(self) -> Gate:
        return virtual.Gate(self._loop)

    def run_callback(self, what: Callable[..., object], *args: Any) -> None:
        def run() -> None:
            try:
                what(*args)
            except Exception:
                logger.exception("the callback %r of a future raised", what)

        self._loop.begin(run, contextvars.Context())


class LocalFuture(CallFuture):
    """A future in virtual time."""

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        super().add_done_callback(fn)
        message, loop = self._message, asyncio._get_running_loop()
        virtual_loop = message.lane.client.courier.loop
        if loop is not None and loop is not virtual_loop:
            message.wait(message.deadline)  # a loop of the test's own awaits it, and has no virtual time

    @property
    def _waiters(self) -> list[Any]:
        if self._told:
            return self._who_waits
        text = "concurrent.futures.wait and as_completed wait in real time"
        raise RuntimeError(f"{text}: in a flock of flock_ray.testing, ask each future for its result()")

    @_waiters.setter
    def _waiters(self, waiters: list[Any]) -> None:
        """As `CallFuture`."""


class LocalStream(Stream[Any]):
    """A stream in virtual time, for any event loop."""

    async def _wait_async(self) -> None:
        if asyncio.get_running_loop() is self._message.lane.client.courier.loop:
            await super()._wait_async()
        else:
            await asyncio.sleep(0)
            self._wait()


class LocalClient(Client):
    """The client of one process on a node."""

    future_type = LocalFuture
    stream_type = LocalStream

    def __init__(self, flock: str, cluster: Cluster, courier: Courier) -> None:
        self._virtual = cluster.loop
        super().__init__(flock, LocalLinks(cluster, cluster.node_here()), courier, cluster.loop.time)

    def _message(self, *args: Any, **kwargs: Any) -> Pending:
        self._virtual.check()
        home = here.get()
        if home is not None and home.dead:
            raise asyncio.CancelledError  # it was killed, and is being unwound
        return super()._message(*args, **kwargs)

    def aio(self, *args: Any) -> Coroutine[Any, Any, Any]:
        if self._virtual.is_here:
            return super().aio(*args)
        message = self._message(*args)
        message.lane.submit(message, Urgency.NOW)
        return self._on_another_loop(message)

    async def _on_another_loop(self, message: Pending) -> Any:
        """For a loop of the test's own: virtual time passes while that stands still."""
        try:
            await asyncio.sleep(0)
            message.wait(message.deadline)
        except BaseException:
            message.take_back()
            raise
        return message.value()


class Here(Process):
    """What the process has whose code runs, be it the test's or a bird's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[Name, Client] = {}
        super().__init__()
        self.courier = LocalCourier(cluster.loop)
        self.links = self  # type: ignore[assignment]  # of these it is asked only for what follows

    @property
    def clients(self) -> dict[str, Client]:
        home: Any = here.get()
        return (home if home is not None else self._cluster.node_here()).clients

    @clients.setter
    def clients(self, clients: dict[str, Client]) -> None:
        """Each process has its own."""

    def client(self, flock: str) -> Client:
        return LocalClient(flock, self._cluster, self.courier)

    def is_up(self) -> bool:
        return True

    def session(self) -> object:
        return self._cluster

    def origin(self) -> Origin:
        return Origin(None, "", ())
