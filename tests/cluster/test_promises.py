"""The promises of DESIGN's table that need no split, each on real raylets that are really killed."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import ray

import flock_ray
from flock_ray.core.ring import ring_from
from tests.cluster import birds
from tests.support.waiting import eventually


def owners(names):
    ring = ring_from(tuple(sorted((nest.node_id, nest.weight) for nest in flock_ray.nests())))
    return {name: ring.owner(name) for name in names}


def settled(names):
    want, infos = owners(names), {info.name: info for info in flock_ray.birds()}
    return all(n in infos and infos[n].state == "running" and infos[n].node_id == want[n] for n in names)


@pytest.fixture
def flock_of_ten(flyground, name):
    names = [f"{name}/{i}" for i in range(10)]
    for own in names:
        flock_ray.start(own, birds.Counter)
    flock_ray.wait(names, timeout=120)
    yield names
    for own in names:
        if flock_ray.alive(own):
            flock_ray.stop(own)


def runs(pid):
    """Whether any thread of a process is left: while one is, its connections are open, though its first has ended."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def nest_pid(node_id):
    """The nest's process on a node of this machine."""
    from flock_ray.runtime import cluster

    record = cluster.flock_life("default")
    return ray.get(cluster.nest_handle(record.life, node_id).pid.remote(), timeout=30)


def test_a_started_name_runs_at_the_owner_its_ring_gives_it(flyground, flock_of_ten):
    eventually(lambda: settled(flock_of_ten), "every bird at its owner")
    assert all(flock_ray.call(n, "where") == place for n, place in owners(flock_of_ten).items())


@pytest.mark.own_process("neighbours of a light one get another process")
def test_a_crash_is_restarted_on_the_same_node_with_fresh_state_and_nobody_else_notices(flyground, flock_of_ten):
    name = flock_of_ten[0]
    pids = {n: flock_ray.call(n, "pid") for n in flock_of_ten}
    before = flock_ray.info(name)
    flock_ray.call(name, "add", 5)
    with pytest.raises(flock_ray.BirdUnavailable, match=name):
        flock_ray.call(name, "die")
    assert flock_ray.call(name, "get") == 0
    after = flock_ray.info(name)
    assert (after.node_id, after.restarts) == (before.node_id, before.restarts + 1)
    assert after.incarnation > before.incarnation
    assert {n: flock_ray.call(n, "pid") for n in flock_of_ten[1:]} == {n: pids[n] for n in flock_of_ten[1:]}


@pytest.mark.own_process("neighbours of a light one get another process")
def test_four_crashes_within_seconds_harm_no_other_bird_of_the_node(flyground, flock_of_ten):
    """In Flock all 20 birds of the node were gone for ever (RAY_FACTS)."""
    name = flock_of_ten[1]
    pids = {n: flock_ray.call(n, "pid") for n in flock_of_ten}
    ask = flock_ray.bird(name).pid.options(retry=True)  # a call to one that is just being killed may fail otherwise
    pid = pids[name]
    for _ in range(4):
        os.kill(pid, signal.SIGKILL)
        pid = eventually(lambda killed=pid: (now := ask()) != killed and now, "it runs again")
    assert flock_ray.info(name).restarts == 4
    assert {n: flock_ray.call(n, "pid") for n in flock_of_ten if n != name} == {n: p for n, p in pids.items() if n != name}


def test_a_stale_route_is_not_used_after_a_stop(flyground, name):
    """The caller has a route to the old bird; after stop and start anew it must reach the new one."""
    flock_ray.start(name, birds.Counter, 1)
    assert flock_ray.call(name, "get") == 1
    flock_ray.stop(name)
    flock_ray.start(name, birds.Counter, 100)
    assert flock_ray.call(name, "get") == 100


def test_no_bird_notices_when_its_nest_dies(flyground, flock_of_ten):
    pids = {n: flock_ray.call(n, "pid") for n in flock_of_ten}
    for n in flock_of_ten:
        flock_ray.call(n, "add", 7)
    node = flock_ray.nests()[0].node_id
    old = nest_pid(node)
    os.kill(old, signal.SIGKILL)
    for n in flock_of_ten:
        assert flock_ray.call(n, "add", 1) == 8  # through routes that are known, while the nest is away

    def another():
        try:
            return nest_pid(node) != old
        except (ray.exceptions.RayError, TimeoutError):
            return False

    eventually(another, "another life of the nest")
    eventually(lambda: settled(flock_of_ten), "all birds run where they were")
    assert {n: flock_ray.call(n, "pid") for n in flock_of_ten} == pids
    assert all(flock_ray.call(n, "get") == 8 for n in flock_of_ten)


@pytest.mark.own_process("its process ends")
def test_a_stop_while_its_nest_is_away_is_honoured(flyground, flock_of_ten):
    name = flock_of_ten[2]
    pid = flock_ray.call(name, "pid")
    away = [nest.node_id for nest in flock_ray.nests() if nest.node_id == flock_ray.where(name)][0]
    os.kill(nest_pid(away), signal.SIGKILL)
    flock_ray.stop(name)
    eventually(lambda: not psutil.pid_exists(pid), "its process has ended")
    assert not flock_ray.alive(name)


