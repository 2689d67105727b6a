"""Links to hosts over sockets: straight from the caller's process to the bird's, without Ray (`runtime/listener.py` is the other end).

A process has one connection to a host, and all its threads and event loops share it. Who waits for an answer reads the connection himself,
and hands what is for others to them: no hop for one who is alone. An event loop with coroutines that wait reads it too; for answers that
nobody waits for (futures with callbacks, casts), a thread of this module does, as long as no one else does.

An answer often comes within the time that it takes to put a thread to sleep and wake it again, so a reader looks for it for `spin.SECONDS`
before it sleeps: half of what a call costs otherwise (measured). In a burst of messages that nobody waits for, they are written together.

Rules kept here: a message that was not written whole has not run; once it is, only its answer tells (`Down.ran`); nothing here waits for a
peer that does not read; no callback is called, and no answer settled, while a message is being sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

from flock_ray.core.connection import CONTROL, MAX_BODY, Connection, ProtocolError, frame
from flock_ray.core.wire import count_items
from flock_ray.runtime.forks import close_in_child
from flock_ray.runtime.listener import READ, keep_alive
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Urgency, also
from flock_ray.runtime.spin import Spin
from flock_ray.runtime.tls import Encrypted

CONNECT = 2.0  # seconds for a connection and the proofs; then the way is Ray's
LONG = 1.0  # seconds of one wait in the kernel
BURST = 0.0002  # seconds: what follows sooner on another message that nobody waits for is written together with what follows on it
LINGER = 0.0003  # seconds that a burst may grow before another thread writes it
AT_ONCE = 1 << 16  # bytes that are written at once, whoever waits
IDLE = 0.01  # seconds; after a longer rest a look is worth its cost, for TCP takes a message for a peer that has gone
_NO_WAIT = socket.MSG_DONTWAIT

logger = logging.getLogger(__name__)


class _Buffer(threading.local):
    """What a thread reads into: a buffer for each link would take 64 KB of each."""

    def __init__(self) -> None:
        self.data = bytearray(READ)
        self.view = memoryview(self.data)


_mine = _Buffer()


class ClosedError(ProtocolError, ConnectionResetError):
    """The other side closed the connection before it was open: it ends just now, or is of another flock."""


class WireReply:
    """The answer to one frame."""

    __slots__ = ("_callback", "_down", "_link", "_on_loop", "_raw", "_teller", "done", "number")

    def __init__(self, link: SocketLink) -> None:
        self._link = link
        self._raw: Raw | None = None
        self._down: Down | None = None
        self._callback: Callable[[WireReply], object] | None = None
        self._teller: Callable[[WireReply], object] | None = None
        self._on_loop = False
        self.number = 0
        self.done = False

    def get(self, timeout: float | None) -> Raw:
        if not self.done:
            self._link.wait(self, timeout)
        if self._raw is not None:
            return self._raw
        if self._down is not None:
            raise self._down
        raise NoAnswer

    def on_done(self, callback: Callable[[WireReply], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        link = self._link
        with link.mutex:
            here = self.done
            if not here:
                if self._callback is None:
                    self._callback = callback
                    self._on_loop = loop is not None
                    link.watched += loop is None
                else:
                    self._callback = also(self._callback, callback)
        if here:
            callback(self)
        elif loop is not None:
            link.read_on(loop)
        else:
            link.watch()

    def tell(self, callback: Callable[[WireReply], object]) -> None:
        with self._link.mutex:
            here = self.done
            self._teller = callback
        if here:
            callback(self)

    def forget(self) -> None:
        self._link.forget(self.number)
        if self._callback is not None:
            self.settle(Raw(b""), None)

    # What the link calls

    def settle(self, raw: Raw | None, down: Down | None) -> None:
        link = self._link
        with link.mutex:
            self._note(raw, down)
            callback, teller = self._callback, self._teller
            self._callback = self._teller = None
            gates = [gate for gate, reply in link.sleepers.items() if reply is self] if link.sleepers else ()
            if callback is not None and not self._on_loop:
                link.watched -= 1
        for gate in gates:
            with contextlib.suppress(RuntimeError):  # let go already
                gate.release()
        if teller is not None:
            teller(self)
        if callback is not None:
            callback(self)

    def _note(self, raw: Raw | None, down: Down | None) -> None:
        """What came. Under the link's mutex."""
        self._raw, self._down, self.done = raw, down, True

    def is_over(self, down: Down) -> None:
        """It was not even sent: nobody waits for it yet."""
        self._down, self.done = down, True


