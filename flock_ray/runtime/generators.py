"""Generators that callers read: what a life keeps of each.

A caller pulls: the call that opens a stream is answered with one item, each `Pull` after it with some. So a stream needs no more than
calls do, goes whatever way they go, and an item leaves as soon as it is there; the pulls that a caller has under way are its credit.

Rules kept here: a generator advances in the bird's turn, and between items other methods run; an item is pickled when it is yielded, for
the generator may change it afterwards; a stream whose caller has gone is closed, at the latest after `IDLE` without a pull.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from flock_ray.runtime.mailbox import Arrivals

if TYPE_CHECKING:
    from flock_ray.runtime.listener import Caller

IDLE = 600.0  # seconds without a pull after which a stream that came by Ray is given up: Ray does not tell of a caller's end


MOST_ITEMS = 64  # for one pull, whatever it asks for; a stream's callers ask for less


class Reading:
    """A generator that is being read.

    Args:
        life: of the bird whose generator it is.
        call: that opened it: its caller, and its place in that caller's order.
        generator: of the bird's, sync or async.
        chain: of that call, for calls that the generator makes.
        method: its name.
        what: its items are, for errors.
        connection: over which it was opened; `None`: by Ray.
    """

    def __init__(
        self,
        life: Any,
        call: tuple[str, int],
        generator: Any,
        chain: tuple[tuple[str, Any], ...],
        method: str,
        what: str,
        connection: Caller | None,
    ) -> None:
        self.life = life
        self.call = call
        self.generator = generator
        self.chain = chain
        self.method = method
        self.what = what
        self.connection = connection
        self.running = threading.Lock()  # by who runs a sync generator: only one thread may
        self.closed = False
        self.step: asyncio.Task[Any] | None = None  # that waits for the next item of an async generator
        self.pulled_at = time.monotonic()
        self._changed = threading.Condition()  # of the next three
        self._answered = 0  # pulls that have been answered whole
        self._serves = False  # a thread serves a pull
        self._waiting: set[int] = set()  # pulls that have come too early
        self.arrivals = Arrivals()  # of pulls; guarded by the host, as the next two, where birds are light
        self.pulls: deque[tuple[int, Any]] = deque()  # items that are still wanted, and who takes them
        self.is_served = False  # a turn for them is waited for, or taken

    def begin_pull(self, number: int, gap: float) -> None:
        """Waits until the pulls before it are answered. What is missing for `gap` seconds, while nothing else happens, is given up."""
        with self._changed:
            self._waiting.add(number)
            while self._answered < number or self._serves:
                answered = self._answered
                happened = self._changed.wait(gap) or self._serves or self._answered != answered
                if not happened and number == min(self._waiting):
                    break
            self._waiting.discard(number)
            self._serves = True

    def end_pull(self, number: int) -> None:
        """It is answered whole."""
        with self._changed:
            self._serves, self._answered = False, max(self._answered, number + 1)
            self._changed.notify_all()


class Readings:
    """The generators in this process that are being read. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], Reading] = {}

    def add(self, reading: Reading) -> list[Reading]:
        """Keeps a new one. Returns those to be closed, because nobody has pulled for long."""
        now = time.monotonic()
        with self._lock:
            idle = [one for one in self._open.values() if one.connection is None and now - one.pulled_at > IDLE]
            for one in idle:
                del self._open[one.call]
            self._open[reading.call] = reading
        return idle

    def get(self, call: tuple[str, int]) -> Reading | None:
        reading = self._open.get(call)
        if reading is not None:
            reading.pulled_at = time.monotonic()
        return reading

    def pop(self, call: tuple[str, int]) -> Reading | None:
        with self._lock:
            return self._open.pop(call, None)

    def pop_all(self, life: Any) -> list[Reading]:
        """Those of a life, which ends."""
        if not self._open:
            return []
        with self._lock:
            readings = [one for one in self._open.values() if one.life is life]
            for one in readings:
                del self._open[one.call]
        return readings

    def of(self, connection: Caller) -> list[Reading]:
        """Those opened over a connection."""
        with self._lock:
            return [one for one in self._open.values() if one.connection is connection]
