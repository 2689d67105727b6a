"""The view: which nests this nest counts as alive and in sync, and when that changes. Pure: verdicts come in as events.

    hears it            answers digests           settled
  (MemberAlive) -> ALIVE ------------> synced ------------> in the view
        ^            |  MemberDead
        |            v
        |          DYING --(node gone, or its next life did not come in nest_grace)--> DEAD --settled--> out of the view
        |            ALIVE --(its connection broke, and its node refuses others)---------^
        +------------+ (recovers)           a newer life of the node is heard --> SUPERSEDED, until that one is synced or dead

Rules kept here:
- M2: an old life stays in the view, unanswering, until its node's newer life is in sync or dead.
- M3: a nest is admitted after it answered a digest request sent after its latest join or recovery and after the latest view without
  it (`Peer.exchange` numbers these). A booting nest is ready when every nest that is listed alive, or that one of these has in its
  view (it may be restarting just now), is in its adopted view.
- M4: the highest view number heard of each nest.
- M5: a dead nest is not a dead node: the node is probed, and a node that is up gets `nest_grace`.
- H5: a burst of changes is settled before a view is adopted.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flock_ray.config import Config
from flock_ray.core.messages import Outlook
from flock_ray.core.replica import Replica
from flock_ray.core.ring import Placement
from flock_ray.specs import Life

REMEMBERED = 4  # horizons after which a dead nest is as one that never was
SETTLE_AT_MOST = 8  # times `settle`: ever new changes do not put off a view for ever


class Condition(enum.Enum):
    """What the failure detector and M2 make of a nest life."""

    UNHEARD = "unheard"  # a message came before the detector's word
    ALIVE = "alive"
    DYING = "dying"
    SUPERSEDED = "superseded"
    DEAD = "dead"


_GONE = (Condition.DEAD, Condition.UNHEARD, Condition.SUPERSEDED)


@dataclass(slots=True)
class Peer:
    """Another nest life, as this nest knows it."""

    life: Life
    condition: Condition = Condition.UNHEARD
    exchange: int = 0  # digest exchanges begun under a lower number do not admit
    synced: bool = False
    view: frozenset[Life] = frozenset()  # its view, as it last said
    heard: int = 0  # the highest view number in any of its messages
    absent_since: float | None = None  # out of contact, as far as anybody said; kept while estranged
    dies_at: float | None = None  # when a dying nest whose node is up is given up
    estranged: bool = False  # heard again after so long that dots may have been forgotten meanwhile: one of the two starts afresh (S2)

    def absent_for(self, now: float) -> float:
        """Seconds out of contact; 0 while in contact."""
        return 0.0 if self.absent_since is None else now - self.absent_since


class Membership:
    """The peers, the view and the placement that follows from it.

    Args:
        me: this nest's life.
        jitter: gives numbers from 0 to 1 that differ between nests.
        place: makes the placement of a view.
    """

    def __init__(
        self,
        me: Life,
        config: Config,
        replica: Replica,
        jitter: Callable[[], float],
        place: Callable[[Replica, frozenset[Life]], Placement] = Placement,
    ) -> None:
        self._place = place
        self.me = me
        self.peers: dict[Life, Peer] = {}
        self.view: frozenset[Life] = frozenset([me])
        self.number = 1
        self.ready = False
        self.placement = self._place(replica, self.view)
        self.listed: frozenset[str] | None = None  # Ray's node table
        self.whole: set[str] = {me.node}  # nodes of the last whole view (P3)
        self._config = config
        self._replica = replica
        self._jitter = jitter
        self._alone_at: float | None = None
        self._wanted = self.view
        self._first_change = 0.0
        self._adopt_at = 0.0

    # What is heard

    def booted(self, now: float) -> None:
        """This nest's own node record is known, and it may look around."""
        self._alone_at = now + self._config.bootstrap_wait
        self.placement = self._place(self._replica, self.view)

    def restored(self, view: frozenset[Life]) -> list[Life]:
        """This nest's life before had this view. Returns the nests whose nodes are to be probed.

        Those that died with it are coming back, and hold what they held: it is no boot alone (M5).
        """
        others = sorted(life for life in view if life.node != self.me.node)
        for life in others:
            self.peer(life).condition = Condition.DYING
        self.whole |= {life.node for life in view}
        return others

    def peer(self, life: Life) -> Peer:
        return self.peers.setdefault(life, Peer(life))

    def alive(self, life: Life, now: float) -> bool:
        """A nest joined or recovered. Returns whether it has to be synced with."""
        if life.node == self.me.node:
            return False  # an earlier life of this node: it cannot be, and only one nest runs here
        if any(p.life > life and p.life.node == life.node and p.condition is not Condition.UNHEARD for p in self.peers.values()):
            return False  # late word of a life whose successor has been heard
        peer = self.peer(life)
        if peer.condition is Condition.ALIVE:
            return False
        if peer.condition is not Condition.DYING:
            peer.exchange += 1
            peer.synced = False
        peer.estranged = self._long_gone(peer, now)
        peer.condition, peer.dies_at = Condition.ALIVE, None
        if not peer.estranged:
            peer.absent_since = None
        for older in self.peers.values():
            if older.life.node == life.node and older.life < life and older.condition in (Condition.ALIVE, Condition.DYING):
                older.condition, older.synced, older.dies_at = Condition.SUPERSEDED, False, None
        return True

    def dying(self, life: Life) -> bool:
        """The detector gave a nest up. Returns whether its node is to be probed."""
        peer = self.peers.get(life)
        if peer is None or peer.condition is not Condition.ALIVE:
            return False
        peer.condition = Condition.DYING
        return True

    def probed(self, life: Life, found: str, now: float) -> None:
        """What the probe of a nest's node found, which is dying or whose connection broke (M5).

        Who refuses connections has no raylet, and no birds: that needs no word of the detector, which takes two seconds (measured). What
        else is found of a nest that the detector hears says nothing.
        """
        peer = self.peers.get(life)
        if peer is None:
            return
        if peer.condition is Condition.DYING and found == "up":
            peer.dies_at = now + self._config.nest_grace
        elif peer.condition is Condition.DYING or (peer.condition is Condition.ALIVE and found == "refused"):
            self._dead(peer, now)

    def _dead(self, peer: Peer, now: float) -> None:
        for each in self.peers.values():
            if each.life.node == peer.life.node and each.life <= peer.life and each.condition is not Condition.DEAD:
                each.condition, each.synced, each.dies_at = Condition.DEAD, False, None
                each.absent_since = now if each.absent_since is None else each.absent_since

    def synced(self, life: Life, exchange: int) -> None:
        """A digest exchange with a nest is complete (M3)."""
        peer = self.peers.get(life)
        if peer is not None and peer.condition is Condition.ALIVE and peer.exchange == exchange:
            peer.synced = True

    def heard_outlook(self, sender: Life, outlook: Outlook, now: float) -> None:
        """Takes in what a nest says of all nests. Out of contact for too long with somebody of ours, it is estranged like those (S2)."""
        peer = self.peer(sender)
        peer.view = outlook.view
        for life, seconds in outlook.absent:
            if life in self.view:
                peer.estranged = peer.estranged or seconds > self._config.context_horizon / 2
            elif life != self.me and seconds < REMEMBERED * self._config.context_horizon:
                other = self.peer(life)
                if other.condition in _GONE:
                    other.absent_since = min(now - seconds, now if other.absent_since is None else other.absent_since)
        others = (self.peers[life] for life in outlook.view if life in self.peers and life != sender)
        if peer.estranged or any(self._long_gone(other, now) for other in others):
            self.estrange(sender, now)

    def estrange(self, life: Life, now: float) -> None:
        """Either of us may have forgotten dots: one of the two has to join as new (S2)."""
        peer = self.peer(life)
        peer.estranged = True
        if peer.absent_since is None:
            peer.absent_since = now - self._config.context_horizon / 2

    def _long_gone(self, peer: Peer, now: float) -> bool:
        """May dots that it knows have been forgotten here, or the other way round, since it was heard last?"""
        gone = peer.condition in _GONE and peer.life not in self.view
        return peer.estranged or (gone and peer.absent_for(now) > self._config.context_horizon / 2)

    def starts_afresh(self, life: Life) -> bool:
        """Has this nest been out of contact with a peer for too long, and is it on the smaller side? Then it joins as new (S2)."""
        peer = self.peer(life)
        return peer.estranged and (len(self.view), self.me) < (len(peer.view), life)

    def outlook(self, fading: Iterable[Life], now: float) -> Outlook:
        """What this nest says of all nests."""
        absent = [peer for peer in self.peers.values() if peer.absent_since is not None and peer.life not in self.view]
        gone = set(fading)
        return Outlook(
            self.view,
            tuple((peer.life, peer.absent_for(now)) for peer in absent),
            tuple(record for life, record in self._replica.nodes.items() if life not in gone),
            self._replica.had_cpus,
        )

    def table(self, nodes: frozenset[str]) -> None:
        """Ray's node table (M1): nodes it lists as gone no longer count in the last whole view."""
        self.listed = nodes
        self.whole &= nodes | {life.node for life in self.view}

    # What follows

    def living(self) -> list[Life]:
        """The nests that the detector lists alive: to whom news is sent."""
        return [peer.life for peer in self.peers.values() if peer.condition is Condition.ALIVE]

    def absent(self) -> list[Peer]:
        """The nests that are dead, replaced, or known only by their dots, node records or a stray message."""
        return [peer for peer in self.peers.values() if peer.condition in _GONE and peer.life not in self.view]

    def unsynced(self) -> list[Life]:
        return [peer.life for peer in self.peers.values() if peer.condition is Condition.ALIVE and not peer.synced]

    @property
    def paused(self) -> bool:
        """Is this the smaller side of a split that is told to pause? (P3)"""
        nodes = {life.node for life in self.view}
        return self._config.minority == "pause" and 2 * len(nodes & self.whole) < len(self.whole)

    def target(self) -> frozenset[Life]:
        """The view that should be."""
        target = {self.me}
        for peer in self.peers.values():
            if (peer.synced and peer.condition in (Condition.ALIVE, Condition.DYING)) or (
                peer.condition is Condition.SUPERSEDED and peer.life in self.view and not self._successor_synced(peer)
            ):
                target.add(peer.life)
        return frozenset(target)

    def _successor_synced(self, old: Peer) -> bool:
        newest = max((p for p in self.peers.values() if p.life.node == old.life.node), key=lambda p: p.life)
        return newest.synced

    def step(self, now: float) -> frozenset[Life] | None:
        """Lets time pass. Returns the view just left, if another was adopted."""
        for peer in list(self.peers.values()):
            if peer.dies_at is not None and now >= peer.dies_at:
                self._dead(peer, now)
        target = self.target()
        if target != self._wanted:
            if self._wanted == self.view:
                self._first_change = now
            settle = self._config.settle if self.ready else 0.0
            latest = self._first_change + SETTLE_AT_MOST * settle
            self._wanted, self._adopt_at = target, min(now + settle * (1 + self._jitter() / 2), latest)
        adopted = None
        if self._wanted != self.view and now >= self._adopt_at:
            adopted = self._adopt()
        elif self.placement.outdated:
            adopted = self.view  # the same nests under another ring are another view (M3)
            self._renumber()
        self._become_ready(now)
        return adopted

    def _adopt(self) -> frozenset[Life]:
        old, self.view = self.view, self._wanted
        self._renumber()
        nodes = {life.node for life in self.view}
        self.whole |= nodes
        if self.listed is not None:
            self.whole &= self.listed | nodes
        for life, peer in self.peers.items():
            if life not in self.view:
                peer.exchange += 1
                if peer.condition is not Condition.ALIVE:
                    peer.synced = False
        return old

    def _renumber(self) -> None:
        self.number += 1
        self.placement = self._place(self._replica, self.view)

    def _become_ready(self, now: float) -> None:
        if self.ready or self._alone_at is None:
            return
        listed = self._listed_alive()
        if listed:
            seen = {life for peer in listed for life in peer.view}
            self.ready = all(peer.synced and peer.life in self.view for peer in listed) and all(map(self._accounted, seen))
        elif any(peer.condition is Condition.DEAD for peer in self.peers.values()):
            self.ready = True  # all it knew are dead
        else:
            self.ready = now >= self._alone_at or self.listed == frozenset([self.me.node])

    def _listed_alive(self) -> list[Peer]:
        """Those that a booting nest has to be in sync with: the alive, and the dying, which may come back."""
        return [peer for peer in self.peers.values() if peer.condition in (Condition.ALIVE, Condition.DYING)]

    def _accounted(self, life: Life) -> bool:
        """Is a nest of another's view in the adopted view here, replaced, or given up?"""
        peer = self.peers.get(life)
        gone = peer is not None and peer.condition is Condition.DEAD
        return gone or life.node == self.me.node or any(mine.node == life.node and mine >= life for mine in self.view)

    def wake_at(self) -> float:
        times = [peer.dies_at for peer in self.peers.values() if peer.dies_at is not None]
        if self._wanted != self.view:
            times.append(self._adopt_at)
        if not self.ready and self._alone_at is not None and not self._listed_alive():
            times.append(self._alone_at)  # who waits for others is woken by what they say: this time may be long past
        return min(times, default=float("inf"))