class WireItems(WireReply):
    """The answers to a pull of several items: `get` gives one after the other; each brings an item or more."""

    __slots__ = ("_came", "_left")

    def __init__(self, link: SocketLink, wanted: int) -> None:
        super().__init__(link)
        self._left = wanted
        self._came: deque[Raw] = deque()

    def get(self, timeout: float | None) -> Raw:
        if not self.done:
            self._link.wait(self, timeout)
        with self._link.mutex:
            if self._came:
                raw = self._came.popleft()
                self.done = bool(self._came) or self._down is not None
                return raw
        if self._down is not None:
            raise self._down
        raise NoAnswer

    def _note(self, raw: Raw | None, down: Down | None) -> None:
        self.done = True
        if raw is None:
            self._down = down
            return
        self._came.append(raw)
        self._left -= count_items(raw.message)
        if self._left > 0:
            self._link.expect(self)

    def forget(self) -> None:
        with self._link.mutex:
            self._left = 0
        super().forget()


def _no_loop() -> None:
    """What a reference to a loop that is gone gives."""


class SocketLink:
    """The way to one host. All methods may be called from any thread.

    Args:
        secret, life: the flock's.
        address: as `Listener.address` has it.
        folder: of the host's Unix socket, if it is on this machine.
        tls: encrypts what goes over TCP.
        limit: bytes of the longest message, either way.

    Raises:
        OSError: it cannot be reached.
        ProtocolError: what listens there does not hold the flock's secret.
    """

    def __init__(
        self, secret: bytes, life: str, address: str, folder: Path, tls: ssl.SSLContext | None = None, limit: int = MAX_BODY
    ) -> None:
        self.mutex = threading.Lock()  # guards the replies' states, and the next two
        self.watched = 0  # replies that have callbacks, and no event loop that reads
        self.sleepers: dict[threading.Lock, WireReply] = {}  # each thread's gate, and what it waits for
        self._writing = threading.Lock()  # guards the next six
        self._replies: dict[int, WireReply] = {}  # by number
        self._next = 0
        self.unsent: deque[tuple[int, bytes]] = deque()  # number of the frame, and what of it is not written yet
        self._unsent_size = 0
        self._wrote_at = 0.0
        self._is_armed = False  # the reader will write what is not written yet
        self._reading = threading.Lock()
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()  # that look whether there is something to read
        self._latest_loop: Callable[[], asyncio.AbstractEventLoop | None] = _no_loop
        self._flushes: asyncio.AbstractEventLoop | None = None  # that will write what is to be written together
        self._gone = False
        self._limit = limit
        self._connection = Connection(secret, life, os.urandom(32), listens=False, limit=limit)
        sock = _connect(address, folder, tls)
        close_in_child(sock)
        self.local = sock.family == socket.AF_UNIX
        self.path = "unix" if self.local else "tcp"
        self.used_at = float("inf") if self.local else 0.0  # on this machine the kernel tells at once of a host's end: no ping is needed
        self._looked_at = 0.0
        self._spin = Spin()
        try:
            self._shake_hands(sock)
        except BaseException:
            sock.close()
            raise
        self._socket = Encrypted(sock) if isinstance(sock, ssl.SSLSocket) else sock
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    def _shake_hands(self, sock: socket.socket) -> None:
        sock.settimeout(CONNECT)
        sock.sendall(self._connection.greeting())
        while not self._connection.open:
            data = sock.recv(READ)
            if not data:
                raise ClosedError("it closed the connection")
            _, reply = self._connection.receive(data)
            if reply:
                sock.sendall(reply)
        sock.settimeout(None)
        self._heard()

    def _heard(self) -> None:
        if not self.local:
            self.used_at = self._looked_at = time.monotonic()

    # As `links.Link` has it

    def lost(self) -> bool:
        if self._gone or self.local or self._replies or time.monotonic() - self._looked_at < IDLE:
            return self._gone
        if self._reading.acquire(blocking=False):
            try:
                self._looked_at = time.monotonic()
                if not self._replies and self._poll.poll(0):
                    self._read(0.0)  # nothing is due: this is the end of the connection
            finally:
                self._reading.release()
                self._hand_on()
        return self._gone

    def retire(self) -> None:
        self._gone = True

    def heard(self, now: float) -> None:
        """An answer came; this link has noted it itself."""

    def control(self, message: bytes) -> WireReply:
        return self.transmit(CONTROL, message)

    def expect(self, reply: WireReply) -> None:
        """Another answer is to come."""
        self._replies[reply.number] = reply

    def forget(self, number: int) -> None:
        """This answer does not come, or is not wanted."""
        self._replies.pop(number, None)

    # Writing

    def transmit(self, kind: int, message: bytes, urgency: Urgency = Urgency.NOW, answers: int = 1) -> WireReply:
        """Sends a frame, which has so many answers; never waits."""
        reply = WireReply(self) if answers == 1 else WireItems(self, answers)
        with self._writing:
            self._next = reply.number = number = self._next + 1
            if self._gone:
                reply.is_over(Down("the host's connection is closed", ran=False))
                return reply
            data = frame(kind, number, message, self._limit)
            self._replies[number] = reply
            unsent = self.unsent
            if urgency is Urgency.NOW:
                unsent.append((number, data))
                self._unsent_size += len(data)
                left = self._write()
            else:
                now = time.monotonic()
                unsent.append((number, data))
                self._unsent_size += len(data)
                alone = len(unsent) == 1
                if (alone and now - self._wrote_at > BURST) or self._unsent_size > AT_ONCE:
                    left = self._write()
                else:
                    left = urgency is Urgency.SOON and not self._is_armed  # an event loop that is to write the others may be held up
                self._wrote_at = now
            self._is_armed = bool(unsent) and (left or self._is_armed)
        if left:
            _reader.arm(self)
        return reply

    def flush(self) -> None:
        """Writes what was kept to be written together."""
        if self.unsent:
            with self._writing:
                left = self._is_armed = self._write()
            if left:
                _reader.arm(self)

    def _write(self) -> bool:
        """Writes what the peer takes. True if something is left, or if the connection has broken. Whoever calls it holds `_writing`."""
        unsent = self.unsent
        while unsent:
            _, data = unsent[0]
            count = 1
            if len(unsent) > 1:
                parts, size = [], 0
                for _, part in unsent:
                    parts.append(part)
                    size += len(part)
                    if size > AT_ONCE:
                        break
                data, count = b"".join(parts), len(parts)
            try:
                if not self._send_some(data, count):
                    return True
            except BlockingIOError:
                return True
            except OSError:
                self._end()
                return True
            except BaseException:  # an interrupt: nobody knows whether it was sent
                unsent.clear()
                self._end()
                raise
        return False

    def _send_some(self, data: bytes, count: int) -> bool:
        """Sends what the peer takes of the first frames. True if it took all of them."""
        unsent = self.unsent
        sent = self._socket.send(data, _NO_WAIT)
        self._unsent_size -= sent
        if sent == len(data):
            for _ in range(count):
                unsent.popleft()
            return True
        while sent:
            number, part = unsent.popleft()
            if sent < len(part):
                unsent.appendleft((number, part[sent:]))
                break
            sent -= len(part)
        return False

    def _end(self) -> None:
        """The connection is over: whoever reads finds that, and settles all."""
        self._gone = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # Reading

    def wait(self, reply: WireReply, timeout: float | None) -> None:
        """Returns when the answer is there, or the time is over."""
        if timeout is not None and timeout <= 0:
            return
        self.flush()
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
            if (self.sleepers or self.watched) and not self._reading.locked():
                self._hand_on()

    def _sleep(self, reply: WireReply, seconds: float) -> None:
        """Somebody else reads: waits until the answer came, or it is this thread's turn to read."""
        gate = threading.Lock()
        gate.acquire()
        with self.mutex:
            self.sleepers[gate] = reply
        try:
            if not reply.done and self._reading.locked():
                gate.acquire(timeout=seconds)
        finally:
            with self.mutex:
                self.sleepers.pop(gate, None)

    def _hand_on(self) -> None:
        """Whoever has read stops: another one who waits reads on, or the thread for those whom nobody waits for."""
        sleeper = None
        if self.sleepers:
            with self.mutex:
                sleeper = next((gate for gate, reply in self.sleepers.items() if not reply.done), None)
        if sleeper is not None:
            with contextlib.suppress(RuntimeError):  # woken already
                sleeper.release()
        elif self.watched:
            _reader.arm(self)

    def watch(self) -> None:
        """An answer is watched that perhaps no thread waits for."""
        if not self._reading.locked():
            _reader.arm(self)

    def look(self) -> None:
        """Takes what is there, and waits for nothing."""
        if self._reading.acquire(blocking=False):
            try:
                self._read(0.0)
            finally:
                self._reading.release()
                self._hand_on()

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """A coroutine of this loop, which runs now, waits for an answer: the loop reads, and writes what is to be written together."""
        if self._latest_loop() is not loop and loop not in self._loops:
            self._loops.add(loop)
            loop.add_reader(self.fileno, self._look_on, loop)
            self._latest_loop = weakref.ref(loop)
        if self.unsent and self._flushes is not loop:
            self._flushes = loop
            loop.call_soon(self._flush_on_loop)

    def _flush_on_loop(self) -> None:
        self._flushes = None
        self.flush()

    def _look_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self.look()
        if self._gone or not self._replies:  # it costs this loop a wake-up for each answer that a thread waits for
            self._leave(loop)

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop in self._loops:
            if self._latest_loop() is loop:
                self._latest_loop = _no_loop
            self._loops.discard(loop)
            loop.remove_reader(self.fileno)

    def _read(self, seconds: float) -> None:
        """Reads once, and settles what was answered. Whoever calls it holds `_reading`."""
        if self._gone and not self._replies:
            return
        if seconds > 0 and not self._wait(seconds):
            return
        try:
            self._read_now()
        except BaseException:  # an interrupt, or a callback that failed: something of what came may be lost
            with self._writing:
                self.unsent.clear()
                self._end()
            raise

    def _read_now(self) -> None:
        try:
            size = self._recv_now()
        except OSError as error:
            self._broke(str(error))
            return
        if size is None:
            return
        if not size:
            self._broke("it was closed")
            return
        self._heard()
        try:
            frames, _ = self._connection.receive(_mine.view[:size])
        except ProtocolError as error:
            self._broke(str(error))
            return
        replies = self._replies
        for _, number, body in frames:
            reply = replies.pop(number, None)
            if reply is not None:
                reply.settle(Raw(bytes(body)), None)

    def _wait(self, seconds: float) -> bool:
        """Waits until there is something to read. Nothing is lost by an interrupt here."""
        return bool(self._spin.until(self._look_now) or self._poll.poll(seconds * 1000))

    def _look_now(self) -> bool | None:
        return bool(self._poll.poll(0)) or None

    def _recv_now(self) -> int | None:
        try:
            return self._socket.recv_into(_mine.data, 0, _NO_WAIT)
        except BlockingIOError:
            return None

    def _broke(self, why: str) -> None:
        self._gone = True
        with self._writing:
            replies, self._replies = self._replies, {}
            unsent = {number for number, _ in self.unsent}
            self.unsent.clear()
            self._unsent_size = 0
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for number, reply in replies.items():
            reply.settle(None, Down(f"the host's connection broke: {why}", ran=number not in unsent))
        for loop in tuple(self._loops):
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._leave, loop)

    @property
    def fileno(self) -> int:
        return self._socket.fileno()


