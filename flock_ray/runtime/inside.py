"""What a bird's own code sees of the flock: who it is, messages to itself, and the way out.

Rules kept here: what runs inside is known by a context variable, so it is right in coroutines, and in threads that copy the context;
a call's chain goes with it (C4). Outside a bird everything here that acts raises `RuntimeError`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from flock_ray.runtime.timers import Entry
from flock_ray.specs import Name


@dataclass(frozen=True, slots=True)
class Me:
    """The bird whose code runs: `incarnation` tells its lives apart and grows."""

    name: Any
    node_id: str
    incarnation: int


class Timer:
    """A message to oneself that is not due yet. It dies with the life that set it."""

    __slots__ = ("_entry",)

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def cancel(self) -> None:
        """Takes the message back; one whose method runs already is not stopped."""
        self._entry.cancelled = True


class LifeHere(Protocol):
    """What of a life this module needs."""

    flock: str
    name: Name
    incarnation: int

    @property
    def node_id(self) -> str: ...

    def waiting(self) -> AbstractContextManager[None]: ...

    def send(self, seconds: float, every: bool, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry: ...


class Inside:
    """Whose code runs, in which method, and the birds that wait for it, outermost first, itself last.

    Nobody waits any more once the method has ended: tasks that it began inherit this, and set out with an empty chain.
    """

    __slots__ = ("_token", "_under_way", "began", "chain", "is_async", "life", "method", "task", "thread")

    def __init__(self, life: LifeHere, chain: tuple[tuple[str, Name], ...], is_async: bool = False, method: str = "") -> None:
        self.life = life
        self.chain = chain
        self.is_async = is_async
        self.method = method
        self.thread = threading.get_ident()
        self.began = time.monotonic()
        self.task: asyncio.Task[Any] | None = None  # whose coroutine it is

    def begin(self, under_way: set[Inside]) -> None:
        """What runs here is this, until `end`. `under_way` has all that runs in this process (`stacks.py`)."""
        self._under_way = under_way
        under_way.add(self)
        self._token: Token[Inside | None] = current.set(self)

    def end(self) -> None:
        self.chain = ()  # nobody waits for what it began
        self._under_way.discard(self)
        current.reset(self._token)


class Leave(BaseException):
    """Unwinds the method that called `leave`. No `Exception`, lest the bird's own handlers stop it."""

    def __init__(self, reason: str, reply: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply


current: ContextVar[Inside | None] = ContextVar("flock_ray_inside", default=None)


def me() -> Me:
    """The bird whose method runs.

    Raises:
        RuntimeError: called outside a bird.
    """
    life = _here("me").life
    return Me(life.name, life.node_id, life.incarnation)


def send_after(seconds: float, method: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Timer:
    """Sends this bird a message: `method(*args, **kwargs)` takes its turn among the other messages, `seconds` from now at the earliest.

    Args:
        seconds: 0 or more.
        method: its name, or the method (`self.tick`, `Counter.tick`); a private one may be named.
        args, kwargs: copied now.

    Returns:
        A `Timer` with `cancel()`. It dies with this life of the bird: moved or restarted, a bird sets its timers anew in `__init__`.

    Raises:
        AttributeError: there is no such method.
        RuntimeError: called outside a bird.
        TypeError: the arguments cannot be pickled; or `seconds` is no number, or `method` no method.
        ValueError: `seconds` is negative or not finite.
    """
    return _send("send_after", seconds, False, method, args, kwargs)


def send_every(seconds: float, method: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Timer:
    """Sends this bird the same message every `seconds` (more than 0), first `seconds` from now.

    At most one waits for its turn: a bird that is busy for longer misses ticks. Otherwise as `send_after`.
    """
    return _send("send_every", seconds, True, method, args, kwargs)


def leave(reason: str = "normal", reply: object = None) -> NoReturn:
    """Ends this life of the bird; the rest of the method is not run.

    Args:
        reason: `"normal"`: `on_stop("normal")` is run and the bird is gone (with `restart="permanent"` it is started again). Any other
            text is a crash with that text as its error.
        reply: what the caller of the running method gets.

    Raises:
        RuntimeError: called outside a bird, or in another thread than its method's.
        TypeError: `reason` is no str.
    """
    if not isinstance(reason, str):
        raise TypeError(f"leave: reason must be a str, not {type(reason).__name__}: {reason!r}")
    if _here("leave").thread != threading.get_ident():
        raise RuntimeError("flock_ray.leave() must be called in the thread in which the bird's method runs")
    raise Leave(reason, reply)


def current_chain() -> tuple[tuple[str, Name], ...]:
    """The birds that wait for the code that runs, outermost first, its own last, as (flock, name); empty outside a bird."""
    inside = current.get()
    return inside.chain if inside is not None else ()


def cycle_text(chain: tuple[tuple[str, Name], ...], me: tuple[str, Name]) -> str:
    """What `CallCycle` says of a call to a bird, (flock, name), that waits for it."""
    birds = " -> ".join(repr(name) for _, name in (*chain, me))
    return f"the call would wait for itself: {birds}; use cast, or make the methods of {me[1]!r} async def"


def waiting() -> AbstractContextManager[None]:
    """While this thread waits for something of flock_ray's: a bird that does so has no use of its thread."""
    inside = current.get()
    return nullcontext() if inside is None else inside.life.waiting()


def current_flock() -> str | None:
    """The flock of the bird whose code runs; `None` outside a bird."""
    inside = current.get()
    return inside.life.flock if inside is not None else None


def in_async_method() -> bool:
    """Does this code run in a method of a bird with `async def` methods, on its loop, where a blocking call would stop the whole bird?"""
    inside = current.get()
    return inside is not None and inside.is_async and asyncio._get_running_loop() is not None


def _here(what: str) -> Inside:
    inside = current.get()
    if inside is None:
        raise RuntimeError(f"flock_ray.{what}() was called outside a bird: it works only in a bird's methods")
    return inside


def _send(what: str, seconds: float, every: bool, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Timer:
    life = _here(what).life
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what}: seconds must be a number, not {type(seconds).__name__}: {seconds!r}")
    if not (seconds > 0 if every else seconds >= 0) or seconds == float("inf"):
        raise ValueError(f"{what}: seconds must be finite and {'more than' if every else 'at least'} 0, not {seconds!r}")
    name = method if isinstance(method, str) else getattr(method, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"{what}: a method is given by its name or as self.method, not as {type(method).__name__}: {method!r}")
    return Timer(life.send(seconds, every, name, args, kwargs))
