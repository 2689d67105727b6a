"""Threads that call birds again and again, and count what they are told."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Self

import flock_ray


class Callers:
    """Calls from its making to `end`.

    Args:
        groups: the birds of each thread, of which it calls one after the other, at random.
        method: with no argument, or where `tickets`, with a ticket that no other call has.
        timeout: of a call, in seconds.
        pace: seconds between two calls of a thread, half of it to one and a half.
        retry: a call may run twice.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Any]],
        method: str = "get",
        *,
        flock: str = "default",
        tickets: bool = False,
        timeout: float = 20.0,
        pace: float = 0.1,
        retry: bool = False,
    ) -> None:
        self.calls = 0
        self.failures: list[tuple[Any, str]] = []  # whose, and the error
        self.outcomes: Counter[str] = Counter()  # "answered", and the errors by type
        self.fates: dict[str, bool] = {}  # of each ticket: did the call report success?
        self.answered: dict[Any, list[float]] = defaultdict(list)  # when, by bird
        self.slowest: tuple[float, Any, float] = (0.0, None, 0.0)  # how long it took, whose, and when it began
        self._call = (method, timeout, retry)
        self._tickets, self._pace = tickets, pace
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(flock_ray.Flock(flock), group)) for group in groups]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, flock: flock_ray.Flock, group: Sequence[Any]) -> None:
        rng, me, made = random.Random(), uuid.uuid4().hex, 0
        method, timeout, retry = self._call
        while not self._over.wait(self._pace * rng.uniform(0.5, 1.5)):
            made += 1
            name, ticket = rng.choice(group), f"{me}.{made}"
            began = time.monotonic()
            try:
                call = getattr(flock.bird(name), method).options(timeout=timeout, retry=retry)
                call(ticket) if self._tickets else call()
                error = None
            except Exception as raised:
                error = raised
            self._note(name, ticket, began, error)

    def _note(self, name: Any, ticket: str, began: float, error: Exception | None) -> None:
        now = time.monotonic()
        with self._lock:
            self.calls += 1
            self.outcomes[type(error).__name__ if error is not None else "answered"] += 1
            self.slowest = max(self.slowest, (now - began, name, began), key=lambda one: one[0])
            if self._tickets:
                self.fates[ticket] = error is None
            if error is not None:
                self.failures.append((name, repr(error)))
            else:
                self.answered[name].append(now)

    def __str__(self) -> str:
        return f"{self.calls} calls, {len(self.failures)} failures, the slowest {self.slowest[0] * 1000:.0f} ms"