class Reader:
    """The thread that reads and writes for those who do not wait. It starts with the first of them.

    It keeps no link alive: one that nobody has any more is closed, and the kernel takes it out of the epoll.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nobody is read for, and there is no thread yet."""
        self._lock = threading.Lock()
        self._epoll: select.epoll | None = None
        self._links: weakref.WeakValueDictionary[int, SocketLink] = weakref.WeakValueDictionary()

    def arm(self, link: SocketLink) -> None:
        """Has the link read once, as soon as there is something to read; and written to, if something is left to be written."""
        with self._lock:
            if self._epoll is None:
                self._epoll = select.epoll()
                threading.Thread(target=self._run, args=(self._epoll,), name="flock_ray reader", daemon=True).start()
            self._links[link.fileno] = link
            # Whoever arms it last decides, also for who has armed it to have something written: so that is looked at each time.
            flags = select.EPOLLIN | select.EPOLLONESHOT | (select.EPOLLOUT if link.unsent else 0)
            try:
                self._epoll.modify(link.fileno, flags)
            except FileNotFoundError:
                self._epoll.register(link.fileno, flags)

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for fileno, mask in epoll.poll():
                link = self._links.get(fileno)
                if link is not None:
                    try:
                        self._serve(link, mask)
                    except Exception:  # a callback's: that connection has ended, and the others go on
                        logger.exception("reading an answer failed")
                del link  # not kept until the next has something to read

    def _serve(self, link: SocketLink, mask: int) -> None:
        if link.unsent:
            time.sleep(LINGER)  # else a burst would be written one by one, by two threads in turns
        link.flush()
        if mask & ~select.EPOLLOUT or link.watched:
            link.look()


_reader = Reader()
os.register_at_fork(after_in_child=_reader.begin)  # its thread is not there, and its epoll is the parent's


def _connect(address: str, folder: Path, tls: ssl.SSLContext | None) -> socket.socket:
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
    if tls is None:
        return sock
    try:
        return tls.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise
