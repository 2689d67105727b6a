"""Calls over sockets: what they carry, what Ray carries beside them, and what happens where they cannot be had."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

import flock_ray
from flock_ray.core.connection import Connection
from flock_ray.notices import ConnectionsRefused
from flock_ray.runtime import client as client_module
from flock_ray.runtime import cluster
from flock_ray.runtime.client import client_of
from flock_ray.runtime.links import RayLink
from flock_ray.runtime.ways import DirectLink, DirectNestLink
from tests.cluster import birds
from tests.support.waiting import eventually

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

    def count(self, n):
        yield from range(n)

    def arrays(self, n):
        for k in range(n):
            yield np.full(300_000, k)

    def total(self, other, n):
        return sum(flock_ray.stream(other, "count", n))


class AsyncScribe(Scribe):
    async def aecho(self, thing):
        return thing

    async def count(self, n):
        for k in range(n):
            yield k


@pytest.fixture(params=[Scribe, AsyncScribe])
def scribe(request, flyground, name):
    bird = flock_ray.start(name, request.param)
    flock_ray.wait(bird)
    return bird


def way_to(bird):
    return client_of("default")._ways[bird.name].link


def test_calls_go_straight_to_the_bird(scribe):
    assert scribe.echo(1) == 1
    assert isinstance(way_to(scribe), DirectLink)
    assert way_to(scribe).local, "a Unix socket: all nodes of this test are on one machine"


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


@pytest.mark.own_process("its process ends")
def test_sockets_of_dead_hosts_are_cleared_away(flyground, name):
    bird = flock_ray.start(name, Scribe)
    pid = bird.pid()
    folder = cluster.folder_of(cluster.record_of("default"), flock_ray.where(name))
    path = Path(folder, f"{pid}.sock")
    assert path.exists()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not path.exists(), "its nest removes it")
    other = Path(folder, f"{bird.pid.options(retry=True)()}.sock")
    flock_ray.stop(name)
    eventually(lambda: not other.exists(), "it is gone with its host")


@pytest.mark.own_process("its connection is made anew")
def test_without_the_secret_nobody_is_heard_and_the_caller_takes_ray(flyground, name, monkeypatch):
    """Here the caller's proofs are wrong: as if it were of another flock, or somebody else had taken the port."""
    flock_ray.start(name, Scribe)
    flock_ray.wait(name)
    client = client_of("default")
    monkeypatch.setattr(Connection, "_proof", lambda self, part, nonce: bytes(32))
    try:
        assert flock_ray.call(name, "echo", 5) == 5
        assert isinstance(client._ways[name].link, RayLink)
    finally:
        client.links._unreached.clear()


def ask_nest(node, query):
    record = cluster.record_of("default")
    link = DirectNestLink(record.secret, record.life, cluster.folder_of(record, node))
    return pickle.loads(link.read(pickle.dumps(query)).get(30).message)


def test_info_says_which_way_calls_go(flyground, name):
    bird = flock_ray.start(name, Scribe)
    flock_ray.wait(name)
    assert flock_ray.info(name).path is None, "it was not called yet"
    assert bird.echo(1) == 1
    assert flock_ray.info(name).path == "unix"


@pytest.mark.own_process("its connection is made anew")
def test_calls_go_over_tcp_where_there_is_no_unix_socket(flyground, name):
    """As between machines."""
    bird = flock_ray.start(name, Scribe)
    flock_ray.wait(name)
    folder = cluster.folder_of(cluster.record_of("default"), flock_ray.where(name))
    (own,) = [path for path in folder.glob("*.sock") if path.name == client_of("default").courier.run(route_of(name)).address.split()[1]]
    own.rename(own.with_suffix(".away"))
    try:
        assert bird.echo(1) == 1
        assert [bird.echo.future(n).result(30) for n in range(200)] == list(range(200))
        assert flock_ray.info(name).path == "tcp"
    finally:
        own.with_suffix(".away").rename(own)


async def route_of(name):
    client = client_of("default")
    return await client.asks.locate(name, "running", client.clock() + 30, None)


def test_streams_of_real_birds(scribe):
    assert list(scribe.count.stream(1000)) == list(range(1000))
    assert list(flock_ray.stream(scribe.name, "count", 20)) == list(range(20))

    async def read():
        return [n async for n in flock_ray.aio.stream(scribe, "count", 500)]

    assert asyncio.run(read()) == list(range(500))
    arrays = [array.sum() for array in scribe.arrays.stream(3)]
    assert arrays == [0, 300_000, 600_000], "what is large goes by Ray"


def test_a_stream_whose_bird_is_killed_or_restarted_ends_after_what_had_arrived(flyground, name):
    bird = flock_ray.start(name, Scribe)
    for end in (lambda: os.kill(bird.pid(), signal.SIGKILL), lambda: flock_ray.restart(bird)):
        stream = bird.count.stream(10**9)
        got = [next(stream) for _ in range(20)]
        end()
        with pytest.raises(flock_ray.BirdUnavailable):
            for n in stream:
                got.append(n)
                assert len(got) < 10_000_000
        assert got == list(range(len(got)))
        flock_ray.wait(name)
        assert next(bird.count.options(retry=True).stream(1)) == 0


def test_a_bird_reads_another_birds_stream(flyground, name):
    flock_ray.start((name, "source"), Scribe)
    reader = flock_ray.start((name, "reader"), Scribe)
    try:
        assert reader.total((name, "source"), 100) == sum(range(100))
    finally:
        flock_ray.stop((name, "source"))
        flock_ray.stop(reader)


