"""Small scope: every interleaving of a few events around two nests and one name, with the real core.

What happens is chosen, not drawn: a message is delivered, the next timer fires, the detector speaks, a client asks, a fault strikes. From
every state of some runs in which only happens what nobody has to cause, all that can happen within so many of these steps is tried, breadth
first. What was found within the first few is followed until it comes to rest, and then all has to be as it should be.

What makes it go deep:

- A step changes one node, and a nest is a function of what it has seen. So a state of a node is kept once, under a number, and what a step
  makes of it is computed once, however many states of the whole have it. The whole is two such numbers, links, and what faults are left.
- States are equal that differ in the time on the clock only, in how long ago something was that is over, in how often something was
  sent again (it matters to a third nest only), or in the pieces in which the same journal was written.
- What can come to nothing only is not tried: a message to a life that is gone is dropped at once.

Coarse is: messages of a link come in order; a cut loses what is on the link, both ways; a probe is answered at once; the detector is late,
and never wrong; timers fire on time, and `LATE` times before what else might have happened. A host ends its birds `PATIENCE` after its
nest. Nests are compared when they meet, not now and then.

Checked wherever a life begins: no other life of the name runs, unless one nest had declared the other dead, or had never heard it (H1, H4);
wherever one ends: nothing is removed that was neither stopped nor has ended (I3 of the simulator).
"""

from __future__ import annotations

import copyreg
import enum
import io
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import process_time
from typing import Any, NamedTuple
from unittest.mock import patch

from flock_ray.config import Config
from flock_ray.core import arcs, aworset, journal, sync, wire
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import messages as msg
from flock_ray.core.aworset import AWORSet, Context, Prefix
from flock_ray.core.membership import Condition
from flock_ray.core.records import Record
from flock_ray.core.registry import Registry
from flock_ray.core.replica import Replica
from flock_ray.core.ring import Placement, Ring, ring_from
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, Stamp, Status, name_hash
from tests.support.sim import Id, Violation

#: From each state of the runs, so many faults may strike, and time may so often pass although something else might have happened.
FAULTS_IN_ALL, LATE = 2, 1
NEVER = 1e12  # seconds; nothing that is due then is waited for
CONFIG = Config(
    settle=0.1, nest_grace=2.0, bootstrap_wait=1.0, retry_interval=0.5, sync_interval=NEVER, lookup_timeout=1.0, call_timeout=None,
    backoff_initial=0.5, backoff_max=0.5,
)  # fmt: skip
OPTIONS = Options(healthy_after=NEVER, stop_timeout=NEVER)
PATIENCE = 0.7 * CONFIG.nest_grace
RESTLESS = 200  # steps; those after which all is as it should be are some fifty
PAST = 1.0  # seconds after which it does not matter any more when something was: twice what the core waits between two tries
BEGIN = 100.0  # on each clock
NAME: Name = Id("bird")
BOTH = (0, 1)
OWNER = int(ring_from((("n0", 16), ("n1", 16))).owner(NAME)[1:])  # when both are there
OTHER = 1 - OWNER
UNCAUSED = ("word", "deliver", "say", "time")
FAULTS = ("start", "stop", "crash", "nest", "cut")

Choice = tuple[str, int]


def half() -> float:
    return 0.5


@contextmanager
def shallow() -> Iterator[None]:
    """Of one level instead of three is the digest tree within it: to go down another is the same step again, and takes two messages."""
    bits = aworset.FANOUT_BITS
    with (
        patch.multiple(arcs, LEAF_BITS=bits, LEAF_SHIFT=64 - bits),
        patch.multiple(aworset, LEAF_BITS=bits, DEPTH=1),
        patch.object(sync, "DEPTH", 1),
    ):
        yield


# One node


@dataclass
class Host:
    dot: Dot
    spec: Spec
    code: bytes
    born: int
    incarnation: int
    running: bool = False  # has it said so?
    record: msg.Released | None = None


class Ends(NamedTuple):
    """A host has been told to end its bird, and is about to."""

    dot: Dot
    born: int
    keep: bool


