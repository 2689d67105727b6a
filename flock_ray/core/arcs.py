"""Arcs of the ring, and names found by them: a change of owners is decided by arcs, not name by name.

Positions are the 64-bit hashes of names. The first bits of a position are its *leaf*; names are kept by leaf, so those of an arc are
found without hashing any but those in the two leaves where the arc begins and ends. At 100,000 names a view change costs a
nest 2 ms this way, where asking the ring for each name cost 2 s (measured).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeAlias, TypeVar

K = TypeVar("K")

#: Its first position, and the first one behind it. Arcs come in order and neither overlap nor touch.
Arc: TypeAlias = tuple[int, int]

CIRCLE = 1 << 64
FEW = 8  # to hash a name takes as long as to look into so many leaves
LEAF_BITS = 15  # 32,768 leaves: 30 names a leaf at a million names
LEAF_SHIFT = 64 - LEAF_BITS


def difference(arcs: Iterable[Arc], others: Sequence[Arc]) -> list[Arc]:
    """What some arcs cover and others do not."""
    left: list[Arc] = []
    at = 0
    for first, end in arcs:
        begin = first
        while at < len(others) and others[at][1] <= begin:
            at += 1
        look = at
        while look < len(others) and others[look][0] < end:
            if begin < others[look][0]:
                left.append((begin, others[look][0]))
            begin = max(begin, others[look][1])
            look += 1
        if begin < end:
            left.append((begin, end))
    return left


def intersection(arcs: Sequence[Arc], others: Sequence[Arc]) -> list[Arc]:
    """What some arcs cover and others too."""
    return difference(arcs, difference(arcs, others))


def inside(arcs: Sequence[Arc]) -> Callable[[int], bool]:
    """Tells of a position whether it lies in the arcs."""
    begins = [begin for begin, _ in arcs]

    def covers(position: int) -> bool:
        at = bisect(begins, position) - 1
        return at >= 0 and position < arcs[at][1]

    return covers


class Leaves(Generic[K]):
    """Keys by the first bits of their position.

    Args:
        position: of a key, 0 to 2**64 - 1.
    """

    __slots__ = ("_keys", "_position")

    def __init__(self, position: Callable[[K], int]) -> None:
        self._position = position
        self._keys: dict[int, list[K]] = {}  # lists: as sets they took 70 bytes a name more, and leaves are small

    def __len__(self) -> int:
        """How many leaves have keys."""
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        """The leaves that have keys."""
        return iter(self._keys)

    def keys(self, leaf: int) -> Sequence[K]:
        return self._keys.get(leaf, ())

    def add(self, key: K) -> None:
        """Adds a key that is not there."""
        leaf = self._position(key) >> LEAF_SHIFT
        keys = self._keys.get(leaf)
        if keys is None:
            self._keys[leaf] = [key]
        else:
            keys.append(key)

    def remove(self, key: K) -> None:
        """Removes a key that is there."""
        leaf = self._position(key) >> LEAF_SHIFT
        keys = self._keys[leaf]
        keys.remove(key)
        if not keys:
            del self._keys[leaf]

    def within(self, arcs: Sequence[Arc]) -> list[K]:
        """The keys whose positions lie in the arcs."""
        if sum((end - begin >> LEAF_SHIFT) + 2 for begin, end in arcs) > FEW * len(self._keys):
            covers = inside(arcs)
            return [key for keys in self._keys.values() for key in keys if covers(self._position(key))]
        found: list[K] = []
        for begin, end in arcs:
            first, last = begin >> LEAF_SHIFT, end - 1 >> LEAF_SHIFT
            for leaf in range(first + 1, last):
                found += self._keys.get(leaf, ())
            for leaf in {first, last}:
                found += [key for key in self._keys.get(leaf, ()) if begin <= self._position(key) < end]
        return found
