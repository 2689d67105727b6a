"""What a nest can tell of birds and nests, from its replica alone: it asks nobody, so it answers on any side of a split.

What has to look at all birds comes in steps of some ms: to look at 100,000 takes half a second, in which the nest has other things to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from flock_ray.core.records import Record
from flock_ray.core.registry import NAMES_A_STEP, Registry
from flock_ray.specs import BirdInfo, Dot, Name, NestInfo

Place: TypeAlias = tuple[str, str, str, bool]  # node, host, address of the host; does the bird have `async def` methods?
Row: TypeAlias = tuple[int, Dot, int]  # which place, the dot, the incarnation


def info(nest: Registry, name: Name) -> BirdInfo | None:
    """What is known of a bird; `None` if the name is not known here."""
    winner = nest.replica.winner(name)
    return None if winner is None else _info(nest, name, winner[1])


def birds(nest: Registry, state: str | None, node: str | None, prefix: Name | None, of: str | None) -> Iterator[list[BirdInfo]]:
    """All birds that match: a state, a node, the beginning of a name (text of a str, parts of a tuple), a class. In steps."""
    for names in _steps(nest):
        found = (info(nest, name) for name in names if prefix is None or begins(name, prefix))
        yield [
            bird
            for bird in found
            if bird is not None and state in (None, bird.state) and node in (None, bird.node_id) and of in (None, bird.class_name)
        ]


def _steps(nest: Registry, length: int = NAMES_A_STEP) -> Iterator[list[Name]]:
    """The names there are now, so many at a time; what comes or goes meanwhile may be missed or be gone."""
    names = list(nest.replica)
    for first in range(0, len(names), length):
        yield names[first : first + length]


def names(nest: Registry, prefix: Name | None, of: str | None) -> Iterator[list[Name]]:
    """The names of all birds that match. In steps."""
    for some in _steps(nest):
        found = ((name, nest.replica.winner(name)) for name in some if prefix is None or begins(name, prefix))
        yield [name for name, winner in found if winner is not None and of in (None, winner[1].spec.class_name)]


def routes(nest: Registry, wanted: Iterable[Name]) -> tuple[list[Place], list[Row | None]]:
    """Where birds can be called that run: the hosts, and for each bird which of them, its dot and incarnation. `None` for the others."""
    view = nest.membership.view
    places: dict[Place, int] = {}
    rows: list[Row | None] = []
    for name in wanted:
        winner = nest.replica.winner(name)
        status = winner[1].status if winner is not None else None
        if winner is None or status is None or status.state != "running" or status.life not in view:
            rows.append(None)
        else:
            place = (status.life.node, status.host, status.address, winner[1].spec.is_async)
            rows.append((places.setdefault(place, len(places)), winner[0], status.incarnation))
    return list(places), rows


def is_expected(nest: Registry, name: Name) -> bool:
    """Runs a bird of this name, or may it soon, as far as is known here?"""
    winner = nest.replica.winner(name)
    return winner is not None and (winner[1].status is None or winner[1].status.state != "failed")


def begins(name: Name, prefix: Name) -> bool:
    """Does a name begin with this: a str with a str, bytes with bytes, a tuple with the parts of a tuple?"""
    if isinstance(prefix, tuple):
        return isinstance(name, tuple) and name[: len(prefix)] == prefix
    if isinstance(prefix, str):
        return isinstance(name, str) and name.startswith(prefix)
    if isinstance(prefix, bytes):
        return isinstance(name, bytes) and name.startswith(prefix)
    return name == prefix


Tally: TypeAlias = Counter[tuple[str, str]]  # how many birds by node (empty: none can run them) and state


def tally(nest: Registry) -> Iterator[Tally]:
    """How many birds live on each node, or should, and in which state: counts of some birds at a time."""
    view = nest.membership.view
    for names in _steps(nest, 10 * NAMES_A_STEP):  # a tenth of what `info` costs
        counts: Tally = Counter()
        for name in names:
            pairs = nest.replica.records(name)
            status = pairs[0][1].status if len(pairs) == 1 else None
            if status is not None and status.state == "running" and status.life in view:  # nearly always
                counts[status.life.node, "running"] += 1
            elif (bird := info(nest, name)) is not None:
                counts[bird.node_id or "", bird.state] += 1
        yield counts


def own_states(nest: Registry, counts: Tally) -> Counter[str]:
    """How many birds are in each state, of those that live here or should: each bird is counted by one nest.

    Args:
        counts: the sum of what `tally` gives.
    """
    first = min(nest.membership.view).node  # counts those that fit nowhere
    own: Counter[str] = Counter()
    for (node, state), count in counts.items():
        if (node or first) == nest.me.node:
            own[state] += count
    return own


def nests(nest: Registry, counts: Tally) -> list[NestInfo]:
    """The nests of this nest's view, by node id.

    Args:
        counts: the sum of what `tally` gives.
    """
    ring = nest.membership.placement.ring
    held: Counter[str] = Counter()
    for (node, _), count in counts.items():
        held[node] += count

    def rows() -> Iterator[NestInfo]:
        for life in sorted(nest.membership.view):
            record = nest.replica.nodes.get(life)
            address = record.address if record is not None else ""
            yield NestInfo(life.node, address, ring.weights.get(life.node, 0), held[life.node], ring.share(life.node))

    return list(rows())


def _info(nest: Registry, name: Name, record: Record) -> BirdInfo:
    spec, status = record.spec, record.status
    placement = nest.membership.placement
    owner = placement.owner(name)
    state, reason, node = "pending", "", owner.node if owner is not None else None
    if status is not None and (status.life in nest.membership.view or status.state in ("failed", "pending")):
        state, reason = status.state, status.reason
        if state not in ("failed", "pending"):
            node = status.life.node
    elif owner is None:
        reason = placement.reason(name)
    elif spec.code not in nest.replica.code:
        reason = "its code was lost with the node that accepted it; stop it and start it again"
    elif status is not None:
        reason = f"the node that held it is gone; waits for {owner.node}"
    if state == "pending" and owner is None:
        reason, node = placement.reason(name), None
    incarnation, restarts, error = (status.incarnation, status.restarts, status.error) if status else (0, 0, "")
    return BirdInfo(name, node, state, incarnation, restarts, error, reason, spec.options.light, class_name=spec.class_name)
