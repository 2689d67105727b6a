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
    """Found by seed 11172: a nest died 2 ms after it was booted, and the host gave up. The simulator blamed the core for the bird's return."""
    schedule("blackout", 11172)
