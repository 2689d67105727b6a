"""Deliberate bugs in the core, each of which the simulator has to catch: what checks nothing would pass them all.

Most are a switch of the abstract model the rules were checked with: a rule read in its simplest way, or left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from flock_ray.core import aworset, barrier, handover, holds, inbox, journal, membership, registry, replica, supervision, sync
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import messages as msg
from flock_ray.core.aworset import Context
from flock_ray.core.membership import Condition
from flock_ray.specs import Dot
from tests.support.sim import MIXES, Violation, World

SEEDS = 100  # at most, of each of the mutant's mixes; most die within ten


def join_ignores_the_context(patch):
    whole = aworset.AWORSet._join_key
    patch.setattr(aworset.AWORSet, "_join_key", lambda self, key, theirs, context: whole(self, key, theirs, set()))


def no_barrier(patch):
    patch.setattr(barrier.Barrier, "permits", lambda self, name: True)


def hatch_on_silence(patch):
    def permits(self, name):
        return all(report.has_record for report in self.reports.get(name, {}).values())

    patch.setattr(barrier.Barrier, "permits", permits)


def holds_are_not_reported(patch):
    patch.setattr(holds.Holds, "of", lambda self, name: [])


def records_are_no_holds(patch):
    whole = holds.Holds.of
    patch.setattr(holds.Holds, "of", lambda self, name: [hold for hold in whole(self, name) if hold.alive])


def fetched_at_first_sight(patch):
    def permits(self, name):
        return all(self.cleared(life, name) for life in self.members())

    patch.setattr(barrier.Barrier, "permits", permits)


def a_verdict_voids_nothing(patch):
    patch.setattr(barrier.Barrier, "void", lambda self, life: None)


def answers_are_good_for_every_view(patch):
    """The echo of the view's number is not looked at, nor whether an older answer overtook."""

    def got(self, envelope, answer):
        nest = self._nest
        if envelope.accepts and envelope.sender in nest.membership.view:
            nest.mark(nest.barrier.take(envelope.sender, answer))
            nest.mark(nest.waiting)

    patch.setattr(inbox.Inbox, "_on_BarrierAnswer", got)
    patch.setattr(barrier.Barrier, "void", lambda self, life: None)


def dead_at_the_first_word(patch):
    """A dead nest is taken for a dead node (M5)."""

    def dying(self, life):
        peer = self.peers.get(life)
        if peer is not None and peer.condition is Condition.ALIVE:
            self._dead(peer, 0.0)
        return False

    patch.setattr(membership.Membership, "dying", dying)


def an_old_life_is_dropped_when_the_new_one_is_heard(patch):
    patch.setattr(membership.Membership, "_successor_synced", lambda self, peer: True)


def ready_without_the_others(patch):
    def become(self, now):
        self.ready = self.ready or self._alone_at is not None

    patch.setattr(membership.Membership, "_become_ready", become)


def admitted_unsynced(patch):
    def target(self):
        return frozenset({self.me, *self.living()})

    patch.setattr(membership.Membership, "target", target)


def dots_are_used_again(patch):
    def add(self, name, spec, code, wall):
        self._counter = self._counter % 2 + 1
        dot = Dot(self.me, self._counter)
        if dot in self.replica.birds.context:
            self.replica.birds.context.forget(self.me)
        self.changed(self.replica.add(name, dot, spec, code))
        return dot

    patch.setattr(registry.Registry, "add", add)


def removals_are_forgotten_in_deltas(patch):
    whole = aworset.AWORSet.delta_of

    def delta_of(self, changes):
        delta = whole(self, changes)
        delta.context = {dot for pairs in delta.entries.values() for dot, _ in pairs}
        return delta

    patch.setattr(aworset.AWORSet, "delta_of", delta_of)
    patch.setattr(aworset.AWORSet, "delta_against", lambda self, part: aworset.Delta())
    patch.setattr(sync.Sync, "begin", lambda self, peer, exchange: None)


