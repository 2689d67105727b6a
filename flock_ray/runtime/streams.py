"""What a caller holds of a stream: an iterator over what a generator method of a bird yields (`runtime/generators.py` is the other end).

Rules kept here: at most `WINDOW` items are made ahead of who reads them; what has arrived is given before any error; a stream that is
not read to its end is closed, also when nobody has it any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Generic, NoReturn, TypeVar

from flock_ray import errors
from flock_ray.core import wire
from flock_ray.runtime import inside, payload
from flock_ray.runtime.links import Link
from flock_ray.runtime.pending import FOREVER, Opened, Pending, open_raw, value_of
from flock_ray.runtime.replies import Down, NoAnswer, Raw, Reply, answer_of

T_co = TypeVar("T_co", covariant=True)

WINDOW = 16  # items made and not read; more hides longer round trips, less lets a generator run less far ahead
AT_A_TIME = WINDOW // 2  # pulls that are sent together


class Stream(Generic[T_co], Iterator[T_co], AsyncIterator[T_co]):
    """Iterates over the items of a stream, with `for` or `async for`. For one reader at a time.

    Raises:
        BirdUnavailable: the bird crashed, moved, or went away in the middle: the rest will not come. Call again for a new stream.
        CallTimeout: no item came in time; the stream is closed.
        Exception: what the generator raised; else as `flock_ray.call`.
    """

    def __init__(self, message: Pending) -> None:
        self._opening: Pending | None = message
        self._message = message
        self._items: deque[tuple[bytes | memoryview, Sequence[Any]]] = deque()
        self._pulls: deque[list[Any]] = deque()  # under way: replies, and how many items each may still bring
        self._credit = 0  # items that may still come
        self._pulled = 0  # pulls sent
        self._head: bytes | None = None  # of each
        self._ended = False

    # On a thread

    def __iter__(self) -> Iterator[T_co]:
        return self

    def __next__(self) -> T_co:
        while not self._items:
            if self._ended:
                raise StopIteration
            if inside.in_async_method():
                text = f"reading {self._message.method!r} of bird {self._name!r} with `for` would stop the event loop of this bird"
                raise RuntimeError(f"{text}; use `async for`")
            self._message.lane.client.check_process()
            self._wait()
        return self._next()  # type: ignore[no-any-return]  # what the generator yielded

    def _wait(self) -> None:
        """Waits for the next answer."""
        message = self._opening
        if message is not None:
            self._give_time(message)
            try:
                message.wait(message.deadline)
            except BaseException:
                self.close()  # an interrupt
                raise
            self._opened(message)
            return
        reply = self._next_reply()
        try:
            with inside.waiting():
                raw = reply.get(self._timeout)
            if self._take_items(raw):
                return
            opened = open_raw(raw)
            if opened.answer.kind == "parcel":
                opened = open_raw(self._link.fetch(opened.answer.text).get(self._timeout))
        except NoAnswer:
            self._late()
        except Down as down:
            self._lost(down)
        except BaseException:  # an interrupt: an item may be lost
            self.close()
            raise
        else:
            self._take(opened)

    # On an event loop

    def __aiter__(self) -> AsyncIterator[T_co]:
        return self

    async def __anext__(self) -> T_co:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            try:
                await self._wait_async()
            except BaseException:
                self.close()  # cancelled; else it is over anyway
                raise
        return self._next()  # type: ignore[no-any-return]  # as above

    async def _wait_async(self) -> None:
        message = self._opening
        if message is not None:
            self._give_time(message)
            if not message.finished:
                await message.told_to(asyncio.get_running_loop())
            self._opened(message)
            return
        reply = self._next_reply()
        try:
            raw = reply.get(0) if reply.done else await answer_of(reply, self._timeout)
            if self._take_items(raw):
                return
            opened = open_raw(raw)
            if opened.answer.kind == "parcel":
                opened = open_raw(await answer_of(self._link.fetch(opened.answer.text), self._timeout))
        except NoAnswer:
            self._late()
        except Down as down:
            self._lost(down)
        else:
            self._take(opened)

    # Its end

    def close(self) -> None:
        """Closes the generator. Items that have arrived are dropped."""
        self._items.clear()
        if self._ended:
            return
        self._ended = True
        self._drop_pulls()
        if self._opening is not None:
            self._opening.take_back()
        else:
            self._message.withdraw()

    async def aclose(self) -> None:
        """As `close`, which does not wait; for `contextlib.aclosing`."""
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            replies = [reply for reply, _ in self._pulls]
            self._message.lane.client.courier.post(_close, self._opening, self._message, replies)  # not here: the collector runs anywhere

    def _drop_pulls(self) -> None:
        for reply, _ in self._pulls:
            reply.forget()
        self._pulls.clear()
        self._credit = 0

    # Answers

    def _opened(self, message: Pending) -> None:
        self._opening = None
        outcome = message.outcome
        if isinstance(outcome, Opened) and message.link is not None:
            self._pulls.append([message.reply, 1])
            self._credit = 1
            self._take(outcome)
        else:
            self._ended = True
            self._message.withdraw()  # it may only be the first item that did not come
            message.value()  # raises

    def _take_items(self, raw: Raw) -> bool:
        """Takes small items, as most are. False if it is another answer."""
        items = wire.decode_items(raw.message)
        if not items or raw.extra:
            return False
        self._items.extend([(item, ()) for item in items])
        self._came(len(items))
        return True

    def _take(self, opened: Opened) -> None:
        answer, body, extra = opened
        if answer.kind == "item":
            self._items.append((body, extra))
            self._came(1)
        elif answer.kind == "later":
            self._give_up_pull()
            self._pull()
        elif answer.kind == "moved":
            self._lost(None)
        else:
            self._ended = True
            self._drop_pulls()
            if answer.kind != "end":
                self._message.withdraw()  # it may only be an item that did not come
                value_of(opened, self._name, self._message.method)  # raises

    def _next(self) -> Any:
        body, extra = self._items.popleft()
        self._pull()
        try:
            return payload.unpack(body, extra)
        except Exception as error:
            text = f"an item of {self._message.method!r} of bird {self._name!r} cannot be unpickled here ({type(error).__name__}: {error})"
            raise errors.RemoteError(text, self._name) from error

    def _pull(self) -> None:
        """Asks for more, if there is room for it."""
        if self._ended or len(self._items) + self._credit > WINDOW - AT_A_TIME:
            return
        message, link = self._message, self._link
        items = AT_A_TIME if link.path != "ray" else 1
        if self._head is None:
            self._head = wire.encode(wire.Pull(message.caller, message.order, items))
        for _ in range(AT_A_TIME // items):
            self._pulls.append([link.pull(wire.encode_call(self._head, self._pulled, b""), items), items])
            self._pulled += 1
        self._credit += AT_A_TIME

    def _next_reply(self) -> Reply:
        """Where the next items come from."""
        reply: Reply = self._pulls[0][0]
        return reply

    def _came(self, items: int) -> None:
        """The first pull has brought some."""
        first = self._pulls[0]
        first[1] -= items
        self._credit -= items
        if not first[1]:
            self._pulls.popleft()

    def _give_up_pull(self) -> None:
        """The first pull brings no more."""
        reply, left = self._pulls.popleft()
        reply.forget()
        self._credit -= left

    def _late(self) -> NoReturn:
        self.close()
        seconds = f"{self._timeout:g} s"
        raise errors.CallTimeout(f"no item of {self._message.method!r} of bird {self._name!r} within {seconds}; it is closed", self._name)

    def _lost(self, down: Down | None) -> NoReturn:
        self._ended = True
        self._drop_pulls()
        self._message.withdraw()
        text = f"bird {self._name!r} moved, restarted or went away in the middle of {self._message.method!r}: the rest will not come"
        raise errors.BirdUnavailable(f"{text}; call again for a new stream", self._name) from down

    # What it knows

    @property
    def _name(self) -> Any:
        return self._message.lane.name

    @property
    def _link(self) -> Link:
        link = self._message.link
        if link is None:
            raise RuntimeError("a stream that was not sent has no link")
        return link

    @property
    def _timeout(self) -> float | None:
        timeout = self._message.timeout
        return timeout if isinstance(timeout, float | int) else None

    def _give_time(self, message: Pending) -> None:
        """Its timeout counts from when an item is waited for."""
        if message.deadline != FOREVER and self._timeout is not None and not message.finished:
            message.deadline = max(message.deadline, message.lane.client.clock() + self._timeout)


def _close(opening: Pending | None, message: Pending, replies: list[Reply]) -> None:
    for reply in replies:
        reply.forget()
    if opening is not None:
        opening.take_back()
    else:
        message.withdraw()
