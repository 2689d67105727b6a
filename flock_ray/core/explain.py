"""Why a bird is where it is: the preference list, who holds what of it, and what stands against a move or a start, in sentences.

Rules kept here: it only reads; each sentence says what the code that decides would say (`core/registry.py`, `barrier.py`, `handover.py`,
`supervision.py`) of the same state. A nest knows its own part: the owner knows whom it waits for, so it is the one to be asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from flock_ray.core import readings
from flock_ray.core.holds import BirdLife, Phase
from flock_ray.core.records import Record
from flock_ray.core.registry import Registry
from flock_ray.specs import BirdInfo, Candidate, Dot, Explanation, Life, Name


def explain(nest: Registry, name: Name) -> Explanation | None:
    """What this nest can say of a bird; `None` if the name is not known here."""
    winner, bird = nest.replica.winner(name), readings.info(nest, name)
    if winner is None or bird is None:
        return None
    placement = nest.membership.placement
    owner = placement.owner(name)
    lacks = placement.lacks(name) if winner[1].spec.options.placed else {}
    holds = _holds(nest, name, winner[1])
    ring = placement.ring
    candidates = tuple(Candidate(node, ring.weights[node], holds.get(node, ""), lacks.get(node, "")) for node in ring.preferences(name))
    reasons = (*_where(nest, winner[1], owner, candidates), *_starts(nest, name), *_state(nest, bird, *winner), *_obstacles(nest, name))
    return Explanation(bird, owner.node if owner is not None else None, candidates, reasons, nest.me.node)


def _short(node: str) -> str:
    return node[:8]


def _holds(nest: Registry, name: Name, record: Record) -> dict[str, str]:
    """What each node has of the bird: by its status, by what others have reported to this nest as the owner, and here."""
    holds: dict[str, str] = {}
    for (life, _), report in nest.barrier.reports.get(name, {}).items():
        holds[life.node] = "a life" if report.alive else "record"
    status = record.status
    if status is not None and status.life in nest.membership.view and status.state not in ("failed", "pending"):
        holds[status.life.node] = status.state
    for dot in nest.holds.dots(name):
        held = nest.holds.lives.get(dot)
        holds[nest.me.node] = held.phase.value if held is not None else "record"
    return holds


def _where(nest: Registry, record: Record, owner: Life | None, candidates: tuple[Candidate, ...]) -> Iterator[str]:
    """Where it should be."""
    if not record.spec.options.placed:
        if owner is not None:
            yield f"Node {_short(owner.node)} owns it: it is the first in its preference list, on the ring of {_nests(nest)}."
        return
    options = record.spec.options
    wanted = ", ".join([*(f"{what} {amount:g}" for what, amount in options.demand), *(f"label {k}={v}" for k, v in options.label_selector)])
    if owner is None:
        yield f"It asks for {wanted}, and no node can give that beside what was started before it."
        return
    place = next(at for at, candidate in enumerate(candidates) if candidate.node_id == owner.node)
    after = f" after {place} that cannot" if place else ""
    yield f"It asks for {wanted}; node {_short(owner.node)} owns it: it is the first in its preference list that can give it{after}."


def _nests(nest: Registry) -> str:
    count = len(nest.membership.view)
    return "1 nest" if count == 1 else f"{count} nests"


def _starts(nest: Registry, name: Name) -> Iterator[str]:
    pairs = nest.replica.records(name)
    if len(pairs) > 1:
        yield f"It was started {len(pairs)} times on different sides; the earliest start counts, the others are given up."


def _state(nest: Registry, bird: BirdInfo, dot: Dot, record: Record) -> Iterator[str]:
    """How it is."""
    at, options, life = _short(bird.node_id or ""), record.spec.options, nest.holds.lives.get(dot)
    if bird.state == "failed":
        yield f"It has failed: it crashed more than max_restarts={options.max_restarts} times in a row; mend the cause, then restart it."
    elif bird.state == "pending":
        yield f"It is pending: {bird.reason or 'no nest has begun to start it yet'}."
    elif bird.state == "restarting":
        due = f" in {max(0.0, life.due - nest.now):.1f} s" if life is not None and life.phase is Phase.BACKOFF else ""
        yield f"It crashed on node {at} and is started again there{due}; the last error is in its info."
    elif bird.state == "starting":
        yield f"It is starting on node {at}: its process comes up, or its __init__ has not returned."
    elif bird.state == "moving":
        yield f"It is ending on node {at}, to go on where it is owned; a method may take up to stop_timeout={options.stop_timeout:g} s."
    else:
        yield f"It runs on node {at}, incarnation {bird.incarnation}."
    if life is not None and life.phase is Phase.ENDING and bird.state != "moving":
        yield f"A life of it ends on node {_short(nest.me.node)} ({life.reason})."


def _obstacles(nest: Registry, name: Name) -> Iterator[str]:
    """What keeps it from running at its owner. Only the owner knows."""
    winner = nest.replica.winner(name)
    here = [life for life in nest.holds.lives_of(name) if life.phase is not Phase.ENDING]
    owner = nest.membership.placement.owner(name)
    if winner is None or owner is None:
        return
    if owner != nest.me:
        yield from _held_for_another(here, owner)
        return
    if here:
        return
    for life in sorted(nest.barrier.members()):
        if not nest.barrier.cleared(life, name):
            answered = life in nest.barrier.clearances
            why = "sees another ring, in which this node does not own it" if answered else "has not answered yet whether it holds it"
            yield f"It is not started before every nest agrees: the nest of node {_short(life.node)} {why}."
    for (life, _), report in sorted(nest.barrier.reports.get(name, {}).items()):
        if report.has_record:
            yield f"Node {_short(life.node)} has handed it over."
        elif not winner[1].spec.options.moves and report.alive:
            yield f"Node {_short(life.node)} holds it, and keeps it until that node dies: it was started with moves=False."
        else:
            flight = nest.config.moves_in_flight
            yield f"Node {_short(life.node)} holds it and is asked to hand it over (at most moves_in_flight={flight} at a time)."


def _held_for_another(here: list[BirdLife], owner: Life) -> Iterator[str]:
    if here and here[0].spec.options.moves:
        yield f"This node holds it until node {_short(owner.node)} asks for it."
    elif here:
        yield "This node holds it and keeps it until it dies: it was started with moves=False."
