"""What `Flock` and its coroutines have in common: the checks of what users give, and each request to the nests, written once.

Rules kept here: requests are coroutines for the courier's thread; what users pass is checked and pickled on their own thread, before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, overload

from flock_ray.api import starting
from flock_ray.api.bird import Bird, check_method, check_timeout
from flock_ray.api.options import methods, resolve, unwrap
from flock_ray.config import Config
from flock_ray.core.board import Kinds
from flock_ray.errors import BirdNotFound, BirdUnavailable, FlockNotRunning
from flock_ray.notices import Missed, Notice
from flock_ray.runtime.client import DEFAULT, Client, client_of
from flock_ray.runtime.feed import Feed
from flock_ray.runtime.inside import current_flock
from flock_ray.runtime.pending import FOREVER, Default
from flock_ray.runtime.streams import Stream
from flock_ray.specs import BirdInfo, BirdStack, Dot, Explanation, Name, NestInfo, Spec, check_name

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
N = TypeVar("N", bound=Notice)

_STATES = ("pending", "starting", "running", "moving", "restarting", "failed")
_WAIT_AT_ONCE = 1000  # questions of one `wait` under way: Ray warns at 5,000 calls pending at one actor


class Requests:
    """The part of a flock that does not care who waits."""

    def __init__(self, name: str = "default") -> None:
        if type(name) is not str or not name:
            raise TypeError(f"a flock's name must be a str that is not empty, not {name!r}")
        self._name = name

    @property
    def name(self) -> str:
        """The flock's name."""
        return self._name

    @overload
    def stream(
        self, name: Bird[T], method: Callable[Concatenate[T, P], Iterator[R] | AsyncIterator[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Stream[R]: ...
    @overload
    def stream(self, name: Name | Bird[Any], method: str, /, *args: Any, timeout: float | None = ..., **kwargs: Any) -> Stream[Any]: ...
    @overload
    def stream(
        self, name: Name, method: Callable[Concatenate[Any, P], Iterator[R] | AsyncIterator[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Stream[R]: ...
    @overload
    def stream(
        self,
        name: Name | Bird[Any],
        method: Callable[..., Iterator[R] | AsyncIterator[R]],
        /,
        *args: Any,
        timeout: float | None,
        **kwargs: Any,
    ) -> Stream[R]: ...
    def stream(self, name: Any, method: Any, /, *args: Any, timeout: Any = DEFAULT, **kwargs: Any) -> Stream[Any]:
        """Calls a generator method, `async` or not, of a bird.

        Args:
            name, method, args, kwargs: as `call`.
            timeout: seconds for each item; as `call`.

        Returns:
            An iterator and async iterator over what it yields. At most 16 items are made ahead of who reads them; between items the bird
            runs other methods. `close()` closes the generator; so does dropping the iterator.

        Raises:
            TypeError: an argument cannot be pickled; names which.
            BirdUnavailable: while it is read: the bird crashed or moved in the middle, after what had arrived. Call again.
            CallTimeout: while it is read: no item came in time.
            Exception: while it is read: what the generator raised; else as `call`.
        """
        client, plain, dot, text = self._call_target(name, method)
        return client.stream(plain, dot, text, args, kwargs, timeout if timeout is DEFAULT else check_timeout(timeout), False)

    @overload
    def events(self, *, follow: bool = ..., since: float = ...) -> Feed[Notice]: ...
    @overload
    def events(self, *, follow: bool = ..., since: float = ..., kinds: type[N] | tuple[type[N], ...]) -> Feed[N | Missed]: ...
    def events(self, *, follow: bool = True, since: float = 0.0, kinds: Kinds = Notice) -> Feed[Any]:
        """What has happened and happens in the flock: the notices of all nests, also of those that come later.

        Args:
            follow: `False` ends it where it has come to now; else it waits for more.
            since: seconds since the epoch: only what was noticed then or later, by the clock of each nest's node. `time.time()`: only what
                is to come. 0: all that nests still keep.
            kinds: only these classes of `flock_ray.notices`, and those derived from them; a `Missed` comes in any case.

        Returns:
            An iterator and async iterator over `flock_ray.notices.Notice`s. `close()`, or dropping it, ends it.

        Raises:
            FlockNotRunning: Ray is not initialised; while it is read: the flock is not up, or not any more.
            CallTimeout: while it is read: no nest has answered at first.
            RuntimeError: while it is read with `for` in an `async def` method of a bird: use `async for`.
            TypeError: `kinds` are no classes of notices.
        """
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if not all(isinstance(kind, type) and issubclass(kind, Notice) for kind in wanted):
            raise TypeError(f"kinds must be a class of flock_ray.notices, or a tuple of these, not {kinds!r}")
        return Feed(client_of(self.name), follow, since, wanted)

    def _target(self, name: object) -> tuple[Client, Name, Dot | None]:
        """The client, name and dot that a name or a `Bird` stands for."""
        if isinstance(name, Bird):
            return client_of(name._flock), name._name, name._dot
        if type(name) is not str:
            check_name(name)
        return client_of(self.name), name, None  # type: ignore[return-value]  # it is a name, as just checked

    def _call_target(self, name: object, method: object) -> tuple[Client, Name, Dot | None, str]:
        client, plain, dot = self._target(name)
        return client, plain, dot, self._method_text(method, plain)

    def _method_text(self, method: object, name: Name | None) -> str:
        text = method if isinstance(method, str) else getattr(method, "__name__", None)
        if not isinstance(text, str) or not (isinstance(method, str) or callable(method)):
            raise TypeError(f"a method is given by its name or as Class.method, not as {type(method).__name__}: {method!r}")
        check_method(text, name)
        return text

    def _until(self, client: Client, timeout: float | Default | None) -> float:
        checked = check_timeout(timeout)
        if isinstance(checked, Default):
            config = client.asks.known_config or Config()
            checked = config.call_timeout
        return FOREVER if checked is None else client.clock() + checked

    def _begin(self, name: object, cls: object, given: Mapping[str, Any]) -> tuple[Client, Name]:
        """Checks what `start` was given, before anything is brought up."""
        resolve(cls, given)
        client, plain, _ = self._target(name)
        return client, plain

    def _spec(
        self, name: Name, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any], config: Config
    ) -> tuple[Spec, bytes]:
        return starting.make_spec(name, cls, args, kwargs, given, config.start_argument_limit)

    async def _started(self, client: Client, name: Name, spec: Spec, code: bytes) -> Dot:
        try:
            accepted = await client.asks.start(name, spec, code, time.time_ns(), self._until(client, DEFAULT))
        except FlockNotRunning:  # somebody else destroyed the flock that this process knew: a start begins another
            client.asks.forget()
            await client.asks.ensure({})
            accepted = await client.asks.start(name, spec, code, time.time_ns(), self._until(client, DEFAULT))
        if not accepted.existed:
            client.outdate(name)
        return accepted.dot

    def _handle(self, client: Client, name: Name, dot: Dot, cls: object) -> Bird[Any]:
        return Bird(client.flock, name, dot, methods(unwrap(cls)[0]))

    async def _stop(self, name: object) -> None:
        client, plain, dot = self._target(name)
        await client.asks.config()
        await client.asks.stop(plain, dot, self._until(client, DEFAULT))
        client.outdate(plain)

    async def _restart(self, name: object) -> None:
        client, plain, dot = self._target(name)
        await client.asks.config()
        await client.asks.restart(plain, dot, self._until(client, DEFAULT))
        client.outdate(plain)

    async def _wait(self, names: object, state: str, timeout: float | Default | None) -> None:
        if state not in ("running", "gone"):
            raise ValueError(f'state must be "running" or "gone", not {state!r}')
        targets = list(dict.fromkeys(self._target(name) for name in _several(names)))
        for client in {client for client, _, _ in targets}:
            await client.asks.config()
        at_once = asyncio.Semaphore(_WAIT_AT_ONCE)

        async def one(client: Client, name: Name, dot: Dot | None, until: float) -> None:
            async with at_once:
                await client.asks.wait(name, state, until, dot)

        waits = [asyncio.ensure_future(one(*target, self._until(target[0], timeout))) for target in targets]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    async def _info(self, name: object) -> BirdInfo | None:
        """From the local nest's replica; what is not there may be known elsewhere (C3)."""
        client, plain, dot = self._target(name)
        found: BirdInfo | None = await client.asks.read("info", plain)
        if found is None:
            config = await client.asks.config()
            try:
                await client.asks.wait(plain, "known", client.clock() + config.lookup_timeout + 1.0, dot)
            except (BirdNotFound, TimeoutError):
                return None
            found = await client.asks.read("info", plain)
        return found

    async def _known_info(self, name: object) -> BirdInfo:
        found = await self._info(name)
        if found is None:
            self._unknown(name)
        client, plain, _ = self._target(name)
        return replace(found, path=client.path(plain))

    async def _explain(self, name: object) -> Explanation:
        told: Explanation | None = await self._asked("explain", name)
        return told if told is not None else self._unknown(name)

    async def _stack(self, name: object) -> BirdStack:
        said: BirdStack | str | None = await self._asked("stack", name)
        if isinstance(said, str):
            plain = self._target(name)[1]
            raise BirdUnavailable(f"what bird {plain!r} does cannot be said: {said}; explain({plain!r}) says more of it", plain)
        return said if said is not None else self._unknown(name)

    async def _asked(self, what: str, name: object) -> Any:
        """A question about a bird, to this node's nest; one that does not know the name asks the others first (C3)."""
        client, plain, _ = self._target(name)
        answer = await client.asks.read(what, plain)
        return answer if answer is not None or await self._info(name) is None else await client.asks.read(what, plain)

    def _unknown(self, name: object) -> NoReturn:
        plain = self._target(name)[1]
        raise BirdNotFound(f"no nest that could be asked knows a bird {plain!r}; start it first", plain)

    async def _birds(self, state: str | None, node: str | None, prefix: object, of: object) -> list[BirdInfo]:
        if state is not None and state not in _STATES:
            raise ValueError(f"state must be one of {', '.join(_STATES)}, not {state!r}")
        found: list[BirdInfo] = await client_of(self.name).asks.read("birds", state, node, _checked_prefix(prefix), _class_name(of))
        return found

    async def _names(self, prefix: object, of: object) -> list[Name]:
        found: list[Name] = await client_of(self.name).asks.read("names", _checked_prefix(prefix), _class_name(of))
        return found

    async def _count(self) -> int:
        number: int = await client_of(self.name).asks.read("count")
        return number

    async def _nests(self) -> list[NestInfo]:
        found: list[NestInfo] = await client_of(self.name).asks.read("nests")
        return found

    async def _destroy(self, client: Client) -> None:
        if current_flock() == client.flock:
            text = f"a bird of flock {client.flock!r} cannot destroy it, for the end waits for the bird's methods; do it from outside"
            raise RuntimeError(text)
        await client.courier.blocking(client.links.destroy, client.flock)
        client.forget()


def _checked_prefix(prefix: object) -> object:
    if prefix is not None and not isinstance(prefix, str | tuple):
        raise TypeError(f"prefix must be a str, or a tuple for names that are tuples, not {type(prefix).__name__}")
    return prefix


def _class_name(of: object) -> str | None:
    if of is None:
        return None
    plain = unwrap(of)[0]
    return f"{plain.__module__}.{plain.__qualname__}"


def _several(names: object) -> Iterable[object]:
    """One name or handle as a list of one. A tuple is a name if it can be one."""
    if isinstance(names, Bird):
        return [names]
    try:
        check_name(names)
    except TypeError:
        if isinstance(names, Iterable) and not isinstance(names, str | bytes | bytearray):
            return names
        raise
    return [names]
