"""Links to hosts and nests: how a message gets there and its answer back. Here: Ray's actor calls; a socket can keep the same contract.

Rules kept here: what Ray's errors say of a message is decided in one place. `Down.ran` is False only where the message certainly did
not run: its actor was known to be dead when it was sent, never came up, or could not be scheduled (measured, Ray 2.60). Nothing here
waits but `Reply.get`, `Links.host` and `Links.nest`; the last two ask the head node when they find nothing kept, so they never run on
an event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import ray
from ray import exceptions
from ray.actor import ActorHandle

from flock_ray.config import Config
from flock_ray.runtime import cluster
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, Urgency
from flock_ray.specs import Route

_LOOK_AGAIN = 0.01  # seconds: in a burst of calls the look gives the GIL away each time, which cost a tenth of the rate (measured)


class Link(Protocol):
    """The way to one host."""

    path: str  # "unix", "tcp" or "ray"
    used_at: float  # the clock when last something came back

    def lost(self) -> bool:
        """Is it known that nothing sent from now on can run?"""
        ...

    def retire(self) -> None:
        """Counts it as lost: nothing more is to be sent over it."""
        ...

    def heard(self, now: float) -> None:
        """An answer came."""
        ...

    def look(self) -> None:
        """Settles the answers that are there."""
        ...

    def flush(self) -> None:
        """Lets what may leave later leave now."""
        ...

    def send(self, message: bytes, extra: Sequence[Any], urgency: Urgency) -> Reply:
        """Takes a message on its way; never waits."""
        ...

    def pull(self, message: bytes, items: int) -> Reply:
        """Sends a `Pull` of so many items, in whatever order with calls: a reply that gives one item after the other. By Ray, of one."""
        ...

    def control(self, message: bytes) -> Reply: ...

    def fetch(self, parcel: str) -> Reply:
        """An answer that its host has put aside for Ray to carry."""
        ...


class Way:
    """The way to one bird: its route, and the link to its host, which may be that of others too."""

    __slots__ = ("_retired", "link", "route")

    def __init__(self, route: Route, link: Link) -> None:
        self.route = route
        self.link = link
        self._retired = False

    def retire(self) -> None:
        """This process has just ended the life at its other end, and has to see that itself, even if the host still answers (C3)."""
        self._retired = True

    def lost(self) -> bool:
        """Is it not to be used any more?"""
        return self._retired or self.link.lost()


class NestLink(Protocol):
    """The way to a nest."""

    def lost(self) -> bool: ...

    def ask(self, request: bytes) -> Reply: ...

    def read(self, query: bytes) -> Reply: ...

    def routes(self, query: bytes) -> Reply: ...


class Links(Protocol):
    """Where links come from."""

    def session(self) -> object | None:
        """Tells one `ray.init` of this process from the next; `None` when Ray is not initialised. Cheap."""
        ...

    def host(self, route: Route) -> Link:
        """May block. Raises `Down` if the host is gone."""
        ...

    def nest_of(self, flock: str, node: str, door: str) -> NestLink | None:
        """The nest of another node, over its socket (`ip:port`); `None` if there is no way. May block."""
        ...

    def nest_on(self, flock: str, node: str, door: str) -> NestLink:
        """As `nest_of`, and if there is no way, by Ray. Raises `Down` if there is no such nest."""
        ...

    def nest(self, flock: str, timeout: float) -> NestLink:
        """May block. Raises `FlockNotRunning`."""
        ...

    def config(self, flock: str) -> Config:
        """The settings of a flock whose nest was found."""
        ...

    def ensure(self, flock: str, settings: Mapping[str, Any]) -> Config:
        """Creates the flock, if it is not there. May block. Raises `FlockNotRunning`, `ValueError`."""
        ...

    def destroy(self, flock: str) -> None:
        """Ends the flock. May block."""
        ...

    def forget(self, flock: str) -> None:
        """Finds the flock's nest anew next time."""
        ...

    def forget_hosts(self) -> None:
        """Drops what is kept of hosts."""
        ...


