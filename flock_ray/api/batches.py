"""Many at once: `start_many`, `call_many`, `cast_many`, `stop_many`, `ask_all`; what `Flock` and its coroutines have in common.

Rules kept here: what cannot be right (an item of a wrong form) is refused before anything is sent; what fails for one bird has its place
in the list, as in `asyncio.gather`, and is raised when all others have ended, unless `return_exceptions` is given.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flock_ray.api.bird import Bird, check_timeout
from flock_ray.api.options import methods, resolve, unwrap
from flock_ray.api.requests import Requests
from flock_ray.api.starting import fill, make_template
from flock_ray.errors import FlockNotRunning
from flock_ray.runtime import inside
from flock_ray.runtime.batches import Batch, Caller, Request
from flock_ray.runtime.client import DEFAULT, Client, client_of
from flock_ray.runtime.pending import Default
from flock_ray.specs import Dot, Name, Spec, check_name

Came = Callable[[int], object]
_NO_KWARGS: dict[str, Any] = {}  # never written to


class Batches(Requests):
    """The part of a flock that does many things at once. All of it blocks."""

    def _start_many(self, given: Mapping[str, Any], birds: Iterable[Any], return_exceptions: bool, progress: bool) -> list[Any]:
        wanted = [self._start_item(place, item) for place, item in enumerate(birds)]
        for cls in {id(cls): cls for _, cls, _, _ in wanted}.values():
            resolve(cls, given)
        client = client_of(self.name)
        config = client.courier.run(client.asks.ensure({}))
        outcomes: list[Any] = [None] * len(wanted)
        templates: dict[int, tuple[Spec, bytes, tuple[str, ...]]] = {}
        starts: list[tuple[Name, Spec, bytes]] = []
        places: list[int] = []
        batch = uuid.uuid4().hex
        for place, (name, cls, args, kwargs) in enumerate(wanted):
            template = templates.get(id(cls))
            if template is None:
                template = templates[id(cls)] = (*make_template(cls, given), tuple(methods(unwrap(cls)[0])))
            try:
                spec = fill(template[0], name, args, kwargs, config.start_argument_limit, f"{batch}{place:x}")
            except (TypeError, ValueError) as error:
                outcomes[place] = error
                continue
            starts.append((name, spec, template[1]))
            places.append(place)
        with shown("started", len(wanted), progress) as came:
            accepted = client.courier.run(self._accepted(client, starts, came))
        for place, outcome in zip(places, accepted, strict=True):
            name, cls, _, _ = wanted[place]
            if isinstance(outcome, BaseException):
                outcomes[place] = outcome
                continue
            if not outcome.existed:
                client.outdate(name)
            outcomes[place] = Bird(client.flock, name, outcome.dot, templates[id(cls)][2])
        return _settled(outcomes, [one for one in outcomes if isinstance(one, BaseException)], return_exceptions)

    async def _accepted(self, client: Client, starts: Sequence[tuple[Name, Spec, bytes]], came: Came) -> list[Any]:
        until = self._until(client, DEFAULT)
        outcomes = await client.asks.start_many(starts, time.time_ns(), until, came)
        gone = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, FlockNotRunning)]
        if gone:  # as for a single start: somebody else destroyed the flock that this process knew, and a start begins another
            client.asks.forget()
            await client.asks.ensure({})
            again = await client.asks.start_many([starts[place] for place in gone], time.time_ns(), until, lambda _: None)
            for place, outcome in zip(gone, again, strict=True):
                outcomes[place] = outcome
        return outcomes

    def _start_item(self, place: int, item: object) -> tuple[Name, Any, tuple[Any, ...], dict[str, Any]]:
        name, cls, args, kwargs = _item("start_many", "(name, cls, args, kwargs)", place, item)
        check_name(name)
        return name, cls, args, kwargs

    def _call_many(
        self,
        calls: Iterable[Any],
        timeout: float | Default | None,
        retry: bool,
        return_exceptions: bool,
        progress: bool,
        caller: Caller | None = None,
    ) -> list[Any]:
        client, requests = self._requests("call_many", calls)
        outcomes, failed = self._made(client, requests, timeout, retry, False, "called", progress, caller)
        return _settled(outcomes, failed, return_exceptions)

    def _cast_many(self, casts: Iterable[Any], progress: bool, caller: Caller | None = None) -> None:
        client, requests = self._requests("cast_many", casts)
        _settled([], self._made(client, requests, DEFAULT, False, True, "cast", progress, caller)[1], False)

    def _ask_all(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        of: object,
        prefix: object,
        timeout: float | Default | None,
        return_exceptions: bool,
        progress: bool,
        caller: Caller | None = None,
    ) -> dict[Any, Any]:
        client = client_of(self.name)
        names = client.courier.run(self._names(prefix, of))
        text = self._method_text(method, None)
        requests = [Request(name, None, text, args, kwargs) for name in names]
        outcomes, failed = self._made(client, requests, timeout, False, False, "asked", progress, caller)
        return dict(zip(names, _settled(outcomes, failed, return_exceptions), strict=True))

    def _stop_many(self, names: Iterable[Any], return_exceptions: bool, progress: bool) -> list[Any]:
        targets = [self._bird("stop_many", place, name) for place, name in enumerate(names)]
        client = client_of(self.name)
        with shown("stopped", len(targets), progress) as came:
            outcomes = client.courier.run(self._stopped(client, targets, came))
        for name, _ in targets:
            client.outdate(name)
        return _settled(outcomes, [one for one in outcomes if one is not None], return_exceptions)

    async def _stopped(self, client: Client, birds: Sequence[tuple[Name, Dot | None]], came: Came) -> list[BaseException | None]:
        await client.asks.config()
        return await client.asks.stop_many(birds, self._until(client, DEFAULT), came)

    # What they share

    def _requests(self, what: str, items: Iterable[Any]) -> tuple[Client, list[Request]]:
        client = client_of(self.name)
        texts: dict[Any, str] = {}
        requests = []
        for place, item in enumerate(items):
            name, method, args, kwargs = _item(what, "(name, method, args, kwargs)", place, item)
            plain, dot = self._bird(what, place, name)
            text = texts.get(method) if isinstance(method, str) else None
            if text is None:
                text = texts[method] = self._method_text(method, plain)
            requests.append(Request(plain, dot, text, args, kwargs))
        return client, requests

    def _bird(self, what: str, place: int, name: object) -> tuple[Name, Dot | None]:
        """What is meant by an item's name, or handle of a bird of this flock."""
        if not isinstance(name, Bird):
            if type(name) is not str:
                check_name(name)
            return name, None  # type: ignore[return-value]  # as just checked
        if name._flock != self.name:
            text = f"{what} is for birds of one flock, {self.name!r}; item {place} is of {name._flock!r}"
            raise TypeError(f"{text}: use Flock({name._flock!r}).{what}")
        return name._name, name._dot

    def _made(
        self,
        client: Client,
        requests: Sequence[Request],
        timeout: float | Default | None,
        retry: bool,
        cast: bool,
        what: str,
        progress: bool,
        caller: Caller | None,
    ) -> tuple[list[Any], list[BaseException]]:
        if inside.in_async_method():
            raise RuntimeError("a batch here would stop the event loop of this bird; await its namesake in flock_ray.aio")
        client.check_process()
        client.courier.run(client.asks.config())
        until = self._until(client, check_timeout(timeout) if timeout is not DEFAULT else DEFAULT)
        with shown(what, len(requests), progress) as came:
            batch = Batch(client, requests, until, retry, cast, came, caller)
            outcomes = batch.run()
        return outcomes, [batch.failed[place] for place in sorted(batch.failed)]


def _item(what: str, form: str, place: int, item: object) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """An item of a batch, whose arguments may be left out."""
    if isinstance(item, tuple | list) and 2 <= len(item) <= 4:
        args = item[2] if len(item) > 2 else ()
        kwargs = item[3] if len(item) > 3 else _NO_KWARGS
        if isinstance(args, tuple | list) and isinstance(kwargs, dict):
            return item[0], item[1], tuple(args), kwargs
    raise TypeError(f"{what} takes items {form}, of which args and kwargs may be left out; item {place} is {item!r}")


def _settled(outcomes: list[Any], failed: Sequence[BaseException], return_exceptions: bool) -> list[Any]:
    if failed and not return_exceptions:
        raise failed[0]
    return outcomes


@contextmanager
def shown(what: str, total: int, progress: bool) -> Iterator[Came]:
    """A progress bar, if one is wanted, and what to tell how many more are done."""
    if not progress:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # loaded when it is needed

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)
