"""`Flock`: everything that can be done with the birds of one flock; and the functions of `flock_ray`, which do it with the current one.

Rules kept here: a `Flock` is a name and nothing else; what it needs is found, and kept, by this process's client. The functions of the
package are methods of one `Flock` whose name is looked up at each call: the bird's own flock inside a bird, else the one given to
`init`, else the environment variable `FLOCK_RAY_FLOCK`, else `"default"`. Wherever a name is taken, a `Bird` is too, and then it is
that bird's flock that is meant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from flock_ray.api.batches import Batches
from flock_ray.api.bird import Bird, check_timeout
from flock_ray.api.coroutines import AioFlock
from flock_ray.api.options import check
from flock_ray.api.options import defaults as defaults_of
from flock_ray.config import Config
from flock_ray.runtime import inside
from flock_ray.runtime.client import DEFAULT, client_of, let_go
from flock_ray.runtime.pending import Default
from flock_ray.specs import BirdInfo, BirdStack, Explanation, Name, NestInfo, check_name

if TYPE_CHECKING:
    from ray.actor import ActorClass

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

State = Literal["pending", "starting", "running", "moving", "restarting", "failed"]


class Flock(Batches):
    """A flock by its name. Picklable; two of the same name are equal; it has no processes and holds no connections of its own.

    Args:
        name: not empty. Birds of different flocks never meet, and may have the same names.
    """

    def __repr__(self) -> str:
        return f"Flock({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return self.name == other.name if isinstance(other, Flock) else NotImplemented

    def __hash__(self) -> int:
        return hash(("flock_ray.Flock", self.name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Flock, (self._name,))

    @property
    def aio(self) -> AioFlock:
        """The same functions as coroutines, for any event loop."""
        return AioFlock(self._name)

    def init(self, **config: Any) -> None:
        """Brings the flock up: a nest on every node. Optional: the first `start` does it with the defaults.

        Args:
            config: settings, the fields of `flock_ray.Config`. They are fixed for the flock's life.

        Raises:
            FlockNotRunning: Ray is not initialised, or the flock is just being destroyed: call `ray.init`, or try again.
            TypeError: a setting is unknown.
            ValueError: a setting is impossible, or the flock runs with another: `destroy` it first, or leave the setting out.
        """
        Config().with_settings(**config)
        client = client_of(self.name)
        client.courier.run(client.asks.ensure(config))

    @overload
    def start(self, name: Name, cls: ActorClass[T], /, *args: Any, **kwargs: Any) -> Bird[T]: ...
    @overload
    def start(self, name: Name, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Bird[T]: ...
    def start(self, name: Name, cls: Any, /, *args: Any, **kwargs: Any) -> Bird[Any]:
        """Starts a bird: returns when the local nest has accepted it, which then hatches where the flock decides.

        Args:
            name: a `str`, `int`, `bytes`, `uuid.UUID` or a tuple of these, unique in the flock.
            cls: any class, also one decorated by `@ray.remote`; options are given by `flock_ray.options(...)` or `@defaults`.
            args, kwargs: for `cls`. They are kept on every node: no ObjectRefs, and 1 MB at most (`start_argument_limit`).

        Returns:
            A handle. A call waits for the bird to run; so does `wait`.

        Raises:
            BirdExists: the name is taken: stop it first, or use `options(if_exists="ok")`.
            FlockNotRunning: Ray is not initialised.
            TypeError: the name, the class, or an argument is impossible; says which and why.
            ValueError: the arguments are too large; names the largest.
        """
        return self._start_with({}, name, cls, args, kwargs)

    def _start_with(self, given: Mapping[str, Any], name: object, cls: object, args: Any, kwargs: Any) -> Bird[Any]:
        client, plain = self._begin(name, cls, given)
        config = client.courier.run(client.asks.ensure({}))
        spec, code = self._spec(plain, cls, args, kwargs, given, config)
        dot = client.courier.run(self._started(client, plain, spec, code))
        return self._handle(client, plain, dot, cls)

    def options(self, **given: Any) -> Starter:
        """Options for a start: `options(num_cpus=1).start(name, cls, ...)`.

        Args:
            given: DESIGN's table of options: `restart`, `max_restarts`, `healthy_after`, `on_error`, `if_exists`, `ack`, `moves`,
                `start_timeout`, `stop_timeout`, `max_concurrency`, and Ray's `num_cpus`, `num_gpus`, `memory`, `resources`,
                `accelerator_type`, `label_selector`, `runtime_env`. They go before `@defaults`, and those before `@ray.remote`'s.

        Raises:
            TypeError: an option is unknown or impossible.
        """
        return Starter(self, check(given))

    @overload
    def call(
        self, name: Bird[T], method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    def call(self, name: Bird[T], method: Callable[Concatenate[T, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def call(self, name: Name | Bird[Any], method: str, /, *args: Any, timeout: float | None = ..., **kwargs: Any) -> Any: ...
    @overload
    def call(
        self, name: Name, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    def call(self, name: Name, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def call(
        self, name: Name | Bird[Any], method: Callable[..., Coroutine[Any, Any, R]], /, *args: Any, timeout: float | None, **kwargs: Any
    ) -> R: ...
    @overload
    def call(self, name: Name | Bird[Any], method: Callable[..., R], /, *args: Any, timeout: float | None, **kwargs: Any) -> R: ...
    def call(self, name: Any, method: Any, /, *args: Any, timeout: Any = DEFAULT, **kwargs: Any) -> Any:
        """Calls a method of a bird and waits for its result; waits for a bird that is known but not running yet.

        Args:
            name: the bird's name, or a handle.
            method: its name, or `Class.method`, which type checkers check the arguments by.
            args, kwargs: the method's own; a method with a keyword `timeout` is called by a handle. They arrive as copies; a top-level
                `ObjectRef` as its value.
            timeout: seconds; `None` waits for ever; `call_timeout` of the flock (30 s) if not given. A method that runs goes on.

        Returns:
            What the method returned.

        Raises:
            Exception: what the method raised, with the remote traceback as its cause; `RemoteError` if it cannot be unpickled here.
            AttributeError: there is no such public method.
            BirdNotFound: no nest knows the name: start it.
            BirdCrashed: it crashed too often, or could not be started: mend the cause and `restart` it.
            BirdUnavailable: its host went away meanwhile, so it may have run: call again if it can be repeated.
            CallCycle: the bird waits for this very call: use `cast`, or `async def` methods.
            CallTimeout: no answer in time; the cause is the bird's last error, if it is restarting.
            FlockNotRunning: Ray or the flock is not up.
            RuntimeError: called in an `async def` method of a bird: await `flock_ray.aio.call`.
            TypeError: an argument cannot be pickled; names which.
        """
        client, plain, dot, text = self._call_target(name, method)
        return client.call(plain, dot, text, args, kwargs, timeout if timeout is DEFAULT else check_timeout(timeout), False)

    @overload
    def cast(self, name: Bird[T], method: Callable[Concatenate[T, P], Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def cast(self, name: Name | Bird[Any], method: str, /, *args: Any, **kwargs: Any) -> None: ...
    @overload
    def cast(self, name: Name, method: Callable[Concatenate[Any, P], Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    def cast(self, name: Any, method: Any, /, *args: Any, **kwargs: Any) -> None:
        """Sends a message and forgets it: in order with the caller's other messages to the bird; never waits.

        Args:
            name, method, args, kwargs: as `call`.

        Raises:
            FlockNotRunning: Ray is not initialised.
            MailboxFull: too many messages of this caller to the bird are unanswered: slow down.
            TypeError: an argument cannot be pickled; names which.
        """
        client, plain, dot, text = self._call_target(name, method)
        client.cast(plain, dot, text, args, kwargs)

    def stop(self, name: Name | Bird[Any]) -> None:
        """Stops a bird for good: it ends in good order, wherever it is. Returns when the nest has removed it; `wait` for "gone".

        Raises:
            BirdNotFound: no nest knows the name.
            CallTimeout: no nest has answered: try again.
        """
        client_of(self.name).courier.run(self._stop(name))

    def restart(self, name: Name | Bird[Any]) -> None:
        """Gives a bird a new life in place, with fresh state; revives a failed one. Returns when that is under way.

        Raises:
            BirdNotFound: no nest knows the name.
            CallTimeout: no nest has answered: try again.
        """
        client_of(self.name).courier.run(self._restart(name))

    def wait(
        self,
        names: Name | Bird[Any] | Iterable[Name | Bird[Any]],
        state: Literal["running", "gone"] = "running",
        timeout: float | Default | None = DEFAULT,
    ) -> None:
        """Waits until birds run, or are gone.

        Args:
            names: one name or handle, or several in a list, set or generator; a tuple of names is one name.
            state: `"running"` or `"gone"`.
            timeout: seconds for all of them; `None` waits for ever; `call_timeout` of the flock (30 s) if not given.

        Raises:
            BirdCrashed: one has failed, with the error of its `__init__`.
            BirdNotFound: one that should run is unknown.
            CallTimeout: it is not so in time; says what state the bird is in.
            RuntimeError: called in an `async def` method of a bird: await `flock_ray.aio.wait`.
        """
        if inside.in_async_method():
            raise RuntimeError("waiting here would stop this bird's event loop; in an async def method, await flock_ray.aio.wait(...)")
        client_of(self.name).courier.run(self._wait(names, state, timeout))

    def alive(self, name: Name | Bird[Any]) -> bool:
        """Is the name known to the flock, in whatever state? The other nests are asked before the answer is no."""
        return client_of(self.name).courier.run(self._info(name)) is not None

    def where(self, name: Name | Bird[Any]) -> str | None:
        """The id of the Ray node that holds the bird, or that should; `None` if none can.

        Raises:
            BirdNotFound: no nest knows the name.
        """
        return client_of(self.name).courier.run(self._known_info(name)).node_id

    def bird(self, name: Name | Bird[Any]) -> Bird[Any]:
        """A handle of a bird, whether it is there or not.

        Raises:
            TypeError: it is no name.
        """
        if isinstance(name, Bird):
            return name
        check_name(name)
        return Bird(self.name, name)

    def birds(
        self,
        *,
        state: State | None = None,
        node: str | None = None,
        prefix: str | tuple[Any, ...] | None = None,
        of: Any = None,
    ) -> list[BirdInfo]:
        """The birds of the flock, as the local nest's replica has them.

        Args:
            state: only those in this state.
            node: only those on this Ray node (its id).
            prefix: only those whose name begins with this text; or, a tuple, whose name is a tuple that begins with these.
            of: only those of this class.

        Raises:
            FlockNotRunning: Ray or the flock is not up.
        """
        return client_of(self.name).courier.run(self._birds(state, node, prefix, of))

    def info(self, name: Name | Bird[Any]) -> BirdInfo:
        """What is known of a bird: state, node, incarnation, restarts, last error, why it is pending.

        Raises:
            BirdNotFound: no nest knows the name.
        """
        return client_of(self.name).courier.run(self._known_info(name))

    def explain(self, name: Name | Bird[Any]) -> Explanation:
        """Why a bird is where it is, or why it is pending: the preference list, who holds it, and what stands against a move or a start.

        The nest that owns it is asked, and where it does not answer the local one says what it knows.

        Raises:
            BirdNotFound: no nest knows the name.
        """
        return client_of(self.name).courier.run(self._explain(name))

    def stack(self, name: Name | Bird[Any]) -> BirdStack:
        """What a bird does right now: its methods under way, for how long and where in their code, and how many messages wait.

        The method is not disturbed, and need not return.

        Raises:
            BirdNotFound: no nest knows the name.
            BirdUnavailable: nothing of it runs now, or its process does not answer; says which. Look at `explain`, or ask again.
        """
        return client_of(self.name).courier.run(self._stack(name))

    def count(self) -> int:
        """How many birds the flock has, in whatever state."""
        return client_of(self.name).courier.run(self._count())

    def nests(self) -> list[NestInfo]:
        """The nests that the local nest counts as alive: node, address, weight, birds held, share of the ring."""
        return client_of(self.name).courier.run(self._nests())

    # Many at once

    def start_many(self, birds: Iterable[Any], *, return_exceptions: bool = False, progress: bool = False) -> list[Bird[Any]]:
        """Starts many birds: as `start` for each, in a message for each thousand. With options: `options(light=True).start_many(...)`.

        Args:
            birds: `(name, cls, args, kwargs)` for each; `args` (a tuple) and `kwargs` (a dict) may be left out.
            return_exceptions: the error of one that is not accepted takes its place in the list, instead of being raised when all others
                have been answered.
            progress: shows a bar on the terminal, with rich.

        Returns:
            Their handles, in order.

        Raises:
            TypeError: an item is of another form, or as `start`: nothing has been started if it is about an item's form or class.
            Exception: as `start`: the first, in order.
        """
        return self._start_many({}, birds, return_exceptions, progress)

    def call_many(
        self,
        calls: Iterable[Any],
        *,
        timeout: float | Default | None = DEFAULT,
        retry: bool = False,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """Calls many birds at once, and waits for all: as `call` for each. Calls of light birds go together, hundreds in a message.

        Args:
            calls: `(name, method, args, kwargs)` for each, `args` and `kwargs` may be left out. A bird may be called more than once: its
                calls begin in order.
            timeout: seconds for all of them; as `call`.
            retry: a call whose host went away in the middle is made again, though it may have run.
            return_exceptions, progress: as `start_many`.

        Returns:
            The results, in order.

        Raises:
            TypeError: an item is of another form.
            Exception: what the first failed one raised, in order, when all others have ended; see `call`.
        """
        return self._call_many(calls, timeout, retry, return_exceptions, progress)

    def cast_many(self, casts: Iterable[Any], *, progress: bool = False) -> None:
        """Casts to many birds, and returns when their hosts have taken the messages: as `cast` for each.

        Args:
            casts, progress: as `call_many`.

        Raises:
            TypeError: an item is of another form.
            MailboxFull: of one; the others have been sent.
        """
        self._cast_many(casts, progress)

    def stop_many(self, names: Iterable[Name | Bird[Any]], *, return_exceptions: bool = False, progress: bool = False) -> list[None]:
        """Stops many birds: as `stop` for each, in a message for each thousand.

        Args:
            return_exceptions, progress: as `start_many`.

        Raises:
            BirdNotFound: one was not known; the others have been stopped.
        """
        return self._stop_many(names, return_exceptions, progress)

    def ask_all(
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
        """Calls one method of all birds of a class, or whose names begin alike.

        Args:
            method: its name, or `Class.method`.
            args, kwargs: its arguments.
            of, prefix: which birds, as `birds` has them; of both, those that match both; of neither, all.
            timeout, return_exceptions, progress: as `call_many`.

        Returns:
            The result of each by its name, as the local nest knew them when it was asked.

        Raises:
            Exception: as `call_many`.
        """
        return self._ask_all(method, args, kwargs, of, prefix, timeout, return_exceptions, progress)

    def shutdown(self) -> None:
        """This process lets go of the flock: waits 1 s at most for casts to be delivered, and drops what it keeps. Birds live on."""
        let_go(self.name)

    def destroy(self) -> None:
        """Ends the whole flock, cluster-wide and for good: every bird and nest. The next `init` or `start` is a new flock.

        Raises:
            FlockNotRunning: Ray is not initialised, or there is no such flock.
        """
        client = client_of(self.name)
        client.courier.run(self._destroy(client))


class Starter:
    """`start`, with options."""

    def __init__(self, flock: Flock, given: Mapping[str, Any]) -> None:
        self._flock = flock
        self._given = given

    @overload
    def start(self, name: Name, cls: ActorClass[T], /, *args: Any, **kwargs: Any) -> Bird[T]: ...
    @overload
    def start(self, name: Name, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Bird[T]: ...
    def start(self, name: Name, cls: Any, /, *args: Any, **kwargs: Any) -> Bird[Any]:
        """As `flock_ray.start`, with these options."""
        return self._flock._start_with(self._given, name, cls, args, kwargs)

    def start_many(self, birds: Iterable[Any], *, return_exceptions: bool = False, progress: bool = False) -> list[Bird[Any]]:
        """As `flock_ray.start_many`, with these options."""
        return self._flock._start_many(self._given, birds, return_exceptions, progress)

    def __repr__(self) -> str:
        return f"{self._flock!r}.options({', '.join(f'{key}={value!r}' for key, value in self._given.items())})"


# The current flock


class _Given:
    """What `init` was given last in this process."""

    flock: str | None = None


def _current_name() -> str:
    return inside.current_flock() or _Given.flock or os.environ.get("FLOCK_RAY_FLOCK") or "default"


class _CurrentFlock(Flock):
    """The flock that is current when a method is called."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def name(self) -> str:
        return _current_name()

    @property
    def aio(self) -> AioFlock:
        return _AIO

    def __repr__(self) -> str:
        return f"<the current flock, {self.name!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_current, ())


