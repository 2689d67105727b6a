"""One life of a bird in this process: hatched, called, ended. What sync (`life_sync.py`) and async birds (`life_async.py`) have in common.

    STARTING --> RUNNING --> ENDING --> RELEASED (in good order, asked by the nest) or EXITED (left of itself)
        \\___________\\__________\\____> CRASHED

Rules kept here: a state is never left for an earlier one, and only `RUNNING` runs calls: every other answers "moved", so that a caller
that was turned away once is turned away for good; the end of a life takes its turn as a message does, and so comes after the method
that runs and before those that wait, which find the state changed; a bird's own mistakes (a method that raises, a result that cannot
be pickled, an `on_stop` that fails) never reach the code around it.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import logging
import pickle
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from flock_ray.core.wire import (
    END,
    ITEM,
    RESULT,
    Answer,
    Call,
    EndOrder,
    HatchOrder,
    LifeBegins,
    LifeCrashed,
    LifeEnded,
    LifeExited,
    LifeReport,
    LifeRunning,
    Pull,
    decode,
    encode,
)
from flock_ray.runtime.generators import Reading, Readings
from flock_ray.runtime.inside import Inside, Leave
from flock_ray.runtime.payload import pack, pack_alone, pack_plain, unpack
from flock_ray.specs import Life

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flock_ray.runtime.listener import Caller
    from flock_ray.runtime.mailbox import Lock
    from flock_ray.runtime.timers import Entry, Scheduler

log = logging.getLogger("flock_ray.bird")

REMEMBERED = 10_000  # withdrawn calls that have not come to their turn, and callers who were told that there is no room

MOVED = encode(Answer("moved"))
FULL = encode(Answer("full"))

ORDINARY = (Exception, asyncio.CancelledError)  # what a method may raise and live on; SystemExit and the like are a crash

Response = bytes | tuple[Any, ...]


class State(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    RELEASED = "released"
    EXITED = "exited"
    CRASHED = "crashed"


ALIVE = (State.STARTING, State.RUNNING, State.ENDING)


class Surroundings(Protocol):
    """The host, as its lives see it."""

    host: str
    node_id: str
    scheduler: Scheduler
    readings: Readings
    under_way: set[Inside]  # what runs
    ran: int  # methods, so far
    raised: int  # of these, those that have raised
    state_lock: Lock  # guards changes of a life's state

    def loaded(self, order: HatchOrder) -> Loaded:
        """The class of a bird to be hatched; raises what its pickle does."""

    @property
    def nest(self) -> Life: ...

    @property
    def address(self) -> str:
        """Where the host listens, besides Ray."""

    def awaited(self) -> bool:
        """Does another call wait for its turn?"""

    def occupied(self) -> bool:
        """Does a call that came by a socket wait, or run?"""

    def queued(self) -> int:
        """How many messages that came by a socket have not been taken by any thread yet."""

    def may_run(self) -> bool:
        """False: this process is over, nothing must run."""

    def says(self, word: object) -> None:
        """Has it delivered to the nest."""

    def over(self, life: HostedLife) -> None:
        """The life has ended, and the nest is being told."""


class Loaded:
    """A class as it was unpickled here, for all its birds in this process."""

    __slots__ = ("__weakref__", "allowed", "cls", "is_async")

    def __init__(self, code: bytes) -> None:
        self.cls = load_class(code)
        self.is_async = is_async(self.cls)
        self.allowed: set[tuple[str, bool]] = set()  # methods that were found to be callable, or readable as a stream


def load_class(code: bytes) -> type:
    """The class from its pickle; of a `@ray.remote` class the class that was decorated."""
    cls = pickle.loads(code)
    metadata = getattr(cls, "__ray_metadata__", None)
    if metadata is not None:
        modified = metadata.modified_class
        cls = getattr(modified, "__ray_actor_class__", modified)
    return cls  # type: ignore[no-any-return]  # a pickle of a class, made by `start`


def is_async(cls: type) -> bool:
    """Does the class have an `async def` method? Then its birds interleave and may be called back (C4), and need an `AsyncHostActor`."""
    members = (getattr(cls, name, None) for name in dir(cls))
    return any(inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member) for member in members)


def describe(error: BaseException) -> str:
    """The traceback of what a bird's code raised, without our own frames before it. Its last line is `Type: message`."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(__name__):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def refusal(text: str, error: str) -> bytes:
    return encode(Answer("refused", text, error))