def the_context_comes_with_part_of_the_buckets(patch):
    whole = aworset.AWORSet.join_part

    def join_part(self, part):
        changes = whole(self, part)
        self.context.merge(part.context)
        return changes

    patch.setattr(aworset.AWORSet, "join_part", join_part)


def the_record_goes_when_it_is_fetched(patch):
    whole = handover.Handover._answer_release

    def answer(self, envelope, release):
        whole(self, envelope, release)
        if release.dot in self._nest.holds.records:
            self.drop_record(release.name, release.dot)

    patch.setattr(handover.Handover, "_answer_release", answer)


def adopted_birds_are_forgotten(patch):
    patch.setattr(registry.Registry, "_adopt", lambda self, adopted: None)


def an_exit_removes_the_name(patch):
    def left(self, life):
        self._nest.holds.end(life)
        self._nest.handover.answer_askers(life)

    patch.setattr(supervision.Supervision, "_left", left)


def a_crash_is_forgotten(patch):
    patch.setattr(supervision.Supervision, "crashed", lambda self, event: None)


def a_stop_ends_nothing(patch):
    patch.setattr(registry.Registry, "_reap", lambda self, name: None)


def a_kept_life_is_not_raised(patch):
    patch.setattr(supervision.Supervision, "raise_incarnation", lambda self, life, record: None)


def code_is_never_asked_for(patch):
    patch.setattr(registry.Registry, "_ask_code", lambda self: None)
    patch.setattr(replica.Replica, "take_code", lambda self, code: None)


def those_that_nobody_has_to_clear_wait(patch):
    whole = registry.Registry.mark_cleared
    patch.setattr(registry.Registry, "mark_cleared", lambda self: whole(self) if len(self.membership.view) > 1 else None)


def a_name_without_demands_counts_as_mine(patch):
    """Whoever it belongs to by the ring: found by a hostile reader, who saw two lives in a whole cluster."""
    whole = barrier.Barrier.placement_changed

    def placement_changed(self):
        kept = {life: (set(clearance.placed), set(clearance.lost)) for life, clearance in self.clearances.items()}
        changed = whole(self)
        free = {name for name in changed if name not in self._table}
        for life, (placed, lost) in kept.items():
            self.clearances[life].placed |= placed & free
            self.clearances[life].lost -= free - lost
        return changed

    patch.setattr(barrier.Barrier, "placement_changed", placement_changed)


def nothing_is_written(patch):
    """The journal is empty."""
    patch.setattr(replica.Replica, "unwritten", lambda self: [])


def contexts_are_read_first(patch):
    """A context says of what is still to be read that it was removed."""
    whole = journal.Reader.read

    def read(self, piece):
        for entry in journal.unpack(piece):
            if isinstance(entry, Context):
                self._replica.merge_context(entry)
        whole(self, piece)

    patch.setattr(journal.Reader, "read", read)


def what_was_written_is_deleted_before_the_copy_is_whole(patch):
    whole = World._do_Write

    def write(self, node, nest, effect):
        whole(self, node, nest, effect)
        if node.copying is not None:
            del node.journal[: node.outdated]
            node.outdated = 0

    patch.setattr(World, "_do_Write", write)


def the_last_view_is_forgotten(patch):
    """A nest boots alone although those that died with it are coming back."""
    patch.setattr(membership.Membership, "restored", lambda self, view: [])


def a_view_is_written_before_the_nest_acts(patch):
    """Found here, when the simulator remembered whom a node had known: a nest that dies twice while all boot forgot the others."""
    whole = registry.Registry.handle_all

    def handle_all(self, events, now):
        effects = whole(self, events, now)
        return effects if self._boot is not None else [do.Write((self.membership.view,)), *effects]

    patch.setattr(registry.Registry, "handle_all", handle_all)


def adopted_birds_get_new_dots(patch):
    whole = registry.Registry._adopt

    def adopt(self, adopted):
        dot = self.add(adopted.name, adopted.spec, adopted.code, 0)
        whole(self, replace(adopted, dot=dot))

    patch.setattr(registry.Registry, "_adopt", adopt)


