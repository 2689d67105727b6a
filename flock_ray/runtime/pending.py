"""A message on its way, the future of it that users may hold, and how an answer becomes a result or an error.

Rules kept here: whoever wants the result waits for the reply itself, on its own thread; no other thread takes part in a call that goes
well. Only who is told by a callback (`add_done_callback`, `concurrent.futures.wait`, `aio`) has the courier watch the reply. Results
are unpickled where they are asked for, never on a thread of flock_ray's or Ray's.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from flock_ray import errors
from flock_ray.core import wire
from flock_ray.runtime import inside, payload
from flock_ray.runtime.deadlines import SLACK
from flock_ray.runtime.links import Link, Way
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, Several, also
from flock_ray.specs import Dot, Name

if TYPE_CHECKING:
    from flock_ray.runtime.lanes import Lane


FOREVER = float("inf")


class Default(Enum):
    """A timeout that was not given: the flock's `call_timeout`."""

    TIMEOUT = "call_timeout"


_PLAIN = wire.Answer("result")


class Opened(NamedTuple):
    """An answer whose head was read."""

    answer: wire.Answer
    body: bytes | memoryview
    extra: Sequence[Any]


def open_raw(raw: Raw) -> Opened:
    """Reads the head of an answer. Casts may be answered by nothing at all."""
    message, extra = raw
    if message.startswith(wire.RESULT):
        return Opened(_PLAIN, memoryview(message)[len(wire.RESULT) :], extra)
    if not message:
        return Opened(_PLAIN, b"", ())
    answer, body = wire.decode(raw.message)
    return Opened(answer, body, raw.extra)


def value_of(opened: Opened, name: Name, method: str) -> Any:
    """The result in an answer, or its error raised.

    Raises:
        Exception: what the method raised, of its own type and with the remote traceback as its cause, where it can be unpickled here.
        RemoteError: what it raised, or its result, cannot be unpickled here.
        FlockError: the host refused the message; also built-in exceptions, such as `AttributeError` for an unknown method.
    """
    answer, body, extra = opened
    if answer.kind == "result":
        if not body:
            return None
        try:
            return payload.unpack(body, extra)
        except Exception as error:
            text = f"the result of {method!r} of bird {name!r} cannot be unpickled here ({type(error).__name__}: {error})"
            raise errors.RemoteError(text, name) from error
    if answer.kind == "raised":
        raise _remote_exception(opened, name)
    raise named_error(answer.error, answer.text, name)


def _remote_exception(opened: Opened, name: Name) -> BaseException:
    answer, body, extra = opened
    try:
        error = payload.unpack(body, extra)
    except Exception:  # whatever its class does when it is unpickled
        error = None
    if not isinstance(error, BaseException):
        return errors.RemoteError(answer.text, name)
    error.__cause__ = errors.RemoteError(answer.text, name)
    return error


def named_error(error: str, text: str, name: Name, detail: str = "") -> BaseException:
    """An error by the name of its class in `flock_ray.errors` or among the built-ins; `detail` is the bird's last error."""
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, errors.FlockError):
        if detail and kind is errors.BirdCrashed:
            text = f"{text}:\n{detail}"
        made: BaseException = kind(text, name)
    else:
        built_in = getattr(builtins, error, None)
        if isinstance(built_in, type) and issubclass(built_in, Exception):
            made = built_in(text)
        else:
            made = errors.RemoteError(f"{error}: {text}", name)
    if detail:
        made.__cause__ = errors.RemoteError(detail, name)
    return made


