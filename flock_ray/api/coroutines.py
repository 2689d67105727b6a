"""`Flock.aio`: the functions of a flock as coroutines, for any event loop.

Each is documented at its namesake in `flock_ray.api.flock.Flock`. Cancelling one takes back what was asked, where that can still be done.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from flock_ray.api.batches import Batches
from flock_ray.api.bird import Bird, check_timeout
from flock_ray.api.options import check
from flock_ray.config import Config
from flock_ray.runtime.batches import Caller
from flock_ray.runtime.client import DEFAULT, client_of, let_go
from flock_ray.runtime.pending import Default
from flock_ray.specs import BirdInfo, BirdStack, Explanation, Name, NestInfo, check_name

if TYPE_CHECKING:
    from ray.actor import ActorClass

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

State = Literal["pending", "starting", "running", "moving", "restarting", "failed"]


class AioFlock(Batches):
    """The functions of `Flock(name)` as coroutines."""

    def __repr__(self) -> str:
        return f"Flock({self.name!r}).aio"

    def __reduce__(self) -> tuple[Any, ...]:
        return (AioFlock, (self._name,))

    async def init(self, **config: Any) -> None:
        """As `Flock.init`."""
        Config().with_settings(**config)
        client = client_of(self.name)
        await client.courier.run_async(client.asks.ensure(config))

    @overload
    async def start(self, name: Name, cls: ActorClass[T], /, *args: Any, **kwargs: Any) -> Bird[T]: ...
    @overload
    async def start(self, name: Name, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Bird[T]: ...
    async def start(self, name: Name, cls: Any, /, *args: Any, **kwargs: Any) -> Bird[Any]:
        """As `Flock.start`."""
        return await self._start_with({}, name, cls, args, kwargs)

    async def _start_with(self, given: Mapping[str, Any], name: object, cls: object, args: Any, kwargs: Any) -> Bird[Any]:
        client, plain = self._begin(name, cls, given)
        config = await client.courier.run_async(client.asks.ensure({}))
        spec, code = self._spec(plain, cls, args, kwargs, given, config)
        dot = await client.courier.run_async(self._started(client, plain, spec, code))
        return self._handle(client, plain, dot, cls)

    def options(self, **given: Any) -> AioStarter:
        """As `Flock.options`; what it returns has `start` as a coroutine. Not a coroutine itself."""
        return AioStarter(self, check(given))

    @overload
    async def call(
        self, name: Bird[T], method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    async def call(self, name: Bird[T], method: Callable[Concatenate[T, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    async def call(self, name: Name | Bird[Any], method: str, /, *args: Any, timeout: float | None = ..., **kwargs: Any) -> Any: ...
    @overload
    async def call(
        self, name: Name, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    async def call(self, name: Name, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    async def call(
        self, name: Name | Bird[Any], method: Callable[..., Coroutine[Any, Any, R]], /, *args: Any, timeout: float | None, **kwargs: Any
    ) -> R: ...
    @overload
    async def call(self, name: Name | Bird[Any], method: Callable[..., R], /, *args: Any, timeout: float | None, **kwargs: Any) -> R: ...
    async def call(self, name: Any, method: Any, /, *args: Any, timeout: Any = DEFAULT, **kwargs: Any) -> Any:
        """As `Flock.call`. Cancelling it takes the call out of the bird's mailbox, and cancels a running `async def` method."""
        client, plain, dot, text = self._call_target(name, method)
        return await client.aio(plain, dot, text, args, kwargs, timeout if timeout is DEFAULT else check_timeout(timeout), False)

    @overload
    async def cast(self, name: Bird[T], method: Callable[Concatenate[T, P], Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    async def cast(self, name: Name | Bird[Any], method: str, /, *args: Any, **kwargs: Any) -> None: ...
    @overload
    async def cast(self, name: Name, method: Callable[Concatenate[Any, P], Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    async def cast(self, name: Any, method: Any, /, *args: Any, **kwargs: Any) -> None:
        """As `Flock.cast`."""
        client, plain, dot, text = self._call_target(name, method)
        client.cast(plain, dot, text, args, kwargs)

    async def stop(self, name: Name | Bird[Any]) -> None:
        """As `Flock.stop`."""
        await client_of(self.name).courier.run_async(self._stop(name))

    async def restart(self, name: Name | Bird[Any]) -> None:
        """As `Flock.restart`."""
        await client_of(self.name).courier.run_async(self._restart(name))

    async def wait(
        self,
        names: Name | Bird[Any] | Iterable[Name | Bird[Any]],
        state: Literal["running", "gone"] = "running",
        timeout: float | Default | None = DEFAULT,
    ) -> None:
        """As `Flock.wait`."""
        await client_of(self.name).courier.run_async(self._wait(names, state, timeout))

    async def alive(self, name: Name | Bird[Any]) -> bool:
        """As `Flock.alive`."""
        return await client_of(self.name).courier.run_async(self._info(name)) is not None

    async def where(self, name: Name | Bird[Any]) -> str | None:
        """As `Flock.where`."""
        return (await self.info(name)).node_id

    async def bird(self, name: Name | Bird[Any]) -> Bird[Any]:
        """As `Flock.bird`."""
        if isinstance(name, Bird):
            return name
        check_name(name)
        return Bird(self.name, name)

    async def birds(
        self,
        *,
        state: State | None = None,
        node: str | None = None,
        prefix: str | tuple[Any, ...] | None = None,
        of: Any = None,
    ) -> list[BirdInfo]:
        """As `Flock.birds`."""
        return await client_of(self.name).courier.run_async(self._birds(state, node, prefix, of))

    async def info(self, name: Name | Bird[Any]) -> BirdInfo:
        """As `Flock.info`."""
        return await client_of(self.name).courier.run_async(self._known_info(name))

    async def explain(self, name: Name | Bird[Any]) -> Explanation:
        """As `Flock.explain`."""
        return await client_of(self.name).courier.run_async(self._explain(name))

    async def stack(self, name: Name | Bird[Any]) -> BirdStack:
        """As `Flock.stack`."""
        return await client_of(self.name).courier.run_async(self._stack(name))

    async def count(self) -> int:
        """As `Flock.count`."""
        return await client_of(self.name).courier.run_async(self._count())

    async def nests(self) -> list[NestInfo]:
        """As `Flock.nests`."""
        return await client_of(self.name).courier.run_async(self._nests())

    async def shutdown(self) -> None:
        """As `Flock.shutdown`."""
        await in_thread(let_go, self.name)

    async def destroy(self) -> None:
        """As `Flock.destroy`."""
        client = client_of(self.name)
        await client.courier.run_async(self._destroy(client))

    # Many at once: to pack and unpack so much takes time, and is done in a thread

    async def start_many(self, birds: Iterable[Any], *, return_exceptions: bool = False, progress: bool = False) -> list[Bird[Any]]:
        """As `Flock.start_many`."""
        return await in_thread(self._start_many, {}, birds, return_exceptions, progress)

    async def call_many(
        self,
        calls: Iterable[Any],
        *,
        timeout: float | Default | None = DEFAULT,
        retry: bool = False,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """As `Flock.call_many`."""
        return await self._batch(self._call_many, calls, timeout, retry, return_exceptions, progress)

    async def cast_many(self, casts: Iterable[Any], *, progress: bool = False) -> None:
        """As `Flock.cast_many`."""
        await self._batch(self._cast_many, casts, progress)

    async def stop_many(self, names: Iterable[Name | Bird[Any]], *, return_exceptions: bool = False, progress: bool = False) -> list[None]:
        """As `Flock.stop_many`."""
        return await in_thread(self._stop_many, names, return_exceptions, progress)

    async def ask_all(
        self,
        method: str | Callable[..., Any],
        /,
        *args: Any,
        of: Any = None,
        prefix: str | tuple[Any, ...] | None = None,
        timeout: float | Default | None = DEFAULT,
        return_exceptions: bool = False,
        progress: bool = False,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """As `Flock.ask_all`."""
        return await self._batch(self._ask_all, method, args, kwargs, of, prefix, timeout, return_exceptions, progress)

    async def _batch(self, make: Callable[..., T], *args: Any) -> T:
        """Makes a batch in a thread, for who runs here; cancelled, what of it has not begun is taken back (C5)."""
        caller = Caller(client_of(self.name).lanes_here(), threading.Event())
        try:
            return await in_thread(make, *args, caller)
        except asyncio.CancelledError:
            caller.gone.set()
            raise


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Runs what blocks in a thread of its own. A pool's may all be taken by batches that wait for birds that wait for batches."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="flock_ray batch")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(contextvars.copy_context().run, work, *args))
    finally:
        pool.shutdown(wait=False)


class AioStarter:
    """`start` as a coroutine, with options."""

    def __init__(self, flock: AioFlock, given: Mapping[str, Any]) -> None:
        self._flock = flock
        self._given = given

    @overload
    async def start(self, name: Name, cls: ActorClass[T], /, *args: Any, **kwargs: Any) -> Bird[T]: ...
    @overload
    async def start(self, name: Name, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Bird[T]: ...
    async def start(self, name: Name, cls: Any, /, *args: Any, **kwargs: Any) -> Bird[Any]:
        """As `flock_ray.start`, with these options."""
        return await self._flock._start_with(self._given, name, cls, args, kwargs)

    async def start_many(self, birds: Iterable[Any], *, return_exceptions: bool = False, progress: bool = False) -> list[Bird[Any]]:
        """As `flock_ray.start_many`, with these options."""
        return await in_thread(self._flock._start_many, self._given, birds, return_exceptions, progress)
