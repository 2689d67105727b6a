"""Light birds: many in one process. Each has its own turn, and a thread only while a method of it runs.

A message for a bird that is idle is run by the thread that took it from the mailbox, as in a host of one; for one that is busy it waits
with the bird, and who ends the bird's method has the next one done. So a bird that blocks takes one thread of `light_threads`, and one
that waits for a call of its own takes none: another is allowed meanwhile, or birds that call each other could wait for ever.

Birds with `async def` methods are as in a process of their own, on one event loop for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from flock_ray.core.connection import LONGEST
from flock_ray.core.wire import (
    Call,
    CallMany,
    EndAllOrder,
    EndOrder,
    HatchOrder,
    LeaveOrder,
    LifeCrashed,
    Orders,
    Pull,
    decode_call,
    decode_calls,
    encode_answers,
)
from flock_ray.runtime.generators import Reading
from flock_ray.runtime.host import FORGOTTEN, HostBoot, extend_path, label_output, log
from flock_ray.runtime.inside import cycle_text
from flock_ray.runtime.life import ALIVE, FULL, MOVED, HostedLife, Response, State, refusal
from flock_ray.runtime.life_async import AsyncHost, AsyncLife
from flock_ray.runtime.life_sync import TurnLife
from flock_ray.runtime.listener import TOGETHER, Answered, Answers, Caller, Work
from flock_ray.runtime.mailbox import GAP, Arrivals, Turns
from flock_ray.runtime.recorder import Recorded, Recorder
from flock_ray.runtime.timers import Entry
from flock_ray.specs import Dot, Life

Reply = Callable[[Response], "tuple[Caller, int, Answered] | None"]  # takes the answer to a call that had to wait for its turn
SLOW = 0.005  # seconds a thread may be held up in a batch until another goes on with it
_NO_DOT = Dot(Life("", 0), 0)
Message = tuple[Call, int, memoryview, Sequence[Any], "Caller | None", Reply]


class LightLife(TurnLife):
    """A light bird without `async def` methods."""

    __slots__ = ("_arrivals", "_granted")
    _host: LightHost

    def __init__(self, order: HatchOrder, host: LightHost) -> None:
        super().__init__(order, host, Turns(order.spec.options.max_concurrency, host.state_lock))  # 1 where birds share a process
        self._arrivals = Arrivals()
        self._granted: Once | None = None  # what was given its turn last, and waits for a thread

    def take(
        self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None, reply: Reply, here: bool
    ) -> Response | None:
        """Takes a call; never waits for its turn.

        Args:
            reply: is given the answer, in some thread of the host, if this returns `None`.
            here: it may be run in this thread.

        Returns:
            The answer, if it was its turn at once.
        """
        refused = self._at_the_door(head, order)
        if refused is not None:
            return refused
        if self._link in head.chain and not head.cast:
            with self._host.state_lock:
                self._line_up(self._arrivals.come(head.caller, order, None)[1:])  # what follows on it does not wait for it
            return self._would_wait_for_itself(head)
        if self._turns.waiting >= self._host.boot.mailbox:
            self.refuse_from(head.caller, order)
            return FULL
        with self._host.state_lock:
            come: Sequence[Message] = self._arrivals.come(head.caller, order, (head, order, body, extra, connection, reply))
            at_once = here and bool(come) and self._turns.try_enter()
            self._line_up(come[1:] if at_once else come)
        if not come:
            self._host.scheduler.add(GAP, False, lambda _: self._give_up(head.caller, order))
        return self._recorded(self._answer_in_turn, head, order, body, extra, connection) if at_once else None

    def take_one(self, head: Call, order: int, body: memoryview, connection: Caller, reply: Reply) -> Response | None:
        """Takes a call of a `CallMany`, as `take`. Its caller has nothing else under way for this bird, so there is no order to keep.

        If it runs here, the record that it does is left for who runs the next.
        """
        refused = self._at_the_door(head, order)
        if refused is None and head.chain and self._link in head.chain:
            refused = self._would_wait_for_itself(head)
        if refused is not None:
            return refused
        if self._turns.try_enter():
            self._host.recorder.note(self.dot)
            return self._answer_in_turn(head, order, body, (), connection)
        if self._turns.waiting >= self._host.boot.mailbox:
            return FULL
        self._line_up([(head, order, body, (), connection, reply)])
        return None

    def _would_wait_for_itself(self, head: Call) -> bytes:
        return refusal(cycle_text(head.chain, self._link), "CallCycle")

    def begin_cast(self, head: Call) -> bytes:
        """Begins a cast of a `CallMany`, if the bird is idle: `begun` has to follow. Else its caller's lane sends it by itself."""
        refused = self._at_the_door(head, 0)
        if refused is not None:
            return refused
        return b"" if self._turns.try_enter() else FULL

    def begun(self, head: Call, body: memoryview) -> Once:
        """A cast that has begun, to be run."""
        return self._once(partial(self._do, self._run_begun, head, body))

    def _run_begun(self, head: Call, body: memoryview) -> None:
        try:
            if self._host.may_run() and self._examined(head) is None:
                self._run(head, body, ())
        finally:
            self._turns.leave()

    def _line_up(self, messages: Sequence[Message | None]) -> None:
        for message in messages:
            if message is None:
                continue  # it was answered already
            self._turns.enter_later(partial(self._grant, partial(self._recorded, self._answer_later, message)))

    def _give_up(self, caller: str, order: int) -> None:
        """What this message waited for has not come."""
        with self._host.state_lock:
            self._line_up(self._arrivals.give_up(caller, order))

    def _answer_later(self, message: Message) -> tuple[Caller, int, Answered] | None:
        head, order, body, extra, connection, reply = message
        return reply(self._answer_in_turn(head, order, body, extra, connection))

    def _in_pool(self, work: Callable[..., object], *args: Any) -> None:
        self._grant(partial(self._do, work, *args))

    def _grant(self, work: Work) -> None:
        """Has something done whose turn it is; when the bird is to end before what is of others, for they may block all threads."""
        once = self._once(work)
        if self.state is not State.ENDING:
            self._host.run_soon(once)

    def _once(self, work: Work) -> Once:
        """What has the turn, as something that who ends the bird can have done first."""
        self._granted = once = Once(self, work)
        if self.state is State.ENDING:
            self._host.run_first(once)
        return once

    def _do(self, work: Callable[..., object], *args: Any) -> None:
        self._recorded(work, *args)

    def _recorded(self, work: Callable[..., Any], *args: Any) -> Any:
        """Runs code of the bird: if the process dies meanwhile, that is counted against it."""
        recorder = self._host.recorder
        recorder.note(self.dot)
        try:
            return work(*args)
        finally:
            recorder.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While a method of the bird waits for a call it has made: its thread is not counted."""
        recorder = self._host.recorder
        if recorder.noted() != self.dot:  # it waits already, or this is a thread of the bird's own
            yield
            return
        recorder.clear()
        self._host.widen(1)
        try:
            yield
        finally:
            self._host.widen(-1)
            recorder.note(self.dot)

    def begin(self) -> None:
        """Has it hatched; returns at once."""
        self._in_pool(self.hatch)

    # Streams

    def take_pull(self, reading: Reading, pull: Pull, number: int, reply: Reply) -> None:
        """Takes a pull of one of its streams; never waits."""
        with self._host.state_lock:
            come = reading.arrivals.come(pull.caller, number, (pull.items, reply))
            self._add_pulls(reading, come)
        if not come:
            self._host.scheduler.add(GAP, False, lambda _: self._give_up_pull(reading, pull.caller, number))

    def _give_up_pull(self, reading: Reading, caller: str, number: int) -> None:
        with self._host.state_lock:
            self._add_pulls(reading, reading.arrivals.give_up(caller, number))

    def _add_pulls(self, reading: Reading, come: Sequence[tuple[int, Reply]]) -> None:
        reading.pulls.extend(come)
        if reading.pulls and not reading.is_served:
            reading.is_served = True
            self._turns.enter_later(partial(self._in_pool, self._serve, reading))

    def _serve(self, reading: Reading) -> None:
        """It is the stream's turn: makes items for its pulls, and lines up again while others wait."""
        clock = self._host.scheduler.clock
        until = clock() + TOGETHER
        answers = Answers()
        try:
            while reading.pulls and clock() < until:
                items, reply = reading.pulls.popleft()
                for left in reversed(range(items)):
                    here = self._host.readings.get(reading.call) is reading and self.state is State.RUNNING and self._host.may_run()
                    answered = reply(self._next(reading) if here else MOVED)
                    if answered is not None:
                        caller, number, answer = answered
                        answers.add(caller, number, answer)
                    if self._host.readings.get(reading.call) is not reading:
                        break
                    if left and (self._turns.wanted or clock() > until):
                        reading.pulls.appendleft((left, reply))
                        return
        finally:
            self._host.send_answers(answers)
            with self._host.state_lock:
                reading.is_served = False
                self._add_pulls(reading, ())
            self._turns.leave()

    # The end

    def _begin_end(self, reason: str) -> None:
        granted = self._granted
        self._turns.enter_later(partial(self._grant, partial(self._do, self._run_end, reason)))
        if granted is not None:
            self._host.run_first(granted)

    def _run_end(self, reason: str) -> None:
        try:
            self._end_in_turn(reason)
        finally:
            self._turns.leave()


