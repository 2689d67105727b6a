"""What goes into a registry: frozen dataclasses that a shell hands to `Registry.handle`, and how clients' requests among them end.

What comes out is in `core/effects.py`, what nests say to each other in `core/messages.py`. Clients import this file
and not those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from flock_ray.core.wire import LifeBegins, LifeCrashed, LifeEnded, LifeExited, LifeRunning
from flock_ray.specs import Dot, Life, Name, NodeRecord, Route, Spec

if TYPE_CHECKING:
    from flock_ray.core.messages import Envelope, Released


@dataclass(frozen=True, slots=True)
class Adopted:
    """A life or a released record that a host of this node has kept while its nest was away (V2)."""

    name: Name
    dot: Dot
    spec: Spec
    code: bytes
    incarnation: int
    born: int
    host: str
    restarts: int
    crashes: int
    running: bool  # else it is still in `__init__`
    record: Released | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class Booted:
    """The first event: what the hosts of this node still have, the birds that ended normally meanwhile, and what the nest's life before
    has written down (`core/journal.py`)."""

    node: NodeRecord
    adopted: tuple[Adopted, ...] = ()
    exits: tuple[tuple[Name, Dot], ...] = ()
    journal: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class LifeLost:
    """A light bird's process died, and not by its fault: it has not crashed, and is hatched again after `pause` seconds."""

    dot: Dot
    born: int
    error: str
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Evacuate:
    """A process of light birds is about to be ended, for one in it does not return: these are its neighbours (H3)."""

    lives: tuple[tuple[Dot, int], ...]


@dataclass(frozen=True, slots=True)
class NodesListed:
    """Ray's node table: the nodes that are alive (M1)."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class MemberAlive:
    """The failure detector hears a nest: it joined or recovered."""

    life: Life


@dataclass(frozen=True, slots=True)
class MemberDead:
    """The failure detector gave a nest up."""

    life: Life


Found: TypeAlias = Literal["up", "refused", "silent"]


@dataclass(frozen=True, slots=True)
class ConnectionBroken:
    """The connection to the nest of a node has ended, or nobody listens there any more."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeProbed:
    """The answer to `ProbeNode`: does the raylet of that nest's node accept connections (`up`), refuse them, or say nothing? (M5)"""

    life: Life
    found: Found


@dataclass(frozen=True, slots=True)
class MemoryLow:
    """The node's free memory fell below, or rose above, what admits birds (P3)."""

    low: bool


@dataclass(frozen=True, slots=True)
class Received:
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: `Registry.wake_at` said when."""


@dataclass(frozen=True, slots=True)
class Start:
    """A client starts a bird. `wall` is the wall clock in nanoseconds; the spec's stamp is set here."""

    request: str
    name: Name
    spec: Spec
    code: bytes
    wall: int


@dataclass(frozen=True, slots=True)
class Stop:
    request: str
    name: Name
    after: Dot | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    request: str
    name: Name
    after: Dot | None = None


@dataclass(frozen=True, slots=True)
class Locate:
    """A client waits until a bird is `running` (and gets its route), `gone`, or merely `known`.

    Args:
        after: a dot the client has written or was given; the answer takes it into account (C3).
        avoid: a route that did not work: wait for another.
        timeout: seconds; `None` for ever.
        casts: how many casts wait for it: nobody would hear that there is no such bird.
    """

    request: str
    name: Name
    wanted: str
    timeout: float | None
    after: Dot | None = None
    avoid: Route | None = None
    casts: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client of a request has gone or lost patience."""

    request: str


Event: TypeAlias = (
    Booted | NodesListed | MemberAlive | MemberDead | ConnectionBroken | NodeProbed | MemoryLow | Received | Tick | Start | Stop | Restart
    | Locate | Cancel | LifeBegins | LifeRunning | LifeCrashed | LifeExited | LifeEnded | LifeLost | Evacuate
)  # fmt: skip


# How a client's request ends


@dataclass(frozen=True, slots=True)
class Accepted:
    """The spec is in the set. `existed`: an equal bird was there already (`if_exists="ok"`)."""

    dot: Dot
    existed: bool = False


@dataclass(frozen=True, slots=True)
class Differs:
    """`if_exists="ok"`, and a bird of that class is there, with other bytes for its arguments. Equal arguments may be pickled differently,
    and a nest unpickles nothing of users (S5): who asked has to compare. `args` is the pickle of `(args, kwargs)`.
    """

    dot: Dot
    args: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """It is so: stopped, restarted, gone, or known."""

    dot: Dot | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """`error` is the class of `flock_ray.errors` to raise, `detail` the bird's last error with its traceback."""

    error: str
    message: str
    name: Name
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Routes:
    """Where many birds can be called.

    Args:
        places: node, host and address of each host, and whether the bird has `async def` methods.
        rows: for each bird that runs, in the order asked, which place, its dot and incarnation.
        refused: what is to be said of the others, by their place in that order: `CallTimeout` of those that may run yet.
    """

    places: tuple[tuple[str, str, str, bool], ...]
    rows: tuple[tuple[int, Dot, int] | None, ...]
    refused: dict[int, Refused]


Outcome: TypeAlias = Accepted | Differs | Done | Route | Refused
