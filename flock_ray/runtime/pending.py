"""A message on its way, which is also the future that users hold; and how an answer becomes a result or an error.

Rules kept here: whoever wants the result waits for the reply itself, on its own thread; no other thread takes part in a call that goes
well. Only who is told by a callback (`add_done_callback`, `concurrent.futures.wait`, `aio`) has the courier watch the reply. Results
are unpickled where they are asked for, never on a thread of flock_ray's or Ray's.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from flock_ray import errors
from flock_ray.core import wire
from flock_ray.runtime import payload
from flock_ray.runtime.links import Down, NoAnswer, Raw, Reply, answer_of
from flock_ray.specs import Dot, Name

if TYPE_CHECKING:
    from flock_ray.runtime.lanes import Lane

SLACK = 0.5  # seconds the courier may be late with its own, better informed timeout
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


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Pending(Future[Any]):
    """One message: the sender's future.

    Its own attributes are guarded by its lane's lock. `reply` is there once it has been sent; `order` is its place there; `fate` is what
    happened to it there, if that is not an answer: `"moved"`, or the `Down` of its link. Once it has `begun`, its lane has forgotten it.
    """

    def __init__(
        self,
        lane: Lane,
        dot: Dot | None,
        method: str,
        body: bytes,
        extra: Sequence[Any],
        *,
        chain: tuple[tuple[str, Name], ...] = (),
        in_chain: bool = False,
        cast: bool = False,
        retry: bool = False,
        deadline: float = FOREVER,
        timeout: float | Default | None = None,
        detached: bool = False,
    ) -> None:
        self.finished = False  # what `done` says, without taking a lock
        self._who_waits: list[Any] = []
        super().__init__()
        self.lane = lane
        self.id = lane.next_id()
        self.dot = dot
        self.method = method
        self.body = body
        self.extra = extra
        self.chain = chain
        self.in_chain = in_chain
        self.cast = cast
        self.retry = retry
        self.deadline = deadline
        self.timeout = timeout
        self.detached = detached
        self.begun = False
        self.waited_in: tuple[tuple[str, Name], ...] = ()  # the chain of who waits for a future
        self.reply: Reply | None = None
        self.order = -1
        self.fate: str | Down | None = None
        self.waits_without_deadline = False
        self.to_be_watched = False  # once it is sent (again)
        self._armed = False
        self._timer: asyncio.TimerHandle | None = None
        self._opened: Opened | None = None
        self._value: tuple[Any, BaseException | None] | None = None

    @property
    def again(self) -> bool:
        """May it be sent again, after what happened to it?"""
        return self.retry or self.fate == "moved" or (isinstance(self.fate, Down) and not self.fate.ran)

    # What users call

    def result(self, timeout: float | None = None) -> Any:
        """The method's result.

        Args:
            timeout: seconds to wait here; the message's own timeout goes on regardless.

        Raises:
            TimeoutError: `timeout` has passed; ask again.
            Exception: as `flock_ray.call`.
        """
        self._wait(timeout)
        return self.value()

    @property
    def seconds(self) -> str:
        """Its timeout, for messages."""
        return f"{self.timeout:g} s" if isinstance(self.timeout, int | float) else "its time"

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or `None`."""
        try:
            self._wait(timeout)
        except TimeoutError:
            if not self.finished:
                raise
        try:
            self.value()
        except CancelledError:
            raise
        except BaseException as error:  # it is the answer
            return error
        return None

    def cancel(self) -> bool:
        """Takes the message back if its method has not begun; a running `async def` method is cancelled, any other runs to its end.

        Returns:
            False if there is a result already. True says that none will come, not that the method has not run.
        """
        if not super().cancel():
            return False
        self.finished = True
        self.set_running_or_notify_cancel()
        self.lane.abandon(self)
        return True

    def done(self) -> bool:
        """Is there a result?"""
        if not super().done():
            self.arm()
        return super().done()  # `finished` comes a moment later

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Has `fn(self)` called, in some thread, once there is a result."""
        super().add_done_callback(lambda future: self.lane.client.courier.run_callback(fn, future))  # an error in it is logged
        self.arm()

    @property
    def _waiters(self) -> list[Any]:
        # concurrent.futures.wait and as_completed wait by adding to this list of the base class, and by nothing else
        if not self.finished:
            self.arm()
        return self._who_waits

    @_waiters.setter
    def _waiters(self, waiters: list[Any]) -> None:
        self._who_waits = waiters

    # What the lane and the courier call

    def answered(self, opened: Opened) -> None:
        self._armed = True  # else the base class, which looks for waiters now, would have it armed
        try:
            self.set_result(opened)
        except InvalidStateError:  # cancelled or timed out just now
            return
        self.finished = True

    def answered_here(self, opened: Opened) -> None:
        """The same on the only thread that waits: nobody has to be told, which is a tenth of what a call costs here (measured)."""
        if self._armed or self.detached:
            self.answered(opened)
        else:
            self._opened = opened
            self.finished = True

    def fail(self, error: BaseException) -> None:
        self._armed = True
        try:
            self.set_exception(error)
        except InvalidStateError:
            return
        self.finished = True

    def expire(self) -> None:
        """Its time is over."""
        if self.finished:
            return
        self.lane.abandon(self)
        name, sent = self.lane.name, self.reply is not None
        more = "its method may still run, or run later" if sent else "it was not sent; flock_ray.info(name) says what state the bird is in"
        self.fail(errors.CallTimeout(f"no answer from {self.method!r} of bird {name!r} within {self.seconds}; {more}", name))

    def arm(self) -> None:
        """Has the courier watch the reply and the deadline."""
        if self._armed:
            return
        self._armed = True
        reply = self.lane.reply_or_watch(self)
        if reply is not None:
            self.watch(reply)
        if self.deadline != FOREVER:
            self.lane.client.courier.post(self.set_timer)

    def watch(self, reply: Reply) -> None:
        """Has the courier settle it when the reply is there."""
        post = self.lane.client.courier.post
        reply.on_done(lambda: post(self.lane.take, self, reply))

    def value(self) -> Any:
        """What there is, which must be there; unpickled here and once."""
        if self._value is None:
            opened = self._opened or super().result(0)
            try:
                self._value = (value_of(opened, self.lane.name, self.method), None)
            except BaseException as error:  # it is the answer
                self._value = (None, error)
        result, error_or_none = self._value
        if error_or_none is not None:
            raise error_or_none
        return result

    async def wait_async(self) -> Any:
        """The result, on any event loop. To cancel it takes the message back."""
        try:
            await self._wait_async()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.value()

    async def _wait_async(self) -> None:
        reply = self.reply
        if reply is not None and self.fate is None and not self._armed and not self.finished:
            try:
                raw = await answer_of(reply, None if self.deadline == FOREVER else max(0.0, self.deadline - time.monotonic()))
                self.lane.settle(self, reply, open_raw(raw), here=True)
            except NoAnswer:
                self.expire()
            except Exception as error:  # `Down`; or an argument's task failed
                self.lane.settle(self, reply, error)
        if self.finished:
            return
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_set, woken)

        super().add_done_callback(wake)
        self.arm()
        await woken

    def set_timer(self) -> None:
        """Has it expire at its deadline, for those who do not wait themselves. On the courier."""
        if not self.finished and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self.deadline - time.monotonic()) + SLACK, self.expire)
            super().add_done_callback(lambda _: self.lane.client.courier.post(self._timer.cancel) if self._timer else None)

    def _wait(self, timeout: float | None) -> None:
        until = self.deadline if timeout is None else min(self.deadline, time.monotonic() + timeout)
        if self.detached and not self.finished:
            self.lane.client.check_waiting(self)
        if self.reply is not None and not self._armed:
            self._wait_here(self.reply, until)
        while not self.finished:
            reply = self.lane.reply_or_watch(self)
            if reply is None or self._armed:
                self._wait_for_courier(until)
                return
            self._wait_here(reply, until)

    def _wait_here(self, reply: Reply, until: float) -> None:
        """Waits for the reply on this thread. What has no answer then is with the courier."""
        if self.fate is not None or self.finished:
            return
        try:
            raw = reply.get(None if until == FOREVER else max(0.0, until - time.monotonic()))
            self.lane.settle(self, reply, open_raw(raw), here=True)
        except NoAnswer:
            if until < self.deadline:
                raise TimeoutError(f"no result of {self.method!r} of bird {self.lane.name!r} in the time it was waited for") from None
            self.expire()
        except Exception as error:  # `Down`; or an argument's task failed
            self.lane.settle(self, reply, error)

    def _wait_for_courier(self, until: float) -> None:
        late = SLACK if until == self.deadline else 0.0
        try:
            super().exception(None if until == FOREVER else max(0.0, until + late - time.monotonic()))
        except CancelledError:
            return  # `value` raises it
        except TimeoutError:
            if until < self.deadline:
                raise
            self.expire()
