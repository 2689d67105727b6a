"""The head's control service (GCS) dies and comes back: with Redis no caller and no bird notices, without it Ray itself ends (C6).

Real: a `redis-server` of the test's own, raylets, kill -9 of the GCS by its pid. Debian's package `redis-server` has the first; where it is
not installed these tests skip, and fail in CI (`.ci/run` installs it).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flock_ray
from flock_ray.notices import BirdCrashed, BirdNotice, BirdRunning, BirdStarted
from tests.cluster import birds
from tests.cluster.conftest import NEEDS_REDIS, WIRE, Flyground, init_whole
from tests.cluster.test_promises import owners, runs, settled
from tests.support.callers import Callers
from tests.support.head import Head, free_port, redis_server
from tests.support.waiting import eventually

pytestmark = [
    NEEDS_REDIS,
    pytest.mark.skipif(WIRE == "ray", reason="without sockets whoever has never called a bird needs the head to find it: README says so"),
    pytest.mark.timeout(600),
]

NODES = 3
AWAY = 10.0  # seconds without a head
PATIENCE = 0.8 * AWAY  # of callers: who waited for the head would fail
START = 120.0  # Ray starts slowly on a busy machine
ROOT = Path(__file__).resolve().parents[2]


class Headland(Flyground):
    """A cluster whose GCS can be killed and started again. Its port is fixed: everything reconnects to the address it knows."""

    def __init__(self, nodes):
        super().__init__(nodes, gcs_server_port=free_port())
        self.head = Head(self.cluster)

    def close(self):
        if not self.head.is_up:  # a test failed in the middle
            self.head.restart()
        super().close()


@pytest.fixture(scope="module")
def headland():
    with redis_server() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_REDIS_ADDRESS", address)
        ground = Headland(NODES)
        patch.delenv("RAY_REDIS_ADDRESS")
        try:
            init_whole(flock_ray.Flock("default"))
            yield ground
        finally:
            ground.close()


def ten_a_second(names):
    """Calls each bird ten times a second."""
    return Callers([[name] for name in names], timeout=PATIENCE)


#: A driver that is connected to Ray before the GCS dies, and has called nobody: it begins when it is told to.
FRESH = """
import json, sys
import ray
from tests.cluster.test_head_restart import ten_a_second
address, *names = sys.argv[1:]
ray.init(address, namespace="other", log_to_driver=False, logging_level="ERROR")
print("connected", flush=True)
sys.stdin.readline()
with ten_a_second(names) as tally:
    sys.stdin.readline()
