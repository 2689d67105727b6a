"""Handover: how a life gets from its holder to its owner (H3). The owner pulls; the holder releases, and keeps the record until told.

    owner                                        holder
    Release(dot, incarnation, keep) ->           ends the life in good order, keeps what `hand_over` returned
                                              <- ReleaseAnswer(record | None | "now at incarnation j", entry and context of the name)
    hatches with the record; once it runs:
    Release(..., keep=False), a drop ->          forgets record or life
                                              <- ReleaseAnswer(None)
Each is repeated until it is answered; at most `moves_in_flight` at a time, of light birds so many more as they are cheaper (H5).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flock_ray.core import effects as do
from flock_ray.core import messages as msg
from flock_ray.core.barrier import Report
from flock_ray.core.holds import BirdLife, Phase
from flock_ray.specs import Dot, Life, Name

if TYPE_CHECKING:
    from flock_ray.core.registry import Registry


LIGHTER = 16  # light birds count as one that has a process of its own


@dataclass(slots=True)
class Pull:
    """A release (with `keep`) or a drop that this owner asks of a holder."""

    name: Name
    incarnation: int
    keep: bool
    weight: int
    again_at: float = 0.0
    count: int = 0


class Handover:
    """Both sides of it, for one nest."""

    def __init__(self, nest: Registry) -> None:
        self._nest = nest
        self._pulls: dict[tuple[Life, Dot], Pull] = {}
        self._queue: deque[tuple[Life, Dot]] = deque()
        self._flying: dict[tuple[Life, Dot], int] = {}  # and what each counts; in the order in which they are due again
        self._load = 0  # the sum of these

    # The holder's side

    def release(self, envelope: msg.Envelope, release: msg.Release) -> None:
        """The owner asks for a life, or that it or its record be dropped."""
        asker, dot = envelope.sender, release.dot
        accepted = asker in self._nest.membership.view
        record = self._nest.holds.records.get(dot)
        if not release.keep and accepted and record is not None and record.incarnation == release.incarnation:
            self.drop_record(release.name, dot)
        life = self._nest.holds.lives.get(dot)
        if life is not None and life.incarnation == release.incarnation:
            if life.phase is not Phase.ENDING and not self._stands(release.name) and (release.keep or accepted):
                self._nest.supervision.end(life, "moved", release.keep)
                life = self._nest.holds.lives.get(dot)
            if life is not None:
                if life.phase is Phase.ENDING:
                    life.askers[asker] = (envelope, release)
                return  # it is answered when it has ended, or asked again when the views agree
        self._answer_release(envelope, release)

    def _stands(self, name: Name) -> bool:
        """Who counts itself the owner does not release."""
        return self._nest.membership.ready and self._nest.owns(name)

    def _answer_release(self, envelope: msg.Envelope, release: msg.Release) -> None:
        life, record = self._nest.holds.lives.get(release.dot), self._nest.holds.records.get(release.dot)
        now = None
        if life is not None:
            now = life.incarnation
        elif record is not None and record.incarnation != release.incarnation:
            now = record.incarnation
        content = self._nest.replica.content([release.name])
        kept = record if now is None else None
        self._nest.reply(envelope, msg.ReleaseAnswer(release.name, release.dot, release.incarnation, kept, now, content))

    def answer_askers(self, life: BirdLife) -> None:
        """A life has ended: tells those who wait for that."""
        for envelope, release in life.askers.values():
            self._answer_release(envelope, release)
        life.askers.clear()
        self._nest.mark([life.name])
        self._nest.mark_crowded()

    def drop_record(self, name: Name, dot: Dot) -> None:
        """Forgets a record, here and in its host."""
        self._nest.holds.drop(name, dot)
        self._nest.effect(do.Forget(dot))

    # The owner's side

    def plan(self, name: Name) -> None:
        """Looks at what others hold of a name this nest owns, and at what is to be asked of them."""
        reports = self._nest.barrier.reports.get(name)
        if not reports:
            return
        for (holder, dot), report in reports.items():
            keep = self._wants(name, holder, dot, report) if self._nest.barrier.cleared(holder, name) else None
            key = (holder, dot)
            pull = self._pulls.get(key)
            if keep is None:
                self._drop(key)
            elif pull is None or (pull.incarnation, pull.keep) != (report.incarnation, keep):
                if pull is None:
                    self._queue.append(key)
                else:  # it waits already, or another word flies: this one is due at once
                    self._land(key)
                    self._queue.appendleft(key)
                self._pulls[key] = Pull(name, report.incarnation, keep, self._weight(name))

    def _weight(self, name: Name) -> int:
        winner = self._nest.replica.winner(name)
        return 1 if winner is not None and winner[1].spec.options.light else LIGHTER

    def _drop(self, key: tuple[Life, Dot]) -> None:
        self._pulls.pop(key, None)
        self._land(key)

    def _land(self, key: tuple[Life, Dot]) -> None:
        self._load -= self._flying.pop(key, 0)

    def _wants(self, name: Name, holder: Life, dot: Dot, report: Report) -> bool | None:
        """What to ask of a holder: release it with its state (True), drop it (False), or nothing now (None)."""
        winner = self._nest.replica.winner(name)
        here = [life for life in self._nest.holds.lives_of(name) if life.phase is not Phase.ENDING]
        lost = self._nest.replica.knows(dot) and (winner is None or winner[0] != dot)
        if lost:
            return False
        if here:
            # What was fetched is needed at the holder until the life that takes it over runs.
            return None if report.has_record and any(life.phase is not Phase.RUNNING for life in here) else False
        if report.has_record:
            return None
        if winner is not None and not winner[1].spec.options.moves and report.alive:
            alive = [(r.incarnation, life) for (life, d), r in self._nest.barrier.reports[name].items() if r.alive and d == dot]
            status = winner[1].status
            failed = status is not None and status.state == "failed"
            ended = status is not None and (status.state, status.life, status.incarnation) == ("pending", holder, report.incarnation)
            if not failed and not ended:
                return None if (report.incarnation, holder) == max(alive) else False
        return True

    def run(self) -> None:
        """Sends what is due."""
        while (due := next(iter(self._flying), None)) is not None and self._pulls[due].again_at <= self._nest.now:
            self._send_pull(due)
        while self._queue and self._load < LIGHTER * self._nest.config.moves_in_flight:
            key = self._queue.popleft()
            if key in self._pulls and key not in self._flying:
                self._send_pull(key)

    def _send_pull(self, key: tuple[Life, Dot]) -> None:
        holder, dot = key
        pull = self._pulls[key]
        if key not in self._nest.barrier.reports.get(pull.name, {}) or not self._nest.barrier.cleared(holder, pull.name):
            self._drop(key)  # another view was adopted, or the holder does not agree any more
            return
        self._land(key)
        self._flying[key] = pull.weight  # the last to be due
        self._load += pull.weight
        pull.again_at = self._nest.now + self._nest.config.retry_interval
        self._nest.send(holder, msg.Release(pull.name, dot, pull.incarnation, pull.keep), pull.count)
        pull.count += 1

    def answered(self, envelope: msg.Envelope, answer: msg.ReleaseAnswer) -> None:
        """A holder has answered."""
        holder, name, dot = envelope.sender, answer.name, answer.dot
        self._nest.joined(self._nest.replica.join_content(answer.content))
        self._drop((holder, dot))
        self._nest.mark([name])
        report = self._nest.barrier.reports.get(name, {}).get((holder, dot))
        if report is None or report.incarnation != answer.incarnation:
            return
        if answer.now is not None:
            report.incarnation, report.has_record = answer.now, False
        elif answer.record is not None:
            report.has_record, report.alive = True, False
            self._nest.holds.keep(name, answer.record)  # also for a dot not known here yet
        else:
            self._nest.barrier.drop_report(name, holder, dot)

    def view_changed(self) -> None:
        """Who has left the view is not asked any more."""
        for key in [key for key in self._pulls if key[0] not in self._nest.membership.view]:
            self._drop(key)

    def wake_at(self) -> float:
        due = next(iter(self._flying), None)
        return float("inf") if due is None else self._pulls[due].again_at
