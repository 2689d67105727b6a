"""Turns: who may run next in a bird. First come, first served, whether a call, a timer's message or the bird's end.

Rules kept here: a sync bird runs at most `slots` methods at a time (one by default), and nobody who waits is overtaken; the messages
of one caller begin in the order in which they were sent (C2) also where Ray gives none: in async actors and, with
`max_concurrency` above 1, in sync ones (measured: 120 to 380 inversions in 3,000 calls).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

CALLERS_OF_A_LIGHT_BIRD = 1_000
T = TypeVar("T")
_NOBODY: dict[str, int] = {}  # of whoever has none yet; never written to
_NOTHING: dict[str, dict[int, Any]] = {}
Lock = contextlib.AbstractContextManager[bool, None]

GAP = 1.0  # seconds a message waits for a missing one; longer keeps order over slower links, shorter stalls less for a lost one
CALLERS = 100_000  # callers whose place is remembered, 20 MB of them; one forgotten waits GAP once


class Turns:
    """A fair lock with `slots` places. It can be entered by waiting, or by being called back once it is one's turn.

    Args:
        lock: guards it; of many in one process one lock may guard all, for nothing is done under it.
    """

    __slots__ = ("_free", "_lock", "_waiting", "slots")

    def __init__(self, slots: int = 1, lock: Lock | None = None) -> None:
        self.slots = slots
        self._lock = lock if lock is not None else threading.Lock()
        self._free = slots
        self._waiting: deque[Callable[[], object]] | None = None  # made when somebody waits: there may be a hundred thousand of these

    def enter(self) -> None:
        """Waits for a turn."""
        gate = self.line_up()
        if gate is not None:
            gate.acquire()

    def line_up(self) -> threading.Lock | None:
        """Takes a place in the line and returns: what to acquire, or `None` if it is one's turn."""
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            gate = threading.Lock()
            gate.acquire()
            self._wait(gate.release)
        return gate

    def _wait(self, granted: Callable[[], object]) -> None:
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(granted)

    def try_enter(self) -> bool:
        """Takes a turn if one is free."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    def enter_later(self, granted: Callable[[], object]) -> None:
        """Takes a place in the line and returns; `granted` is called when it is its turn, and must return at once."""
        with self._lock:
            if not self._free:
                self._wait(granted)
                return
            self._free -= 1
        granted()

    def leave(self) -> None:
        """Ends a turn: the place goes to the one who has waited longest."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            granted = self._waiting.popleft()
        granted()

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return len(self._waiting) if self._waiting is not None else 0

    @property
    def wanted(self) -> bool:
        """Does somebody wait for a turn?"""
        return bool(self._waiting)

    @property
    def busy(self) -> bool:
        """Is a place taken?"""
        return self._free < self.slots

    def enter_all(self) -> None:
        """Waits until nothing else runs. What waited before gets its turn before."""
        for _ in range(self.slots):
            self.enter()

    def leave_all(self) -> None:
        for _ in range(self.slots):
            self.leave()


class Order:
    """Which message of each caller begins next, and which have come too early. Not locked: see the two below."""

    def __init__(self) -> None:
        self._next: OrderedDict[str, int] = OrderedDict()
        self._early: dict[str, set[int]] = {}

    def may_begin(self, caller: str, order: int) -> bool:
        return order <= self._next.get(caller, 0)

    def begun(self, caller: str, order: int) -> bool:
        """Notes it; True if others of this caller wait."""
        self._next[caller] = max(order + 1, self._next.get(caller, 0))
        self._next.move_to_end(caller)
        if len(self._next) > CALLERS:
            self._next.popitem(last=False)
        return caller in self._early

    def early(self, caller: str, order: int) -> None:
        self._early.setdefault(caller, set()).add(order)

    def early_no_more(self, caller: str, order: int) -> None:
        waiting = self._early.get(caller, set())  # gone, if a broken peer sent a number twice
        waiting.discard(order)
        if not waiting:
            self._early.pop(caller, None)

    def give_up(self, caller: str) -> None:
        """What is missing is not waited for any more: the first that is there may begin."""
        self._next[caller] = max(min(self._early.get(caller, ()), default=0), self._next.get(caller, 0))


