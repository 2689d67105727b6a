"""Links to hosts over sockets: straight from the caller's process to the bird's, without Ray (`runtime/listener.py` is the other end).

A process has one connection to a host, and all its threads share it. Who waits for an answer reads the connection himself, and hands what
is for others to them: no hop for one who is alone. For answers that nobody waits for on a thread (futures, coroutines), a thread of this
module reads, as long as no one else does.

Rules kept here: a message that was not written whole has not run; once it is, only its answer tells (`Down.ran`); what travels beside a
message, or is too long for a frame, goes by Ray.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from flock_ray.core.connection import CALL, CONTROL, Connection, Frame, ProtocolError, frame
from flock_ray.runtime.links import Down, NoAnswer, Raw
from flock_ray.runtime.listener import READ, keep_alive

CONNECT = 2.0  # seconds for a connection and the proofs; then the way is Ray's
LONG = 1.0  # seconds of one wait in the kernel


class WireReply:
    """The answer to one frame."""

    __slots__ = ("_callbacks", "_down", "_gate", "_link", "_raw", "done")

    def __init__(self, link: SocketLink) -> None:
        self._link = link
        self._raw: Raw | None = None
        self._down: Down | None = None
        self._gate: threading.Lock | None = None
        self._callbacks: list[Callable[[], object]] | None = None
        self.done = False

    def get(self, timeout: float | None) -> Raw:
        if not self.done:
            self._link.wait(self, timeout)
        if self._raw is not None:
            return self._raw
        if self._down is not None:
            raise self._down
        raise NoAnswer

    def on_done(self, callback: Callable[[], object]) -> None:
        with self._link.mutex:
            here = self.done
            if not here:
                if self._callbacks is None:
                    self._callbacks = []
                    self._link.watched += 1
                self._callbacks.append(callback)
        if here:
            callback()
        else:
            self._link.watch()

    # What the link calls

    def settle(self, raw: Raw | None, down: Down | None) -> None:
        with self._link.mutex:
            self._raw, self._down, self.done = raw, down, True
            callbacks, gate = self._callbacks, self._gate
            self._callbacks = None
            if callbacks is not None:
                self._link.watched -= 1
        if gate is not None:
            with contextlib.suppress(RuntimeError):  # let go already
                gate.release()
        for callback in callbacks or ():
            callback()

    def gate(self) -> threading.Lock:
        """What the thread that waits, and does not read, waits for."""
        self._gate = gate = threading.Lock()
        gate.acquire()
        return gate


class SocketLink:
    """The way to one host. All methods may be called from any thread.

    Args:
        secret, life: the flock's.
        address: as `Listener.address` has it.
        folder: of the host's Unix socket, if it is on this machine.

    Raises:
        OSError: it cannot be reached.
        ProtocolError: what listens there does not hold the flock's secret.
    """

    def __init__(self, secret: bytes, life: str, address: str, folder: Path) -> None:
        self.mutex = threading.Lock()  # guards the replies' states, and the next two
        self.watched = 0  # replies that have callbacks
        self._sleepers: dict[WireReply, threading.Lock] = {}
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._replies: dict[int, WireReply] = {}  # by id; one is added, or all are taken away, under `_writing`
        self._next = 0
        self._gone = False
        self._connection = Connection(secret, life, os.urandom(32), listens=False)
        self._socket = _connect(address, folder)
        self.local = self._socket.family == socket.AF_UNIX
        self._used_at = 0.0
        try:
            self._shake_hands()
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    def _shake_hands(self) -> None:
        sock = self._socket
        sock.settimeout(CONNECT)
        sock.sendall(self._connection.greeting())
        while not self._connection.open:
            data = sock.recv(READ)
            if not data:
                raise ProtocolError("it closed the connection")
            _, reply = self._connection.receive(data)
            if reply:
                sock.sendall(reply)
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(LONG), 0))
        self._used_at = time.monotonic()

    # As `links.Link` has it

    @property
    def used_at(self) -> float:
        """On this machine the kernel tells at once of a host's end: `lost` looks, and no ping is needed."""
        return time.monotonic() if self.local else self._used_at

    @used_at.setter
    def used_at(self, now: float) -> None:
        self._used_at = now

    def lost(self) -> bool:
        if not self._gone and not self._replies and self._reading.acquire(blocking=False):
            try:
                if not self._replies and self._poll.poll(0):
                    self._read(0.0)  # nothing is due: this is the end of the connection
            finally:
                self._reading.release()
                self._hand_on()
        return self._gone

    def retire(self) -> None:
        self._gone = True

    def send(self, message: bytes) -> WireReply:
        return self._send(CALL, message)

    def control(self, message: bytes) -> WireReply:
        return self._send(CONTROL, message)

    def _send(self, kind: int, message: bytes) -> WireReply:
        reply = WireReply(self)
        broken = None
        with self._writing:
            self._next = number = self._next + 1
            self._replies[number] = reply
            try:
                self._socket.sendall(frame(kind, number, message))
            except OSError as error:
                broken = str(error)
                self._replies.pop(number, None)
        if broken is not None:
            reply.settle(None, Down(f"the host's connection broke: {broken}", ran=False))
            self._broke(broken)
        return reply

    # Reading

    def wait(self, reply: WireReply, timeout: float | None) -> None:
        """Returns when the answer is there, or the time is over."""
        if timeout is not None and timeout <= 0:
            return
        until = None if timeout is None else time.monotonic() + timeout
        left = LONG if timeout is None else min(timeout, LONG)
        try:
            while not reply.done and left > 0:
                if self._reading.acquire(blocking=False):
                    try:
                        self._read(left)
                    finally:
                        self._reading.release()
                else:
                    self._sleep(reply, left)
                if until is not None:
                    left = min(until - time.monotonic(), LONG)
        finally:  # also of an interrupt: the others must not wait for one who has gone
            if not self._reading.locked():
                self._hand_on()

    def _sleep(self, reply: WireReply, seconds: float) -> None:
        """Somebody else reads: waits until the answer came, or it is this thread's turn to read."""
        gate = reply.gate()
        with self.mutex:
            self._sleepers[reply] = gate
        try:
            if not reply.done and self._reading.locked():
                gate.acquire(timeout=seconds)
        finally:
            with self.mutex:
                self._sleepers.pop(reply, None)

    def _hand_on(self) -> None:
        """Whoever has read stops: another one who waits reads on, or the thread for those whom nobody waits for."""
        sleeper = None
        if self._sleepers:
            with self.mutex:
                sleeper = next((gate for reply, gate in self._sleepers.items() if not reply.done), None)
        if sleeper is not None:
            with contextlib.suppress(RuntimeError):  # woken already
                sleeper.release()
        elif self.watched:
            _reader.arm(self)

    def watch(self) -> None:
        """An answer is watched that perhaps no thread waits for."""
        if not self._reading.locked():
            _reader.arm(self)

    def read_for_watched(self) -> None:
        """On the reader's thread: there is something to read."""
        if self._reading.acquire(blocking=False):
            try:
                self._read(0.0)
            finally:
                self._reading.release()
                self._hand_on()

    def _read(self, seconds: float) -> None:
        """Reads once, and settles what was answered. Whoever calls it holds `_reading`."""
        if self._gone and not self._replies:
            return
        try:
            data = self._recv(seconds)
        except OSError as error:
            self._broke(str(error))
            return
        if data is None:
            return
        if not data:
            self._broke("it was closed")
            return
        self._used_at = time.monotonic()
        try:
            frames, _ = self._connection.receive(data)
        except ProtocolError as error:
            self._broke(str(error))
            return
        for each in frames:
            self._take(each)

    def _recv(self, seconds: float) -> bytes | None:
        if seconds < LONG and not self._poll.poll(max(seconds, 0.0) * 1000):
            return None
        try:
            return self._socket.recv(READ)  # the kernel ends a longer wait: to poll before each read costs 8 us (measured)
        except BlockingIOError:
            return None

    def _take(self, answer: Frame) -> None:
        reply = self._replies.pop(answer.id, None)
        if reply is not None:
            reply.settle(Raw(bytes(answer.body)), None)

    def _broke(self, why: str) -> None:
        self._gone = True
        with self._writing:
            replies, self._replies = self._replies, {}
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for reply in replies.values():
            reply.settle(None, Down(f"the host's connection broke: {why}", ran=True))

    @property
    def fileno(self) -> int:
        return self._socket.fileno()


