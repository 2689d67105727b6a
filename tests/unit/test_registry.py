"""Decisions of one nest that need no simulated cluster."""

from __future__ import annotations

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import messages as msg
from flock_ray.core.aworset import Hashes
from flock_ray.core.notices import CastLost
from flock_ray.core.registry import Registry
from flock_ray.specs import Life, NodeRecord

ME, PEER = Life("a", 1), Life("b", 1)


def lone_nest(cpus: float) -> Registry:
    nest = Registry(ME, Config(), lambda: 0.5)
    nest.handle(ev.Booted(NodeRecord(ME, cpus)), 0.0)
    nest.handle(ev.NodesListed(frozenset(["a"])), 0.1)
    assert nest.membership.ready
    return nest


def test_that_a_node_once_had_cpus_is_heard_of_peers_and_makes_another_view():
    """P1: a head without CPUs has birds only where no node ever had any, and all nests have to agree on that."""
    nest = lone_nest(cpus=0.0)
    assert nest.owns("bird")
    number = nest.membership.number
    outlook = msg.Outlook(frozenset([PEER]), (), (), had_cpus=True)
    ask = msg.SyncAsk(1, Hashes(), 0, outlook)
    effects = nest.handle(ev.Received(msg.Envelope(PEER, 1, accepts=False, body=ask)), 0.2)
    assert not nest.owns("bird")
    assert nest.membership.number > number, "answers to the old ring's questions are void"
    (answer,) = [effect.envelope.body for effect in effects if isinstance(effect, do.Send)]
    assert answer.outlook.had_cpus, "and it is told on"


def test_casts_to_a_name_that_nobody_knows_are_told_once():
    nest = lone_nest(cpus=1.0)
    for casts in (0, 3):
        effects = nest.handle(ev.Locate(f"request {casts}", "nobody", "running", 1.0, casts=casts), 0.2)
        told = [effect.notice for effect in effects if isinstance(effect, do.Emit)]
        assert told == ([CastLost(ME, "nobody", 3)] if casts else [])
        assert [effect.outcome.error for effect in effects if isinstance(effect, do.Reply)] == ["BirdNotFound"]
