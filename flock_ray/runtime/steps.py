"""Long pieces of work on an event loop: one in each of its rounds, and between two of them it looks at its sockets.

A nest has starts, letters and words of hosts to take in, a thousand at a time. If all that is there were done in one round, the failure
detector's pings would wait for it: 0.4 s of CPU in a burst of starts, and 1.3 s where other processes want the CPU too (measured). This way
it is 0.07 s, of which the longest piece takes nearly all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Steps:
    """Work that waits for its round, first come, first served."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], object]] = deque()

    @property
    def busy(self) -> bool:
        """Does something wait?"""
        return bool(self._waiting)

    def add(self, step: Callable[[], object]) -> None:
        """Has something done in a round of its own."""
        self._waiting.append(step)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._next)

    async def turn(self) -> None:
        """Waits for a round, for what follows at once."""
        mine = asyncio.Event()
        self.add(mine.set)
        await mine.wait()

    def _next(self) -> None:
        try:
            self._waiting[0]()
        finally:
            self._waiting.popleft()
            if self._waiting:
                self._loop.call_soon(self._loop.call_soon, self._next)  # the round after the next: whom this has woken has that one