class Reader:
    """The thread that reads for those who do not wait. It starts with the first of them.

    It keeps no link alive: one that nobody has any more is closed, and the kernel takes it out of the epoll.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll: select.epoll | None = None
        self._links: weakref.WeakValueDictionary[int, SocketLink] = weakref.WeakValueDictionary()

    def arm(self, link: SocketLink) -> None:
        """Has the link read once, as soon as there is something to read."""
        with self._lock:
            if self._epoll is None:
                self._epoll = select.epoll()
                threading.Thread(target=self._run, args=(self._epoll,), name="flock_ray reader", daemon=True).start()
            self._links[link.fileno] = link
            flags = select.EPOLLIN | select.EPOLLONESHOT
            try:
                self._epoll.modify(link.fileno, flags)
            except FileNotFoundError:
                self._epoll.register(link.fileno, flags)

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for fileno, _ in epoll.poll():
                link = self._links.get(fileno)
                if link is not None:
                    link.read_for_watched()
                del link  # not kept until the next has something to read


_reader = Reader()


def _connect(address: str, folder: Path) -> socket.socket:
    """Over the Unix socket if it is there, else over TCP."""
    remote, _, name = address.partition(" ")
    if name and (folder / name).exists():
        local = socket.socket(socket.AF_UNIX)
        try:
            local.settimeout(CONNECT)
            local.connect(str(folder / name))
        except OSError:
            local.close()
        else:
            return local
    if not remote:
        raise ConnectionRefusedError("it listens on no TCP port")
    ip, _, port = remote.rpartition(":")
    sock = socket.create_connection((ip, int(port)), CONNECT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(sock)
    return sock
