"""H4 and the promises of a whole and of a healed cluster, in 2,000 seeded schedules of the real core (tests/support/sim.py)."""

import pytest

from flock_ray.core import registry
from tests.support.sim import MIXES, SCHEDULES, schedule

BATCH = 20


def test_the_schedules_cover_every_mix_and_are_two_thousand():
    assert set(SCHEDULES) == set(MIXES)
    assert sum(SCHEDULES.values()) == 2000


@pytest.mark.parametrize(("mix", "first"), [(mix, first) for mix, count in SCHEDULES.items() for first in range(0, count, BATCH)])
def test_two_lives_need_a_verdict_of_death_and_calm_mends_everything(mix, first):
    checked = [schedule(mix, seed) for seed in range(first, first + BATCH)]
    assert all(world.what_is_wrong() == "" for world in checked)


def test_schedules_do_what_they_are_for():
    """A simulator that starts nothing, or moves nothing, finds nothing."""
    worlds = [schedule("moves", seed) for seed in range(40)]
    assert sum(world.moved_states for world in worlds) >= 10
    assert sum("hatch" in line for world in worlds for line in world.trace) >= 200


def test_a_seed_replays_exactly():
    assert schedule("all", 7).trace == schedule("all", 7).trace


@pytest.mark.parametrize(("mix", "first"), [("nests", 0), ("all", 0), ("moves", 0)])
def test_steps_of_one_name_come_to_the_same_end(mix, first, monkeypatch):
    """What is much is adopted and looked at in steps, between which other things happen: here each step is of one name."""
    monkeypatch.setattr(registry, "NAMES_A_STEP", 1)
    assert all(schedule(mix, seed).what_is_wrong() == "" for seed in range(first, first + BATCH))


def test_an_exit_that_no_nest_has_heard_of_goes_with_its_host():
    """Found by seed 11172: a nest died 2 ms after it was booted, and the host gave up; the simulator blamed the core."""
    schedule("blackout", 11172)


def test_a_loser_ends_where_the_winner_fits_nowhere():
    """Found by seed 11932: of two starts of a name the first has demands that no node meets: there is no owner, who would end the other."""
    schedule("last", 11932)


def test_a_bird_that_does_not_move_is_found_after_one_that_counted_for_more():
    """Found by seed 11937: a second life, of a split, had the higher status, and left while its nest was dead.

    The life that stayed was not the owner's, so nobody raised it above that status, and callers waited for a nest that was gone.
    """
    schedule("blackout", 11937)


def test_a_nest_need_not_know_what_one_has_fetched_that_joined_the_others_in_a_split():
    """Found by seed 5027: the simulator counted a copy of the other side, at a node that had booted during the split."""
    schedule("all", 5027)
