"""A nest's door and a nest's ways, over real sockets on an event loop; and TLS on both kinds of listeners."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from unittest import mock

import pytest

from flock_ray.core import wire
from flock_ray.core.connection import ANSWER, CALL, CONTROL, NOTE, Connection, ProtocolError, frame
from flock_ray.runtime import cluster, peers, tls
from flock_ray.runtime import listener as listener_module
from flock_ray.runtime import ways as ways_module
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.links import RayLink
from flock_ray.runtime.listener import Listener
from flock_ray.runtime.peers import Door, Wires, probe
from flock_ray.runtime.replies import Down
from flock_ray.runtime.sockets import SocketLink
from flock_ray.runtime.ways import DirectNestLink, Ways
from flock_ray.specs import Dot, Life, Route
from tests.support import certificates

SECRET, LIFE = b"s" * 32, "0123456789ab"


async def until(true, what, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)  # between looks


class Nest:
    """Answers calls with what it got, and keeps notes."""

    def __init__(self, folder, tls=None):
        self.notes, self.refusals, self.requests = [], [], []
        self.folder, self.tls = folder, tls
        self.door = Door(SECRET, LIFE, folder / "nest.sock", self.heard, lambda why, peer: self.refusals.append((why, peer)))

    async def open(self, **given):
        self.address = await self.door.open("127.0.0.1", given.get("ports"), self.tls)
        return self

    def heard(self, link, kind, number, body):
        if kind == NOTE:
            self.notes.append(body)
        else:
            head, rest = wire.decode(body)
            self.requests.append(head)
            link.send(ANSWER, number, b"answer to " + bytes(rest))


def wires(tls=None):
    unsent = []
    made = Wires(SECRET, LIFE, tls, lambda key, body: unsent.append((key, body)))
    return made, unsent


def test_callers_and_hosts_ask_a_nest_from_their_threads(tmp_path):
    async def go():
        nest = await Nest(tmp_path).open()
        loop = asyncio.get_running_loop()

        def ask():
            link = DirectNestLink(SECRET, LIFE, tmp_path)
            assert link.ask(b"1").get(5).message == b"answer to 1"
            assert link.read(b"2").get(5).message == b"answer to 2"
            link.ready(5)
            assert len(link.ask(bytes(9_000_000)).get(20).message) > 9_000_000, "what a nest is told may be long"
            assert SocketLink(SECRET, LIFE, nest.address, tmp_path).control(wire.encode(wire.ForNest("x"), b"3")).get(5).message
            return link

        link = await loop.run_in_executor(None, ask)
        assert [head.what for head in nest.requests] == ["ask", "read", "ready", "ask", "x"]
        nest.door.close()
        with pytest.raises(Down):
            await loop.run_in_executor(None, lambda: link.ask(b"4").get(5))

    asyncio.run(go())


def test_nests_send_each_other_notes_of_any_length_in_order(tmp_path):
    async def go():
        nest = await Nest(tmp_path).open()
        ways, unsent = wires()
        long = os.urandom(20_000_000)
        for body in (b"1", b"2", long, b"3"):
            assert ways.send("peer", nest.address, NOTE, body)
        await until(lambda: len(nest.notes) == 4, "all have come")
        assert nest.notes == [b"1", b"2", long, b"3"]
        assert not unsent
        ways.close()
        nest.door.close()

    asyncio.run(go())


def test_orders_go_to_a_host_by_its_unix_socket(tmp_path):
    heard = []
    ears = Listener(SECRET, LIFE, tmp_path / "1.sock", None, None, 1, 10, None, None, lambda body: heard.append(bytes(body)) or b"")
    ears.start()

    async def go():
        ways, _ = wires()
        for n in range(100):
            assert ways.send("host", tmp_path / "1.sock", CONTROL, b"%d" % n)
        await until(lambda: len(heard) == 100, "all have come")
        ways.close()

    asyncio.run(go())
    assert heard == [b"%d" % n for n in range(100)]
    ears.close()


def test_what_cannot_be_sent_comes_back_and_a_way_is_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "AGAIN", 0.2)

    async def go():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
        ways, unsent = wires()
        assert ways.send("peer", address, NOTE, b"1")
        await until(lambda: unsent == [("peer", b"1")], "it comes back")
        assert not ways.send("peer", address, NOTE, b"2"), "not again so soon"
        assert ways.send("host", tmp_path / "none.sock", CONTROL, b"3")
        await until(lambda: ("host", b"3") in unsent, "it comes back")
        await asyncio.sleep(0.25)
        nest = await Nest(tmp_path).open()
        assert ways.send("peer", nest.address, NOTE, b"4")
        await until(lambda: nest.notes == [b"4"], "there is a way now")
        nest.door.close()
        await until(lambda: ways._wires["peer"].over, "its end is seen")
        again = await Nest(tmp_path).open()
        assert ways.send("peer", again.address, NOTE, b"5")
        await until(lambda: again.notes == [b"5"], "a new connection after the old one's end")
        again.door.close()
        ways.close()

    asyncio.run(go())


@pytest.mark.parametrize("wrong", [(b"x" * 32, LIFE), (SECRET, "another life")])
def test_who_does_not_belong_is_turned_away_and_that_is_told(tmp_path, wrong):
    async def go():
        nest = await Nest(tmp_path).open()
        ways = Wires(*wrong, None, lambda key, body: lost.append(body))
        lost = []
        ways.send("peer", nest.address, NOTE, b"1")
        await until(lambda: lost == [b"1"], "it is not heard")
        await until(lambda: nest.refusals, "it is told")
        assert nest.notes == []
        loop = asyncio.get_running_loop()
        with pytest.raises(ProtocolError):
            await loop.run_in_executor(None, lambda: SocketLink(*wrong, nest.address, tmp_path))
        nest.door.close()

    asyncio.run(go())


def test_noise_floods_and_slow_strangers_harm_no_nest(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "STRANGERS", 20)
    monkeypatch.setattr(peers, "PATIENCE", 0.3)

    async def go():
        nest = await Nest(tmp_path).open()
        ways, _ = wires()
        ways.send("peer", nest.address, NOTE, b"1")
        await until(lambda: nest.notes == [b"1"], "a friend is heard")
        ip, port = nest.address.rsplit(":", 1)
        strangers = [socket.create_connection((ip, int(port))) for _ in range(60)]
        for n, stranger in enumerate(strangers):
            if n % 3:
                try:
                    stranger.sendall(os.urandom(200) if n % 3 == 1 else b"fl")
                except OSError:
                    continue  # it was turned away already
        await until(lambda: len(nest.refusals) >= 60, "all are turned away")
        ways.send("peer", nest.address, NOTE, b"2")
        other, _ = wires()
        other.send("peer", nest.address, NOTE, b"3")
        await until(lambda: nest.notes == [b"1", b"2", b"3"], "friends are heard as before")
        assert len(nest.door._wires) == 2
        for stranger in strangers:
            stranger.close()
        for each in (ways, other):
            each.close()
        nest.door.close()

    asyncio.run(go())


def test_who_does_not_read_what_he_asked_for_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "UNREAD", 1 << 20)

    async def go():
        nest = await Nest(tmp_path).open()
        rude = Connection(SECRET, LIFE, os.urandom(32), listens=False)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "nest.sock"))
        writer.write(rude.greeting())
        _, proof = rude.receive(await reader.read(4096))
        writer.write(proof)
        request = frame(CALL, 1, wire.encode(wire.ForNest("x"), bytes(300_000)))
        for _ in range(40):
            writer.write(request)
        await until(lambda: not nest.door._wires, "it is cut off")
        writer.close()
        nest.door.close()

    asyncio.run(go())


def test_a_stale_socket_file_of_an_earlier_life_is_replaced(tmp_path):
    (tmp_path / "nest.sock").write_text("stale")

    async def go():
        nest = await Nest(tmp_path).open()
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, lambda: DirectNestLink(SECRET, LIFE, tmp_path).ask(b"1").get(5))
        nest.door.close()
        assert not (tmp_path / "nest.sock").exists()

    asyncio.run(go())


# TLS


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    return tls.contexts(certificates.make(tmp_path_factory.mktemp("tls"), "127.0.0.1"))


def test_there_is_no_tls_where_ray_has_none():
    assert tls.contexts({}) is None
    assert tls.contexts({"RAY_USE_TLS": "0"}) is None


def test_calls_over_tcp_are_encrypted_where_ray_has_tls(tmp_path, certified):
    heard = []

    def call(caller, number, message):
        heard.append(bytes(message))
        return bytes(message)

    ears = Listener(
        SECRET, LIFE, tmp_path / "1.sock", "127.0.0.1", None, 1, 1000, call, None, lambda body: b"control " + bytes(body), tls=certified[0]
    )
    ears.start()
    nowhere = tmp_path / "nowhere"
    link = SocketLink(SECRET, LIFE, ears.address, nowhere, certified[1])
    assert isinstance(link._socket, tls.Encrypted)
    for n in range(100):
        assert link.transmit(CALL, b"%d" % n).get(5).message == b"%d" % n
    replies = [link.transmit(CALL, b"%d" % n + bytes(50_000)) for n in range(300)]
    assert [reply.get(10).message[:3].rstrip(b"\0") for reply in replies] == [b"%d" % n for n in range(300)]
    wrong = []

    def ask(k):
        for n in range(100):
            if link.transmit(CALL, b"%d.%d" % (k, n)).get(10).message != b"%d.%d" % (k, n):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    there = threading.Event()
    link.control(b"x").on_done(lambda _: there.set())
    assert there.wait(5)
    with pytest.raises((OSError, ProtocolError)):
        SocketLink(SECRET, LIFE, ears.address, nowhere)  # in the clear
    assert SocketLink(SECRET, LIFE, ears.address, tmp_path).local, "on this machine nothing need be encrypted"
    ears.close()


def test_another_authoritys_certificate_opens_no_door(tmp_path, certified):
    stranger = tls.contexts(certificates.make(tmp_path / "other", "127.0.0.1"))
    refusals = []
    ears = Listener(
        SECRET, LIFE, tmp_path / "1.sock", "127.0.0.1", None, 1, 10, None, None, None,
        refused=lambda why, count: refusals.append(why), tls=certified[0],
    )  # fmt: skip
    ears.start()
    with pytest.raises((OSError, ProtocolError)):
        SocketLink(SECRET, LIFE, ears.address, tmp_path / "nowhere", stranger[1])
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((OSError, ProtocolError)):
        SocketLink(SECRET, LIFE, ears.address, tmp_path / "nowhere", bare)
    ears.close()


def test_nests_talk_encrypted_where_ray_has_tls(tmp_path, certified):
    async def go():
        nest = await Nest(tmp_path, certified[0]).open()
        ways, unsent = wires(certified[1])
        long = os.urandom(5_000_000)
        for body in (b"1", long):
            assert ways.send("peer", nest.address, NOTE, body)
        await until(lambda: nest.notes == [b"1", long], "all have come")
        clear, lost = wires()
        clear.send("peer", nest.address, NOTE, b"2")
        await until(lambda: lost == [("peer", b"2")], "in the clear nobody is heard")
        ways.close()
        nest.door.close()

    asyncio.run(go())


def test_refusals_are_told_together(monkeypatch):
    told = []
    monkeypatch.setattr(listener_module, "TOLD", 0.1)
    refusals = listener_module.Refusals(lambda why, count: told.append((why, count)))
    for _ in range(100):
        refusals.add("noise")
    assert told == [("noise", 1)]
    time.sleep(0.11)
    refusals.tell()
    assert told == [("noise", 1), ("noise", 99)]


@pytest.fixture
def ways(tmp_path, monkeypatch):
    """To hosts that Ray reaches; there is no Ray."""
    monkeypatch.setattr(cluster, "record_of", lambda flock: type("Record", (), {"secret": SECRET, "life": LIFE}))
    monkeypatch.setattr(cluster, "folder_of", lambda record, node: tmp_path)
    monkeypatch.setattr(cluster, "is_ray_client", lambda: False)
    monkeypatch.setattr(cluster, "death_watch", lambda handle: None)
    monkeypatch.setattr(Ways, "ray_host", lambda self, route: RayLink(mock.MagicMock(), route.host))
    return Ways("default", Courier())


def route_to(address):
    return Route("a", Dot(Life("node", 1), 1), 1, "node", "host:1", address)


def test_a_host_that_nobody_listens_for_is_looked_at_by_ray_before_a_message_is_risked(ways):
    """Its process has just died, and its nest has not seen it yet: a message by Ray would be lost with it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]} 1.sock"
    link = ways.host(route_to(address))
    assert (link.path, link.used_at) == ("ray", 0.0)
    assert not ways._making


