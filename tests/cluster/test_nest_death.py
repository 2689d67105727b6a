"""The death of nests, one or all, on real raylets: nothing that was accepted is lost, and no running bird notices (V2, M5, M6)."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time

import pytest
import ray

import flock_ray
from flock_ray.runtime import cluster
from tests.cluster import birds
from tests.cluster.conftest import views
from tests.cluster.test_promises import nest_pid, owners, runs, settled
from tests.support.callers import Callers
from tests.support.diary import Diary, lives, overlap
from tests.support.waiting import eventually

NODES = 3
#: Processes that die on purpose are not mourned for half a minute.
ANSWER = 30


def replicas():
    """What each nest says of all birds."""
    life = cluster.flock_life("default").life
    asked = [
        cluster.nest_handle(life, nest.node_id).read.remote(pickle.dumps(("birds", None, None, None, None))) for nest in flock_ray.nests()
    ]
    return [sorted(pickle.loads(answer), key=lambda info: str(info.name)) for answer in ray.get(asked, timeout=ANSWER)]


def all_back(old):
    """Are these nests' successors there, with whole views and equal replicas?"""
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError, flock_ray.FlockError):
        if any(nest_pid(node) == pid for node, pid in old.items()) or views(flock_ray.Flock()) != {NODES}:
            return False
        first, *others = replicas()
        return all(other == first for other in others)
    return False


@pytest.fixture
def all_states(flyground, name):
    """Birds in every state: 12 that run, and one each that has failed, cannot be placed, and waits to be started again."""
    running = [f"{name}/{i}" for i in range(12)]
    for i, own in enumerate(running):
        flock_ray.start(own, birds.Counter, i)
    flock_ray.options(max_restarts=0).start(f"{name}/failed", birds.Unborn)
    flock_ray.options(num_gpus=1, light=False).start(f"{name}/pending", birds.Counter)
    flock_ray.options(max_restarts=1000).start(f"{name}/restarting", birds.Unborn)
    flock_ray.wait(running, timeout=120)
    eventually(lambda: settled(running), "all at their owners")
    eventually(lambda: flock_ray.info(f"{name}/failed").state == "failed", "it has failed")
    eventually(lambda: flock_ray.info(f"{name}/pending").state == "pending", "it is pending")
    eventually(lambda: flock_ray.info(f"{name}/restarting").restarts >= 6, "its pauses are long")
    yield running
    flock_ray.stop_many([info.name for info in flock_ray.birds(prefix=f"{name}/")])


def check_states(name, before):
    now = {key: flock_ray.info(f"{name}/{key}") for key in before}
    assert (now["failed"].state, now["failed"].last_error) == ("failed", before["failed"].last_error)
    assert (now["pending"].state, now["pending"].reason) == ("pending", before["pending"].reason)
    assert now["restarting"].restarts >= before["restarting"].restarts
    assert "no egg" in now["restarting"].last_error


@pytest.mark.parametrize("which", ["one", "all"])
def test_no_bird_of_any_state_is_lost_with_its_nest(flyground, name, all_states, which):
    """A bird that leaves meanwhile has left, and one that is stopped meanwhile is stopped; callers notice nothing."""
    before = {key: flock_ray.info(f"{name}/{key}") for key in ("failed", "pending", "restarting")}
    leaves, stopped, *others = all_states
    pids = {n: flock_ray.call(n, "pid") for n in others}
    for n in others:
        flock_ray.call(n, "add", 100)
    nodes = [nest.node_id for nest in flock_ray.nests()]
    old = {node: nest_pid(node) for node in (nodes if which == "all" else [flock_ray.where(leaves)])}
    with Callers([others], timeout=5) as callers:
        for pid in old.values():
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        flock_ray.call(leaves, "retire")
        if which == "one":
            flock_ray.stop(stopped)
        eventually(lambda: all_back(old), "the next lives of the nests, with equal replicas", 30)
        back = time.monotonic() - began
        if which == "all":
            flock_ray.stop(stopped)
        time.sleep(2)
    print(f"{which}: replicas equal after {back:.1f} s, {callers.calls} calls")
    assert callers.calls > 20
    assert not callers.failures
    assert back < 15, "10 s after Ray has restarted them"
    flock_ray.wait([leaves, stopped], "gone", timeout=30)
    eventually(lambda: settled(others), "all birds run where they were")
    assert {n: flock_ray.call(n, "pid") for n in others} == pids
    assert [flock_ray.call(n, "get") for n in others] == [100 + i for i in range(2, 12)]
    check_states(name, before)
    assert {info.name for info in flock_ray.birds(prefix=f"{name}/")} == {*others, *(f"{name}/{key}" for key in before)}


