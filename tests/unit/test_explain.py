"""Why a bird is where it is: the sentences follow the state that the core decides by."""

from __future__ import annotations

from flock_ray.config import Config
from flock_ray.core import events as ev
from flock_ray.core.barrier import Report
from flock_ray.core.explain import explain
from flock_ray.core.wire import LifeCrashed, LifeRunning
from flock_ray.specs import Options
from tests.unit.test_registry import ME, PEER, Pair, lone_nest, running, start

THIRD = type(ME)("c", 1)


def number_owned_by(nest, *, beyond=0):
    return next(n for n in range(beyond, 1_000) if nest.owns(f"bird-{n}"))


def said(nest, number):
    return " ".join(explain(nest, f"bird-{number}").reasons)


def test_an_unknown_name_is_not_explained():
    assert explain(lone_nest(1.0), "nobody") is None


def test_a_running_bird_is_at_the_first_of_its_preference_list():
    pair = Pair(ME, PEER)
    nest, other = pair.nests[ME], pair.nests[PEER]
    number = number_owned_by(nest)
    pair.take(ME, *running(pair.take(ME, start(number))))
    told = explain(nest, f"bird-{number}")
    assert told.owner == told.told_by == ME.node and told.bird.state == "running"
    assert [one.node_id for one in told.candidates] == nest.membership.placement.ring.owners(f"bird-{number}")
    assert [one.holds for one in told.candidates] == ["running", ""]
    assert "first in its preference list, on the ring of 2 nests" in told.reasons[0]
    assert "It runs on node a, incarnation 1." in told.reasons
    pair.pass_time(1.0)
    assert explain(other, f"bird-{number}").candidates == told.candidates, "the status is known everywhere"


def test_a_bird_that_is_not_started_waits_for_the_nest_that_has_not_answered():
    pair = Pair(ME, PEER)
    nest = pair.nests[ME]
    number = number_owned_by(nest)
    nest.barrier.void(PEER)
    pair.nests.pop(PEER)  # it says nothing any more
    pair.take(ME, start(number))
    assert "the nest of node b has not answered yet" in said(nest, number)
    assert "It is pending: no nest has begun to start it yet." in said(nest, number)


def test_who_holds_a_bird_for_another_says_why():
    pair = Pair(ME, PEER, THIRD)
    nest, third = pair.nests[ME], pair.nests[THIRD]
    number = number_owned_by(third)
    for moves, text in ((False, "keeps it until it dies: it was started with moves=False"), (True, "until node c asks for it")):
        pair.take(THIRD, start(number, Options(moves=moves)))
        winner = third.replica.winner(f"bird-{number}")
        nest.replica.join_content(third.replica.content([f"bird-{number}"]))
        nest.supervision.hatch(f"bird-{number}", *winner)
        assert text in said(nest, number)
        number = number_owned_by(third, beyond=number + 1)


def test_what_is_held_elsewhere_is_pulled_or_stays():
    pair = Pair(ME, PEER)
    nest = pair.nests[ME]
    number = number_owned_by(nest)
    for moves, text in (
        (True, "Node b holds it and is asked to hand it over (at most moves_in_flight=16"),
        (False, "Node b holds it, and keeps it until that node dies"),
    ):
        name = f"bird-{number}"
        pair.take(ME, start(number, Options(moves=moves)))
        ((dot, _),) = nest.replica.records(name)
        nest.holds.end(nest.holds.lives[dot])  # as if it had never begun here, but there
        nest.barrier.reports[name] = {(PEER, dot): Report(1, True)}
        assert text in said(nest, number)
        assert explain(nest, name).candidates[1].holds == "a life"
        number = number_owned_by(nest, beyond=number + 1)


def test_what_has_demands_is_explained_by_what_nodes_have_left():
    nest = lone_nest(2.0)
    nest.handle(start(1, Options(num_cpus=1.5)), 0.2)
    nest.handle(start(2, Options(num_cpus=1.0)), 0.3)
    assert "It asks for CPU 1.5; node a owns it" in said(nest, 1)
    told = explain(nest, "bird-2")
    assert told.owner is None and told.bird.state == "pending"
    assert told.candidates[0].lacks == "has left CPU 0.5 of 1"
    assert "no node can give that beside what was started before it" in said(nest, 2)
    assert "the most that is free on one node is 0.5" in said(nest, 2)
    nest.handle(start(3, Options(label_selector=(("zone", "here"),))), 0.4)
    assert explain(nest, "bird-3").candidates[0].lacks == "has not the labels {'zone': 'here'}"


def test_crashed_and_failed_birds_are_explained():
    nest = lone_nest(2.0)
    effects = nest.handle(start(1, Options(max_restarts=1)), 0.2)
    (hatched,) = running(effects)
    nest.handle(LifeCrashed(hatched.dot, hatched.born, "boom"), 0.3)
    assert "It crashed on node a and is started again there in 0.1 s" in said(nest, 1)
    (again,) = running(nest.handle(ev.Tick(), 1.0))
    assert "It is starting on node a" in said(nest, 1)
    nest.handle(LifeRunning(again.dot, again.born, "host"), 1.1)
    nest.handle(LifeCrashed(again.dot, again.born, "boom"), 1.2)
    assert "crashed more than max_restarts=1 times in a row; mend the cause, then restart it" in said(nest, 1)


def test_a_nest_that_admits_no_more_birds_says_so():
    nest = lone_nest(2.0)
    nest.config = Config(max_birds=1)
    nest.handle(start(1), 0.2)
    nest.handle(start(2), 0.3)
    assert "It is pending: its node holds max_birds=1 already." in said(nest, 2)
