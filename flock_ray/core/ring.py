"""Where a name lives: an immutable consistent-hash ring over the nodes of a view, and the placement of what needs resources.

The ring is uhashring's (P1), with points that depend on a node's own CPUs alone, so that one node's weight never moves birds
between two others, and with a 64-bit BLAKE2 hash over the canonical encoding of names, equal on every machine and Python
version.

What has resource demands is placed by P2: in order of stamp, each on the first node of its preference list that still has room
(consistent hashing with bounded loads: Mirrokni, Thorup, Zadimoghaddam 2018). It is a pure function of replica and view.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from uhashring import HashRing

from flock_ray.core.arcs import CIRCLE, Arc
from flock_ray.core.replica import Replica
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, encode_name, name_hash, stable_hash

# Of 400 random clusters of four nodes of 2 CPUs, the last node to join took more than 1.15 x its ideal share in 2 % with 80
# points a CPU and in none with 160 (at most 1.12 x). More points are more even and cost more to build: a node of 64 CPUs takes
# 16 ms.
POINTS_PER_CPU = 160
POINTS_WITHOUT_CPUS = 320  # of every node, in a cluster where none ever had CPUs

# Of the walk that finds the next nodes: n nodes of equal weight are met in n ln n steps, so this is enough for far too many.
STEPS_A_NODE = 16


def _hash(key: int | str) -> int:
    """uhashring asks for points by text and for keys by whatever it was given: ours are hashed already."""
    return key if isinstance(key, int) else stable_hash(key.encode())


def points(cpus: float) -> int:
    """The points of a node on the ring: a function of its own CPUs alone. A node without CPUs has none."""
    return max(1, round(cpus * POINTS_PER_CPU)) if cpus > 0 else 0


class Ring:
    """An immutable ring. Build it with `ring_of` or `ring_from`, so that equal rings are one object.

    Args:
        weights: points by node id; nodes with none are in the cluster but own nothing.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.weights = dict(sorted(weights.items()))  # sorted: where two points collide, the last one counts
        nodes = {node: weight for node, weight in self.weights.items() if weight}
        ring = HashRing(nodes, hash_fn=_hash, vnodes=1).get_points()
        # Kept as two lists that are searched here: uhashring takes 2 us to find an owner, these 0.3 (measured).
        self._points: list[int] = [point for point, _ in ring]
        self._nodes: list[str] = [node for _, node in ring]
        self._shares: dict[str, float] | None = None
        self._arcs: dict[str, list[Arc]] = {}

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Ring) and self.weights == other.weights)

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    def owner(self, name: Name) -> str | None:
        """The node that owns a name; `None` if no node has points. It is the node of the first point behind the name's."""
        at = bisect(self._points, name_hash(name))
        if at < len(self._nodes):
            return self._nodes[at]
        return self._nodes[0] if self._nodes else None

    def arcs(self, node: str) -> list[Arc]:
        """The arcs that a node owns: `owner(name) == node` for the names in them, and no others."""
        arcs = self._arcs.get(node)
        if arcs is None:
            arcs = self._arcs[node] = self._arcs_of(node)
        return arcs

    def _arcs_of(self, node: str) -> list[Arc]:
        arcs: list[Arc] = []
        points = self._points
        owned = [at for at, each in enumerate(self._nodes) if each == node]
        pieces = [(points[at - 1] if at else 0, points[at]) for at in owned]
        if owned and owned[0] == 0:
            pieces.append((points[-1], CIRCLE))  # behind the last point the first one's node owns
        for begin, end in pieces:
            if arcs and arcs[-1][1] == begin:
                arcs[-1] = (arcs[-1][0], end)
            elif begin < end:
                arcs.append((begin, end))
        return arcs

    def owners(self, name: Name) -> list[str]:
        """The preference list: all nodes, the owner first, those without points last (by hash)."""
        return list(self.preferences(name))

    def preferences(self, name: Name) -> Iterator[str]:
        """The preference list, one by one: most often only the first is looked at.

        uhashring's own `range` copies the ring for each name: 8 ms in a cluster of 100 nodes of 64 CPUs. The walk ends early
        where a node with few points would take it around a large ring; who was not met follows by hash.
        """
        rest = dict(self.weights)
        at = bisect(self._points, name_hash(name))
        left = STEPS_A_NODE * len(rest) if self._nodes else 0
        while left and any(rest.values()):
            node = self._nodes[at % len(self._nodes)]
            if rest.pop(node, None):
                yield node
            at += 1
            left -= 1
        key = encode_name(name)
        yield from sorted(rest, key=lambda node: (not rest[node], stable_hash(key + node.encode())))

    def share(self, node: str) -> float:
        """The part of all names that a node owns: 0 to 1."""
        if self._shares is None:
            self._shares = {node: sum(end - begin for begin, end in self.arcs(node)) / CIRCLE for node in self.weights}
        return self._shares.get(node, 0.0)