@dataclass
class Side:
    """A node: its nest, and what outlives that one."""

    at: int
    clock: float = BEGIN
    life: int = 0
    nest: Registry | None = None
    died_at: float = BEGIN
    hosts: dict[tuple[Dot, int], Host] = field(default_factory=dict)
    said: list[Any] = field(default_factory=list)  # what its hosts say next
    written: list[bytes] = field(default_factory=list)
    hears: Life | None = None  # the other's nest, as the detector last said
    knew: bool = False  # did the other belong to the last view in which a nest here acted?
    acted: bool = False  # has this life of the nest been ready?
    dead: frozenset[Life] = frozenset()
    ended: frozenset[Dot] = frozenset()  # of which a life crashed here
    stops: int = 0
    asked: int = 0


class Seen(NamedTuple):
    """What is looked at from outside of a state of a node."""

    me: Life | None
    hears: Life | None
    due: float  # seconds from when something last happened to it
    ready: bool
    admits: Life | None  # the other's nest
    runs: tuple[Dot, ...]
    can_say: bool
    entries: tuple[tuple[Dot, Record], ...] = ()  # of the name
    holds: bool = False  # records that nobody has dropped


class Came(NamedTuple):
    """What a step made of a node."""

    state: int
    letters: tuple[int, ...]
    hatches: tuple[tuple[Dot, bool], ...]  # and whether in place of a life that had crashed
    dead: bool  # a nest of the other was declared so
    unheard: bool  # it acts now, and has never heard the other


