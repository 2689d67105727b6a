"""Many calls at once: those of light birds go host by host, many in a frame; all others as they would one by one.

Rules kept here: a batch's messages to a bird keep their order with what their caller has sent it before (C2). So one whose lane is busy, or
who is called more than once in the batch, is called by its lane. Birds that do not run yet, or have moved, are asked for and called again
together, until the time is over: when a node has died with 25,000 of them, one by one takes a minute (measured).
What runs here runs on the caller's thread, as a call does; results are unpickled there.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, NamedTuple

from flock_ray import errors
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.core.connection import LONGEST
from flock_ray.runtime import inside, payload
from flock_ray.runtime.client import Client, Lanes
from flock_ray.runtime.links import Link, Way
from flock_ray.runtime.pending import FOREVER, CallFuture, named_error, open_raw, value_of
from flock_ray.runtime.processes import LIGHT
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply
from flock_ray.specs import Dot, Life, Name, Route

FRAME = 500  # calls in a frame: a host runs them in some 3 ms, and answers together
LOOKS = 64  # at a connection, when time is over
SMALL = 10_000  # bytes of the arguments of one
A_WHILE = 1.0  # seconds for which one host is waited for, until the others' answers are looked at
PAUSE, LONGEST_PAUSE = 0.02, 0.5  # seconds from one try to the next with those that did not run, doubled each time

_EMPTY = payload.pack(((), {}), what="")[0]


class Caller(NamedTuple):
    """For whom a thread makes a batch."""

    lanes: Lanes
    gone: threading.Event  # set when nobody waits for it any more


class Request(NamedTuple):
    """One call of a batch."""

    name: Name
    dot: Dot | None
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Sent:
    """A frame that is under way."""

    reply: Reply
    link: Link
    caller: str
    places: list[int]
    dots: list[Dot]
    left: set[int]  # which calls of it are not answered


class Batch:
    """Calls that are made together.

    Args:
        requests: in order.
        until: on the client's clock, when patience ends.
        came: is told how many more have ended.
        caller: if it is not who makes this.
    """

    def __init__(
        self,
        client: Client,
        requests: Sequence[Request],
        until: float,
        retry: bool,
        cast: bool,
        came: Callable[[int], object],
        caller: Caller | None = None,
    ) -> None:
        self._client = client
        self._lanes, self._gone = caller or Caller(client.lanes_here(), threading.Event())
        self._requests = requests
        self._until = until
        self._retry = retry
        self._cast = cast
        self._came = came
        self._outcomes: list[Any] = [None] * len(requests)
        self.failed: dict[int, BaseException] = {}
        self._bodies: dict[int, bytes] = {}
        self._refused: dict[Name, ev.Refused] = {}  # what a nest has said of those that do not run
        self._chain = inside.current_chain() if not cast else ()

    def run(self) -> list[Any]:
        """Makes the calls. Returns results and exceptions, in order; `failed` has the latter by their places."""
        with inside.waiting():
            waiting, alone = self._sort()
            sent: list[Sent] = []
            flying: list[tuple[int, CallFuture]] = []
            pause = PAUSE
            try:
                while waiting or sent:
                    began = self._client.clock()
                    ways = self._ways(waiting)
                    if self._seconds() == 0.0:
                        break
                    waiting = self._send(waiting, ways, sent, alone)
                    self._one_by_one(alone, flying)
                    again = self._collect(sent, 0.0 if waiting else A_WHILE, alone)
                    waiting = sorted(waiting + again)
                    if waiting:
                        self._sleep(began + pause - self._client.clock())
                        pause = min(2 * pause, LONGEST_PAUSE)
                waiting += self._collect(sent, 0.0, alone)  # what has come meanwhile
                if self._cast:
                    alone, waiting = alone + waiting, []  # casts have no time to keep
                if self._gone.is_set():
                    alone, waiting = [], alone + waiting
                self._give_up(waiting, sent)
                self._one_by_one(alone, flying)
                self._wait_for(flying)
            except BaseException:  # an interrupt
                self._take_back(sent, flying)
                raise
        for place, error in self.failed.items():
            self._outcomes[place] = error
        return self._outcomes

    def _sort(self) -> tuple[list[int], list[int]]:
        """The places of those that may go together, and of those that must keep an order."""
        counts = Counter(request.name for request in self._requests)
        busy = {name for name, lane in tuple(self._lanes.items()) if not lane.idle}
        together: list[int] = []
        alone: list[int] = []
        for place, request in enumerate(self._requests):
            if counts[request.name] > 1 or request.name in busy:
                alone.append(place)
                continue
            if request.args or request.kwargs:
                body, extra = self._client.pack(request.name, request.method, request.args, request.kwargs)
                if extra or len(body) > SMALL:
                    alone.append(place)
                    continue
                self._bodies[place] = body
            together.append(place)
        return together, alone

    def _ways(self, places: Iterable[int]) -> dict[Name, Way]:
        """The ways that are known, or that a nest knows; those to birds that do not run within a second are missing."""
        client = self._client
        ways: dict[Name, Way] = {}
        unknown = []
        for place in places:
            name = self._requests[place].name
            way = client.known(name)
            if way is not None:
                ways[name] = way
            else:
                unknown.append(name)
        if unknown:
            try:
                client.courier.run(self._find(unknown, ways))
            except errors.FlockError as error:  # of those that are still unknown: the others are called, or have been
                self._refused.update((name, ev.Refused(type(error).__name__, str(error), name)) for name in unknown if name not in ways)
        return ways

    async def _find(self, names: Sequence[Name], ways: dict[Name, Way]) -> None:
        client = self._client
        await client.asks.config()
        links: dict[str, Link | None] = {}
        dots = {request.name: request.dot for request in self._requests if request.dot is not None}
        async for part, routes in client.asks.routes(names, self._until, dots):
            self._refused.update((part[place], refused) for place, refused in routes.refused.items())
            for name, row in zip(part, routes.rows, strict=True):
                if row is None:
                    continue
                node, host, address, is_async = routes.places[row[0]]
                route = Route(name, row[1], row[2], node, host, address, is_async)
                if host not in links:
                    try:
                        links[host] = await client.courier.blocking(client.links.host, route)
                    except Down:
                        links[host] = None
                link = links[host]
                if link is not None:
                    ways[name] = client.learn(route, link)

    def _send(self, places: Iterable[int], ways: dict[Name, Way], sent: list[Sent], alone: list[int]) -> list[int]:
        """Sends what can go in frames, and adds to `alone` the places of those that are to be called by their lanes.

        Returns:
            The places of those that have no way yet.
        """
        by_host: dict[str, tuple[Link, list[tuple[int, Way]]]] = {}
        waiting = []
        for place in places:
            name = self._requests[place].name
            way = ways.get(name)
            if way is None:
                refused = self._refused.get(name)
                if self._cast:
                    alone.append(place)  # nobody waits until it runs
                elif refused is None or refused.error == "CallTimeout":
                    waiting.append(place)
                else:
                    self._fail(place, named_error(refused.error, refused.message, name, refused.detail))
                    self._came(1)
                continue
            host = way.route.host
            if host not in by_host:
                by_host[host] = (way.link, [])
            by_host[host][1].append((place, way))
        frames = []
        for host, (link, calls) in by_host.items():
            if link.path == "ray" or not host.startswith(LIGHT):
                alone += [place for place, _ in calls]
            else:
                frames.append([(link, some) for some in self._parts(calls)])
        for several in itertools.zip_longest(*frames):  # in turn: all hosts are to have something to do
            sent += [self._frame(*frame) for frame in several if frame is not None]
        return waiting

    def _parts(self, calls: list[tuple[int, Way]]) -> Iterator[list[tuple[int, Way]]]:
        """Calls by frames."""
        if not self._bodies:
            for at in range(0, len(calls), FRAME):
                yield calls[at : at + FRAME]
            return
        part: list[tuple[int, Way]] = []
        size = 0
        for call in calls:
            if part and (len(part) >= FRAME or size > LONGEST // 2):
                yield part
                part, size = [], 0
            part.append(call)
            size += len(self._bodies.get(call[0], _EMPTY))
        yield part

    def _frame(self, link: Link, calls: Sequence[tuple[int, Way]]) -> Sent:
        lives: dict[Life, int] = {}
        methods: dict[str, int] = {}
        rows, dots = [], []
        before, life = None, 0
        for place, way in calls:
            dot, method = way.route.dot, self._requests[place].method
            if dot.life is not before:  # mostly it is: to hash one costs as much as all else here
                before = dot.life
                life = lives.setdefault(before, len(lives))
            rows.append((life, methods.setdefault(method, len(methods)), dot.counter, self._bodies.get(place, _EMPTY)))
            dots.append(dot)
        caller = self._client.new_caller()
        head = wire.CallMany(caller, tuple(lives), tuple(methods), self._chain, self._cast)
        reply = link.pull(wire.encode_calls(head, rows), len(rows))
        return Sent(reply, link, caller, [place for place, _ in calls], dots, set(range(len(calls))))

    # Answers

    def _collect(self, sent: list[Sent], patience: float, alone: list[int]) -> list[int]:
        """Takes the answers, and leaves in `sent` what is not answered when one has been waited for so long (seconds).

        Returns:
            The places of those that did not run, and are to be called once more. Those for which there was no room, or that are to be
            cast to while they are busy, are added to `alone`: their lanes have them wait.
        """
        again: list[int] = []
        unanswered = []
        for frame in sent:
            try:
                until = self._client.clock() + patience
                while frame.left:
                    again += self._take(frame, self._next_answers(frame, max(0.0, until - self._client.clock())), alone)
            except NoAnswer:
                unanswered.append(frame)
                patience = 0.0
            except Down as down:
                again += self._lost(frame, down)
        sent[:] = unanswered
        return again

    def _next_answers(self, frame: Sent, patience: float) -> Raw:
        """Waits for some. What came while another host was waited for is there, too."""
        seconds = self._seconds()
        try:
            return frame.reply.get(patience if seconds is None else min(patience, seconds))
        except NoAnswer:
            for _ in range(LOOKS):
                frame.link.look()
                if frame.reply.done:
                    break
            return frame.reply.get(0)

    def _sleep(self, seconds: float) -> None:
        left = self._seconds()
        self._client.courier.sleep(max(0.0, seconds if left is None else min(seconds, left)))

    def _seconds(self) -> float | None:
        """How long somebody still waits; `None` for ever."""
        if self._gone.is_set():
            return 0.0
        return None if self._until == FOREVER else max(0.0, self._until - self._client.clock())

    def _take(self, frame: Sent, raw: Raw, alone: list[int]) -> list[int]:
        again, full = [], 0
        answers = wire.decode_answers(raw.message)
        for at, body, is_plain in answers:
            frame.left.discard(at)
            place = frame.places[at]
            request = self._requests[place]
            try:
                if is_plain:
                    self._outcomes[place] = payload.unpack(body, ())
                    continue
                opened = open_raw(Raw(bytes(body)))
                if opened.answer.kind == "parcel":
                    opened = open_raw(frame.link.fetch(opened.answer.text).get(self._seconds()))
                if opened.answer.kind == "moved":
                    self._client.outdate(request.name)
                    again.append(place)
                elif opened.answer.kind == "full":
                    alone.append(place)
                    full += 1
                else:
                    self._outcomes[place] = value_of(opened, request.name, request.method)
            except Down as down:
                self._fail(place, self._unavailable(request, down))
            except NoAnswer:
                self._fail(place, self._timed_out(request))
            except Exception as error:  # the bird's own, or of a class that does not unpickle here
                self._fail(place, errors.RemoteError(str(error), request.name) if is_plain else error)
        self._came(len(answers) - len(again) - full)
        return again

    def _take_back(self, sent: Iterable[Sent], flying: Iterable[tuple[int, CallFuture]]) -> None:
        """Nobody waits any more."""
        for frame in sent:
            frame.reply.forget()
            for at, dot in enumerate(frame.dots if not self._cast else ()):
                frame.link.control(wire.encode(wire.Withdraw(frame.caller, at, dot)))
        for _, future in flying:
            future.cancel()

    def _give_up(self, waiting: Iterable[int], sent: Iterable[Sent]) -> None:
        """Time is over."""
        for place in waiting:
            name = self._requests[place].name
            refused = self._refused.get(name)
            text = refused.message if refused is not None else f"{self._requests[place].method!r} of bird {name!r} was not sent in time"
            self._fail(place, named_error("CallTimeout", text, name, refused.detail if refused is not None else ""))
            self._came(1)
        for frame in sent:
            frame.reply.forget()
            self._came(len(frame.left))
            for at in () if self._cast else frame.left:  # casts may yet be taken
                place = frame.places[at]
                frame.link.control(wire.encode(wire.Withdraw(frame.caller, at, frame.dots[at])))
                self._fail(place, self._timed_out(self._requests[place]))

    def _lost(self, frame: Sent, down: Down) -> list[int]:
        again = []
        for at in frame.left:
            place = frame.places[at]
            self._client.outdate(self._requests[place].name)
            if self._retry or not down.ran:
                again.append(place)
                continue
            self._came(1)
            if not self._cast:
                self._fail(place, self._unavailable(self._requests[place], down))
        return again

    def _timed_out(self, request: Request) -> errors.CallTimeout:
        return errors.CallTimeout(f"{request.method!r} of bird {request.name!r} has not answered in time; it may still run", request.name)

    def _unavailable(self, request: Request, down: Down) -> errors.BirdUnavailable:
        text = f"the host of bird {request.name!r} went away: {request.method!r} may or may not have run"
        error = errors.BirdUnavailable(f"{text}; call again if it can be repeated, or use retry=True", request.name)
        error.__cause__ = down
        return error

    def _fail(self, place: int, error: BaseException) -> None:
        self.failed[place] = error

    # One by one

    def _one_by_one(self, places: list[int], flying: list[tuple[int, CallFuture]]) -> None:
        """Through the lanes, all at once, as far as the window reaches. None is left in `places`; what flies is to be waited for."""
        todo = sorted(places)
        places.clear()
        for place in todo:
            request = self._requests[place]
            try:
                if self._cast:
                    self._client.cast(*request, lanes=self._lanes)
                    self._came(1)
                else:
                    flying.append((place, self._future(request, flying)))
            except Exception as error:  # what sending may raise
                self._fail(place, error)

    def _future(self, request: Request, flying: list[tuple[int, CallFuture]]) -> CallFuture:
        try:
            return self._client.future(*request, self._seconds(), self._retry, self._lanes, self._chain)
        except errors.MailboxFull:  # too many of ours are under way
            self._wait_for(flying)
            flying.clear()
            return self._client.future(*request, self._seconds(), self._retry, self._lanes, self._chain)

    def _is_there(self, future: CallFuture) -> bool:
        """Waits a while for a result."""
        try:
            future.exception(A_WHILE)
        except TimeoutError:
            return future.done()
        return True

    def _wait_for(self, flying: Sequence[tuple[int, CallFuture]]) -> None:
        for place, future in flying:
            try:
                while not self._is_there(future):
                    if self._gone.is_set():
                        for _, other in flying:
                            other.cancel()
                self._outcomes[place] = future.result()
            except CancelledError as error:  # by the lines above, or the bird's own
                self._fail(place, self._timed_out(self._requests[place]) if self._gone.is_set() else error)
            except Exception as error:  # the bird's own, whatever that is
                self._fail(place, error)
            self._came(1)
