"""Handles: `Bird`, which names a bird, and `Method`, which names one of its methods.

Rules kept here: a bird's only public attribute is `name`; every other one is a method of the bird. A handle is a few values, picklable,
and works wherever it is sent (C3). Settings of a call (`options`, `cast`, `future`, `stream`, `aio`) never mix with the
method's own keywords.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from flock_ray.config import check_known
from flock_ray.runtime.client import DEFAULT, client_of
from flock_ray.runtime.pending import Default
from flock_ray.runtime.streams import Stream
from flock_ray.specs import Dot, Name

T_co = TypeVar("T_co", covariant=True)


class Bird(Generic[T_co]):
    """A handle of a named bird. `bird.method(...)` calls it; `bird.method` has `cast`, `future`, `stream`, `aio` and `options`.

    Two handles are equal if they name the same bird of the same flock. A method called `name` is reached by
    `flock_ray.call(bird, "name")`.
    """

    __slots__ = ("_dot", "_flock", "_methods", "_name")

    def __init__(self, flock: str, name: Name, dot: Dot | None = None, methods: Iterable[str] = ()) -> None:
        self._flock = flock
        self._name = name
        self._dot = dot
        self._methods = tuple(methods)

    @property
    def name(self) -> Any:
        """The bird's name."""
        return self._name

    def __getattr__(self, method: str) -> Method:
        check_method(method, self._name)
        return Method(self, method)

    def __repr__(self) -> str:
        return f"Bird({self._name!r})" if self._flock == "default" else f"Bird({self._name!r}, flock={self._flock!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bird):
            return NotImplemented
        return (self._flock, self._name) == (other._flock, other._name)

    def __hash__(self) -> int:
        return hash((self._flock, self._name))

    def __dir__(self) -> list[str]:
        return sorted(["name", *self._methods])

    def __reduce__(self) -> tuple[Any, ...]:
        return (Bird, (self._flock, self._name, self._dot, self._methods))


class Method:
    """A method of a bird. Calling it waits for the result, as `flock_ray.call` does."""

    __slots__ = ("__name__", "_bird", "_retry", "_timeout")

    def __init__(self, bird: Bird[Any], name: str, timeout: float | Default | None = DEFAULT, retry: bool = False) -> None:
        self._bird = bird
        self.__name__ = name
        self._timeout = timeout
        self._retry = retry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method and waits for its result.

        Args:
            args, kwargs: the method's own. They arrive as copies; a top-level `ObjectRef` as its value.

        Returns:
            What the method returned.

        Raises:
            Exception: as `flock_ray.call`.
        """
        bird = self._bird
        return client_of(bird._flock).call(bird._name, bird._dot, self.__name__, args, kwargs, self._timeout, self._retry)

    def cast(self, *args: Any, **kwargs: Any) -> None:
        """Sends the message and forgets it: never waits, and nobody hears of what becomes of it.

        Raises:
            MailboxFull: too many messages of this caller to the bird are unanswered.
            TypeError: an argument cannot be pickled.
        """
        bird = self._bird
        client_of(bird._flock).cast(bird._name, bird._dot, self.__name__, args, kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Sends the call and returns at once.

        Returns:
            The future of its result; `cancel()` takes the call back if its method has not begun. It works with
            `concurrent.futures.wait` and `asyncio.wrap_future`.

        Raises:
            MailboxFull: too many messages of this caller to the bird are unanswered.
            TypeError: an argument cannot be pickled.
        """
        bird = self._bird
        return client_of(bird._flock).future(bird._name, bird._dot, self.__name__, args, kwargs, self._timeout, self._retry)

    def stream(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Calls a generator method.

        Returns:
            An iterator, and async iterator, over what it yields; at most 16 items are made ahead of who reads them. The timeout is for
            each item. Closing it closes the generator.

        Raises:
            TypeError: an argument cannot be pickled. All else is raised while it is read.
        """
        bird = self._bird
        return client_of(bird._flock).stream(bird._name, bird._dot, self.__name__, args, kwargs, self._timeout, self._retry)

    async def aio(self, *args: Any, **kwargs: Any) -> Any:
        """As calling the method, on any event loop. To cancel it takes the call back, also a running `async def` method."""
        bird = self._bird
        return await client_of(bird._flock).aio(bird._name, bird._dot, self.__name__, args, kwargs, self._timeout, self._retry)

    def options(self, **given: Any) -> Method:
        """The same method, called with other settings.

        Args:
            given: `timeout`: seconds a call waits for its result; `None` waits for ever; the flock's `call_timeout` if not given.
                `retry`: True sends a call again that may have run, because the bird's host went away; it may then run twice.

        Raises:
            TypeError: a setting is unknown or impossible.
        """
        check_known("setting of a call", given, ["timeout", "retry"])
        retry = given.get("retry", self._retry)
        if not isinstance(retry, bool):
            raise TypeError(f"retry must be True or False, not {retry!r}")
        return Method(self._bird, self.__name__, check_timeout(given.get("timeout", self._timeout)), retry)

    def __repr__(self) -> str:
        return f"<method {self.__name__!r} of {self._bird!r}>"


def check_timeout(timeout: Any) -> float | Default | None:
    """Refuses what is no timeout: seconds of at least 0, or `None`."""
    if timeout is None or timeout is DEFAULT:
        return timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise TypeError(f"timeout must be seconds of at least 0, or None to wait for ever, not {timeout!r}")
    return None if timeout == float("inf") else float(timeout)


def check_method(method: str, name: Name | None) -> None:
    """Refuses private methods, here and at once."""
    if method.startswith("_"):
        raise AttributeError(f"{method!r} of bird {name!r} is private: a bird is called by its public methods")