@lru_cache(maxsize=8)  # 16 nodes of 64 CPUs take 16 MB a ring
def ring_from(weights: tuple[tuple[str, int], ...]) -> Ring:
    """The ring of these weights, sorted by node id; the latest ones are kept, for many names are looked up in few rings."""
    return Ring(dict(weights))


def weights_of(lives: Iterable[Life], nodes: Mapping[Life, NodeRecord], had_cpus: bool) -> dict[str, int]:
    """The points of each node of a view (P1).

    Args:
        lives: the nests of the view, at most one of each node.
        nodes: node records; a life without one has no points yet.
        had_cpus: whether any node ever offered CPUs. If none did, all weigh the same.
    """
    weights = {}
    for life in lives:
        record = nodes.get(life)
        weights[life.node] = 0 if record is None else points(record.cpus) if had_cpus else POINTS_WITHOUT_CPUS
    return weights


def ring_of(lives: Iterable[Life], nodes: Mapping[Life, NodeRecord], had_cpus: bool) -> Ring:
    """The ring of a view: of `weights_of`."""
    return ring_from(tuple(sorted(weights_of(lives, nodes, had_cpus).items())))


class Placement:
    """Who owns each name of a replica in a view: the ring for most, P2's table for what has demands.

    The table is made anew when the replica's placed birds have changed.
    """

    def __init__(self, replica: Replica, lives: frozenset[Life]) -> None:
        self.lives = lives
        self.by_node = {life.node: life for life in lives}
        self._replica = replica
        self.ring = ring_of(lives, replica.nodes, replica.had_cpus)
        self._nodes_version = replica.nodes_version
        self._version = -1
        self._table: dict[Name, str | None] = {}
        self._reasons: dict[Name, str] = {}

    def owner(self, name: Name) -> Life | None:
        """The nest that owns a name in this view; `None` where it cannot be placed: `reason` says why."""
        if self._version != self._replica.version:
            self.table()
        node = self._table[name] if self._table and name in self._table else self.ring.owner(name)
        return None if node is None else self.by_node[node]

    def reason(self, name: Name) -> str:
        """Why a name has no owner; empty if it has one."""
        if self.owner(name) is not None:
            return ""
        return self._reasons.get(name, "no node of this view has CPUs")

    def lacks(self, name: Name) -> dict[str, str]:
        """Of a name with demands: what each node lacked that could not take it, when it was its turn to be placed; else nothing."""
        for other, options, offers in _in_order(self._replica, self.by_node):
            if other == name:
                lacks = {node: offers[node].lack(options) if node in offers else "has not said what it offers" for node in self.by_node}
                return {node: lack for node, lack in lacks.items() if lack}
            node = self.table()[other]
            if node is not None:
                offers[node].take(options)
        return {}

    @property
    def outdated(self) -> bool:
        """Has the replica learnt something since by which this view's ring is another?"""
        version = self._replica.nodes_version
        if self._nodes_version != version and weights_of(self.lives, self._replica.nodes, self._replica.had_cpus) == self.ring.weights:
            self._nodes_version = version
        return self._nodes_version != version

    def table(self) -> Mapping[Name, str | None]:
        """The nodes of all names with demands."""
        if self._version != self._replica.version:
            self._version = self._replica.version
            self._table, self._reasons = place(self.ring, self._replica, self.by_node)
        return self._table


