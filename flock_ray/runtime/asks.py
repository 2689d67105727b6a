"""What a process asks of the nests: one request, asked again under the same id until a nest has answered or the time is over.

Rules kept here: a nest that dies comes back under its handle within about 2 s (M5), so a request is repeated, and its id makes it one;
finding a nest may block on the head node, so it happens in the courier's pool, once. The last dot written here for a name goes with
every question about it (C3).
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from flock_ray.config import Config
from flock_ray.core import events as ev
from flock_ray.errors import CallTimeout, FlockError
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.links import Links, NestLink
from flock_ray.runtime.owners import Owners
from flock_ray.runtime.pending import FOREVER, named_error
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, answer_of
from flock_ray.specs import Dot, Life, Name, Route, Spec

LATE = 1.0  # seconds a nest may answer after the time it was given
PAUSE = 0.2  # seconds before a nest that is down is asked again
FIND_SECONDS = 10.0  # how long a nest is looked for
READ_SECONDS = 30.0  # how long a nest may be away before a look into its replica gives up
AT_ONCE = 250  # requests in a message: some 5 ms of a nest's time
PARTS = 4  # such messages under way
TOLD = 2.0  # seconds within which all nests have heard of a stop
MANY = 10_000  # names: for so many to ask all nests is worth `TOLD` seconds
OTHER = 10.0  # seconds another nest is given, before this node's is asked: it may hang
PATIENCE = 1.0  # seconds a nest is asked to wait for many birds to run, until it is asked again
REMEMBERED = 65_536  # names whose last dot is kept

_DEFAULTS = Config()

Came = Callable[[int], object]  # is told how many more have been answered
Request = TypeVar("Request", ev.Start, ev.Stop, ev.Restart, ev.Locate)


class Asks:
    """A process's requests to the nests of one flock. Coroutines, for the courier's thread."""

    def __init__(self, flock: str, links: Links, courier: Courier, clock: Callable[[], float]) -> None:
        self.flock = flock
        self._links = links
        self._courier = courier
        self._clock = clock
        self._nest: NestLink | None = None
        self._config: Config | None = None
        self._written: OrderedDict[Name, Dot] = OrderedDict()
        self._stopped_at = float("-inf")  # when this process stopped a bird last
        self._unseen: dict[Life, int] = {}  # the latest dot of each nest that has accepted a start, and may have to tell this node's yet
        self._owners = Owners(flock, links, courier, clock, self._read)

    @property
    def known_config(self) -> Config | None:
        """The flock's settings, once anything was asked."""
        return self._config

    @property
    def send_window(self) -> int:
        """How many messages of one caller to one bird may be unanswered."""
        return (self._config or _DEFAULTS).send_window

    def written(self, name: Name) -> Dot | None:
        """The last dot this process wrote for the name."""
        return self._written.get(name)

    async def ensure(self, settings: dict[str, Any]) -> Config:
        """Creates the flock if it is not there (`init`, the first `start`)."""
        if settings or self._config is None or self._nest is None:
            self._config = await self._courier.blocking(self._links.ensure, self.flock, settings)
            await self._find()
        return self._config

    async def config(self) -> Config:
        """The flock's settings; finds a nest for it.

        Raises:
            FlockNotRunning: there is none.
        """
        if self._config is None:
            await self._find()
            self._config = self._links.config(self.flock)
        return self._config

    async def start(self, name: Name, spec: Spec, code: bytes, wall: int, until: float) -> ev.Accepted:
        await self._seen()
        event = ev.Start(spec.request_id, name, spec, code, wall)
        outcome = self._accepted(event, await self._ask(event, until))
        if isinstance(outcome, ev.Accepted):
            return outcome
        raise outcome

    def _compared(self, event: ev.Start, outcome: ev.Differs) -> ev.Outcome:
        if _same(event.spec.args, outcome.args):
            return ev.Accepted(outcome.dot, existed=True)
        text = f"bird {event.name!r} exists with other arguments; stop it first, or start it with the same"
        return ev.Refused("BirdExists", text, event.name)

    def _note(self, name: Name, dot: Dot) -> None:
        self._written[name] = dot
        self._written.move_to_end(name)
        if len(self._written) > REMEMBERED:
            self._written.popitem(last=False)

    async def start_many(
        self, starts: Sequence[tuple[Name, Spec, bytes]], wall: int, until: float, came: Came
    ) -> list[ev.Accepted | BaseException]:
        """Starts many; the error of each that was not accepted is in its place."""
        events = [ev.Start(spec.request_id, name, spec, code, wall) for name, spec, code in starts]
        outcomes = await self._ask_many(events, await self._nests_of([event.name for event in events]), until, came)
        for outcome in outcomes:
            if isinstance(outcome, Dot) and outcome.counter > self._unseen.get(outcome.life, 0):
                self._unseen[outcome.life] = outcome.counter
        return [self._accepted(event, outcome) for event, outcome in zip(events, outcomes, strict=True)]

    def _accepted(self, event: ev.Start, outcome: ev.Outcome | Dot) -> ev.Accepted | BaseException:
        if isinstance(outcome, Dot):
            outcome = ev.Accepted(outcome)
        if isinstance(outcome, ev.Differs):
            outcome = self._compared(event, outcome)
        if isinstance(outcome, ev.Accepted):
            self._note(event.name, outcome.dot)
            return outcome
        return self._error(outcome, event.name)

    async def stop_many(self, birds: Sequence[tuple[Name, Dot | None]], until: float, came: Came) -> list[BaseException | None]:
        """Stops many; the error of each that could not be is in its place."""
        events = [ev.Stop(_id(), name, dot or self.written(name)) for name, dot in birds]
        self._stopped_at = self._clock()
        outcomes = await self._ask_many(events, [(None, list(range(len(events))))], until, came)
        return [None if isinstance(one, ev.Done) else self._error(one, event.name) for event, one in zip(events, outcomes, strict=True)]

    async def _nests_of(self, names: Sequence[Name]) -> list[tuple[NestLink | None, list[int]]]:
        """Whom to ask about the names, by their places: this node's (`None`) while only it may know what this process stopped (C3)."""
        left = self._stopped_at + TOLD - self._clock()
        if left > 0 and len(names) >= MANY:
            await asyncio.sleep(left)
        elif left > 0:
            return [(None, list(range(len(names))))]
        return await self._owners.of(names)

    async def routes(
        self, names: Sequence[Name], until: float, dots: Mapping[Name, Dot]
    ) -> AsyncIterator[tuple[Sequence[Name], ev.Routes]]:
        """Where birds can be called, part by part, as parts come; waits for those that do not run yet, a second at most.

        Args:
            dots: what is known of some of them: the answers take them into account (C3).
        """
        left = max(0.0, until - self._clock())
        patience = min(PATIENCE, left)
        longest = min(PATIENCE + 2 * (self._config or _DEFAULTS).lookup_timeout, left)  # other nests may have to be asked

        async def part(nest: NestLink | None, some: list[Name]) -> tuple[list[Name], Raw | FlockError | None]:
            known = {place: dot for place, name in enumerate(some) if (dot := dots.get(name) or self.written(name)) is not None}
            packed = pickle.dumps((some, patience, known), protocol=5)
            try:
                return some, await self._deliver(lambda nest: nest.routes(packed), self._clock() + longest, nest)
            except FlockError as error:
                return some, error

        tasks = [
            asyncio.ensure_future(part(nest, [names[place] for place in places]))
            for nest, there in await self._nests_of(names)
            for places in _parts(there)
        ]
        for task in asyncio.as_completed(tasks):
            some, raw = await task
            if isinstance(raw, FlockError):
                refused = {place: ev.Refused(type(raw).__name__, str(raw), name) for place, name in enumerate(some)}
                yield some, ev.Routes((), (None,) * len(some), refused)
            elif raw is not None:
                yield some, pickle.loads(raw.message)

    async def stop(self, name: Name, after: Dot | None, until: float) -> None:
        self._stopped_at = self._clock()
        outcome = await self._ask(ev.Stop(_id(), name, after or self.written(name)), until)
        if not isinstance(outcome, ev.Done):
            raise self._error(outcome, name)

    async def restart(self, name: Name, after: Dot | None, until: float) -> None:
        outcome = await self._ask(ev.Restart(_id(), name, after or self.written(name)), until)
        if not isinstance(outcome, ev.Done):
            raise self._error(outcome, name)

    async def locate(
        self, name: Name, wanted: str, until: float, after: Dot | None, avoid: Route | None = None, casts: int = 0
    ) -> ev.Outcome:
        """Waits until a bird is `wanted`; the outcome as the nest says it."""
        return await self._ask(ev.Locate(_id(), name, wanted, None, after or self.written(name), avoid, casts), until)

    async def wait(self, name: Name, wanted: str, until: float, after: Dot | None) -> None:
        outcome = await self.locate(name, wanted, until, after)
        if isinstance(outcome, ev.Refused):
            raise self._error(outcome, name)

    async def read(self, *query: object) -> Any:
        """Looks into the replica of this node's nest, once it has what this process has written (C3)."""
        await self._seen()
        return await self._read(*query)

    async def _seen(self) -> None:
        """Waits until this node's nest knows of the starts that others have accepted."""
        if self._unseen:
            dots = tuple(Dot(life, counter) for life, counter in self._unseen.items())
            await self._read("covers", dots)
            for life, counter in dots:
                if self._unseen.get(life) == counter:
                    del self._unseen[life]

    async def _read(self, *query: object) -> Any:
        until = self._clock() + READ_SECONDS
        raw = await self._deliver(lambda nest: nest.read(pickle.dumps(query, protocol=5)), until)
        if raw is None:
            raise CallTimeout(f"no nest of flock {self.flock!r} has answered within {READ_SECONDS:g} s; is this node cut off?")
        return pickle.loads(raw.message)

    def forget(self) -> None:
        """Finds the nest, and learns the settings, anew next time."""
        self._links.forget(self.flock)
        self._nest = self._config = None
        self._written.clear()
        self._unseen.clear()
        self._owners.forget()

    def _error(self, outcome: ev.Outcome, name: Name) -> BaseException:
        if isinstance(outcome, ev.Refused):
            return named_error(outcome.error, outcome.message, name, outcome.detail)
        return AssertionError(f"a nest answered {outcome!r}")

    async def _ask(self, event: Request, until: float) -> ev.Outcome:
        def send(nest: NestLink) -> Reply:
            now = event
            if isinstance(now, ev.Locate) and until != FOREVER:
                now = replace(now, timeout=max(0.0, until - self._clock()))
            return nest.ask(pickle.dumps(now, protocol=5))

        try:
            raw = await self._deliver(send, until)
        except asyncio.CancelledError:
            self._cancel(event.request)
            raise
        if raw is None:
            self._cancel(event.request)
            text = f"no nest of flock {self.flock!r} has answered about bird {event.name!r} in time; is this node cut off?"
            return ev.Refused("CallTimeout", text, event.name)
        outcome: ev.Outcome = pickle.loads(raw.message)
        return outcome

    async def _ask_many(
        self, events: Sequence[Request], groups: Sequence[tuple[NestLink | None, list[int]]], until: float, came: Came
    ) -> list[Any]:
        """Asks nests, each of its group, in parts, of which some are under way at a time: a nest answers others in between.

        There is as much time for each part as there is until `until` now: 100,000 starts may take longer than one may.
        """
        outcomes: list[Any] = [None] * len(events)
        patience = until - self._clock()

        async def part(nest: NestLink | None, places: Sequence[int], at_once: asyncio.Semaphore) -> None:
            packed = pickle.dumps(tuple(events[place] for place in places), protocol=5)
            async with at_once:
                raw = await self._deliver(lambda nest: nest.ask(packed), self._clock() + patience, nest)
            came(len(places))
            if raw is not None:
                for place, outcome in zip(places, pickle.loads(raw.message), strict=True):
                    outcomes[place] = outcome
                return
            for place in places:
                text = f"no nest of flock {self.flock!r} has answered about bird {events[place].name!r} in time; is this node cut off?"
                outcomes[place] = ev.Refused("CallTimeout", text, events[place].name)

        parts = ((nest, places, at_once) for nest, there in groups for at_once in [asyncio.Semaphore(PARTS)] for places in _parts(there))
        await asyncio.gather(*(part(*one) for one in parts))
        return outcomes

    async def _deliver(self, send: Callable[[NestLink], Reply], until: float, other: NestLink | None = None) -> Raw | None:
        """Sends to this node's nest; first to another, if one is given and can be reached."""
        while True:
            nest = other or self._nest or await self._find()
            try:
                patience = None if until == FOREVER else max(0.0, until - self._clock()) + LATE
                if other is not None:
                    patience = OTHER if patience is None else min(patience, OTHER)
                return await answer_of(send(nest), patience)
            except NoAnswer:
                if other is None:
                    return None
                other = None
            except Down:
                if other is not None:
                    other = None
                    continue
                if nest.lost():
                    self.forget()
            if self._clock() >= until:
                return None
            await asyncio.sleep(PAUSE)

    async def _find(self) -> NestLink:
        self._nest = await self._courier.blocking(self._links.nest, self.flock, FIND_SECONDS)
        return self._nest

    def _cancel(self, request: str) -> None:
        if self._nest is not None:
            with contextlib.suppress(Exception):  # it was only a favour
                self._nest.ask(pickle.dumps(ev.Cancel(request), protocol=5))


def _parts(places: list[int]) -> Iterator[list[int]]:
    for at in range(0, len(places), AT_ONCE):
        yield places[at : at + AT_ONCE]


def _same(one: bytes, other: bytes) -> bool:
    """Are pickled arguments equal, as Python sees it?"""
    try:
        return bool(pickle.loads(one) == pickle.loads(other))
    except Exception:  # a class of the other starter's, or an `==` of a user's that raises: they cannot be said to be equal
        return False


def _id() -> str:
    return uuid.uuid4().hex
