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
        found: list[K] = []
        begins = [begin for begin, _ in arcs]
        for leaf in self._touched(arcs):
            keys = self._keys.get(leaf)
            if not keys:
                continue
            first = leaf << LEAF_SHIFT
            at = bisect(begins, first) - 1  # the last arc that begins before or with the leaf
            if at >= 0 and arcs[at][1] >= first + (1 << LEAF_SHIFT):
                found += keys
                continue
            for key in keys:
                position = self._position(key)
                at = bisect(begins, position) - 1
                if at >= 0 and position < arcs[at][1]:
                    found.append(key)
        return found

    def _touched(self, arcs: Sequence[Arc]) -> Iterable[int]:
        """The leaves that arcs touch, each once; all that have keys, where those are fewer."""
        leaves = sum((end - begin >> LEAF_SHIFT) + 2 for begin, end in arcs)
        if leaves > len(self._keys):
            return self._keys
        return {leaf for begin, end in arcs for leaf in range(begin >> LEAF_SHIFT, (end - 1 >> LEAF_SHIFT) + 1)}
