"""What attacks are made of: whom they attack, one bad connection, and the list of them (`strangers.py`, `broken.py`).

An attack is one input: it draws all it does from its own `rng`. `KNOWN` are defects that were reported: inputs of that name are left out,
and what else is done to live with them is done in `victim.py`. With `--all` nothing is left out.
"""

from __future__ import annotations

import collections
import pickle
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flock_ray.core import wire
from flock_ray.core.connection import ANSWER, CALL, Connection, ProtocolError
from tests.fuzz import promised
from tests.fuzz import transcripts as ts

LATE = 2.0  # seconds within which good and bad peers get what is due to them
STALL = 0.3  # seconds that this process itself was not run: they are not counted

KNOWN = {
    "long_answers": "an answer above a megabyte that nobody fetches is kept for ten minutes, however many there are",
    "gaps of a second": "a gap in one caller's order holds up all callers of a sync bird for a second (victim.py: 5 ms)",
}


class Clock:
    """Notices when this process is not run, on a machine that others use too."""

    def __init__(self) -> None:
        self._stalls: collections.deque[tuple[float, float]] = collections.deque(maxlen=200)
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.02)
            now = time.monotonic()
            if now - last > STALL:
                self._stalls.append((last, now))
            last = now

    def passed(self, since: float) -> float:
        """Seconds that this process was run since then."""
        now = time.monotonic()
        return now - since - sum(end - max(begin, since) for begin, end in tuple(self._stalls) if end > since)