class Once:
    """Work of a bird, to be done by whoever comes first."""

    __slots__ = ("_life", "_work")

    def __init__(self, life: LightLife, work: Work) -> None:
        self._life = life
        self._work = [work]

    def __call__(self) -> tuple[Caller, int, Answered] | None:
        try:
            work = self._work.pop()
        except IndexError:  # another thread was quicker
            return None
        if self._life._granted is self:
            self._life._granted = None
        return work()


class ManyCalls:
    """Calls of many birds that came together. One thread runs those it can at once; while it is held up by one, another goes on.

    Args:
        number: of the frame, for the answers.
    """

    def __init__(self, host: LightHost, caller: Caller, number: int, head: CallMany, body: memoryview) -> None:
        self._host, self._caller, self._number, self._lives = host, caller, number, head.lives
        self._heads = [Call(head.caller, _NO_DOT, method, head.chain, head.cast) for method in head.methods]
        self._calls = enumerate(decode_calls(body))
        self._lock = threading.Lock()  # guards what follows
        self._answers: list[tuple[int, bytes]] = []  # not sent yet
        self._size = 0  # of these
        self._begun: deque[Once] = deque()  # casts that are answered, and not run yet
        self._taken = self._seen = 0
        self._is_helped = False  # another thread will go on
        self._timer = host.scheduler.add(SLOW, True, self._look)

    def run(self) -> bytes | None:
        """Runs what is left. Returns the answers that are there; others are sent when they are."""
        for place, life, head, body in iter(self._take, None):
            answer = self._answer(place, life, head, body)
            if answer is None:
                continue
            with self._lock:
                full = self._pop_answers() if self._size + len(answer) > LONGEST else None
                self._answers.append((place, answer))
                self._size += len(answer)
            self._send(full)
        if self._begun:
            with self._lock:
                taken = self._pop_answers()
            self._send(taken)  # nobody waits for what he has cast
            while self._begun:
                with contextlib.suppress(IndexError):  # another thread was quicker
                    cast = self._begun.popleft()
                    self._taken += 1
                    cast()
        self._timer.cancelled = True
        self._host.recorder.clear()
        with self._lock:
            return self._pop_answers()

    def _pop_answers(self) -> bytes | None:
        answers, self._answers, self._size = self._answers, [], 0
        return encode_answers(answers) if answers else None

    def _take(self) -> tuple[int, HostedLife | None, Call, memoryview] | None:
        """The next call, for one thread."""
        with self._lock:
            place, call = next(self._calls, (0, None))
            self._taken += 1
            if call is None:
                return None
        life, method, counter, body = call
        return place, self._host.life_of(Dot(self._lives[life], counter)), self._heads[method], body

    def _answer(self, place: int, life: HostedLife | None, head: Call, body: memoryview) -> bytes | None:
        if isinstance(life, LightLife) and head.cast:
            answer = life.begin_cast(head)
            if not answer:
                self._begun.append(life.begun(head, body))
            return answer
        if isinstance(life, LightLife):
            response = life.take_one(head, place, body, self._caller, partial(self._late, place))
            return None if response is None else self._host.framed(response)
        if life is not None and head.cast:
            self._host.run_on_loop(life, head, place, body, self._caller, _to_nobody)
            return b""
        if life is not None:
            self._host.run_on_loop(life, head, place, body, self._caller, partial(self._late, place))
            return None
        return MOVED

    def _late(self, place: int, response: Response) -> tuple[Caller, int, bytes]:
        """What answers a call that had to wait for its turn."""
        return self._caller, self._number, encode_answers([(place, self._host.framed(response))])

    def _send(self, answers: bytes | None) -> None:
        if answers is not None:
            together = Answers()
            together.add(self._caller, self._number, answers)
            self._host.send_answers(together)

    def _look(self, timer: Entry) -> None:
        """If the thread that runs these calls is held up, sends what it has, and has another go on."""
        timer.pending = False
        with self._lock:
            held_up = self._taken == self._seen
            self._seen = self._taken
            answers = self._pop_answers() if held_up else None
            helps = held_up and not self._is_helped
            self._is_helped = self._is_helped or helps
        self._send(answers)
        if helps:
            self._host.run_soon(self._go_on)

    def _go_on(self) -> tuple[Caller, int, bytes] | None:
        self._is_helped = False
        answers = self.run()
        return None if answers is None else (self._caller, self._number, answers)


