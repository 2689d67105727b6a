"""Who may hatch: what the other nests of the view have said of the names this nest owns (H1, M4).

A member *clears* this nest's names by an answer that carries its ring: it agrees on all names that both rings give to this nest, known
or yet to come, and reports which of them it holds. An answer stays good across views in which this nest keeps the name and neither
dropped the other, so the rings of later views are kept beside it, and a name is cleared while all of them agree.

Names placed by resources have no arcs: there agreement is name by name, and the one that loses such a name forgets its clearance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flock_ray.core.arcs import Arc, intersection
from flock_ray.core.membership import Membership
from flock_ray.core.messages import BarrierAnswer, Released
from flock_ray.core.ring import Ring, ring_from
from flock_ray.specs import Dot, Life, Name


@dataclass(slots=True)
class Clearance:
    """What one member's latest answer is good for."""

    rings: list[Ring]  # the answerer's, and of every view adopted here since
    placed: set[Name]  # of the names with demands, those it agreed on
    lost: set[Name] = field(default_factory=set)  # names that were placed elsewhere since: arcs say nothing of them
    current: bool = True  # given for the view that is adopted now, by a nest with the same ring


@dataclass(slots=True)
class Report:
    """A hold at another nest, of a name this nest owns."""

    incarnation: int
    alive: bool
    fetched: Released | None = None
    has_record: bool = False  # fetched: it released this incarnation and we have what it handed over


class Barrier:
    """The answers of the view's other members.

    Args:
        owns: does this nest own a name in its view, now?
    """

    def __init__(self, membership: Membership, owns: Callable[[Name], bool]) -> None:
        self.clearances: dict[Life, Clearance] = {}
        self.reports: dict[Name, dict[tuple[Life, Dot], Report]] = {}
        self._membership = membership
        self._owns = owns
        self._table: dict[Name, str | None] = {}
        self._unanimous: bool | None = None  # `None`: not known

    # The view and the placement change

    def adopted(self, old: frozenset[Life]) -> set[Name]:
        """A view was adopted. Returns the names whose reports changed."""
        view, ring = self._membership.view, self._membership.placement.ring
        self._unanimous = None
        for life in list(self.clearances):
            clearance = self.clearances[life]
            if life not in view or life not in old:
                del self.clearances[life]
            else:
                clearance.current = False
                if ring not in clearance.rings:
                    clearance.rings.append(ring)
        touched = set()
        for name in list(self.reports):
            keep = {key: report for key, report in self.reports[name].items() if key[0] in view} if self._owns(name) else {}
            if len(keep) != len(self.reports[name]):
                touched.add(name)
                self._set(name, keep)
        self.placement_changed()
        return touched

    def placement_changed(self) -> set[Name]:
        """The table of placed names may have changed. Returns the names whose owner did; if any, the view's number must grow."""
        table = dict(self._membership.placement.table())
        if table == self._table:
            return set()
        changed = {name for name in table.keys() | self._table.keys() if table.get(name, "") != self._table.get(name, "")}
        self._table, self._unanimous = table, None
        me, ring = self._membership.me.node, self._membership.placement.ring
        elsewhere = {name for name in changed if (table[name] if name in table else ring.owner(name)) != me}
        for clearance in self.clearances.values():
            clearance.placed -= elsewhere
            clearance.lost |= elsewhere
        for name in elsewhere:
            self.reports.pop(name, None)
        return changed

    # Answers

    def void(self, life: Life) -> None:
        """That nest's view lacks this one: whatever it said before is void (M4)."""
        if self.clearances.pop(life, None) is not None:
            self._unanimous = None

    def take(self, life: Life, answer: BarrierAnswer) -> set[Name]:
        """A valid answer has come. Returns the names to look at: those reported now or before."""
        before = self.clearances.get(life)
        placement = self._membership.placement
        ring = ring_from(answer.weights)
        mine = {name for name in answer.placed if self._owns(name)}
        lost = {name for name, node in placement.table().items() if node != self._membership.me.node} | answer.elsewhere
        same = ring == placement.ring
        new = Clearance([ring] if same else [ring, placement.ring], mine, lost, same)
        held: dict[Name, dict[tuple[Life, Dot], Report]] = {}
        for hold in answer.held:
            held.setdefault(hold.name, {})[(life, hold.dot)] = Report(hold.incarnation, hold.alive)
        self.clearances[life], self._unanimous = new, None
        touched = held.keys() | {name for name, reports in self.reports.items() if any(key[0] == life for key in reports)}
        for name in touched:
            if before is not None and self._agreed(before, name):
                continue  # what has been pulled or reported since is later than this answer
            others = {key: report for key, report in self.reports.get(name, {}).items() if key[0] != life}
            if self._owns(name) and self._agreed(new, name):
                others.update(held.get(name, {}))
            self._set(name, others)
        return touched

    def _set(self, name: Name, reports: dict[tuple[Life, Dot], Report]) -> None:
        if reports:
            self.reports[name] = reports
        else:
            self.reports.pop(name, None)

    def drop_report(self, name: Name, life: Life, dot: Dot) -> None:
        self._set(name, {key: report for key, report in self.reports.get(name, {}).items() if key != (life, dot)})

    # Questions

    def members(self) -> Iterable[Life]:
        return (life for life in self._membership.view if life != self._membership.me)

    @property
    def unanimous(self) -> bool:
        """Has every member cleared all that this nest owns, known or yet to come? It nearly always has: no name need be looked at."""
        if self._unanimous is None:
            self._unanimous = not self._table and all(
                (clearance := self.clearances.get(life)) is not None and clearance.current and not clearance.lost for life in self.members()
            )
        return self._unanimous

    def unanswered(self) -> list[Life]:
        """The members that have to be asked: their ring is not known to be ours, or they did not agree on a placed name."""
        if self.unanimous:
            return []
        me = self._membership.me.node
        mine = {name for name, node in self._table.items() if node == me}
        return [
            life
            for life in self.members()
            if (clearance := self.clearances.get(life)) is None
            or not clearance.current
            or not mine <= clearance.placed
            or any(name not in self._table and self._owns(name) for name in clearance.lost)
        ]

    def cleared(self, life: Life, name: Name) -> bool:
        clearance = self.clearances.get(life)
        return clearance is not None and self._agreed(clearance, name)

    def _agreed(self, clearance: Clearance, name: Name) -> bool:
        if name in self._table:
            return name in clearance.placed
        me = self._membership.me.node
        return name not in clearance.lost and all(ring.owner(name) == me for ring in clearance.rings)

    def cleared_arcs(self) -> list[Arc]:
        """Where all members have cleared what is not placed by demands, but for what they said of single names."""
        me = self._membership.me.node
        arcs = self._membership.placement.ring.arcs(me)
        for life in self.members():
            clearance = self.clearances.get(life)
            if clearance is None:
                return []
            for ring in clearance.rings:
                if ring != self._membership.placement.ring:
                    arcs = intersection(arcs, ring.arcs(me))
        return arcs

    def permits(self, name: Name) -> bool:
        """H1: every other member has answered, and nobody holds any dot of the name except records already fetched."""
        reports = self.reports.get(name)
        if reports and not all(report.has_record for report in reports.values()):
            return False
        return self.unanimous or all(self.cleared(life, name) for life in self.members())
