"""Calls over sockets: what they carry, what Ray carries beside them, and what happens where they cannot be had."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

import flock_ray
from flock_ray.core.connection import Connection
from flock_ray.runtime import cluster
from flock_ray.runtime.client import client_of
from flock_ray.runtime.links import RayLink
from flock_ray.runtime.ways import DirectLink
from tests.cluster import birds
from tests.cluster.conftest import eventually

NODES = 2
SETTINGS = {"wire": "auto"}


class Scribe:
    def __init__(self):
        self.lines = []

    def note(self, line, burden=None):
        self.lines.append(line)

    def read(self):
        return self.lines

    def echo(self, thing):
        return thing

    def zeros(self, size):
        return np.zeros(size)

    def text(self, size):
        return "x" * size

    def pid(self):
        return os.getpid()


class AsyncScribe(Scribe):
    async def aecho(self, thing):
        return thing


@pytest.fixture(params=[Scribe, AsyncScribe])
def scribe(request, flyground, name):
    bird = flock_ray.start(name, request.param)
    flock_ray.wait(bird)
    return bird


def way_to(bird):
    return client_of("default")._routes[bird.name][1]


def test_calls_go_straight_to_the_bird(scribe):
    assert scribe.echo(1) == 1
    assert isinstance(way_to(scribe), DirectLink)
    assert way_to(scribe).link.local, "a Unix socket: all nodes of this test are on one machine"


@pytest.mark.parametrize("size", [10, 200_000, 3_000_000])
def test_what_is_long_goes_by_ray_and_nobody_notices(scribe, size):
    assert scribe.text(size) == "x" * size
    assert scribe.echo("y" * size) == "y" * size
    assert scribe.zeros(size // 8).sum() == 0
    assert scribe.echo(np.ones(size // 8)).sum() == size // 8
    assert scribe.echo.future("z" * size).result(60) == "z" * size
    assert isinstance(way_to(scribe), DirectLink)


def test_object_references_travel_as_they_are(scribe):
    ref = ray.put([1, 2, 3])
    assert scribe.echo(ref) == [1, 2, 3], "a top-level reference is a value, as in Ray"
    (inside,) = scribe.echo([ref])
    assert ray.get(inside) == [1, 2, 3]


def test_order_is_kept_whatever_way_messages_take(scribe):
    for n in range(60):
        scribe.note.cast(n, np.ones(300_000) if n % 10 == 0 else None)
    assert scribe.read() == list(range(60))


def test_many_threads_and_many_calls_in_flight(scribe):
    wrong = []

    def ask(k):
        for n in range(100):
            if scribe.echo((k, n)) != (k, n):
                wrong.append((k, n))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    futures = [scribe.echo.future(n) for n in range(2000)]
    assert [future.result(60) for future in futures] == list(range(2000))
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_host_that_dies_in_a_call_is_told_at_once(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    pid = bird.pid()
    asked = bird.sleep.future(30)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(flock_ray.BirdUnavailable, match="may or may not have run"):
        asked.result(20)
    assert time.monotonic() - began < 2
    assert bird.pid.options(retry=True)() != pid


def test_sockets_of_dead_hosts_are_cleared_away(flyground, name):
    bird = flock_ray.start(name, Scribe)
    pid = bird.pid()
    folder = cluster.folder_of("default", flock_ray.where(name))
    path = Path(folder, f"{pid}.sock")
    assert path.exists()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not path.exists(), "its nest removes it")
    other = Path(folder, f"{bird.pid.options(retry=True)()}.sock")
    flock_ray.stop(name)
    eventually(lambda: not other.exists(), "it is gone with its host")


def test_without_the_secret_nobody_is_heard_and_the_caller_takes_ray(flyground, name, monkeypatch):
    """Here the caller's proofs are wrong: as if it were of another flock, or somebody else had taken the port."""
    flock_ray.start(name, Scribe)
    flock_ray.wait(name)
    client = client_of("default")
    monkeypatch.setattr(Connection, "_proof", lambda self, part, nonce: bytes(32))
    try:
        assert flock_ray.call(name, "echo", 5) == 5
        assert isinstance(client._routes[name][1], RayLink)
    finally:
        client.links._unreached.clear()


def test_a_bird_that_listens_nowhere_is_called_by_ray(flyground, name):
    """`wire="ray"` is for a whole flock."""
    flock_ray.init("lake", wire="ray")
    lake = flock_ray.Flock("lake")
    try:
        bird = lake.start(name, Scribe)
        assert bird.echo(3) == 3
        assert isinstance(client_of("lake")._routes[name][1], RayLink)
    finally:
        lake.destroy()
        flock_ray.init("default")
