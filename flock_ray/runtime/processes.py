"""The processes of a nest's hosts: started on this node, watched, given orders, kept ahead of need, ended.

A process's death is seen through a pidfd, in a millisecond and without a pending call (V1).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import psutil
import ray
from ray.actor import ActorHandle

from flock_ray.core import wire
from flock_ray.core.connection import CONTROL, LONGEST
from flock_ray.runtime import cluster
from flock_ray.runtime.cluster import FlockLife
from flock_ray.runtime.host import HostBoot
from flock_ray.runtime.listener import socket_path
from flock_ray.runtime.peers import Wires
from flock_ray.runtime.recorder import recorder_path
from flock_ray.runtime.tether import pid_path
from flock_ray.specs import Life, Options, Spec

logger = logging.getLogger("flock_ray.nest")

InThread = Callable[..., Awaitable[Any]]
FILL = 1.0  # seconds until a spare that was taken is replaced: its bird starts first
REFILL = 10.0  # seconds until one that died is, lest one that cannot live is started again and again; the next bird has it done sooner
AGAIN = 1.0  # seconds until a process that could not be started because Ray's head is away is started again
KINDS = 4  # of spares that are kept
FAREWELL = 15.0  # seconds within which a host that keeps nothing ends by itself, or is killed
LIGHT = "light:"  # how the names of hosts of light birds begin


class Kind(NamedTuple):
    """What a bird's host must be like: its process cannot become another."""

    env: str  # the runtime_env, as Ray serialises it
    is_async: bool = False
    light: bool = False  # of many light birds, whether they have `async def` methods or not

    @classmethod
    def of(cls, spec: Spec) -> Kind:
        env = str(spec.brought.get("env") or "")
        return cls(env, light=True) if spec.options.light else cls(env, spec.is_async)


@dataclass(slots=True, eq=False)
class Process:
    """A host's process as its nest knows it."""

    host: str
    kind: Kind
    handle: ActorHandle[Any] | None = None
    pid: int = 0
    pidfd: int = -1
    ready: bool = False  # it has been given its first order, or can take lives
    lives: int = 0  # of which it keeps something; a spare has none
    alive: int = 0  # of these, those that have not ended
    stuck: int = 0  # of these, those that do not end
    condemned: bool = False  # it gets no more lives: a bird that does not return is in it
    killed_for: str = ""
    ran: wire.Ran | None = None  # what it has said last; of one that was started here never `None`
    unsent: dict[object, Any] = field(default_factory=dict)  # orders to one of light birds: those to hatch by dot and incarnation


