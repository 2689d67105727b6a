"""The life of a bird with `async def` methods: all of its code runs on one event loop, the default one of its Ray actor.

Rules kept here: a call begins without a break once it is its turn, so the order of turns is the order of beginnings; orders come from
other threads and are passed to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import sys
import weakref
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flock_ray.core.wire import Call, HatchOrder, Pull, decode_call
from flock_ray.runtime.generators import MOST_ITEMS, Reading
from flock_ray.runtime.host import Host
from flock_ray.runtime.life import MOVED, HostedLife, Response, State, Surroundings, log, refusal
from flock_ray.runtime.listener import Answered, Answers, Caller
from flock_ray.runtime.mailbox import LoopOrder
from flock_ray.runtime.payload import unpack
from flock_ray.runtime.timers import Entry
from flock_ray.specs import interleaved


class AsyncLife(HostedLife):
    """A bird with `async def` methods. All of its code runs on one event loop; `async def` methods interleave."""

    __slots__ = ("_idle", "_locks", "_loop", "_made", "_order", "_queue", "_room", "_running", "_tasks")

    def __init__(self, order: HatchOrder, host: Surroundings, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(order, host)
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._order = LoopOrder()
        self._room = asyncio.Semaphore(interleaved(order.spec.options))  # first come, first served
        self._running: dict[object, asyncio.Task[Any] | None] = {}  # by call id or timer entry
        self._queue = 0  # calls that wait for their turn
        self._idle = asyncio.Event()
        self._idle.set()
        self._made = asyncio.Event()  # `__init__` and `take_over` have ended, one way or another
        self._locks: weakref.WeakKeyDictionary[Reading, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references

    async def hatch(self) -> None:
        """Runs `__init__` and `take_over`."""
        self._idle.clear()
        try:
            with self._inside("__init__") as inside:
                inside.task = asyncio.current_task()
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

    async def call(
        self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None = None, in_order: bool = True
    ) -> Response:
        """Begins a method, in its caller's order if there is one, and answers."""
        refused = self._at_the_door(head, order)
        if refused is not None:
            return refused
        # Whoever waits for this call has a place: were it to wait for one, none might ever be free (C4).
        room = self._room if self._link not in head.chain else contextlib.nullcontext()
        waits = True
        self._queue += 1
        try:
            if in_order:
                await self._order.wait(head.caller, order)
            async with room:
                self._queue, waits = self._queue - 1, False
                refused = self._turned_away(head, order)
                if refused is not None:
                    return refused
                if not head.stream:
                    return await self._run(head, order, body, extra)
                opened = self._open(head, order, body, extra, connection)
        finally:
            self._queue -= waits
        if not isinstance(opened, Reading):
            return opened
        async with self._one_by_one(opened):  # it takes nobody's place any more: to wait for an item is not to run
            return await self._next(opened)

    @property
    def queue(self) -> int:
        return self._queue

    async def _run(self, head: Call, order: int, body: memoryview, extra: Sequence[Any]) -> Response:
        arguments = self._arguments(head, body, extra)
        if isinstance(arguments, bytes):
            return arguments
        self._host.ran += 1
        task = asyncio.current_task()
        key = (head.caller, order)
        try:
            with self._runs(key, task):
                result = await self._invoke(head.method, arguments, head.chain)
        except asyncio.CancelledError as error:
            if task is None or self._withdrawn is None or key not in self._withdrawn:
                return self._raised(head, error)
            task.uncancel()  # it was `withdraw`, not the end of the loop
            del self._withdrawn[key]
            return refusal(f"{self._method_name(head.method)} was cancelled by its caller", "CallTimeout")
        except BaseException as error:  # answered, or the life's end
            return self._raised(head, error)
        return self._result(head, result)

    async def pull(self, pull: Pull, number: int) -> AsyncIterator[Response]:
        """The next items of a stream. Other pulls of it wait: each brings items that follow on each other."""
        await self._order.wait(f"{pull.caller}/{pull.order}", number)
        reading = self._pulled(pull)
        if reading is None:
            yield MOVED
            return
        async with self._one_by_one(reading):
            for _ in range(min(pull.items, MOST_ITEMS)):
                if self._pulled(pull) is None:
                    yield MOVED
                    return
                yield await self._next(reading)
                if self._host.readings.get(reading.call) is None:
                    return

    async def _next(self, reading: Reading) -> Response:
        """An item. A generator that waits for one may do so for ever: it holds up neither the bird's end nor its own."""
        task = reading.step = asyncio.current_task()
        try:
            with self._inside(reading.method, reading.chain, is_async=True):
                generator = reading.generator
                item = await anext(generator) if inspect.isasyncgen(generator) else next(generator)
        except BaseException as error:  # answered, or the life's end
            if isinstance(error, asyncio.CancelledError) and task is not None and reading.closed:
                task.uncancel()  # by `_close`
                return MOVED
            return self._no_item(reading, error)
        finally:
            reading.step = None
        return self._item(reading, item)

    def _one_by_one(self, reading: Reading) -> asyncio.Lock:
        return self._locks.setdefault(reading, asyncio.Lock())

    def _close_later(self, reading: Reading) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._close(reading)))

    async def _close(self, reading: Reading) -> None:
        reading.closed = True
        if reading.step is not None:
            reading.step.cancel()
        async with self._one_by_one(reading):
            try:
                with self._inside(reading.method, is_async=True):
                    if inspect.isasyncgen(reading.generator):
                        await reading.generator.aclose()
                    else:
                        reading.generator.close()
            except BaseException:
                log.exception("bird %r: the generator of %s raised while it was closed", self.name, reading.method)

    async def _invoke(self, method: str, arguments: Any, chain: tuple[tuple[str, Any], ...]) -> Any:
        args, kwargs = arguments
        with self._inside(method, chain, is_async=True):
            return await _finished(getattr(self.bird, method)(*args, **kwargs))

    def withdraw(self, caller: str, order: int) -> None:
        super().withdraw(caller, order)
        self._loop.call_soon_threadsafe(self._cancel, (caller, order))

    def _cancel(self, call: tuple[str, int]) -> None:
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

    def _due(self, entry: Entry, method: str, body: bytes, extra: Sequence[Any]) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._run_due(entry, method, body, extra)))

    async def _run_due(self, entry: Entry, method: str, body: bytes, extra: Sequence[Any]) -> None:
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
        for reading in self._host.readings.pop_all(self):
            await self._close(reading)
        await self._idle.wait()
        if self.state is not State.ENDING:
            return  # its last method, or __init__, crashed
        with self._inside("on_stop", is_async=True):
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
        life = self.accept(pickle.loads(order) if order else await asyncio.wrap_future(self.ordered), AsyncLife)
        if isinstance(life, AsyncLife):
            self._begin_loop()
            self.listen(sys.maxsize, self._call_frame)
            await life.hatch()

    def _begin_loop(self) -> None:
        """This is the birds' event loop."""
        self._loop = asyncio.get_running_loop()
        self._came: deque[tuple[Caller, int, Call | Pull, int, memoryview]] = deque()
        self._posted = False
        self._inside = 0  # calls that were taken and are not answered yet
        self._answering: set[asyncio.Task[None]] = set()
        self._answers = Answers()
        self._answers_posted = False

    def _call_frame(self, caller: Caller, number: int, message: memoryview) -> Answered:
        """On the thread that reads."""
        return self._pass_on(caller, number, message, *decode_call(message))

    def _pass_on(self, caller: Caller, number: int, message: memoryview, head: Call | Pull, order: int, body: memoryview) -> bytes | None:
        """To the bird's loop. Many that come at once cost one wake-up."""
        if self._inside + len(self._came) >= self.boot.mailbox:
            refused = self._full(message)
            if refused is not None:
                return refused
        self._came.append((caller, number, head, order, body))
        if not self._posted:
            self._posted = True
            self._loop.call_soon_threadsafe(self._take_calls)
        return None

    def _take_calls(self) -> None:
        self._posted = False
        for _ in range(len(self._came)):
            self._track(self._answer_frame(*self._came.popleft()))

    def _track(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer_frame(self, caller: Caller, number: int, head: Call | Pull, order: int, body: memoryview) -> None:
        self._inside += 1
        try:
            if isinstance(head, Pull):
                async for item in self._pull(head, order):
                    self._answer(caller, number, self.framed(item))
                return
            response = await self._run(head, order, body, (), caller)
        finally:
            self._inside -= 1
        self._answer(caller, number, self.framed(response) if response else head.caller)

    def _answer(self, caller: Caller, number: int, answer: bytes | str) -> None:
        self._answers.add(caller, number, answer)
        if not self._answers_posted:
            self._answers_posted = True
            self._loop.call_soon(self._send_answers)

    def _send_answers(self) -> None:
        """Answers of one round of the loop go together."""
        self._answers_posted = False
        answers, self._answers = self._answers, Answers()
        self.send_answers(answers)

    async def call(self, message: bytes, extra: Sequence[Any]) -> Response:
        """As `SyncHost.call`, on the bird's event loop."""
        head, order, body = decode_call(message)
        return await anext(self._pull(head, order)) if isinstance(head, Pull) else await self._run(head, order, body, extra, None)

    async def _run(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Response:
        life = self._lives.get(head.dot)
        if not isinstance(life, AsyncLife):
            return MOVED
        return await life.call(head, order, body, extra, connection)

    async def _pull(self, pull: Pull, number: int) -> AsyncIterator[Response]:
        reading = self.readings.get((pull.caller, pull.order))
        if reading is None:
            yield MOVED
            return
        async for item in reading.life.pull(pull, number):
            yield item
