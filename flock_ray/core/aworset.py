"""The set: a delta-state, add-wins, observed-remove map from keys to dotted values, without tombstones.

Every add has a unique dot. A replica keeps the live (dot, value) pairs of each key and a *context*: all dots it has ever seen.
A dot that is in the context but under no key was removed, and that is all the memory a removal leaves. A remove names the dots
it observed, so an add that it did not observe survives it: add wins.

Sources: Almeida, Shoker, Baquero, "Delta state replicated data types" (2018), the causal map with values that are lattices
themselves; Bieniusa et al., "An optimized conflict-free replicated set" (2012), for the context in place of tombstones; hash
trees over key hashes as in anti-entropy by Merkle trees (DeCandia et al., Dynamo, 2007).

Rules kept here (DESIGN S1 to S3):

- Join is commutative, associative and idempotent.
- A `Delta` carries exact dots, never a version vector: it says nothing of what it does not contain.
- A `Part` carries a whole context, applied only to the keys it covers.
- A whole context alone (`merge_context`) may be merged only while both sides hold the same entries.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Generic, NamedTuple, TypeVar

from flock_ray.core.arcs import LEAF_BITS, Arc, Leaves
from flock_ray.specs import Dot, Life, stable_hash

K = TypeVar("K")
V = TypeVar("V")

#: The live values of one key. A tuple and not a dict: nearly every key has one dot, and there may be a million keys.
Pairs = tuple[tuple[Dot, V], ...]

FANOUT_BITS = 5  # 32 children a node: a difference is found in DEPTH round trips of some hundred bytes each
DEPTH = LEAF_BITS // FANOUT_BITS

_NOTHING: Any = object()
STALE = 2_048  # changed keys at most whose hashes are not in the tree yet; to put them there takes some 4 ms

_POSITION_AND_DOT = struct.Struct("<QQQ")


@lru_cache(maxsize=1024)
def life_hash(life: Life) -> int:
    """A hash that is equal on every machine; kept, for all names share few lives."""
    return stable_hash(str(life).encode())


#: Ascending runs of counters, first and last, that neither overlap nor touch.
Runs = list[tuple[int, int]]


class Context:
    """The dots a replica has seen: a version vector, and a cloud for what came out of order.

    The cloud is kept as runs, not as single counters. A lost add that was removed again leaves a gap that no part of entries
    mends, only the next whole context, and that waits until both replicas are equal for a moment: in a busy flock, long.
    Meanwhile all that is added goes into the cloud, and the cloud into every part: 60 KB a part for 20,000 dots behind one gap,
    as single counters.
    """

    __slots__ = ("cloud", "vector")

    def __init__(self, vector: Mapping[Life, int] | None = None, cloud: Iterable[Dot] = ()) -> None:
        self.vector: dict[Life, int] = dict(vector or {})
        self.cloud: dict[Life, Runs] = {}
        for dot in cloud:
            self.add(dot)

    def __contains__(self, dot: Dot) -> bool:
        life, counter = dot
        if counter <= self.vector.get(life, 0):
            return True
        runs = self.cloud.get(life, [])
        at = bisect(runs, (counter + 1,)) - 1  # a shorter tuple comes first: this is the last run that starts here or before
        return at >= 0 and counter <= runs[at][1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and self.vector == other.vector and self.cloud == other.cloud

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def __repr__(self) -> str:
        return f"Context({self.vector!r}, cloud={self.cloud!r})"

    def add(self, dot: Dot) -> None:
        life, counter = dot
        seen = self.vector.get(life, 0)
        if counter == seen + 1:
            self.vector[life] = counter
            if life in self.cloud:
                self._compact(life)
        elif counter > seen:
            _add_counter(self.cloud.setdefault(life, []), counter)

    def update(self, dots: Iterable[Dot]) -> None:
        """Adds many dots: in order, for one that comes too early makes a run of its own."""
        counters: dict[Life, list[int]] = {}
        for life, counter in dots:
            counters.setdefault(life, []).append(counter)
        for life, those in counters.items():
            those.sort()
            seen = self.vector.get(life, 0)
            early = []
            for counter in those:
                if counter == seen + 1:
                    seen = counter
                elif counter > seen:
                    early.append(counter)
            if seen:
                self.vector[life] = seen
            for counter in early:
                _add_counter(self.cloud.setdefault(life, []), counter)
            if life in self.cloud:
                self._compact(life)

    def merge(self, other: Context) -> None:
        for life, counter in other.vector.items():
            if counter > self.vector.get(life, 0):
                self.vector[life] = counter
        for life, runs in other.cloud.items():
            self.cloud[life] = _union(self.cloud.get(life, []), runs)
        for life in list(self.cloud):
            self._compact(life)

    def forget(self, life: Life) -> None:
        """Drops a replica id that nothing uses any more (S2)."""
        self.vector.pop(life, None)
        self.cloud.pop(life, None)

    def lives(self) -> set[Life]:
        return set(self.vector) | set(self.cloud)

    def top(self, life: Life) -> int:
        """The highest counter seen of a replica id; 0 if none."""
        return self.cloud[life][-1][1] if life in self.cloud else self.vector.get(life, 0)

    def copy(self) -> Context:
        new = Context(self.vector)
        new.cloud = {life: list(runs) for life, runs in self.cloud.items()}
        return new

    def fingerprint(self) -> int:
        """A hash that is equal for equal contexts on every machine."""
        return stable_hash(repr((sorted(self.vector.items()), sorted(self.cloud.items()))).encode())

    def _compact(self, life: Life) -> None:
        """Moves what has become contiguous from the cloud into the vector."""
        runs, seen = self.cloud[life], self.vector.get(life, 0)
        joined = 0
        while joined < len(runs) and runs[joined][0] <= seen + 1:
            seen = max(seen, runs[joined][1])
            joined += 1
        if seen:
            self.vector[life] = seen
        if joined == len(runs):
            del self.cloud[life]
        elif joined:
            self.cloud[life] = runs[joined:]


def _add_counter(runs: Runs, counter: int) -> None:
    """Adds a counter in place; what it touches becomes one run."""
    at = bisect(runs, (counter,))  # the first run that starts here or later
    after = at < len(runs) and runs[at][0] <= counter + 1
    before = at > 0 and runs[at - 1][1] >= counter - 1
    first = runs[at - 1][0] if before else counter
    last = max(counter, runs[at][1] if after else 0, runs[at - 1][1] if before else 0)
    runs[at - before : at + after] = [(first, last)]


def _union(some: Runs, others: Runs) -> Runs:
    union: Runs = []
    for first, last in sorted(some + others):
        if union and first <= union[-1][1] + 1:
            union[-1] = (union[-1][0], max(union[-1][1], last))
        else:
            union.append((first, last))
    return union


@dataclass(slots=True)
class Delta(Generic[K, V]):
    """Some adds, removes and new values, to be joined anywhere in any order.

    `entries[key]` are the pairs added or changed; `context` the exact dots this delta speaks of. A dot in the context and not
    in the entries of its key was removed: so a removal names its key with the pairs that are left of what it speaks of (none).
    """

    entries: dict[K, Pairs[V]] = field(default_factory=dict)
    context: set[Dot] = field(default_factory=set)


@dataclass(slots=True)
class Part(Generic[K, V]):
    """All that a replica holds of some keys at one instant, with its whole context of that instant.

    It covers the keys in `keys` and every key whose hash falls into one of `leaves`.
    """

    leaves: Sequence[int]
    keys: tuple[K, ...]
    entries: dict[K, Pairs[V]]
    context: Context


class Prefix(NamedTuple):
    """A node of the digest tree: level 0 is the root, level DEPTH are the leaves."""

    level: int
    number: int

    def children(self) -> list[Prefix]:
        first = self.number << FANOUT_BITS
        return [Prefix(self.level + 1, first + i) for i in range(1 << FANOUT_BITS)]


ROOT = Prefix(0, 0)


class Hashes(dict[Prefix, int]):
    """Hashes of some nodes of the digest tree, pickled as 12 bytes each: as objects they took 30, and 2 us (measured)."""

    def __reduce__(self) -> tuple[Any, ...]:
        numbers = array("I", [(1 << FANOUT_BITS * prefix.level) + prefix.number for prefix in self])
        return _hashes, (numbers.tobytes(), array("Q", self.values()).tobytes())


def _hashes(numbers: bytes, values: bytes) -> Hashes:
    hashes = Hashes()
    for (number,), (value,) in zip(struct.iter_unpack("=I", numbers), struct.iter_unpack("=Q", values), strict=True):
        level = (number.bit_length() - 1) // FANOUT_BITS
        hashes[Prefix(level, number - (1 << FANOUT_BITS * level))] = value
    return hashes


class Change(NamedTuple, Generic[K, V]):
    """What a mutation did to one key."""

    key: K
    before: Pairs[V]
    after: Pairs[V]


class AWORSet(Generic[K, V]):
    """One replica of the set. Mutations return what changed; deltas are made from them by `delta_of`.

    Args:
        key_hash: a stable 64-bit hash of a key.
        merge: joins two values of one dot; commutative, associative, idempotent.
        fingerprint: some bytes of a value, equal on every machine for equal values.
    """

    def __init__(self, key_hash: Callable[[K], int], merge: Callable[[V, V], V], fingerprint: Callable[[V], bytes]) -> None:
        self.context = Context()
        self.writes = 0  # of keys, ever
        self._entries: dict[K, Pairs[V]] = {}
        self._key_hash = key_hash
        self._merge = merge
        self._fingerprint = fingerprint
        self._leaves: Leaves[K] = Leaves(key_hash)
        self._levels = [array("Q", bytes(8 << (FANOUT_BITS * level))) for level in range(DEPTH + 1)]
        self._stale: dict[K, Pairs[V]] = {}  # what the tree and the leaves have of keys that have changed since

    # Reading

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> Pairs[V]:
        return self._entries.get(key, ())

    def value(self, key: K, dot: Dot) -> V | None:
        for d, value in self._entries.get(key, ()):
            if d == dot:
                return value
        return None

    def items(self) -> Iterable[tuple[K, Pairs[V]]]:
        return self._entries.items()

    def keys_of(self, leaf: int) -> Sequence[K]:
        """The keys of a leaf of the digest tree."""
        self._settle()
        return self._leaves.keys(leaf)

    def leaves(self) -> Iterator[int]:
        """The leaves of the digest tree that have keys."""
        self._settle()
        return iter(self._leaves)

    def within(self, arcs: Sequence[Arc]) -> list[K]:
        """The keys whose positions lie in these arcs."""
        self._settle()
        return self._leaves.within(arcs)

    # Writing

    def add(self, key: K, dot: Dot, value: V) -> Change[K, V]:
        """Adds a value under a new dot. It leaves the key's other dots alone: nobody prunes losers (S4)."""
        if dot in self.context:
            raise ValueError(f"dot {dot} was used before")
        self.context.add(dot)
        return self._put(key, (*self._entries.get(key, ()), (dot, value)))

    def remove(self, key: K, dots: Iterable[Dot]) -> Change[K, V]:
        """Removes the given dots of a key, those of them that are there."""
        gone = set(dots)
        return self._put(key, tuple(pair for pair in self.get(key) if pair[0] not in gone))

    def update(self, key: K, dot: Dot, value: V) -> Change[K, V]:
        """Joins a value into that of a dot that is there; without it nothing changes."""
        pairs = self._entries.get(key, ())
        if len(pairs) == 1 and pairs[0][0] == dot:
            return self._put(key, ((pairs[0][0], self._merge(pairs[0][1], value)),))
        return self._put(key, tuple([(d, self._merge(v, value)) if d == dot else (d, v) for d, v in pairs]))

    def join(self, delta: Delta[K, V]) -> list[Change[K, V]]:
        """Joins a delta; returns the keys that changed."""
        changes = [self._join_key(key, theirs, delta.context) for key, theirs in delta.entries.items()]
        self.context.update(delta.context)
        return [change for change in changes if change is not None]

    def join_part(self, part: Part[K, V]) -> list[Change[K, V]]:
        """Joins a part: its context speaks only of the keys it covers, here and there."""
        changes = [self._join_key(key, part.entries.get(key, ()), part.context) for key in self._covered(part)]
        self.context.update(dot for pairs in part.entries.values() for dot, _ in pairs)
        return [change for change in changes if change is not None]

    def merge_context(self, context: Context) -> None:
        """Takes over a whole context. Only while both sides hold the same entries: it would delete the others' later."""
        self.context.merge(context)

    # Making deltas and parts

    def delta_of(self, changes: Iterable[Change[K, V]]) -> Delta[K, V]:
        """What another replica has to join to see these changes, given in the order in which they happened."""
        news: dict[K, dict[Dot, V]] = {}
        context: set[Dot] = set()
        for key, before, after in changes:
            if len(after) == 1 and (not before or (len(before) == 1 and before[0][0] == after[0][0])):  # nearly always
                dot, value = after[0]
                if not before or before[0][1] is not value:
                    news.setdefault(key, {})[dot] = value
                    context.add(dot)
                continue
            had = dict(before)
            fresh = {dot: value for dot, value in after if had.pop(dot, _NOTHING) is not value}
            # What is left in `had` is gone, where `after` does not have it.
            if not fresh and not had:
                continue
            of_key = news.setdefault(key, {})
            of_key.update(fresh)
            context.update(fresh)
            for dot in had:
                of_key.pop(dot, None)  # added and removed again: sent as an entry, it would come to life elsewhere
                context.add(dot)
        return Delta({key: tuple(pairs.items()) for key, pairs in news.items()}, context)

    def delta_against(self, part: Part[K, V]) -> Delta[K, V]:
        """What the sender of a part lacks of the keys it covers, as exact dots."""
        delta: Delta[K, V] = Delta()
        for key in self._covered(part):
            theirs = dict(part.entries.get(key, ()))
            mine = dict(self.get(key))
            news = tuple((d, v) for d, v in mine.items() if d not in part.context or (d in theirs and theirs[d] != v))
            gone = {d for d in theirs if d not in mine and d in self.context}
            if news or gone:
                delta.entries[key] = news
                delta.context.update(gone, (d for d, _ in news))
        return delta

    def part(self, keys: Iterable[K] = (), leaves: Iterable[int] = ()) -> Part[K, V]:
        """All that is held of these keys and leaves, now."""
        self._settle()
        keys, leaves = tuple(keys), tuple(leaves)
        covered = set(keys).union(*(self._leaves.keys(leaf) for leaf in leaves))
        entries = {key: self._entries[key] for key in covered if key in self._entries}
        return Part(leaves, keys, entries, self.context.copy())

    def whole(self) -> Part[K, V]:
        """The full state."""
        return Part(range(1 << LEAF_BITS), (), dict(self._entries), self.context.copy())

    # Digests

    def digest(self, prefix: Prefix = ROOT) -> int:
        """The hash of all (key, dots, values) below a node of the tree."""
        self._settle()
        return self._levels[prefix.level][prefix.number]

    def differing(self, hashes: Mapping[Prefix, int]) -> list[Prefix]:
        """Those of another's nodes below which the two replicas differ."""
        return [prefix for prefix, value in hashes.items() if self.digest(prefix) != value]

    def descend(self, hashes: Mapping[Prefix, int]) -> tuple[Hashes, list[int]]:
        """One step of a comparison, on the answering side.

        Args:
            hashes: the asker's hashes of some nodes.

        Returns:
            The hashes of the children of every inner node that differs, and the leaves that differ.
        """
        children = Hashes()
        leaves: list[int] = []
        for prefix in self.differing(hashes):
            if prefix.level == DEPTH:
                leaves.append(prefix.number)
            else:
                children.update((child, self.digest(child)) for child in prefix.children())
        return children, leaves

    def _covered(self, part: Part[K, V]) -> set[K]:
        """The keys a part speaks of, here and there."""
        self._settle()
        covered = set(part.keys) | set(part.entries)
        leaves: Iterable[int] = part.leaves
        if len(part.leaves) > len(self._leaves):  # a whole state has 32,768 leaves, and a small set few of them
            wanted = part.leaves if isinstance(part.leaves, range) else set(part.leaves)
            leaves = [leaf for leaf in self._leaves if leaf in wanted]
        for leaf in leaves:
            covered.update(self._leaves.keys(leaf))
        return covered

    # The one place where entries change

    def _join_key(self, key: K, theirs: Pairs[V], their_context: Context | set[Dot]) -> Change[K, V] | None:
        mine = self._entries.get(key, ())
        if len(theirs) == 1 and len(mine) <= 1:  # nearly always: a third of what the general way costs
            dot, value = theirs[0]
            if not mine:
                return None if dot in self.context else self._put(key, theirs)
            if mine[0][0] == dot:
                merged = self._merge(mine[0][1], value)
                same = merged is mine[0][1] or merged == mine[0][1]
                return None if same else self._put(key, ((mine[0][0], merged),))
        other = dict(theirs)
        joined = []
        for dot, value in mine:
            if dot in other:
                joined.append((dot, self._merge(value, other.pop(dot))))
            elif dot not in their_context:
                joined.append((dot, value))
        joined += [(dot, value) for dot, value in other.items() if dot not in self.context]
        if len(joined) == len(mine) and all(a is b or a == b for a, b in zip(joined, mine, strict=True)):
            return None
        return self._put(key, tuple(joined))

    def _put(self, key: K, pairs: Pairs[V]) -> Change[K, V]:
        self.writes += 1
        before = self._entries.get(key, ())
        if len(pairs) > 1:
            pairs = tuple(sorted(pairs, key=lambda pair: pair[0]))  # equal replicas are equal in order, too
        if pairs:
            self._entries[key] = pairs
        elif before:
            del self._entries[key]
        # The tree is brought up to date when it is asked: a bird that is added, starts and runs is hashed once and not five times.
        self._stale.setdefault(key, before)
        if len(self._stale) >= STALE:
            self._settle()
        return Change(key, before, pairs)

    def _settle(self) -> None:
        """Brings leaves and tree up to date with the entries."""
        if not self._stale:
            return
        stale, self._stale = self._stale, {}
        levels = [(hashes, 64 - FANOUT_BITS * level) for level, hashes in enumerate(self._levels)]
        entries, key_hash, fingerprint, pack = self._entries, self._key_hash, self._fingerprint, _POSITION_AND_DOT.pack
        for key, before in stale.items():
            after = entries.get(key, ())
            if not before:
                if after:
                    self._leaves.add(key)
            elif not after:
                self._leaves.remove(key)
            position = key_hash(key)
            flip = 0
            for (life, counter), value in before + after:
                data = pack(position, life_hash(life), counter) + fingerprint(value)
                flip ^= int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
            if flip:
                for hashes, shift in levels:
                    hashes[position >> shift] ^= flip
