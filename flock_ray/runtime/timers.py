"""One thread that knows when messages to oneself are due. It only hands them over: a bird that blocks holds up nobody's schedule."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable


class Entry:
    """A message due once, or every `period` seconds. Of a repeated one at most one waits for its turn; further ones are left out."""

    __slots__ = ("cancelled", "deliver", "due", "pending", "period")

    def __init__(self, due: float, period: float | None, deliver: Callable[[Entry], None]) -> None:
        self.due = due
        self.period = period
        self.deliver = deliver
        self.cancelled = False
        self.pending = False  # handed over, and its turn has not come yet


LONGEST = 3600.0  # seconds of one wait: the platform refuses those of many years


class Scheduler:
    """Calls `entry.deliver(entry)` when it is due. The thread starts with the first entry and ends with the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, Entry]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, seconds: float, every: bool, deliver: Callable[[Entry], None]) -> Entry:
        entry = Entry(self.clock() + seconds, seconds if every else None, deliver)
        with self._changed:
            self._push(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flock_ray timers", daemon=True)
                self._thread.start()
            self._changed.notify()
        return entry

    def _push(self, entry: Entry) -> None:
        heapq.heappush(self._heap, (entry.due, next(self._count), entry))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._heap or self._heap[0][0] > self.clock():
                    self._changed.wait(min(self._heap[0][0] - self.clock(), LONGEST) if self._heap else None)
                entry = heapq.heappop(self._heap)[2]
                if not self._is_due(entry):
                    continue
            entry.deliver(entry)

    def _is_due(self, entry: Entry) -> bool:
        """Its time has come: is it to be handed over? One that is repeated goes back into the schedule."""
        if entry.cancelled:
            return False
        if entry.period is not None:
            late = max(0.0, self.clock() - entry.due)
            entry.due += entry.period * (1 + math.floor(late / entry.period))  # on its grid; missed ticks are left out
            self._push(entry)
        if entry.pending:
            return False
        entry.pending = True
        return True