def test_nests_and_their_callers_and_hosts_talk_over_sockets(flyground, name):
    bird = flock_ray.start(name, Scribe)
    assert isinstance(client_of("default").asks._nest, DirectNestLink)
    # The host of a bird has a connection to its nest's socket, and the nest has one to the host and to the other nest.
    nest = next(one.node_id for one in flock_ray.nests() if one.node_id == flock_ray.where(name))
    pid = ray.get(cluster.nest_handle(cluster.record_of("default").life, nest).pid.remote())
    ends = [one for one in psutil.Process(pid).net_connections("tcp") if one.status == "ESTABLISHED"]
    doors = {one.laddr.port for one in psutil.Process(pid).net_connections("tcp") if one.status == "LISTEN"}
    assert any(one.laddr.port in doors for one in ends) or any(one.raddr.port for one in ends)
    mine = [one for one in psutil.Process(bird.pid()).net_connections("unix") if one.raddr or one.laddr]
    assert mine


def test_who_knocks_without_the_secret_is_turned_away_and_the_nest_says_so(flyground, name):
    flock_ray.start(name, Scribe)
    flock_ray.wait(name)
    address = client_of("default").courier.run(route_of(name)).address.split()[0]
    doors = [address, next(member_door(nest) for nest in flock_ray.nests())]
    for door in doors:
        ip, port = door.rsplit(":", 1)
        for _ in range(5):
            with socket.create_connection((ip, int(port)), 5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
                stranger.settimeout(5)
                assert stranger.recv(100) in (b"",)

    def by_nests():
        return {one.where == "nest" for one in flock_ray.events(follow=False, kinds=ConnectionsRefused)}

    eventually(lambda: by_nests() == {True, False}, "nest and host have told")
    assert flock_ray.call(name, "echo", 1) == 1


def member_door(nest):
    record = cluster.record_of("default")
    pid = ray.get(cluster.nest_handle(record.life, nest.node_id).pid.remote())
    kinship = int(nest.address.rsplit(":", 1)[1])
    listening = {one.laddr for one in psutil.Process(pid).net_connections("tcp") if one.status == "LISTEN"}
    for ip, port in listening:
        if port == kinship or ip != nest.address.rsplit(":", 1)[0]:
            continue
        with socket.create_connection((ip, port), 5) as probe:
            probe.sendall(Connection(b"x" * 32, record.life, os.urandom(32), listens=False).greeting())
            probe.settimeout(1)
            try:
                if probe.recv(100).startswith(b"flck"):
                    return f"{ip}:{port}"
            except OSError:
                continue
    raise AssertionError(f"no door of the nest among {listening}")


def fresh_client():
    """As a process that has never called anything."""
    client_module._process.clients.pop("default", None)
    cluster._records.clear()
    cluster._nests.clear()
    cluster._hosts.clear()


@pytest.mark.own_process("a light one runs without the head")
def test_what_callers_do_needs_no_head(flyground, name):
    """C6. The head's process is stopped: whoever asks it would wait for ever."""
    known = flock_ray.start((name, "known"), Scribe)
    others = [flock_ray.start((name, n), Scribe) for n in range(4)]
    flock_ray.wait([known, *others])
    assert known.echo(1) == 1
    gcs = flyground.cluster.head_node.all_processes["gcs_server"][0].process.pid
    os.kill(gcs, signal.SIGSTOP)
    outcome = {}

    def work():
        try:
            assert known.echo(2) == 2
            fresh_client()
            assert known.echo(3) == 3
            for n, bird in enumerate(others):  # never called before: their hosts have to be found
                assert bird.echo(n) == n
                bird.note.cast(n)
                assert bird.read() == [n]
            assert asyncio.run(flock_ray.aio.call((name, 0), "echo", 5)) == 5
            assert list(flock_ray.stream((name, 1), "count", 50)) == list(range(50))
            assert others[2].total((name, 3), 10) == 45, "also from one bird to another"
            assert flock_ray.info((name, 1)).state == "running"
            assert flock_ray.count() >= 5
            assert len(flock_ray.nests()) == NODES
            assert flock_ray.alive((name, 2))
            assert not flock_ray.alive((name, "nobody"))
            flock_ray.stop((name, 3))
            flock_ray.wait((name, 3), "gone", timeout=20)
            flock_ray.start((name, "late"), Scribe)  # accepted; its process needs Ray
            assert flock_ray.info((name, "late")).state in ("pending", "starting")
        except BaseException as error:  # told below, when the head goes on
            outcome["error"] = error
        outcome["done"] = True

    worker = threading.Thread(target=work, daemon=True)
    try:
        worker.start()
        worker.join(40)
        finished = dict(outcome)
    finally:
        os.kill(gcs, signal.SIGCONT)
    assert finished, "it hangs"
    assert "error" not in finished, repr(finished["error"])
    flock_ray.wait((name, "late"), timeout=60)
    for end in ("known", "late", 0, 1, 2):
        flock_ray.stop((name, end))


def test_a_child_forked_from_a_caller_is_refused_and_disturbs_nobody(scribe):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            flock_ray.call(scribe, "echo", 1)
        except RuntimeError as error:
            os.write(theirs, str(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as said:
        assert "forked" in said.read()
    os.waitpid(pid, 0)
    assert [scribe.echo(n) for n in range(10)] == list(range(10))


def test_a_bird_that_listens_nowhere_is_called_by_ray(flyground, name):
    """`wire="ray"` is for a whole flock."""
    flock_ray.init("lake", wire="ray")
    lake = flock_ray.Flock("lake")
    try:
        bird = lake.start(name, Scribe)
        assert bird.echo(3) == 3
        assert isinstance(client_of("lake")._ways[name].link, RayLink)
    finally:
        lake.destroy()
        flock_ray.init("default")
