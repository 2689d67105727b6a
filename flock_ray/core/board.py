"""A nest's notice board: its latest notices, and what a reader makes of the boards of all nests.

    nest   --add--> Board  --Page--> Reading of that nest --\
    nest   --add--> Board  --Page--> Reading of that nest ---> Reader.gather: what is next

Rules kept here: a board is bounded, whoever reads it; a reader says how far he has come, so a board keeps nothing of its readers; no notice
comes twice to a reader, and those of one nest come in their order; while he catches up they come in the order of their times; what was
dropped before he read it he is told (`Missed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, TypeAlias

from flock_ray.notices import Missed, Notice
from flock_ray.specs import Life

KEPT = 10_000  # notices; a burst of light birds is as many a second. More is more memory of each nest, 0.3 KB each
ERRORS = 4_000_000  # characters of the errors in those
PAGE = 500  # notices in an answer: some ms of a nest's time

Kinds: TypeAlias = type[Notice] | tuple[type[Notice], ...]


class Cursor(NamedTuple):
    """How far a reader has come with a nest: he has seen what `by` has noticed up to this number. `None`: nothing yet."""

    by: Life | None = None
    number: int = 0


UNREAD = Cursor()


class Page(NamedTuple):
    """What a board has for a reader.

    Attributes:
        cursor: how far that brings him.
        notices: of the kinds that he wants, with their times.
        missed: how many, of all kinds, were dropped before he came.
        more: is there more to be read at once?
    """

    cursor: Cursor
    notices: tuple[Notice, ...]
    missed: int
    more: bool


class Board:
    """The latest notices of one nest's life, numbered from 1."""

    def __init__(self, by: Life) -> None:
        self._by = by
        self._kept: deque[tuple[float, Notice]] = deque()
        self._last = 0
        self._time = 0.0
        self._errors = 0

    def add(self, notice: Notice, time: float) -> None:
        """Puts a notice up. A clock that was set back counts as one that stands still."""
        self._time = max(self._time, time)
        self._last += 1
        self._kept.append((self._time, notice))
        self._errors += _error_length(notice)
        while len(self._kept) > KEPT or (self._errors > ERRORS and len(self._kept) > 1):
            self._errors -= _error_length(self._kept.popleft()[1])

    def read(self, cursor: Cursor, kinds: Kinds, since: float) -> Page:
        """What there is after a cursor, of these kinds and not older than `since`.

        A cursor of an earlier life of the nest has seen nothing of this one. Who has seen nothing at all misses nothing either.
        """
        dropped = self._last - len(self._kept)
        seen = cursor.number if cursor.by == self._by else 0
        missed = max(0, dropped - seen) if cursor.by is not None else 0
        number = max(seen, dropped)
        found: list[Notice] = []
        for time, notice in islice(self._kept, number - dropped, None):
            number += 1
            if time >= since and isinstance(notice, kinds):
                found.append(replace(notice, time=time))
                if len(found) == PAGE:
                    break
        return Page(Cursor(self._by, number), tuple(found), missed, number < self._last)


def _error_length(notice: Notice) -> int:
    return len(getattr(notice, "error", ""))


@dataclass(slots=True)
class _Reading:
    """How far a reader has come with the nest of a node."""

    cursor: Cursor = UNREAD
    unread: deque[Notice] = field(default_factory=deque)
    behind: bool = True  # is there, or may there be, more to be read at once?
    time: float = 0.0  # of the last


class Reader:
    """Puts together what the boards of nests say."""

    def __init__(self) -> None:
        self._nests: dict[str, _Reading] = {}

    def follow(self, node: str) -> None:
        """There is a nest on this node."""
        self._nests.setdefault(node, _Reading())

    def wants(self, node: str) -> Cursor | None:
        """What its nest is to be asked next; `None` while what it has said is not read yet: so a slow reader keeps little."""
        reading = self._nests[node]
        return None if reading.unread else reading.cursor

    def is_behind(self, node: str) -> bool:
        """May there be more to be read at once?"""
        return self._nests[node].behind

    def take(self, node: str, page: Page) -> None:
        """A nest's answer."""
        reading = self._nests[node]
        if page.missed:
            reading.unread.append(Missed(page.cursor.by or Life(node, 0), page.missed, time=max(reading.time, _first_time(page))))
        reading.unread += page.notices
        reading.cursor, reading.behind = page.cursor, page.more
        if reading.unread:
            reading.time = reading.unread[-1].time

    def silent(self, node: str) -> None:
        """A nest does not answer: the others are not kept waiting for it."""
        self._nests[node].behind = False

    def give_up(self, node: str) -> None:
        """Who reads does not come back to a nest that does not answer."""
        reading = self._nests[node]
        reading.unread.append(Missed(reading.cursor.by or Life(node, 0), None, time=reading.time))
        reading.behind = False

    @property
    def done(self) -> bool:
        """Has all been read that there was?"""
        return not any(reading.behind or reading.unread for reading in self._nests.values())

    def gather(self) -> Iterator[Notice]:
        """What can be read now: in order of time, until what a nest says next has to be known first."""
        readings = self._nests.values()
        while not any(reading.behind and not reading.unread for reading in readings):
            unread = [reading.unread for reading in readings if reading.unread]
            if not unread:
                return
            yield min(unread, key=lambda notices: notices[0].time).popleft()


def _first_time(page: Page) -> float:
    return page.notices[0].time if page.notices else 0.0
