"""Clients at the desk: who waits for what, and what they are told.

Every request but `start` is a wait for a condition of one name, looked at again whenever the name changes; a nest never holds a user's
call (C1). Before a client is told `BirdNotFound`, and while a dot that it wrote is not here yet, the other nests are asked (C3).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flock_ray import notices
from flock_ray.core import events as ev
from flock_ray.core import messages as msg
from flock_ray.core.records import Record
from flock_ray.specs import Dot, Life, Name, Route

if TYPE_CHECKING:
    from flock_ray.core.registry import Registry

NEVER = float("inf")


@dataclass(slots=True)
class Waiter:
    """One request that waits: for `running`, `gone` or `known`, or to be able to `stop` or `restart`."""

    request: str
    name: Name
    wanted: str
    deadline: float
    after: Dot | None
    avoid: Route | None
    casts: int = 0
    searched: bool = False
    again_at: float = NEVER  # it looks again although nothing has changed
    incarnation: int | None = None  # when a restart was first asked for


@dataclass(slots=True)
class Search:
    """The other nests are being asked for a name."""

    until: float
    again_at: float
    missing: set[Life] = field(default_factory=set)


@dataclass(slots=True)
class Unacknowledged:
    """A start that waits for a peer to have its spec (`ack="peer"`)."""

    request: str
    name: Name
    dot: Dot
    again_at: float


class Desk:
    """The requests of one nest's clients."""

    def __init__(self, registry: Registry) -> None:
        self._nest = registry
        self._waiters: dict[str, Waiter] = {}
        self._by_name: dict[Name, dict[str, None]] = {}
        self._due: list[tuple[float, str]] = []  # when a waiter gives up or looks again; entries of what has ended since are passed over
        self._searches: dict[Name, Search] = {}
        self._searches_due: list[tuple[float, int, Name]] = []  # when one ends or asks again; the number is for names that do not compare
        self._asked = 0
        self._early: list[ev.Start] = []  # came before this nest was ready: it could not tell whether the name is taken
        self._unacknowledged: dict[str, Unacknowledged] = {}
        self._unsaid: deque[str] = deque()  # the same in the order in which they are told again
        self._fresh_acks: dict[Name, str] = {}

    # What clients ask

    def start(self, event: ev.Start) -> None:
        nest = self._nest
        if not nest.membership.ready:
            self._early.append(event)
            return
        name, spec = event.name, event.spec
        winner = nest.replica.winner(name)
        if winner is not None:
            dot, record = winner
            again = record.spec.request_id == spec.request_id
            if again or (spec.options.if_exists == "ok" and record.spec.same_bird(spec)):
                nest.answer(event.request, ev.Accepted(dot, existed=not again))
            elif spec.options.if_exists == "ok" and (spec.module, spec.qualname) == (record.spec.module, record.spec.qualname):
                nest.answer(event.request, ev.Differs(dot, record.spec.args))
            elif spec.options.if_exists == "ok":
                text = f"bird {name!r} exists with another class: it is a {record.spec.class_name}"
                nest.answer(event.request, ev.Refused("BirdExists", text, name))
            else:
                text = f'bird {name!r} exists already; stop it first, or start with options(if_exists="ok")'
                nest.answer(event.request, ev.Refused("BirdExists", text, name))
            return
        dot = nest.add(name, spec, event.code, event.wall)
        if spec.options.ack == "peer" and nest.membership.living():
            self._fresh_acks[name] = event.request
            self._unacknowledged[event.request] = Unacknowledged(event.request, name, dot, nest.now + nest.config.retry_interval)
            self._unsaid.append(event.request)
        else:
            nest.answer(event.request, ev.Accepted(dot))

    def wait(
        self,
        request: str,
        name: Name,
        wanted: str,
        timeout: float | None,
        after: Dot | None = None,
        avoid: Route | None = None,
        casts: int = 0,
    ) -> None:
        deadline = NEVER if timeout is None else self._nest.now + timeout
        self._waiters[request] = waiter = Waiter(request, name, wanted, deadline, after, avoid, casts)
        self._by_name.setdefault(name, {})[request] = None
        if timeout is not None:
            heapq.heappush(self._due, (deadline, request))
        self._look_for(waiter)

    def cancel(self, request: str) -> None:
        waiter = self._waiters.pop(request, None)
        if waiter is not None:
            requests = self._by_name[waiter.name]
            del requests[request]
            if not requests:
                del self._by_name[waiter.name]

    # What makes them go on

    def names(self) -> Iterable[Name]:
        """The names that somebody waits for."""
        return tuple(self._by_name)

    def waits_for(self, name: Name) -> bool:
        return name in self._by_name

    def look(self, name: Name) -> None:
        """The name may have changed."""
        for request in tuple(self._by_name.get(name, ())):
            if request in self._waiters:
                self._look_for(self._waiters[request])

    def looked_up(self, name: Name, peer: Life) -> None:
        search = self._searches.get(name)
        if search is not None:
            search.missing.discard(peer)
            if not search.missing:
                self._search_done(name)

    @property
    def waits_for_acks(self) -> bool:
        """Is there a start that its client wants to be acknowledged, and that was not told yet?"""
        return bool(self._fresh_acks)

    def acks_wanted(self) -> dict[Name, str]:
        acks, self._fresh_acks = self._fresh_acks, {}
        return acks

    def acknowledged(self, ack: str) -> None:
        waiting = self._unacknowledged.pop(ack, None)
        if waiting is not None:
            self._nest.answer(waiting.request, ev.Accepted(waiting.dot))

    def run(self) -> None:
        """Lets time pass."""
        nest = self._nest
        if self._early and nest.membership.ready:
            early, self._early = self._early, []
            for event in early:
                self.start(event)
            for name in tuple(self._by_name):
                self.look(name)
        while self._searches_due and self._searches_due[0][0] <= nest.now:
            self._search_again(heapq.heappop(self._searches_due)[2])
        while self._unsaid and ((waiting := self._unacknowledged.get(self._unsaid[0])) is None or waiting.again_at <= nest.now):
            ack = self._unsaid.popleft()
            if waiting is not None:
                self._tell_again(ack, waiting)
        while self._due and self._due[0][0] <= nest.now:
            waiter = self._waiters.get(heapq.heappop(self._due)[1])
            if waiter is not None and waiter.again_at <= nest.now:
                self._look_for(waiter)
            if waiter is not None and waiter.deadline <= nest.now and waiter.request in self._waiters:
                self._give_up(waiter)

    def wake_at(self) -> float:
        times = [self._searches_due[0][0]] if self._searches_due else []
        if self._unsaid:
            ack = self._unacknowledged.get(self._unsaid[0])
            times.append(ack.again_at if ack is not None else self._nest.now)
        if self._due:
            times.append(self._due[0][0])
        return min(times, default=NEVER)

    def _look_again(self, waiter: Waiter) -> None:
        waiter.again_at = self._nest.now + self._nest.config.retry_interval
        heapq.heappush(self._due, (waiter.again_at, waiter.request))

    # One waiter

    def _look_for(self, waiter: Waiter) -> None:
        nest = self._nest
        if not nest.membership.ready:
            self._look_again(waiter)
            return
        waiter.again_at = NEVER
        winner = nest.replica.winner(waiter.name)
        behind = waiter.after is not None and not nest.replica.knows(waiter.after)
        if (behind or (winner is None and waiter.wanted != "gone")) and not waiter.searched:
            self._search(waiter.name)
            return
        if winner is None:
            self._finish_unknown(waiter)
        elif waiter.wanted == "stop":
            nest.remove(waiter.name, [dot for dot, _ in nest.replica.records(waiter.name)])
            self._finish(waiter, ev.Done(winner[0]))
        elif waiter.wanted == "known":
            self._finish(waiter, ev.Done(winner[0]))
        elif waiter.wanted == "restart":
            self._restart(waiter, *winner)
        elif waiter.wanted == "running":
            self._route(waiter, *winner)

    def _finish_unknown(self, waiter: Waiter) -> None:
        if waiter.wanted == "gone":
            if not self._nest.holds.dots(waiter.name):
                self._finish(waiter, ev.Done())
            return
        if waiter.casts:
            self._nest.notice(notices.CastLost(self._nest.me, waiter.name, waiter.casts))
        text = f"no nest that could be asked knows a bird {waiter.name!r}; start it first"
        self._finish(waiter, ev.Refused("BirdNotFound", text, waiter.name))

    def _restart(self, waiter: Waiter, dot: Dot, record: Record) -> None:
        """Done here, or passed on to the nest that holds or owns the name, until its status shows a new incarnation."""
        nest, status = self._nest, record.status
        seen = status.incarnation if status is not None else 0
        if waiter.incarnation is None:
            waiter.incarnation = seen
        if seen > waiter.incarnation or nest.supervision.restart(waiter.name):
            self._finish(waiter, ev.Done(dot))
            return
        holds = status is not None and status.state != "failed" and status.life in nest.membership.view
        to = status.life if status is not None and holds else nest.membership.placement.owner(waiter.name)
        if to is not None and to != nest.me:
            nest.send(to, msg.RestartAsk(waiter.name, dot, waiter.incarnation))
        self._look_again(waiter)

    def _route(self, waiter: Waiter, dot: Dot, record: Record) -> None:
        nest, status = self._nest, record.status
        if status is None:
            return
        if status.state == "failed":
            text = f"bird {waiter.name!r} has failed; mend the cause, then restart it"
            self._finish(waiter, ev.Refused("BirdCrashed", text, waiter.name, status.error))
        elif status.state == "running" and status.life in nest.membership.view:
            route = Route(waiter.name, dot, status.incarnation, status.life.node, status.host, status.address, record.spec.is_async)
            if waiter.avoid is None or (waiter.avoid.dot, waiter.avoid.host) != (dot, status.host):
                self._finish(waiter, route)
            else:  # what we know may be old: ask those who may know better
                self._look_again(waiter)
                if status.life != nest.me:
                    nest.send(status.life, msg.LookUp(waiter.name))

    def _give_up(self, waiter: Waiter) -> None:
        if self._nest.replica.winner(waiter.name) is None and self._nest.membership.ready and waiter.wanted != "gone":
            self._finish_unknown(waiter)
        else:
            self._finish(waiter, self.too_late(waiter.name, waiter.wanted))

    def too_late(self, name: Name, wanted: str) -> ev.Refused:
        """What is to be said of a bird that did not become what was wanted in time."""
        winner = self._nest.replica.winner(name)
        detail, state = "", "unknown here"
        if winner is not None:
            status = winner[1].status
            lives = status is not None and (status.life in self._nest.membership.view or status.state == "failed")
            state = status.state if status is not None and lives else "pending"
            reason = (status.reason if status is not None else "") or self._nest.membership.placement.reason(name)
            state += f" ({reason})" if reason and state == "pending" else ""
            detail = status.error if status is not None else ""
        wish = {"stop": "could not be stopped", "restart": "could not be restarted"}.get(wanted, f"was not {wanted}")
        return ev.Refused("CallTimeout", f"bird {name!r} {wish} in time: it is {state}", name, detail)

    def _finish(self, waiter: Waiter, outcome: ev.Outcome) -> None:
        self.cancel(waiter.request)
        self._nest.answer(waiter.request, outcome)

    # Asking the others

    def _search(self, name: Name) -> None:
        if name in self._searches:
            return
        nest = self._nest
        peers = set(nest.membership.living())
        self._searches[name] = search = Search(nest.now + nest.config.lookup_timeout, 0.0, peers)
        if peers:
            self._ask(name, search)
        else:
            self._search_done(name)

    def _ask(self, name: Name, search: Search) -> None:
        search.again_at = self._nest.now + self._nest.config.retry_interval
        self._asked += 1
        heapq.heappush(self._searches_due, (min(search.again_at, search.until), self._asked, name))
        for peer in search.missing:
            self._nest.send(peer, msg.LookUp(name))

    def _search_again(self, name: Name) -> None:
        search = self._searches.get(name)
        if search is None:
            return
        search.missing.intersection_update(self._nest.membership.living())
        if search.until <= self._nest.now or not search.missing:
            self._search_done(name)
        elif search.again_at <= self._nest.now:
            self._ask(name, search)

    def _search_done(self, name: Name) -> None:
        self._searches.pop(name, None)
        for request in self._by_name.get(name, ()):
            self._waiters[request].searched = True
        self.look(name)

    def _tell_again(self, ack: str, waiting: Unacknowledged) -> None:
        nest = self._nest
        waiting.again_at = nest.now + nest.config.retry_interval
        record = nest.replica.record(waiting.name, waiting.dot)
        living = nest.membership.living()
        if record is None or not living:  # stopped meanwhile, or nobody is left to acknowledge it
            self.acknowledged(ack)
            return
        self._unsaid.append(ack)
        update = nest.replica.update_for(waiting.name, waiting.dot)
        for life in living:
            nest.send(life, msg.News(update, (ack,)))
