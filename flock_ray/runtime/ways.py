"""Which way a message takes to a host: a socket where one can be had, else Ray (`init(wire=...)`).

Ray carries what a socket should not: object references, buffers beside a message (numpy), and what is longer than `LONGEST`, both as
arguments and as results. The host keeps each caller's order whatever way its messages take.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any

from flock_ray.config import Config
from flock_ray.core import wire
from flock_ray.core.connection import CALL, LONGEST, NEST_BODY, ProtocolError
from flock_ray.runtime import cluster
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.links import Link, NestLink, RayLink, RayLinks, RayReply
from flock_ray.runtime.listener import NEST_SOCKET
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, Urgency
from flock_ray.runtime.sockets import SocketLink
from flock_ray.runtime.tls import contexts
from flock_ray.specs import Route

AGAIN = 5.0  # seconds until a node that no socket reached is tried again, in the background


class LaterReply:
    """A reply that has to be asked for first."""

    def __init__(self, asked: Future[Reply]) -> None:
        self._asked = asked

    @property
    def done(self) -> bool:
        return self._asked.done() and (self._asked.exception() is not None or self._asked.result().done)

    def get(self, timeout: float | None) -> Raw:
        until = None if timeout is None else time.monotonic() + timeout
        try:
            reply = self._asked.result(timeout)
        except TimeoutError as error:
            raise NoAnswer from error
        return reply.get(None if until is None else max(0.0, until - time.monotonic()))

    def on_done(self, callback: Callable[[Reply], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        del loop

        def asked(future: Future[Reply]) -> None:
            if future.exception() is None:
                future.result().on_done(lambda _: callback(self))
            else:
                callback(self)

        self._asked.add_done_callback(asked)

    def tell(self, callback: Callable[[Reply], object]) -> None:
        """As Ray's."""

    def forget(self) -> None:
        """It goes with the reply that it waits for."""