class Arrivals:
    """Which messages have come in each caller's order, and which too early, for those who must not wait. Not locked.

    It is kept small: a host may have a hundred thousand of these.
    """

    __slots__ = ("_early", "_next")

    def __init__(self) -> None:
        self._next: dict[str, int] = _NOBODY
        self._early: dict[str, dict[int, Any]] = _NOTHING

    def come(self, caller: str, order: int, message: T) -> Sequence[T]:
        """A message has come.

        Returns:
            Those whose turn it is to line up, in order: none if it came too early, else this one, and what had come before it.
        """
        if self._next is _NOBODY:
            self._next = {}
        expected = self._next.get(caller, 0)
        if order > expected:
            if self._early is _NOTHING:
                self._early = {}
            self._early.setdefault(caller, {})[order] = message
            return ()
        self._note(caller, max(expected, order + 1))
        if caller not in self._early:
            return (message,)
        return (message, *self._follow(caller))

    def give_up(self, caller: str, order: int) -> Sequence[Any]:
        """What this message waits for does not come: it and all that follow on it may line up, if it waits still."""
        early = self._early.get(caller, {})
        if order not in early:
            return ()
        self._note(caller, min(early))
        return self._follow(caller)

    def _note(self, caller: str, following: int) -> None:
        self._next.pop(caller, None)
        self._next[caller] = following
        if len(self._next) > CALLERS_OF_A_LIGHT_BIRD:
            del self._next[next(iter(self._next))]  # who has called least lately

    def _follow(self, caller: str) -> list[Any]:
        early, at = self._early[caller], self._next[caller]
        following = []
        while at in early:
            following.append(early.pop(at))
            at += 1
        self._next[caller] = at
        if not early:
            del self._early[caller]
        return following


class ThreadOrder:
    """Lets threads begin in each caller's order.

    Args:
        gap: seconds a message waits for a missing one.
    """

    def __init__(self, gap: float = GAP) -> None:
        self._gap = gap
        self._order = Order()
        self._changed = threading.Condition()

    def wait(self, caller: str, order: int, line_up: Callable[[], T], busy: Callable[[], bool]) -> T:
        """Waits until all earlier messages of the caller have begun, or one is missing for `gap` seconds; then this one has begun.

        Args:
            line_up: takes its place where what has begun waits for its turn; before the next message may do so.
            busy: may what is missing have come, and wait for others to end?
        """
        with self._changed:
            if not self._order.may_begin(caller, order):
                self._wait(caller, order, busy)
            place = line_up()
            if self._order.begun(caller, order):
                self._changed.notify_all()
        return place

    def _wait(self, caller: str, order: int, busy: Callable[[], bool]) -> None:
        self._order.early(caller, order)
        while not self._changed.wait_for(lambda: self._order.may_begin(caller, order), self._gap):
            if not busy():
                self._order.give_up(caller)
                self._changed.notify_all()
        self._order.early_no_more(caller, order)


class LoopOrder:
    """Lets coroutines of one event loop begin in each caller's order. Whoever `wait` returns to runs on without a break."""

    def __init__(self, gap: float = GAP) -> None:
        self._gap = gap
        self._order = Order()
        self._early: dict[tuple[str, int], asyncio.Future[None]] = {}

    async def wait(self, caller: str, order: int) -> None:
        """Waits until all earlier messages of the caller have begun, or one is missing for `gap` seconds; then this one has begun."""
        if not self._order.may_begin(caller, order):
            await self._wait(caller, order)
        if self._order.begun(caller, order):
            self._wake(caller)

    async def _wait(self, caller: str, order: int) -> None:
        self._order.early(caller, order)
        try:
            while not self._order.may_begin(caller, order):
                turn = self._early[caller, order] = asyncio.get_running_loop().create_future()
                done, _ = await asyncio.wait([turn], timeout=self._gap)
                if not done:
                    self._order.give_up(caller)
                    self._wake(caller)
        finally:
            self._order.early_no_more(caller, order)
            self._early.pop((caller, order), None)

    def _wake(self, caller: str) -> None:
        for (waiting, order), turn in self._early.items():
            if waiting == caller and not turn.done() and self._order.may_begin(caller, order):
                turn.set_result(None)
