"""S2 over months: what a nest keeps of others is bounded, however many lives of nests there were."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flock_ray.core.events import Stop
from flock_ray.core.membership import REMEMBERED
from flock_ray.core.replica import Replica
from tests.support.sim import CONFIG, MIXES, World

HOUR = 3_600.0
HORIZON = 6  # hours
MINUTE = 60.0
# Seldom is what a nest does again and again, or months would be made of it.
MONTHS = replace(CONFIG, context_horizon=HORIZON * HOUR, sync_interval=HOUR / 2, retry_interval=MINUTE, lookup_timeout=2 * MINUTE)
CHURN = replace(MIXES["quiet"], nodes=3, up=3, names=4, weights={"start": 2, "stop": 2})
LIVES = 2_000  # one an hour: 83 days
AWAY_EVERY = 400

# Of each hour there is one life. Three live; a nest counts from when it heard of a death; birds use the lives that added them.
IN_CONTEXT = 2 * HORIZON + 3 + CHURN.names
REMEMBERED_PEERS = (REMEMBERED + 2) * HORIZON + 3 + CHURN.names
SNAPSHOT, JOURNAL = 8_000, 150_000  # bytes: a journal is written anew after 20 pieces on average


class Months(World):
    looks_every = 4 * MINUTE


def kept_by(node):
    nest = node.nest
    return {
        "ids in the context": (len(nest.replica.birds.context.lives()), IN_CONTEXT),
        "records": (len(nest.replica), CHURN.names),
        "node records": (len(nest.replica.nodes), IN_CONTEXT),
        "peers": (len(nest.membership.peers), REMEMBERED_PEERS),
        "bytes of a snapshot": (sum(map(len, nest.copy())), SNAPSHOT),
        "bytes of the journal": (sum(map(len, node.journal)), JOURNAL),
    }


def stopped_while_one_is_away(world):
    """A nest is cut off for longer than the horizon, and all that it knows is stopped meanwhile."""
    world.cuts = {(0, 2), (2, 0), (1, 2), (2, 1)}
    world.run(world.time + HOUR)
    for name in list(world.nodes[0].nest.replica):
        world._ask("stop", world.nodes[0], name, lambda r, name=name: Stop(r, name))
    world.run(world.time + (HORIZON + 1) * HOUR)
    world.cuts = set()
    world.run(world.time + 2 * HOUR)
    assert [len(node.nest.replica) for node in world.nodes] == [0, 0, 0], "what was stopped, and forgotten, came back"


def live(lives):
    world = Months(CHURN, 1, config=MONTHS)
    world.calming = True
    world.run(HOUR)
    most = dict.fromkeys(kept_by(world.nodes[0]), 0)
    for life in range(1, lives + 1):
        if life % AWAY_EVERY == 0:
            stopped_while_one_is_away(world)
        world.fault("start" if life % 2 else "stop")
        world._end_nest(world.nodes[life % 3], MINUTE)
        world.run(world.time + HOUR)
        for node in world.nodes if life % 5 == 0 else ():
            for what, (kept, bound) in kept_by(node).items():
                most[what] = max(most[what], kept)
                assert kept <= bound, f"{kept} {what} after {life} lives, of at most {bound}"
    return world, most


def test_what_is_kept_is_bounded_over_two_thousand_lives():
    world, most = live(LIVES)
    print(f"{world.time / 86_400:.0f} days: {most}")
    assert sum(node.life for node in world.nodes) >= LIVES
    assert world.fresh_starts == LIVES // AWAY_EVERY
    assert world.what_is_wrong() == ""


def test_ids_that_never_leave_are_found(monkeypatch):
    monkeypatch.setattr(Replica, "forget", lambda self, life: False)
    with pytest.raises(AssertionError, match="after .. lives"):
        live(60)