class Pending:
    """One message on its way.

    All is guarded by its lane's lock. `reply` is there once it has been sent; `order` is its place there; `fate` is what happened to it
    there, if that is not an answer: `"moved"`, `"full"`, or the `Down` of its link. Once it has `begun`, its lane has forgotten it.
    """

    __slots__ = (
        "_teller", "begun", "body", "called_at", "caller", "cast", "chain", "deadline", "detached", "dot", "due_with", "extra", "fate",
        "finished", "in_chain", "is_watched", "lane", "method", "order", "outcome", "reply", "retry", "stream", "timeout", "to_be_watched",
        "waited_in", "waits_without_deadline", "way",
    )  # fmt: skip

    def __init__(
        self,
        lane: Lane,
        dot: Dot | None,
        method: str,
        body: bytes,
        extra: Sequence[Any],
        chain: tuple[tuple[str, Name], ...],
        timeout: float | Default | None,
        retry: bool,
    ) -> None:
        self.lane = lane
        self.dot = dot
        self.method = method
        self.body = body
        self.extra = extra
        self.chain = chain
        self.timeout = timeout
        self.retry = retry
        self.cast = False
        self.stream = False
        self.detached = False  # a future's: its sender does not wait
        self.in_chain = False
        self.deadline = FOREVER
        self.called_at = 0.0  # when, on `time.perf_counter`, if the time until its answer is to be noted
        self.waits_without_deadline = False
        self.due_with: set[Pending] | None = None  # those that expire at the same time
        self.begun = False
        self.finished = False
        self.outcome: Opened | BaseException | None = None
        self.reply: Reply | None = None
        self.way: Way | None = None
        self.caller = ""
        self.order = -1
        self.fate: str | Down | None = None
        self.waited_in: tuple[tuple[str, Name], ...] = ()  # the chain of who waits for a future
        self.to_be_watched = False  # once it is sent (again)
        self.is_watched = False  # somebody wants to be told
        self._teller: Callable[[], object] | None = None

    @property
    def link(self) -> Link | None:
        return None if self.way is None else self.way.link

    def withdraw(self) -> None:
        """Has its host forget it, or close the stream that it has opened. It is only a favour."""
        if self.way is not None:
            with contextlib.suppress(Exception):
                self.way.link.control(wire.encode(wire.Withdraw(self.caller, self.order, self.way.route.dot)))

    @property
    def again(self) -> bool:
        """May it be sent again, after what happened to it?"""
        return self.retry or self.fate in ("moved", "full") or (isinstance(self.fate, Down) and not self.fate.ran)

    @property
    def seconds(self) -> str:
        """Its timeout, for messages."""
        return f"{self.timeout:g} s" if isinstance(self.timeout, int | float) else "its time"

    # Its end

    def finish(self, outcome: Opened | BaseException) -> None:
        """The first outcome counts."""
        with self.lane.lock:
            if self.finished:
                return
            self.outcome, self.finished = outcome, True
            teller, self._teller = self._teller, None
        if self.due_with is not None:
            self.due_with.discard(self)
        if teller is not None:
            teller()
        if self.called_at and self.way is not None and isinstance(outcome, Opened):
            self.lane.client.metrics.note(self.way.link.path, time.perf_counter() - self.called_at)

    def when_finished(self, teller: Callable[[], object]) -> None:
        """Has this called, in some thread where it must not block, once there is an outcome."""
        with self.lane.lock:
            if not self.finished:
                self._teller = also(self._teller, teller)
                return
        teller()

    def _tell_no_more(self, teller: Callable[[], object]) -> None:
        with self.lane.lock:
            if self._teller == teller:
                self._teller = None
            elif isinstance(self._teller, Several):
                with contextlib.suppress(ValueError):
                    self._teller.remove(teller)

    def expire(self) -> None:
        """Its time is over."""
        if self.finished:
            return
        self.lane.abandon(self)
        name = self.lane.name
        if self.fate == "full":
            text = f"the mailbox of bird {name!r} was full for {self.seconds}: {self.method!r} has not run; slow down, or start more birds"
            self.finish(errors.MailboxFull(text, name))
            return
        more = "its method may still run, or run later"
        if self.reply is None:
            more = "it was not sent; flock_ray.info(name) says what state the bird is in"
        self.finish(errors.CallTimeout(f"no answer from {self.method!r} of bird {name!r} within {self.seconds}; {more}", name))

    def value(self) -> Any:
        """The result, or the error raised; unpickled here."""
        outcome = self.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return value_of(outcome or Opened(_PLAIN, b"", ()), self.lane.name, self.method)

    # Waiting on this thread

    def wait(self, until: float) -> bool:
        """Waits on this thread, until it has an outcome or a time has come."""
        with inside.waiting():
            return self._wait(until)

    def _wait(self, until: float) -> bool:
        if self.reply is not None and not self.is_watched:
            self._wait_here(until)
        while not self.finished and self.lane.client.clock() < until:
            reply = self.lane.reply_or_watch(self)
            if reply is None or self.is_watched:
                self._wait_to_be_told(until)
            else:
                self._wait_here(until)
        if not self.finished and until >= self.deadline:
            self.expire()
        return self.finished

    def _wait_here(self, until: float) -> None:
        reply = self.reply
        if self.fate is not None or self.finished or reply is None:
            return
        try:
            self.lane.settle(self, reply, open_raw(reply.get(None if until == FOREVER else max(0.0, until - self.lane.client.clock()))))
        except NoAnswer:
            return
        except Exception as error:  # `Down`; or an argument's task failed
            self.lane.settle(self, reply, error)

    def _wait_to_be_told(self, until: float) -> None:
        """For what is with the courier."""
        late = SLACK if until == self.deadline else 0.0  # its own timeout says more
        client = self.lane.client
        gate = client.courier.gate()
        self.when_finished(gate.release)
        if not gate.acquire(timeout=-1 if until == FOREVER else max(0.0, until + late - client.clock())):
            self._tell_no_more(gate.release)

    # Being watched

    def arm(self, teller: Callable[[], object]) -> None:
        """Has the reply and the deadline watched, and `teller` called at the end."""
        self.when_finished(teller)
        if self.is_watched:
            return
        self.is_watched = True
        reply = self.lane.reply_or_watch(self)
        if reply is not None:
            self.watch(reply)
        if self.deadline != FOREVER:
            self.lane.client.courier.post(self.set_timer)

    def watch(self, reply: Reply, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Has it settled when the reply is there."""
        self.is_watched = True
        reply.on_done(self.answered, loop)

    def answered(self, reply: Reply) -> None:
        """A reply is there: this message's, or one that it has had."""
        self.lane.take(self, reply)

    def set_timer(self) -> None:
        """Has it expire at its deadline, for those who do not wait themselves. On the courier."""
        if not self.finished:
            self.lane.client.deadlines.add(self, asyncio.get_running_loop())

    # Waiting on an event loop

    async def wait_async(self) -> Any:
        """The result, on any event loop. To cancel it takes the message back."""
        if not self.finished:
            try:
                await self.told_to(asyncio.get_running_loop())
            except asyncio.CancelledError:
                self.take_back()
                raise
        return self.value()

    def told_to(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """What the event loop, which runs now, has to wait for."""
        woken = loop.create_future()
        self.when_finished(_Sleeper(loop, woken))
        reply = self.lane.reply_or_watch(self)
        if reply is not None:
            self.watch(reply, loop)
        self.lane.client.deadlines.add(self, loop)
        return woken

    def take_back(self) -> None:
        """Nobody wants the outcome."""
        self.lane.abandon(self)
        self.finish(CancelledError())


class _Sleeper:
    """A coroutine that waits, on the event loop which runs now; to call it wakes it, from any thread."""

    __slots__ = ("_loop", "_thread", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._woken = woken

    def __call__(self) -> None:
        if threading.get_ident() == self._thread:
            self._wake()
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)


_OF_THE_BASE = ("_condition", "_state", "_result", "_exception", "_done_callbacks", "_who_waits")
_making = threading.RLock()


class CallFuture(Future[Any]):
    """What users hold of a message that was sent by `future`.

    Who only asks for its result needs nothing of what the base class keeps to tell others, a lock and four containers. That is made when it
    is asked for: it is a fifth of what a future costs, and with 1,000 of them under way the garbage collector found it too (measured).
    """

    _armed = False
    _told = False

    def __init__(self, message: Pending) -> None:
        self._message = message
        self._value: tuple[Any, BaseException | None] | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_THE_BASE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with _making:
            if "_condition" not in self.__dict__:
                self._who_waits: list[Any] = []
                super().__init__()
        return self.__dict__[name]

    def result(self, timeout: float | None = None) -> Any:
        """The method's result.

        Args:
            timeout: seconds to wait here; the message's own timeout goes on regardless.

        Raises:
            TimeoutError: `timeout` has passed; ask again.
            Exception: as `flock_ray.call`.
        """
        self._wait(timeout)
        value, error = self._outcome()
        if error is not None:
            raise error
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or `None`."""
        self._wait(timeout)
        error = self._outcome()[1]
        if isinstance(error, CancelledError):
            raise error
        return error

    def _wait(self, timeout: float | None) -> None:
        message, client = self._message, self._message.lane.client
        if message.finished:
            return
        client.check_waiting(message)
        if not message.wait(message.deadline if timeout is None else min(message.deadline, client.clock() + timeout)):
            raise TimeoutError(f"no result of {message.method!r} of bird {message.lane.name!r} in the time it was waited for")

    def _outcome(self) -> tuple[Any, BaseException | None]:
        """Unpickled here and once."""
        if self._value is None:
            try:
                self._value = (self._message.value(), None)
            except BaseException as error:  # it is the answer
                self._value = (None, error)
        return self._value

    def cancel(self) -> bool:
        """Takes the message back if its method has not begun; a running `async def` method is cancelled, any other runs to its end.

        Returns:
            False if there is a result already. True says that none will come, not that the method has not run.
        """
        if self._message.finished:
            return super().cancelled()
        self._message.take_back()
        self._settle()
        return super().cancelled()

    def done(self) -> bool:
        """Is there a result?"""
        if not self._message.finished:
            self._arm()
        return self._message.finished

    def cancelled(self) -> bool:
        """Was it cancelled?"""
        return isinstance(self._message.outcome, CancelledError)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Has `fn(self)` called, in some thread, once there is a result."""
        courier = self._message.lane.client.courier
        super().add_done_callback(lambda future: courier.run_callback(fn, future))  # an error in it is logged
        self._arm()

    @property
    def _waiters(self) -> list[Any]:
        # concurrent.futures.wait and as_completed wait by adding to this list of the base class, and by nothing else. What is there
        # already is told afterwards, when they have added.
        if not self._armed:
            self._message.lane.client.courier.post(self._arm)
        return self._who_waits

    @_waiters.setter
    def _waiters(self, waiters: list[Any]) -> None:
        """The base class would begin with an empty list, which is there."""

    def _arm(self) -> None:
        """From here on somebody wants to be told."""
        if not self._armed:
            self._armed = True
            self._message.arm(self._settle)

    def _settle(self) -> None:
        """Tells those who wait by the means of the base class."""
        with _making:
            if self._told:
                return
            self._told = self._armed = True  # else the base class, which looks for waiters now, would have it armed
        if not isinstance(self._message.outcome, CancelledError):
            self.set_result(None)  # `result` unpickles it where it is asked for
        elif super().cancel():
            self.set_running_or_notify_cancel()
