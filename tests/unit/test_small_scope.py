"""H1 and H4 in the small: all that can happen around two nests and one name (tests/support/scope.py)."""

from __future__ import annotations

import pytest

from tests.support.scope import FAULTS_IN_ALL, LATE, Scope, explore, runs, shallow
from tests.support.sim import Violation
from tests.unit import test_mutants as mutants

DEPTH, REST = 2, 1  # `scripts/simulate --small-scope 60` goes deeper

# Those that two nests and one name can show in so few steps.
SHOWN = [
    mutants.no_barrier,
    mutants.hatch_on_silence,
    mutants.holds_are_not_reported,
    mutants.fetched_at_first_sight,
    mutants.dead_at_the_first_word,
    mutants.an_old_life_is_dropped_when_the_new_one_is_heard,
    mutants.ready_without_the_others,
    mutants.admitted_unsynced,
    mutants.adopted_birds_are_forgotten,
    mutants.a_crash_is_forgotten,
    mutants.a_stop_ends_nothing,
    mutants.join_ignores_the_context,
]


@pytest.fixture(autouse=True)
def a_shallow_tree():
    with shallow():
        yield


def explored():
    scope = Scope()
    return explore(scope, runs(scope, FAULTS_IN_ALL, LATE), DEPTH, REST)


def test_no_interleaving_has_two_lives_and_all_come_to_rest():
    found = explored()
    print(found)
    assert found.depth == DEPTH
    assert found.states > 5_000


@pytest.mark.parametrize("bug", SHOWN, ids=[bug.__name__ for bug in SHOWN])
def test_the_small_scope_catches(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(Violation):
        explored()
