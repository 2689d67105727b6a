"""Virtual time: an event loop whose clock jumps to what is due next, and threads that run one at a time.

    the test's thread, methods of birds: strands  <--- the turn --->  the loop's thread: nests, the network, async birds

Rules kept here: exactly one thread runs at any moment, the loop's or the strand that it has given the turn. So nothing needs a lock, and
one run is like the other. Time stands still while a strand runs. It passes when all of them wait: no sooner than the next thing is due, and
then at once. What runs in a process that was killed never gets the turn again, until the test is over and it is unwound.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NoReturn, Protocol

LONGEST = 86_400.0  # virtual seconds for which a test may wait for what has no timeout: a day takes some seconds
UNWINDING = 60.0  # virtual seconds that a coroutine of the test's has to end when it is cancelled
PATIENCE = 10.0  # real seconds for the loop's thread to end


class Ended(BaseException):
    """Unwinds what still waits when the flock of a test ends. No `Exception`, lest a bird's own handlers stop it."""


class Home(Protocol):
    """A process of the simulated cluster."""

    dead: bool
    tasks: set[asyncio.Task[Any]]


#: The process whose code runs; `None` in the test's own, and in nests.
here: contextvars.ContextVar[Home | None] = contextvars.ContextVar("flock_ray_testing_here", default=None)


