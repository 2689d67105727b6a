"""A process's client of one flock: kept routes, and a lane for each caller and bird.

Rules kept here: a caller is a thread, or, inside a bird, the bird, whichever thread its methods run in (C2). A call's chain goes with it
and is looked at before it is sent (C4). Everything kept belongs to one `ray.init`; after the next one there is a new client.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from flock_ray import errors
from flock_ray.runtime import inside, payload
from flock_ray.runtime.asks import Asks
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.deadlines import Deadlines
from flock_ray.runtime.lanes import Lane
from flock_ray.runtime.links import Link, Links, RayLinks, Way
from flock_ray.runtime.metrics import CallMetrics
from flock_ray.runtime.pending import FOREVER, CallFuture, Default, Pending
from flock_ray.runtime.replies import Urgency
from flock_ray.runtime.streams import Stream
from flock_ray.runtime.ways import Ways
from flock_ray.specs import Dot, Name, Route

Lanes = dict[Name, Lane]  # of one caller
Chain = tuple[tuple[str, Name], ...]  # birds that wait, as (flock, name)
DEFAULT = Default.TIMEOUT
ROUTES = 1_000_000  # names whose route is kept, about 0.4 KB of each
LANES = 4_096  # lanes a caller keeps before it drops those with nothing under way
LOOK_AGAIN = 0.05  # seconds; `ray.shutdown` and another `ray.init` take longer, and the look a fifth of what a cast costs
FLUSH_SECONDS = 1.0  # how long the end of a process, or `shutdown`, waits for casts to be delivered


class Client:
    """Calls birds of one flock. All methods may be called from any thread; `links` is what a test replaces."""

    def __init__(self, flock: str, links: Links, courier: Courier, clock: Callable[[], float] = time.monotonic) -> None:
        self.flock = flock
        self.links = links
        self.courier = courier
        self.clock = clock
        self.session = links.session()
        self.looked_at = 0.0  # when it was seen that Ray's session is still this one
        self.asks = Asks(flock, links, courier, clock)
        self.deadlines = Deadlines()
        self.metrics = CallMetrics(flock, self.asks, courier)
        self._pid = os.getpid()
        self._process = uuid.uuid4().hex[:16]
        self._callers = itertools.count()
        self._ways: dict[Name, Way] = {}
        self._here = threading.local()
        self._by_life: weakref.WeakKeyDictionary[Any, Lanes] = weakref.WeakKeyDictionary()
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._lanes_lock = threading.Lock()

    # Calls

    def call(self, name: Name, dot: Dot | None, method: str, args: Any, kwargs: Any, timeout: float | Default | None, retry: bool) -> Any:
        """Calls a method and waits for its result, on this thread."""
        if inside.in_async_method():
            text = f"calling {method!r} of bird {name!r} here would stop the event loop of this bird; in an async def method"
            raise RuntimeError(f"{text}, await flock_ray.aio.call(...) or bird.{method}.aio(...)")
        message = self._message(name, dot, method, args, kwargs, timeout, retry)
        message.called_at = time.perf_counter()
        try:
            message.lane.submit(message, Urgency.NOW)
            message.wait(message.deadline)
        except BaseException:
            message.take_back()  # an interrupt
            raise
        return message.value()

    def aio(
        self, name: Name, dot: Dot | None, method: str, args: Any, kwargs: Any, timeout: float | Default | None, retry: bool
    ) -> Coroutine[Any, Any, Any]:
        """Calls a method; what it returns has to be awaited at once, on any event loop, for the result."""
        message = self._message(name, dot, method, args, kwargs, timeout, retry)
        message.called_at = time.perf_counter()
        message.lane.submit(message, Urgency.WITH_LOOP)
        return message.wait_async()

    def future(
        self,
        name: Name,
        dot: Dot | None,
        method: str,
        args: Any,
        kwargs: Any,
        timeout: float | Default | None,
        retry: bool,
        lanes: Lanes | None = None,
        chain: Chain | None = None,
    ) -> CallFuture:
        """Sends a call and returns the future of its result. With `lanes` in the order of whoever's these are; with a `chain` its sender is
        to wait for it.
        """
        message = self._message(name, dot, method, args, kwargs, timeout, retry, detached=True, lanes=lanes, chain=chain)
        message.lane.submit(message, Urgency.SOON)
        return CallFuture(message)

    def stream(
        self, name: Name, dot: Dot | None, method: str, args: Any, kwargs: Any, timeout: float | Default | None, retry: bool
    ) -> Stream[Any]:
        """Calls a generator method and returns the iterator over what it yields."""
        message = self._message(name, dot, method, args, kwargs, timeout, retry, stream=True)
        message.lane.submit(message, Urgency.NOW)
        return Stream(message)

    def cast(self, name: Name, dot: Dot | None, method: str, args: Any, kwargs: Any, lanes: Lanes | None = None) -> None:
        """Sends a message nobody waits for. `lanes` as `future`."""
        message = self._message(name, dot, method, args, kwargs, DEFAULT, False, cast=True, lanes=lanes)
        message.lane.submit(message, Urgency.SOON)

    def _message(
        self,
        name: Name,
        dot: Dot | None,
        method: str,
        args: Any,
        kwargs: Any,
        timeout: float | Default | None,
        retry: bool,
        *,
        cast: bool = False,
        detached: bool = False,
        stream: bool = False,
        lanes: Lanes | None = None,
        chain: Chain | None = None,
    ) -> Pending:
        body, extra = self.pack(name, method, args, kwargs)
        now_inside = inside.current.get()
        if chain is None:
            chain = now_inside.chain if now_inside is not None and not cast and not detached else ()
        message = Pending(
            self._lane(name, self._lanes_of(now_inside) if lanes is None else lanes), dot, method, body, extra, chain, timeout, retry
        )
        if chain and (self.flock, name) in chain:
            message.in_chain = True
        if cast or detached or stream:
            message.cast, message.detached, message.stream = cast, detached, stream
        self.give_time(message)
        return message

    def give_time(self, message: Pending) -> None:
        """Sets its deadline, as soon as the flock's default is known."""
        timeout = message.timeout
        if isinstance(timeout, Default):
            config = self.asks.known_config
            if config is None:
                message.waits_without_deadline = True  # there is no route either: the courier comes back to it
                return
            timeout = message.timeout = config.call_timeout
        if timeout is not None and message.deadline == FOREVER:
            message.deadline = self.clock() + timeout
            if message.waits_without_deadline:
                self.courier.post(message.set_timer)  # its sender may wait already

    def pack(self, name: Name, method: str, args: Any, kwargs: Any) -> tuple[bytes, Sequence[Any]]:
        """Pickles the arguments of a call. Raises `TypeError`, which names the one that cannot be."""
        try:
            return payload.pack((args, kwargs), what="the arguments")
        except TypeError as error:
            which = culprit(args, kwargs, lambda one: payload.pack(((one,), {}), what=""))
            raise TypeError(f"{which} of the call of {method!r} of bird {name!r} cannot be pickled: {error.__cause__ or error}") from error

    # Lanes and routes

    def lanes_here(self) -> Lanes:
        """The lanes of whoever calls here."""
        return self._lanes_of(inside.current.get())

    def _lanes_of(self, now_inside: inside.Inside | None) -> Lanes:
        if now_inside is not None:
            return self._by_life.setdefault(now_inside.life, {})
        try:
            return self._here.lanes  # type: ignore[no-any-return]  # as set below
        except AttributeError:
            lanes: Lanes = {}
            self._here.lanes = lanes
            return lanes

    def new_caller(self) -> str:
        """A caller id that nobody has had."""
        return f"{self._process}-{next(self._callers)}"

    def _lane(self, name: Name, lanes: Lanes) -> Lane:
        lane: Lane | None = lanes.get(name)
        if lane is None:
            if len(lanes) >= LANES:
                for idle in [other for other, kept in lanes.items() if kept.idle]:
                    del lanes[idle]
            lane = lanes[name] = Lane(self, name, self.new_caller())
            with self._lanes_lock:
                self._lanes.add(lane)
        return lane

    def known(self, name: Name) -> Way | None:
        """The kept way to a bird, if its host is not known to be gone."""
        known = self._ways.get(name)
        return None if known is None or known.lost() else known

    def path(self, name: Name) -> str | None:
        """By which way calls of a bird go."""
        known = self.known(name)
        return None if known is None else known.link.path

    def learn(self, route: Route, link: Link) -> Way:
        if len(self._ways) >= ROUTES:
            self._ways.pop(next(iter(self._ways)), None)
        way = self._ways[route.name] = Way(route, link)
        return way

    def drop_route(self, route: Route) -> None:
        known = self._ways.get(route.name)
        if known is not None and known.route == route:
            self._ways.pop(route.name, None)

    def outdate(self, name: Name) -> None:
        """This process has stopped, restarted or started a bird: the way it knew is not used again, even if the host still answers."""
        known = self._ways.pop(name, None)
        if known is not None:
            known.retire()

    def check_waiting(self, message: Pending) -> None:
        """Refuses to wait for a future where that would stop a bird for ever.

        Raises:
            RuntimeError: in an `async def` method, or in a process that was forked from the one that sent it.
            CallCycle: the bird waits for what runs here.
        """
        self.check_process()
        if inside.in_async_method():
            raise RuntimeError(f"waiting for {message.method!r} here would stop this bird's event loop; await asyncio.wrap_future(future)")
        message.waited_in = inside.current_chain()  # looked at again when the way to the bird is known
        message.lane.check_waiting(message.waited_in)

    def check_process(self) -> None:
        """Raises `RuntimeError` in a process that was forked from the one that it is of."""
        if os.getpid() != self._pid:
            raise RuntimeError(_FORKED)

    # The end

    def flush(self, seconds: float) -> None:
        """Waits until everything sent is answered, at most so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self._lanes_lock:
                lanes = tuple(self._lanes)
            if all(lane.idle for lane in lanes):
                return
            time.sleep(0.01)

    def forget(self) -> None:
        """Drops routes, handles and settings."""
        self._ways.clear()
        self._here = threading.local()
        self._by_life = weakref.WeakKeyDictionary()
        self.asks.forget()
        self.links.forget_hosts()


def culprit(args: tuple[Any, ...], kwargs: dict[str, Any], attempt: Callable[[Any], object]) -> str:
    """Which argument `attempt` fails with, for an error: by position, counted from 1 as Python does, or by keyword."""
    for position, value in enumerate(args, 1):
        if not _works(attempt, value):
            return f"positional argument {position} ({type(value).__name__})"
    for key, value in kwargs.items():
        if not _works(attempt, value):
            return f"argument {key!r} ({type(value).__name__})"
    return "the whole of the arguments"


def _works(attempt: Callable[[Any], object], value: Any) -> bool:
    try:
        attempt(value)
    except Exception:  # whatever a user's class does when it is pickled
        return False
    return True


_FORKED = (
    "this process was forked from one that uses Ray, and neither Ray nor flock_ray works in a forked child; "
    'start it with the "spawn" method of multiprocessing, and call ray.init() in it'
)


class _Process:
    """What this process has."""

    def __init__(self) -> None:
        self.links = RayLinks()
        self.inherited: set[object] = set()  # sessions of processes that this one was forked from
        self._parents: list[object] = []  # what is that process's: kept, for its locks may be held by threads that are not here
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self.courier = Courier()
        self.clients: dict[str, Client] = {}

    def forked(self) -> None:
        """This is a child: it begins anew."""
        self._parents += (self.lock, self.courier, self.clients)
        self.inherited |= {client.session for client in self.clients.values()}
        self._begin()


_process = _Process()
os.register_at_fork(after_in_child=_process.forked)


def client_of(flock: str) -> Client:
    """This process's client of a flock, for as long as Ray stays initialised.

    Raises:
        FlockNotRunning: Ray is not initialised.
        RuntimeError: this process was forked from one that uses the flock.
    """
    client = _process.clients.get(flock)
    now = time.monotonic()
    if client is not None and now - client.looked_at < LOOK_AGAIN and _process.links.is_up():
        return client
    session = _process.links.session()
    if client is not None and client.session == session:
        client.looked_at = now
        return client
    if session is not None and session in _process.inherited:
        raise RuntimeError(_FORKED)
    with _process.lock:
        client = _process.clients.get(flock)
        if client is None or client.session != session:
            if client is not None:
                client.forget()
            if session is None:
                _process.clients.pop(flock, None)
                raise errors.FlockNotRunning("Ray is not initialised in this process; call ray.init() first")
            client = _process.clients[flock] = Client(flock, Ways(flock, _process.courier), _process.courier)
        return client


def let_go(flock: str) -> None:
    """Flushes casts, and drops what this process keeps of a flock."""
    client = _process.clients.pop(flock, None)
    if client is not None:
        client.flush(FLUSH_SECONDS)
        client.forget()


@atexit.register
def _flush_at_exit() -> None:
    until = time.monotonic() + FLUSH_SECONDS
    for client in tuple(_process.clients.values()):
        if client.session == _process.links.session():
            client.flush(until - time.monotonic())
