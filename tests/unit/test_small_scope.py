"""H1 and H4 in the small: all that can happen around two nests and one name (tests/support/scope.py)."""

from __future__ import annotations

import pytest

from flock_ray.core.ring import ring_from
from tests.support.scope import NAME, Scope, explore

OWNER = int(ring_from((("n0", 16), ("n1", 16))).owner(NAME)[1:])  # when both are there
OTHER = 1 - OWNER
BUDGET = {"start": 1, "stop": 1, "crash": 1, "nest": 1, "cut": 1}
STEPS, DEPTH = 18, 2


def alone() -> Scope:
    """The bird runs at the one nest there is, and the nest that will own it is to come."""
    scope = Scope({**BUDGET, "start": 2}, up=(OTHER,))
    while not scope.sides[OTHER].nest.membership.ready:
        scope.goes_on()
    scope.act("start", OTHER)
    for _ in range(4):
        scope.goes_on()
    assert [len(side.hosts) for side in scope.sides] == [int(at == OTHER) for at in (0, 1)]
    return scope


def joining() -> Scope:
    scope = alone()
    scope.act("back", OWNER)
    return scope


def together() -> Scope:
    """The bird has moved to its owner."""
    scope = joining()
    while not any(host.running for host in scope.sides[OWNER].hosts.values()):
        scope.goes_on()
    return scope


def owner_lost() -> Scope:
    """The owner's nest has died, and its node is there."""
    scope = together()
    for _ in range(10):
        scope.goes_on()
    scope.act("nest", OWNER)
    return scope


def split() -> Scope:
    scope = together()
    scope.act("cut", 0)
    return scope


@pytest.mark.parametrize("root", [joining, together, owner_lost, split])
def test_no_interleaving_has_two_lives(root):
    found = explore(root(), STEPS, DEPTH)
    print(f"{root.__name__}: {found.states} states, {found.actions} actions, depth {found.depth} from each of {STEPS} states of a run")
    assert found.states > 500
