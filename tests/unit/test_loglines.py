"""A nest's log: every warning, and of a burst of information the beginning and the sum."""

from __future__ import annotations

import asyncio
import logging

from flock_ray.notices import BirdCrashed, BirdRunning, BirdStarted
from flock_ray.runtime import loglines
from flock_ray.specs import Dot, Life

ME = Life("node", 1)


def test_a_burst_is_summed_up_and_warnings_are_not(monkeypatch, caplog):
    monkeypatch.setattr(loglines, "SECOND", 0.05)
    logger = logging.getLogger("flock_ray.test")

    async def burst(lines, number):
        for n in range(number):
            lines.tell(BirdStarted(ME, n, Dot(ME, n), 0))
            lines.tell(BirdRunning(ME, n, Dot(ME, n), 1))
            lines.tell(BirdCrashed(ME, n, Dot(ME, n), 1, "boom"))
        await asyncio.sleep(0.1)

    async def both():
        lines = loglines.LogLines(logger)
        await burst(lines, 1_000)
        first = [record.getMessage() for record in caplog.records]
        caplog.clear()
        await burst(lines, 3)
        return first, [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.INFO):
        first, second = asyncio.run(both())
    assert sum("crashed" in line for line in first) == 1_000
    assert sum("started (" in line or "running (" in line for line in first) == loglines.LOUD
    assert first[-1] == "and in the same second: 950 BirdRunning, 950 BirdStarted"
    assert len(second) == 9
    assert not any("same second" in line for line in second)