class Performer:
    """Does one thing to a node, and what follows from it there."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.letters: list[tuple[Life, msg.Envelope]] = []
        self.hatches: list[tuple[Dot, bool]] = []
        self.dead = self.unheard = False

    def act(self, kind: str, what: Any) -> None:
        getattr(self, f"_{kind}")(what)

    def _deliver(self, envelope: msg.Envelope) -> None:
        self.handle(ev.Received(envelope))

    def _say(self, what: None) -> None:
        said = self.side.said.pop(0)
        if not isinstance(said, Ends):
            self.handle(said)
            return
        host = self.side.hosts.pop((said.dot, said.born), None)
        if host is None:
            return  # it has crashed before
        state = b"state" if said.keep else None
        if said.keep:
            host.record = msg.Released(host.dot, host.incarnation, Life(_node(self.side.at), self.side.life), state)
            self.side.hosts[host.dot, host.born] = host
        self.handle(wire.LifeEnded(host.dot, host.born, state, said.keep))

    def _time(self, what: None) -> None:
        if self.side.nest is None:
            self.side.hosts.clear()  # their patience has an end
            self.side.said.clear()
        else:
            self.handle(ev.Tick())

    _late = _time  # although something might have happened before

    def _word(self, what: tuple[Life | None, ev.Found]) -> None:
        now, self.found = what
        was, self.side.hears = self.side.hears, now
        if now is not None:
            self.handle(ev.MemberAlive(now))
        elif was is not None:
            self.handle(ev.MemberDead(was))

    def _start(self, what: None) -> None:
        side = self.side
        side.asked += 1
        spec = Spec("m", "C", "code", b"", OPTIONS, None, Stamp(0, 0), f"s{side.at}.{side.asked}")
        self.handle(ev.Start(f"r{side.at}.{side.asked}", NAME, spec, b"body", side.asked))

    def _stop(self, what: None) -> None:
        self.side.asked += 1
        self.side.stops += 1
        self.handle(ev.Stop(f"r{self.side.at}.{self.side.asked}", NAME))

    def _crash(self, what: None) -> None:
        hosts = self.side.hosts
        host = next(host for host in hosts.values() if host.record is None)
        del hosts[host.dot, host.born]
        self.side.ended |= {host.dot}
        self.side.said.append(wire.LifeCrashed(host.dot, host.born, "boom"))

    def _nest(self, what: None) -> None:
        side = self.side
        side.nest, side.hears, side.died_at = None, None, side.clock
        side.said = [said for said in side.said if isinstance(said, Ends)]

    def _back(self, found: ev.Found) -> None:
        side, self.found = self.side, found
        side.life += 1
        side.acted, side.dead = False, frozenset()
        me = Life(_node(side.at), side.life)
        side.nest = Registry(me, CONFIG, half)
        adopted = tuple(
            ev.Adopted(NAME, h.dot, h.spec, h.code, h.incarnation, h.born, "h", 0, 0, h.running, h.record) for h in side.hosts.values()
        )
        self.handle(ev.Booted(NodeRecord(me, 0.1, ()), adopted, (), tuple(side.written)))
        while side.nest.booting:
            self.handle(ev.Tick())  # a piece is read in each step

    # A nest's shell

    def handle(self, event: ev.Event) -> None:
        side, nest = self.side, self.side.nest
        if nest is None:
            return
        held = set(nest.holds.lives)
        had = {dot for dot, _ in nest.replica.records(NAME)}
        effects = nest.handle(event, side.clock)
        self._watch(nest)
        self._check_removals(nest, event, had)
        for effect in effects:
            perform = getattr(self, f"_do_{type(effect).__name__}", None)
            if perform is not None:
                perform(effect, held)

    def _watch(self, nest: Registry) -> None:
        """Notes verdicts of death and what was never heard, as the simulator does."""
        side = self.side
        peers = [peer for life, peer in nest.membership.peers.items() if life.node != nest.me.node]
        dead = frozenset(peer.life for peer in peers if peer.condition is Condition.DEAD)
        self.dead = self.dead or bool(dead - side.dead)
        side.dead = dead
        if nest.membership.ready:
            if not side.acted:
                self.unheard = not side.knew and all(peer.condition is Condition.UNHEARD for peer in peers)
            side.acted, side.knew = True, len(nest.membership.view) > 1

    def _check_removals(self, nest: Registry, event: ev.Event, had: set[Dot]) -> None:
        if isinstance(event, ev.Received | ev.Booted):
            return
        for dot in had - {dot for dot, _ in nest.replica.records(NAME)}:
            if not self.side.stops and dot not in self.side.ended:
                raise Violation(f"{nest.me} removes {dot}, which nobody stopped")

    def _do_Send(self, effect: do.Send, held: set[Dot]) -> None:
        self.letters.append((effect.to, effect.envelope))

    def _do_Write(self, effect: do.Write, held: set[Dot]) -> None:
        self.side.written.append(journal.pack(effect.entries))

    def _do_Hatch(self, effect: do.Hatch, held: set[Dot]) -> None:
        side = self.side
        for host in side.hosts.values():
            if host.record is None:
                raise Violation(f"n{side.at} hatches {effect.dot} beside {host.dot}")
        self.hatches.append((effect.dot, effect.dot in held))
        side.hosts[effect.dot, effect.born] = Host(effect.dot, effect.spec, effect.code, effect.born, effect.born)
        side.said.append(wire.LifeRunning(effect.dot, effect.born, "h"))

    def _do_EndLife(self, effect: do.EndLife, held: set[Dot]) -> None:
        self.side.said.append(Ends(effect.dot, effect.born, effect.keep))

    def _do_Raise(self, effect: do.Raise, held: set[Dot]) -> None:
        host = self.side.hosts.get((effect.dot, effect.born))
        if host is not None:
            host.incarnation = effect.incarnation

    def _do_Forget(self, effect: do.Forget, held: set[Dot]) -> None:
        self.side.hosts = {key: host for key, host in self.side.hosts.items() if host.dot != effect.dot or host.record is None}

    def _do_ProbeNode(self, effect: do.ProbeNode, held: set[Dot]) -> None:
        self.handle(ev.NodeProbed(effect.life, self.found))


def _node(at: int) -> str:
    return Id(f"n{at}")


def _compacted(written: list[bytes]) -> list[bytes]:
    """The same journal as the core itself copies one: however it was written, what says the same is the same."""
    reader = journal.Reader(replica := Replica())
    for piece in written:
        reader.read(piece)
    reader.end()
    return list(journal.copy(replica, lambda: reader.view))


# What a state is, but for what does not matter

ATOMS = (str, Id, int, bool, bytes, type(None), Life, Dot, Stamp, Spec, Options, Status, NodeRecord, Config, Record, Prefix)
LINKS = {"_nest", "_config", "config", "_membership", "_replica", "replica_", "jitter", "_jitter", "_owns", "clock"}
OVER = {"count", "attempts", "writes", "_asked", "steps"}  # how often: matters to a third nest only, or is told to nobody


class Form:
    """Makes something to compare of a value.

    Args:
        clock: what is now; `None` in a letter, where all times are durations.
    """

    def __init__(self, clock: float | None) -> None:
        self._clock = clock
        self._path: set[int] = set()

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is float:
            return self._time(value)
        if issubclass(kind, dict):
            return frozenset([(key, self.of(each)) for key, each in value.items()])
        if kind is set or kind is frozenset:
            return frozenset(map(self.of, value))
        if kind in (list, deque) or isinstance(value, tuple):
            return tuple(map(self.of, value))
        if kind is AWORSet:
            return (self.of(dict(value.items())), self.of(value.context))
        if kind is Context:
            return (frozenset(value.vector.items()), frozenset((life, tuple(runs)) for life, runs in value.cloud.items()))
        if kind is Replica:
            return tuple(map(self.of, (value.birds, value.nodes, value.code, value.had_cpus, value.latest_stamp)))
        if kind is Ring:
            return tuple(value.weights.items())
        if kind is Placement:
            return (value.lives, tuple(value.ring.weights.items()))
        if isinstance(value, enum.Enum):
            return value.name
        if callable(value) or id(value) in self._path:
            return None
        self._path.add(id(value))
        made = (kind.__name__, *[self.of(getattr(value, name)) for name in _parts_of(kind, value)])
        self._path.discard(id(value))
        return made

    def _time(self, value: float) -> float:
        if self._clock is None:
            return value
        since = value - self._clock
        return NEVER if since > NEVER / 2 else round(max(since, -PAST), 4)


_ATOMS = frozenset(ATOMS)
_PARTS: dict[type, tuple[str, ...]] = {}


def _parts_of(kind: type, value: Any) -> tuple[str, ...]:
    parts = _PARTS.get(kind)
    if parts is None:
        names = set(getattr(value, "__dict__", ())) | {slot for each in kind.__mro__ for slot in getattr(each, "__slots__", ())}
        parts = _PARTS[kind] = tuple(sorted(names - LINKS - OVER))
    return parts


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = _REDUCED
    pickler.dump(value)
    return file.getvalue()


def _birds(entries: dict[Name, Any], context: Context) -> AWORSet[Name, Record]:
    """The set without its trees of hashes, which are a quarter of a megabyte and nearly empty: they are made anew when they are asked."""
    birds: AWORSet[Name, Record] = AWORSet(name_hash, Record.join, Record.fingerprint)
    birds.context = context
    for name, pairs in entries.items():
        birds._put(name, pairs)
    return birds


def _config() -> Config:
    return CONFIG


_REDUCED = copyreg.dispatch_table.copy()
_REDUCED[AWORSet] = lambda birds: (_birds, (dict(birds.items()), birds.context))
_REDUCED[Ring] = lambda ring: (ring_from, (tuple(ring.weights.items()),))
_REDUCED[Config] = lambda config: (_config, ())


class Whole(NamedTuple):
    """A state of both nodes and of what is between them. `ages`: seconds since something last happened to each."""

    sides: tuple[int, int]
    ages: tuple[float, float]
    links: tuple[tuple[int, ...], tuple[int, ...]]  # to each node, letters that will be taken
    cut: bool
    excused: bool  # had one declared the other dead, or never heard it?
    left: tuple[tuple[str, int], ...]  # how often each fault may still strike


class Scope:
    """What may happen, and what comes of it: states by their numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._packed: list[bytes] = []
        self.seen: list[Seen] = []
        self._letters: dict[Any, int] = {}
        self._letter: list[tuple[Life, bytes]] = []
        self._came: dict[Any, Came] = {}

    def __len__(self) -> int:
        """How many states of single nodes there are."""
        return len(self._packed)

    @property
    def steps(self) -> int:
        """How many steps were computed, and not remembered."""
        return len(self._came)

    def begin(self, left: tuple[tuple[str, int], ...], up: tuple[int, ...]) -> Whole:
        """Two nodes, of which these have a nest."""
        sides = (self._number(Side(0)), self._number(Side(1)))
        whole = Whole(sides, (0.0, 0.0), ((), ()), False, False, left)
        for at in up:
            whole = self.act(whole, ("back", at))
        return whole

    def choices(self, whole: Whole) -> Iterator[Choice]:
        """What may happen next; what nobody has to cause comes first."""
        seen = [self.seen[number] for number in whole.sides]
        left, can_wait = dict(whole.left), False
        for at in BOTH:
            other = seen[1 - at].me
            happens = ("word",) if seen[at].me is not None and seen[at].hears != (None if whole.cut else other) else ()
            happens += ("deliver",) if whole.links[at] else ()
            happens += ("say",) if seen[at].can_say else ()
            for kind in happens:
                can_wait = True
                yield kind, at
        due = [each.due - age for each, age in zip(seen, whole.ages, strict=True)]
        for at in BOTH:
            if due[at] < NEVER / 2 and due[at] <= max(min(due), 0.0) and (not can_wait or left["late"]):
                yield ("late" if can_wait else "time"), at
        for at in BOTH:
            if seen[at].me is None:
                yield "back", at
                continue
            may = {"start": seen[at].ready, "stop": seen[at].ready, "crash": bool(seen[at].runs), "nest": True}
            for kind, possible in may.items():
                if left["faults"] and left[kind] and possible:
                    yield kind, at
        if whole.cut:
            yield "heal", 0
        elif left["faults"] and left["cut"]:
            yield "cut", 0

    def goes_on(self, whole: Whole) -> Whole | None:
        """The state after what happens next if nobody causes anything; `None` if nothing does."""
        choice = next(self.choices(whole), None)
        return None if choice is None or choice[0] not in UNCAUSED else self.act(whole, choice)

    def act(self, whole: Whole, choice: Choice) -> Whole:
        """The state after a choice.

        Raises:
            Violation: two lives of the name run.
        """
        kind, at = choice
        if kind in dict(whole.left):
            less = (kind, "faults" if kind in FAULTS else "")
            whole = whole._replace(left=tuple((each, left - (each in less)) for each, left in whole.left))
        if kind == "cut":
            return whole._replace(cut=True, links=((), ()))
        if kind == "heal":
            return whole._replace(cut=False)
        ages, links, what = list(whole.ages), list(whole.links), None
        me, other = (self.seen[whole.sides[each]] for each in (at, 1 - at))
        if kind in ("time", "late"):
            passes = max(me.due - ages[at], 0.0)
            ages = [age + passes for age in ages]
        elif kind == "deliver":
            what, *rest = links[at]
            links[at] = tuple(rest)
        elif kind == "word":
            what = (None if whole.cut else other.me, "silent" if whole.cut else "up")
        elif kind == "back":
            what = "silent" if whole.cut else "up"
        came = self._step(whole.sides[at], round(ages[at], 4), kind, what)
        ages[at] = 0.0
        sides = (came.state, whole.sides[1]) if at == 0 else (whole.sides[0], came.state)
        if kind == "nest":
            links[at] = ()
        if not whole.cut:
            links[1 - at] += tuple(letter for letter in came.letters if self._letter[letter][0] == other.me)
        for each in BOTH:
            if self.seen[sides[each]].due > NEVER / 2:
                ages[each] = min(ages[each], PAST)
        excused = self._excused(whole, at, came, other)
        for dot, in_place in came.hatches:
            if other.runs and not in_place and not excused:
                raise Violation(f"n{at} hatches {dot} while n{1 - at} runs {other.runs}")
        return Whole(sides, (round(ages[0], 4), round(ages[1], 4)), (links[0], links[1]), whole.cut, excused, whole.left)

    def _excused(self, whole: Whole, at: int, came: Came, other: Seen) -> bool:
        me = self.seen[came.state]
        if me.admits is not None and me.admits == other.me and other.admits == me.me:
            return False
        wrong = came.dead and (other.me is not None or whole.cut)
        never = came.unheard and (other.me is not None or bool(other.runs))
        return whole.excused or wrong or never

    def what_is_wrong(self, whole: Whole) -> str:
        """Now that nothing happens any more. Not after a cut: what that has lost is mended by comparisons that are not made here."""
        if not dict(whole.left)["cut"]:
            return ""
        sides = [self.seen[number] for number in whole.sides]
        if any(side.admits is None or side.admits != other.me for side, other in zip(sides, reversed(sides), strict=True)):
            return f"the nests do not see each other: {sides}"
        if sides[0].entries != sides[1].entries:
            return f"the replicas differ: {sides[0].entries} and {sides[1].entries}"
        entries = sides[0].entries
        winner = min(entries, key=lambda entry: (entry[1].spec.stamp, entry[0]))[0] if entries else None
        expected = [() if winner is None or at != OWNER else (winner,) for at in BOTH]
        if [side.runs for side in sides] != expected:
            return f"there run {[side.runs for side in sides]} where {expected} should"
        return "a record is left" if any(side.holds for side in sides) else ""

    def _step(self, number: int, age: float, kind: str, what: Any) -> Came:
        key = (number, age, kind, what)
        came = self._came.get(key)
        if came is None:
            side = pickle.loads(self._packed[number])
            side.clock += age
            performer = Performer(side)
            performer.act(kind, pickle.loads(self._letter[what][1]) if kind == "deliver" else what)
            letters = tuple(self._number_letter(to, envelope) for to, envelope in performer.letters)
            came = Came(self._number(side), letters, tuple(performer.hatches), performer.dead, performer.unheard)
            self._came[key] = came
        return came

    def _number(self, side: Side) -> int:
        if len(side.written) > 1:
            side.written = _compacted(side.written)
        form = Form(side.clock).of(side)
        number = self._numbers.get(form)
        if number is None:
            number = self._numbers[form] = len(self._packed)
            self._packed.append(_pickled(side))
            self.seen.append(_seen(side))
        return number

    def _number_letter(self, to: Life, envelope: msg.Envelope) -> int:
        body = envelope.body
        if isinstance(body, msg.SyncAsk | msg.SyncAnswer | msg.Estranged):
            # For how many seconds others were away matters when it is days.
            absent = tuple((life, 0.0) for life, _ in body.outlook.absent)
            envelope = replace(envelope, body=replace(body, outlook=replace(body.outlook, absent=absent)))
        form = (to, Form(None).of(envelope))
        number = self._letters.get(form)
        if number is None:
            number = self._letters[form] = len(self._letter)
            self._letter.append((to, pickle.dumps(envelope, protocol=5)))
        return number


