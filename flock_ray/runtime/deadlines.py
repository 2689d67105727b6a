"""When messages expire for which no thread waits. A timer for each would cost an event loop more than the rest of the call, so messages
that are due at about the same time share one.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flock_ray.runtime.pending import Pending

GRAIN = 0.02  # seconds: so late, at most, is a message that has expired; finer takes more timers
SLACK = 0.5  # seconds more for a message that is with the courier, whose own timeout says more


class Deadlines:
    """The deadlines of a client's messages, on whichever event loop they are waited for."""

    def __init__(self) -> None:
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, set[Pending]]] = weakref.WeakKeyDictionary()
        self._local = threading.local()  # the loop that ran last here, and its slots: nearly always the one that runs now

    def add(self, message: Pending, loop: asyncio.AbstractEventLoop) -> None:
        """Has it expire in time, by this event loop, which runs now."""
        if message.deadline == float("inf") or message.finished:
            return
        known = getattr(self._local, "known", None)
        if known is None or known[0]() is not loop:
            known = self._local.known = (weakref.ref(loop), self._by_loop.setdefault(loop, {}))
        slots = known[1]
        slot = int(message.deadline / GRAIN) + 1
        due = slots.get(slot)
        if due is None:
            due = slots[slot] = set()
            loop.call_at(slot * GRAIN, self._expire, slots, slot)
        due.add(message)
        message.due_with = due

    def _expire(self, slots: dict[int, set[Pending]], slot: int) -> None:
        loop = asyncio.get_running_loop()
        for message in tuple(slots.pop(slot)):
            if message.reply is None:
                loop.call_later(SLACK, message.expire)
            else:
                message.expire()
