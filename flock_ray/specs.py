"""What a bird is, written down: names, dots, stamps, options, specs. Plain values that every layer shares.

Rules kept here: which names are allowed and how they are encoded (the same bytes on every machine and Python version, P1);
specs are frozen and compared by class and arguments, never by code bytes (S5).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

# Hashes of the latest names are kept: where a name is started, found and written it is hashed again and again, for 1.2 us each time
# instead of 0.1 (measured). In a burst of 10,000 starts a second these are the names of a second.
HASHES = 8_192

Name: TypeAlias = "str | int | bytes | uuid.UUID | tuple[Name, ...]"


class Life(NamedTuple):
    """One life of a nest, and the replica id of what it adds (S2).

    `number` grows with every life on a node, so the later of two lives of one node is the greater.
    """

    node: str
    number: int

    def __str__(self) -> str:
        return f"{self.node}.{self.number}"


class Dot(NamedTuple):
    """The unique tag of one add, and so the identity of a bird in every message."""

    life: Life
    counter: int

    def __str__(self) -> str:
        return f"{self.life}:{self.counter}"


class Stamp(NamedTuple):
    """A hybrid logical clock's reading: wall time in nanoseconds, then a counter (Kulkarni et al. 2014)."""

    wall: int
    logical: int


def check_name(name: object) -> None:
    """Refuses what cannot be a name.

    Raises:
        TypeError: names the offending type. `bool` and subclasses are refused too: two machines need not agree on how they
            hash or compare.
    """
    kind = type(name)
    if kind is tuple:
        for part in name:  # type: ignore[attr-defined]  # it is a tuple, as tested by identity above
            check_name(part)
    elif kind not in (str, int, bytes, uuid.UUID):
        allowed = "a str, int, bytes, uuid.UUID or a tuple of these"
        raise TypeError(f"a bird's name must be {allowed}, not {kind.__name__}: {name!r}")


def encode_name(name: Name) -> bytes:
    """Encodes a name so that different names give different bytes, equal on every machine.

    A letter for the type, then the content; parts of a tuple are preceded by their length.
    """
    if isinstance(name, str):
        return b"s" + name.encode("utf-8", "surrogatepass")
    if isinstance(name, int):
        return b"i%x" % name  # in hexadecimal: Python refuses to write very long integers in decimal
    if isinstance(name, bytes):
        return b"b" + name
    if isinstance(name, uuid.UUID):
        return b"u" + name.bytes
    parts = [encode_name(part) for part in name]
    return b"t" + b"".join(b"%d:%s" % (len(part), part) for part in parts)


def stable_hash(data: bytes) -> int:
    """A 64-bit hash that is equal on every machine and Python version."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


@lru_cache(maxsize=HASHES)
def name_hash(name: Name) -> int:
    """The position of a name on the ring and in the digest tree: 64 bits."""
    data = b"s" + name.encode("utf-8", "surrogatepass") if type(name) is str else encode_name(name)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")  # as `stable_hash`, without two calls


class Options(NamedTuple):
    """How a bird is run. DESIGN's table of options; `flock_ray.options` checks what users give.

    `resources` and `label_selector` are sorted tuples of pairs, so that equal options are equal and hashable.
    """

    light: bool = False
    restart: str = "transient"
    max_restarts: int = 10
    healthy_after: float = 60.0
    on_error: str = "reply"
    if_exists: str = "error"
    ack: str = "local"
    moves: bool = True
    start_timeout: float | None = None
    stop_timeout: float = 30.0
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    accelerator_type: str | None = None
    label_selector: tuple[tuple[str, str], ...] = ()
    max_concurrency: int = 1

    @property
    def demand(self) -> tuple[tuple[str, float], ...]:
        """What the bird takes of a node's resources, by Ray's names for them: sorted pairs, empty for most birds."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory, **dict(self.resources)}
        if self.accelerator_type:
            wanted[f"accelerator_type:{self.accelerator_type}"] = 0.001  # what Ray itself asks for
        return tuple(sorted((what, amount) for what, amount in wanted.items() if amount > 0))

    @property
    def placed(self) -> bool:
        """Is the bird placed by what nodes offer (P2), not by the ring alone?"""
        if self.num_cpus > 0 or self.num_gpus > 0 or self.memory > 0 or self.accelerator_type or self.label_selector:
            return True
        return any(amount > 0 for _, amount in self.resources)


def interleaved(options: Options) -> int:
    """How many methods of a bird with `async def` methods may be under way at a time."""
    return options.max_concurrency if options.max_concurrency > 1 else 1000


@lru_cache(maxsize=256)
def brought(runtime_env: str) -> Mapping[str, Any]:
    """What a starter brought along, from `Spec.runtime_env`."""
    return MappingProxyType(json.loads(runtime_env))


