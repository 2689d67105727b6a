"""What happened, for people: the typed records that `flock_ray.events()` gives, and that nests log.

    for notice in flock_ray.events(kinds=(notices.BirdCrashed, notices.BirdFailed)):
        print(notice.time, notice.node_id, notice.text)

The core emits them; the nest that does so gives each its time and keeps the latest (`core/board.py`). `level` is that of the standard
logging module: a move is information, a failed bird an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from flock_ray.specs import Dot, Life, Name


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened, as one nest has seen it.

    Attributes:
        by: the life of that nest: the id of its node, and a number that grows with each of the nest's lives there.
        time: seconds since the epoch, by the clock of that node; those of one nest never go back.
        level: of the standard logging module.
        text: one line for people.
    """

    level: ClassVar[int] = logging.INFO
    by: Life
    time: float = field(default=0.0, kw_only=True, compare=False)

    @property
    def node_id(self) -> str:
        """The id of the Ray node of the nest that has seen it."""
        return self.by.node

    @property
    def text(self) -> str:
        """One line for people."""
        return type(self).__name__


@dataclass(frozen=True, slots=True)
class BirdNotice(Notice):
    """Something that happened to a bird.

    Attributes:
        name: the bird's.
        dot: tells one start of the name from another.
        incarnation: counts the bird's lives.
    """

    name: Name
    dot: Dot
    incarnation: int

    @property
    def text(self) -> str:
        return f"bird {self.name!r} {type(self).__name__.removeprefix('Bird').lower()} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True)
class BirdStarted(BirdNotice):
    """A `start` was accepted; by the nest that has accepted it."""


@dataclass(frozen=True, slots=True)
class BirdRunning(BirdNotice):
    """A life's `__init__` has returned, on the node of the nest that says so, as for all that follow."""


@dataclass(frozen=True, slots=True)
class BirdCrashed(BirdNotice):
    """A life has crashed. `error` has the traceback, where there is one."""

    level: ClassVar[int] = logging.WARNING
    error: str = ""

    @property
    def text(self) -> str:
        return f"bird {self.name!r} crashed (incarnation {self.incarnation}): {last_line(self.error)}"


@dataclass(frozen=True, slots=True)
class BirdRestarted(BirdNotice):
    """A new life begins where the last was: after a crash, a normal exit (`restart="permanent"`), a `restart()`, or a lost process."""


@dataclass(frozen=True, slots=True)
class BirdFailed(BirdNotice):
    """A bird has crashed too often, and is not restarted. `error` is its last one."""

    level: ClassVar[int] = logging.ERROR
    error: str = ""

    @property
    def text(self) -> str:
        return f"bird {self.name!r} has failed and is not restarted: {last_line(self.error)}"


@dataclass(frozen=True, slots=True)
class BirdMoved(BirdNotice):
    """A new life begins on another node than that of the one before, `source`: it was moved, or its node is gone."""

    source: str

    @property
    def text(self) -> str:
        return f"bird {self.name!r} moved here from node {self.source} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True)
class BirdStopped(BirdNotice):
    """A life has ended, and no other follows: it was stopped, it left, another start of its name counts, or after a split another life."""


@dataclass(frozen=True, slots=True)
class NameConflict(Notice):
    """One name was started with different specs on two sides of a split; the `winner` counts everywhere (S4), the `losers` are stopped."""

    level: ClassVar[int] = logging.WARNING
    name: Name
    winner: Dot
    losers: tuple[Dot, ...]

    @property
    def text(self) -> str:
        return f"bird {self.name!r} was started with different specs; {self.winner} wins over {', '.join(map(str, self.losers))}"


@dataclass(frozen=True, slots=True)
class CastLost(Notice):
    """Casts, so many, went to a name that nobody knows, so nobody was told but here."""

    level: ClassVar[int] = logging.WARNING
    name: Name
    casts: int

    @property
    def text(self) -> str:
        return f"{self.casts} casts to bird {self.name!r} are lost: no nest knows it; start it first, or use call to be told"


@dataclass(frozen=True, slots=True)
class NestNotice(Notice):
    """What the nest `by` has seen of the nest `life`: each nest sees for itself, so each tells it."""

    life: Life

    @property
    def text(self) -> str:
        return f"nest {self.life} {type(self).__name__.removeprefix('Nest').lower()}"


@dataclass(frozen=True, slots=True)
class NestJoined(NestNotice):
    """A nest was admitted to the view."""


@dataclass(frozen=True, slots=True)
class NestSuspected(NestNotice):
    """The failure detector gave a nest up; whether its node is gone, too, is asked (M5)."""

    level: ClassVar[int] = logging.WARNING


@dataclass(frozen=True, slots=True)
class NestRecovered(NestNotice):
    """A nest that was given up is heard again."""


@dataclass(frozen=True, slots=True)
class NestLeft(NestNotice):
    """A nest was dropped from the view."""

    level: ClassVar[int] = logging.WARNING


@dataclass(frozen=True, slots=True)
class NestReady(NestNotice):
    """This nest has its view and acts."""


@dataclass(frozen=True, slots=True)
class JournalUnreadable(Notice):
    """A piece of what this nest's life before has written cannot be read, and `why`."""

    level: ClassVar[int] = logging.ERROR
    why: str

    @property
    def text(self) -> str:
        return f"{self.why}; what no other nest knows of it is lost: see with birds() what is missing, and start it again"


@dataclass(frozen=True, slots=True)
class ConnectionsRefused(Notice):
    """Somebody was not let in, and `why`: `where` is `"nest"` or the name of a host, `count` how often within a second or more."""

    level: ClassVar[int] = logging.WARNING
    where: str
    why: str
    count: int

    @property
    def text(self) -> str:
        return f"{self.count} connections to {self.where} were turned away: {self.why}"


@dataclass(frozen=True, slots=True)
class Missed(Notice):
    """What a reader of `events()` did not get: so many notices of that nest, of whatever kind, were dropped before he read them.

    `count` is `None` if the nest could not be asked: `events(follow=False)` then goes without it. No nest logs this.
    """

    level: ClassVar[int] = logging.WARNING
    count: int | None

    @property
    def text(self) -> str:
        if self.count is None:
            return f"what the nest of node {self.by.node} has noticed could not be read; try again"
        return f"{self.count} notices of the nest of node {self.by.node} were missed: it keeps only the latest, so read faster"


def last_line(error: str) -> str:
    """The last line of an error with its traceback."""
    lines = error.strip().splitlines()
    return lines[-1] if lines else "no error was recorded"
