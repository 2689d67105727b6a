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


FIVE = replace(MIXES["quiet"], nodes=5, up=4)


def lonely_world(then):
    """Node 3 is cut off from 0, 1 and 2, where all birds are stopped and forgotten; node 4 joins its side. `then` happens there."""
    world = World(FIVE, 5, config=SHORT)
    world.run(5.0)
    world.calming = True
    for _ in range(6):
        world.fault("start")
    world.run(world.time + 5.0)
    world.cuts = {(i, j) for i in range(5) for j in range(5) if (i < 3) != (j < 3)}
    world.run(world.time + 10.0)
    for name in list(world.nodes[0].nest.replica):
        world._ask("stop", world.nodes[0], name, lambda r, name=name: Stop(r, name))
    world.boot(world.nodes[4])
    world.run(world.time + 10.0)
    assert len(world.nodes[4].nest.replica) > 0, "the newcomer has what the lonely side has"
    then(world)
    world.run(world.time + 70.0)
    world.calm()
    return world


def restart_nest(world, node):
    node.nest = None
    world._back(node, node.life)


def bury(node, world):
    node.alive, node.nest = False, None
    world._end_hosts(node)


@pytest.mark.parametrize(
    "then",
    [
        lambda world: None,
        lambda world: restart_nest(world, world.nodes[3]),
        lambda world: bury(world.nodes[3], world),
    ],
    ids=["both stay", "the one that was cut off restarts", "only the newcomer stays"],
)
def test_who_joined_a_side_that_was_away_for_long_brings_nothing_back_either(then):
    world = lonely_world(then)
    assert world.fresh_starts >= 1
    assert all(len(node.nest.replica) == 0 for node in world.nodes if node.alive), "what was stopped, and forgotten, came back"