def test_failed_stays_so_until_restart(flyground, name, tmp_path):
    marker = tmp_path / "mended"

    class Picky:
        def __init__(self, path):
            if not os.path.exists(path):
                raise RuntimeError("not yet mended")

        def ok(self):
            return True

    flock_ray.options(max_restarts=1).start(name, Picky, str(marker))
    with pytest.raises(flock_ray.BirdCrashed, match="not yet mended"):
        flock_ray.wait(name, timeout=60)
    marker.touch()
    with pytest.raises(flock_ray.BirdCrashed):
        flock_ray.call(name, "ok")
    flock_ray.restart(name)
    flock_ray.wait(name, timeout=60)
    assert flock_ray.call(name, "ok")


def test_a_temporary_bird_is_not_restarted_and_a_permanent_one_always(flyground, name):
    flock_ray.options(restart="temporary").start(name, birds.Counter)
    flock_ray.options(restart="permanent").start(name + "/p", birds.Counter)
    with pytest.raises(flock_ray.BirdUnavailable):
        flock_ray.call(name, "die")
    flock_ray.wait(name, "gone", timeout=30)
    flock_ray.call(name + "/p", "add", 3)
    flock_ray.call(name + "/p", "retire")
    eventually(lambda: flock_ray.call(name + "/p", "get") == 0, "a new life")
    flock_ray.stop(name + "/p")


def test_on_error_crash_answers_the_caller_and_restarts(flyground, name):
    flock_ray.options(on_error="crash").start(name, birds.Counter)
    flock_ray.call(name, "add", 3)
    with pytest.raises(ValueError, match="pow"):
        flock_ray.call(name, "boom", "pow")
    eventually(lambda: flock_ray.info(name).restarts == 1 and flock_ray.info(name).state == "running", "restarted")
    assert flock_ray.call(name, "get") == 0


def test_a_nodes_death_moves_its_birds_and_a_join_moves_only_what_the_newcomer_owns(flyground, flock_of_ten):
    """In seconds, not the 15 s after which Ray notices; the state is handed over where there is somebody to hand it over."""
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == 4, "the newcomer's nest")
    eventually(lambda: settled(flock_of_ten), "birds have moved to the newcomer")
    candidates = [f"{flock_of_ten[0]}/{i}" for i in range(1000)]  # of ten names the ring may well give it none
    theirs = next(n for n, place in owners(candidates).items() if place == node.node_id)
    flock_ray.start(theirs, birds.Counter)
    flock_of_ten.append(theirs)
    for n in flock_of_ten:
        flock_ray.call(n, "add", 5)
    pids = {n: flock_ray.call(n, "pid") for n in flock_of_ten}
    there = [n for n, place in owners(flock_of_ten).items() if place == node.node_id]
    assert theirs in there
    began = time.monotonic()
    flyground.crash(node)
    # Over a socket a host still answers in the millisecond before it sees its raylet's end.
    eventually(lambda: not any(runs(pids[n]) for n in there), "the hosts have ended with their raylet", 5)
    for n in flock_of_ten:
        # Called the moment its host dies it may have run (C2): the caller says that it may be repeated.
        assert flock_ray.bird(n).add.options(timeout=60, retry=True)(0) == (0 if n in there else 5)
    assert time.monotonic() - began < 14, "as slow as Ray itself"
    eventually(lambda: settled(flock_of_ten), "every bird at its owner")
    assert all(flock_ray.call(n, "pid") == pids[n] for n in flock_of_ten if n not in there)
    other = flyground.add()
    try:
        eventually(lambda: len(flock_ray.nests()) == 4 and settled(flock_of_ten), "the next newcomer has its share")
        want = owners(flock_of_ten)
        moved = [n for n in flock_of_ten if want[n] == other.node_id]
        for n in flock_of_ten:
            if n not in there:
                assert flock_ray.call(n, "get") == 5  # handed over, or never moved
                assert (flock_ray.call(n, "pid") != pids[n]) == (n in moved)
    finally:
        flyground.crash(other)
        eventually(lambda: len(flock_ray.nests()) == 3, "the nests are three again")


def test_a_normal_exit_frees_the_name_everywhere(flyground, name):
    flock_ray.start(name, birds.Counter)
    flock_ray.call(name, "retire")
    flock_ray.wait(name, "gone", timeout=30)
    flock_ray.start(name, birds.Counter, 9)
    assert flock_ray.call(name, "get") == 9


def test_two_starts_of_one_name_at_once_end_in_one_bird(flyground, name):
    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def start(k):
        try:
            flock_ray.start(name, birds.Counter, k)
            return k
        except flock_ray.BirdExists:
            return None

    accepted = [k for k in ray.get([start.remote(k) for k in range(4)]) if k is not None]
    assert accepted
    flock_ray.wait(name, timeout=60)
    eventually(lambda: settled([name]), "one bird at the owner")
    values = {flock_ray.call(name, "get") for _ in range(5)}
    assert len(values) == 1
    assert values <= set(accepted)
