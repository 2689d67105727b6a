"""One thread of a process that looks after what nobody waits for: answers to casts, routes to be found, messages to be sent again.

Rules kept here: it starts when first needed and dies with the process; nothing on it blocks, and no code of users' runs on it (what
may block goes to `blocking`, users' callbacks to `run_callback`). A call that goes well never comes here.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from flock_ray.runtime import inside

R = TypeVar("R")

ROUND = 0.05  # seconds; more often takes the GIL from whoever sends (a third of the rate of futures, measured), less finds lost casts later

logger = logging.getLogger(__name__)


class Gate(Protocol):
    """What of a lock a thread needs that waits to be woken."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


class Courier:
    """A thread with an event loop. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._awake = False
        self._next_round: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._round_set = False
        self._callbacks = ThreadPoolExecutor(8, thread_name_prefix="flock_ray callbacks")
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    loop = asyncio.new_event_loop()
                    threading.Thread(target=loop.run_forever, name="flock_ray courier", daemon=True).start()
                    self._loop = loop
        return self._loop

    def post(self, what: Callable[..., object], *args: Any) -> None:
        """Has `what(*args)` run on the thread. Many posts cost one wake-up."""
        self._inbox.append((what, args))
        if not self._awake:
            self._awake = True
            self.loop.call_soon_threadsafe(self._drain)

    def post_later(self, what: Callable[..., object], *args: Any) -> None:
        """Has `what(*args)` run on the thread within `ROUND` seconds. Many of them, whoever posts them, cost one wake-up."""
        self._next_round.append((what, args))
        if not self._round_set:
            self._round_set = True
            self.post(lambda: self.loop.call_later(ROUND, self._run_round))

    def _run_round(self) -> None:
        self._round_set = False
        self._run(self._next_round)

    def _drain(self) -> None:
        self._awake = False  # first: whoever posts from here on wakes us again
        self._run(self._inbox)

    def _run(self, inbox: deque[tuple[Callable[..., object], tuple[Any, ...]]]) -> None:
        for _ in range(len(inbox)):
            what, args = inbox.popleft()
            try:
                what(*args)
            except Exception:
                logger.exception("flock_ray's courier failed at %r", what)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine that nobody waits for. Only on the thread."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("flock_ray's courier failed", exc_info=task.exception())

    def submit(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        """Runs a coroutine on the thread; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine on the thread and waits for it; an interrupt here cancels it."""
        future = self.submit(work)
        try:
            with inside.waiting():
                return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run_async(self, work: Coroutine[Any, Any, R]) -> R:
        """The same for a coroutine on any loop."""
        return await asyncio.wrap_future(self.submit(work))

    async def blocking(self, what: Callable[..., R], *args: Any) -> R:
        """Runs what may block in a thread of its own. Only on the thread.

        No pool: those of concurrent.futures are closed before a process flushes its casts at its end, and what blocks is rare.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()

        def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
            if not done.done():
                set_outcome(outcome)

        def work() -> None:
            try:
                result = what(*args)
            except BaseException as error:  # the waiter's, whatever it is
                loop.call_soon_threadsafe(settle, done.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, done.set_result, result)

        threading.Thread(target=work, name="flock_ray blocking", daemon=True).start()
        return await done

    def sleep(self, seconds: float) -> None:
        """Lets time pass on a thread that waits for something."""
        time.sleep(seconds)

    def gate(self) -> Gate:
        """What a thread waits at: it is closed, and whoever wants to wake the thread releases it."""
        gate = threading.Lock()
        gate.acquire()
        return gate

    async def in_thread(self, work: Callable[..., R], *args: Any) -> R:
        """Runs what blocks in a thread of its own, on any loop.

        A pool's may all be taken by batches that wait for birds that wait for batches.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="flock_ray batch")
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, partial(contextvars.copy_context().run, work, *args))
        finally:
            pool.shutdown(wait=False)

    def run_callback(self, what: Callable[..., object], *args: Any) -> None:
        """Runs a user's callback, which may block, in a pool of its own; what it raises is logged, as by concurrent.futures."""

        def run() -> None:
            try:
                what(*args)
            except Exception:
                logger.exception("the callback %r of a future raised", what)

        self._callbacks.submit(run)
