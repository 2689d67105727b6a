"""Callers and a host over real sockets, in one process, without Ray."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref

import pytest

from flock_ray.core.connection import CALL, Connection, ProtocolError, frame
from flock_ray.runtime import listener as listener_module
from flock_ray.runtime import sockets
from flock_ray.runtime.listener import Listener
from flock_ray.runtime.replies import Down, NoAnswer, Urgency
from flock_ray.runtime.sockets import SocketLink

SECRET, LIFE = b"s" * 32, "0123456789ab"


def until(true, what, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


class Bench:
    """A listener that echoes; "sleep" takes long, and "hold" waits for `release`."""

    def __init__(self, folder, slots=1, ip="127.0.0.1", room=100_000):
        self.folder = folder
        self.release = threading.Event()
        self.heard = []
        self.gone = []
        path = folder / "1.sock"
        self.listener = Listener(SECRET, LIFE, path, ip, None, slots, room, self.call, lambda body: b"full", self.control, self.gone.append)
        self.listener.start()

    def call(self, caller, number, message):
        body = bytes(message)
        self.heard.append(body)
        if body.startswith(b"sleep"):
            time.sleep(0.3)
        if body == b"hold":
            self.release.wait(10)
        return body

    def control(self, order):
        return b"control " + bytes(order)

    def link(self, local=True, secret=SECRET, life=LIFE):
        return SocketLink(secret, life, self.listener.address, self.folder if local else self.folder / "nowhere")


def rude_caller(bench):
    """The socket of one who has proved himself, and then does as the test likes."""
    rude = Connection(SECRET, LIFE, os.urandom(32), listens=False)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(bench.folder / "1.sock"))
    sock.sendall(rude.greeting())
    _, proof = rude.receive(sock.recv(4096))
    sock.sendall(proof)
    return sock


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.release.set()
    bench.listener.close()


@pytest.mark.parametrize("local", [True, False], ids=["unix", "tcp"])
def test_a_call_and_its_answer(bench, local):
    link = bench.link(local)
    assert link.local is local
    for n in range(100):
        assert link.transmit(CALL, b"%d" % n).get(5).message == b"%d" % n
    assert link.control(b"x").get(5).message == b"control x"


def test_many_in_flight_are_answered_in_order(bench):
    link = bench.link()
    replies = [link.transmit(CALL, b"%d" % n) for n in range(5000)]
    assert [reply.get(10).message for reply in replies] == [b"%d" % n for n in range(5000)]
    assert bench.heard == [b"%d" % n for n in range(5000)]


def test_threads_share_a_connection(bench):
    link, wrong = bench.link(), []

    def ask(k):
        for n in range(300):
            body = b"%d.%d" % (k, n)
            if link.transmit(CALL, body).get(10).message != body:
                wrong.append(body)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    assert len(bench.heard) == 2400


def test_answers_nobody_waits_for_are_read_too(bench):
    link, there = bench.link(), threading.Event()
    reply = link.transmit(CALL, b"x")
    reply.on_done(lambda _: there.set())
    assert there.wait(5)
    assert reply.get(0).message == b"x"
    late = threading.Event()
    reply.on_done(lambda _: late.set())
    assert late.is_set()


def test_a_watched_answer_comes_while_another_thread_reads(bench):
    link, there = bench.link(), threading.Event()
    slow = link.transmit(CALL, b"hold")
    waiting = threading.Thread(target=slow.get, args=(10,))
    waiting.start()
    time.sleep(0.05)
    link.control(b"watched").on_done(lambda _: there.set())
    assert there.wait(5)
    bench.release.set()
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_slow_method_holds_up_no_reading_and_no_other_caller(bench):
    link, other = bench.link(), bench.link(local=False)
    slow = link.transmit(CALL, b"hold")
    began = time.monotonic()
    assert other.control(b"x").get(5).message == b"control x"
    assert time.monotonic() - began < 1
    with pytest.raises(NoAnswer):
        slow.get(0.05)
    queued = [other.transmit(CALL, b"%d" % n) for n in range(100)]
    bench.release.set()
    assert slow.get(5).message == b"hold"
    assert [reply.get(5).message for reply in queued] == [b"%d" % n for n in range(100)]


def test_slots_run_side_by_side(tmp_path):
    bench = Bench(tmp_path, slots=3)
    link = bench.link()
    began = time.monotonic()
    replies = [link.transmit(CALL, b"sleep") for _ in range(3)]
    assert [reply.get(5).message for reply in replies] == [b"sleep"] * 3
    assert time.monotonic() - began < 0.8
    bench.listener.close()


def test_a_broken_connection_is_told_at_once_to_all_who_wait(bench):
    link, told = bench.link(), []
    slow = link.transmit(CALL, b"hold")

    def wait():
        try:
            slow.get(10)
        except Down as down:
            told.append(down)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    for caller in list(bench.listener._callers.values()):
        caller.socket.shutdown(socket.SHUT_RDWR)
    waiting.join(5)
    assert [down.ran for down in told] == [True], "it may have run"
    assert link.lost()
    with pytest.raises(Down) as caught:
        link.transmit(CALL, b"x").get(5)
    assert not caught.value.ran, "it was not sent"


def test_an_idle_links_end_is_seen_without_sending_over_tcp(bench, monkeypatch):
    """A message for a peer that has gone is taken by TCP, and lost."""
    monkeypatch.setattr(sockets, "IDLE", 0.0)
    link = bench.link(local=False)
    assert link.transmit(CALL, b"x").get(5).message == b"x"
    assert not link.lost()
    for caller in list(bench.listener._callers.values()):
        caller.socket.shutdown(socket.SHUT_RDWR)
    until(link.lost, "its end is seen")


def test_a_message_to_a_host_of_this_machine_that_has_gone_was_not_sent(bench):
    link = bench.link()
    assert link.transmit(CALL, b"x").get(5).message == b"x"
    for caller in list(bench.listener._callers.values()):
        bench.listener._drop(caller)
    for urgency in Urgency:
        with pytest.raises(Down) as caught:
            link.transmit(CALL, b"y", urgency).get(5)
        assert not caught.value.ran
    assert link.lost()
    assert bench.heard == [b"x"]


@pytest.mark.parametrize("wrong", [{"secret": b"x" * 32}, {"life": "another life"}])
def test_who_does_not_belong_does_not_get_in(bench, wrong):
    with pytest.raises(ProtocolError):
        bench.link(**wrong)
    assert bench.link().transmit(CALL, b"x").get(5).message == b"x"
    assert bench.heard == [b"x"]


def test_noise_floods_and_slow_strangers_harm_nobody(bench, monkeypatch):
    monkeypatch.setattr(listener_module, "STRANGERS", 20)
    monkeypatch.setattr(listener_module, "PATIENCE", 0.2)
    ip, port = bench.listener.address.split()[0].rsplit(":", 1)
    link = bench.link()
    strangers = [socket.create_connection((ip, int(port))) for _ in range(60)]
    for n, stranger in enumerate(strangers):
        if n % 3:
            try:
                stranger.sendall(os.urandom(200) if n % 3 == 1 else b"fl")
            except OSError:
                continue  # it was turned away already
    assert link.transmit(CALL, b"x").get(5).message == b"x"
    time.sleep(0.5)
    assert bench.link(local=False).transmit(CALL, b"y").get(5).message == b"y"
    assert bench.listener.refused >= 40
    assert bench.heard == [b"x", b"y"]
    for stranger in strangers:
        stranger.close()


def test_who_does_not_read_his_answers_is_cut_off(bench, monkeypatch):
    monkeypatch.setattr(listener_module, "UNREAD", 1 << 20)
    sock = rude_caller(bench)
    sock.settimeout(5)
    with pytest.raises(OSError, match=r"[Bb]roken|reset"):
        for n in range(1000):
            sock.sendall(frame(CALL, n, bytes(100_000)))
    assert bench.link().transmit(CALL, b"x").get(5).message == b"x"


def test_a_path_that_is_too_long_for_the_kernel_leaves_tcp(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    bench = Bench(folder)
    link = bench.link()
    assert not link.local
    assert link.transmit(CALL, b"x").get(5).message == b"x"
    bench.listener.close()


def test_ports_can_be_given(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="larger range"):
            Listener(SECRET, LIFE, tmp_path / "1.sock", "127.0.0.1", (port, port), 1, 1, None, None, None)


@pytest.mark.parametrize("end", [SocketLink.retire, lambda link: link._broke("a test"), lambda link: None])
def test_the_readers_thread_keeps_no_link_alive(bench, end):
    """It had kept those that were retired, each with a socket that its host had long closed."""
    link, there = bench.link(), threading.Event()
    link.transmit(CALL, b"x").on_done(lambda _: there.set())
    assert there.wait(5)
    end(link)
    number, gone = link.fileno, weakref.ref(link)
    del link
    until(lambda: gone() is None, "nobody has it")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_links_count_those_who_watch_whatever_happens(bench):
    link, there = bench.link(), threading.Event()
    reply = link.transmit(CALL, b"x")
    for _ in range(3):
        reply.on_done(lambda _: there.set())
    assert there.wait(5)
    slow = link.transmit(CALL, b"hold")
    slow.on_done(lambda _: None)
    assert link.watched == 1
    link._broke("a test")
    assert link.watched == 0


def test_the_answer_of_a_quick_method_does_not_wait_for_a_slow_one_behind_it(bench):
    link = bench.link()
    quick, slow = link.transmit(CALL, b"quick"), link.transmit(CALL, b"hold")
    began = time.monotonic()
    assert quick.get(5).message == b"quick"
    assert time.monotonic() - began < 1
    assert not slow.done
    bench.release.set()
    assert slow.get(5).message == b"hold"


def test_a_message_that_cannot_be_read_costs_its_caller_the_connection_and_nobody_else(bench):
    link, other = bench.link(), bench.link()
    bench.call = None
    bench.listener._call = lambda caller, number, message: bytes(message) if message == b"x" else 1 / 0
    with pytest.raises(Down):
        link.transmit(CALL, b"bad").get(5)
    assert other.transmit(CALL, b"x").get(5).message == b"x"


def test_without_tcp_only_this_machine_gets_in(tmp_path):
    bench = Bench(tmp_path, ip=None)
    assert bench.link().transmit(CALL, b"x").get(5).message == b"x"
    with pytest.raises(ConnectionRefusedError):
        bench.link(local=False)
    bench.listener.close()


def test_a_caller_cut_off_while_another_thread_takes_over_stops_nobody(bench, monkeypatch):
    """The watchdog sends what the leader had ready, finds that its caller does not read, and cuts it off: all at once."""
    monkeypatch.setattr(listener_module, "UNREAD", 1 << 20)
    sock = rude_caller(bench)
    sock.sendall(frame(CALL, 1, bytes(3_000_000)) + frame(CALL, 2, b"sleep"))
    time.sleep(0.1)
    assert bench.link().transmit(CALL, b"x").get(5).message == b"x"
    sock.close()


def test_a_control_that_cannot_be_read_costs_its_sender_the_connection(bench):
    other = bench.link()
    bench.listener._control = lambda body: exit(3)
    with pytest.raises(Down):
        bench.link().control(b"garbage").get(5)
    assert other.transmit(CALL, b"x").get(5).message == b"x"