class Strand:
    """A thread that runs only while the loop waits for it."""

    def __init__(self, loop: VirtualLoop, home: Home | None = None) -> None:
        self.loop = loop
        self.home = home
        self.ident = threading.get_ident()
        self.ended = False  # what waits in it is to be unwound
        self.is_over = False
        self.work: Callable[[], object] | None = None
        self._turn, self._back = _closed(), _closed()

    def start(self) -> None:
        threading.Thread(target=self._run, name="flock_ray strand", daemon=True).start()

    def _run(self) -> None:
        self.ident = threading.get_ident()
        self._turn.acquire()
        while self.work is not None:
            try:
                self.work()
            except Ended:
                self.ended = True
            except BaseException as error:  # ours: what birds raise has been answered
                self.loop.fail(error)
            self.work = self.home = None
            if not self.ended:
                self.loop.idle.append(self)
            if self.ended:
                break
            self._back.release()
            self._turn.acquire()
        self.is_over = True
        self._back.release()

    def resume(self) -> None:
        """On the loop's thread: gives it the turn, until it waits or has ended."""
        loop = self.loop
        if self.is_over or loop.is_abandoned or (self.home is not None and self.home.dead and not self.ended):
            return
        loop.strand = self
        self._turn.release()
        self._back.acquire()
        loop.strand = None

    def pause(self) -> None:
        """On its own thread: gives the turn back, and waits for the next."""
        self._back.release()
        self._turn.acquire()
        if self.ended:
            raise Ended

    def leave(self) -> None:
        """Gives the turn back for good."""
        self._back.release()


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop, in a thread of its own, with a clock that begins at 0 and stands still while anything runs."""

    def __init__(self) -> None:
        super().__init__()
        self.strand: Strand | None = None  # who has the turn
        self.strands: list[Strand] = []
        self.idle: list[Strand] = []
        self.is_abandoned = False
        self._now = 0.0
        self._selector = self  # for `_run_once`, which asks it what has come, and for how long it may wait
        self._failures: list[BaseException] = []
        self._rouse: Callable[[], object] = _nobody  # wakes the test, for there is nothing to wait for
        self.set_task_factory(_task_at_home)
        self.set_exception_handler(self._callback_failed)
        self._driver = Strand(self)
        self._loop_thread = threading.Thread(target=self.run_forever, name="flock_ray virtual time", daemon=True)

    # What an event loop has to have

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Nothing ever comes from outside: time goes on to what is due next."""
        if timeout is None:
            self._rouse()  # nothing is due, nor will be
        elif timeout > 0:
            self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """It never sleeps, so it need not be woken."""

    def _check_thread(self) -> None:
        """Whoever has the turn may use it."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]  # any arguments
        """Runs what blocks as a strand, whatever the executor."""
        del executor
        future = self.create_future()

        def work() -> None:
            outcome, set_outcome = None, future.set_result
            try:
                outcome = func(*args)
            except Exception as error:  # the waiter's
                outcome, set_outcome = error, future.set_exception
            if not future.done():
                set_outcome(outcome)

        self.begin(work, contextvars.copy_context())
        return future

    def _no_network(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        text = "flock_ray.testing runs coroutines in virtual time, where there are no sockets, pipes or processes"
        raise RuntimeError(f"{text}: replace what uses them in the test")

    create_connection = create_server = create_datagram_endpoint = getaddrinfo = _no_network
    create_unix_connection = create_unix_server = subprocess_exec = subprocess_shell = _no_network
    connect_read_pipe = connect_write_pipe = _no_network
    sock_connect = sock_accept = sock_recv = sock_sendall = _no_network
    add_reader = add_writer = add_signal_handler = _no_network  # type: ignore[assignment]  # any arguments

    # Its thread

    def start(self) -> None:
        """Begins. Who calls it is the strand that drives: the test."""
        self.call_soon(self._driver.resume)
        self._loop_thread.start()
        self._driver._turn.acquire()

    def end(self) -> None:
        """Unwinds all that waits, and ends."""
        if self.is_abandoned:
            self.call_soon_threadsafe(self.stop)
        else:
            self.call_soon(self._unwind, context=contextvars.Context())
            self._driver.leave()
        self._loop_thread.join(PATIENCE)
        if not self._loop_thread.is_alive():
            self.close()

    def _unwind(self) -> None:
        for strand in self.strands:
            if strand.work is not None or strand in self.idle:
                strand.ended = True
                strand.resume()
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        self.call_later(UNWINDING, self.stop)
        asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: self.stop()) if tasks else self.stop()

    # For strands

    @property
    def is_here(self) -> bool:
        """Is this the loop's own thread?"""
        return threading.get_ident() == self._loop_thread.ident

    def check(self) -> Strand | None:
        """The strand that runs; `None` on the loop's own thread.

        Raises:
            RuntimeError: it is another thread, which has no turn.
        """
        strand = self.strand
        if strand is not None and strand.ident == threading.get_ident():
            if strand.ended:
                raise Ended
            return strand
        if self.is_here:
            return None
        text = "flock_ray.testing lets one thread run at a time: the test's own, or a bird's method"
        raise RuntimeError(f"{text}. Another thread cannot use its flock; in a coroutine, asyncio.to_thread works")

    def sleep(self, seconds: float) -> None:
        """Lets time pass, on a strand."""
        self.wait(lambda _: None, seconds)

    def wait(
        self, register: Callable[[Callable[[], object]], object], seconds: float | None = None, longest: float | None = LONGEST
    ) -> bool:
        """Waits on a strand, until what `register` is given is called, or time is over.

        Args:
            seconds: `None` if there is no timeout.
            longest: then the test is told, after so long, that it waits in vain; `None`: never.

        Returns:
            False if time is over.

        Raises:
            RuntimeError: this is the loop's own thread, which runs `async def` methods; or nothing would ever wake the test.
        """
        strand = self.check()
        if strand is None:
            raise RuntimeError("this would stop the event loop of flock_ray.testing: in a coroutine, await its namesake in flock_ray.aio")
        woken: list[bool | None] = []

        def wake(came: bool | None) -> None:
            if not woken:
                woken.append(came)
                self.call_soon(strand.resume, context=contextvars.Context())

        drives = strand is self._driver
        if drives:
            self._rouse = partial(wake, None)
        timer = None
        if seconds is not None:
            timer = self.call_later(seconds, wake, False)
        elif drives and longest is not None:
            timer = self.call_later(longest, wake, None)
        register(partial(wake, True))
        try:
            strand.pause()
        except BaseException:
            self.is_abandoned = drives  # an interrupt: the loop's thread runs on, without anybody to give the turn to
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if drives and self._failures:
            failures, self._failures = self._failures, []
            raise failures[0]
        if woken[0] is None:
            raise RuntimeError(f"the test waits for what does not come: not in {LONGEST:g} s of virtual time, or never")
        return woken[0]

    def wait_for(self, work: Coroutine[Any, Any, Any], longest: float | None = LONGEST) -> Any:
        """Runs a coroutine on the loop, and waits for it on a strand."""
        if self.check() is None:
            work.close()
            raise RuntimeError("this would stop the event loop of flock_ray.testing: in a coroutine, await its namesake in flock_ray.aio")
        task = self.create_task(work)
        try:
            self.wait(lambda wake: task.add_done_callback(lambda _: wake()), longest=longest)
        except BaseException:
            task.cancel()
            raise
        return task.result()

    def begin(self, work: Callable[[], object], context: contextvars.Context) -> None:
        """Has work done by a strand, in the next round."""
        self.call_soon(self._begin, work, context, context=contextvars.Context())

    def _begin(self, work: Callable[[], object], context: contextvars.Context) -> None:
        home = context.get(here)
        if home is not None and home.dead:
            return
        if self.idle:
            strand = self.idle.pop()
        else:
            strand = Strand(self)
            self.strands.append(strand)
            strand.start()
        strand.home, strand.work = home, partial(context.run, work)
        strand.resume()

    def fail(self, error: BaseException) -> None:
        """Something is broken that is not the test's: it hears of it as soon as it waits."""
        self._failures.append(error)
        self._rouse()

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "handle" in context and isinstance(error, BaseException):
            self.fail(error)
        else:
            self.default_exception_handler(context)
        del loop


class Gate:
    """What a strand waits at, as at a lock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._is_open = False
        self._wake: Callable[[], object] | None = None

    def release(self) -> None:
        self._is_open = True
        if self._wake is not None:
            self._wake()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        del blocking
        return self._is_open or self._loop.wait(lambda wake: setattr(self, "_wake", wake), None if timeout < 0 else timeout)


def _nobody() -> None:
    """Nobody waits."""


def _closed() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _task_at_home(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    """A task is of the process whose code makes it, and ends with that."""
    context = options.get("context")
    home = here.get() if context is None else context.get(here)
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
    if home is not None:
        home.tasks.add(task)
        task.add_done_callback(home.tasks.discard)
        if home.dead:
            task.cancel()
    return task


def kill_tasks(home: Home) -> None:
    """What a process ran as coroutines ends with it."""
    for task in tuple(home.tasks):
        with contextlib.suppress(RuntimeError):
            task.cancel()