def _seen(side: Side) -> Seen:
    nest = side.nest
    runs = tuple(host.dot for host in side.hosts.values() if host.record is None)
    can_say = bool(side.said) and (nest is not None or isinstance(side.said[0], Ends))
    if nest is None:
        due = side.died_at + PATIENCE - side.clock if side.hosts else NEVER
        return Seen(None, None, due, False, None, runs, can_say)
    others = [life for life in nest.membership.view if life != nest.me]
    admits = [life for life in others if nest.membership.peers[life].synced and nest.membership.peers[life].condition is Condition.ALIVE]
    due = nest.wake_at() - side.clock
    return Seen(
        nest.me, side.hears, due if due < NEVER / 2 else NEVER, nest.membership.ready, admits[-1] if admits else None, runs, can_say,
        tuple(nest.replica.records(NAME)), bool(nest.holds.records),
    )  # fmt: skip


@dataclass
class Explored:
    """What was looked at: states of the whole, states of single nodes, all that was tried, and how deep."""

    states: int
    nodes: int
    tried: int
    depth: int


def runs(scope: Scope, faults: int, late: int) -> dict[Whole, str]:
    """The states of runs in which only happens what nobody has to cause, each with its name.

    Args:
        faults: how many may strike in all from each of them, each kind once.
        late: how often time may pass although something else might have happened.
    """
    left = (*((kind, 1) for kind in FAULTS), ("faults", faults), ("late", late))
    states: dict[Whole, str] = {}

    def run(title: str, whole: Whole, *caused: Choice) -> Whole:
        """Goes on until nothing happens any more."""
        cuts = ("cut", 0) in caused or not dict(whole.left)["cut"]
        full = tuple((kind, 0 if kind == "cut" and cuts else times) for kind, times in left)
        step, state = 0, whole
        try:
            for choice in caused:
                state = scope.act(state, choice)
            following: Whole | None = state
            while following is not None and (state := following._replace(left=full)) not in states:
                states[state] = f"{title}, step {step}"
                following, step = scope.goes_on(state), step + 1
        except Violation as violation:
            raise Violation(f"{violation} in the run {title!r} after step {step}") from None
        return state

    # The bird runs at the one nest there is, and the nest that will own it comes.
    alone = scope.begin((*((kind, 9) for kind, _ in left),), up=(OTHER,))
    while not scope.seen[alone.sides[OTHER]].ready:
        alone = scope.act(alone, ("time", OTHER))
    alone = scope.act(scope.act(alone, ("start", OTHER)), ("say", OTHER))
    together = run("a nest joins", alone, ("back", OWNER))
    for at, who in ((OWNER, "the owner's"), (OTHER, "the other")):
        dead = run(f"{who} nest dies", together, ("nest", at))
        run(f"{who} nest comes back late", dead, ("back", at))
        run(f"{who} nest dies and comes back", together, ("nest", at), ("back", at))
    split = run("a split", together, ("cut", 0))
    run("a split heals", split, ("heal", 0))
    run("a stop", together, ("stop", OTHER))
    run("two starts during a split", scope.act(scope.act(together, ("stop", OTHER)), ("cut", 0)), ("start", OTHER))
    return states


