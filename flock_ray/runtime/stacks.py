"""Where the code of a bird is right now: the frames of the threads and coroutines that run its methods.

It is read from outside, so nothing has to be asked of a method that may never return; what runs pays for it with a clock reading and an
entry in a set. Our own frames around the bird's are left out.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from flock_ray.runtime.inside import Inside
from flock_ray.runtime.recorder import Recorded
from flock_ray.specs import Running

_OURS = ("flock_ray.runtime.life", "flock_ray.runtime.recorder")  # what calls a bird's methods


def running(under_way: Iterable[Inside]) -> tuple[Running, ...]:
    """What is under way, the oldest first."""
    threads, now = sys._current_frames(), time.monotonic()
    some = sorted(under_way, key=lambda inside: inside.began)
    return tuple(_running(inside, threads.get(inside.thread), now) for inside in some)


def _running(inside: Inside, thread: FrameType | None, now: float) -> Running:
    frames = list(_of_task(inside.task)) or _of_thread(thread)
    first = max((at for at, frame in enumerate(frames) if frame.f_globals.get("__name__", "").startswith(_OURS)), default=-1) + 1
    stack = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames[first:])
    waiting = tuple(name for _, name in inside.chain[:-1])
    return Running(inside.method, now - inside.began, waiting, "".join(stack.format()).rstrip())


def _of_thread(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _of_task(task: asyncio.Task[Any] | None) -> Iterator[FrameType]:
    """The frames of a coroutine that waits, outermost first; none of one that runs: its thread has them."""
    step: Any = task.get_coro() if task is not None else None
    if getattr(step, "cr_running", False):
        return
    while step is not None:
        frame = getattr(step, "cr_frame", None) or getattr(step, "gi_frame", None) or getattr(step, "ag_frame", None)
        if frame is None:
            return
        yield frame
        recorded = frame.f_locals.get("self") if frame.f_code is Recorded.__await__.__code__ else None
        step = recorded.work if recorded is not None else _awaited(step)


def _awaited(step: Any) -> Any:
    for attribute in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(step, attribute):
            return getattr(step, attribute)
    return None
