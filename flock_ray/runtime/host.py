"""The process in which a bird runs: a Ray actor, made by the nest of its node, that takes orders from nests and calls from callers.

    nest --HatchOrder, EndOrder, ...--> Host --HostUp, LifeRunning, LifeCrashed, ...--> nest
    caller --------Call, Withdraw-----> Host --Answer--> caller

`Host` is plain Python: Ray is only in `RayToNest` and in the actors that hold a host (`actors.py`), so that tests run it in one process.

Rules kept here: a host hatches one life and ends with it; an order for a life that is not here is answered as if it had just ended,
and such a life is then never begun; the process ends when what it had to say was delivered, or at once when its nest or raylet is gone.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import pickle
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions

from flock_ray.core.connection import CALL, LONGEST, NEST_BODY, ProtocolError
from flock_ray.core.wire import (
    Answer,
    Call,
    EndOrder,
    ForgetOrder,
    ForNest,
    HatchOrder,
    HostReport,
    HostUp,
    LeaveOrder,
    LifeEnded,
    RaiseOrder,
    Ran,
    Refused,
    ReportOrder,
    StackOrder,
    Withdraw,
    decode,
    decode_call,
    encode,
)
from flock_ray.runtime.generators import Readings
from flock_ray.runtime.inside import Inside, current
from flock_ray.runtime.life import FULL, HostedLife, Loaded, Response, State, refusal
from flock_ray.runtime.listener import NEST_SOCKET, Answered, Answers, Caller, Listener, socket_path
from flock_ray.runtime.mailbox import Lock
from flock_ray.runtime.replies import Down, NoAnswer
from flock_ray.runtime.sockets import SocketLink
from flock_ray.runtime.tether import PATIENCE, NestAwayError, PidFile, Pulse, Reporter, Tether, ToNest
from flock_ray.runtime.timers import Scheduler
from flock_ray.runtime.tls import contexts
from flock_ray.specs import BirdStack, Dot, Life, Name

log = logging.getLogger("flock_ray.host")

LINGER = 2.0  # seconds a host whose life has ended still says "moved": longer spares late callers a dead actor, and costs the process
CRASH_LINGER = 0.2  # seconds for the last answer of a crashed life to leave the process
FAREWELL = 5.0  # seconds Ray is given to end the process (it takes 1 to 2); it cannot while a method runs
PARCELS_KEPT = 600.0  # seconds an answer waits to be fetched by Ray
NEVER = 100_000  # lives that were to end before they began
FORGOTTEN = 60.0  # seconds after which a host that left in good order ends without its nest's ForgetOrder


@dataclass(frozen=True, slots=True)
class HostBoot:
    """What a host is created with, pickled.

    Args:
        host: the name of its Ray actor.
        flock, flock_life: whose it is.
        nest_grace: seconds a bird may run without a nest (`Config.nest_grace`).
        directory: a folder of the session, owner-only, for `<pid>.json`.
        nest_pid: the process of the nest that creates it.
        nest: that nest's life, for records handed over before another has said Welcome.
        mailbox: `Config.mailbox`.
        secret: the flock's, with which callers prove that they may call; empty: they call by Ray only.
        ports: `Config.ports`.
        threads: `Config.light_threads`.
    """

    host: str
    flock: str
    flock_life: str
    nest_grace: float
    directory: str
    nest_pid: int
    nest: Life | None = None
    mailbox: int = 1
    secret: bytes = b""
    ports: tuple[int, int] | None = None
    threads: int = 1


class Host:
    """What a host does, without Ray.

    Args:
        link: to the nest.
        leave: ends the process with a code.
        ip: of the node, where callers on other machines can reach it; `None`: only by Ray.
        raylet_pid: `None` where there is no raylet.
    """

    def __init__(
        self,
        boot: HostBoot,
        link: ToNest,
        node_id: str,
        raylet_pid: int | None = None,
        leave: Callable[[int], object] = os._exit,
        ip: str | None = "127.0.0.1",
    ) -> None:
        self.boot = boot
        self.host = boot.host
        self.pid = os.getpid()
        self.node_id = node_id
        self.scheduler = Scheduler()
        self._nest = boot.nest
        self._leave_process = leave
        self.state_lock: Lock = threading.RLock()
        self.readings = Readings()
        self.under_way: set[Inside] = set()
        self.ran = self.raised = 0  # methods; of several threads that count at once one may go missing
        self._told = Ran(boot.host, 0, 0)
        self._classes: weakref.WeakValueDictionary[str, Loaded] = weakref.WeakValueDictionary()  # by digest, while a life is of them
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._lives: dict[Dot, HostedLife] = {}
        self.ordered: Future[HatchOrder | None] = Future()  # what a spare waits for; None: nothing comes any more
        self._never: OrderedDict[tuple[Dot, int], None] = OrderedDict()  # lives that were to end before they began
        self._leaving = False
        self._ip = ip
        self._listener: Listener | None = None
        self._parcels: dict[str, tuple[float, Response]] = {}
        self._parcel_numbers = itertools.count()
        self._file = PidFile(boot.directory, boot.host)
        atexit.register(self._file.remove)
        self._link = link
        self._tether = Tether(boot.nest_pid, raylet_pid, boot.nest_grace, self._die, self._orphaned, self._nobody_else)
        self._reporter = Reporter(link, self._report, self._tether, self._welcomed)
        self.says(HostUp(self.host, self.pid))
        self._reporter.start()
        self._tether.start()
        Pulse(link, self._tether, boot.nest_grace, self._tell_ran).start()

    # What nests order

    def accept(self, head: HatchOrder | None, make: Callable[[HatchOrder, Host], HostedLife]) -> HostedLife | None:
        """The life to hatch; `None` if it must not be."""
        if head is None:
            return None
        extend_path(head.sys_path)
        label_output(head.name, head.job_id)
        with self._lock:
            if self._lives or (head.dot, head.born) in self._never:
                return None
            life = self._lives[head.dot] = make(head, self)
        return life

    def control(self, message: bytes | memoryview) -> bytes:
        """An order of a nest, or a caller's `Withdraw`, encoded; returns at once."""
        return self.obey(decode(message)[0])

    def obey(self, head: Any) -> bytes:
        """The same, decoded."""
        match head:
            case HatchOrder():
                self._be_ordered(head)
            case LeaveOrder():
                self._be_ordered(None)
                self._end_process_in(0.0)
            case EndOrder():
                self._end(head)
            case ForgetOrder():
                self._forget(head.dot)
            case RaiseOrder():
                life = self._lives.get(head.dot)
                if life is not None and life.born == head.born:
                    life.incarnation = head.incarnation
            case ReportOrder():
                return pickle.dumps(self._report() or HostUp(self.host, self.pid))
            case StackOrder():
                return pickle.dumps(self._stack(head.dot))
            case Withdraw():
                life = self.life_of(head.dot) if head.dot is not None else None
                if life is not None:
                    life.withdraw(head.caller, head.order)
            case _:
                log.error("a host got %r, which is no order", head)
        return b""

    def _be_ordered(self, order: HatchOrder | None) -> None:
        with self._lock:
            if not self.ordered.done():
                self.ordered.set_result(order)

    def _end(self, order: EndOrder) -> None:
        with self._lock:
            life = self._lives.get(order.dot)
            here = life is not None and life.born == order.born
            if not here:
                self._never[order.dot, order.born] = None
                if len(self._never) > NEVER:
                    self._never.popitem(last=False)
        if life is not None and here:
            life.end(order)
        else:
            self.says(LifeEnded(order.dot, order.born))

    def _forget(self, dot: Dot) -> None:
        life = self._lives.get(dot)
        # A life that runs is not meant: what it took over was a record of the same dot, and that one is forgotten.
        if life is not None and life.state in (State.RELEASED, State.EXITED):
            self._end_process_in(LINGER)

    def _stack(self, dot: Dot) -> BirdStack | None:
        from flock_ray.runtime.stacks import running  # loaded when it is needed: a host is a new process

        life = self._lives.get(dot)
        if life is None:
            return None
        here = [inside for inside in tuple(self.under_way) if inside.life is life]
        return BirdStack(self.node_id, self.pid, life.state.value, life.queue, running(here))

    # Callers that come without Ray

    def listen(self, slots: int, call: Callable[[Caller, int, memoryview], Answered]) -> None:
        """Opens the doors, if the flock uses any. Where that fails, callers come by Ray."""
        if self.boot.secret:
            self._make_listener(slots, call, socket_path(self.boot.directory, self.pid), self._ip)

    def _make_listener(self, slots: int, call: Callable[[Caller, int, memoryview], Answered], path: Path | None, ip: str | None) -> None:
        boot = self.boot
        try:
            tls = contexts()
            self._listener = Listener(
                boot.secret,
                boot.flock_life,
                path,
                ip,
                boot.ports,
                slots,
                boot.mailbox,
                call,
                self._full,
                self.control,
                self._gone,
                lambda why, count: self.says(Refused(self.host, why, count)),
                tls[0] if tls is not None else None,
            )
        except OSError as error:
            log.warning("host %s is called by Ray only: %s", self.host, error)
            return
        self._listener.start()

    @property
    def address(self) -> str:
        return self._listener.address if self._listener is not None else ""

    def _full(self, message: memoryview) -> bytes | None:
        """There is no room for this call: nor is there for what its caller sends after it, until he begins anew (C2). Pulls always have
        room: their own credit bounds them.
        """
        head, order, _ = decode_call(message)
        if not isinstance(head, Call):
            return None
        life = self._lives.get(head.dot)
        if life is not None:
            life.refuse_from(head.caller, order)
        return FULL

    def _gone(self, caller: Caller) -> None:
        for reading in self.readings.of(caller):
            reading.life.withdraw(*reading.call)

    def framed(self, response: Response) -> bytes:
        """A response as the body of a frame: what is too long, or has something beside it, waits here to be fetched by Ray."""
        if isinstance(response, bytes) and len(response) <= LONGEST:
            return response
        number, now = f"{next(self._parcel_numbers)}", time.monotonic()
        for old, (since, _) in tuple(itertools.islice(self._parcels.items(), 8)):  # the oldest come first
            if now - since > PARCELS_KEPT:
                self._parcels.pop(old, None)
        self._parcels[number] = (now, response)
        return encode(Answer("parcel", number))

    def fetch(self, parcel: str) -> Response:
        """What `framed` put aside, once."""
        kept = self._parcels.pop(parcel, None)
        if kept is None:
            return refusal(
                f"the result was not fetched within {PARCELS_KEPT:g} s: the method has run, and its result is gone", "BirdUnavailable"
            )
        return kept[1]

    def send_answers(self, answers: Answers) -> None:
        """Sends answers to calls that were answered by nothing at first."""
        if self._listener is not None:
            self._listener.send(answers)

    def awaited(self) -> bool:
        """Does another call wait for its turn?"""
        return self._listener is not None and self._listener.awaited

    def occupied(self) -> bool:
        """Does a call that came by a socket wait, or run?"""
        return self._listener is not None and self._listener.occupied

    def queued(self) -> int:
        """How many messages that came by a socket have not been taken by any thread yet."""
        return self._listener.queued if self._listener is not None else 0

    # What lives need (`life.Surroundings`)

    @property
    def life(self) -> HostedLife | None:
        """The one that is here, in a host of one."""
        return next(iter(self._lives.values()), None)

    def life_of(self, dot: Dot) -> HostedLife | None:
        """Who is called by this dot."""
        return self._lives.get(dot)

    @property
    def nest(self) -> Life:
        return self._nest if self._nest is not None else Life("", 0)

    def may_run(self) -> bool:
        return self._tether.check()

    def loaded(self, order: HatchOrder) -> Loaded:
        loaded = self._classes.get(order.spec.code)
        if loaded is not None:
            return loaded
        with self._loading:  # or of many threads each would make a class of its own
            loaded = self._classes.get(order.spec.code)
            if loaded is None:
                loaded = self._classes[order.spec.code] = Loaded(order.code)
            return loaded

    def says(self, word: object) -> None:
        self._reporter.say(word)

    def _tell_ran(self) -> None:
        ran = Ran(self.host, self.ran, self.raised)
        if ran != self._told:
            self._told = ran
            self.says(ran)

    def over(self, life: HostedLife) -> None:
        """A life has ended: the process follows, unless something is kept here that a nest must fetch or acknowledge."""
        if life.state is State.CRASHED:
            self._end_process_in(CRASH_LINGER)
        elif life.state is State.EXITED:
            self._later(FORGOTTEN, lambda: self._end_process_in(0.0))
        elif not life.has_record:
            self._end_process_in(LINGER)

    # The end of the process

    def _end_process_in(self, seconds: float) -> None:
        """Ends the process once all is said, and `seconds` have passed for what still comes to be answered."""
        with self._lock:
            if self._leaving:
                return
            self._leaving = True

        def go() -> None:
            self._reporter.flush()
            time.sleep(seconds)
            self._exit(0)

        threading.Thread(target=go, name="flock_ray farewell", daemon=True).start()

    def _later(self, seconds: float, do: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()

    def _die(self, reason: str) -> None:
        names = [life.name for life in itertools.islice(self._lives.values(), 8)]
        log.warning("host %s of birds %r ends at once: %s", self.host, names, reason)
        self._exit(1)

    def _exit(self, code: int) -> None:
        self._file.remove()
        if self._listener is not None:
            self._listener.close()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more
                continue
        self._leave_process(code)

    def _nobody_else(self) -> bool:
        try:
            return self._link.alone(PATIENCE)
        except NestAwayError:
            return False

    def _orphaned(self) -> None:
        if not self._lives:
            self._die("its nest has ended, and it holds nothing")
        self._reporter.wake()

    def _report(self) -> HostReport | None:
        lives = tuple(life.report() for life in self._held())
        return HostReport(self.host, self.address, self.pid, lives) if lives else None

    def _held(self) -> list[HostedLife]:
        return list(self._lives.values())

    def _welcomed(self, nest: Life) -> None:
        self._nest = nest


class SocketToNest:
    """Words to the nest over its socket, which the nest's next life opens again."""

    def __init__(self, boot: HostBoot) -> None:
        self._boot = boot
        self._link: SocketLink | None = None
        self._connecting = threading.Lock()

    def say(self, word: bytes, timeout: float) -> bytes | None:
        return self._request("say", word, timeout) or None

    def pid(self, timeout: float) -> int:
        return pickle.loads(self._request("pid", b"", timeout))  # type: ignore[no-any-return]  # as the nest has packed it

    def alone(self, timeout: float) -> bool:
        return bool(pickle.loads(self._request("read", pickle.dumps(("alone",)), timeout)))

    def _request(self, what: str, body: bytes, timeout: float) -> bytes:
        try:
            with self._connecting:
                if self._link is None or self._link.lost():
                    self._link = SocketLink(
                        self._boot.secret, self._boot.flock_life, f" {NEST_SOCKET}", Path(self._boot.directory), limit=NEST_BODY
                    )
                link = self._link
            return link.transmit(CALL, encode(ForNest(what), body)).get(timeout).message
        except (OSError, ProtocolError, Down, NoAnswer) as error:
            raise NestAwayError(str(error)) from error


class RayToNest:
    """Words to the nest as Ray calls. Its handle answers again when Ray has restarted the nest."""

    def __init__(self, nest: Any) -> None:
        self._nest = nest

    def say(self, word: bytes, timeout: float) -> bytes | None:
        return self._get(self._nest.host_says.remote(word), timeout)  # type: ignore[no-any-return]  # the nest's own signature

    def pid(self, timeout: float) -> int:
        return self._get(self._nest.pid.remote(), timeout)  # type: ignore[no-any-return]  # as above

    def alone(self, timeout: float) -> bool:
        return bool(pickle.loads(self._get(self._nest.read.remote(pickle.dumps(("alone",))), timeout)))

    def _get(self, ref: Any, timeout: float) -> Any:
        try:
            return ref.future().result(timeout)  # `ray.get` warns in every thread of an async actor
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            raise NestAwayError(str(error)) from error


H = TypeVar("H", bound=Host)


def start(kind: type[H], boot: bytes, nest: Any) -> H:
    """Makes the host of this process, which is a Ray actor's."""
    unpickled: HostBoot = pickle.loads(boot)
    name_records()
    os.environ["FLOCK_RAY_FLOCK"] = unpickled.flock  # threads and processes that the bird starts are in its flock too
    raylet = os.environ.get("RAY_RAYLET_PID")
    node_id = ray.get_runtime_context().get_node_id()
    ip = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no types here
    direct = unpickled.secret and Path(unpickled.directory, NEST_SOCKET).exists()
    link = SocketToNest(unpickled) if direct else RayToNest(nest)
    return kind(unpickled, link, node_id, int(raylet) if raylet else None, _leave, ip)


def _leave(code: int) -> None:
    """Ends the process: in good order, so that Ray does not warn of a dead worker, or at once with a code other than 0."""
    if code == 0:
        ray.get_runtime_context().current_actor.__ray_terminate__.remote()
        time.sleep(FAREWELL)
    os._exit(code)


def extend_path(starters: Iterable[str]) -> None:
    """Has classes imported from where their starter has them, too."""
    for path in starters:
        if path not in sys.path:
            sys.path.append(path)


def label_output(name: Name, job_id: str) -> None:
    """Has Ray put the bird's name before its lines, and show them at the driver of the starter's job (tokens of Ray's log monitor)."""
    label = name if isinstance(name, str) and "\n" not in name and "\r" not in name else repr(name)
    label = label.encode("utf-8", "backslashreplace").decode()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        stream.write(f":actor_name:{label}\n:job_id:{job_id}\n")
        stream.flush()


def name_records() -> None:
    """Gives log records of this process an attribute `bird`: the name of the bird whose code logs, else `None`."""
    make = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        inside = current.get()
        record.bird = inside.life.name if inside is not None else None
        return record

    logging.setLogRecordFactory(factory)
