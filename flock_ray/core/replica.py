"""A nest's copy of the flock: specs, status records and node records as one joinable whole, and the code the specs need.

The set maps a name to dots, and a dot to a `Record`: the spec, which never changes, and the status, of which the later is kept.
So a removed dot takes its status along, and one digest covers both. Node records are facts of a nest life and only ever added.

Rules kept here: S4 (the winner is chosen when reading), S5 (code once, by digest, gone with its last spec), S6 (status order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from flock_ray.core.aworset import AWORSet, Change, Context, Delta, Pairs, Part
from flock_ray.core.records import Columns, Record, pack, shared, unpack
from flock_ray.specs import Dot, Life, Name, NodeRecord, Spec, Stamp, Status, name_hash

T = TypeVar("T")

#: A message of records is bounded, so that who takes it in goes on answering: 250 take some 3 ms.
RECORDS = 250
FEW = 50  # changes, which need not be sorted by name to see that they are not too many
BYTES = 1_000_000  # of start arguments in one message, unless those of one name alone are more

RecordChange = Change[Name, Record]
RecordDelta = Delta[Name, Record]
RecordPart = Part[Name, Record]


@dataclass(slots=True)
class Update:
    """What one replica tells another: a delta, the code it needs first, and node records. It is pickled as columns."""

    delta: RecordDelta = field(default_factory=Delta)
    code: dict[str, bytes] = field(default_factory=dict)
    nodes: tuple[NodeRecord, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        entries = self.delta.entries
        gone = self.delta.context.difference(dot for pairs in entries.values() for dot, _ in pairs)
        return _update, (pack(entries, sorted(gone)), self.code, self.nodes)


def _update(columns: Columns, code: dict[str, bytes], nodes: tuple[NodeRecord, ...]) -> Update:
    entries, gone = unpack(columns)
    context = {dot for pairs in entries.values() for dot, _ in pairs}
    context.update(gone)
    return Update(Delta(entries, context), code, nodes)


@dataclass(slots=True)
class Content:
    """All that one replica holds of some names at one instant, and the code of their specs. It is pickled as columns."""

    part: RecordPart
    code: dict[str, bytes]

    def __reduce__(self) -> tuple[Any, ...]:
        part = self.part
        return _content, (part.leaves, part.keys, pack(part.entries), part.context, self.code)


def _content(leaves: Sequence[int], keys: tuple[Name, ...], columns: Columns, context: Context, code: dict[str, bytes]) -> Content:
    return Content(Part(leaves, keys, unpack(columns)[0], context), code)


class Replica:
    """The joinable whole. Mutations return the changes they made."""

    def __init__(self) -> None:
        self.birds: AWORSet[Name, Record] = AWORSet(name_hash, Record.join, Record.fingerprint)
        self.nodes: dict[Life, NodeRecord] = {}
        self.code: dict[str, bytes] = {}
        self.had_cpus = False  # did any node ever offer CPUs? (P1)
        self.nodes_version = 0  # grows with what the ring is made of
        self.placed: dict[Dot, Name] = {}  # what is placed by resources (P2)
        self.version = 0  # grows when the placement of those may change
        self.latest_stamp = Stamp(0, 0)  # of any spec seen, for the hybrid logical clock
        self._users: Counter[str] = Counter()  # specs by code digest
        self._adders: Counter[Life] = Counter()  # entries by the life that added them
        self._environments: Counter[str] = Counter()  # specs by runtime_env
        self._unwritten: list[Update | Context] = []  # for the journal
        self._unwritten_changes: list[RecordChange] = []  # the latest of it

    # Reading

    def records(self, name: Name) -> Pairs[Record]:
        return self.birds.get(name)

    def record(self, name: Name, dot: Dot) -> Record | None:
        return self.birds.value(name, dot)

    def winner(self, name: Name) -> tuple[Dot, Record] | None:
        """The dot that counts among several of one name: earliest stamp, then dot (S4)."""
        pairs = self.birds.get(name)
        if len(pairs) <= 1:
            return pairs[0] if pairs else None
        return min(pairs, key=lambda pair: (pair[1].spec.stamp, pair[0]))

    def __iter__(self) -> Iterator[Name]:
        return iter(self.birds)

    def __len__(self) -> int:
        return len(self.birds)

    def knows(self, dot: Dot) -> bool:
        return dot in self.birds.context

    def missing_code(self) -> list[str]:
        """Digests that a spec needs and nobody has sent yet."""
        return [digest for digest in self._users if digest not in self.code]

    def environments(self) -> Iterable[str]:
        """The different `runtime_env` of all specs."""
        return tuple(self._environments)

    # Writing

    def add(self, name: Name, dot: Dot, spec: Spec, code: bytes | None) -> RecordChange:
        (change,) = self._seen([self.birds.add(name, dot, Record(shared(spec)))])
        if code is not None:
            self.take_code({spec.code: code})
        return change

    def exited(self, name: Name, dot: Dot) -> RecordChange | None:
        """A life of this dot ended normally while its nest was away: the dot is removed, known here or not (V2)."""
        if self.birds.value(name, dot) is not None:
            return self.remove(name, [dot])
        self.birds.context.add(dot)
        self._unwritten.append(Update(Delta({}, {dot})))
        return None

    def remove(self, name: Name, dots: Iterable[Dot]) -> RecordChange:
        (change,) = self._seen([self.birds.remove(name, dots)])
        return change

    def set_status(self, name: Name, dot: Dot, status: Status) -> RecordChange | None:
        record = self.birds.value(name, dot)
        if record is None:
            return None
        change = self.birds.update(name, dot, Record(record.spec, status))
        self._unwritten_changes.append(change)
        return change

    def join(self, update: Update) -> list[RecordChange]:
        self.learn(update.nodes)
        dots = update.delta.context.difference(dot for pairs in update.delta.entries.values() for dot, _ in pairs)
        changes = self._seen(self.birds.join(update.delta))
        if dots:  # also of what was never here: it may come yet, late
            self._unwritten.append(Update(Delta({}, dots)))
        self.take_code(update.code)
        return changes

    def join_part(self, part: RecordPart) -> list[RecordChange]:
        return self._seen(self.birds.join_part(part))

    def join_content(self, content: Content) -> list[RecordChange]:
        changes = self.join_part(content.part)
        self.take_code(content.code)
        return changes

    def merge_context(self, context: Context) -> None:
        """Takes over a whole context, of a replica with the same entries."""
        self.birds.merge_context(context)
        self._unwritten += self._fold()
        self._unwritten.append(context)

    def take_code(self, code: dict[str, bytes]) -> None:
        """Keeps the code that some spec needs."""
        needed = {digest: body for digest, body in code.items() if self._users[digest] and digest not in self.code}
        if needed:
            self.code.update(needed)
            self._unwritten += self._fold()
            self._unwritten.append(Update(code=needed))

    def learn(self, nodes: Iterable[NodeRecord], had_cpus: bool = False) -> None:
        """Takes node records in, and whether any node ever had CPUs as a peer knows it: the record that said so may be gone (P1)."""
        for node in nodes:
            if node.life not in self.nodes:
                self.nodes[node.life] = node
                self.nodes_version += 1
                self._unwritten.append(Update(nodes=(node,)))
            had_cpus = had_cpus or node.cpus > 0
        if had_cpus and not self.had_cpus:
            self.had_cpus = True
            self.nodes_version += 1

    def keep_nodes(self, lives: Iterable[Life]) -> None:
        """Drops the node records of all others, but not whether any node ever had CPUs."""
        self.nodes = {life: self.nodes[life] for life in lives if life in self.nodes}
        self.nodes_version += 1

    def forget(self, life: Life) -> bool:
        """Drops a dead life's id and node record, unless an entry still uses it (S2)."""
        if self._adders[life]:
            return False
        self.birds.context.forget(life)
        self.nodes.pop(life, None)
        return True

    def update_of(self, changes: Iterable[RecordChange]) -> Update:
        """The news of these changes. New specs take their code along: who dropped it with its last spec needs it again (S5)."""
        changes = list(changes)
        new: set[str] = set()
        for _, before, after in changes:
            if len(before) == len(after) == 1 and before[0][0] == after[0][0]:
                continue
            known = [dot for dot, _ in before]
            new.update(record.spec.code for dot, record in after if record.status is None and dot not in known)
        return Update(self.birds.delta_of(changes), {digest: self.code[digest] for digest in new if digest in self.code})

    def updates_of(self, changes: Sequence[RecordChange]) -> list[Update]:
        """The same in messages of bounded size, each good without the others. Changes of one name stay together."""
        if len(changes) <= FEW and sum(_size_of(change.after)[1] for change in changes) <= BYTES:
            return [self.update_of(changes)]
        by_name: dict[Name, list[RecordChange]] = {}
        for change in changes:
            by_name.setdefault(change.key, []).append(change)
        groups = bounded(by_name.values(), lambda group: _size_of(group[-1].after))
        return [self.update_of(chain.from_iterable(some)) for some in groups]

    def updates_against(self, part: RecordPart) -> list[Update]:
        """What the sender of a part lacks of it, in messages of bounded size."""
        delta = self.birds.delta_against(part)
        gone = delta.context.difference(dot for pairs in delta.entries.values() for dot, _ in pairs)
        updates = []
        for entries in bounded(delta.entries.items(), lambda entry: _size_of(entry[1])):
            some = Delta(dict(entries), {dot for _, pairs in entries for dot, _ in pairs})
            if gone:
                some.context.update(dot for name, _ in entries for dot, _ in part.entries.get(name, ()) if dot in gone)
            updates.append(Update(some, self._code_of(some.entries)))
        return updates

    def _code_of(self, entries: Mapping[Name, Pairs[Record]]) -> dict[str, bytes]:
        """The code that these entries need."""
        digests = {record.spec.code for pairs in entries.values() for _, record in pairs}
        return {digest: self.code[digest] for digest in digests if digest in self.code}

    def size_of_leaf(self, leaf: int) -> tuple[int, int]:
        """How many names a leaf has, and how many bytes of start arguments."""
        names = self.birds.keys_of(leaf)
        return len(names), sum(_size_of(self.birds.get(name))[1] for name in names)

    def content(self, names: Iterable[Name] = (), leaves: Iterable[int] = ()) -> Content:
        """What is held of these names and leaves of the digest tree, now."""
        part = self.birds.part(names, leaves)
        return Content(part, self._code_of(part.entries))

    def update_for(self, name: Name, dot: Dot) -> Update:
        """One dot as it is now, with its code."""
        record = self.birds.value(name, dot)
        if record is None:
            return Update()
        code = self.code.get(record.spec.code)
        return Update(Delta({name: ((dot, record),)}, {dot}), {record.spec.code: code} if code is not None else {})

    def shareable_context(self, forgotten: Iterable[Life]) -> Context:
        """The context without the ids that everybody is about to forget (S2): shared, they would never go."""
        context = self.birds.context.copy()
        for life in forgotten:
            context.forget(life)
        return context

    # For the journal

    def unwritten(self) -> list[Update | Context]:
        """What has changed since this was last asked, in the order in which it did; each update is good without the others."""
        entries = [*self._unwritten, *self._fold()]
        self._unwritten = []
        return entries

    def _fold(self) -> list[Update | Context]:
        changes, self._unwritten_changes = self._unwritten_changes, []
        return [Update(self.birds.delta_of(changes))] if changes else []

    def update_within(self, leaves: Iterable[int]) -> Update:
        """What is held of these leaves of the digest tree, as exact dots."""
        entries = self.birds.part((), leaves).entries
        return Update(Delta(entries, {dot for pairs in entries.values() for dot, _ in pairs}), self._code_of(entries))

    # Bookkeeping of what changed

    def _seen(self, changes: list[RecordChange]) -> list[RecordChange]:
        self._unwritten_changes += changes
        unused: set[str] = set()
        for name, before, after in changes:
            if len(before) == len(after) == 1 and before[0][0] == after[0][0]:
                continue  # a status: nearly always
            if not before and len(after) == 1:  # a bird: what nearly all others are
                ((dot, record),) = after
                self._comes(name, dot, record.spec)
                continue
            had, has = dict(before), dict(after)
            come = [(dot, record.spec) for dot, record in after if dot not in had]
            gone = [(dot, record.spec) for dot, record in before if dot not in has]
            for dot, spec in come:
                self._comes(name, dot, spec)
            for dot, spec in gone:
                self._goes(dot, spec)
                if not self._users[spec.code]:
                    unused.add(spec.code)
            # Any dot of such a name counts: one without demands that comes or goes may make another the winner.
            if (come or gone) and self.placed and any(record.spec.options.placed for _, record in (*before, *after)):
                self.version += 1
        for digest in unused:
            if not self._users[digest]:  # asked after all changes: one may remove the last user and a later one add another
                del self._users[digest]
                self.code.pop(digest, None)
        return changes

    def _comes(self, name: Name, dot: Dot, spec: Spec) -> None:
        self._users[spec.code] += 1
        self._adders[dot.life] += 1
        self.latest_stamp = max(self.latest_stamp, spec.stamp)
        if spec.runtime_env is not None:
            self._environments[spec.runtime_env] += 1
        if spec.options.placed:
            self.placed[dot] = name
            self.version += 1

    def _goes(self, dot: Dot, spec: Spec) -> None:
        self._users[spec.code] -= 1
        self._adders[dot.life] -= 1
        if not self._adders[dot.life]:
            del self._adders[dot.life]
        if spec.runtime_env is not None:
            self._environments[spec.runtime_env] -= 1
            if not self._environments[spec.runtime_env]:
                del self._environments[spec.runtime_env]
        if self.placed.pop(dot, None) is not None:
            self.version += 1


def _size_of(pairs: Pairs[Record]) -> tuple[int, int]:
    """One name, and the bytes of its start arguments."""
    if len(pairs) == 1:
        return 1, len(pairs[0][1].spec.args)
    return 1, sum([len(record.spec.args) for _, record in pairs])


def bounded(items: Iterable[T], size: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
    """The items in lists that are not too much for one message, at least one in each.

    Args:
        size: how many names an item has, and how many bytes.
    """
    some: list[T] = []
    names = length = 0
    for item in items:
        more_names, more_bytes = size(item)
        names, length = names + more_names, length + more_bytes
        if some and (names > RECORDS or length > BYTES):
            yield some
            some, names, length = [], more_names, more_bytes
        some.append(item)
    if some:
        yield some