class DirectLink(SocketLink):
    """The way to a host over a socket, and over Ray what a socket should not carry.

    Args:
        ray_link: finds the host's actor; may block, and raise `Down`.
        others: as `SocketLink`.
    """

    def __init__(
        self,
        secret: bytes,
        life: str,
        address: str,
        folder: Path,
        courier: Courier,
        ray_link: Callable[[], RayLink],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(secret, life, address, folder, tls)
        self._courier = courier
        self._find_ray_link = ray_link
        self._lock = Lock()
        self._ray_link: RayLink | None = None
        self._waiting: list[tuple[Callable[[RayLink], RayReply], Future[Reply]]] = []
        self._by_ray_before: list[weakref.ref[Reply]] = []  # replies of messages that Ray carries, or has carried

    def send(self, message: bytes, extra: Sequence[Any] = (), urgency: Urgency = Urgency.NOW) -> Reply:
        if not extra and len(message) <= LONGEST and not (self._by_ray_before and self._ray_carries()):
            return self.transmit(CALL, message, urgency)
        # What follows on a message by Ray goes that way too until that is answered: it would overtake it on the socket.
        self.flush()
        reply = self._by_ray(lambda link: link.send(message, extra))
        with self._lock:
            self._by_ray_before.append(weakref.ref(reply))
        return reply

    def _ray_carries(self) -> bool:
        """Does Ray carry a message now? Looked at when another is sent: to be told of each answer would cost a hop between threads."""
        with self._lock:
            before = [(kept, kept()) for kept in self._by_ray_before]
            self._by_ray_before = [kept for kept, reply in before if reply is not None and not reply.done]
            return bool(self._by_ray_before)

    def pull(self, message: bytes, items: int) -> Reply:
        return self.transmit(CALL, message, answers=items)

    def fetch(self, parcel: str) -> Reply:
        return self._by_ray(lambda link: link.fetch(parcel))

    def _by_ray(self, ask: Callable[[RayLink], RayReply]) -> Reply:
        """Asks the host's actor, in order; to find it may take long where the head cannot be reached, so that is done elsewhere."""
        with self._lock:
            if self._ray_link is not None:
                return ask(self._ray_link)
            later: Future[Reply] = Future()
            self._waiting.append((ask, later))
            if len(self._waiting) == 1:
                self._courier.post(lambda: self._courier.spawn(self._find()))
        return LaterReply(later)

    async def _find(self) -> None:
        try:
            link = await self._courier.blocking(self._find_ray_link)
        except Exception as error:  # `Down`, or Ray is not initialised any more: for all who wait
            with self._lock:
                waiting, self._waiting = self._waiting, []
            for _, later in waiting:
                later.set_exception(error)
            return
        with self._lock:
            self._ray_link = link
            waiting, self._waiting = self._waiting, []
            asked = [(later, _asked(ask, link)) for ask, later in waiting]  # in order, before others may ask
        for later, outcome in asked:
            if isinstance(outcome, Exception):
                later.set_exception(outcome)
            else:
                later.set_result(outcome)


def _asked(ask: Callable[[RayLink], RayReply], link: RayLink) -> RayReply | Exception:
    try:
        return ask(link)
    except Exception as error:  # Ray did not take it: for who waits
        return error


class DirectNestLink(SocketLink):
    """The way to a nest over its socket; without a door (`ip:port`), to one on this machine."""

    def __init__(self, secret: bytes, life: str, folder: Path, door: str = "", tls: ssl.SSLContext | None = None) -> None:
        super().__init__(secret, life, f"{door} {NEST_SOCKET}", folder, tls, limit=NEST_BODY)

    def ask(self, request: bytes) -> Reply:
        return self.transmit(CALL, wire.encode(wire.ForNest("ask"), request))

    def read(self, query: bytes) -> Reply:
        return self.transmit(CALL, wire.encode(wire.ForNest("read"), query))

    def routes(self, query: bytes) -> Reply:
        return self.transmit(CALL, wire.encode(wire.ForNest("routes"), query))

    def ready(self, timeout: float) -> None:
        """Waits until it has its view and acts. Raises `Down`, `NoAnswer`."""
        self.transmit(CALL, wire.encode(wire.ForNest("ready"))).get(timeout)


class Ways(RayLinks):
    """Links to the hosts of one flock."""

    def __init__(self, flock: str, courier: Courier) -> None:
        super().__init__(flock)
        self._courier = courier
        self._direct: dict[str, DirectLink] = {}
        self._stand_ins: dict[str, tuple[Route, RayLink]] = {}  # Ray's links to hosts that should be reached by a socket
        self._unreached: dict[str, float] = {}  # until when no socket to a node is tried
        self._making: dict[str, Lock] = {}
        tls = contexts()
        self._tls = tls[1] if tls is not None else None

    def nest(self, flock: str, timeout: float) -> NestLink:
        """Over the nest's socket if it can be found without the head, else with its help. May block. Raises `FlockNotRunning`."""
        direct = self._direct_nest(flock)
        if direct is not None:
            return direct
        by_ray = super().nest(flock, timeout)
        return self._direct_nest(flock) or by_ray

    def _direct_nest(self, flock: str) -> DirectNestLink | None:
        if cluster.is_ray_client() or not cluster.initialized():
            return None
        record = cluster.record_of(flock) or cluster.record_left(flock)
        if record is None or record.ending or record.config.wire != "auto":
            return None
        try:
            link = DirectNestLink(record.secret, record.life, cluster.folder_of(record, cluster.node_id()))
        except (OSError, ProtocolError):
            return None
        cluster.remember(record)
        return link

    def nest_of(self, flock: str, node: str, door: str) -> NestLink | None:
        record = cluster.record_of(flock)
        if record is None or cluster.is_ray_client() or record.config.wire != "auto":
            return None
        try:
            return DirectNestLink(record.secret, record.life, cluster.folder_of(record, node), door, self._tls)
        except (OSError, ProtocolError):
            return None

    def ensure(self, flock: str, settings: Mapping[str, Any]) -> Config:
        """As `RayLinks.ensure`; without the head if the flock is here already and no settings are to be compared."""
        direct = self._direct_nest(flock) if not settings else None
        if direct is not None:
            try:
                direct.ready(cluster.BOOT_SECONDS)
            except (Down, NoAnswer):
                return super().ensure(flock, settings)
            return cluster.config_of(flock)
        return super().ensure(flock, settings)

    def host(self, route: Route) -> Link:
        """Over a socket if the host listens and can be reached, else over Ray. May block. Raises `Down` if the host is gone."""
        making = self._making.setdefault(route.host, Lock())  # of several threads one connects
        try:
            with making:
                return self._made(route)
        finally:
            self._making.pop(route.host, None)

    def _made(self, route: Route) -> Link:
        link = self._direct.get(route.host)
        if link is not None and not link.lost():
            return link
        _, stand_in = self._stand_ins.get(route.host, (None, None))
        if stand_in is not None and not stand_in.lost():
            return stand_in
        if not self._may_listen(route):
            return self.ray_host(route)
        try:
            made = self._connect(route)
        except ConnectionError:  # the host is gone, or a firewall says no: Ray knows, and is asked before a message is risked
            stand_in = self._stand_in(route)
            stand_in.used_at = 0.0
            return stand_in
        if made is None:
            return self._stand_in(route)
        self._keep(route, made)
        return made

    def _keep(self, route: Route, link: DirectLink) -> None:
        self._direct = {name: kept for name, kept in self._direct.items() if not kept.lost()}
        self._direct[route.host] = link

    def _stand_in(self, route: Route) -> RayLink:
        """Ray's way to a host until a socket can be had. In a split a call by Ray waits, and long after its end (25 s were seen)."""
        shared = self.ray_host(route)
        link = RayLink(shared.handle, shared.name)  # of its own: who has a socket may use the shared one for what is too long for it
        looking = bool(self._stand_ins)
        self._stand_ins[route.host] = (route, link)
        if not looking:
            self._courier.post(lambda: self._courier.spawn(self._look_again()))
        return link

    async def _look_again(self) -> None:
        """Tries the sockets again, and retires the stand-ins of those that can be had: lanes go on over the socket, in order."""
        while self._stand_ins:
            await asyncio.sleep(AGAIN)
            for host, (route, link) in tuple(self._stand_ins.items()):
                try:
                    made = None if link.lost() else await self._courier.blocking(self._connect, route)
                except ConnectionError:
                    continue
                if made is not None:
                    self._keep(route, made)
                if made is not None or link.lost():
                    link.retire()
                    self._stand_ins.pop(host, None)

    def _may_listen(self, route: Route) -> bool:
        return bool(route.address) and cluster.record_of(self.flock) is not None and not cluster.is_ray_client()

    def _connect(self, route: Route) -> DirectLink | None:
        """A new connection; `None` if there is no way for one now. Raises `ConnectionError` if nobody listens there, or not any more."""
        record = cluster.record_of(self.flock)
        if record is None or self._unreached.get(route.node, 0.0) > time.monotonic():
            return None
        try:
            folder = cluster.folder_of(record, route.node)
            return DirectLink(record.secret, record.life, route.address, folder, self._courier, lambda: self.ray_host(route), self._tls)
        except ConnectionError:
            raise
        except (OSError, ProtocolError):
            self._unreached[route.node] = time.monotonic() + AGAIN
            return None

    def forget_hosts(self) -> None:
        super().forget_hosts()
        for link in self._direct.values():
            link.retire()
        self._direct, self._stand_ins = {}, {}
