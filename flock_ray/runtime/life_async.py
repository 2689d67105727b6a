"""The life of a bird with `async def` methods: all of its code runs on one event loop, the default one of its Ray actor.

Rules kept here: a call begins without a break once it is its turn, so the order of turns is the order of beginnings; orders come from
other threads and are passed to the loop.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flock_ray.core.connection import Frame
from flock_ray.core.wire import Call, HatchOrder, decode
from flock_ray.runtime.host import Host
from flock_ray.runtime.life import MOVED, HostedLife, Response, State, Surroundings, log, refusal
from flock_ray.runtime.listener import Caller
from flock_ray.runtime.mailbox import LoopOrder
from flock_ray.runtime.payload import unpack
from flock_ray.runtime.timers import Entry
from flock_ray.specs import interleaved


class AsyncLife(HostedLife):
    """A bird with `async def` methods. All of its code runs on one event loop; `async def` methods interleave."""

    def __init__(self, order: HatchOrder, host: Surroundings) -> None:
        super().__init__(order, host)
        self._loop = asyncio.get_running_loop()
        self._order = LoopOrder()
        self.interleaved = interleaved(order.spec.options)
        self._running: dict[object, asyncio.Task[Any] | None] = {}  # by call id or timer entry
        self._idle = asyncio.Event()
        self._idle.set()
        self._made = asyncio.Event()  # `__init__` and `take_over` have ended, one way or another
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references

    async def hatch(self) -> None:
        """Runs `__init__` and `take_over`."""
        self._idle.clear()
        try:
            with self._inside():
                self._make()
                take_over = self._state_to_take()
                if take_over is not None:
                    await _finished(take_over())
        except BaseException as error:  # also SystemExit: the bird's end is not the host's
            self._hatch_failed(error)
        else:
            self._hatched()
        finally:
            self._idle.set()
            self._made.set()

    async def call(self, head: Call, body: memoryview, extra: Sequence[Any]) -> Response:
        """Begins a method in its caller's order, and answers."""
        if self.state is not State.RUNNING:
            return MOVED
        await self._order.wait(head.caller, head.order)
        return self._turned_away(head) or await self._run(head, body, extra)

    async def _run(self, head: Call, body: memoryview, extra: Sequence[Any]) -> Response:
        arguments = self._arguments(head, body, extra)
        if isinstance(arguments, bytes):
            return arguments
        task = asyncio.current_task()
        try:
            with self._runs(head.id, task):
                result = await self._invoke(head.method, arguments, head.chain)
        except asyncio.CancelledError as error:
            if task is None or head.id not in self._withdrawn:
                return self._raised(head, error)
            task.uncancel()  # it was `withdraw`, not the end of the loop
            del self._withdrawn[head.id]
            return refusal(f"{self._method_name(head.method)} was cancelled by its caller", "CallTimeout")
        except BaseException as error:  # answered, or the life's end
            return self._raised(head, error)
        return self._result(head, result)

    async def _invoke(self, method: str, arguments: Any, chain: tuple[tuple[str, Any], ...]) -> Any:
        args, kwargs = arguments
        with self._inside(chain, is_async=True):
            return await _finished(getattr(self.bird, method)(*args, **kwargs))

    def withdraw(self, call: str) -> None:
        super().withdraw(call)
        self._loop.call_soon_threadsafe(self._cancel, call)

    def _cancel(self, call: str) -> None:
        task = self._running.get(call)
        if task is not None:
            task.cancel()

    @contextmanager
    def _runs(self, key: object, task: asyncio.Task[Any] | None) -> Iterator[None]:
        self._running[key] = task
        self._idle.clear()
        try:
            yield
        finally:
            del self._running[key]
            if not self._running:
                self._idle.set()

    def _due(self, entry: Entry, method: str, body: bytes, extra: list[Any]) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._run_due(entry, method, body, extra)))

    async def _run_due(self, entry: Entry, method: str, body: bytes, extra: list[Any]) -> None:
        await self._made.wait()
        if self._timer_turned_away(entry):
            return
        try:
            with self._runs(entry, None):
                await self._invoke(method, unpack(body, extra), ())
        except BaseException as error:  # logged, or the life's end
            self._timer_failed(method, error)

    def _begin_end(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._run_end(reason)))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_end(self, reason: str) -> None:
        await self._idle.wait()
        if self.state is not State.ENDING:
            return  # its last method, or __init__, crashed
        with self._inside(is_async=True):
            await self._try_hook("on_stop", reason)
            handed = await self._try_hook("hand_over") if self._keeps else None
        self._ended(handed)

    async def _try_hook(self, name: str, *args: object) -> tuple[object] | None:
        hook = self._hook(name)
        if hook is None:
            return None
        try:
            return (await _finished(hook(*args)),)
        except BaseException:
            log.exception("bird %r: %s raised", self.name, name)
            return None


async def _finished(result: Any) -> Any:
    return await result if inspect.iscoroutine(result) else result


class AsyncHost(Host):
    """The host of a bird with `async def` methods."""

    async def hatch(self, order: bytes) -> None:
        """As `SyncHost.hatch`, on the bird's event loop."""
        life = self.accept(order, AsyncLife)
        if isinstance(life, AsyncLife):
            self._loop = asyncio.get_running_loop()
            self._room = asyncio.Semaphore(life.interleaved)
            self._came: deque[tuple[Caller, Frame]] = deque()
            self._posted = False
            self._answering: set[asyncio.Task[None]] = set()
            self.listen(sys.maxsize, self._call_frame)
            await life.hatch()

    def _call_frame(self, caller: Caller, call: Frame) -> None:
        """On the thread that reads: passes it on to the bird's loop. Many that come at once cost one wake-up."""
        self._came.append((caller, call))
        if not self._posted:
            self._posted = True
            self._loop.call_soon_threadsafe(self._take_calls)

    def _take_calls(self) -> None:
        self._posted = False
        for _ in range(len(self._came)):
            task = self._loop.create_task(self._answer_frame(*self._came.popleft()))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer_frame(self, caller: Caller, call: Frame) -> None:
        async with self._room:
            self.answer(caller, call.id, await self.call(call.body, ()))

    async def call(self, message: bytes | memoryview, extra: Sequence[Any]) -> Response:
        """As `SyncHost.call`, on the bird's event loop."""
        head, body = decode(message)
        life = self.life
        if not isinstance(life, AsyncLife) or head.dot != life.dot:
            return MOVED
        return await life.call(head, body, extra)
