"""What this nest holds: lives that run, start, end or wait to start again, and records of lives released (H1 counts them all)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flock_ray.core.arcs import Arc, Leaves
from flock_ray.core.messages import Envelope, Held, Release, Released
from flock_ray.specs import Dot, Life, Name, Spec, name_hash


class Phase(enum.Enum):
    """Where a life is on its way; `core/registry.py` has the picture."""

    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    BACKOFF = "restarting"


@dataclass(slots=True)
class BirdLife:
    """A life of a dot at this nest. `born` is the incarnation it was hatched with and names its process; `incarnation` may be raised."""

    name: Name
    dot: Dot
    spec: Spec
    born: int
    incarnation: int
    phase: Phase
    host: str = ""
    address: str = ""
    restarts: int = 0
    crashes: int = 0
    exits: int = 0  # in a row, of a permanent bird that leaves
    error: str = ""
    running_since: float = 0.0
    due: float = 0.0
    source: Released | None = None  # what it takes over, kept until it runs
    keep: bool = False
    reason: str = ""
    restart_after: bool = False
    askers: dict[Life, tuple[Envelope, Release]] = field(default_factory=dict)


class Holds:
    """Lives and records by dot and by name."""

    def __init__(self) -> None:
        self.lives: dict[Dot, BirdLife] = {}
        self.records: dict[Dot, Released] = {}
        self.staying: dict[Dot, Name] = {}  # of the lives, those that do not move
        self._by_name: dict[Name, tuple[Dot, ...]] = {}  # tuples: nearly every name has one dot, for which a set takes 216 bytes
        self._leaves: Leaves[Name] = Leaves(name_hash)

    def __contains__(self, name: Name) -> bool:
        return name in self._by_name

    def names(self) -> Iterable[Name]:
        return tuple(self._by_name)

    def within(self, arcs: Sequence[Arc]) -> list[Name]:
        """The names held whose positions lie in these arcs."""
        return self._leaves.within(arcs)

    def dots(self, name: Name) -> tuple[Dot, ...]:
        return self._by_name.get(name, ())

    def of(self, name: Name) -> list[Held]:
        """All holds of a name, as a barrier answer reports them."""
        held = []
        for dot in self.dots(name):
            life, record = self.lives.get(dot), self.records.get(dot)
            if life is not None:
                held.append(Held(name, dot, life.incarnation, True))
            elif record is not None:
                held.append(Held(name, dot, record.incarnation, False))
        return held

    def life(self, dot: Dot, born: int) -> BirdLife | None:
        life = self.lives.get(dot)
        return life if life is not None and life.born == born else None

    def lives_of(self, name: Name) -> list[BirdLife]:
        return [self.lives[dot] for dot in self.dots(name) if dot in self.lives]

    def begin(self, life: BirdLife) -> None:
        self.lives[life.dot] = life
        if not life.spec.options.moves:
            self.staying[life.dot] = life.name
        self._note(life.name, life.dot)

    def end(self, life: BirdLife) -> None:
        del self.lives[life.dot]
        self.staying.pop(life.dot, None)
        self._tidy(life.name, life.dot)

    def keep(self, name: Name, record: Released) -> None:
        """Keeps a record, unless a later one of the dot is kept."""
        kept = self.records.get(record.dot)
        if kept is None or record.order > kept.order:
            self.records[record.dot] = record
        self._note(name, record.dot)

    def drop(self, name: Name, dot: Dot) -> None:
        self.records.pop(dot, None)
        self._tidy(name, dot)

    def _note(self, name: Name, dot: Dot) -> None:
        dots = self._by_name.get(name)
        if dots is None:
            self._by_name[name] = (dot,)
            self._leaves.add(name)
        elif dot not in dots:
            self._by_name[name] = (*dots, dot)

    def _tidy(self, name: Name, dot: Dot) -> None:
        if dot in self.lives or dot in self.records or name not in self._by_name:
            return
        dots = tuple(other for other in self._by_name[name] if other != dot)
        if dots:
            self._by_name[name] = dots
        else:
            del self._by_name[name]
            self._leaves.remove(name)