class Spec(NamedTuple):
    """What was asked for at `start`. `args` is the pickle of `(args, kwargs)`; no nest ever unpickles it (S5)."""

    module: str
    qualname: str
    code: str  # digest of the pickled class
    args: bytes
    options: Options
    runtime_env: str | None  # JSON, as Ray serialises it, of whoever started the bird (V3)
    stamp: Stamp
    request_id: str  # tells a repeated request from a second start

    def same_bird(self, other: Spec) -> bool:
        """Do both ask for the same class with the same arguments? Code bytes are not compared (S5)."""
        return (self.module, self.qualname, self.args) == (other.module, other.qualname, other.args)

    @property
    def brought(self) -> Mapping[str, Any]:
        """What the starter brought along: `env` (its runtime_env), `job`, `path`, and `async`."""
        return brought(self.runtime_env) if self.runtime_env else {}

    @property
    def is_async(self) -> bool:
        """Does the class have `async def` methods?"""
        return bool(self.brought.get("async"))

    def stamped(self, stamp: Stamp) -> Spec:
        return Spec(self.module, self.qualname, self.code, self.args, self.options, self.runtime_env, stamp, self.request_id)

    @property
    def class_name(self) -> str:
        return f"{self.module}.{self.qualname}"


class Status(NamedTuple):
    """What the nest that holds a dot says of it (S6). The later by (incarnation, nest life, sequence) is kept."""

    incarnation: int
    life: Life
    sequence: int
    state: str  # pending, starting, running, moving, restarting, failed
    host: str = ""  # where to call it: the name of the host's Ray actor
    restarts: int = 0  # crashes over its whole life
    crashes: int = 0  # crashes in a row, without `healthy_after` between them
    error: str = ""  # the last one, with its traceback
    reason: str = ""  # why it is pending
    address: str = ""  # where its host listens, besides Ray

    @property
    def order(self) -> tuple[int, Life, int]:
        return (self.incarnation, self.life, self.sequence)


class NodeRecord(NamedTuple):
    """What a nest says of its node: fixed for a nest life, so equal views have equal rings."""

    life: Life
    cpus: float
    resources: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""  # of the nest's member in the failure detector, host:port


class Route(NamedTuple):
    """Where a bird's life can be called."""

    name: Name
    dot: Dot
    incarnation: int
    node: str
    host: str
    address: str = ""  # where the host listens, besides Ray: `ip:port name of its Unix socket`
    is_async: bool = False  # the bird has `async def` methods, and may be called back (C4)


@dataclass(frozen=True, slots=True)
class BirdInfo:
    """What a nest's replica says of one bird.

    `state` is `pending`, `starting`, `running`, `moving`, `restarting` or `failed`; `node_id` is the node that holds it, or
    that should; `last_error` has the remote traceback; `reason` says why it is pending. `path` is of the process that asks, and only in
    what `info` returns: by which way its calls of the bird go, `"unix"`, `"tcp"` or `"ray"`; `None` before the first.
    """

    name: Any
    node_id: str | None
    state: str
    incarnation: int
    restarts: int
    last_error: str
    reason: str
    light: bool
    path: str | None = field(default=None, compare=False)
    class_name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class NestInfo:
    """A nest in the view of the nest asked: `weight` in points of the ring, `share` of the ring (0 to 1), birds it holds."""

    node_id: str
    address: str
    weight: int
    birds: int
    share: float


class Candidate(NamedTuple):
    """A nest in a bird's preference list.

    `weight` is in points of the ring. `holds` is what it has of the bird: the state of a life, `"record"` for what a life handed over, or
    nothing. `lacks` says, of a bird with demands, what the node could not offer it.
    """

    node_id: str
    weight: int
    holds: str
    lacks: str


class Explanation(NamedTuple):
    """Why a bird is where it is, or why it is nowhere.

    `owner` is the node that should run it, `candidates` the whole preference list, the first choice first. `reasons` are sentences, in the
    order in which one follows on another. `told_by` is the node whose nest says so: the owner's, where that could be asked.
    """

    bird: BirdInfo
    owner: str | None
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    told_by: str


class Running(NamedTuple):
    """A method of a bird that is under way.

    `seconds` is for how long; `waiting` are the names of the birds that wait for it, outermost first; `stack` is where its code is now, as
    a traceback has it.
    """

    method: str
    seconds: float
    waiting: tuple[Any, ...]
    stack: str


class BirdStack(NamedTuple):
    """What a bird does right now, as its process says: the methods under way, the oldest first, and how many messages wait for their turn
    (`queue`; what comes over Ray is not counted).
    """

    node_id: str
    pid: int
    state: str
    queue: int
    running: tuple[Running, ...]
