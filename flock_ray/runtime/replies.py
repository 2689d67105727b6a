"""What becomes of a message that a link has taken: an answer, later, or what is known if none comes.

A host imports this and the sockets, but not Ray's side of links: it is a new process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol


class Raw(NamedTuple):
    """An answer as it came: the message, and what came beside it."""

    message: bytes
    extra: Sequence[Any] = ()


class Urgency(Enum):
    """When a message has to leave."""

    NOW = "its answer is waited for"
    SOON = "nobody waits: it may leave together with what follows"
    WITH_LOOP = "as `SOON`, and the event loop that sends it will wait for its answer by `Reply.on_done`"


class Down(Exception):  # it says what is so, and never reaches a user
    """The receiver has gone away. `ran` is False if the message certainly did not run."""

    def __init__(self, text: str, ran: bool) -> None:
        super().__init__(text)
        self.ran = ran


class NoAnswer(Exception):  # as above
    """There is no answer yet."""


class Reply(Protocol):
    """The answer to one message, when it is there."""

    @property
    def done(self) -> bool:
        """Is it known that `get` would return at once?"""
        ...

    def get(self, timeout: float | None) -> Raw:
        """Waits for it. Raises `Down`, `NoAnswer` when `timeout` seconds have passed, or what kept an argument from coming."""
        ...

    def on_done(self, callback: Callable[[Reply], object], loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Has `callback(self)` called, in some thread where it must not block, once `get` would return at once.

        Args:
            loop: runs now, and will wait; where it can, it looks for the answer itself.
        """
        ...

    def tell(self, callback: Callable[[Reply], object]) -> None:
        """Has `callback` called as `on_done`, but only if the answer happens to be read. For casts, of which not all are answered; where
        all are, it may do nothing.
        """
        ...

    def forget(self) -> None:
        """It is known by a later answer what this one would say."""
        ...


class Several(list[Callable[..., object]]):
    """Callbacks, called one after the other."""

    def __call__(self, *args: object) -> None:
        for callback in self:
            callback(*args)


def also(first: Callable[..., object] | None, second: Callable[..., object]) -> Callable[..., object]:
    """Both, in this order; most have just one."""
    if first is None:
        return second
    if not isinstance(first, Several):
        return Several((first, second))
    first.append(second)
    return first


async def answer_of(reply: Reply, timeout: float | None) -> Raw:
    """Waits for a reply on any event loop. Raises as `Reply.get`."""
    loop = asyncio.get_running_loop()
    there = loop.create_future()

    def done(_: Reply) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_wake, there)

    reply.on_done(done, loop)
    timer = loop.call_later(timeout, _wake, there) if timeout is not None else None
    try:
        await there
    finally:
        if timer is not None:
            timer.cancel()
    return reply.get(0)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
