"""The simulator: the real core on a virtual clock and network, with every fault we know of, from one seed.

A `World` has nodes; a node has a nest (a real `Registry`), and hosts, which live on when their nest dies. Messages are delayed, lost,
doubled and reordered; links are cut one way or both; nests crash and come back, nodes die and join, birds crash and exit; clocks
differ; the failure detector is late, wrong, one-sided or flapping. After every step the invariants are checked:

- I1, the first half of H4: two lives of one name only where a nest had been declared dead by the other, or had never been heard by it.
- I2: a released record is not lost before its successor has hatched with it, unless who kept it died.
- I3: a nest removes only what it was asked to stop, or what ended of itself at its node.
- dots are used once.

And after the faults have ended (`calm`): replicas and contexts are equal and compact, every name runs once at its owner, nothing else
runs, no record is left, nothing acknowledged was lost or brought back.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import journal, letters, wire
from flock_ray.core import messages as msg
from flock_ray.core.membership import Condition
from flock_ray.core.registry import Registry
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, Stamp

CONFIG = Config(settle=0.2, nest_grace=6.0, bootstrap_wait=2.0, retry_interval=0.4, sync_interval=1.5, lookup_timeout=1.0)
CPUS = [0.1, 0.2, 0.4]  # of a node: with whole ones a ring has ten times the points, and takes half of the time to build
CONFIRM = 4.0  # seconds after which the detector is asked whether it still hears one whose node refused
HOST_PATIENCE = 0.7 * CONFIG.nest_grace  # hosts end their birds earlier than their nest's peers give the nest up


class Id(str):
    """A string whose hash is the same in every process, so that sets are walked in the same order and a seed replays exactly."""

    __slots__ = ("_hash",)

    def __new__(cls, text: str) -> Id:
        made = super().__new__(cls, text)
        made._hash = zlib.crc32(text.encode())
        return made

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return _id, (str(self),)


@cache
def _id(text: str) -> Id:
    """Reads one from a letter, which has the same few over and over."""
    return Id(text)


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Host:
    """A process with one life of a bird, or with the record that it released."""

    name: Name
    dot: Dot
    spec: Spec
    code: bytes
    born: int
    incarnation: int
    value: int
    restarts: int
    crashes: int
    running: bool = False
    ending: bool = False
    keep: bool = False
    record: msg.Released | None = None

    @property
    def alive(self) -> bool:
        return self.record is None


@dataclass
class Node:
    index: int
    cpus: float
    resources: tuple[tuple[str, float], ...]
    rate: float
    offset: float
    wall: int
    alive: bool = False
    nest: Registry | None = None
    life: int = 0
    hosts: dict[tuple[Dot, int], Host] = field(default_factory=dict)
    exits: dict[Dot, tuple[Name, Life]] = field(default_factory=dict)  # and the latest nest when it left, which may have been dead
    journal: list[bytes] = field(default_factory=list)
    copying: Iterator[bytes] | None = None  # all there is is written anew,
    outdated: int = 0  # and then so many pieces are deleted, the oldest first
    lived_since: float = 0.0  # the node, whatever becomes of its nests
    held: set[Dot] = field(default_factory=set)
    knew: set[str] = field(default_factory=set)  # the nodes of the last view of a nest here that acted: its journal says so to the next
    ended: set[Dot] = field(default_factory=set)  # of which a life crashed or exited here
    down_since: float = 0.0
    was_ready: bool = False
    dead_verdicts: set[Life] = field(default_factory=set)
    probed_down: set[Life] = field(default_factory=set)
    wrongly_dying: set[Life] = field(default_factory=set)  # given up while their nests lived
    hears: dict[Life, str] = field(default_factory=dict)
    last_ok: dict[Life, float] = field(default_factory=dict)
    deaf_until: dict[Life, float] = field(default_factory=dict)
    refuses_until: float = 0.0  # its raylet's port, to whoever probes it
    letterbox: letters.Letterbox = field(default_factory=lambda: letters.Letterbox(Life("", 0), print))

    @property
    def id(self) -> str:
        return Id(f"n{self.index}")


@dataclass(frozen=True)
class Mix:
    """A mix of faults: how many nodes, names, and how often what happens (weights of the choice)."""

    nodes: int
    up: int
    names: int
    weights: dict[str, float]
    loss: float = 0.03
    double: float = 0.05
    seconds: float = 12.0
    demands: bool = False


MIXES: dict[str, Mix] = {
    "all": Mix(
        4, 3, 3, dict(refuse=0.5, reset=0.5, start=4, stop=2, crash=2, exit=1, nest=2, die=1, join=2, cut=1.5, heal=2, wrong=1.5, restart=1)
    ),
    "calls": Mix(3, 3, 3, dict(start=4, stop=3, crash=2, exit=2, restart=1)),
    "flap": Mix(2, 2, 2, dict(refuse=0.5, start=2, stop=1, wrong=6, crash=1)),
    "moves": Mix(4, 2, 4, dict(reset=0.5, start=3, stop=1, join=3, die=1, crash=1), loss=0.1, double=0.2),
    "split": Mix(4, 4, 3, dict(start=3, stop=2, cut=3, heal=2, crash=1, exit=0.5)),
    "nests": Mix(3, 3, 3, dict(refuse=0.5, reset=0.5, start=3, stop=2, nest=4, exit=1.5, crash=1, wrong=0.5)),
    "blackout": Mix(3, 3, 4, dict(start=4, stop=2, exit=1, crash=1, restart=0.5, nests=1, nest=0.5, cut=0.3, heal=0.5)),
    "churn": Mix(5, 2, 2, dict(reset=0.5, start=2, stop=2, die=2, join=4, nest=1)),
    "placed": Mix(4, 3, 4, dict(start=5, stop=3, join=1, die=0.5, wrong=1, nest=1), demands=True),
    "last": Mix(2, 2, 4, dict(start=5, stop=1, die=0.5), demands=True),
    "again": Mix(2, 2, 2, dict(start=5, stop=3), demands=True),
    "quiet": Mix(3, 3, 4, dict(start=4, stop=2), loss=0.0, double=0.0),
}

#: Of 2,000 schedules, how many are played of each mix.
SCHEDULES = {
    "all": 380, "calls": 100, "flap": 200, "moves": 260, "split": 240, "nests": 200, "blackout": 160, "churn": 140, "placed": 180,
    "last": 80, "again": 40, "quiet": 20,
}  # fmt: skip


class World:
    looks_every = 0.25  # seconds between looks of the failure detector; more where months pass

    def __init__(self, mix: Mix, seed: int, config: Config = CONFIG, registry: Callable[..., Registry] = Registry) -> None:
        self.rng = random.Random(seed)
        self.mix, self.config, self.registry = mix, config, registry
        self.time = 0.0
        self.steps = 0
        self.trace: list[str] = []
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.cuts: set[tuple[int, int]] = set()
        self.established: set[frozenset[int]] = set()  # pairs of nodes between which a death had been declared, or nothing heard
        self.values = 0
        self.must: dict[Dot, tuple[int, set[int]]] = {}
        self.dots: dict[Dot, Name] = {}
        self.accepted: dict[Dot, tuple[Name, Life, float]] = {}  # when
        self.removed: dict[Dot, dict[Life, float]] = {}  # by whom, and when
        self.requests: dict[str, tuple[str, Name, Node]] = {}
        self.outcomes: dict[str, ev.Outcome] = {}
        self.moved_states = 0
        self.fresh_starts = 0
        self.calming = False
        self.bodies = letters.Bodies()  # of what a nest sends at one time: news goes to all of them, and is pickled once
        rng = self.rng
        self.groups = rng.choice([0.0, 0.03])  # seconds for which letters gather until a busy nest reads them
        self.nodes = [
            Node(i, rng.choice(CPUS), (("GPU", float(rng.choice([0, 1, 2]))),), rng.uniform(0.97, 1.03), rng.uniform(0, 50),
                 rng.randrange(10**9, 10**10))
            for i in range(mix.nodes)
        ]  # fmt: skip
        self.names: list[Name] = [Id(f"bird:{i}") for i in range(mix.names)]
        for node in self.nodes[: mix.up]:
            self.boot(node)
        self.at(0.0, self._detect)

    # Time

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self.steps += 1
        heapq.heappush(self.queue, (self.time + delay, self.steps, action))

    def run(self, until: float) -> None:
        while self.queue and self.queue[0][0] <= until:
            self.time, _, action = heapq.heappop(self.queue)
            action()
        self.time = until

    def clock(self, node: Node) -> float:
        return node.offset + self.time * node.rate

    def log(self, text: str) -> None:
        self.trace.append(f"{self.time:8.3f} {text}")

    # A nest and its shell

    def boot(self, node: Node) -> None:
        if not node.alive:
            node.alive, node.journal, node.knew, node.lived_since = True, [], set(), self.time
        node.life += 1
        node.copying = None
        me = Life(node.id, node.life)
        node.nest = self.registry(me, self.config, random.Random(self.rng.random()).random)
        self._note_removals(node.nest)
        node.letterbox = letters.Letterbox(me, self._unreadable)
        node.was_ready, node.dead_verdicts, node.probed_down, node.wrongly_dying = False, set(), set(), set()
        node.hears, node.last_ok, node.deaf_until = {}, {}, {}
        adopted = [
            ev.Adopted(h.name, h.dot, h.spec, h.code, h.incarnation, h.born, f"h{h.born}", h.restarts, h.crashes, h.running, h.record)
            for h in node.hosts.values()
        ]
        exits = tuple((name, dot) for dot, (name, _) in node.exits.items())
        self.log(f"boot {me} adopts {[(str(a.dot), a.incarnation, a.record is not None) for a in adopted]}")
        record = NodeRecord(me, node.cpus, node.resources)
        self.handle(node, ev.Booted(record, tuple(adopted), exits, tuple(node.journal)))

    def _unreadable(self, error: Exception) -> None:
        raise Violation("letters cannot be read") from error

    def _note_removals(self, nest: Registry) -> None:
        """What a nest removes may not come back, and is not lost. It removes what it was asked to, or what ended of itself here."""
        remove, node = nest.remove, self.node(nest.me)

        def noted(name: Name, dots: Iterable[Dot]) -> None:
            gone = list(dots)
            asked = any(r not in self.outcomes and asked == ("stop", name, node) for r, asked in self.requests.items())
            if not asked and not node.ended.issuperset(gone):
                raise Violation(f"I3 {nest.me} removes {gone} of {name}, which nobody stopped; {sorted(node.ended)} have ended")
            for dot in gone:
                self._note_removal(dot, nest.me)
            remove(name, gone)

        nest.remove = noted  # type: ignore[method-assign]  # a wire tap

    def _note_removal(self, dot: Dot, life: Life) -> None:
        self.removed.setdefault(dot, {})[life] = self.time

    def handle(self, node: Node, *events: ev.Event) -> None:
        nest = node.nest
        if nest is None:
            return
        node.held = set(nest.holds.lives)
        self.bodies = letters.Bodies()
        effects = nest.handle_all(events, self.clock(node))
        self._watch(node, nest)  # first: a verdict and what follows from it may come of one event
        for effect in effects:
            getattr(self, f"_do_{type(effect).__name__}")(node, nest, effect)
        wake = nest.wake_at()
        if wake < float("inf"):
            delay = max((wake - self.clock(node)) / node.rate, 0.0) + 1e-3
            if not hasattr(nest, "woken") or nest.woken > self.time + delay or nest.woken <= self.time:  # type: ignore[attr-defined]  # the simulation's own note
                nest.woken = self.time + delay  # type: ignore[attr-defined]  # the simulation's own note
                self.at(delay, lambda: self._tick(node, nest))

    def _tick(self, node: Node, nest: Registry) -> None:
        if node.nest is nest and nest.woken <= self.time:  # type: ignore[attr-defined]  # the simulation's own note
            self.handle(node, ev.Tick())

    def _watch(self, node: Node, nest: Registry) -> None:
        """Notes verdicts of death and what was never heard: between these nodes two lives are allowed."""
        for peer in nest.membership.peers.values():
            other = self.node(peer.life)
            if peer.condition is Condition.DEAD:
                if peer.life not in node.dead_verdicts:
                    node.dead_verdicts.add(peer.life)
                    wrong = other.nest is not None or peer.life in node.probed_down | node.wrongly_dying
                    if other.alive and wrong:
                        self.established.add(frozenset((node.index, other.index)))
            elif peer.condition is Condition.DYING:
                # Wrong at first: the nest may die later, and its hosts' patience then outlasts the grace that began too early.
                if other.nest is not None and other.nest.me == peer.life:
                    node.wrongly_dying.add(peer.life)
            else:
                node.dead_verdicts.discard(peer.life)
                node.wrongly_dying.discard(peer.life)
        if nest.membership.ready and not node.was_ready:
            node.was_ready = True
            heard = {life.node for life, p in nest.membership.peers.items() if p.condition is not Condition.UNHEARD} | node.knew
            for other in self.nodes:
                if other is not node and other.alive and other.id not in heard:
                    self.established.add(frozenset((node.index, other.index)))
        if nest.membership.ready:
            node.knew = {life.node for life in nest.membership.view}
        for pair in list(self.established):
            a, b = (self.nodes[i] for i in pair)
            if not a.alive or not b.alive or (self._admits(a, b) and self._admits(b, a)):
                self.established.discard(pair)

    def _admits(self, node: Node, other: Node) -> bool:
        if node.nest is None or other.nest is None or other.nest.me not in node.nest.membership.view:
            return False
        peer = node.nest.membership.peers.get(other.nest.me)
        return peer is not None and peer.synced and peer.condition is Condition.ALIVE

    def node(self, life: Life) -> Node:
        return self.nodes[int(life.node[1:])]

    # Effects

    def _do_Write(self, node: Node, nest: Registry, effect: do.Write) -> None:
        node.journal.append(journal.pack(effect.entries))
        if node.copying is not None:
            piece = next(node.copying, None)
            if piece is not None:
                node.journal.append(piece)
            else:
                self._delete_some(node)
        elif self.rng.random() < 0.05:
            node.outdated = len(node.journal)
            node.copying = nest.copy()

    def _delete_some(self, node: Node) -> None:
        """All has been copied: what was there before goes, in steps, the oldest first."""
        deleted = self.rng.randint(0, node.outdated)
        del node.journal[:deleted]
        node.outdated -= deleted
        node.copying = node.copying if node.outdated else None

    def _do_Send(self, node: Node, nest: Registry, effect: do.Send) -> None:
        to = self.node(effect.to)
        if self.rng.random() < self._loss():
            return
        (packed,) = letters.pack([(effect.to, effect.envelope)], self.bodies)
        for _ in range(2 if not self.calming and self.rng.random() < self.mix.double else 1):
            delay = self.rng.expovariate(1 / 0.02) if self.rng.random() < 0.9 else self.rng.uniform(0, 2.0)
            self.at(0.001 + delay, lambda: self._deliver(node, to, effect, packed))

    def _loss(self) -> float:
        return 0.0 if self.calming else self.mix.loss

    def _deliver(self, source: Node, to: Node, effect: do.Send, packed: bytes) -> None:
        if (source.index, to.index) in self.cuts or to.nest is None or to.nest.me != effect.to:
            return
        was_empty = not to.letterbox
        to.letterbox.add(packed)
        if was_empty:
            self.at(self.rng.uniform(0, self.groups), lambda: self._read(to, to.letterbox))

    def _read(self, node: Node, letterbox: letters.Letterbox) -> None:
        """Takes in what has come, many letters at a time, unless the nest they were for is gone."""
        while letterbox and letterbox is node.letterbox:
            envelopes = letterbox.take()
            for envelope in envelopes:
                self._note_copy(node, envelope)
            self.handle(node, *map(ev.Received, envelopes))

    def _note_copy(self, node: Node, envelope: msg.Envelope) -> None:
        """A nest has fetched a record, of one that it knows to hold it: until a life of it runs it may be the only one."""
        body, nest = envelope.body, node.nest
        if (
            nest is None
            or not isinstance(body, msg.ReleaseAnswer)
            or (envelope.sender, body.dot) not in nest.barrier.reports.get(body.name, {})
        ):
            return
        if body.record is not None and body.dot in self.must:
            value, who = self.must[body.dot]
            if body.record.state == str(value).encode():
                who.add(node.index)

    def _do_Hatch(self, node: Node, nest: Registry, effect: do.Hatch) -> None:
        for other in self.nodes:
            for host in other.hosts.values():
                if host.name == effect.name and host.alive:
                    if other is node:
                        raise Violation(f"I1 {effect.name}: {nest.me} hatches {effect.dot} beside {host.dot} born {host.born}")
                    in_place = effect.dot in node.held  # a crash does not end a hold
                    if not in_place and frozenset((node.index, other.index)) not in self.established:
                        raise Violation(f"I1 {effect.name}: {nest.me} hatches {effect.dot} while {other.id} runs {host.dot}")
        value = int(effect.state) if effect.has_state and effect.state is not None else None
        self._check_state(node, effect, value)
        if value is None:
            self.values += 1
            value = self.values
        host = Host(effect.name, effect.dot, effect.spec, effect.code, effect.born, effect.born, value, effect.restarts, effect.crashes)
        node.hosts[effect.dot, effect.born] = host
        self.log(f"hatch {effect.name} {effect.dot} inc {effect.born} at {nest.me} state {effect.state!r}")
        if self.rng.random() < (0.0 if self.calming else 0.05):
            self.at(self.rng.uniform(0, 0.3), lambda: self.crash(node, host, "__init__ raised"))
        else:
            self.at(self.rng.uniform(0.01, 0.6), lambda: self._up(node, host))

    def _check_state(self, node: Node, effect: do.Hatch, value: int | None) -> None:
        if effect.dot not in self.must:
            return
        kept, who = self.must.pop(effect.dot)
        if value == kept:
            self.moved_states += 1
            self.must[effect.dot] = (kept, who)  # until it runs: a life that ends before hands it on
        elif any(self._should_know(node, self.nodes[j], effect.dot) for j in who):
            raise Violation(f"I2 {effect.name}: {effect.dot} at {node.id} without the state {kept} released (copies at {sorted(who)})")

    def _should_know(self, node: Node, other: Node, dot: Dot) -> bool:
        """Would one that hatches have to know of another's copy? Of what a nest has fetched that joined the others in a split it cannot."""
        if frozenset((node.index, other.index)) in self.established or node.nest is None:
            return False
        keeps = any(host.dot == dot and host.record is not None for host in other.hosts.values())
        return keeps or other.nest is None or other.nest.me in node.nest.membership.view

    def _up(self, node: Node, host: Host) -> None:
        if node.hosts.get((host.dot, host.born)) is host and not host.ending:
            host.running = True
            self.must.pop(host.dot, None)
            self.handle(node, wire.LifeRunning(host.dot, host.born, f"h{host.born}"))

    def _do_EndLife(self, node: Node, nest: Registry, effect: do.EndLife) -> None:
        host = node.hosts.get((effect.dot, effect.born))
        if host is None or host.ending:
            return
        host.ending, host.keep = True, effect.keep
        self.log(f"end {host.name} {host.dot} inc {host.born} at {node.id} for {effect.reason} keep {effect.keep}")
        self.at(self.rng.uniform(0.005, 0.8), lambda: self._ended(node, host))

    def _ended(self, node: Node, host: Host) -> None:
        if node.hosts.get((host.dot, host.born)) is not host:
            return
        del node.hosts[host.dot, host.born]
        handed = host.keep and host.running
        state = str(host.value).encode() if handed else None
        if handed:
            record = msg.Released(host.dot, host.incarnation, Life(node.id, node.life), state)
            node.hosts[host.dot, host.born] = host
            host.record = record
            elsewhere = [h for n in self.nodes for h in n.hosts.values() if h is not host and h.dot == host.dot]
            if not any(h.alive or (h.record is not None and h.record.order > record.order) for h in elsewhere):
                self.must[host.dot] = (host.value, {node.index})
        self.handle(node, wire.LifeEnded(host.dot, host.born, state, handed))

    def _do_Kill(self, node: Node, nest: Registry, effect: do.Kill) -> None:
        host = node.hosts.get((effect.dot, effect.born))
        if host is not None:
            self.at(0.01, lambda: self.crash(node, host, effect.error))

    def _do_Raise(self, node: Node, nest: Registry, effect: do.Raise) -> None:
        host = node.hosts.get((effect.dot, effect.born))
        if host is not None:
            host.incarnation = effect.incarnation

    def _do_Forget(self, node: Node, nest: Registry, effect: do.Forget) -> None:
        node.exits.pop(effect.dot, None)
        for key, host in list(node.hosts.items()):
            if host.dot == effect.dot and not host.alive:
                del node.hosts[key]
                winner = nest.replica.winner(host.name)
                if winner is None or winner[0] != host.dot:
                    self.must.pop(host.dot, None)

    def _do_StartAfresh(self, node: Node, nest: Registry, effect: do.StartAfresh) -> None:
        self.log(f"{nest.me} starts afresh")
        self.fresh_starts += 1
        node.nest, node.journal, node.knew, node.lived_since = None, [], set(), self.time
        self._end_hosts(node)
        self.at(1.0, lambda: self._back(node, nest.me.number))

    def _do_ProbeNode(self, node: Node, nest: Registry, effect: do.ProbeNode) -> None:
        other = self.node(effect.life)
        pair = (node.index, other.index)
        refuses = other.refuses_until > self.time
        up = other.alive and not refuses and pair not in self.cuts and pair[::-1] not in self.cuts
        if up:
            node.probed_down.discard(effect.life)
        else:
            node.probed_down.add(effect.life)
        life = nest.me
        delay = self.rng.uniform(0.001, 0.5)
        found: ev.Found = "up" if up else "silent" if other.alive and not refuses else "refused"

        def tell(event: ev.Event) -> None:
            if node.nest is not None and node.nest.me == life:
                self.handle(node, event)

        self.at(delay, lambda: tell(ev.NodeProbed(effect.life, found)))
        if found == "refused":
            self.at(CONFIRM, lambda: tell(ev.MemberAlive(effect.life)) if node.hears.get(effect.life) == "alive" else None)

    def _break_connections(self, gone: Node) -> None:
        """Who can hear it hears soon that the nest's process is gone, but not always."""
        for node in self.nodes:
            if node is not gone and self._reaches(gone.index, node.index) and self.rng.random() < 0.7:
                self.at(self.rng.uniform(0.001, 0.3), partial(self._tell_broken, node, gone))

    def _tell_broken(self, node: Node, gone: Node) -> None:
        if node.nest is not None:
            self.handle(node, ev.ConnectionBroken(gone.id))

    def _do_Reply(self, node: Node, nest: Registry, effect: do.Reply) -> None:
        if effect.request in self.outcomes:
            raise Violation(f"request {effect.request} was answered twice")
        self.outcomes[effect.request] = effect.outcome
        kind, name, _ = self.requests[effect.request]
        if isinstance(effect.outcome, ev.Accepted) and not effect.outcome.existed:
            dot = effect.outcome.dot
            if dot in self.dots:
                raise Violation(f"dot {dot} was used twice")
            self.dots[dot] = name
            self.accepted[dot] = (name, nest.me, self.time)
        self.log(f"{kind} {name} at {nest.me}: {effect.outcome}")

    def _do_Emit(self, node: Node, nest: Registry, effect: do.Emit) -> None:
        self.log(f"{nest.me} says {effect.notice}")

    def _do_Demand(self, node: Node, nest: Registry, effect: do.Demand) -> None:
        pass

    # The failure detector

    def _reaches(self, a: int, b: int) -> bool:
        if (a, b) not in self.cuts:
            return True
        return any(
            n.nest is not None and (a, n.index) not in self.cuts and (n.index, b) not in self.cuts
            for n in self.nodes if n.index not in (a, b)
        )  # fmt: skip

    def _detect(self) -> None:
        """SWIM as seen from outside: late, and every so often told to be wrong (`wrong`)."""
        for node in self.nodes:
            if node.nest is None:
                continue
            known = set(node.hears) | {n.nest.me for n in self.nodes if n.nest is not None and n is not node}
            for life in sorted(known):
                other = self.node(life)
                up = other.nest is not None and other.nest.me == life
                reach = up and self._reaches(node.index, other.index) and self._reaches(other.index, node.index)
                if node.deaf_until.get(life, 0) > self.time:
                    reach = False
                if reach:
                    node.last_ok[life] = self.time
                    if node.hears.get(life) != "alive" and self.rng.random() < 0.6:
                        node.hears[life] = "alive"
                        self.handle(node, ev.MemberAlive(life))
                elif node.hears.get(life) == "alive" and self.time - node.last_ok[life] > 1.0 and self.rng.random() < 0.3:
                    node.hears[life] = "dead"
                    self.handle(node, ev.MemberDead(life))
                if node.nest is None:
                    break
        self.at(self.looks_every, self._detect)

    # What happens to the world

    def crash(self, node: Node, host: Host, error: str) -> None:
        if node.hosts.get((host.dot, host.born)) is host and host.alive:
            del node.hosts[host.dot, host.born]
            node.ended.add(host.dot)
            self.log(f"crash {host.name} {host.dot} inc {host.born} at {node.id}")
            self.handle(node, wire.LifeCrashed(host.dot, host.born, error))

    def fault(self, kind: str) -> None:
        getattr(self, f"_fault_{kind}")()

    def _ask(self, kind: str, node: Node, name: Name, event: Callable[[str], ev.Event]) -> None:
        request = Id(f"r{len(self.requests)}")
        self.requests[request] = (kind, name, node)
        self.log(f"ask {kind} {name} at {node.id}")
        self.handle(node, event(request))

    def _some(self, nodes: list[Node]) -> Node | None:
        return self.rng.choice(nodes) if nodes else None

    def _ready(self) -> list[Node]:
        return [n for n in self.nodes if n.nest is not None and n.nest.membership.ready]

    def _fault_start(self) -> None:
        node = self._some(self._ready())
        if node is None:
            return
        name, rng = self.rng.choice(self.names), self.rng
        demand = self.mix.demands and rng.random() < 0.7
        options = Options(
            restart=rng.choice(["transient", "permanent", "temporary"]), moves=rng.random() < 0.8, max_restarts=50,
            num_gpus=rng.choice([0.5, 1.0]) if demand else 0.0, light=not demand and rng.random() < 0.3, ack=rng.choice(["local", "peer"]),
        )  # fmt: skip
        spec = Spec("m", "C", Id(f"code{rng.randrange(3)}"), b"%d" % rng.randrange(5), options, None, Stamp(0, 0), f"s{len(self.requests)}")
        wall = node.wall + int(self.time * 1e9)
        self._ask("start", node, name, lambda r: ev.Start(r, name, spec, b"body of " + spec.code.encode(), wall))

    def _fault_stop(self) -> None:
        node, name = self._some(self._ready()), self.rng.choice(self.names)
        if node is not None:
            self._ask("stop", node, name, lambda r: ev.Stop(r, name))

    def _fault_restart(self) -> None:
        node, name = self._some(self._ready()), self.rng.choice(self.names)
        if node is not None:
            self._ask("restart", node, name, lambda r: ev.Restart(r, name))

    def _hosts(self) -> list[tuple[Node, Host]]:
        return [(n, h) for n in self.nodes for h in n.hosts.values() if h.alive and h.running and not h.ending]

    def _fault_crash(self) -> None:
        hosts = [(n, h) for n, h in self._hosts() if n.nest is not None]
        if hosts:
            node, host = self.rng.choice(hosts)
            self.crash(node, host, "boom")

    def _fault_exit(self) -> None:
        hosts = self._hosts()
        if hosts:
            node, host = self.rng.choice(hosts)
            del node.hosts[host.dot, host.born]
            node.ended.add(host.dot)
            self.log(f"exit {host.name} {host.dot} inc {host.born} at {node.id}")
            if host.spec.options.restart != "permanent":
                node.exits[host.dot] = host.name, Life(node.id, node.life)
                self._note_removal(host.dot, Life(node.id, node.life))
            self.handle(node, wire.LifeExited(host.dot, host.born))

    def _fault_nest(self) -> None:
        """A nest dies; Ray brings it back, or not in time for its hosts."""
        node = self._some([n for n in self.nodes if n.nest is not None])
        if node is not None:
            self._end_nest(node, self.rng.uniform(0.5, 3.0) if self.rng.random() < 0.8 else self.rng.uniform(HOST_PATIENCE + 0.5, 15.0))

    def _end_nest(self, node: Node, back: float) -> None:
        self.log(f"nest of {node.id} dies")
        node.nest, node.down_since = None, self.time
        for dot, (_, who) in self.must.items():
            if not any(host.dot == dot and host.record is not None for host in node.hosts.values()):
                who.discard(node.index)  # fetched, and kept in its memory
        self._break_connections(node)
        life = node.life
        self.at(HOST_PATIENCE, lambda: self._impatient(node, life))
        self.at(back, lambda: self._back(node, life))

    def _impatient(self, node: Node, life: int) -> None:
        if node.alive and node.nest is None and node.life == life:
            self._end_hosts(node)

    def _end_hosts(self, node: Node) -> None:
        for dot, (_, life) in node.exits.items():
            self.removed[dot].pop(life, None)  # nobody has been told
        node.hosts, node.exits = {}, {}
        for _, who in self.must.values():
            who.discard(node.index)

    def _back(self, node: Node, life: int) -> None:
        if node.alive and node.nest is None and node.life == life:
            self.boot(node)

    def _fault_nests(self) -> None:
        """All nests die at once, and come back one after the other."""
        for node in [n for n in self.nodes if n.nest is not None]:
            self._end_nest(node, self.rng.uniform(0.5, 5.0))

    def _fault_die(self) -> None:
        nodes = [n for n in self.nodes if n.alive]
        if len(nodes) > 1:
            node = self.rng.choice(nodes)
            self.log(f"node {node.id} dies")
            node.alive, node.nest = False, None
            self._end_hosts(node)
            self._break_connections(node)

    def _fault_join(self) -> None:
        node = self._some([n for n in self.nodes if not n.alive])
        if node is not None:
            self.boot(node)

    def _fault_cut(self) -> None:
        indices = range(len(self.nodes))
        kind = self.rng.random()
        if kind < 0.4:
            side = {i for i in indices if self.rng.random() < 0.5}
            self.cuts |= {(i, j) for i in indices for j in indices if (i in side) != (j in side)}
        elif kind < 0.7:
            i, j = self.rng.sample(list(indices), 2)
            self.cuts |= {(i, j), (j, i)}
        else:
            i, j = self.rng.sample(list(indices), 2)
            self.cuts.add((i, j))
        self.log(f"cuts {sorted(self.cuts)}")

    def _fault_heal(self) -> None:
        self.cuts = set()
        self.log("heal")

    def _fault_wrong(self) -> None:
        """The detector of one nest is wrong about another, for a while or only a moment."""
        node = self._some([n for n in self.nodes if n.nest is not None and "alive" in n.hears.values()])
        if node is not None:
            life = self.rng.choice([life for life, word in node.hears.items() if word == "alive"])
            self.log(f"{node.id} is wrong about {life}")
            node.hears[life] = "dead"
            node.deaf_until[life] = self.time + self.rng.choice([0.0, 0.5, 3.0, 8.0])
            self.handle(node, ev.MemberDead(life))

    def _fault_reset(self) -> None:
        """A connection breaks, and nobody has died."""
        node = self._some([n for n in self.nodes if n.nest is not None])
        if node is not None:
            self._tell_broken(node, self.rng.choice([other for other in self.nodes if other is not node]))

    def _fault_refuse(self) -> None:
        """A firewall rejects what goes to a raylet, and to nothing else of its node, for a while; and a connection to its nest breaks."""
        nodes = [n for n in self.nodes if n.nest is not None]
        if len(nodes) > 1:
            node, other = self.rng.sample(nodes, 2)
            other.refuses_until = self.time + 2.0
            self._tell_broken(node, other)

    # A schedule

    def play(self) -> None:
        kinds, weights = list(self.mix.weights), list(self.mix.weights.values())
        self.run(self.rng.uniform(0.5, 4.0))
        end = self.time + self.mix.seconds
        pace = self.rng.choice([0.1, 0.3, 0.8])
        while self.time < end:
            self.fault(self.rng.choices(kinds, weights)[0])
            self.run(self.time + self.rng.expovariate(1 / pace))
        self.calm()

    def calm(self, limit: float = 90.0) -> None:
        """Ends the faults and waits until everything is as it should be."""
        self.calming = True
        self.log("CALM")
        self.cuts = set()
        for node in self.nodes:
            node.deaf_until = {}
        end, wrong = self.time + limit, "nothing was looked at"
        while self.time < end and wrong:
            self.run(self.time + 2.0)
            wrong = self.what_is_wrong()
        if wrong:
            raise Violation(f"L after {limit} s of calm: {wrong}")

    def what_is_wrong(self) -> str:
        alive = [n for n in self.nodes if n.alive]
        for node in alive:
            if node.nest is None or not node.nest.membership.ready:
                return f"{node.id} has no ready nest"
        nests = [n.nest for n in alive if n.nest is not None]
        if not nests:
            return ""
        first, view = nests[0], frozenset(nest.me for nest in nests)
        for nest in nests:
            if nest.membership.view != view:
                return f"the view of {nest.me} is {sorted(nest.membership.view)}"
            if dict(nest.replica.birds.items()) != dict(first.replica.birds.items()):
                mine, theirs = dict(nest.replica.birds.items()), dict(first.replica.birds.items())
                unequal = [n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)]
                return f"replicas of {nest.me} and {first.me} differ: {unequal}"
            if nest.replica.birds.context != first.replica.birds.context:
                return f"contexts of {nest.me} and {first.me} differ"
            if any(len(c) for c in nest.replica.birds.context.cloud.values() if not c) or nest.replica.code != first.replica.code:
                return f"code or cloud of {nest.me}: {nest.replica.birds.context.cloud}"
            if any(
                first.membership.placement.owner(name) is not None
                for name in self.names
                if nest.holds.of(name) and not nest.holds.lives_of(name)
            ):
                return f"{nest.me} keeps records {nest.holds.records}"
        for name in self.names:
            runs = [(n.id, h.dot, h.incarnation) for n in self.nodes for h in n.hosts.values() if h.name == name and h.alive]
            winner = first.replica.winner(name)
            if winner is None:
                if runs:
                    return f"{name} was stopped and runs {runs}"
                continue
            dot, record = winner
            owner = first.membership.placement.owner(name)
            status = record.status
            if owner is None or (status is not None and status.state == "failed"):
                if runs and record.spec.options.moves:
                    return f"{name} is {status} owned by {owner} and runs {runs}"
                continue
            accepted = self.accepted.get(dot)
            known = accepted is not None and self._lived_since(*accepted[1:])
            if not known and not any(record.spec.code in nest.replica.code for nest in nests):
                continue  # its node died before anybody else had its code, or before it was acknowledged: no more was promised
            if status is None or status.state != "running" or len(runs) != 1 or runs[0][1:] != (dot, status.incarnation):
                return f"{name}: {dot} runs {runs}, status {status}"
            if status.life.node != runs[0][0] or (record.spec.options.moves and runs[0][0] != owner.node):
                return f"{name} runs {runs}, its owner is {owner}, status {status}"
        return self._lost_or_back(first)

    def _lived_since(self, life: Life, when: float) -> bool:
        """Has the node of a nest lived on? Then what that nest knew is not lost, for its next lives read its journal (V2)."""
        node = self.node(life)
        return node.alive and node.lived_since <= when

    def _lost_or_back(self, first: Registry) -> str:
        for dot, (name, life, when) in self.accepted.items():
            if self.removed.get(dot) or not self._lived_since(life, when):
                continue
            if first.replica.record(name, dot) is None:
                return f"{name} {dot} was accepted by {life} and is lost"
        for dot, removals in self.removed.items():
            if dot in self.dots and first.replica.record(self.dots[dot], dot) is not None:
                knowing = [life for life, when in removals.items() if self._lived_since(life, when)]
                if knowing:
                    return f"{self.dots[dot]} {dot} was removed at {knowing} and is back"
        return ""


def schedule(mix: str, seed: int, registry: Callable[..., Registry] = Registry) -> World:
    """Plays one schedule; on a violation the seed and the end of the story are in the error."""
    world = World(MIXES[mix], seed, registry=registry)
    try:
        world.play()
    except Violation as violation:
        raise Violation(f"mix {mix!r} seed {seed}: {violation}") from None
    return world


def tell(mix: str, seed: int) -> list[str]:
    """The whole story of a seed, for people."""
    world = World(MIXES[mix], seed)
    try:
        world.play()
    except Exception as violation:  # a core that raises is wrong as well
        world.log(f"VIOLATION {type(violation).__name__}: {violation}")
    return world.trace