def test_a_start_that_was_accepted_is_kept_though_all_nests_die_at_once(flyground, name):
    """Nobody else had heard of it, maybe, and it did not run yet."""
    names = [f"{name}/{i}" for i in range(40)]
    pids = [nest_pid(nest.node_id) for nest in flock_ray.nests()]
    old = dict(zip([nest.node_id for nest in flock_ray.nests()], pids, strict=True))
    flock_ray.options(light=True).start_many([(n, birds.Counter, (7,)) for n in names])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all_back(old), "the next lives of the nests")
    assert flock_ray.call_many([(n, "get") for n in names], timeout=60) == [7] * len(names)
    flock_ray.stop_many(names)


@pytest.mark.own_process("their processes are stopped")
def test_a_nest_that_lives_and_does_not_answer_is_ended_and_no_bird_notices(flyground, name):
    """SIGSTOP of a nest: its peers give it ten seconds. Its hosts end it before, and its next life has them (M6)."""
    names = [f"{name}/{i}" for i in range(9)]
    for own in names:
        flock_ray.start(own, birds.Counter)
    flock_ray.wait(names, timeout=60)
    eventually(lambda: settled(names), "all at their owners")
    pids = {n: flock_ray.call(n, "pid") for n in names}
    here = ray.get_runtime_context().get_node_id()
    node = next(place for place in owners(names).values() if place != here)
    old = nest_pid(node)
    began = time.monotonic()
    os.kill(old, signal.SIGSTOP)
    eventually(lambda: not runs(old), "its hosts have ended it", 12)
    took = time.monotonic() - began
    assert took > 3, "it was given some time"
    eventually(lambda: all_back({node: old}), "its next life", 30)
    print(f"ended after {took:.1f} s, whole again after {time.monotonic() - began:.1f} s")
    eventually(lambda: settled(names), "all at their owners")
    assert {n: flock_ray.call(n, "pid") for n in names} == pids
    flock_ray.stop_many(names)


@pytest.mark.own_process("their processes are stopped")
def test_a_node_that_was_stopped_for_long_wakes_up_without_its_birds(flyground, name, tmp_path):
    """SIGSTOP of a raylet with all its workers for 20 s: others take its birds, and none of its own lives goes on after it."""
    node = flyground.add()
    try:
        eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the newcomer's nest")
        candidates = [f"{name}/{i}" for i in range(200)]
        names = [n for n, place in owners(candidates).items() if place == node.node_id][:3]
        assert names
        files = {n: tmp_path / f"{i}" for i, n in enumerate(names)}
        for own in names:
            flock_ray.start(own, Diary, str(files[own]))
        flock_ray.wait(names, timeout=60)
        pids = {n: flock_ray.call(n, "pid") for n in names}
        began = time.monotonic()
        with flyground.stopped(node):
            eventually(lambda: all(lives(files[n])[-1].pid != pids[n] for n in names), "they live elsewhere", 20)
            elsewhere = time.monotonic() - began
            time.sleep(max(0.0, began + 20 - time.monotonic()))
        eventually(lambda: not any(runs(pid) for pid in pids.values()), "the old lives have ended", 10)
        longest = max(overlap(files[n]) for n in names)
        print(f"elsewhere after {elsewhere:.1f} s; longest overlap {longest * 1000:.0f} ms")
        assert longest < 0.1, "what was stopped looks at the clock before it runs anything"
        eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the nest is back: Ray had not given the node up", 60)
        eventually(lambda: settled(names), "and has its share again")
        time.sleep(1)
        assert max(overlap(files[n]) for n in names) < 0.1
    finally:
        flock_ray.stop_many([info.name for info in flock_ray.birds(prefix=f"{name}/")])
        flyground.crash(node)
        eventually(lambda: len(flock_ray.nests()) == NODES, "as before")