class Floods:
    """When strangers come in such numbers that others may be turned away with them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = 0.0
        self.now = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1
            self._ended = time.monotonic()

    def since(self, began: float) -> bool:
        return bool(self.now) or self._ended >= began


class Target:
    """A socket to attack, by one thread.

    Args:
        name: "host" or "nest", and the way there.
        address: of a Unix socket or of TCP.
    """

    def __init__(self, name: str, address: Path | tuple[str, int], clock: Clock, floods: Floods) -> None:
        self.name, self.clock, self.floods = name, clock, floods
        self.is_host = name.startswith("host")
        self._address = address
        self.sent: list[bytes] = []  # what this input has sent

    def again(self) -> Target:
        """The same, for another thread."""
        return Target(self.name, self._address, self.clock, self.floods)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if isinstance(self._address, Path) else socket.AF_INET)
        sock.settimeout(LATE)
        sock.connect(str(self._address) if isinstance(self._address, Path) else self._address)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def stranger(self) -> Peer:
        return Peer(self, self.connect())

    def peer(self) -> Peer:
        """One that has proved itself. It must get in, but for a flood, and after one soon."""
        began = time.monotonic()
        while True:
            came = time.monotonic()
            peer = Peer(self, self.connect())
            if peer.prove():
                promised(self.clock.passed(came) < LATE or self.floods.since(came), f"{self.name}: who holds the secret gets in soon")
                return peer
            peer.close()
            promised(self.floods.since(came), f"{self.name}: who holds the secret gets in")
            promised(self.clock.passed(began) < 10 * LATE, f"{self.name}: who holds the secret gets in, some time after a flood")
            time.sleep(0.05)  # between tries


class Peer:
    """One bad connection."""

    def __init__(self, target: Target, sock: socket.socket) -> None:
        self.target = target
        self._sock = sock
        self._protocol = Connection(ts.SECRET, ts.LIFE, random.randbytes(32), listens=False, limit=1 << 30)
        self._got: list[tuple[int, int, bytes]] = []
        self.ended = False  # the other side has ended it

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def prove(self) -> bool:
        try:
            self._sock.sendall(self._protocol.greeting())
            while not self._protocol.open:
                data = self._sock.recv(1 << 16)
                if not data:
                    return False
                _, reply = self._protocol.receive(data)
            self._sock.sendall(reply)
        except (OSError, ProtocolError):
            return False
        return True

    def send(self, data: bytes) -> bool:
        """False: the other side does not take it any more."""
        self.target.sent.append(data)
        try:
            self._sock.sendall(data)
        except OSError:
            return False
        return True

    def send_cut(self, rng: random.Random, data: bytes) -> None:
        for part in ts.cut(rng, data):
            if not self.send(part):
                return

    def recv(self, size: int = 1 << 16) -> bytes | None:
        """What comes; empty at the end; `None`: nothing within `LATE`."""
        began = time.monotonic()
        while True:
            try:
                data = self._sock.recv(size)
            except TimeoutError:
                if self.target.clock.passed(began) < LATE:
                    continue
                return None
            except OSError:
                data = b""
            self.ended = not data
            return data

    def challenge(self) -> bytes:
        """The whole of it, or what came instead."""
        data = b""
        while len(data) < ts.CHALLENGE:
            part = self.recv(ts.CHALLENGE - len(data))
            if not part:
                break
            data += part
        return data

    def is_cut_off(self) -> bool:
        """Does the other side end it within `LATE`?"""
        began = time.monotonic()
        while self.target.clock.passed(began) < LATE:
            data = self.recv()
            if not data:
                return data is not None
        return False

    def answer(self, number: int) -> bytes | None:
        """The answer to a frame; `None` if there is none within `LATE`, or the connection has ended."""
        began = time.monotonic()
        while self.target.clock.passed(began) < LATE:
            for at, (kind, its, body) in enumerate(self._got):
                if its == number:
                    del self._got[at]
                    promised(kind == ANSWER, f"a frame of kind {kind} from who is called")
                    return body
            data = self.recv()
            if not data:
                return None
            self._got += [(kind, its, bytes(body)) for kind, its, body in self._protocol.receive(data)[0]]
        return None

    def forget_answers(self) -> None:
        self._got.clear()

    def works(self, rng: random.Random) -> None:
        """It is heard and answered as ever."""
        number, x = rng.getrandbits(63), rng.random()
        if self.target.is_host:
            head, began = None, time.monotonic()
            while head is None or (head.kind == "full" and self.target.clock.passed(began) < LATE):  # others may fill the mailbox
                self.send(ts.frame(CALL, number, ts.call(f"good{rng.random()}", "echo", 0, ts.arguments(x))))
                body = self.answer(number)
                promised(body, f"{self.target.name}: an answer within {LATE} s")
                head, rest = wire.decode(body)
            promised(head.kind == "result" and pickle.loads(rest) == x, f"{self.target.name}: the right answer, not {head}")
        else:
            self.send(ts.frame(CALL, number, wire.encode(wire.ForNest("pid"))))
            body = self.answer(number)
            promised(body and isinstance(pickle.loads(body), int), f"{self.target.name}: the right answer, not {body!r}")

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def leave(self, rng: random.Random) -> None:
        """In one of the ways there are."""
        match rng.randrange(3):
            case 0:
                self.reset()
            case 1:
                self.close()
            case 2:
                try:
                    self._sock.shutdown(socket.SHUT_WR)
                except OSError:
                    return
                promised(self.is_cut_off(), f"{self.target.name}: who has nothing more to say is let go")


def readable(peers: Iterable[Peer]) -> list[Peer]:
    """Those of whom there is something to read now, or who have ended. `select` does not know as many."""
    poll, by_fileno = select.poll(), {peer.fileno(): peer for peer in peers}
    for fileno in by_fileno:
        poll.register(fileno, select.POLLIN)
    return [by_fileno[fileno] for fileno, _ in poll.poll(0)]


Attack = Callable[[random.Random, Target], None]


class Attacks:
    """Those of one sort, for hosts and for nests."""

    def __init__(self) -> None:
        self._of = {True: list[Attack](), False: list[Attack]()}

    def __call__(self, *, host: bool = True, nest: bool = True) -> Callable[[Attack], Attack]:
        def add(made: Attack) -> Attack:
            if host:
                self._of[True].append(made)
            if nest:
                self._of[False].append(made)
            return made

        return add

    def on(self, target: Target) -> list[Attack]:
        return self._of[target.is_host]


STRANGE = Attacks()  # by those who lack the secret, or send their proof wrong
BROKEN = Attacks()  # by those who have it
RARE = Attacks()  # slow ones of both sorts
