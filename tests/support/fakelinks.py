"""Hosts and nests in this process, behind the interface of `runtime/links.py`: a test says what becomes of each message."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from flock_ray.config import Config
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.runtime.replies import Down, NoAnswer, Raw
from flock_ray.specs import Dot, Life, Name, Route


class FakeReply:
    """An answer that a test gives."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self.outcome: Raw | Exception | None = None

    @property
    def done(self) -> bool:
        return self._there.is_set()

    def set(self, outcome: Raw | Exception) -> None:
        with self._lock:
            self.outcome = outcome
            self._there.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def get(self, timeout: float | None) -> Raw:
        if not self._there.wait(timeout):
            raise NoAnswer
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def forget(self) -> None: ...

    def tell(self, callback: Callable[[Any], object]) -> None: ...

    def on_done(self, callback: Callable[[Any], object], loop: object = None) -> None:
        with self._lock:
            if self.outcome is None:
                self._callbacks.append(callback)
                return
        callback(self)


class Message:
    """A call that reached a host."""

    def __init__(self, data: bytes, extra: Sequence[Any]) -> None:
        self.head, self.order, body = wire.decode_call(data)
        self.args, self.kwargs = pickle.loads(body)
        self.extra = extra
        self.reply = FakeReply()

    @property
    def withdrawn(self) -> wire.Withdraw:
        """What takes it back."""
        return wire.Withdraw(self.head.caller, self.order, self.head.dot)

    def result(self, value: Any) -> None:
        self.reply.set(Raw(wire.encode(wire.Answer("result"), pickle.dumps(value))))

    def answer(self, answer: wire.Answer, body: bytes = b"") -> None:
        self.reply.set(Raw(wire.encode(answer, body)))

    def moved(self) -> None:
        self.answer(wire.Answer("moved"))

    def down(self, ran: bool = True) -> None:
        self.reply.set(Down("gone", ran))

    def __repr__(self) -> str:
        return f"{self.head.method}{self.args}"


class FakeHost:
    """Runs what it gets at once and answers with the first argument; or keeps it, while `holds`."""

    path = "unix"

    def __init__(self, clock: Callable[[], float]) -> None:
        self.holds = False
        self.gone = False
        self.moved = False
        self.full = False
        self.parcels: dict[str, FakeReply] = {}
        self.deaf = False  # answers no ping
        self.used_at = clock()
        self.got: list[Message] = []
        self.controls: list[Any] = []

    @property
    def args(self) -> list[Any]:
        return [message.args[0] for message in self.got]

    def lost(self) -> bool:
        return self.gone

    def retire(self) -> None:
        self.gone = True

    def heard(self, now: float) -> None:
        self.used_at = max(now, self.used_at)

    def look(self) -> None: ...

    def flush(self) -> None: ...

    def fetch(self, parcel: str) -> FakeReply:
        return self.parcels[parcel]

    def send(self, data: bytes, extra: Sequence[Any], urgency: object = None) -> FakeReply:
        message = Message(data, extra)
        self.got.append(message)
        if self.gone:
            message.down()
        elif self.moved:
            message.moved()
        elif self.full:
            message.answer(wire.Answer("full"))
        elif not self.holds:
            message.result(message.args[0] if message.args else None)
        return message.reply

    def control(self, data: bytes) -> FakeReply:
        reply = FakeReply()
        self.controls.append(wire.decode(data)[0])
        if self.gone:
            reply.set(Down("gone", ran=False))
        elif not self.deaf:
            reply.set(Raw(b""))
        return reply


class FakeNest:
    """Answers what it has an answer for; `Locate` waits for a route."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: list[Any] = []
        self.failures: list[Exception] = []  # raised one by one before it answers
        self.reads: dict[str, Any] = {}
        self._waiting: list[tuple[ev.Locate, FakeReply]] = []

    def lost(self) -> bool:
        return False

    def ask(self, request: bytes) -> FakeReply:
        event, reply = pickle.loads(request), FakeReply()
        self.asked.append(event)
        if self.failures:
            reply.set(self.failures.pop(0))
        elif isinstance(event, ev.Cancel):
            self._waiting = [(one, its) for one, its in self._waiting if one.request != event.request]
        elif isinstance(event, ev.Start):
            reply.set(self._raw(ev.Accepted(self.world.dot)))
        elif event.name in self.world.refusals:
            reply.set(self._raw(self.world.refusals[event.name]))
        elif isinstance(event, ev.Locate) and event.wanted == "running":
            self._locate(event, reply)
        else:
            reply.set(self._raw(ev.Done()))
        return reply

    def routes(self, query: bytes) -> FakeReply:
        reply, (names, *_) = FakeReply(), pickle.loads(query)
        places: dict[Any, int] = {}
        rows: list[Any] = []
        refused: dict[int, ev.Refused] = {}
        for place, name in enumerate(names):
            route = self.world.routes.get(name)
            rows.append(None)
            if route is not None:
                host = (route.node, route.host, route.address, route.is_async)
                rows[-1] = (places.setdefault(host, len(places)), route.dot, route.incarnation)
            else:
                refused[place] = self.world.refusals.get(name, ev.Refused("CallTimeout", f"{name!r} does not run", name))
        reply.set(Raw(pickle.dumps(ev.Routes(tuple(places), tuple(rows), refused))))
        return reply

    def read(self, query: bytes) -> FakeReply:
        reply = FakeReply()
        reply.set(Raw(pickle.dumps(self.reads.get(pickle.loads(query)[0]))))
        return reply

    def look(self) -> None:
        waiting, self._waiting = self._waiting, []
        for event, reply in waiting:
            self._locate(event, reply)

    def _locate(self, event: ev.Locate, reply: FakeReply) -> None:
        route = self.world.routes.get(event.name)
        if route is not None and (event.avoid is None or event.avoid.host != route.host):
            reply.set(self._raw(route))
            return
        self._waiting.append((event, reply))
        if event.timeout is not None:
            refused = ev.Refused("CallTimeout", f"bird {event.name!r} was not running in time", event.name, self.world.last_error)
            threading.Timer(event.timeout, lambda: reply.outcome or reply.set(self._raw(refused))).start()

    @staticmethod
    def _raw(outcome: ev.Outcome) -> Raw:
        return Raw(pickle.dumps(outcome))


class World:
    """Implements `Links`."""

    def __init__(self, **config: Any) -> None:
        self.dot = Dot(Life("node", 1), 1)
        self.hosts: dict[str, FakeHost] = {}
        self.routes: dict[Name, Route] = {}
        self.refusals: dict[Name, ev.Refused] = {}
        self.last_error = ""
        self.settings = Config(**config)
        self.the_nest = FakeNest(self)

    def put(self, name: Name, host: str, incarnation: int = 1, is_async: bool = False) -> FakeHost:
        """A bird now runs in this host."""
        self.hosts.setdefault(host, FakeHost(time.monotonic))
        self.routes[name] = Route(name, self.dot, incarnation, "node", host, is_async=is_async)
        self.the_nest.look()
        return self.hosts[host]

    def session(self) -> object:
        return "session"

    def host(self, route: Route) -> FakeHost:
        host = self.hosts[route.host]
        if host.lost():
            raise Down("gone", ran=False)
        return host

    def nest(self, flock: str, timeout: float) -> FakeNest:
        return self.the_nest

    def config(self, flock: str) -> Config:
        return self.settings

    def ensure(self, flock: str, settings: Any) -> Config:
        return self.settings

    def destroy(self, flock: str) -> None:
        self.routes.clear()

    def forget(self, flock: str) -> None: ...

    def forget_hosts(self) -> None: ...