class _CurrentAioFlock(AioFlock):
    """The functions of `flock_ray` as coroutines, for any event loop."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def name(self) -> str:
        return _current_name()

    async def init(self, flock: str = "default", **config: Any) -> None:
        """As `flock_ray.init`."""
        await Flock(flock).aio.init(**config)
        _Given.flock = flock

    def __reduce__(self) -> tuple[Any, ...]:
        return (_current_aio, ())


def _current() -> Flock:
    return _CURRENT


def _current_aio() -> AioFlock:
    return _AIO


_CURRENT = _CurrentFlock()
_AIO = _CurrentAioFlock()


def init(flock: str = "default", **config: Any) -> None:
    """Brings a flock up, a nest on every node, and makes it this process's current one. Optional: the first `start` does the former.

    Args:
        flock: its name.
        config: settings, the fields of `flock_ray.Config`. They are fixed for the flock's life.

    Raises:
        FlockNotRunning: Ray is not initialised, or the flock is just being destroyed: call `ray.init`, or try again.
        TypeError: a setting is unknown.
        ValueError: a setting is impossible, or the flock runs with another: `destroy` it first, or leave the setting out.
    """
    Flock(flock).init(**config)
    _Given.flock = flock


aio = _AIO
defaults = defaults_of
start = _CURRENT.start
options = _CURRENT.options
call = _CURRENT.call
cast = _CURRENT.cast
start_many = _CURRENT.start_many
call_many = _CURRENT.call_many
cast_many = _CURRENT.cast_many
stop_many = _CURRENT.stop_many
ask_all = _CURRENT.ask_all
stream = _CURRENT.stream
events = _CURRENT.events
stop = _CURRENT.stop
restart = _CURRENT.restart
wait = _CURRENT.wait
alive = _CURRENT.alive
where = _CURRENT.where
bird = _CURRENT.bird
birds = _CURRENT.birds
info = _CURRENT.info
explain = _CURRENT.explain
stack = _CURRENT.stack
count = _CURRENT.count
nests = _CURRENT.nests
shutdown = _CURRENT.shutdown
destroy = _CURRENT.destroy
