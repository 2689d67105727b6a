"""Classes that the cluster tests start. Workers import this module through the driver's path, which a spec carries along (V3)."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, Generic, TypeVar

import ray

import flock_ray

T = TypeVar("T")


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.n = start

    def add(self, k: int = 1) -> int:
        self.n += k
        return self.n

    def get(self) -> int:
        return self.n

    def pid(self) -> int:
        return os.getpid()

    def boom(self, text: str = "boom") -> None:
        raise ValueError(text)

    def die(self) -> None:
        os._exit(1)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def unpicklable(self) -> Any:
        return (i for i in range(3))

    def odd_error(self) -> None:
        class Local(Exception):
            def __reduce__(self) -> Any:
                raise TypeError("never")

        raise Local("cannot travel")

    def where(self) -> str:
        return flock_ray.me().node_id

    def retire(self) -> None:
        flock_ray.leave("normal", reply="bye")

    def hand_over(self) -> int:
        return self.n

    def take_over(self, n: int) -> None:
        self.n = n


class Holder:
    """Takes any arguments."""

    def __init__(self, *args, **kwargs):
        self.given = (args, kwargs)


class Forgetful(Counter):
    hand_over = None  # type: ignore[assignment]  # it starts afresh wherever it goes
    take_over = None  # type: ignore[assignment]  # the same


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: int) -> None:
        self.x = x

    def double(self) -> int:
        return 2 * self.x


class Box(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value

    def get(self) -> T:
        return self.value


@ray.remote
class Decorated:
    def __init__(self) -> None:
        self.n = 7

    def get(self) -> int:
        return self.n


class Async:
    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0

    async def nap(self, seconds: float) -> int:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(seconds)
        self.waiting -= 1
        return self.most

    def sync(self) -> str:
        return "sync"

    async def call_sync(self, name: str) -> Any:
        return flock_ray.call(name, "get")

    async def call_aio(self, name: str) -> Any:
        return await flock_ray.aio.call(name, "get")


class Caller:
    """Calls others, as a bird."""

    def call(self, name: str, method: str, *args: Any) -> Any:
        return flock_ray.call(name, method, *args)

    def start(self, name: str) -> None:
        flock_ray.start(name, Counter, 3)

    def echo(self) -> str:
        return "echo"


class Ticker:
    def __init__(self) -> None:
        self.ticks = 0
        flock_ray.send_every(0.05, "tick")
        flock_ray.send_after(0.01, "once", 100)

    def tick(self) -> None:
        self.ticks += 1

    def once(self, k: int) -> None:
        self.ticks += k

    def seen(self) -> int:
        return self.ticks


class Unborn:
    def __init__(self) -> None:
        raise RuntimeError("no egg")


class Stuck:
    def __init__(self) -> None:
        time.sleep(3600)


class Witness:
    """Writes what happens to it to a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.write("init")

    def write(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(text + "\n")

    def forever(self) -> None:
        time.sleep(3600)

    def on_stop(self, reason: str) -> None:
        self.write(f"on_stop {reason}")


class SlowToStop:
    def __init__(self, path: str) -> None:
        self.path = path

    def on_stop(self, reason: str) -> None:
        with open(self.path, "w") as file:
            file.write(reason)
        time.sleep(3)
