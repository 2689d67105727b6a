"""Who holds what: the decisions of one nest. Events go in, effects come out; nothing here waits, asks a clock or does I/O.

For each name `_evaluate` looks at the whole situation (the replica, the view, what this nest and others hold) and does what is due.
It may be called at any time and as often as one likes; events merely mark names to be looked at. So there is one place that decides
whether a life begins, stays or ends.

`core/barrier.py` says who permits (H1), `core/handover.py` gets a life from its holder to its owner (H3, H5), `core/supervision.py`
begins and ends lives (V1, S6), `core/desk.py` answers clients.

The promise, H4: two lives of a name run at the same time only where one nest had been declared dead by the other, or had never been
heard by it (a split, a boot or join during one, or a false death).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

from flock_ray import notices
from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import journal, wire
from flock_ray.core import messages as msg
from flock_ray.core.arcs import difference, inside
from flock_ray.core.barrier import Barrier
from flock_ray.core.desk import Desk
from flock_ray.core.handover import Handover
from flock_ray.core.holds import BirdLife, Holds, Phase
from flock_ray.core.inbox import Inbox
from flock_ray.core.journal import Entry
from flock_ray.core.membership import REMEMBERED, Condition, Membership
from flock_ray.core.records import Record
from flock_ray.core.replica import RecordChange, Replica
from flock_ray.core.ring import Placement
from flock_ray.core.supervision import Supervision
from flock_ray.core.sync import Sync
from flock_ray.specs import Dot, Life, Name, Spec, Stamp, Status, name_hash

NAMES_A_STEP = 250  # looked at in one `handle`: about 5 ms, so that a nest goes on answering in a big change
LITTLE = 64  # changes that are told at once within `GATHER`: what is more is a burst, and told together
GATHER = 0.02  # seconds for which news of a burst is gathered
BURST = 0.5  # the same for first starts at the nest that owns them: a start and its statuses then go as one entry, for half the cost
RELAY_AFTER = 2  # unanswered tries before every other one goes through a third nest (H2)
AWAKE = float("inf")

_TAKEN_BY: dict[type, str] = {kind: f"_on_{kind.__name__}" for kind in get_args(ev.Event)}


@dataclass(slots=True)
class Attempt:
    """A request to a peer that is repeated until it is answered."""

    again_at: float
    count: int = 1


class Registry:
    """One nest's decisions.

    Args:
        me: this life of the nest.
        jitter: gives numbers from 0 to 1 that differ between nests.
        place: makes the placement of a view; all nests of a flock have to have the same.
    """

    def __init__(
        self,
        me: Life,
        config: Config,
        jitter: Callable[[], float],
        place: Callable[[Replica, frozenset[Life]], Placement] = Placement,
    ) -> None:
        self.me = me
        self.config = config
        self.jitter = jitter
        self.now = 0.0
        self.replica = Replica()
        self.membership = Membership(me, config, self.replica, jitter, place)
        self.barrier = Barrier(self.membership, self.owns)
        self.sync = Sync(self.replica, config.retry_interval)
        self.holds = Holds()
        self.supervision = Supervision(self)
        self.handover = Handover(self)
        self.desk = Desk(self)
        self.inbox = Inbox(self)
        self.memory_low = False
        self._counter = 0
        self._boot: Iterator[None] | None = None  # what is left of it, in steps
        self._early: list[ev.Event] = []  # what was heard meanwhile
        self._written_view: frozenset[Life] = frozenset()  # in the journal: the last view in which a nest of this node acted
        self._dirty: dict[Name, None] = {}
        self.waiting: set[Name] = set()  # owned here, and something is missing before they can be hatched
        self._crowded: set[Name] = set()  # of these, those this nest does not admit (P3)
        self._changes: list[RecordChange] = []  # made here, to be told
        self._gathers_since = AWAKE  # what is kept back, on the clock of `handle`
        self._hurries = False  # is there something among it that others should soon know of?
        self._told, self._told_at = 0, 0.0  # changes, within `GATHER` seconds
        self._ring = self.membership.placement.ring  # by which names were looked at last
        self._out: list[do.Effect] = []
        self.asks: dict[Life, Attempt] = {}
        self._next_sync = AWAKE
        self._code_ask_at = 0.0
        self._conflicts: dict[Name, tuple[Dot, ...]] = {}
        self._untold: dict[Name, float] = {}  # conflicts that another node is to tell, and when this one does
        self._demanded: tuple[Any, ...] = ()
        self._placed_seen: tuple[object, int, bool] | None = None

    # The two ways in

    def handle(self, event: ev.Event, now: float) -> list[do.Effect]:
        """Takes an event in.

        Args:
            now: seconds on a clock that never goes back.

        Returns:
            What is to be done, in order.
        """
        return self.handle_all((event,), now)

    def handle_all(self, events: Iterable[ev.Event], now: float) -> list[do.Effect]:
        """Takes many events in, in order, and looks once at what follows: of a burst this is half the cost.

        Not more than some thousand at a time, for the nest answers nobody meanwhile.
        """
        self.now = now
        for event in events:
            self._take(event)
        self._advance()
        entries: tuple[Entry, ...] = tuple(self.replica.unwritten())
        if self.membership.ready and self.membership.view != self._written_view:  # before, it is alone, and its next life is not to be
            self._written_view = self.membership.view
            entries += (self._written_view,)
        effects: list[do.Effect] = [do.Write(entries), *self._out] if entries else self._out
        self._out = []
        return effects

    def _take(self, event: ev.Event) -> None:
        if self._boot is not None and not isinstance(event, ev.Tick):
            self._early.append(event)  # it may be of a life that is still to be adopted, or of what is still to be read
        else:
            getattr(self, _TAKEN_BY[type(event)])(event)

    def wake_at(self) -> float:
        """When a `Tick` is due at the latest."""
        if self._dirty or self._boot is not None:
            return self.now
        times = [self.membership.wake_at(), self.sync.wake_at(), self.desk.wake_at(), self._next_sync]
        times += [self.supervision.wake_at(), self.handover.wake_at()]
        times += [attempt.again_at for attempt in self.asks.values()]
        if self._code_ask_at > self.now:
            times.append(self._code_ask_at)
        if self._changes:
            times.append(self._gathers_since + self._patience())
        times += self._untold.values()
        return min(times)

    @property
    def booting(self) -> bool:
        """Is it still being read what the life before has written? Then there is no copy to be made: what was not read would be deleted."""
        return self._boot is not None

    def copy(self) -> Iterator[bytes]:
        """All there is to be written, for a journal that has become long."""
        return journal.copy(self.replica, lambda: self._written_view)

    def owns(self, name: Name) -> bool:
        return self.membership.placement.owner(name) == self.me

    # Membership events

    def _on_Booted(self, event: ev.Booted) -> None:
        self._boot = self._boot_with(event)
        self._boot_some(self._boot)

    def _boot_some(self, boot: Iterator[None]) -> None:
        """Boots for a step. Only when it knows what was written and what its hosts hold may a nest become ready, and say what it holds."""
        for _ in boot:
            return
        self._boot = None
        early, self._early = self._early, []
        for event in early:
            self._take(event)

    def _boot_with(self, event: ev.Booted) -> Iterator[None]:
        """Takes over what the life before has written and what hosts have kept, in steps of some ms."""
        before = journal.Reader(self.replica)
        for piece in event.journal:
            try:
                before.read(piece)
            except journal.UnreadableError as error:
                self.notice(notices.JournalUnreadable(self.me, str(error)))
            yield
        before.end()
        self.replica.keep_nodes(before.view)  # from a journal the long dead would come back again and again, as if new (S2)
        self._written_view = before.view
        self.replica.learn([event.node])
        for name, dot in event.exits:
            self.changed(self.replica.exited(name, dot))
            self.effect(do.Forget(dot))
        for number, adopted in enumerate(event.adopted, 1):
            self._adopt(adopted)
            if number % NAMES_A_STEP == 0:
                yield
        self._next_sync = self.now + self.config.retry_interval
        for life in self.membership.restored(before.view):
            self.effect(do.ProbeNode(life))
        self.membership.booted(self.now)

    def _adopt(self, adopted: ev.Adopted) -> None:
        """Takes over what a host has kept, under its own dot (V2)."""
        name, dot = adopted.name, adopted.dot
        if not self.replica.knows(dot):
            self.changed(self.replica.add(name, dot, adopted.spec, adopted.code))
        if adopted.record is not None:
            self.holds.keep(name, adopted.record)
            return
        self.supervision.adopt(adopted)

    def _on_NodesListed(self, event: ev.NodesListed) -> None:
        self.membership.table(event.nodes)

    def _on_MemberAlive(self, event: ev.MemberAlive) -> None:
        peer = self.membership.peers.get(event.life)
        if peer is not None and peer.condition is Condition.DYING:
            self.notice(notices.NestRecovered(self.me, event.life))
        if self.membership.alive(event.life, self.now):
            self.sync.sessions.pop(event.life, None)

    def _on_MemberDead(self, event: ev.MemberDead) -> None:
        if self.membership.dying(event.life):
            self.notice(notices.NestSuspected(self.me, event.life))
            self.effect(do.ProbeNode(event.life))

    def _on_ConnectionBroken(self, event: ev.ConnectionBroken) -> None:
        for life in self.membership.living():
            if life.node == event.node:
                self.effect(do.ProbeNode(life))

    def _on_NodeProbed(self, event: ev.NodeProbed) -> None:
        self.membership.probed(event.life, event.found, self.now)

    def _on_MemoryLow(self, event: ev.MemoryLow) -> None:
        self.memory_low = event.low
        self.mark(self._crowded)

    def _on_Tick(self, event: ev.Tick) -> None:
        del event

    # Clients' requests

    def _on_Start(self, event: ev.Start) -> None:
        self.desk.start(event)

    def _on_Stop(self, event: ev.Stop) -> None:
        self.desk.wait(event.request, event.name, "stop", self.config.call_timeout, event.after)

    def _on_Restart(self, event: ev.Restart) -> None:
        self.desk.wait(event.request, event.name, "restart", self.config.call_timeout, event.after)

    def _on_Locate(self, event: ev.Locate) -> None:
        self.desk.wait(event.request, event.name, event.wanted, event.timeout, event.after, event.avoid, event.casts)

    def _on_Cancel(self, event: ev.Cancel) -> None:
        self.desk.cancel(event.request)

    def add(self, name: Name, spec: Spec, code: bytes, wall: int) -> Dot:
        """Puts a spec into the set under a new dot, stamped by the hybrid logical clock."""
        latest = self.replica.latest_stamp
        stamp = Stamp(wall, 0) if wall > latest.wall else Stamp(latest.wall, latest.logical + 1)
        self._counter += 1
        dot = Dot(self.me, self._counter)
        self.changed(self.replica.add(name, dot, spec.stamped(stamp), code))
        self.notice(notices.BirdStarted(self.me, name, dot, 0))
        if not self.owns(name):
            self.hurry()
        return dot

    def remove(self, name: Name, dots: Iterable[Dot]) -> None:
        self.changed(self.replica.remove(name, dots))
        self.hurry()

    def _on_Received(self, event: ev.Received) -> None:
        self.inbox.take(event.envelope)

    # What hosts say of lives

    def _on_LifeBegins(self, event: wire.LifeBegins) -> None:
        self.supervision.begins(event)

    def _on_LifeRunning(self, event: wire.LifeRunning) -> None:
        self.supervision.running(event)

    def _on_LifeCrashed(self, event: wire.LifeCrashed) -> None:
        self.supervision.crashed(event)

    def _on_LifeExited(self, event: wire.LifeExited) -> None:
        self.supervision.exited(event)

    def _on_LifeEnded(self, event: wire.LifeEnded) -> None:
        self.supervision.ended(event)

    def _on_LifeLost(self, event: ev.LifeLost) -> None:
        self.supervision.lost(event)

    def _on_Evacuate(self, event: ev.Evacuate) -> None:
        self.supervision.evacuate(event)

    # Looking at a name

    def _evaluate(self, name: Name) -> None:
        if name in self.waiting:
            self.waiting.discard(name)
            self._crowded.discard(name)
        if name in self.holds:
            self._reap(name)
        if self.membership.ready:
            self._tell_conflict(name)
        if self.membership.ready and self.owns(name):
            winner = self.replica.winner(name)
            if winner is not None:
                if self.barrier.permits(name):
                    self._settle(name, *winner)
                else:
                    self.waiting.add(name)
            self.handover.plan(name)
        elif self.membership.ready and name in self.holds:
            if self.membership.placement.owner(name) is None:
                self._evict(name)
            self._stand_by(name)
        self.desk.look(name)

    def _evict(self, name: Name) -> None:
        """It fits nowhere (any more): its room belongs to birds with earlier stamps (P2). What it hands over waits here for an owner.

        A life of a loser ends as well, for there is no owner who would see to it (S4).
        """
        winner = self.replica.winner(name)
        for life in self.holds.lives_of(name):
            if life.phase is Phase.ENDING or winner is None or not winner[1].spec.options.placed:
                continue
            if life.dot != winner[0]:
                self.supervision.end(life, "stopped", keep=False)
            elif life.spec.options.moves:
                self.supervision.end(life, "moved", keep=True)

    def _stand_by(self, name: Name) -> None:
        """What does not move lives on here, whoever owns it.

        Does a life count for more whose nest is gone, this one is raised above it: nobody else would, and callers look for that one (H4).
        """
        winner = self.replica.winner(name)
        life = self.holds.lives.get(winner[0]) if winner is not None else None
        if winner is None or life is None or life.spec.options.moves:
            return
        status = winner[1].status
        if status is not None and status.life not in self.membership.view:
            self.supervision.raise_incarnation(life, winner[1])

    def _reap(self, name: Name) -> None:
        """Ends what was stopped, and forgets records that nobody needs (H3)."""
        entries = dict(self.replica.records(name))
        winner = self.replica.winner(name)
        for dot in self.holds.dots(name):
            gone = dot not in entries and self.replica.knows(dot)
            life, record = self.holds.lives.get(dot), self.holds.records.get(dot)
            if life is not None and gone and life.phase is not Phase.ENDING:
                self.supervision.end(life, "stopped", keep=False)
            if record is not None:
                beaten = winner is not None and winner[0] != dot and winner[1].status is not None
                if gone or beaten or (life is not None and life.incarnation > record.incarnation):
                    self.handover.drop_record(name, dot)

    def _settle(self, name: Name, dot: Dot, record: Record) -> None:
        """It is permitted that the winner lives here: so it does, and nothing else of the name."""
        if name not in self.holds:
            self._hatch(name, dot, record)
            return
        here = self.holds.lives_of(name)
        for life in here:
            if life.dot != dot and life.phase is not Phase.ENDING:
                self.supervision.end(life, "stopped", keep=False)
        if dot in self.holds.lives:
            self.supervision.raise_incarnation(self.holds.lives[dot], record)
            if (life := self.holds.lives[dot]).phase is not Phase.ENDING and self._outbid(life):
                self.waiting.add(name)  # put off until that nest is admitted, or dead
        elif not self.holds.lives_of(name):
            self._hatch(name, dot, record)

    def _hatch(self, name: Name, dot: Dot, record: Record) -> None:
        """Begins a life of the winner, unless something still stands against it."""
        status = record.status
        if status is not None and status.state == "failed":
            return
        if record.spec.code not in self.replica.code:
            self.waiting.add(name)
            return
        reason = self._not_admitted(status)
        if reason:
            self.waiting.add(name)
            self._crowded.add(name)
            if status is None or (status.state, status.reason) != ("pending", reason):
                incarnation, restarts, crashes = (status.incarnation, status.restarts, status.crashes) if status else (0, 0, 0)
                pending = Status(incarnation + 1, self.me, self.supervision.next_sequence(), "pending", "", restarts, crashes, "", reason)
                self.changed(self.replica.set_status(name, dot, pending))
            return
        self.supervision.hatch(name, dot, record)
        self._dirty.pop(name, None)  # what it has written is seen by the rest of this look

    def _outbid(self, life: BirdLife) -> bool:
        """Does the flock know a status of the dot that counts for more than this life's?"""
        record = self.replica.record(life.name, life.dot)
        status = record.status if record is not None else None
        return status is not None and (status.incarnation, status.life) != (life.incarnation, self.me)

    def _not_admitted(self, status: Status | None) -> str:
        """Why this nest does not take one more bird (P3); empty if it does."""
        if self.membership.paused and not self._is_held(status):
            return "this side of a split has less than half of the nodes, and minority is 'pause'"
        if self.config.max_birds is not None and len(self.holds.lives) >= self.config.max_birds:
            return f"its node holds max_birds={self.config.max_birds} already"
        if self.memory_low:
            return f"its node has less than min_free_memory={self.config.min_free_memory:g} of its memory free"
        return ""

    def _is_held(self, status: Status | None) -> bool:
        """Was a bird held on this side? One that is pending is not, whoever said so last."""
        return status is not None and status.state != "pending" and any(life.node == status.life.node for life in self.membership.view)

    def _tell_conflict(self, name: Name) -> None:
        """Told once in a flock: by the node that accepted the winner, for owners change when a split heals, and each of them would tell it.

        Is nothing heard of that node for `nest_grace`, the owner does.
        """
        won = self.replica.winner(name)
        if won is None or len(self.replica.records(name)) < 2:
            if self._conflicts or self._untold:
                self._conflicts.pop(name, None)
                self._untold.pop(name, None)
            return
        winner, record = won
        losers = tuple(sorted(dot for dot, other in self.replica.records(name) if not other.spec.same_bird(record.spec)))
        if not losers or self._conflicts.get(name) == losers:
            return
        if winner.life.node != self.me.node:
            if not self.owns(name) or any(winner.life.node == life.node for life in (*self.membership.living(), *self.membership.view)):
                self._untold.pop(name, None)
                return
            if self.now < self._untold.setdefault(name, self.now + self.config.nest_grace):
                return
        self._untold.pop(name, None)
        self._conflicts[name] = losers
        self.notice(notices.NameConflict(self.me, name, winner, losers))

    # Time

    def _advance(self) -> None:
        if self._boot is not None:
            self._boot_some(self._boot)
        was_ready = self.membership.ready
        old = self.membership.step(self.now)
        if old is not None:
            self._adopted(old)
        if self.membership.ready and not was_ready:
            self.notice(notices.NestReady(self.me, self.me))
            self.mark(self.replica.birds.within(self.membership.placement.ring.arcs(self.me.node)))
            self.mark(self.membership.placement.table())
            self.mark(self.holds.names())
            self.mark(self.desk.names())
        self.placement_changed()
        self.supervision.run_timers()
        self.desk.run()
        if self._untold:
            self.mark([name for name, due in self._untold.items() if due <= self.now])
        for name in tuple(islice(self._dirty, NAMES_A_STEP)):
            if name in self._dirty:
                del self._dirty[name]
                self._evaluate(name)
        self._ask_barrier()
        self.handover.run()
        self._synchronise()
        self._ask_code()
        self._publish()

    def _adopted(self, old: frozenset[Life]) -> None:
        view = self.membership.view
        for life in sorted(view - old):
            self.notice(notices.NestJoined(self.me, life))
        for life in sorted(old - view):
            self.notice(notices.NestLeft(self.me, life))
        self.mark(self.barrier.reports)
        self.mark(self.barrier.adopted(old))
        # What was asked of the old view is answered in vain, so all are asked anew, at once.
        self.asks = {life: Attempt(self.now, attempt.count) for life, attempt in self.asks.items() if life in view}
        self.handover.view_changed()
        # Only what this nest owns now and did not before, and what has not come to an end: nothing else can be due.
        placement = self.membership.placement
        gained = difference(placement.ring.arcs(self.me.node), self._ring.arcs(self.me.node))
        self._ring = placement.ring
        self.mark(self.waiting)
        self.mark(self.holds.within(gained))
        self.mark(self.holds.staying.values())
        if self.barrier.unanimous:
            self.mark(self.replica.birds.within(gained))
        else:
            self.waiting.update(self.replica.birds.within(gained))  # looked at when the others have answered
            self.mark_cleared()  # or now: nobody else may be left
        self.mark(placement.table())
        self.mark(self.desk.names())

    def placement_changed(self) -> None:
        """Placed names have new owners: like a view of its own, or answers given before could be taken for later ones (M3)."""
        placement = self.membership.placement
        seen = (placement, self.replica.version, bool(len(self.replica)))
        if seen == self._placed_seen:
            return
        self._placed_seen = seen
        changed = self.barrier.placement_changed()
        if changed:
            self.membership.number += 1
            self.mark(changed)
        demanded = self._demands(placement)
        if demanded != self._demanded:
            self._demanded = demanded
            self.effect(do.Demand(demanded))

    def _demands(self, placement: Placement) -> tuple[Any, ...]:
        """What the cluster must have room for, if something is lacking: of all birds, for Ray compares it with all that there is."""
        table, homeless = placement.table(), bool(len(self.replica)) and not any(placement.ring.weights.values())
        if None not in table.values() and not homeless:
            return ()
        winners = filter(None, map(self.replica.winner, table))
        return tuple(sorted([*(record.spec.options.demand for _, record in winners), *[(("CPU", 1.0),)] * homeless]))

    @property
    def lacks_nodes(self) -> bool:
        """Are there birds that no nest of this view can run?"""
        return bool(self._demanded)

    def _ask_barrier(self) -> None:
        if not self.membership.ready:
            return
        missing = self.barrier.unanswered()
        for life in [life for life in self.asks if life not in missing]:
            del self.asks[life]
        for life in missing:
            attempt = self.asks.get(life)
            if attempt is None or attempt.again_at <= self.now:
                count = attempt.count if attempt else 0
                self.asks[life] = Attempt(self.now + self.config.retry_interval, count + 1)
                self.send(life, msg.BarrierAsk(self.membership.number), count)

    def _synchronise(self) -> None:
        """Keeps a comparison under way with every nest that is not in sync, and now and then begins one with any other."""
        living = self.membership.living()
        for gone in set(self.sync.sessions) - set(living):
            del self.sync.sessions[gone]
        for life in self.membership.unsynced():
            session = self.sync.sessions.get(life)
            if session is None or session.exchange != self.membership.peer(life).exchange:
                self.sync.begin(life, self.membership.peer(life).exchange)
        if self.now >= self._next_sync:
            self._next_sync = self.now + self.config.sync_interval * (0.5 + self.jitter())
            idle = sorted(life for life in living if life not in self.sync.sessions)
            chosen = idle[int(self.jitter() * len(idle)) :][:1]
            if not self.membership.ready:  # the others' views have to be known, all of them
                chosen, self._next_sync = idle, self.now + self.config.retry_interval
            for life in chosen:
                self.sync.begin(life, self.membership.peer(life).exchange)
            self._forget_the_dead()
        for life, session in list(self.sync.sessions.items()):
            if session.ask_again_at <= self.now:
                self.send(life, self.sync.ask(life, self.now, self.fading(), self.outlook()), session.attempts - 1)

    def _ask_code(self) -> None:
        if self._code_ask_at > self.now:
            return
        missing = tuple(sorted(self.replica.missing_code()))
        if missing:
            self._code_ask_at = self.now + self.config.retry_interval
            for life in self.membership.living():
                self.send(life, msg.CodeAsk(missing))

    def _publish(self) -> None:
        """Tells all peers what was changed here (S3): at once, but in a burst every `BURST` seconds, as what it has become meanwhile.

        What another nest has to act on goes after `GATHER` at the latest: starts that it owns, stops, birds that have lived elsewhere.

        For S6 it means: outside of bursts "starting" is handed to the sender with the `Hatch` it speaks of. In a burst of first starts it
        goes up to `BURST` later: a bird that takes its node down within that time goes uncounted, once. For when it is hatched elsewhere
        it is not its first start.
        """
        changes = self._changes
        if not changes:
            return
        if self.now >= self._told_at + GATHER:
            self._told, self._told_at = 0, self.now
        if len(changes) + self._told > LITTLE and not self.desk.waits_for_acks:
            self._gathers_since = min(self._gathers_since, self.now)
            if self.now < self._gathers_since + self._patience():
                return
        self._changes, self._gathers_since, self._hurries = [], AWAKE, False
        self._told += len(changes)
        living = self.membership.living()
        acks = self.desk.acks_wanted()
        for update in self.replica.updates_of(changes) if living else ():
            news = msg.News(update, tuple(acks[name] for name in update.delta.entries if name in acks) if acks else ())
            for life in living:
                self.send(life, news)

    def _patience(self) -> float:
        """Seconds for which the news there is may be kept back."""
        return GATHER if self._hurries else BURST

    # The dead are forgotten in the end (S2)

    def fading(self) -> list[Life]:
        """Ids that have been dead for half the horizon: no longer shared, or they would go round for ever."""
        return [peer.life for peer in self.membership.absent() if peer.absent_for(self.now) > self.config.context_horizon / 2]

    def outlook(self) -> msg.Outlook:
        return self.membership.outlook(self.fading(), self.now)

    def _forget_the_dead(self) -> None:
        """What is kept of a dead nest goes after the horizon; that it was there is remembered for some more, should it come back."""
        membership, horizon = self.membership, self.config.context_horizon
        for life in (self.replica.birds.context.lives() | set(self.replica.nodes)) - {self.me}:
            membership.peer(life)
        for peer in membership.absent():
            if peer.absent_since is None:
                peer.absent_since = self.now  # known by hearsay only
            elif peer.absent_since <= self.now - horizon:
                forgotten = self.replica.forget(peer.life)
                if forgotten and peer.absent_since <= self.now - REMEMBERED * horizon:
                    del membership.peers[peer.life]

    # Small things

    def mark(self, names: Iterable[Name]) -> None:
        for name in names:
            self._dirty[name] = None

    def joined(self, changes: Iterable[RecordChange]) -> None:
        """What others have changed: most of it is none of this nest's business."""
        dirty, holds, desk, owns = self._dirty, self.holds, self.desk, self.owns
        for name, _, after in changes:
            if name in holds or desk.waits_for(name) or name in self.waiting or owns(name) or len(after) > 1:
                dirty[name] = None

    def changed(self, change: RecordChange | None) -> None:
        """What was changed here is told, and looked at, unless it is what a life here says of itself: that decides nothing."""
        if change is None:
            return
        self._changes.append(change)
        name, before, after = change
        own = len(before) == len(after) == 1 and after[0][0] in self.holds.lives and len(self.holds.dots(name)) == 1
        if not own or name in self.barrier.reports or name in self.waiting or self.desk.waits_for(name):
            self._dirty[name] = None

    def answered(self, peer: Life) -> None:
        """A member has answered. One with another ring is asked again when its view is another: asked at once it would say the same."""
        clearance = self.barrier.clearances.get(peer)
        if clearance is not None and not clearance.current:
            self.asks[peer] = Attempt(self.now + self.config.retry_interval, 0)
        else:
            self.asks.pop(peer, None)

    def mark_cleared(self) -> None:
        """A member has answered: marks what may be hatched now. One answer of several need not clear anything, so arcs are asked first."""
        if self.barrier.unanimous:
            self.mark(self.waiting)
            return
        self.mark(self.waiting & self.membership.placement.table().keys())
        arcs = self.barrier.cleared_arcs()
        if arcs:
            cleared = inside(arcs)
            self.mark([name for name in self.waiting if cleared(name_hash(name))])

    def hurry(self) -> None:
        """What is changed now is not to be kept back for long, however much there is."""
        self._hurries = True

    def mark_crowded(self) -> None:
        """There may be room again."""
        self.mark(self._crowded)

    def effect(self, effect: do.Effect) -> None:
        self._out.append(effect)

    def notice(self, notice: notices.Notice) -> None:
        self.effect(do.Emit(notice))

    def answer(self, request: str, outcome: ev.Outcome) -> None:
        self.effect(do.Reply(request, outcome))

    def send(self, to: Life, body: msg.Body, attempts: int = 0) -> None:
        """Sends to a nest; after some vain attempts every other one goes through a third (H2)."""
        envelope = msg.Envelope(self.me, self.membership.number, to in self.membership.view, body)
        thirds = sorted(life for life in self.membership.view if life not in (to, self.me))
        if attempts >= RELAY_AFTER and attempts % 2 and thirds:
            third = thirds[(attempts // 2) % len(thirds)]
            envelope = msg.Envelope(self.me, envelope.number, envelope.accepts, body, relayed_by=third)
            relay = msg.Relay(to, envelope)
            self.effect(do.Send(third, msg.Envelope(self.me, envelope.number, True, relay)))
        else:
            self.effect(do.Send(to, envelope))

    def reply(self, envelope: msg.Envelope, body: msg.Body) -> None:
        """Answers on the way the message came."""
        answer = msg.Envelope(self.me, self.membership.number, envelope.sender in self.membership.view, body)
        if envelope.relayed_by is not None:
            relay = msg.Envelope(self.me, answer.number, True, msg.Relay(envelope.sender, answer))
            self.effect(do.Send(envelope.relayed_by, relay))
        else:
            self.effect(do.Send(envelope.sender, answer))