@dataclass(slots=True)
class Offer:
    """What a node has left for birds with demands, and its labels."""

    free: dict[str, float]
    labels: Mapping[str, str]

    def lack(self, options: Options) -> str:
        """Why a bird cannot be placed there; empty if it can."""
        if not _selected(self.labels, options.label_selector):
            return f"has not the labels {dict(options.label_selector)}"
        short = [(what, amount, self.free.get(what, 0.0)) for what, amount in options.demand]
        lacking = [f"{what} {left:g} of {amount:g}" for what, amount, left in short if left + 1e-9 < amount]
        return f"has left {', '.join(lacking)}" if lacking else ""

    def take(self, options: Options) -> None:
        for what, amount in options.demand:
            self.free[what] = self.free.get(what, 0.0) - amount


def place(ring: Ring, replica: Replica, by_node: Mapping[str, Life]) -> tuple[dict[Name, str | None], dict[Name, str]]:
    """Places what has demands, in order of stamp (P2).

    Returns:
        The node of each such name, `None` where it fits nowhere, and for those the reason.
    """
    table: dict[Name, str | None] = {}
    reasons: dict[Name, str] = {}
    for name, options, offers in _in_order(replica, by_node):
        table[name] = None
        for node in ring.preferences(name):
            if node in offers and not offers[node].lack(options):
                offers[node].take(options)
                table[name] = node
                break
        else:
            reasons[name] = _why_not(options, offers)
    return table, reasons


def _in_order(replica: Replica, by_node: Mapping[str, Life]) -> Iterator[tuple[Name, Options, dict[str, Offer]]]:
    """What has demands, in order of stamp, and what nodes offer: whoever iterates takes of that what he gives away."""
    birds: list[tuple[Spec, Dot, Name]] = []
    for name in set(replica.placed.values()):
        winner = replica.winner(name)
        if winner is not None and winner[1].spec.options.placed:
            birds.append((winner[1].spec, winner[0], name))
    birds.sort(key=lambda bird: (bird[0].stamp, bird[1]))
    records = {node: replica.nodes[life] for node, life in by_node.items() if life in replica.nodes}
    offers = {node: Offer({"CPU": record.cpus, **dict(record.resources)}, dict(record.labels)) for node, record in records.items()}
    for spec, _, name in birds:
        yield name, spec.options, offers


def _selected(labels: Mapping[str, str], selector: Iterable[tuple[str, str]]) -> bool:
    """Do a node's labels satisfy Ray's label selector: `v`, `!v`, `in(a,b)` or `!in(a,b)`?"""
    for key, condition in selector:
        negated = condition.startswith("!")
        wanted = condition[1:] if negated else condition
        values = [v.strip() for v in wanted[3:-1].split(",")] if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
        if (labels.get(key) in values) == negated:
            return False
    return True


def _why_not(options: Options, offers: Mapping[str, Offer]) -> str:
    if not offers:
        return "no node of this view has said what it offers yet"
    chosen = [offer.free for offer in offers.values() if _selected(offer.labels, options.label_selector)]
    if not chosen:
        return f"no node has the labels {dict(options.label_selector)}"
    short = []
    for what, amount in options.demand:
        most = max(free.get(what, 0.0) for free in chosen)
        if most + 1e-9 < amount:
            short.append(f"{what}: wants {amount:g}, the most that is free on one node is {most:g}")
    wanted = ", ".join(f"{what} {amount:g}" for what, amount in options.demand)
    return "; ".join(short) or f"no node has all of {wanted} free at once"