def _to_nobody(response: Response) -> None:
    """What a cast is answered."""


class LightAsyncLife(AsyncLife):
    """A light bird with `async def` methods."""

    __slots__ = ()
    _host: LightHost

    def _begin(self) -> None:
        self._spawn(self.hatch())

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        super()._spawn(self._host.recorded(self, work))


class LightHost(AsyncHost):
    """The host of light birds: lives come and go by orders, and the process stays."""

    sync_life: type[LightLife] = LightLife

    def __init__(self, boot: HostBoot, *args: Any, **kwargs: Any) -> None:
        super().__init__(boot, *args, **kwargs)
        self.recorder = self._new_recorder()
        self._kept: dict[tuple[Dot, int], HostedLife] = {}  # lives that are over, whose record or exit a nest still needs
        self._path: tuple[str, ...] = ()

    def _new_recorder(self) -> Recorder:
        return Recorder(self.boot.directory, self.pid)

    async def hatch(self, order: bytes) -> None:
        """Is ready for the orders to come."""
        del order
        self._begin_loop()
        label_output("light birds", "")
        self.listen(self.boot.threads, self._call_frame)
        if self._listener is None:  # callers come by Ray only; its threads run birds all the same
            self._make_listener(self.boot.threads, self._call_frame, None, None)

    # Threads

    def run_soon(self, work: Work) -> None:
        """Has something done in a thread of those that run birds. From any thread."""
        if self._listener is not None:
            self._listener.post(work)

    def run_first(self, work: Work) -> None:
        """Has something done before all that waits: what ends a bird must not wait for those that block."""
        if self._listener is not None:
            self._listener.post_first(work)

    def widen(self, slots: int) -> None:
        """So many more birds may run a method at a time."""
        if self._listener is not None:
            self._listener.widen(slots)

    # Orders

    def obey(self, head: Any) -> bytes:
        match head:
            case Orders():
                for order in head.orders:
                    try:
                        self.obey(order)
                    except Exception:
                        log.exception("a host could not obey %s; it goes on with the next order", type(order).__name__)
                        if isinstance(order, HatchOrder):
                            life = self._lives.get(order.dot)
                            if life is not None and life.order is order:
                                self._drop(life)
                            self.says(LifeCrashed(order.dot, order.born, "its host could not begin it; the host's log says why"))
            case HatchOrder():
                self._hatch(head)
            case EndAllOrder():
                for life in tuple(self._lives.values()):
                    self._end(EndOrder(life.dot, life.born, head.reason, False, head.timeout))
            case LeaveOrder():
                if not self._lives and not self._kept:
                    self._end_process_in(0.0)
            case _:
                return super().obey(head)
        return b""

    def _hatch(self, order: HatchOrder) -> None:
        if order.sys_path is not self._path:
            extend_path(order.sys_path)
            self._path = order.sys_path
        life = self.accept(order, partial(LightAsyncLife, loop=self._loop) if order.spec.is_async else self.sync_life)
        if isinstance(life, LightLife):
            life.begin()
        elif isinstance(life, LightAsyncLife):
            self._loop.call_soon_threadsafe(life._begin)

    def accept(self, head: HatchOrder | None, make: Callable[[HatchOrder, Any], HostedLife]) -> HostedLife | None:
        """The life to hatch; `None` if it must not be."""
        if head is None:
            return None
        with self._lock:
            before = self._lives.get(head.dot)
            if self._never and (head.dot, head.born) in self._never:
                return None
            if before is not None and before.state in ALIVE:
                self.says(LifeCrashed(head.dot, head.born, "an earlier life of it has not ended here"))
                return None
            if before is not None:
                self._kept[before.dot, before.born] = before
            life = self._lives[head.dot] = make(head, self)
        return life

    def _end(self, order: EndOrder) -> None:
        kept = self._kept.get((order.dot, order.born))
        if kept is not None:
            kept.end(order)  # says again how it ended
        else:
            super()._end(order)

    def _forget(self, dot: Dot) -> None:
        life = self._lives.get(dot)
        if life is not None and life.state in (State.RELEASED, State.EXITED):
            self._drop(life)
        for key in [key for key in tuple(self._kept) if key[0] == dot]:
            del self._kept[key]

    def _drop(self, life: HostedLife) -> None:
        with self._lock:
            if self._lives.get(life.dot) is life:
                del self._lives[life.dot]

    def over(self, life: HostedLife) -> None:
        """A life has ended: it goes, unless it keeps something that a nest must fetch or acknowledge."""
        if life.state is State.EXITED:
            self.scheduler.add(FORGOTTEN, False, lambda _: self._forget_exit(life))
        elif life.state is State.CRASHED or not life.has_record:
            self._drop(life)
            self._kept.pop((life.dot, life.born), None)

    def _forget_exit(self, life: HostedLife) -> None:
        self._drop(life)
        self._kept.pop((life.dot, life.born), None)

    def _held(self) -> list[HostedLife]:
        return [*self._kept.values(), *self._lives.values()]

    # Calls

    def _call_frame(self, caller: Caller, number: int, message: memoryview) -> Answered:
        head, order, body = decode_call(message)
        life: HostedLife | None
        if isinstance(head, CallMany):
            return ManyCalls(self, caller, number, head, body).run()
        if isinstance(head, Pull):
            reading = self.readings.get((head.caller, head.order))
            life = reading.life if reading is not None else None
            if reading is not None and isinstance(life, LightLife):
                life.take_pull(reading, head, order, partial(self._answer_on, caller, number, ""))
                return None
        else:
            life = self._lives.get(head.dot)
            if isinstance(life, LightLife):
                response = life.take(head, order, body, (), caller, partial(self._answer_on, caller, number, head.caller), True)
                return None if response is None else self.framed(response) if response else head.caller
        return MOVED if life is None else self._pass_on(caller, number, message, head, order, body)

    def _answer_on(self, caller: Caller, number: int, lane: str, response: Response) -> tuple[Caller, int, Answered]:
        """What answers a call that came by a connection."""
        return caller, number, self.framed(response) if response else lane

    async def call(self, message: bytes, extra: Sequence[Any]) -> Response:
        """As `AsyncHost.call`, for a bird of either kind."""
        head, order, body = decode_call(message)
        answer: asyncio.Future[Response] = self._loop.create_future()
        reply = partial(self._answer_by_ray, answer)
        if isinstance(head, Pull):
            reading = self.readings.get((head.caller, head.order))
            if reading is not None and isinstance(reading.life, LightLife):
                reading.life.take_pull(reading, head, order, reply)
                return await answer
        else:
            life = self._lives.get(head.dot)
            if isinstance(life, LightLife):
                response = life.take(head, order, body, extra, None, reply, False)
                return await answer if response is None else response
        return await super().call(message, extra)

    def _answer_by_ray(self, answer: asyncio.Future[Response], response: Response) -> None:
        self._loop.call_soon_threadsafe(_answer, answer, response)

    async def _run(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Response:
        life = self._lives.get(head.dot)
        if not isinstance(life, LightAsyncLife):
            return MOVED
        return await Recorded(self.recorder, life.dot, life.call(head, order, body, extra, connection))

    def run_on_loop(self, life: HostedLife, head: Call, place: int, body: memoryview, caller: Caller, reply: Reply) -> None:
        """Runs a call of a `CallMany` of a bird with `async def` methods."""
        self._loop.call_soon_threadsafe(lambda: self._track(self._run_one(life, head, place, body, caller, reply)))

    async def _run_one(self, life: HostedLife, head: Call, place: int, body: memoryview, caller: Caller, reply: Reply) -> None:
        if isinstance(life, LightAsyncLife):
            answered = reply(await Recorded(self.recorder, life.dot, life.call(head, place, body, (), caller, in_order=False)))
            if answered is not None and isinstance(answered[2], bytes):
                self._answer(answered[0], answered[1], answered[2])

    async def recorded(self, life: HostedLife, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs code of a bird on the loop: if the process dies in one of its steps, that is counted against it."""
        return await Recorded(self.recorder, life.dot, work)


def _answer(answer: asyncio.Future[Response], response: Response) -> None:
    if not answer.done():
        answer.set_result(response)