def hosts_live_on_without_a_nest(patch):
    """Their patience is not looked at: as after a SIGSTOP, before it was."""
    patch.setattr(World, "_impatient", lambda self, node, life: None)


def who_is_dying_has_answered(patch):
    """A word of the detector is taken for the answer that it holds nothing (M2)."""

    def members(self):
        peers = self._membership.peers
        return [life for life in self._membership.view if life in peers and peers[life].condition is Condition.ALIVE]

    patch.setattr(barrier.Barrier, "members", members)


def a_record_goes_before_it_is_fetched(patch):
    whole = supervision.Supervision._over

    def over(self, life, state, handed_over):
        whole(self, life, state, handed_over)
        if life.dot in self._nest.holds.records:
            self._nest.handover.drop_record(life.name, life.dot)

    patch.setattr(supervision.Supervision, "_over", over)


def an_exit_removes_the_other_dots_too(patch):
    whole = supervision.Supervision._left

    def left(self, life):
        self._nest.remove(life.name, [dot for dot, _ in self._nest.replica.records(life.name)])
        whole(self, life)

    patch.setattr(supervision.Supervision, "_left", left)


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (join_ignores_the_context, "all calls"),
    (no_barrier, "moves all"),
    (hatch_on_silence, "moves all"),
    (holds_are_not_reported, "moves all"),
    (records_are_no_holds, "moves all"),
    (fetched_at_first_sight, "moves all"),
    (a_verdict_voids_nothing, "flap split all moves"),
    (answers_are_good_for_every_view, "flap split moves all churn"),
    (dead_at_the_first_word, "nests all"),
    (an_old_life_is_dropped_when_the_new_one_is_heard, "nests all"),
    (ready_without_the_others, "all nests moves"),
    (admitted_unsynced, "moves all split"),
    (dots_are_used_again, "calls all"),
    (removals_are_forgotten_in_deltas, "calls all"),
    (the_context_comes_with_part_of_the_buckets, "all moves split"),
    (the_record_goes_when_it_is_fetched, "moves all"),
    (adopted_birds_are_forgotten, "nests"),
    (an_exit_removes_the_name, "calls"),
    (a_crash_is_forgotten, "calls"),
    (a_stop_ends_nothing, "calls"),
    (a_kept_life_is_not_raised, "flap split all"),
    (code_is_never_asked_for, "calls"),
    (those_that_nobody_has_to_clear_wait, "last"),
    (a_name_without_demands_counts_as_mine, "again"),
    (nothing_is_written, "blackout"),
    (contexts_are_read_first, "blackout nests"),
    (what_was_written_is_deleted_before_the_copy_is_whole, "blackout"),
    (the_last_view_is_forgotten, "blackout"),
    (a_view_is_written_before_the_nest_acts, "blackout"),
    (adopted_birds_get_new_dots, "nests"),
    (hosts_live_on_without_a_nest, "nests all"),
    (who_is_dying_has_answered, "nests all flap"),
    (a_record_goes_before_it_is_fetched, "moves all"),
    (an_exit_removes_the_other_dots_too, "all calls"),
]


@pytest.mark.parametrize(("bug", "mixes"), MUTANTS, ids=[bug.__name__ for bug, _ in MUTANTS])
def test_the_simulator_catches(bug, mixes, monkeypatch):
    bug(monkeypatch)
    for seed in count():
        assert seed < SEEDS, f"{bug.__name__} lived through {SEEDS} schedules of each of {mixes}"
        for mix in mixes.split():
            try:
                World(MIXES[mix], seed).play()
            except (Violation, ValueError, KeyError, AttributeError):
                return


def test_events_of_the_core_are_all_handled():
    """A handler that is missing would be found only when its message comes."""
    for union, taker in ((ev.Event, registry.Registry), (msg.Body, inbox.Inbox)):
        for kind in union.__args__:
            assert kind is msg.Relay or hasattr(taker, f"_on_{kind.__name__}")
