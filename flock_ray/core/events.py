"""What goes into a registry and what comes out, and what nests say to each other: frozen dataclasses, nothing else.

Three groups: *messages* between nests (each in an `Envelope`), *events* that a shell hands to `Registry.handle`, and *effects* that it
hands back to be performed. The typed records of what happened to birds and nests (`flock_ray.events`) are in `core/notices.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from flock_ray.core.aworset import Context, Prefix
from flock_ray.core.notices import Notice
from flock_ray.core.replica import Content, Update
from flock_ray.specs import Dot, Life, Name, NodeRecord, Route, Spec

# Messages between nests


@dataclass(frozen=True, slots=True)
class Held:
    """A hold, as a barrier answer reports it: the dot is held at this incarnation; `alive` if a life of it runs or starts."""

    name: Name
    dot: Dot
    incarnation: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Released:
    """A life that has ended here, with what it handed over; kept until the owner's own life runs (H3)."""

    dot: Dot
    incarnation: int
    life: Life  # the nest that released it
    state: bytes | None

    @property
    def order(self) -> tuple[int, Life]:
        return (self.incarnation, self.life)


@dataclass(frozen=True, slots=True)
class News:
    """Changes, sent at once to all peers (S3). With `ack`, the receiver says `Acknowledge`."""

    update: Update
    ack: str = ""


@dataclass(frozen=True, slots=True)
class Acknowledge:
    ack: str


@dataclass(frozen=True, slots=True)
class SyncAsk:
    """Compare: my hashes of these nodes of the digest tree. `session` is echoed (M3)."""

    session: int
    hashes: tuple[tuple[Prefix, int], ...]
    context: int  # fingerprint of the shareable context
    nodes: tuple[NodeRecord, ...]
    view: frozenset[Life]


@dataclass(frozen=True, slots=True)
class SyncAnswer:
    """What differs below: hashes of children, content of leaves; the whole context only where nothing differs at all."""

    session: int
    hashes: tuple[tuple[Prefix, int], ...]
    content: Content | None
    context: Context | None
    nodes: tuple[NodeRecord, ...]
    view: frozenset[Life]


@dataclass(frozen=True, slots=True)
class BarrierAsk:
    """May I hatch what I own in my view of this number? (H1)"""

    number: int


@dataclass(frozen=True, slots=True)
class BarrierAnswer:
    """You own what my ring gives you but `elsewhere`, and of what has demands `placed`; of these names I hold `held`.

    Args:
        number: the asker's view number, echoed.
        weights: the answerer's ring. Agreement on the owner of a name is enough: the asker computes which names that covers.
    """

    number: int
    weights: tuple[tuple[str, int], ...]
    placed: frozenset[Name]
    elsewhere: frozenset[Name]
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """End this incarnation and hand it over (`keep`), or drop it, life or record (H3)."""

    name: Name
    dot: Dot
    incarnation: int
    keep: bool


@dataclass(frozen=True, slots=True)
class ReleaseAnswer:
    """Released with this record, or nothing held (`record` None), or held at another incarnation (`now`).

    `content` is the holder's entry and context of the name.
    """

    name: Name
    dot: Dot
    incarnation: int
    record: Released | None
    now: int | None
    content: Content


@dataclass(frozen=True, slots=True)
class LookUp:
    """What do you know of this name? (C3)"""

    name: Name


@dataclass(frozen=True, slots=True)
class LookUpAnswer:
    name: Name
    content: Content


@dataclass(frozen=True, slots=True)
class RestartAsk:
    """`restart(name)`, passed on to the nest that holds or owns it."""

    name: Name
    dot: Dot


@dataclass(frozen=True, slots=True)
class CodeAsk:
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CodeAnswer:
    code: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Relay:
    """Pass this on: its sender cannot reach the receiver directly (H2)."""

    to: Life
    envelope: Envelope


Body: TypeAlias = (
    News | Acknowledge | SyncAsk | SyncAnswer | BarrierAsk | BarrierAnswer | Release | ReleaseAnswer
    | LookUp | LookUpAnswer | RestartAsk | CodeAsk | CodeAnswer | Relay
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Envelope:
    """Every message says whose it is, the number of the sender's view, and whether that view has the receiver (M3, M4)."""

    sender: Life
    number: int
    accepts: bool
    body: Body
    relayed_by: Life | None = None


# Events: what happened outside


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


@dataclass(frozen=True, slots=True)
class Booted:
    """The first event: what the hosts of this node still have, and the birds that ended normally meanwhile."""

    node: NodeRecord
    adopted: tuple[Adopted, ...] = ()
    exits: tuple[tuple[Name, Dot], ...] = ()


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


@dataclass(frozen=True, slots=True)
class NodeProbed:
    """The answer to `ProbeNode`: does the raylet of that nest's node accept connections? (M5)"""

    life: Life
    up: bool


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
    """

    request: str
    name: Name
    wanted: str
    timeout: float | None
    after: Dot | None = None
    avoid: Route | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client of a request has gone or lost patience."""

    request: str


@dataclass(frozen=True, slots=True)
class LifeRunning:
    """A life's `__init__` has returned. `born` is its incarnation when it was hatched, and tells lives of a dot apart."""

    dot: Dot
    born: int
    host: str


@dataclass(frozen=True, slots=True)
class LifeCrashed:
    """A life ended of itself: `__init__` raised, it crashed, its process died."""

    dot: Dot
    born: int
    error: str


@dataclass(frozen=True, slots=True)
class LifeExited:
    """A life left in good order (`leave("normal")`)."""

    dot: Dot
    born: int


@dataclass(frozen=True, slots=True)
class LifeEnded:
    """The answer to `EndLife`: its process is gone, or only keeps the record."""

    dot: Dot
    born: int
    state: bytes | None = None
    handed_over: bool = False


Event: TypeAlias = (
    Booted | NodesListed | MemberAlive | MemberDead | NodeProbed | MemoryLow | Received | Tick | Start | Stop | Restart
    | Locate | Cancel | LifeRunning | LifeCrashed | LifeExited | LifeEnded
)  # fmt: skip


# Effects: what is to be done


@dataclass(frozen=True, slots=True)
class Send:
    to: Life
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Hatch:
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
class ProbeNode:
    """Try the raylet's port of that nest's node; answer with `NodeProbed`."""

    life: Life


@dataclass(frozen=True, slots=True)
class Demand:
    """What cannot be placed, for Ray's autoscaler: bundles of resources (P2)."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The spec is in the set. `existed`: an equal bird was there already (`if_exists="ok"`)."""

    dot: Dot
    existed: bool = False


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


Outcome: TypeAlias = Accepted | Done | Route | Refused


@dataclass(frozen=True, slots=True)
class Reply:
    request: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Emit:
    """Something worth telling the people who run the flock."""

    notice: Notice


Effect: TypeAlias = Send | Hatch | EndLife | Kill | Raise | Forget | ProbeNode | Demand | Reply | Emit