def come_to_rest(scope: Scope, whole: Whole, known: set[Whole]) -> None:
    """Goes on until nothing happens any more, and then all has to be as it should be; or until it is known what follows.

    Raises:
        Violation: it is not.
    """
    for _ in range(RESTLESS):
        if whole in known:
            return
        known.add(whole)
        choices = list(scope.choices(whole))
        going_on = [choice for kind in (UNCAUSED, ("heal",), ("back",)) for choice in choices if choice[0] in kind]
        if not going_on:
            wrong = scope.what_is_wrong(whole)
            if wrong:
                raise Violation(f"it came to rest, and {wrong}")
            return
        whole = scope.act(whole, going_on[0])
    raise Violation(f"it does not come to rest within {RESTLESS} steps")


def explore(
    scope: Scope, roots: dict[Whole, str], depth: int, rest: int, seconds: float = NEVER, told: Callable[[Explored], object] = id
) -> Explored:
    """All that can happen within so many steps of every root, breadth first.

    Args:
        rest: what is found within so many steps is followed until it comes to rest.
        seconds: of the CPU; it goes no deeper than what is done within.

    Raises:
        Violation: with what leads to it.
    """
    begun = process_time()
    before: dict[Whole, tuple[Whole, Choice] | None] = dict.fromkeys(roots)
    level, known = list(before), set[Whole]()
    found = Explored(len(before), len(scope), 0, 0)
    told(found)
    while level and found.depth < depth:
        following: list[Whole] = []
        for whole in level:
            for choice in scope.choices(whole):
                found.tried += 1
                try:
                    after = scope.act(whole, choice)
                    if found.depth < rest:
                        come_to_rest(scope, after, known)
                except Violation as violation:
                    raise Violation(f"{violation} after {', '.join(_way(roots, before, whole, choice))}") from None
                if after not in before:
                    before[after] = (whole, choice)
                    following.append(after)
            if process_time() - begun > seconds:
                return found
        level = following
        found.states, found.nodes, found.depth = len(before), len(scope), found.depth + 1
        told(found)
    return found


def _way(roots: dict[Whole, str], before: dict[Whole, tuple[Whole, Choice] | None], whole: Whole, last: Choice) -> list[str]:
    way = [last]
    while (step := before[whole]) is not None:
        whole, choice = step
        way.append(choice)
    return [roots[whole], *(f"{kind} {at}" for kind, at in reversed(way))]
