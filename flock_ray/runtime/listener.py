"""Where callers reach a host without Ray: a Unix socket for those on the same machine, TCP for the others.

Leader and followers (Schmidt et al. 2000): one thread at a time, the leader, reads what arrives and runs a quick method itself, for a
hop to another thread costs five times what the rest of a call does (measured). A watchdog sees a method that takes longer than `SLOW`,
and another thread leads on, so that a slow method holds up no reading. What has been read waits in one mailbox for its turn.

What callers send comes in bursts, and the next call of one who waits comes soon after an answer: the leader looks for it before it sleeps
(`runtime/spin.py`).

Rules kept here: who does not prove that it holds the flock's secret is not heard (`core/connection.py`), and is cut off after `PATIENCE`; a
caller that does not read its answers is cut off when they exceed `UNREAD`; what one connection does, no other notices.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from flock_ray.core.connection import ANSWER, CALL, Connection, Frame, ProtocolError, frame
from flock_ray.core.wire import ITEM, encode_items
from flock_ray.runtime.forks import close_in_child
from flock_ray.runtime.spin import Spin
from flock_ray.runtime.tls import Encrypted

logger = logging.getLogger(__name__)

SLOW = 0.005  # seconds a method may run on the thread that reads; more holds other callers up for longer, less hands over more often
TOGETHER = 0.001  # seconds within which answers to calls that came together go together
UNNEEDED = 10.0  # seconds after which a thread ends that was not needed
FOLLOWERS = 4  # that stay all the same
IDLE = 0.1  # seconds without a call after which the watchdog sleeps until the next: awake it costs 1 % of a CPU, woken 50 us
PATIENCE = 5.0  # seconds for the proof
STRANGERS = 256  # connections at a time that have not proved anything yet
TOLD = 1.0  # seconds between words of connections that were turned away
SMALL = 1 << 15  # bytes of an item of a stream that goes with others: so all that are pulled at a time fit into a frame
UNREAD = 256 << 20  # bytes of answers that wait for one caller; a stream alone may have 16 MB of them
BACKLOG = 1024
NO_PROOF = "it left without a proof"
PATH_LIMIT = 107  # bytes, of the kernel's
READ = 1 << 16  # bytes; above 128 KB the allocator maps and unmaps memory for each read
_READABLE, _WRITABLE = select.EPOLLIN, select.EPOLLOUT


NEST_SOCKET = "nest.sock"  # in the folder of its node


def socket_path(directory: str | Path, pid: int) -> Path:
    """Where the host with this pid listens."""
    return Path(directory, f"{pid}.sock")


class Caller:
    """A connection from a caller."""

    __slots__ = ("connection", "fileno", "gone", "lock", "since", "socket", "stranger", "unsent", "waiting")

    def __init__(self, sock: socket.socket | Encrypted, connection: Connection) -> None:
        self.socket = sock
        self.fileno = sock.fileno()
        self.connection = connection
        self.since = time.monotonic()
        self.stranger = True  # it has not proved anything yet
        self.lock = threading.Lock()  # guards what is written
        self.unsent: deque[memoryview] = deque()
        self.waiting = 0  # bytes in `unsent`
        self.gone = False


class Refusals:
    """Connections that were turned away, told together: a flood of them must not become a flood of words."""

    def __init__(self, tell: Callable[[str, int], object]) -> None:
        self._tell = tell
        self._why = ""
        self._count = 0
        self._told_at = 0.0

    def add(self, why: str) -> None:
        """One more; the reason of the first is told."""
        self._why = self._why or why
        self._count += 1
        self.tell()

    def tell(self) -> None:
        """Tells of those not told yet, if it is time."""
        now = time.monotonic()
        if self._count and now - self._told_at > TOLD:
            why, count, self._why, self._count, self._told_at = self._why, self._count, "", 0, now
            self._tell(why, count)


Answered = bytes | str | None | Iterator[bytes]
Work = Callable[[], "tuple[Caller, int, Answered] | None"]  # something to do, and perhaps an answer that came of it


class Answers:
    """Answers that are written together."""

    __slots__ = ("_parts", "_taken")

    def __init__(self) -> None:
        self._parts: dict[Caller, list[bytes | tuple[int, list[bytes]]]] = {}
        self._taken: dict[tuple[Caller, str], int] = {}

    def add(self, caller: Caller, number: int, answer: bytes | str) -> None:
        """An answer, or the lane of a cast that was taken: the last of those tells of all. Small items of a stream go in one frame."""
        if isinstance(answer, bytes):
            parts = self._parts.setdefault(caller, [])
            if not answer.startswith(ITEM) or len(answer) > SMALL:
                parts.append(frame(ANSWER, number, answer))
            elif parts and isinstance(parts[-1], tuple) and parts[-1][0] == number:
                parts[-1][1].append(answer)
            else:
                parts.append((number, [answer]))
        else:
            self._taken[caller, answer] = max(number, self._taken.get((caller, answer), 0))

    def frames(self) -> Iterator[tuple[Caller, bytes]]:
        """What is to be written to each caller."""
        for (caller, _), number in self._taken.items():
            self._parts.setdefault(caller, []).append(frame(ANSWER, number, b""))
        for caller, parts in self._parts.items():
            yield caller, b"".join([part if isinstance(part, bytes) else _items(*part) for part in parts])


def _items(number: int, answers: list[bytes]) -> bytes:
    return frame(ANSWER, number, answers[0] if len(answers) == 1 else encode_items(answers))


class Listener:
    """A host's ears.

    Args:
        secret, life: the flock's.
        path: of the Unix socket; not made if it is too long for the kernel. `None`: none.
        ip: of the node, as Ray has it; `None`: no TCP.
        ports: the first and last port to choose from; any if `None`.
        slots: how many methods may run at a time.
        room: how many calls may wait for their turn.
        call: runs a call, which may take long, and returns its answer; `None`, if that is given to `send` later; or the lane of a cast,
            which was taken: of a run of these the last is answered, with nothing; or several answers, each made when it is asked for.
        full: answers a call for which there is no room; returns at once, `None` to let it in all the same.
        control: takes an order or a `Withdraw`; returns at once.
        gone: takes a connection that has ended.
        refused: takes why connections were turned away, and how many, once a second at most.
        tls: encrypts what comes over TCP.
    """

    def __init__(
        self,
        secret: bytes,
        life: str,
        path: Path | None,
        ip: str | None,
        ports: tuple[int, int] | None,
        slots: int,
        room: int,
        call: Callable[[Caller, int, memoryview], Answered],
        full: Callable[[memoryview], bytes | None],
        control: Callable[[memoryview], bytes],
        gone: Callable[[Caller], object] = lambda _: None,
        refused: Callable[[str, int], object] = lambda _, __: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._secret, self._life = secret, life
        self._call, self._full, self._control, self._gone = call, full, control, gone
        self._room = room
        self._slots = slots
        self._epoll = select.epoll()
        self._doors: dict[int, socket.socket] = {}
        self._callers: dict[int, Caller] = {}
        self._strangers = 0
        self._mailbox: deque[tuple[Caller, int, memoryview] | Work] = deque()
        self._spin = Spin()
        self._lock = threading.RLock()  # guards the four below; to send under it may drop a caller, which takes it too
        self._answers = Answers()  # the leader's, not sent yet
        self._running = 0
        self._followers = 0
        self._leader = 0
        self._baton = threading.Semaphore(0)
        self._began = 0.0  # when the leader began a method; 0 while it reads
        self._latest = 0.0
        self._watching = threading.Event()
        self.refused = 0  # connections
        self._tls = tls
        self._tell_refused = Refusals(refused)
        self._path = path
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # rung when there is work that no caller brought
        self._epoll.register(self._bell, _READABLE)
        self.address = self._open(path, ip, ports)

    def start(self) -> None:
        threading.Thread(target=self._watch, name="flock_ray watchdog", daemon=True).start()
        self._promote(0.0)

    def close(self) -> None:
        """Nobody gets in any more. The process ends soon: what is connected ends with it."""
        for door in self._doors.values():
            door.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # Work that callers do not bring themselves. From any thread.

    def post(self, work: Work) -> None:
        """Has something done when it is its turn in the mailbox."""
        self._mailbox.append(work)
        self.ring()

    def post_first(self, work: Work) -> None:
        """Has something done before all that waits, and besides what runs already."""

        def do() -> tuple[Caller, int, Answered] | None:
            try:
                return work()
            finally:
                self.widen(-1)

        self._mailbox.appendleft(do)
        self.widen(1)

    def ring(self) -> None:
        """There may be something to do, or room for it."""
        os.eventfd_write(self._bell, 1)

    def widen(self, slots: int) -> None:
        """So many more methods may run at a time; fewer, if negative."""
        with self._lock:
            self._slots += slots
        if slots > 0:
            self.ring()

    # Doors

    def _open(self, path: Path | None, ip: str | None, ports: tuple[int, int] | None) -> str:
        """Opens the doors. Returns `ip:port name`, where `name` is the Unix socket's in its folder; either may be empty."""
        name = ""
        if path is not None and len(os.fsencode(path)) <= PATH_LIMIT:
            local = socket.socket(socket.AF_UNIX)
            path.unlink(missing_ok=True)
            local.bind(str(path))  # in a folder that only its owner may enter
            self._add_door(local)
            name = path.name
        if ip is None:
            return f" {name}" if name else ""
        remote = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        remote.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(remote, ip, ports)
        self._add_door(remote)
        return f"{ip}:{remote.getsockname()[1]} {name}"

    def _add_door(self, door: socket.socket) -> None:
        close_in_child(door)
        door.listen(BACKLOG)
        door.setblocking(False)
        self._doors[door.fileno()] = door
        self._epoll.register(door.fileno(), _READABLE)

    def _accept(self, door: socket.socket) -> None:
        sock: socket.socket | Encrypted
        try:
            sock, _ = door.accept()
            close_in_child(sock)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                logger.warning("no more connections: the process has too many files open")
                time.sleep(0.01)  # else the loop would spin on it
            return
        crowded = sock.family != socket.AF_UNIX  # who may enter the folder of the other door is no stranger to this machine
        if crowded and self._strangers >= STRANGERS:
            self._turn_out_the_slow()
        if crowded and self._strangers >= STRANGERS:
            self._note_refused("too many strangers knock at once")
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
            if self._tls is not None:
                encrypted = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                close_in_child(encrypted)
                sock = Encrypted(encrypted)
        caller = Caller(sock, Connection(self._secret, self._life, os.urandom(32), listens=True))
        self._callers[caller.fileno] = caller
        self._strangers += 1
        self._epoll.register(caller.fileno, _READABLE)

    def _turn_out_the_slow(self) -> None:
        old = time.monotonic() - PATIENCE
        for caller in [caller for caller in list(self._callers.values()) if caller.stranger and caller.since < old]:
            self._drop(caller, "it did not prove itself in time")

    def _drop(self, caller: Caller, why: str = "") -> None:
        with self._lock:
            if self._callers.get(caller.fileno) is not caller:
                return
            del self._callers[caller.fileno]
            caller.gone = True
        if caller.stranger:
            self._strangers -= 1
            why = why or NO_PROOF
        if why:
            self._note_refused(why)
        with contextlib.suppress(OSError):
            self._epoll.unregister(caller.fileno)
        with caller.lock:
            caller.socket.close()
            caller.unsent.clear()
        self._gone(caller)

    def _note_refused(self, why: str) -> None:
        self.refused += 1
        self._tell_refused.add(why)

    # The leader

    def _promote(self, began: float) -> None:
        """Somebody else leads on, if the leader is still in the method that it began then."""
        with self._lock:
            if self._began != began:
                return
            answers, self._answers = self._answers, Answers()
            leader, self._leader = self._leader, 0
            self._began = 0.0
            waits = self._followers > 0
            if waits:
                self._followers -= 1
            self.send(answers)  # of quick methods before the slow one; under the lock, for the slow one may be about to answer more
        if waits:
            self._baton.release()
            return
        try:
            threading.Thread(target=self._work, args=(True,), name="flock_ray reader", daemon=True).start()
        except RuntimeError:  # no more threads are to be had: who leads goes on, and the watchdog tries again
            with self._lock:
                self._leader, self._began = leader, began
            raise

    def _work(self, leads: bool) -> None:
        while True:
            if not leads and not self._is_wanted():
                return
            me = self._leader = threading.get_ident()
            while self._leader == me:
                try:
                    self._lead(me)
                except Exception:
                    logger.exception("reading from callers failed, and goes on")
            with self._lock:
                self._followers += 1
            leads = False

    def _is_wanted(self) -> bool:
        """Waits, as a follower, until it is to lead. False: it has been for nothing, and there are others."""
        while not self._baton.acquire(timeout=UNNEEDED):
            with self._lock:
                if self._followers > FOLLOWERS:
                    self._followers -= 1
                    return False
        return True

    def _lead(self, me: int) -> None:
        if self._mailbox:
            self._run()  # there may be room for what the leader before had read
            if self._leader != me:
                return
        more = self._mailbox and self._running < self._slots
        for fileno, mask in (self._look() or ()) if more else self._spin.until(self._look) or self._epoll.poll(PATIENCE):
            caller = self._callers.get(fileno)
            if caller is None:
                self._not_a_caller(fileno)
                if self._leader != me:
                    return
                continue
            if mask & _WRITABLE:
                self._write_more(caller)
            if mask & ~_WRITABLE:
                self._read(caller)
            if self._mailbox:
                self._run()
            if self._leader != me:
                return  # a method took long, and another thread reads now
        if self._strangers:
            self._turn_out_the_slow()
        self._tell_refused.tell()

    def _not_a_caller(self, fileno: int) -> None:
        if fileno in self._doors:
            self._accept(self._doors[fileno])
        elif fileno == self._bell:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            self._run()

    def _look(self) -> list[tuple[int, int]] | None:
        return self._epoll.poll(0) or None

    def _read(self, caller: Caller) -> None:
        try:
            data = caller.socket.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(caller)
            return
        try:
            frames, reply = caller.connection.receive(data)
        except ProtocolError as error:
            self._drop(caller, str(error))
            return
        if caller.stranger and caller.connection.open:
            caller.stranger = False
            self._strangers -= 1
        if reply:
            self._write(caller, reply)
        try:
            self._take(caller, frames)
        except BaseException:  # as above: of a pickle
            logger.exception("a message could not be read; its caller is cut off")
            self._drop(caller, "its message could not be read")

    def _take(self, caller: Caller, frames: list[Frame]) -> None:
        for kind, number, body in frames:
            if kind == CALL:
                refused = self._full(body) if len(self._mailbox) >= self._room else None
                if refused is None:
                    self._mailbox.append((caller, number, body))
                else:
                    self._write(caller, frame(ANSWER, number, refused))
            elif kind == ANSWER:
                self._drop(caller, "a caller sent an answer")
                return
            else:
                self._write(caller, frame(ANSWER, number, self._control(body)))

    # Methods

    def _run(self) -> None:
        """Runs what waits, as long as there is room; the leader for `SLOW` seconds, then it reads again, for work may beget work.

        The leader's answers go together, at the latest when the watchdog takes over.
        """
        me = threading.get_ident()
        if not self._watching.is_set():
            self._watching.set()
        now = time.monotonic()
        due, until = now + TOGETHER, now + SLOW
        while True:
            with self._lock:
                if not self._mailbox or self._running >= self._slots or (now > until and self._leader == me):
                    answers = None
                    if self._leader == me:
                        answers, self._answers = self._answers, Answers()
                    break
                item = self._mailbox.popleft()
                self._running += 1
            now = self._latest = time.monotonic()
            if self._leader == me:
                self._began = now
            caller, number, answer = self._done(item)
            answers = None
            with self._lock:
                self._running -= 1
                leads = self._leader == me
                if leads:
                    self._began = 0.0
                    if answer is not None and caller is not None:
                        self._answers.add(caller, number, answer)
                    if now > due:
                        answers, self._answers = self._answers, Answers()
            if answers is not None:
                due = now + TOGETHER
                self.send(answers)
            elif not leads and answer is not None and caller is not None:
                self._write(caller, frame(ANSWER, number, answer if isinstance(answer, bytes) else b""))
        if answers is not None:
            self.send(answers)

    def _done(self, item: tuple[Caller, int, memoryview] | Work) -> tuple[Caller | None, int, bytes | str | None]:
        """Runs a call, or other work. Returns what is still to be answered."""
        caller: Caller | None = None
        try:
            if isinstance(item, tuple):
                caller, number, body = item
                answer = self._call(caller, number, body)
            else:
                worked = item()
                if worked is None:
                    return None, 0, None
                caller, number, answer = worked
            if answer is not None and not isinstance(answer, bytes | str):
                self._several(caller, number, answer)
                answer = None
        except BaseException:  # what a pickle raises may be anything
            logger.exception("a message could not be read; its caller is cut off")
            if caller is not None:
                self._drop(caller, "its message could not be read")
            return None, 0, None
        return caller, number, answer

    def _several(self, caller: Caller, number: int, answers: Iterator[bytes]) -> None:
        me = threading.get_ident()
        for answer in answers:
            with self._lock:
                leads = self._leader == me
                if leads:
                    self._answers.add(caller, number, answer)
                    self._began = time.monotonic()  # of the next
            if not leads:
                self._write(caller, frame(ANSWER, number, answer))

    @property
    def awaited(self) -> bool:
        """Does a call wait for its turn?"""
        return bool(self._mailbox)

    @property
    def queued(self) -> int:
        """How many calls wait for their turn."""
        return len(self._mailbox)

    @property
    def occupied(self) -> bool:
        """Does a call wait, or run?"""
        with self._lock:
            return bool(self._mailbox or self._running)

    def send(self, answers: Answers) -> None:
        """Writes answers to those who asked. From any thread."""
        for caller, data in answers.frames():
            self._write(caller, data)

    def _watch(self) -> None:
        """The watchdog."""
        while True:
            self._watching.wait()
            time.sleep(SLOW)
            began, now = self._began, time.monotonic()
            if began and now - began > SLOW:
                try:
                    self._promote(began)
                except Exception:  # the next look tries again
                    logger.exception("another thread could not be made to read")
            elif not began and now - self._latest > IDLE:
                self._watching.clear()
                if self._mailbox or self._began:
                    self._watching.set()

    # Writing

    def _write(self, caller: Caller, data: bytes) -> None:
        with caller.lock:
            if self._callers.get(caller.fileno) is not caller:
                return
            sent = 0
            if not caller.unsent:
                try:
                    sent = caller.socket.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return  # the leader finds it closed
            if sent < len(data):
                caller.unsent.append(memoryview(data)[sent:])
                caller.waiting += len(data) - sent
                self._epoll.modify(caller.fileno, _READABLE | _WRITABLE)
            too_much = caller.waiting > UNREAD
        if too_much:
            self._drop(caller, "it does not read its answers")

    def _write_more(self, caller: Caller) -> None:
        with caller.lock:
            try:
                while caller.unsent:
                    sent = caller.socket.send(caller.unsent[0])
                    caller.waiting -= sent
                    if sent < len(caller.unsent[0]):
                        caller.unsent[0] = caller.unsent[0][sent:]
                        return
                    caller.unsent.popleft()
                self._epoll.modify(caller.fileno, _READABLE)
            except BlockingIOError:
                return
            except OSError:
                caller.unsent.clear()


def bind(door: socket.socket, ip: str, ports: tuple[int, int] | None) -> None:
    """Binds it to a free port of the range, or to any.

    Raises:
        OSError: none is free; says what to do.
    """
    if ports is None:
        door.bind((ip, 0))
        return
    for port in range(ports[0], ports[1] + 1):
        try:
            door.bind((ip, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, f"all ports from {ports[0]} to {ports[1]} are taken on {ip}; give init() a larger range")


def keep_alive(sock: socket.socket) -> None:
    """A peer that has silently gone away is found in some seconds (Linux)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
