"""A nest's log: a line for each notice, but in a burst most are counted, and told together.

A flock of light birds starts ten thousand in a second, and two lines for each cost more than all else that is done for it (measured).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from flock_ray.notices import Notice

LOUD = 100  # lines a second of information; warnings and errors are all told
SECOND = 1.0


class LogLines:
    """Logs notices, on the event loop it is made on."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told = 0
        self._counted: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, notice: Notice) -> None:
        if notice.level > logging.INFO:
            self._logger.log(notice.level, "%s", notice.text)
            return
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SECOND, self._sum_up)
        if self._told < LOUD:
            self._told += 1
            self._logger.log(notice.level, "%s", notice.text)
        else:
            self._counted[type(notice).__name__] += 1

    def _sum_up(self) -> None:
        if self._counted:
            also = ", ".join(f"{count} {kind}" for kind, count in sorted(self._counted.items()))
            self._logger.info("and in the same second: %s", also)
        self._told, self._timer = 0, None
        self._counted.clear()