print(json.dumps([str(tally), tally.calls, tally.failures]), flush=True)
"""


@contextlib.contextmanager
def fresh_driver(address, names):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRESH, address, *names]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "connected\n"
            yield process
        finally:
            process.kill()


class Guest:
    """Calls others."""

    def visit(self, names):
        return [flock_ray.call(name, "get", timeout=PATIENCE) for name in names]


@pytest.fixture
def eight(headland, name):
    """Birds, by name: four with a process of their own, four light ones."""
    names = [f"{name}/{kind}{i}" for kind in ("own", "light") for i in range(4)]
    for i, own in enumerate(names):
        flock_ray.options(light="light" in own).start(own, birds.Counter, i)
    flock_ray.wait(names, timeout=START)
    eventually(lambda: settled(names), "every bird at its owner", START)
    yield names
    flock_ray.stop_many([info.name for info in flock_ray.birds(prefix=f"{name}/")])


def test_with_redis_no_caller_and_no_bird_notices(headland, eight, name):
    """Ten seconds without a head. What needs a new process is done after it; a light bird can be started meanwhile where such birds run."""
    pids = {own: flock_ray.call(own, "pid") for own in eight}
    victim, late = f"{name}/victim", f"{name}/late"
    guests = [f"{name}/guest", f"{name}/light guest"]  # that have called nobody yet
    for guest in guests:
        flock_ray.options(light="light" in guest).start(guest, Guest)
    flock_ray.wait(guests, timeout=START)
    flock_ray.start(victim, birds.Counter, 3)
    killed = flock_ray.call(victim, "pid", timeout=START)
    theirs = owners([f"{late}/{i}" for i in range(100)])
    light = next(n for n, node in theirs.items() if node == flock_ray.where(eight[-1]))
    with fresh_driver(headland.cluster.address, eight) as fresh, ten_a_second(eight) as cached:
        eventually(lambda: cached.calls > 5 * len(eight), "routes are known")
        headland.head.kill()
        began, before = time.monotonic(), cached.calls
        fresh.stdin.write("go\n")
        fresh.stdin.flush()
        for guest in guests:
            assert flock_ray.call(guest, "visit", eight, timeout=PATIENCE) == list(range(8))
        os.kill(killed, signal.SIGKILL)
        with pytest.raises((flock_ray.BirdUnavailable, flock_ray.CallTimeout)):
            flock_ray.call(victim, "get", timeout=1)
        flock_ray.start(late, birds.Counter, 4)
        flock_ray.options(light=True).start(light, birds.Counter, 5)
        assert flock_ray.call(light, "get", timeout=PATIENCE) == 5
        asked = time.monotonic()
        told = {(type(notice), notice.name) for notice in flock_ray.events(follow=False, kinds=BirdNotice)}
        assert time.monotonic() - asked < PATIENCE
        assert {(BirdCrashed, victim), (BirdStarted, late), (BirdRunning, light)} <= told
        eventually(lambda: time.monotonic() > began + AWAY, "it was away for so long")
        during = cached.calls - before
        headland.head.restart()
        back = time.monotonic()
        assert flock_ray.call(late, "get", timeout=START) == 4
        started = time.monotonic() - back
        assert flock_ray.call(victim, "get", timeout=START) == 3
        restarted = time.monotonic() - back
        after = cached.calls
        eventually(lambda: cached.calls > after + 20 * len(eight), "calls go on")
        answer, _ = fresh.communicate("over\n", timeout=START)
    fresh_tally, calls, failures = json.loads(answer)
    _, slowest, when = cached.slowest
    print(f"\nthe head was away for {back - began:.1f} s; cached routes: {cached}, {during} calls meanwhile")
    print(f"the longest was one of {slowest!r}, {when - began:+.1f} s after the head's death")
    print(f"fresh caller: {fresh_tally}")
    print(f"after the head's restart: started meanwhile answers in {started:.1f} s, killed meanwhile in {restarted:.1f} s")
    assert not cached.failures
    assert not failures
    assert min(during, calls) > len(eight) * AWAY, "that is a tenth of what an idle machine does"
    assert {own: flock_ray.call(own, "pid") for own in eight} == pids
    assert flock_ray.info(victim).restarts == 1, "that the head was away is nobody's crash"


def test_with_redis_birds_start_crash_and_move_again_after_it(headland, eight, name):
    pids = {own: flock_ray.call(own, "pid") for own in eight}
    headland.head.kill()
    gone = time.monotonic()
    eventually(lambda: time.monotonic() > gone + 2, "every nest has asked in vain")
    headland.head.restart()
    began = time.monotonic()
    for kind in ("own", "light"):
        own = f"{name}/new {kind}"
        flock_ray.options(light=kind == "light").start(own, birds.Counter, 7)
        assert flock_ray.call(own, "get", timeout=START) == 7
        print(f"\na new {kind} bird answers {time.monotonic() - began:.1f} s after the restart", end="")
    os.kill(pids[eight[0]], signal.SIGKILL)
    ask = flock_ray.bird(eight[0]).pid.options(retry=True, timeout=START)
    eventually(lambda: ask() != pids[eight[0]], "the crashed one runs again", START)
    assert {own: flock_ray.call(own, "pid") for own in eight[1:]} == {own: pids[own] for own in eight[1:]}
    node = headland.add()
    try:
        eventually(lambda: len(flock_ray.nests()) == NODES + 1, "the newcomer's nest", START)
        theirs = next(n for n, place in owners([f"{name}/n{i}" for i in range(1000)]).items() if place == node.node_id)
        flock_ray.start(theirs, birds.Counter, 1)
        names = [*eight, theirs]
        eventually(lambda: settled(names), "birds have moved to the newcomer", START)
        there = [n for n, place in owners(names).items() if place == node.node_id]
        print(f"\n{len(there)} birds on the newcomer after {time.monotonic() - began:.1f} s")
        pids = {n: flock_ray.call(n, "pid") for n in there}
    finally:
        headland.crash(node)
    eventually(lambda: len(flock_ray.nests()) == NODES, "the flock has noticed", START)
    assert not any(runs(pid) for pid in pids.values())
    for n in names:
        flock_ray.bird(n).get.options(timeout=START, retry=True)()
    eventually(lambda: settled(names), "every bird at its owner", START)


#: A cluster without Redis whose GCS dies, in a process of its own: Ray may end the driver too.
WITHOUT = """
import sys, time
import flock_ray
from tests.cluster import birds
from tests.cluster.conftest import init_whole
from tests.cluster.test_head_restart import Headland, ten_a_second
from tests.cluster.test_promises import runs
from tests.support.waiting import eventually
ground = Headland(2)
init_whole(flock_ray.Flock("default"))
names = [f"{kind}{i}" for kind in ("own", "light") for i in range(4)]
for name in names:
    flock_ray.options(light="light" in name).start(name, birds.Counter)
flock_ray.wait(names, timeout=120)
raylets = [node.all_processes["raylet"][0].process.pid for node in [ground.cluster.head_node, *ground.cluster.worker_nodes]]
with ten_a_second(names) as tally:
    eventually(lambda: tally.calls > 5 * len(names), "routes are known")
    before = tally.calls
    ground.head.kill()
    eventually(lambda: tally.calls > before + 20 * len(names), "calls go on")
    assert not tally.failures, tally.failures
pids = [*{flock_ray.call(name, "pid") for name in names}, *raylets]
print(*pids, flush=True)
if sys.argv[1] == "restarted":
    ground.head.restart()
    eventually(lambda: not any(map(runs, pids)), "all is lost", 120)
    try:
        flock_ray.call(names[0], "get", timeout=10)
    except flock_ray.FlockError as error:
        print("lost:", type(error).__name__, error, flush=True)
time.sleep(600)  # until it is ended
"""


@pytest.mark.parametrize("then", ["restarted", "away"])
def test_without_redis_ray_ends_all_of_it(then):
    """Calls go on at first; then Ray's nodes end themselves, because they cannot reach their head, or it does not know them."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_raylet_liveness_self_check_interval_ms": "2000",  # not 60 s
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # not 60 s
    }
    with subprocess.Popen([sys.executable, "-c", WITHOUT, then], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert pids, "calls went on"
            began = time.monotonic()
            eventually(lambda: not any(map(runs, pids)), "no bird and no node of Ray is left", START)
            print(f"\nwithout Redis, {then}: all had ended after {time.monotonic() - began:.1f} s")
            if then == "restarted":
                assert process.stdout.readline().startswith("lost: FlockNotRunning")
        finally:
            process.kill()
