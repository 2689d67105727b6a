"""Small scope: every interleaving of a few events around two nests and one name, with the real core.

What happens is chosen, not drawn. From every state along a run in which only happens what nobody has to cause, all that can happen next is
tried, breadth first, and states that are equal but for the time on the clock are looked at once. So what takes many messages is met too.

Messages of a link come in order; a cut link loses what is on it. A nest that dies has its hosts and its journal, and comes back when that
is chosen. Timers fire one after the other, at any time. The detector is late and never wrong.

Checked wherever a life begins: no other life of the name runs, unless one nest had declared the other dead, or never heard it (H1, H4).
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from math import isfinite
from typing import Any

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import journal, wire
from flock_ray.core import messages as msg
from flock_ray.core.membership import Condition
from flock_ray.core.registry import Registry
from flock_ray.core.ring import Ring
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, Stamp
from tests.support.sim import Id, Violation

CONFIG = Config(settle=0.1, nest_grace=2.0, bootstrap_wait=1.0, retry_interval=0.5, sync_interval=50.0, lookup_timeout=1.0)
PATIENCE = 0.7 * CONFIG.nest_grace
NAME: Name = Id("bird")
ATOMS = (Config, NodeRecord, Spec, Stamp, Life, Dot, Options, bytes, str, int, type(None))
BOTH = (0, 1)


def half() -> float:
    return 0.5


@dataclass
class Host:
    dot: Dot
    spec: Spec
    code: bytes
    born: int
    incarnation: int
    running: bool = False
    record: msg.Released | None = None


@dataclass
class Side:
    """A node: its nest, and what outlives that one."""

    life: int = 0
    nest: Registry | None = None
    down_since: float = 0.0
    hosts: dict[tuple[Dot, int], Host] = field(default_factory=dict)
    exits: dict[Dot, None] = field(default_factory=dict)
    journal: list[bytes] = field(default_factory=list)
    hears: Life | None = None  # the other's nest, as the detector last said
    knew: bool = False  # did the other belong to the last view in which a nest here acted?


class Scope:
    """One state. `choices` says what may happen next, `act` does it."""

    def __init__(self, budget: dict[str, int], up: tuple[int, ...] = BOTH) -> None:
        self.clock = 0.0
        self.sides = [Side(), Side()]
        self.links: dict[tuple[int, int], list[Any]] = {(i, j): [] for i in BOTH for j in BOTH}  # (i, i): what its own hosts say
        self.cut = False
        self.excused = False  # had one declared the other dead, or never heard it?
        self.left = dict(budget)
        self.requests = 0
        for at in up:
            self._boot(at)

    # What may happen

    def choices(self) -> Iterator[tuple[str, int]]:
        for (i, j), queue in self.links.items():
            if queue:
                yield "deliver", 2 * i + j
        yield "time", 0
        for at, side in enumerate(self.sides):
            if side.nest is None:
                yield "back", at
                continue
            other = self.sides[1 - at]
            heard = None if other.nest is None or self.cut else other.nest.me
            if heard != side.hears:
                yield "word", at
            for kind in ("start", "stop", "nest"):
                if self.left.get(kind) and (kind == "nest" or side.nest.membership.ready):
                    yield kind, at
            if self.left.get("crash") and any(host.running for host in side.hosts.values()):
                yield "crash", at
        if self.cut:
            yield "heal", 0
        elif self.left.get("cut"):
            yield "cut", 0

    def act(self, kind: str, at: int) -> None:
        if kind in self.left:
            self.left[kind] -= 1
        getattr(self, f"_{kind}")(at)

    def goes_on(self) -> None:
        """What happens next if nobody causes anything: words of the detector, messages, time."""
        choices = [choice for choice in self.choices() if choice[0] in ("word", "deliver")]
        self.act(*(choices[0] if choices else ("time", 0)))

    def packed(self) -> bytes:
        return zlib.compress(pickle.dumps(self), 1)  # most of it is trees of hashes, and those are empty

    # What happens

    def _deliver(self, link: int) -> None:
        i, j = divmod(link, 2)
        event = self.links[i, j].pop(0)
        if i != j:
            to, envelope = pickle.loads(event)
            nest = self.sides[j].nest
            event = ev.Received(envelope)
            if nest is None or nest.me != to:
                return
        self._handle(j, event)

    def _time(self, at: int) -> None:
        """To the next thing that is due."""
        due = [(side.nest.wake_at(), i) for i, side in enumerate(self.sides) if side.nest is not None]
        due += [(side.down_since + PATIENCE, i) for i, side in enumerate(self.sides) if side.nest is None and side.hosts]
        when, first = min(due, default=(self.clock + 1.0, -1))
        self.clock = max(self.clock, when)
        if first < 0:
            return
        side = self.sides[first]
        if side.nest is None:
            side.hosts.clear()  # their patience has an end
            side.exits.clear()
        else:
            self._handle(first, ev.Tick())

    def _back(self, at: int) -> None:
        self._boot(at)

    def _word(self, at: int) -> None:
        side, other = self.sides[at], self.sides[1 - at]
        now = None if other.nest is None or self.cut else other.nest.me
        was, side.hears = side.hears, now
        self._handle(at, ev.MemberAlive(now) if now is not None else ev.MemberDead(was))

    def _start(self, at: int) -> None:
        self.requests += 1
        spec = Spec("m", "C", "code", b"", Options(), None, Stamp(0, 0), f"s{self.requests}")
        self._handle(at, ev.Start(f"r{self.requests}", NAME, spec, b"body", self.requests))

    def _stop(self, at: int) -> None:
        self.requests += 1
        self._handle(at, ev.Stop(f"r{self.requests}", NAME))

    def _crash(self, at: int) -> None:
        hosts = self.sides[at].hosts
        host = next(host for host in hosts.values() if host.running)
        del hosts[host.dot, host.born]
        self.links[at, at].append(wire.LifeCrashed(host.dot, host.born, "boom"))

    def _nest(self, at: int) -> None:
        side = self.sides[at]
        side.nest, side.hears, side.down_since = None, None, self.clock
        self.links[at, at].clear()
        self.links[1 - at, at].clear()

    def _cut(self, at: int) -> None:
        self.cut = True
        self.links[0, 1].clear()
        self.links[1, 0].clear()

    def _heal(self, at: int) -> None:
        self.cut = False

    # A nest and its shell

    def _boot(self, at: int) -> None:
        side = self.sides[at]
        side.life += 1
        me = Life(Id(f"n{at}"), side.life)
        side.nest = Registry(me, CONFIG, half)
        adopted = tuple(
            ev.Adopted(NAME, h.dot, h.spec, h.code, h.incarnation, h.born, "h", 0, 0, h.running, h.record) for h in side.hosts.values()
        )
        exits = tuple((NAME, dot) for dot in side.exits)
        self._handle(at, ev.Booted(NodeRecord(me, 0.1, ()), adopted, exits, tuple(side.journal)))
        for _ in side.journal:
            self._handle(at, ev.Tick())  # a piece is read in each step

    def _handle(self, at: int, event: ev.Event) -> None:
        side = self.sides[at]
        nest = side.nest
        if nest is None:
            return
        held = set(nest.holds.lives)
        effects = nest.handle(event, self.clock)
        self._watch(at, nest)
        for effect in effects:
            self._perform(at, nest, effect, held)

    def _watch(self, at: int, nest: Registry) -> None:
        side, other = self.sides[at], self.sides[1 - at]
        peers = [peer for life, peer in nest.membership.peers.items() if life.node != nest.me.node]
        if any(peer.condition is Condition.DEAD and peer.life.number == other.life for peer in peers) and (
            other.nest is not None or self.cut
        ):
            self.excused = True
        if nest.membership.ready:
            heard = side.knew or any(peer.condition is not Condition.UNHEARD for peer in peers)
            self.excused = self.excused or (other.life > 0 and not heard)
            side.knew = len(nest.membership.view) > 1
        views = [each.nest.membership.view for each in self.sides if each.nest is not None]
        if len(views) == 2 and views[0] == views[1] and len(views[0]) == 2:
            self.excused = False

    def _perform(self, at: int, nest: Registry, effect: do.Effect, held: set[Dot]) -> None:
        side, said = self.sides[at], self.links[at, at]
        if isinstance(effect, do.Send):
            if not self.cut and effect.to.node != nest.me.node:
                self.links[at, 1 - at].append(pickle.dumps((effect.to, effect.envelope)))
        elif isinstance(effect, do.Write):
            side.journal.append(journal.pack(effect.entries))
        elif isinstance(effect, do.Hatch):
            self._check(at, effect, held)
            side.hosts[effect.dot, effect.born] = Host(effect.dot, effect.spec, effect.code, effect.born, effect.born, running=True)
            said.append(wire.LifeRunning(effect.dot, effect.born, "h"))
        elif isinstance(effect, do.EndLife):
            host = side.hosts.pop((effect.dot, effect.born), None)
            if host is not None:
                if effect.keep:
                    host.record, host.running = msg.Released(host.dot, host.incarnation, nest.me, b"state"), False
                    side.hosts[host.dot, host.born] = host
                said.append(wire.LifeEnded(host.dot, host.born, b"state" if effect.keep else None, effect.keep))
        elif isinstance(effect, do.Raise):
            side.hosts[effect.dot, effect.born].incarnation = effect.incarnation
        elif isinstance(effect, do.Forget):
            side.exits.pop(effect.dot, None)
            side.hosts = {key: host for key, host in side.hosts.items() if host.dot != effect.dot or host.record is None}
        elif isinstance(effect, do.ProbeNode):
            said.append(ev.NodeProbed(effect.life, "silent" if self.cut else "up"))

    def _check(self, at: int, effect: do.Hatch, held: set[Dot]) -> None:
        if any(host.running for host in self.sides[at].hosts.values()):
            raise Violation(f"n{at} hatches {effect.dot} beside another life")
        others = [host.dot for host in self.sides[1 - at].hosts.values() if host.running]
        if others and effect.dot not in held and not self.excused:
            raise Violation(f"n{at} hatches {effect.dot} while n{1 - at} runs {others}")


def fingerprint(scope: Scope) -> int:
    """Equal for states that differ in nothing but the time on the clock."""
    clock, seen = scope.clock, set()

    def of(value: Any) -> Any:
        if isinstance(value, ATOMS):
            return value
        if isinstance(value, float):
            return round(value - clock, 4) if isfinite(value) else value
        if isinstance(value, dict):
            return frozenset((of(key), of(each)) for key, each in value.items())
        if isinstance(value, (set, frozenset)):
            return frozenset(map(of, value))
        if isinstance(value, Ring):
            return tuple(value.weights.items())
        if isinstance(value, (list, tuple)) or not hasattr(value, "__class__"):
            return tuple(map(of, value))
        if callable(value) or id(value) in seen:
            return None
        seen.add(id(value))
        if is_dataclass(value):
            parts = {each.name: getattr(value, each.name) for each in fields(value)}
        else:
            parts = dict(getattr(value, "__dict__", {}))
            parts.update((slot, getattr(value, slot, None)) for slot in getattr(type(value), "__slots__", ()))
        made = (type(value).__name__, *(of(each) for _, each in sorted(parts.items())))
        seen.discard(id(value))
        return made

    return hash(of({name: value for name, value in vars(scope).items() if name != "clock"}))


@dataclass
class Explored:
    states: int
    depth: int
    actions: int


def unpacked(packed: bytes) -> Scope:
    return pickle.loads(zlib.decompress(packed))


def explore(root: Scope, steps: int, depth: int) -> Explored:
    """All that can happen within `depth` of every state of the next so many steps.

    Raises:
        Violation: with what leads to it.
    """
    level, seen, actions = [], set(), 0
    for step in range(steps):
        seen.add(fingerprint(root))
        level.append((root.packed(), (f"step {step}",)))
        root.goes_on()
    for _ in range(depth):
        following = []
        for packed, path in level:
            for kind, at in unpacked(packed).choices():
                scope, there = unpacked(packed), (*path, f"{kind} {at}")
                actions += 1
                try:
                    scope.act(kind, at)
                except Violation as violation:
                    raise Violation(f"{violation} after {', '.join(there)}") from None
                mark = fingerprint(scope)
                if mark not in seen:
                    seen.add(mark)
                    following.append((scope.packed(), there))
        level = following
    return Explored(len(seen), depth, actions)
