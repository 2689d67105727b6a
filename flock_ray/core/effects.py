"""What a registry wants done: frozen values that its shell performs, in order. The shell decides nothing.

Those that a start brings forth are named tuples, which take a third of the time to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from flock_ray.core.events import Outcome
from flock_ray.core.journal import Entry
from flock_ray.core.messages import Envelope
from flock_ray.notices import Notice
from flock_ray.specs import Dot, Life, Name, Spec


class Send(NamedTuple):
    to: Life
    envelope: Envelope


class Write(NamedTuple):
    """Write this into the journal, before anything that follows is done: nothing that was accepted is lost with this nest (V2)."""

    entries: tuple[Entry, ...]


class Hatch(NamedTuple):
    """Start a life; answer with `LifeRunning` or `LifeCrashed`."""

    name: Name
    dot: Dot
    born: int
    spec: Spec
    code: bytes
    restarts: int
    crashes: int
    state: bytes | None  # for `take_over`
    has_state: bool


@dataclass(frozen=True, slots=True)
class EndLife:
    """End a life in good order within `timeout` seconds, else kill it; answer with `LifeEnded`.

    With `keep`, `hand_over` is called and its result kept in the host until `Forget`.
    """

    dot: Dot
    born: int
    reason: str
    keep: bool
    timeout: float


@dataclass(frozen=True, slots=True)
class Kill:
    """End a life's process now; answer with `LifeCrashed` with this text."""

    dot: Dot
    born: int
    error: str


@dataclass(frozen=True, slots=True)
class Raise:
    """A life that stays takes a higher incarnation (H4); its host has to know it for its nest's next life."""

    dot: Dot
    born: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Forget:
    """A record or an exit that a host keeps is not needed any more."""

    dot: Dot


@dataclass(frozen=True, slots=True)
class StartAfresh:
    """This nest was out of contact for too long: end its birds and records, and come back as a new life with an empty replica (S2)."""


@dataclass(frozen=True, slots=True)
class ProbeNode:
    """Try the raylet's port of that nest's node; answer with `NodeProbed`."""

    life: Life


@dataclass(frozen=True, slots=True)
class Demand:
    """What the cluster must have room for, for Ray's autoscaler: bundles of resources, of all birds while one cannot be placed (P2)."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]


class Reply(NamedTuple):
    request: str
    outcome: Outcome


class Emit(NamedTuple):
    """Something worth telling the people who run the flock."""

    notice: Notice


Effect: TypeAlias = Write | Send | Hatch | EndLife | Kill | Raise | Forget | StartAfresh | ProbeNode | Demand | Reply | Emit