class Processes:
    """All processes of hosts of a nest.

    Args:
        in_thread: runs a blocking function of `cluster` in the nest's thread for it.
        ended: takes a process that is gone, and why.
    """

    def __init__(
        self, record: FlockLife, node: str, nest: ActorHandle[Any], in_thread: InThread, ended: Callable[[Process, str], object]
    ) -> None:
        self._record = record
        self._node = node
        self._nest = nest
        self._in_thread = in_thread
        self._ended = ended
        self._wires = Wires(record.secret, record.life, None, self._order_by_ray)
        self.directory = cluster.session_directory(record.life)
        self._by_host: dict[str, Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeps_spares = record.config.spares > 0
        self._spares: dict[Kind, list[Process]] = {}  # by what birds were like lately, the latest last
        self.life: Life | None = None  # of the nest, once it has one

    def get(self, host: str) -> Process | None:
        return self._by_host.get(host)

    def all(self) -> list[Process]:
        return list(self._by_host.values())

    # Starting

    def new(self, kind: Kind, options: Options, order: wire.HatchOrder | None) -> Process:
        """Has a process started; without an order it waits for one, or, for light birds, takes all that come."""
        name = f"{LIGHT if kind.light else ''}host:{self._record.life}:{self._node[:8]}:{uuid.uuid4().hex[:10]}"
        process = self._by_host[name] = Process(name, kind, ran=wire.Ran(name, 0, 0))
        self._task(self._start(process, options, order))
        return process

    async def _start(self, process: Process, options: Options, order: wire.HatchOrder | None) -> None:
        config = self._record.config
        boot = HostBoot(
            host=process.host,
            flock=self._record.flock,
            flock_life=self._record.life,
            nest_grace=config.nest_grace,
            directory=str(self.directory),
            nest_pid=os.getpid(),
            nest=self.life,
            mailbox=config.mailbox,
            secret=self._record.secret if config.wire == "auto" else b"",
            ports=config.ports,
            threads=config.light_threads,
        )
        try:
            process.handle = await self._started(process, pickle.dumps(boot), options)
            if process.killed_for:  # it has been given up: it gets no order
                await self._in_thread(ray.kill, process.handle)
                return
            await process.handle.hatch.remote(pickle.dumps(order) if order is not None else b"")
            process.ready = True
            self.flush(process)
        except Exception as error:  # Ray's many, and what a user's options may do to it: the life has not begun, or may not go on unwatched
            if process.handle is None:
                self._gone(process, str(error))
            else:
                self.kill(process, str(error))

    async def _started(self, process: Process, boot: bytes, options: Options) -> ActorHandle[Any]:
        """Has Ray start it; again and again while Ray's head is away: that is nobody's crash."""
        where = (process.host, boot, self._nest, self._node)
        start = partial(cluster.start_host, *where, options, *process.kind[1:], process.kind.env)
        while True:
            try:
                handle: ActorHandle[Any] = await self._in_thread(start)
                return handle
            except cluster.AWAY as error:
                if process.killed_for:
                    raise
                logger.warning("a host cannot be started now, and it is tried again: %s", error)
                start = partial(start, again=True)
                await asyncio.sleep(AGAIN)

    async def adopt(self, report: wire.HostReport, kind: Kind) -> Process:
        """Takes over a process that an earlier life of the nest had started. It is to be watched when its lives are known."""
        process = self._by_host[report.host] = Process(report.host, kind, ready=True)
        process.handle = await self._in_thread(cluster.host_handle, report.host)
        return process

    # Spares

    def begin_spares(self) -> None:
        """Has the first ones started, of the most common kind."""
        self._later_fill(Kind(""))

    def spare_for(self, kind: Kind, options: Options) -> Process | None:
        """A spare that can be this bird's host, if there is one; and has more of its kind started."""
        if options.demand or options.max_concurrency != Options().max_concurrency:
            return None  # what Ray is told when it starts the process
        known = [spare for spare in self._spares.get(kind, ()) if spare.handle is not None]
        self._later_fill(kind)
        if not known:
            return None
        spare = max(known, key=lambda spare: spare.pid > 0)  # one that is up; else one that is starting, which is sooner than another
        self._spares[kind].remove(spare)
        return spare

    def _later_fill(self, kind: Kind) -> None:
        """Has the spares of a kind started, but first those birds that are starting now."""
        if not self._keeps_spares:
            return
        self._spares[kind] = self._spares.pop(kind, [])
        while len(self._spares) > KINDS:
            for spare in self._spares.pop(next(iter(self._spares))):
                self.dismiss(spare, "it was a spare that is not wanted any more")
        asyncio.get_running_loop().call_later(FILL, self._fill, kind)

    def _fill(self, kind: Kind) -> None:
        spares = self._spares.get(kind)
        while self._keeps_spares and spares is not None and len(spares) < self._record.config.spares and not self._is_memory_low():
            spares.append(self.new(kind, Options(), None))

    def _is_memory_low(self) -> bool:
        memory = psutil.virtual_memory()
        return bool(memory.available < self._record.config.min_free_memory * memory.total)

    def drop_spares(self) -> None:
        """Keeps none any more."""
        self._keeps_spares = False
        for spare in [spare for spares in self._spares.values() for spare in spares]:
            self.dismiss(spare, "it was a spare that is not wanted any more")
        self._spares.clear()

    def dismiss(self, process: Process, why: str) -> None:
        """Ends a process that holds nothing."""
        if process.pid:
            self.order(process, wire.LeaveOrder())
            self.kill_later(process, why)
        else:
            self.kill(process, why)

    # Orders

    def order(self, process: Process, order: object) -> None:
        """Gives an order to a process that is there, or starting. To one of light birds those that come together go together."""
        if not process.kind.light:
            self._send(process, order)
            return
        process.unsent[(order.dot, order.born) if isinstance(order, wire.HatchOrder) else object()] = order
        if len(process.unsent) == 1:
            asyncio.get_running_loop().call_soon(self.flush, process)

    def flush(self, process: Process) -> None:
        if not process.ready or not process.unsent:
            return
        orders, process.unsent = process.unsent, {}
        for chunk in wire.chunks(orders.values()):
            self._send(process, wire.Orders(chunk))

    def _send(self, process: Process, order: object) -> None:
        packed, path = wire.encode(order), socket_path(self.directory, process.pid)
        # What is long goes by Ray. An end may overtake it then: a host does not begin what was to end before it came.
        if not (process.pid and len(packed) <= LONGEST and path.exists() and self._wires.send(process.host, path, CONTROL, packed)):
            self._order_by_ray(process.host, packed)

    def _order_by_ray(self, host: str, order: bytes) -> None:
        """For hosts that listen not yet, or not at all."""
        process = self._by_host.get(host)
        if process is not None and process.handle is not None:
            process.handle.control.remote(order)

    # The end

    def watch(self, process: Process, pid: int) -> None:
        process.pid = pid
        try:
            process.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone(process, "its process died")
            return
        asyncio.get_running_loop().add_reader(process.pidfd, self._gone, process, "its process died (killed, or out of memory?)")
        if process.killed_for:
            self.kill(process, process.killed_for)

    def kill_later(self, process: Process, why: str) -> None:
        """It is to end of itself; does it not, it is killed."""
        asyncio.get_running_loop().call_later(FAREWELL, self.kill, process, why)

    def kill(self, process: Process, why: str) -> None:
        if process.host not in self._by_host:
            return
        process.killed_for = process.killed_for or why
        if process.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        elif process.handle is not None:
            self._task(self._kill_unseen(process))
        else:  # Ray was not asked for it yet, and may not be for minutes while the head is silent: nothing has begun in it
            self._gone(process, why)

    async def _kill_unseen(self, process: Process) -> None:
        await self._in_thread(ray.kill, process.handle)
        self._gone(process, "it was killed")

    def _gone(self, process: Process, text: str) -> None:
        if self._by_host.pop(process.host, None) is None:
            return
        self._wires.drop(process.host)
        if process.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
        spares = self._spares.get(process.kind, [])
        if process in spares:
            spares.remove(process)
            asyncio.get_running_loop().call_later(REFILL, self._fill, process.kind)
        self._ended(process, process.killed_for or text)
        if process.pid:
            for path in (socket_path, recorder_path, pid_path):
                path(self.directory, process.pid).unlink(missing_ok=True)

    async def end_all(self, reason: str, in_order: Callable[[Process], bool]) -> None:
        """Ends every process: in good order where its lives have ended."""
        loop = asyncio.get_running_loop()
        for process in self.all():
            if in_order(process) and process.handle is not None:
                process.handle.__ray_terminate__.remote()  # Ray warns of processes that just die
            else:
                self.kill(process, reason)
        end = loop.time() + FAREWELL / 5
        while self._by_host and loop.time() < end:
            await asyncio.sleep(0.02)
        for process in self.all():
            self.kill(process, reason)

    def close(self) -> None:
        self._wires.close()

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def end_unknown(pid: int) -> None:
    """Ends a host that nobody answers for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()