class RayReply:
    """A reply that Ray keeps."""

    __slots__ = ("__weakref__", "_future", "_got", "_link", "_ref")

    def __init__(self, ref: ray.ObjectRef[Any], link: _RayLink) -> None:
        self._ref = ref
        self._link = link
        self._future: Future[Any] | None = None
        self._got = False

    @property
    def done(self) -> bool:
        if self._future is not None:
            return self._future.done()
        return self._got or bool(ray.wait([self._ref], timeout=0)[0])

    def get(self, timeout: float | None) -> Raw:
        try:
            answer = self._future.result(timeout) if self._future is not None else ray.get(self._ref, timeout=timeout)
            self._got = True
        except TimeoutError as error:  # Ray's GetTimeoutError is one too
            if self._future is not None and self._future.done():
                raise  # the task of an argument raised it
            raise NoAnswer from error
        except exceptions.RayTaskError:
            raise  # of an argument: its task failed, as Ray reports it
        except (exceptions.RayActorError, exceptions.ActorUnschedulableError, exceptions.RuntimeEnvSetupError) as error:
            raise self._link.went_down(error) from error
        if isinstance(answer, bytes):
            return Raw(answer)
        return Raw(answer[0], answer[1:])

    def on_done(self, callback: Callable[[Reply], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        del loop
        if self._future is None:
            self._future = self._ref.future()
        self._future.add_done_callback(lambda _: callback(self))

    def tell(self, callback: Callable[[Reply], object]) -> None:
        """Ray answers all, and whoever watches the newest learns of those before it."""

    def forget(self) -> None:
        """Ray drops an answer with its reference."""


class _RayLink:
    path = "ray"

    def __init__(self, handle: ActorHandle[Any], name: str) -> None:
        self.handle = handle
        self.name = name
        self.used_at = time.monotonic()
        self._gone = False
        self._looked_at = 0.0
        self._is_dead = cluster.death_watch(handle)

    def lost(self) -> bool:
        """Ray tells every holder of a handle of the actor's death; asking what it was told takes 0.3 us."""
        if not self._gone and self._is_dead is not None:
            now = time.monotonic()
            if now - self._looked_at > _LOOK_AGAIN:
                self._looked_at = now
                self._gone = self._is_dead()
        return self._gone

    def retire(self) -> None:
        self._gone = True

    def heard(self, now: float) -> None:
        self.used_at = now

    def look(self) -> None:
        """Ray tells by itself."""

    def flush(self) -> None:
        """Ray sends at once."""

    def went_down(self, error: Exception) -> Down:
        text = str(error)
        if isinstance(error, exceptions.ActorUnavailableError):
            return Down(text, ran=True)
        self._gone = True
        certain = not isinstance(error, exceptions.ActorDiedError) or error.actor_init_failed or "The actor never ran" in text
        return Down(text, ran=not certain)


class RayLink(_RayLink):
    """A host, by its actor handle."""

    def __init__(self, handle: ActorHandle[Any], name: str) -> None:
        super().__init__(handle, name)
        self._call: Callable[..., ray.ObjectRef[Any]] = handle.call.remote
        self._control: Callable[..., ray.ObjectRef[Any]] = handle.control.remote

    def send(self, message: bytes, extra: Sequence[Any], urgency: Urgency = Urgency.NOW) -> RayReply:
        del urgency
        return RayReply(self._call(message, *extra), self)

    def pull(self, message: bytes, items: int) -> RayReply:
        del items
        return RayReply(self._call(message), self)

    def control(self, message: bytes) -> RayReply:
        return RayReply(self._control(message), self)

    def fetch(self, parcel: str) -> RayReply:
        """What the host could not answer through a socket."""
        return RayReply(self.handle.fetch.remote(parcel), self)


class RayNestLink(_RayLink):
    """A nest, by its actor handle."""

    def ask(self, request: bytes) -> RayReply:
        return RayReply(self.handle.ask.remote(request), self)

    def read(self, query: bytes) -> RayReply:
        return RayReply(self.handle.read.remote(query), self)

    def routes(self, query: bytes) -> RayReply:
        return RayReply(self.handle.routes.remote(query), self)


class RayLinks:
    """Links over Ray's actor calls. A flock's clients take `ways.Ways`, which prefers sockets."""

    def __init__(self, flock: str = "default") -> None:
        self.flock = flock
        self._hosts: dict[str, RayLink] = {}

    def is_up(self) -> bool:
        """Is Ray initialised? Ten times cheaper than `session`."""
        return ray.is_initialized()

    def session(self) -> object | None:
        if not ray.is_initialized():
            return None
        context = ray.get_runtime_context()
        try:
            return context.get_worker_id()
        except AttributeError:  # under Ray Client
            return context.get_job_id()

    def host(self, route: Route) -> Link:
        return self.ray_host(route)

    def ray_host(self, route: Route) -> RayLink:
        link = self._hosts.get(route.host)
        if link is not None and not link.lost():
            return link
        cluster.forget_host(route.host)
        try:
            handle = cluster.host_handle(route.host)
        except ValueError as error:
            self._hosts.pop(route.host, None)
            raise Down(str(error), ran=False) from error
        link = self._hosts[route.host] = RayLink(handle, route.host)
        self._hosts = {name: kept for name, kept in self._hosts.items() if not kept.lost()}
        return link

    def nest_of(self, flock: str, node: str, door: str) -> NestLink | None:  # noqa: ARG002  # there is no quick way
        return None

    def nest_on(self, flock: str, node: str, door: str) -> NestLink:
        direct = self.nest_of(flock, node, door)
        if direct is not None:
            return direct
        record = cluster.record_of(flock)
        try:
            if record is not None:
                return RayNestLink(cluster.nest_handle(record.life, node), flock)
        except ValueError as error:
            raise Down(str(error), ran=False) from error
        raise Down(f"flock {flock!r} was let go of", ran=False)

    def nest(self, flock: str, timeout: float) -> NestLink:
        return RayNestLink(cluster.local_nest(flock, timeout), flock)

    def config(self, flock: str) -> Config:
        return cluster.config_of(flock)

    def ensure(self, flock: str, settings: Mapping[str, Any]) -> Config:
        return cluster.ensure_flock(flock, dict(settings))

    def destroy(self, flock: str) -> None:
        cluster.destroy(flock)

    def forget(self, flock: str) -> None:
        cluster.forget(flock)

    def forget_hosts(self) -> None:
        for name in self._hosts:
            cluster.forget_host(name)
        self._hosts = {}
