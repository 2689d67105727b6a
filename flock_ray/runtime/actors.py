"""The Ray actors of flock_ray: a nest for each node, and a host for each bird.

Whoever is given a handle imports the module of its actor's class, be it a host that only wants to speak to its nest. So this one imports
nothing but Ray, and what an actor does is loaded in the process where it runs: handles that brought the whole nest with them cost each
host 0.12 s of CPU, a fifth of a bare actor's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from flock_ray.runtime.life import Response


class NestActor:
    """A detached, asynchronous actor that Ray restarts; see `nest.Nest`."""

    def __init__(self, record: bytes, node: str) -> None:
        from flock_ray.runtime.nest import Nest

        self._nest = Nest(record, node)

    async def ask(self, request: bytes) -> bytes:
        return await self._nest.ask(request)

    async def read(self, query: bytes) -> bytes:
        return await self._nest.read(query)

    async def routes(self, query: bytes) -> bytes:
        return await self._nest.routes(query)

    async def deliver(self, letters: bytes) -> None:
        await self._nest.deliver(letters)

    async def host_says(self, word: bytes) -> bytes | None:
        return await self._nest.host_says(word)

    async def pid(self) -> int:
        return await self._nest.pid()

    async def ready(self) -> None:
        await self._nest.ready()

    async def destroy(self) -> None:
        await self._nest.destroy()


class HostActor:
    """The host of a bird without `async def` methods.

    Its group `ctl` has threads of its own: orders must be heard while a method blocks.
    """

    def __init__(self, boot: bytes, nest: Any) -> None:
        from flock_ray.runtime.host import start
        from flock_ray.runtime.life_sync import SyncHost

        self._host = start(SyncHost, boot, nest)

    def hatch(self, order: bytes) -> None:
        self._host.hatch(order)

    def call(self, message: bytes, *extra: Any) -> Response:
        return self._host.call(message, extra)

    @ray.method(concurrency_group="ctl")
    def control(self, message: bytes) -> bytes:
        return self._host.control(message)

    @ray.method(concurrency_group="ctl")
    def fetch(self, parcel: str) -> Response:
        return self._host.fetch(parcel)


class _OnALoop:
    """The host of birds of which some have `async def` methods. Its default group has an event loop of its own, on which they live."""

    _host: Any

    async def hatch(self, order: bytes) -> None:
        await self._host.hatch(order)

    async def call(self, message: bytes, *extra: Any) -> Response:
        return await self._host.call(message, extra)  # type: ignore[no-any-return]  # the host's own signature

    @ray.method(concurrency_group="ctl")
    async def control(self, message: bytes) -> bytes:
        return self._host.control(message)  # type: ignore[no-any-return]  # as above

    @ray.method(concurrency_group="ctl")
    async def fetch(self, parcel: str) -> Response:
        return self._host.fetch(parcel)  # type: ignore[no-any-return]  # as above


class AsyncHostActor(_OnALoop):
    """The host of a bird with `async def` methods."""

    def __init__(self, boot: bytes, nest: Any) -> None:
        from flock_ray.runtime.host import start
        from flock_ray.runtime.life_async import AsyncHost

        self._host = start(AsyncHost, boot, nest)


class LightHostActor(_OnALoop):
    """The host of light birds."""

    def __init__(self, boot: bytes, nest: Any) -> None:
        from flock_ray.runtime.host import start
        from flock_ray.runtime.life_light import LightHost

        self._host = start(LightHost, boot, nest)
