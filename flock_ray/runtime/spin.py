"""Looking for what comes soon instead of sleeping until it is there, as adaptive locks do.

To put a thread to sleep and wake it costs 10 to 20 us, and what runs then finds cold caches: a round trip between two processes takes
50 us asleep and 8 us awake (measured). So who waits looks for `SECONDS` first. Where that is in vain `MISSES` times, as with slow
methods or on a machine whose cores are all busy, it is tried only now and then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 120e-6  # a round trip in which one side sleeps; with less, two that miss each other once go on to sleep in turns (measured)
MISSES = 4
NOW_AND_THEN = 16  # waits

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Spin:
    """One waiter's experience. Not locked: two threads that mix it up lose a microsecond."""

    __slots__ = ("_misses",)

    def __init__(self) -> None:
        self._misses = 0

    def until(self, look: Callable[[], T | None]) -> T | None:
        """What `look` finds while it is worth its while; `None`: sleep."""
        if _CORES == 1:
            return None
        misses = self._misses
        if misses >= MISSES and misses % NOW_AND_THEN:
            self._misses = misses + 1
            return None
        end = time.monotonic() + SECONDS
        while True:
            found = look()
            if found is not None:
                self._misses = 0
                return found
            os.sched_yield()  # whoever else wants this core may have it: perhaps it is the one who answers
            if time.monotonic() > end:
                self._misses = misses + 1
                return None
