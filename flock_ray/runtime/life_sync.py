"""The life of a bird without `async def` methods: whatever runs has a turn (`mailbox.Turns`): `__init__`, calls, timers, the end."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flock_ray.core.wire import LATER, Call, HatchOrder, Pull, decode_call
from flock_ray.runtime.generators import MOST_ITEMS, Reading
from flock_ray.runtime.host import Host
from flock_ray.runtime.inside import Inside
from flock_ray.runtime.life import MOVED, HostedLife, Response, State, Surroundings, log
from flock_ray.runtime.listener import TOGETHER, Caller
from flock_ray.runtime.mailbox import GAP, ThreadOrder, Turns
from flock_ray.runtime.payload import unpack
from flock_ray.runtime.timers import Entry


class TurnLife(HostedLife):
    """A bird without `async def`: whatever runs has a turn.

    Args:
        turns: of which one is taken: that of `__init__`.
    """

    __slots__ = ("_turns",)

    def __init__(self, order: HatchOrder, host: Surroundings, turns: Turns) -> None:
        super().__init__(order, host)
        self._turns = turns
        turns.enter()

    def _in_pool(self, work: Callable[..., object], *args: Any) -> None:
        """Has something done in a thread, now that it is its turn."""
        raise NotImplementedError

    @property
    def queue(self) -> int:
        return self._turns.waiting

    def hatch(self) -> None:
        """Runs `__init__` and `take_over`."""
        try:
            if self.state is not State.STARTING:
                return  # it was ended before it began
            with self._inside("__init__"):
                self._make()
                if self._loaded is not None and self._loaded.is_async:
                    raise TypeError(f"{self._cls.__qualname__} has `async def` methods: it must be hatched in an AsyncHostActor")
                take_over = self._state_to_take()
                if take_over is not None:
                    take_over()
        except BaseException as error:  # also SystemExit: the bird's end is not the host's
            self._hatch_failed(error)
        else:
            self._hatched()
        finally:
            self._turns.leave()

    def _answer_in_turn(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Response:
        """Runs a method, and ends its turn."""
        try:
            refused = self._turned_away(head, order)
            if refused is not None:
                return refused
            if head.stream:
                opened = self._open(head, order, body, extra, connection)
                return self._next(opened) if isinstance(opened, Reading) else opened
            return self._run(head, body, extra)
        finally:
            self._turns.leave()

    def _run(self, head: Call, body: memoryview, extra: Sequence[Any]) -> Response:
        arguments = self._arguments(head, body, extra)
        if isinstance(arguments, bytes):
            return arguments
        args, kwargs = arguments
        self._host.ran += 1
        inside = Inside(self, (*head.chain, self._link), method=head.method)
        inside.begin(self._host.under_way)
        try:
            result = getattr(self.bird, head.method)(*args, **kwargs)
        except BaseException as error:  # answered, or the life's end
            return self._raised(head, error)
        finally:
            inside.end()
        return self._result(head, result)

    def _next(self, reading: Reading) -> Response:
        inside = Inside(self, (*reading.chain, self._link), method=reading.method)
        inside.begin(self._host.under_way)
        try:
            with reading.running:
                item = next(reading.generator)
        except BaseException as error:  # answered, or the life's end
            return self._no_item(reading, error)
        finally:
            inside.end()
        return self._item(reading, item)

    def _close_later(self, reading: Reading) -> None:
        self._turns.enter_later(lambda: self._in_pool(self._close_in_turn, reading))

    def _close_in_turn(self, reading: Reading) -> None:
        try:
            self._close(reading)
        finally:
            self._turns.leave()

    def _close(self, reading: Reading) -> None:
        try:
            with self._inside(reading.method), reading.running:
                reading.generator.close()
        except BaseException:
            log.exception("bird %r: the generator of %s raised while it was closed", self.name, reading.method)

    def _due(self, entry: Entry, method: str, body: bytes, extra: Sequence[Any]) -> None:
        self._turns.enter_later(lambda: self._in_pool(self._run_due, entry, method, body, extra))

    def _run_due(self, entry: Entry, method: str, body: bytes, extra: Sequence[Any]) -> None:
        try:
            if self._timer_turned_away(entry):
                return
            with self._inside(method):
                args, kwargs = unpack(body, extra)
                getattr(self.bird, method)(*args, **kwargs)
        except BaseException as error:  # logged, or the life's end
            self._timer_failed(method, error)
        finally:
            self._turns.leave()

    def _end_in_turn(self, reason: str) -> None:
        if self.state is not State.ENDING:
            return  # its last method, or __init__, crashed
        for reading in self._host.readings.pop_all(self):
            self._close(reading)
        with self._inside("on_stop"):
            self._try_hook("on_stop", reason)
            handed = self._try_hook("hand_over") if self._keeps else None
        self._ended(handed)

    def _try_hook(self, name: str, *args: object) -> tuple[object] | None:
        hook = self._hook(name)
        if hook is None:
            return None
        try:
            return (hook(*args),)
        except BaseException:
            log.exception("bird %r: %s raised", self.name, name)
            return None


class SyncLife(TurnLife):
    """One with a process of its own: `max_concurrency` methods at a time (1), each in a thread of the host."""

    __slots__ = ("_order", "_pool", "slots")

    def __init__(self, order: HatchOrder, host: Surroundings) -> None:
        self.slots = order.spec.options.max_concurrency
        super().__init__(order, host, Turns(self.slots))
        self._order = ThreadOrder()
        self._pool: ThreadPoolExecutor | None = None

    def call(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None = None) -> Response:
        """Runs a method when it is its turn, and answers."""
        refused = self._at_the_door(head, order)
        if refused is not None:
            return refused
        gate = self._order.wait(head.caller, order, self._turns.line_up, self._is_busy if connection is None else self._turns_are_taken)
        if gate is not None:
            gate.acquire()
        return self._answer_in_turn(head, order, body, extra, connection)

    def _turns_are_taken(self) -> bool:
        return self._turns.busy

    def _is_busy(self) -> bool:
        """For what comes by Ray: what its caller sent before by a socket may wait in the mailbox."""
        return self._turns.busy or self._host.occupied()

    def pull(self, pull: Pull, number: int) -> Iterator[Response]:
        """The next items of a stream, each when it is its turn; no more after `TOGETHER`, if others wait. Pulls of a stream follow on each
        other, whatever threads they come by.
        """
        reading = self._host.readings.get((pull.caller, pull.order))
        if reading is None:
            yield MOVED
            return
        reading.begin_pull(number, GAP)
        until = time.monotonic() + TOGETHER
        self._turns.enter()
        try:
            for _ in range(min(pull.items, MOST_ITEMS)):
                yield self._next(reading) if self._pulled(pull) is reading else MOVED
                if self._host.readings.get(reading.call) is None:
                    return
                if self._host.awaited() and time.monotonic() > until:
                    yield LATER
                    return
                if self._turns.wanted:
                    self._turns.leave()
                    self._turns.enter()
        finally:
            self._turns.leave()
            reading.end_pull(number)

    @property
    def queue(self) -> int:
        return super().queue + self._host.queued()

    def _in_pool(self, work: Callable[..., object], *args: Any) -> None:
        with self._host.state_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._turns.slots, "flock_ray turn")  # never more turns than that are granted
        self._pool.submit(work, *args)

    def _begin_end(self, reason: str) -> None:
        threading.Thread(target=self._run_end, args=(reason,), name="flock_ray end", daemon=True).start()

    def _run_end(self, reason: str) -> None:
        self._turns.enter_all()
        self._end_in_turn(reason)
        self._turns.leave_all()


class SyncHost(Host):
    """The host of a bird without `async def` methods."""

    def hatch(self, order: bytes) -> None:
        """Runs a pickled `HatchOrder`, or, if that is empty, the one that comes; the nest hears how it went."""
        life = self.accept(pickle.loads(order) if order else self.ordered.result(), SyncLife)
        if isinstance(life, SyncLife):
            self.listen(life.slots, self._call_frame)
            life.hatch()

    def _call_frame(self, caller: Caller, number: int, message: memoryview) -> bytes | str | Iterator[bytes]:
        del number
        head, order, body = decode_call(message)
        if isinstance(head, Pull):
            return map(self.framed, self._pull(head, order))
        response = self._run(head, order, body, (), caller)
        return self.framed(response) if response else head.caller

    def call(self, message: bytes, extra: Sequence[Any]) -> Response:
        """Runs a `Call` or a `Pull`: an encoded `Answer`, in a tuple with what travels beside it; empty for a cast that was taken."""
        head, order, body = decode_call(message)
        return next(self._pull(head, order)) if isinstance(head, Pull) else self._run(head, order, body, extra, None)

    def _run(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Response:
        life = self._lives.get(head.dot)
        if not isinstance(life, SyncLife):
            return MOVED
        return life.call(head, order, body, extra, connection)

    def _pull(self, pull: Pull, number: int) -> Iterator[Response]:
        life = self.life
        return life.pull(pull, number) if isinstance(life, SyncLife) else iter((MOVED,))
