"""S2: dead nests are forgotten in the end, and who was away for too long brings nothing back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flock_ray.core.events import Stop
from tests.support.sim import CONFIG, MIXES, World

SHORT = replace(CONFIG, context_horizon=60.0)


def calm_world(mix="quiet", seed=1):
    world = World(MIXES[mix], seed, config=SHORT)
    world.run(5.0)
    world.calming = True
    return world


def test_the_ids_of_dead_nests_leave_the_context():
    world = World(replace(MIXES["churn"], weights={"start": 2, "stop": 2, "die": 2, "join": 4}, seconds=60.0), 3, config=SHORT)
    world.play()
    lives = max(node.life for node in world.nodes)
    assert lives >= 3
    world.run(world.time + 200.0)
    for node in world.nodes:
        if node.nest is not None:
            known = node.nest.replica.birds.context.lives() | set(node.nest.replica.nodes)
            used = {dot.life for name in node.nest.replica for dot, _ in node.nest.replica.records(name)}
            assert known - used <= {other.nest.me for other in world.nodes if other.nest is not None}
    assert world.what_is_wrong() == ""


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_a_nest_that_was_away_longer_than_half_the_horizon_joins_as_new(alone):
    world = calm_world()
    away, others = world.nodes[alone], [node for node in world.nodes if node.index != alone]
    for _ in range(6):
        world.fault("start")
    world.run(world.time + 5.0)
    world.cuts = {(i, j) for i in range(3) for j in range(3) if (i == alone) != (j == alone)}
    world.run(world.time + 10.0)
    for name in list(others[0].nest.replica):
        world._ask("stop", others[0], name, lambda r, name=name: Stop(r, name))
    world.run(world.time + 70.0)
    assert len(away.nest.replica) > 0
    life = away.nest.me
    world.calm()
    assert world.fresh_starts == 1
    assert away.nest.me > life
    assert all(len(node.nest.replica) == 0 for node in world.nodes), "what was stopped, and forgotten, came back"


def test_a_short_absence_throws_nothing_away():
    world = calm_world()
    world.fault("start")
    world.cuts = {(0, 1), (1, 0), (0, 2), (2, 0)}
    world.run(world.time + 15.0)
    world.calm()
    assert world.fresh_starts == 0