class HostedLife:
    """What sync and async birds have in common. There may be a hundred thousand in a process: what most never need is made when it is."""

    __slots__ = (
        "__weakref__", "_crashes", "_end", "_handed_over", "_host", "_link", "_loaded", "_refused", "_withdrawn", "bird", "born", "dot",
        "error", "flock", "incarnation", "name", "order", "state",
    )  # fmt: skip

    def __init__(self, order: HatchOrder, host: Surroundings) -> None:
        self.order = order
        self.flock = order.flock
        self.name = order.name
        self.dot = order.dot
        self.born = order.born
        self.incarnation = order.born
        self.state = State.STARTING
        self.error = ""
        self.bird: Any = None
        self._loaded: Loaded | None = None
        self._host = host
        self._link = (order.flock, order.name)
        self._crashes = order.spec.options.on_error == "crash"
        self._withdrawn: OrderedDict[tuple[str, int], None] | None = None
        self._refused: OrderedDict[str, int] | None = None  # from which of a caller's messages on there was no room
        self._end: EndOrder | None = None
        self._handed_over: tuple[bytes | None, bool] = (None, False)

    @property
    def node_id(self) -> str:
        return self._host.node_id

    def waiting(self) -> AbstractContextManager[None]:
        """While a method of the bird waits for an answer."""
        return nullcontext()

    def report(self) -> LifeReport:
        """What is held here, for a nest that does not know it."""
        order, (state, handed_over) = self.order, self._handed_over
        from flock_ray.core.messages import Released  # here: a host that hands nothing over need not load it

        record = Released(self.dot, self.incarnation, self._host.nest, state) if handed_over else None
        said = State.RUNNING if self.state is State.ENDING else self.state
        return LifeReport(
            self.name, self.dot, order.spec, order.code, self.born, self.incarnation,
            order.restarts, order.crashes, said.value, record, self.error,
        )  # fmt: skip

    @property
    def queue(self) -> int:
        """How many messages wait for their turn."""
        raise NotImplementedError

    @property
    def has_record(self) -> bool:
        return self._handed_over[1]

    # Beginning

    def _make(self) -> None:
        """Loads the class and runs `__init__`; raises what it raises."""
        if self.order.spec.options.start_timeout is not None:
            self._host.says(LifeBegins(self.dot, self.born))
        self._loaded = self._host.loaded(self.order)
        args, kwargs = pickle.loads(self.order.spec.args)
        self.bird = self._loaded.cls(*args, **kwargs)

    @property
    def _cls(self) -> type:
        return self._loaded.cls if self._loaded is not None else object

    def _state_to_take(self) -> Callable[[], Any] | None:
        """What is to be called with what an earlier life handed over."""
        if not self.order.has_state:
            return None
        take_over = getattr(self.bird, "take_over", None)
        if take_over is None:
            raise TypeError(f"{self._cls.__qualname__} has hand_over but no take_over(self, state): bird {self.name!r} lost its state")
        state = pickle.loads(self.order.state) if self.order.state is not None else None
        return lambda: take_over(state)

    def _hatched(self) -> None:
        with self._host.state_lock:
            if self.state is not State.STARTING:
                return  # it is to end already
            self.state = State.RUNNING
        if self.order.state is not None:
            self.order = self.order._replace(state=None)  # it has been taken over
        self._host.says(LifeRunning(self.dot, self.born, self._host.host, self._host.address))

    def _hatch_failed(self, error: BaseException) -> None:
        if isinstance(error, Leave) and error.reason == "normal":
            self._exited()
        else:
            self._crash(error.reason if isinstance(error, Leave) else describe(error))

    # Calls

    def withdraw(self, caller: str, order: int) -> None:
        """A call that has not begun is not to be run; a stream that it has opened is closed."""
        reading = self._host.readings.pop((caller, order))
        if reading is not None:
            self._close_later(reading)
            return
        if self._withdrawn is None:
            self._withdrawn = OrderedDict()
        self._withdrawn[caller, order] = None
        if len(self._withdrawn) > REMEMBERED:
            self._withdrawn.popitem(last=False)

    def refuse_from(self, caller: str, order: int) -> None:
        """There was no room for a message, so all that its caller sent after it are refused: he sends them again, as another (C2)."""
        if self._refused is None:
            self._refused = OrderedDict()
        self._refused.setdefault(caller, order)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def _at_the_door(self, head: Call, order: int) -> bytes | None:
        """Why this call does not even wait for its turn."""
        if self.state is not State.RUNNING:
            return MOVED
        return FULL if self._was_refused(head, order) else None

    def _was_refused(self, head: Call, order: int) -> bool:
        return self._refused is not None and order >= self._refused.get(head.caller, order + 1)

    def _turned_away(self, head: Call, order: int) -> bytes | None:
        """Why this call is not run, now that it is its turn."""
        if self.state is not State.RUNNING or not self._host.may_run():
            return MOVED
        if self._was_refused(head, order):
            return FULL  # what its caller had sent before, while this one waited
        if self._withdrawn and (head.caller, order) in self._withdrawn:
            del self._withdrawn[head.caller, order]
            return refusal(f"the call of {self._method_name(head.method)} was withdrawn before it began", "CallTimeout")
        return self._examined(head)

    def _examined(self, head: Call) -> bytes | None:
        """Why its method cannot be run."""
        loaded, key = self._loaded, (head.method, head.stream)
        if loaded is not None and key in loaded.allowed:
            return None
        refused = self._examine(*key)
        if refused is None and loaded is not None:
            loaded.allowed.add(key)
        if refused is not None and head.cast:
            log.error("bird %r: a cast was refused: there is no method %r to run", self.name, head.method)
        return refused

    def _arguments(self, head: Call, body: memoryview, extra: Sequence[Any]) -> Any:
        """The call's `(args, kwargs)`; or the refusal, as bytes."""
        try:
            return unpack(body, extra)
        except BaseException as error:  # whatever the caller's objects do here concerns the caller
            text = f"cannot unpickle the arguments of {self._method_name(head.method)}: {describe(error)}"
            if head.cast:
                log.error("%s", text)
            return refusal(text, "RemoteError")

    def _result(self, head: Call, result: Any) -> Response:
        if head.cast:
            return b""
        plain = pack_plain(result)
        if plain is not None:
            return RESULT + plain
        try:
            body, extra = pack(result, what=f"the result of {self._method_name(head.method)}", call=False)
        except TypeError as error:
            return refusal(str(error), "TypeError")
        return (RESULT + body, *extra) if extra else RESULT + body

    def _raised(self, head: Call, error: BaseException) -> Response:
        """The answer to a call whose method raised, after what follows from it for the life has begun."""
        if isinstance(error, Leave):
            self._leave(error.reason)
            return self._result(head, error.reply)
        self._host.raised += 1
        text = describe(error)
        if head.cast:
            log.error("bird %r: %s, which was cast, raised:\n%s", self.name, head.method, text)
        if self._crashes or not isinstance(error, ORDINARY):
            self._crash(text)
        return b"" if head.cast else self._raised_answer(error, text)

    def _raised_answer(self, error: BaseException, text: str) -> Response:
        if not isinstance(error, Exception):
            return refusal(text, "RemoteError")  # a SystemExit must not end the caller
        try:
            body, extra = pack(error, what="the exception", call=False)
            if type(error).__module__ != "builtins" and type(unpack(body, extra)) is not type(error):
                raise TypeError("it is another type when unpickled")
        except Exception:  # the exception's own code: __reduce__, __init__
            return refusal(text, "RemoteError")
        message = encode(Answer("raised", text), body)
        return (message, *extra) if extra else message

    def _method_name(self, method: str) -> str:
        return f"{self.name!r}.{method}"

    def _examine(self, method: str, stream: bool = False, private: bool = False) -> bytes | None:
        """The refusal of what cannot be called, or read as a stream; `None` of a method that can."""
        found = inspect.getattr_static(self._cls, method, None)
        if isinstance(found, functools.partialmethod | functools.singledispatchmethod):
            found = found.func
        who = f"bird {self.name!r} ({self._cls.__qualname__})"
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
        if method.startswith("_") and not private:
            return refusal(f"{who}: {method!r} is private", "AttributeError")
        if found is None or isinstance(found, type) or not callable(found):
            return refusal(f"{who} {self._lacks(method)}", "AttributeError")
        if (inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found)) != stream:
            text = f"{method!r} is no generator method: call it instead"
            if not stream:
                text = f"{method!r} is a generator method, and a call has one result: read it with stream instead"
            return refusal(f"{who}: {text}", "TypeError")
        return None

    def _lacks(self, method: str) -> str:
        if hasattr(self._cls, method) or method in getattr(self.bird, "__dict__", ()):
            return f"has {method!r}, but it is no method"
        public = [name for name in dir(self._cls) if not name.startswith("_") and callable(getattr(self._cls, name, None))]
        import difflib  # loaded when it is needed: a host is a new process

        near = difflib.get_close_matches(method, public, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(public) or 'none'}"
        return f"has no method {method!r}: {hint}"

    # Streams

    def _open(self, head: Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Reading | Response:
        """Calls a generator method, which runs nothing of it yet; or the refusal."""
        arguments = self._arguments(head, body, extra)
        if isinstance(arguments, bytes):
            return arguments
        args, kwargs = arguments
        try:
            generator = getattr(self.bird, head.method)(*args, **kwargs)
        except BaseException as error:  # the arguments do not fit
            return self._raised(head, error)
        what = f"an item of {self._method_name(head.method)}"
        reading = Reading(self, (head.caller, order), generator, head.chain, head.method, what, connection)
        for idle in self._host.readings.add(reading):
            idle.life._close_later(idle)
        if connection is not None and connection.gone:
            self.withdraw(*reading.call)  # its caller left before it began
        return reading

    def _pulled(self, pull: Pull) -> Reading | None:
        """It is a pull's turn: what it reads, if that is still here."""
        reading = self._host.readings.get((pull.caller, pull.order))
        return reading if reading is not None and reading.life is self and self.state is State.RUNNING and self._host.may_run() else None

    def _item(self, reading: Reading, item: object) -> Response:
        try:
            body, extra = pack(item, what=reading.what, call=False)
        except TypeError as error:
            self.withdraw(*reading.call)
            return refusal(str(error), "TypeError")
        return (ITEM + body, *extra) if extra else ITEM + body

    def _no_item(self, reading: Reading, error: BaseException) -> Response:
        """The answer to a pull whose generator has ended."""
        self._host.readings.pop(reading.call)
        if isinstance(error, StopIteration | StopAsyncIteration):
            return END
        if isinstance(error, Leave):
            self._leave(error.reason)
            return END
        text = describe(error)
        if self._crashes or not isinstance(error, ORDINARY):
            self._crash(text)
        return self._raised_answer(error, text)

    def _close_later(self, reading: Reading) -> None:
        """Has a generator closed when it is its turn; returns at once."""
        raise NotImplementedError

    # Messages to oneself

    def send(self, seconds: float, every: bool, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Has a method of the bird run later (`inside.send_after`, `inside.send_every`)."""
        refused = self._examine(method, private=True)
        if refused is not None:
            answer = decode(refused)[0]
            raise (TypeError if answer.error == "TypeError" else AttributeError)(answer.text)
        message = pack((args, kwargs), what=f"the arguments of {self._method_name(method)}", call=False)
        return self._host.scheduler.add(seconds, every, lambda entry: self._due(entry, method, *message))

    def _due(self, entry: Entry, method: str, body: bytes, extra: Sequence[Any]) -> None:
        raise NotImplementedError

    def _timer_turned_away(self, entry: Entry) -> bool:
        """It is this message's turn: must it not run?"""
        entry.pending = False
        if self.state is not State.RUNNING:
            entry.cancelled = True  # a timer dies with its life
        return entry.cancelled or not self._host.may_run()

    def _timer_failed(self, method: str, error: BaseException) -> None:
        if isinstance(error, Leave):
            self._leave(error.reason)
            return
        text = describe(error)
        log.error("bird %r: %s, a message to itself, raised:\n%s", self.name, method, text)
        if self._crashes or not isinstance(error, ORDINARY):
            self._crash(text)

    # The end

    def end(self, order: EndOrder) -> None:
        """Begins to end the life in good order, or says again how it ended."""
        with self._host.state_lock:
            if self.state in (State.STARTING, State.RUNNING):
                self.state, self._end = State.ENDING, order
                begin = True
            else:
                begin = False
        if begin:
            self._begin_end(order.reason)
        elif self.state is not State.ENDING:
            self._say_end()

    def _leave(self, reason: str) -> None:
        """The bird's own wish."""
        if reason != "normal":
            self._crash(reason)
            return
        with self._host.state_lock:
            if self.state is not State.RUNNING:
                return  # it is ending anyway
            self.state = State.ENDING
        self._begin_end("normal")

    def _begin_end(self, reason: str) -> None:
        """Has the end run as soon as no method does, and returns."""
        raise NotImplementedError

    def _exited(self) -> None:
        self._finish(State.EXITED)

    def _crash(self, text: str) -> None:
        with self._host.state_lock:
            if self.state not in ALIVE:
                return
            self.error = text
        self._finish(State.CRASHED)

    def _finish(self, state: State) -> None:
        with self._host.state_lock:
            if self.state not in ALIVE:
                return
            self.state = state
        self._host.readings.pop_all(self)
        self._say_end()
        self._host.over(self)

    def _say_end(self) -> None:
        if self.state is State.CRASHED:
            self._host.says(LifeCrashed(self.dot, self.born, self.error))
        elif self.state is State.EXITED:
            self._host.says(LifeExited(self.dot, self.born))
        else:
            self._host.says(LifeEnded(self.dot, self.born, *self._handed_over))

    def _ended(self, handed: tuple[object] | None) -> None:
        """`on_stop` and `hand_over` have run; the latter returned `handed[0]`."""
        if handed is not None:
            try:
                self._handed_over = (pack_alone(handed[0], what=f"what {self.name!r}.hand_over returned"), True)
            except TypeError:
                log.exception("bird %r: its state is lost", self.name)
        self._finish(State.RELEASED if self._end is not None else State.EXITED)

    def _hook(self, name: str) -> Callable[..., Any] | None:
        """An optional method of the class; none if the bird was never made."""
        hook = getattr(self.bird, name, None)
        return hook if callable(hook) else None

    @property
    def _keeps(self) -> bool:
        return self._end is not None and self._end.keep

    @contextmanager
    def _inside(self, method: str, chain: tuple[tuple[str, Any], ...] = (), is_async: bool = False) -> Iterator[Inside]:
        inside = Inside(self, (*chain, self._link), is_async, method)
        inside.task = asyncio.current_task() if is_async else None
        inside.begin(self._host.under_way)
        try:
            yield inside
        finally:
            inside.end()
