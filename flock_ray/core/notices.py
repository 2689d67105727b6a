"""What happened, for people: typed records that the core emits; each nest keeps its latest and logs them.

`level` is that of the standard logging module: a move is information, a failed bird an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from flock_ray.specs import Dot, Life, Name


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened, as seen by the nest `by`."""

    level: ClassVar[int] = logging.INFO
    by: Life


@dataclass(frozen=True, slots=True)
class BirdNotice(Notice):
    name: Name
    dot: Dot
    incarnation: int

    @property
    def text(self) -> str:
        return f"bird {self.name!r} {type(self).__name__.removeprefix('Bird').lower()} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True)
class BirdStarted(BirdNotice):
    """A spec was accepted."""


@dataclass(frozen=True, slots=True)
class BirdRunning(BirdNotice):
    """A life's `__init__` has returned."""


@dataclass(frozen=True, slots=True)
class BirdStopped(BirdNotice):
    """A life ended because its spec was removed, or it left."""


@dataclass(frozen=True, slots=True)
class BirdMoved(BirdNotice):
    """A life ended here for its new owner."""


@dataclass(frozen=True, slots=True)
class BirdCrashed(BirdNotice):
    level: ClassVar[int] = logging.WARNING
    error: str = ""

    @property
    def text(self) -> str:
        return f"bird {self.name!r} crashed (incarnation {self.incarnation}): {last_line(self.error)}"


@dataclass(frozen=True, slots=True)
class BirdFailed(BirdNotice):
    level: ClassVar[int] = logging.ERROR
    error: str = ""

    @property
    def text(self) -> str:
        return f"bird {self.name!r} has failed and is not restarted: {last_line(self.error)}"


@dataclass(frozen=True, slots=True)
class NameConflict(Notice):
    """One name was started with different specs on two sides; the winner counts everywhere (S4)."""

    level: ClassVar[int] = logging.WARNING
    name: Name
    winner: Dot
    losers: tuple[Dot, ...]

    @property
    def text(self) -> str:
        return f"bird {self.name!r} was started with different specs; {self.winner} wins over {', '.join(map(str, self.losers))}"


@dataclass(frozen=True, slots=True)
class CastLost(Notice):
    """Casts went to a name that nobody knows, so nobody was told but here."""

    level: ClassVar[int] = logging.WARNING
    name: Name
    casts: int

    @property
    def text(self) -> str:
        return f"{self.casts} casts to bird {self.name!r} are lost: no nest knows it; start it first, or use call to be told"


@dataclass(frozen=True, slots=True)
class NestNotice(Notice):
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
    """A piece of what this nest's life before has written."""

    level: ClassVar[int] = logging.ERROR
    why: str

    @property
    def text(self) -> str:
        return f"{self.why}; what no other nest knows of it is lost: see with birds() what is missing, and start it again"


def last_line(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1] if lines else "no error was recorded"


@dataclass(frozen=True, slots=True)
class ConnectionsRefused(Notice):
    """Somebody was not let in: `where` is `"nest"` or the name of a host, and `count` says how often within a second or more."""

    level: ClassVar[int] = logging.WARNING
    where: str
    why: str
    count: int

    @property
    def text(self) -> str:
        return f"{self.count} connections to {self.where} were turned away: {self.why}"
