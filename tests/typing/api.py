"""Pins the types of the public API: mypy --strict and pyright check this file, nothing runs it.

Each line marked `type: ignore[...]` must be an error: mypy reports an ignore that is not needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar, assert_type

import ray

import flock_ray
from flock_ray import Bird, BirdInfo, BirdStack, Explanation, Feed, Flock, Method, NestInfo, Timer, notices

T = TypeVar("T")


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.n = start

    def add(self, k: int = 1, *, twice: bool = False) -> int:
        self.n += k * (1 + twice)
        return self.n

    async def slow(self, text: str) -> str:
        await asyncio.sleep(0)
        return text

    def tick(self) -> None:
        assert_type(flock_ray.send_after(1.0, "tick"), Timer)
        assert_type(flock_ray.send_every(1.0, self.add, 2), Timer)
        assert_type(flock_ray.me().incarnation, int)
        flock_ray.leave()


class Louder(Counter):
    pass


Remote = ray.remote(Counter)


class Box(Generic[T]):
    def __init__(self, content: T) -> None:
        self.content = content

    def get(self) -> T:
        return self.content


@flock_ray.defaults(max_restarts=3)
class Decorated:
    def hello(self, name: str) -> str:
        return name


def starting() -> None:
    assert_type(flock_ray.init("default", call_timeout=10.0), None)
    assert_type(flock_ray.start("a", Counter), Bird[Counter])
    assert_type(flock_ray.start(("a", 1), Counter, 10), Bird[Counter])
    assert_type(flock_ray.start(b"a", Counter, start=10), Bird[Counter])
    assert_type(flock_ray.start("a", Box[str], "x"), Bird[Box[str]])
    assert_type(flock_ray.start("a", Decorated), Bird[Decorated])
    assert_type(flock_ray.start("a", Remote, 10), Bird[Counter])
    assert_type(flock_ray.options(num_cpus=1).start("a", Counter, 10), Bird[Counter])
    assert_type(Flock("x").start("a", Counter, 10), Bird[Counter])
    assert_type(Flock("x").options(if_exists="ok").start("a", Counter), Bird[Counter])
    flock_ray.start(1.5, Counter)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flock_ray.start("a", Counter, "ten")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flock_ray.start("a", Counter, strat=10)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def calling(bird: Bird[Counter], louder: Bird[Louder], box: Bird[Box[str]]) -> None:
    assert_type(flock_ray.call(bird, Counter.add, 5), int)
    assert_type(flock_ray.call(bird, Counter.add, 5, twice=True), int)
    assert_type(flock_ray.call(bird, Counter.slow, "x"), str)
    assert_type(flock_ray.call(louder, Counter.add), int)
    assert_type(flock_ray.call(box, Box[str].get), str)
    assert_type(flock_ray.call("a", Counter.add, 5), int)
    assert_type(flock_ray.call("a", Counter.slow, "x"), str)
    assert_type(flock_ray.call(bird, Counter.add, 5, timeout=3.0), int)
    assert_type(flock_ray.call("a", "add", 5, timeout=None), Any)
    assert_type(flock_ray.call(bird, "add", 5), Any)
    assert_type(flock_ray.cast(bird, Counter.add, 5), None)
    assert_type(flock_ray.cast("a", "add", 5), None)
    assert_type(Flock("x").call(bird, Counter.add, 5), int)
    flock_ray.call(bird, Counter.add, "five")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flock_ray.call(bird, Box[str].get)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flock_ray.cast(bird, Counter.add, "five")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def covariant(bird: Bird[object]) -> None:
    assert_type(bird, Bird[object])


def handles(bird: Bird[Counter]) -> None:
    assert_type(bird.name, Any)
    assert_type(bird.add, Method)
    assert_type(bird.add(5), Any)
    assert_type(bird.add.cast(5), None)
    assert_type(bird.add.future(5), Future[Any])
    assert_type(bird.add.options(timeout=60, retry=True), Method)
    covariant(bird)


def looking() -> None:
    assert_type(flock_ray.stop("a"), None)
    assert_type(flock_ray.restart("a"), None)
    assert_type(flock_ray.wait(["a", ("b", 1)], "gone", timeout=3), None)
    assert_type(flock_ray.alive("a"), bool)
    assert_type(flock_ray.where("a"), str | None)
    assert_type(flock_ray.bird("a"), Bird[Any])
    assert_type(flock_ray.birds(state="failed", of=Counter), list[BirdInfo])
    assert_type(flock_ray.info("a"), BirdInfo)
    assert_type(flock_ray.explain("a"), Explanation)
    assert_type(flock_ray.stack("a"), BirdStack)
    assert_type(flock_ray.count(), int)
    assert_type(flock_ray.nests(), list[NestInfo])
    assert_type(next(flock_ray.events()), notices.Notice)
    assert_type(flock_ray.events(follow=False, since=1.0, kinds=notices.BirdCrashed), Feed[notices.BirdCrashed | notices.Missed])
    flock_ray.events(kinds=Counter)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert_type(flock_ray.shutdown(), None)
    assert_type(flock_ray.destroy(), None)
    flock_ray.wait("a", "away")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def awaiting(bird: Bird[Counter]) -> None:
    assert_type(await flock_ray.aio.start("a", Counter, 10), Bird[Counter])
    assert_type(await flock_ray.aio.options(ack="peer").start("a", Counter, 10), Bird[Counter])
    assert_type(await flock_ray.aio.call(bird, Counter.add, 5), int)
    assert_type(await flock_ray.aio.call(bird, Counter.slow, "x"), str)
    assert_type(await flock_ray.aio.call("a", "add", 5), Any)
    assert_type(await flock_ray.aio.cast(bird, Counter.add, 5), None)
    assert_type(await flock_ray.aio.wait("a"), None)
    assert_type(await flock_ray.aio.info("a"), BirdInfo)
    assert_type(await Flock("x").aio.count(), int)
    async for notice in flock_ray.aio.events():
        assert_type(notice, notices.Notice)
    assert_type(await bird.add.aio(5), Any)


# a decorator of methods keeps what `call` checks
def logged(method: Callable[[Counter, int], int]) -> Callable[[Counter, int], int]:
    return method


def decorated_method(bird: Bird[Counter], method: Callable[[Counter, int], int]) -> None:
    assert_type(flock_ray.call(bird, logged(method), 5), int)
