"""Hosts started ahead of need: who takes one, who does not, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import flock_ray
from flock_ray.runtime import cluster
from tests.cluster import birds
from tests.cluster.test_promises import nest_pid, runs
from tests.support.waiting import eventually

NODES = 2
SETTINGS = {"spares": 1}
ROOT = Path(__file__).parents[2]


class Songbird:
    """Has `async def` methods."""

    async def pid(self):
        return os.getpid()


def hosts():
    """The processes of all hosts, with birds or without: each has left a file with its pid."""
    folder = Path(cluster.session_directory(cluster.flock_life("default").life)).parent
    return {int(path.stem) for path in folder.glob("*/*.json") if runs(int(path.stem))}


def with_birds():
    return {flock_ray.call(info.name, "pid") for info in flock_ray.birds(state="running")}


def spares():
    return hosts() - with_birds()


def settled(number):
    """The spares, when at least so many are there, and the hosts of birds that were stopped have gone."""
    seen = [set(), 0.0]

    def same():
        now = spares()
        if now != seen[0] or len(now) < number:
            seen[:] = now, time.monotonic()
        return time.monotonic() - seen[1] > 3 and now

    return eventually(same, f"{number} spares")


def test_a_bird_takes_a_spare_and_another_is_started(flyground, name):
    for n in range(3):
        ahead = settled(NODES)
        bird = flock_ray.start((name, n), birds.Counter)
        assert bird.pid() in ahead
    for n in range(3):
        flock_ray.stop((name, n))


def test_one_with_async_methods_takes_one_of_its_own_kind(flyground, name):
    settled(NODES)
    flock_ray.start((name, 0), Songbird)
    flock_ray.wait((name, 0))
    node = flock_ray.info((name, 0)).node_id
    ahead = settled(NODES + 1)
    again = next(own for own in ((name, n) for n in range(1, 200)) if lives_on(own, node, Songbird))
    assert flock_ray.call(again, "pid") in ahead
    for info in flock_ray.birds(prefix=(name,)):
        flock_ray.stop(info.name)


def lives_on(name, node, cls):
    """Starts a bird, and stops it again if its node is another."""
    flock_ray.start(name, cls)
    flock_ray.wait(name)
    if flock_ray.info(name).node_id == node:
        return True
    flock_ray.stop(name)
    return False


def test_who_asks_for_resources_or_threads_has_a_process_of_its_own(flyground, name):
    ahead = hosts()
    for n, options in enumerate(({"num_cpus": 0.5}, {"max_concurrency": 3})):
        bird = flock_ray.options(**options).start((name, n), birds.Counter)
        assert bird.pid() not in ahead
        flock_ray.stop((name, n))


def test_spares_have_the_runtime_env_of_whoever_starts_birds(flyground, name):
    script = f"""
        import os, sys, time
        import ray, flock_ray
        ray.init({flyground.cluster.address!r}, namespace="test", runtime_env={{"env_vars": {{"SONG": "tweet"}}}}, log_to_driver=False)

        class Singer:
            def song(self):
                return os.environ["SONG"], os.getpid()

        for n in range(8):
            began = time.monotonic()
            song, pid = flock_ray.start(({name!r}, n), Singer).song()
            assert song == "tweet"
            print(pid, time.monotonic() - began, flush=True)
            sys.stdin.readline()
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        taken = 0
        for _ in range(8):
            before = hosts()
            driver.stdin.write("\n")
            driver.stdin.flush()
            pid = int(driver.stdout.readline().split()[0])
            taken += pid in before
            time.sleep(3)  # a spare of this kind is started on that node
        assert taken >= 4, "from the second bird of a node on"
    finally:
        driver.kill()
        driver.wait()
        driver.stdin.close()
        driver.stdout.close()
        for n in range(8):
            if flock_ray.alive((name, n)):
                flock_ray.stop((name, n))


def test_a_spare_that_died_is_missed_by_nobody(flyground, name):
    eventually(lambda: len(spares()) >= NODES, "spares")
    for pid in spares():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not spares(), "they are gone")
    for n in range(6):
        assert flock_ray.start((name, n), birds.Counter).add(n) == n
    eventually(lambda: len(spares()) >= NODES, "others were started")
    for n in range(6):
        flock_ray.stop((name, n))


def test_spares_end_with_their_nest_and_its_next_life_has_others(flyground, name):
    settled(NODES)
    bird = flock_ray.start(name, birds.Counter, 3)
    pid, ahead = bird.pid(), spares()
    for nest in flock_ray.nests():
        os.kill(nest_pid(nest.node_id), signal.SIGKILL)
    eventually(lambda: not any(runs(one) for one in ahead), "its spares end")
    eventually(lambda: len(spares()) >= NODES, "there are others")
    assert (bird.pid(), bird.get()) == (pid, 3)


def test_failover_takes_spares(flyground, name):
    node = flyground.add()
    eventually(lambda: len(flock_ray.nests()) == NODES + 1, "its nest")
    there = None
    for n in range(200):
        if lives_on((name, n), node.node_id, birds.Counter):
            there = (name, n)
            break
    assert there is not None
    time.sleep(5)  # all that was taken is replaced, all that was stopped has gone
    ahead = spares()
    flyground.crash(node)
    eventually(lambda: (info := flock_ray.info(there)).node_id != node.node_id and info.state == "running", "it lives elsewhere")
    assert flock_ray.call(there, "pid") in ahead
    flock_ray.stop(there)


def test_the_end_of_the_flock_is_the_end_of_its_spares(flyground):
    """The last one here."""
    eventually(lambda: len(spares()) >= NODES, "spares")
    ahead = hosts()
    flock_ray.destroy()
    eventually(lambda: not any(runs(pid) for pid in ahead), "they have ended")