def test_ray_stands_in_for_a_socket_only_until_it_can_be_had(ways, tmp_path, monkeypatch):
    """A caller that was sent to Ray during a split stayed there, and Ray answered it long after the heal."""
    monkeypatch.setattr(ways_module, "AGAIN", 0.05)
    folder = tmp_path / "later"
    monkeypatch.setattr(cluster, "folder_of", lambda record, node: folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    route = route_to(f"127.0.0.1:{port} 1.sock")
    link = ways.host(route)
    assert link.path == "ray"
    assert ways.host(route) is link
    folder.mkdir()
    ears = Listener(SECRET, LIFE, folder / "1.sock", "127.0.0.1", (port, port), 1, 10, None, None, lambda body: b"")
    ears.start()
    try:
        end = time.monotonic() + 10
        while not link.lost() and time.monotonic() < end:
            time.sleep(0.01)
        assert link.lost(), "lanes ask for another"
        assert ways.host(route).path in ("unix", "tcp")
        assert not ways._stand_ins
    finally:
        ears.close()


def test_a_way_that_ends_is_told_and_one_that_was_dropped_is_not(tmp_path):
    async def go():
        nest = await Nest(tmp_path).open()
        broken = []
        ways = Wires(SECRET, LIFE, None, lambda key, body: None, broken.append)
        for key in ("a", "b"):
            assert ways.send(key, nest.address, NOTE, b"1")
        await until(lambda: len(nest.notes) == 2, "they are open")
        ways.drop("a")
        await asyncio.sleep(0.1)
        assert not broken
        nest.door.close()
        await until(lambda: broken == ["b"], "it is told")
        assert ways.send("b", nest.address, NOTE, b"2")
        await until(lambda: broken == ["b", "b"], "nobody listens any more")
        ways.close()

    asyncio.run(go())


def test_a_port_is_up_or_refuses_or_is_silent():
    async def go():
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await probe("127.0.0.1", port, 1.0) == "up"
        server.close()
        await server.wait_closed()
        assert await probe("127.0.0.1", port, 1.0) == "refused"
        full = socket.socket()  # a queue of strangers that nobody lets in
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        assert await probe("127.0.0.1", full.getsockname()[1], 0.3) == "silent"
        for each in (full, *waiting):
            each.close()

    asyncio.run(go())
