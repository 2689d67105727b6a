"""What nests say to each other: frozen dataclasses, each sent in an `Envelope`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from flock_ray.core.aworset import Context, Hashes
from flock_ray.core.replica import Content, Update
from flock_ray.specs import Dot, Life, Name, NodeRecord


class Held(NamedTuple):
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
    """Changes, sent to all peers (S3). What is in `acks` the receiver says again in `Acknowledge`."""

    update: Update
    acks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """What came with these is here."""

    acks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a nest knows of all nests, as it says with every comparison.

    Args:
        view: its adopted view (M3).
        absent: for how many seconds it has been out of contact with each nest that it knows and does not hear (S2).
        had_cpus: did any node ever offer CPUs? (P1)
    """

    view: frozenset[Life]
    absent: tuple[tuple[Life, float], ...]
    nodes: tuple[NodeRecord, ...]
    had_cpus: bool


@dataclass(frozen=True, slots=True)
class SyncAsk:
    """Compare: my hashes of these nodes of the digest tree. `session` is echoed (M3)."""

    session: int
    hashes: Hashes
    context: int  # fingerprint of the shareable context
    outlook: Outlook


@dataclass(frozen=True, slots=True)
class SyncAnswer:
    """What differs below: hashes of children, content of leaves; the whole context only where nothing differs at all.

    Hashes of leaves are of those whose content would have been too much for one message: they are to be asked again.
    """

    session: int
    hashes: Hashes
    content: Content | None
    context: Context | None
    outlook: Outlook


@dataclass(frozen=True, slots=True)
class Estranged:
    """We were out of contact for so long that dots may have been forgotten: nothing is compared until one of us has joined as new (S2)."""

    outlook: Outlook


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
    """`restart(name)`, passed on to the nest that holds or owns it. A later incarnation than the one seen is restarted already."""

    name: Name
    dot: Dot
    incarnation: int


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
    News | Acknowledge | SyncAsk | SyncAnswer | Estranged | BarrierAsk | BarrierAnswer | Release | ReleaseAnswer
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
