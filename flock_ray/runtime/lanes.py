"""A lane: the messages of one caller to one bird, in their order (C2).

A message goes straight to the host while the lane is open. The first one that is turned away, lost, or has no fresh route closes the
lane; what comes after it queues up, and the courier finds out what became of each message sent, finds the way anew, and sends again in
order what certainly did not run.

Rules kept here:

- A message turned away ("moved") did not run, and neither did any that this caller sent after it: the host refuses them all. So what
  was sent before it has to be known first, for it may still be running; then all are sent anew in order.
- A message whose link went down may have run. It is `BirdUnavailable`, unless the link was known to be dead before it was sent or a
  message before it was turned away; `retry=True` says that it may run twice. A cast is then gone.
- Each connection has a caller id of its own, and its messages count from 0, so that a lost one leaves no gap that a host waits for.
- A route not used for `FRESH` seconds is tried by a ping before a message is risked on it: the host of a bird that moved or died while
  nobody called would otherwise cost the next caller a `BirdUnavailable` (measured: a ping costs one round trip, 0.6 ms).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from flock_ray import errors
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.runtime.inside import cycle_text
from flock_ray.runtime.links import Link, Way
from flock_ray.runtime.pending import FOREVER, Opened, Pending, named_error, open_raw
from flock_ray.runtime.replies import Down, NoAnswer, Reply, Urgency, answer_of
from flock_ray.specs import Name, Route

if TYPE_CHECKING:
    from flock_ray.runtime.client import Client

FRESH = 0.2  # seconds
PING_SECONDS = 2.0  # after this the nest is asked whether the bird is still there; of a host that died it is known before
AVOID_SECONDS = 3.0  # how long another route is insisted on; a bird can come back to where it was
HEADS = 256  # methods (and chains) of one bird whose heads a lane keeps
A_FEW = 256  # messages
FULL_PAUSE = 0.02  # seconds before a bird whose mailbox was full is tried again
LOOK = 1.0  # seconds between looks whether an answer is still waited for
RETRY_PAUSE = 0.05  # seconds before a host that could not be reached is tried again


_TURNED_AWAY = ("moved", "full")
_PING = wire.encode(wire.Withdraw("", 0))


class Lane:
    """One caller's messages to one bird."""

    def __init__(self, client: Client, name: Name, caller: str) -> None:
        self.client = client
        self.name = name
        self.lock = threading.Lock()
        self._base = caller
        self._connections = itertools.count()
        self._caller = caller
        self._heads: dict[tuple[Any, ...], bytes] = {}  # of this connection's calls, by method and kind
        self._way: Way | None = None
        self._order = 0
        self._sent: dict[int, Pending] = {}  # by order
        self._queue: deque[Pending] = deque()
        self._closed = False  # the courier is at work
        self._full = False  # the bird's mailbox is, and not all that was refused is sent again
        self._watching = False
        self._avoid: Route | None = None
        self._nudge: asyncio.Event | None = None

    @property
    def idle(self) -> bool:
        return not self._sent and not self._queue

    # On the caller's thread

    def submit(self, message: Pending, urgency: Urgency) -> None:
        """Sends a message, or queues it behind those that wait for a route. Never waits.

        Args:
            urgency: `SOON` also says that nobody is about to wait for its answer, so the courier has to look for it.

        Raises:
            MailboxFull: the window is full, or the bird's mailbox is.
            CallCycle: the bird waits for this very call.
        """
        unwaited = urgency is Urgency.SOON
        if unwaited and len(self._sent) + len(self._queue) >= self.client.asks.send_window:
            self._make_room()
        with self.lock:
            if unwaited and self._full:
                text = f"the mailbox of bird {self.name!r} is full; slow down, or start more birds"
                raise errors.MailboxFull(text, self.name)
            way = self._open_way()
            if way is None:
                self._queue.append(message)
                if not self._closed:
                    self._close()
                elif self._nudge is not None:
                    self.client.courier.post(self._nudge.set)
                return
            if message.in_chain or message.waited_in:
                self._check_cycle(message)
            reply = self._send(message, way, urgency)
            if unwaited and not self._watching:
                self._watch()
        if message.cast:
            reply.tell(message.answered)

    def _make_room(self) -> None:
        """The window is full, but perhaps of messages whose answers nobody has looked at yet."""
        way = self._way
        if way is not None:
            way.link.look()
        window = self.client.asks.send_window
        if len(self._sent) + len(self._queue) >= window:
            text = f"{window} messages to bird {self.name!r} are not answered yet; slow down, or wait for some of them"
            raise errors.MailboxFull(text, self.name)

    def _open_way(self) -> Way | None:
        """The way, if a message can be risked on it without a look."""
        if self._closed:
            return None
        if self._way is None:
            known = self.client.known(self.name)
            if known is None:
                return None
            self._connect(known)
        way = self._way
        if way is None or way.lost():
            return None
        return way if way.link.used_at == FOREVER or self.client.clock() - way.link.used_at < FRESH else None

    def _connect(self, way: Way) -> None:
        self._way, self._order = way, 0
        self._caller = f"{self._base}.{next(self._connections)}"
        self._heads = {}

    def _check_cycle(self, message: Pending) -> None:
        if message.in_chain and not message.cast:
            self.check_waiting(message.chain)
        elif message.waited_in:  # a future whose sender waits for it
            self.check_waiting(message.waited_in)

    def check_waiting(self, chain: tuple[tuple[str, Name], ...]) -> None:
        """Refuses a wait for this bird from code that it waits for. Async birds admit it (C4).

        Raises:
            CallCycle: names the chain.
        """
        me = (self.client.flock, self.name)
        if me in chain and self._way is not None and not self._way.route.is_async:
            raise errors.CallCycle(cycle_text(chain, me), self.name)

    def _send(self, message: Pending, way: Way, urgency: Urgency) -> Reply:
        kind = (message.method, message.chain, message.cast, message.stream)
        head = self._heads.get(kind)
        if head is None:
            head = wire.encode(wire.Call(self._caller, way.route.dot, *kind))
            if len(self._heads) >= HEADS:
                self._heads.clear()
            self._heads[kind] = head
        order = self._order
        message.fate = None
        message.way = way
        message.reply = reply = way.link.send(wire.encode_call(head, order, message.body), message.extra, urgency)
        message.caller, message.order = self._caller, order
        self._sent[order] = message
        self._order = order + 1
        return reply

    # On any thread

    def settle(self, message: Pending, reply: Reply, outcome: Opened | Exception) -> None:
        """Takes what became of a message. The second to say so is ignored."""
        kind = outcome.answer.kind if isinstance(outcome, Opened) else ""
        if kind == "parcel" and isinstance(outcome, Opened):
            self._fetch(message, reply, outcome.answer.text)
            return
        fate = outcome if isinstance(outcome, Down) else kind if kind in _TURNED_AWAY else None
        forgotten: list[Reply] = []
        with self.lock:
            if message.reply is not reply or message.fate is not None:
                return
            if message.begun:  # the lane has forgotten it, and may be on another way: only its own answer matters
                message.begun = False
                if fate is not None:
                    message.fate = fate
                    if message.again:
                        message.reply = None
                        self._queue.append(message)  # as if it came last
                        self._close()
                        return
                    outcome = self._may_have_run(message)
            elif self._sent.get(message.order) is not message:
                return
            elif fate is not None:
                message.fate = fate
                self._full = fate == "full"
                self._close()
                return
            else:
                del self._sent[message.order]
                if self._way is not None and isinstance(outcome, Opened):
                    self._way.link.heard(self.client.clock())
                    forgotten = self._forget_before(message.order)
        for each in forgotten:
            each.forget()
        message.finish(outcome)

    def _fetch(self, message: Pending, reply: Reply, parcel: str) -> None:
        """The answer itself comes by Ray."""
        with self.lock:
            if message.reply is not reply or message.way is None:
                return
            fetched = message.reply = message.way.link.fetch(parcel)
        if message.is_watched:
            message.watch(fetched)

    def take(self, message: Pending, reply: Reply) -> None:
        """Settles a message whose reply is there."""
        try:
            outcome: Opened | Exception = open_raw(reply.get(0))
        except NoAnswer:
            reply.on_done(message.answered)
            return
        except Exception as error:  # `Down`, or what became of an argument
            outcome = error
        self.settle(message, reply, outcome)

    def reply_or_watch(self, message: Pending) -> Reply | None:
        """The reply to wait for. None if it is not sent: then the courier will watch it."""
        with self.lock:
            message.to_be_watched = True
            return message.reply if message.fate is None else None

    def abandon(self, message: Pending) -> None:
        """Nobody waits for it any more: it is not sent, or taken out of the mailbox if its method has not begun (C5)."""
        with self.lock:
            sent = self._sent.get(message.order) is message and message.fate is None
            if sent:
                del self._sent[message.order]
            elif message in self._queue:
                self._queue.remove(message)
        if sent or message.begun:
            message.withdraw()

    def _forget_before(self, order: int) -> list[Reply]:
        """An answer that is no refusal: all that was sent before has begun, so it is never to be sent again for the order's sake.

        Returns:
            The replies to casts among them, which need not come any more.
        """
        forgotten: list[Reply] = []
        if self._sent and next(iter(self._sent)) < order:
            for place in tuple(itertools.takewhile(lambda place: place < order, self._sent)):
                message = self._sent.pop(place)
                message.begun = True
                if message.cast and message.reply is not None:
                    forgotten.append(message.reply)
        return forgotten

    def _watch(self) -> None:
        # One watched reply a lane, the newest: it tells of all before it. Watching each would cost a fifth of the rate (measured).
        self._watching = True
        self.client.courier.post_later(self._watch_newest)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self.client.courier.post(lambda: self.client.courier.spawn(self._recover()))

    # On the courier

    def _watch_newest(self) -> None:
        with self.lock:
            newest = next(reversed(self._sent.values()), None)
            self._watching = newest is not None
        if newest is not None and newest.reply is not None:
            newest.reply.on_done(lambda reply: self._sweep(newest, reply))

    def _sweep(self, message: Pending, reply: Reply) -> None:
        """The watched reply is there: settles it, and watches on."""
        self.take(message, reply)
        with self.lock:
            self._watching = bool(self._sent)
            if self._watching:
                self._watch()

    async def _recover(self) -> None:
        """Opens the lane again."""
        try:
            await self.client.asks.config()
            while not await self._reopen():
                pass
        except Exception as error:
            self._fail_all(error)
            if not isinstance(error, errors.FlockError):
                raise

    async def _reopen(self) -> bool:
        if await self._still_good():
            return self._flush()
        full = await self._settle_sent()
        if full is not None:
            return await self._wait_for_room(full)
        if not self._expects():
            return self._flush()
        await self._find()
        return self._flush()

    async def _still_good(self) -> bool:
        """Was the lane closed for no more than an old route, and does the route still answer?"""
        with self.lock:
            way = self._way
            if way is None or any(message.fate is not None for message in self._sent.values()) or way.lost():
                return False
        return await self._ping(way.link, lambda: self._is_still_there(way.route))

    async def _ping(self, link: Link, if_silent: Callable[[], Awaitable[bool]]) -> bool:
        """Is the host there? One that is silent is busy, or cut off: then `if_silent` has the word."""
        try:
            await answer_of(link.control(_PING), PING_SECONDS)
        except NoAnswer:
            if not await if_silent():
                return False
        except Exception:  # `Down`; or a host of another kind
            return False
        link.used_at = self.client.clock()
        return True

    async def _is_still_there(self, route: Route) -> bool:
        """Does the nest too say that the bird runs there? Of a split it learns before Ray does."""
        return await self.client.asks.locate(self.name, "running", self.client.clock() + PING_SECONDS, route.dot) == route

    async def _wait_for_room(self, way: Way) -> bool:
        """The bird is there, and its mailbox was full: sends again in a while, a few at a time lest all of them be refused again."""
        await asyncio.sleep(FULL_PAUSE)
        with self.lock:
            self._connect(way)
        while self._expects() and not self._flush(A_FEW):
            await asyncio.sleep(FULL_PAUSE)
            with self.lock:
                if way.lost() or any(message.fate is not None for message in self._sent.values()):
                    return False
        return self._flush()

    async def _settle_sent(self) -> Way | None:
        """Learns what became of everything sent, and queues again, in order, what may be sent again.

        Returns:
            The way, if there was no more than a full mailbox at its end.
        """
        while True:
            with self.lock:
                unknown, reply = next(((one, one.reply) for one in self._sent.values() if one.fate is None), (None, None))
                if unknown is None or reply is None:
                    again, lost = self._decide()
                    self._queue.extendleft(reversed(again))
                    self._sent.clear()
                    way, self._way = self._way, None
                    full = self._full and not lost and way is not None and not way.lost()
                    break
            try:
                outcome: Opened | Exception = open_raw(await answer_of(reply, LOOK))
            except NoAnswer:  # it may never come, over a network that was split; who waited for it may have given up
                continue
            except Exception as error:  # as in `take`
                outcome = error
            self.settle(unknown, reply, outcome)
            with self.lock:  # it may have been abandoned meanwhile
                if unknown.fate is None:
                    self._sent.pop(unknown.order, None)
        if full:
            return way
        if way is not None:
            self.client.drop_route(way.route)
        for message in lost:
            message.finish(self._may_have_run(message))
        return None

    def _may_have_run(self, message: Pending) -> errors.BirdUnavailable:
        text = f"the host of bird {self.name!r} went away: {message.method!r} may or may not have run"
        unavailable = errors.BirdUnavailable(f"{text}; call again if it can be repeated, or use options(retry=True)", self.name)
        unavailable.__cause__ = message.fate if isinstance(message.fate, Down) else None
        return unavailable

    def _decide(self) -> tuple[list[Pending], list[Pending]]:
        """Of the messages sent: those to be sent again, and those that may have run."""
        again: list[Pending] = []
        lost: list[Pending] = []
        refused = False
        self._avoid = None
        for message in self._sent.values():
            refused = refused or message.fate in ("moved", "full")
            if refused or message.again:
                again.append(message)
                message.reply = None
            elif not message.cast:
                lost.append(message)
        if self._way is not None and (refused or self._way.lost()):
            self._avoid = self._way.route
        return again, lost

    async def _find(self) -> None:
        """Finds a route and a host that answers, as long as a message waits for it."""
        avoid = self._avoid
        insist_until = self.client.clock() + AVOID_SECONDS
        while self._expects():
            known = self.client.known(self.name)
            if known is not None and known.route != avoid:
                route: Route | None = known.route
            else:
                route = await self._locate(avoid, insist_until)
            if route is None:
                if self.client.clock() >= insist_until:
                    avoid = None
                continue
            try:
                link = await self.client.courier.blocking(self.client.links.host, route)
            except Down:
                link = None
            if_silent = functools.partial(self._is_still_there, route)
            if link is not None and (self.client.clock() - link.used_at < FRESH or await self._ping(link, if_silent)):
                way = self.client.learn(route, link)
                with self.lock:
                    self._connect(way)
                return
            self.client.drop_route(route)
            avoid = route if link is None or link.lost() else None
            await asyncio.sleep(RETRY_PAUSE)

    async def _locate(self, avoid: Route | None, insist_until: float) -> Route | None:
        """Asks the nest. None when time passed without a route, or the queue has changed; what is over by then has failed."""
        deadline = min((message.deadline for message in tuple(self._queue)), default=0.0)
        until = min(deadline, insist_until) if avoid is not None else deadline
        after = next((message.dot for message in reversed(tuple(self._queue)) if message.dot is not None), None)
        self._nudge = asyncio.Event()
        asking = asyncio.ensure_future(
            self.client.asks.locate(self.name, "running", until, after, avoid, sum(message.cast for message in tuple(self._queue)))
        )
        nudged = asyncio.ensure_future(self._nudge.wait())
        try:
            await asyncio.wait({asking, nudged}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return None
            outcome = asking.result()
        finally:
            self._nudge = None
            nudged.cancel()
            asking.cancel()
        if isinstance(outcome, Route):
            return outcome
        if isinstance(outcome, ev.Refused) and outcome.error == "CallTimeout":
            self._fail_expired(outcome)
        elif isinstance(outcome, ev.Refused):
            self._fail_queue(lambda: named_error(outcome.error, outcome.message, self.name, outcome.detail))
        return None

    def _expects(self) -> bool:
        """Does a message wait to be sent?"""
        for message in tuple(self._queue):
            self.client.give_time(message)
        self._fail_expired(None)
        with self.lock:
            self._queue = deque(message for message in self._queue if not message.finished)
            return bool(self._queue)

    def _fail_expired(self, refused: ev.Refused | None) -> None:
        now = self.client.clock()
        for message in tuple(self._queue):
            if message.deadline > now:
                continue
            if refused is None:
                message.expire()
            else:
                message.finish(named_error("CallTimeout", refused.message, self.name, refused.detail))

    def _fail_queue(self, make_error: Callable[[], BaseException]) -> None:
        with self.lock:
            messages = tuple(self._queue)
            self._queue.clear()
        for message in messages:
            message.finish(make_error())

    def _fail_all(self, error: Exception) -> None:
        with self.lock:
            messages = [*self._sent.values(), *self._queue]
            self._sent.clear()
            self._queue.clear()
            self._way = None
            self._closed = False
        for message in messages:
            message.finish(error)

    def _flush(self, most: float = FOREVER) -> bool:
        """Sends what has queued up, and opens the lane.

        Args:
            most: so many messages may be unanswered at a time.

        Returns:
            False if something is left, and the lane closed.
        """
        failed: list[tuple[Pending, Exception]] = []
        watched: list[tuple[Pending, Reply]] = []
        casts: list[tuple[Pending, Reply]] = []
        with self.lock:
            way = self._way
            if self._queue and way is None:
                return False
            while self._queue and way is not None and len(self._sent) < most:
                message = self._queue.popleft()
                if message.finished:
                    continue
                try:
                    self._check_cycle(message)
                    reply = self._send(message, way, Urgency.SOON)
                except Exception as error:  # a cycle; or Ray did not take it
                    failed.append((message, error))
                    continue
                if message.to_be_watched:
                    watched.append((message, reply))
                elif not self._watching:
                    self._watch()
                if message.cast:
                    casts.append((message, reply))
            self._closed = bool(self._queue)
            self._full = self._full and self._closed
            opened = not self._closed  # what comes back at once may close it again, and have it opened by another
        for message, reply in watched:
            message.watch(reply)
        for message, reply in casts:
            reply.tell(message.answered)
        for message, reason in failed:
            message.finish(reason)
        return opened
