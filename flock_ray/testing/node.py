"""A node of the simulated cluster: a nest with the real core, and processes that run birds with the real code of light birds.

Only what touches the outside is replaced: Ray, sockets, files, processes, the failure detector. A bird has a process of its own here, too:
an object that can be killed, of which nothing runs afterwards.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import pickle
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import letters, wire
from flock_ray.core.board import Board
from flock_ray.core.registry import Registry
from flock_ray.core.replica import Replica
from flock_ray.core.ring import Placement
from flock_ray.runtime.cluster import FlockLife
from flock_ray.runtime.generators import Reading
from flock_ray.runtime.host import Host, HostBoot
from flock_ray.runtime.hosts import Hosts
from flock_ray.runtime.life import FULL, HostedLife, Response
from flock_ray.runtime.life_light import LightHost, LightLife
from flock_ray.runtime.listener import Caller, Work
from flock_ray.runtime.nest import PROBE, Nest
from flock_ray.runtime.processes import LIGHT, Kind, Process, Processes
from flock_ray.runtime.recorder import Recorder
from flock_ray.runtime.timers import Entry, Scheduler
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, name_hash
from flock_ray.testing.steady import Id, plain
from flock_ray.testing.virtual import Ended, VirtualLoop, here, kill_tasks

if TYPE_CHECKING:
    from flock_ray.runtime.client import Client
    from flock_ray.testing.links import HostLink

KILLED = "its process was killed by the test"


class Network(Protocol):
    """What of the world a node needs."""

    loop: VirtualLoop
    pins: defaultdict[str, dict[Name, str]]

    def post(self, source: Node, flock: str, node: str, packed: bytes) -> None:
        """Letters to the nest of another node."""

    def found(self, source: Node, node: str) -> ev.Found:
        """What a look at the port of a node's raylet finds."""

    def nest_on(self, source: Node, flock: str, node: str) -> LocalNest | None:
        """The nest of another node, if it can be reached."""

    def starts_afresh(self, node: Node, flock: str) -> None:
        """The nest has to join as new."""

    def draw(self) -> float:
        """A number from 0 to 1."""


class Node:
    """A machine of the simulated cluster."""

    def __init__(self, network: Network, number: int, cpus: float, resources: Mapping[str, float], labels: Mapping[str, str]) -> None:
        self.network = network
        self.id = Id(f"node-{number}")
        self.cpus = cpus
        self.resources = tuple(sorted((what, float(amount)) for what, amount in resources.items()))
        self.labels = tuple(sorted(labels.items()))
        self.is_up = True
        self.lives = 0  # of its nests
        self.nests: dict[str, LocalNest] = {}  # by flock
        self.clients: dict[str, Client] = {}  # of the test's own process, while it is here
        self.dead = False

    def begin(self, record: FlockLife) -> LocalNest:
        """Starts the nest of a flock. On the loop."""
        self.lives += 1
        nest = self.nests[record.flock] = LocalNest(self, record, Life(self.id, self.lives))
        nest.begin()
        return nest

    def die(self) -> None:
        """As when its plug is pulled. On the loop."""
        self.is_up, self.dead = False, True
        for nest in self.nests.values():
            nest.die()


# The nest


class Pinned(Placement):
    """The placement of a view, but for names that the test has moved: these are owned by the nodes it said, while those are there.

    Whether there is such a bird does not matter: all nests of a view have to say the same, also those that have not heard of it.
    """

    def __init__(self, pins: Mapping[Name, str], replica: Replica, lives: frozenset[Life]) -> None:
        self._pins = pins
        super().__init__(replica, lives)

    def table(self) -> Mapping[Name, str | None]:
        if self._version != self._replica.version:
            super().table()
            self._table.update((name, node if node in self.by_node else self.ring.owner(name)) for name, node in self._pins.items())
        return self._table


class SteadyRegistry(Registry):
    """The core, looking at names in an order that does not depend on the hashes of this Python process."""

    def mark(self, names: Iterable[Name]) -> None:
        super().mark(sorted(names, key=name_hash) if isinstance(names, set | frozenset) else names)


class LocalHosts(Hosts):
    """Hosts that are objects."""

    async def stack(self, dot: Dot, born: int) -> str:
        del dot, born
        return "flock_ray.testing has no stacks of birds, which run in the test's own process: a debugger shows them"


class LocalNest(Nest):
    """A nest whose network is simulated, and whose hosts are objects."""

    look = 3600.0  # its clock never jumps, so it need not look at it

    def __init__(self, node: Node, record: FlockLife, me: Life) -> None:
        self._place, self._life = node, me
        self.heard: set[Life] = set()  # by its failure detector
        self.asked: dict[asyncio.Task[bytes], None] = {}  # requests that are not answered
        self.is_dead = False
        super().__init__(pickle.dumps(record), node.id)

    def _enter(self) -> None:
        node, network = self._place, self._place.network
        self._clock = network.loop.time
        self._frozen = sys.maxsize  # what the test's process has is not to be frozen
        self.processes: LocalProcesses
        self._hosts = LocalHosts(self._record, self._make_processes, self._handle, self._turned_away)
        self._hosts.adopting = False
        self._hosts.begin(self._life, node.cpus)
        self._board = Board(self._life)
        place = partial(Pinned, network.pins[self._record.flock])
        self._registry = self.registry = SteadyRegistry(self._life, self._config, random.Random(network.draw()).random, place)
        self._letterbox = letters.Letterbox(self._life, self._unreadable)

    def _make_processes(self, ended: Callable[[Process, str], object]) -> LocalProcesses:
        self.processes = LocalProcesses(self._place, self._record, ended)
        return self.processes

    @property
    def life(self) -> Life:
        return self._life

    def begin(self) -> None:
        node = self._place
        address = f"{node.id}:{7000 + node.lives}"
        self._handle(ev.Booted(NodeRecord(self._life, node.cpus, node.resources, node.labels, address)))
        self._booted.set()

    def take(self, *events: ev.Event) -> None:
        """Events from the world. On the loop."""
        self._handle(*events)

    def pinned(self) -> None:
        """The test has moved a bird."""
        self.registry.replica.version += 1
        self._handle(ev.Tick())

    def die(self) -> None:
        """Ends it at once, with all processes."""
        self._ending = self.is_dead = True
        for task in tuple(self.asked):
            task.cancel()
        self.processes.die()
        self._stop_tasks()

    def _stop_tasks(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()

    async def destroy(self) -> None:
        if self._ending:
            return
        self._ending = True
        for take in self._replies.values():
            take(self._refused_at_the_end(""))
        await self._hosts.end_all("shutdown", 10.0)
        self.die()

    async def _start_afresh(self) -> None:
        await self._hosts.end_all("moved", 10.0)
        self.die()
        self._place.network.starts_afresh(self._place, self._record.flock)

    async def read(self, query: bytes) -> bytes:
        return plain(await super().read(query))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._ending:
            self._place.network.loop.fail(error)

    def _unreadable(self, error: Exception) -> None:
        self._place.network.loop.fail(error)

    def _look_at_the_clock(self, registry: Registry | None) -> None:
        """The process of the test may stand still for as long as it likes."""

    def _wall(self) -> int:
        return int(self._clock() * 1e9)

    def _tick(self) -> None:
        """A little later, as in the simulator: what is due only after a moment would never be while time stands still."""
        self._loop.call_later(0.001, super()._tick)

    def _post(self, node: str, packed: bytes) -> None:
        self._place.network.post(self._place, self._record.flock, node, packed)

    async def _probe(self, life: Life) -> None:
        found = self._place.network.found(self._place, life.node)
        if found == "silent":
            await asyncio.sleep(PROBE)
        self._handle(ev.NodeProbed(life, found))

    async def _another(self, node: str, *query: object) -> Any:
        nest = self._place.network.nest_on(self._place, self._record.flock, node)
        return None if nest is None else pickle.loads(await nest.read(pickle.dumps(query)))

    def _do_Demand(self, effect: do.Demand) -> None:
        """There is no autoscaler; `flock.add_node(...)` adds nodes."""


# Processes


class LocalProcesses(Processes):
    """The processes of a nest's hosts, as objects."""

    def __init__(self, node: Node, record: FlockLife, ended: Callable[[Process, str], object]) -> None:
        self._place = node
        self._numbers = 0
        self.hosts: dict[str, LocalHost] = {}
        self._guilty: dict[str, Dot] = {}
        super().__init__(record, node.id, None, _inline, ended)  # type: ignore[arg-type]  # there is no actor

    def _open(self) -> None:
        self.directory = Path()

    def new(self, kind: Kind, options: Options, order: wire.HatchOrder | None) -> Process:
        del options  # what they ask for is counted by the core
        self._numbers += 1
        name = f"{LIGHT if kind.light else ''}host:{self._record.flock}:{self._place.id}:{self._place.lives}.{self._numbers}"
        process = self._by_host[name] = Process(name, kind)
        asyncio.get_running_loop().call_soon(self._begin, process, order)
        return process

    def _begin(self, process: Process, order: wire.HatchOrder | None) -> None:
        if process.killed_for or self._place.dead:
            return
        config = self._record.config
        boot = HostBoot(
            process.host, self._record.flock, self._record.life, config.nest_grace, "", os.getpid(), self.life, config.mailbox,
            threads=config.light_threads,
        )  # fmt: skip
        host = self.hosts[process.host] = LocalHost(self._place, boot, self._tell, partial(self._left, process))
        process.handle = host  # type: ignore[assignment]  # here it is the host itself
        process.pid, process.ready = host.pid, True
        if order is not None:
            host.order(order)
        self.flush(process)

    def _tell(self, word: object) -> None:
        nest = self._place.nests.get(self._record.flock)
        if nest is not None and nest.processes is self:
            nest._hosts.word(word)

    def _send(self, process: Process, order: object) -> None:
        host = self.hosts.get(process.host)
        if host is not None:
            host.order(order)

    def watch(self, process: Process, pid: int) -> None:
        process.pid = pid

    def kill(self, process: Process, why: str) -> None:
        if process.host not in self._by_host:
            return
        process.killed_for = process.killed_for or why
        self._end(process, why)

    def crash(self, host: str, guilty: Dot, why: str) -> None:
        """Kills a process while the code of a bird runs in it."""
        self._guilty[host] = guilty
        process = self._by_host[host]
        self._end(process, why)

    def _left(self, process: Process, code: int) -> None:
        self._end(process, "its process died" if code else "its process ended")

    def _end(self, process: Process, why: str) -> None:
        host = self.hosts.pop(process.host, None)
        if host is not None:
            host.die()
        asyncio.get_running_loop().call_soon(self._gone, process, why)

    def suspects(self, process: Process) -> frozenset[tuple[int, int]]:
        guilty = self._guilty.pop(process.host, None)
        return frozenset() if guilty is None else frozenset([(guilty.counter, guilty.life.number)])

    def _drop_traces(self, process: Process) -> None:
        """It has left none."""

    async def end_all(self, reason: str, in_order: Callable[[Process], bool]) -> None:
        del in_order
        for process in self.all():
            self.kill(process, reason)

    def close(self) -> None:
        """There is nothing to close."""

    def die(self) -> None:
        """All end at once, and nobody is left to hear of it."""
        for host in self.hosts.values():
            host.die()
        self.hosts.clear()
        self._by_host.clear()


async def _inline(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


class _Notes(Recorder):
    """Whose code a strand runs; it is not written down."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def note(self, dot: Dot) -> None:
        self._mine.dot = dot

    def clear(self) -> None:
        self._mine.dot = None


class _VirtualTimers(Scheduler):
    """Messages to oneself, in virtual time."""

    def __init__(self, loop: VirtualLoop, context: Callable[[], contextvars.Context]) -> None:
        super().__init__(loop.time)
        self._loop = loop
        self._context = context

    def add(self, seconds: float, every: bool, deliver: Callable[[Entry], None]) -> Entry:
        entry = Entry(self.clock() + seconds, seconds if every else None, deliver)
        self._push(entry)
        return entry

    def _push(self, entry: Entry) -> None:
        self._loop.call_at(entry.due, self._deliver, entry, context=self._context())

    def _deliver(self, entry: Entry) -> None:
        if self._is_due(entry):
            entry.deliver(entry)


def _of_the_bird(error: BaseException) -> BaseException:
    """What a bird raised; but not what unwinds it because the test is over."""
    if isinstance(error, Ended):
        raise error
    return error


class _SyncLife(LightLife):
    """A bird without `async def` methods; with `max_concurrency` above 1 it ends when none of its methods runs."""

    __slots__ = ()

    def _raised(self, head: wire.Call, error: BaseException) -> Response:
        return super()._raised(head, _of_the_bird(error))

    def _no_item(self, reading: Reading, error: BaseException) -> Response:
        return super()._no_item(reading, _of_the_bird(error))

    def _timer_failed(self, method: str, error: BaseException) -> None:
        super()._timer_failed(method, _of_the_bird(error))

    def _hatch_failed(self, error: BaseException) -> None:
        super()._hatch_failed(_of_the_bird(error))

    def _begin_end(self, reason: str) -> None:
        left = self._turns.slots

        def granted() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._grant(partial(self._do, self._run_end, reason))

        for _ in range(self._turns.slots):
            self._turns.enter_later(granted)

    def _run_end(self, reason: str) -> None:
        try:
            self._end_in_turn(reason)
        finally:
            self._turns.leave_all()


class LocalHost(LightHost):
    """A process that runs birds: many light ones, or one. Its threads are strands, its event loop is the one of virtual time."""

    sync_life = _SyncLife

    def __init__(self, node: Node, boot: HostBoot, tell: Callable[[object], None], left: Callable[[int], None]) -> None:
        self.node = node
        self.dead = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self.clients: dict[str, Client] = {}  # of the birds in it
        self.links: list[HostLink] = []  # by which callers reach it
        self._virtual = node.network.loop
        self._tell = tell
        self._taken = 0  # calls of async birds that are not answered
        super().__init__(boot, None, str(node.id), None, left, None)
        self._begin_loop()

    def _new_scheduler(self) -> Scheduler:
        return _VirtualTimers(self._virtual, self._context)

    def _new_recorder(self) -> Recorder:
        return _Notes()

    def _tie(self, link: Any, raylet_pid: int | None) -> None:
        """It ends when the world says so."""

    def _context(self) -> contextvars.Context:
        """Where code of this process begins."""
        context = contextvars.Context()
        context.run(here.set, self)
        return context

    # Orders and words

    def order(self, order: object) -> None:
        """Takes an order of the nest, as bytes, soon."""
        self._virtual.call_soon(self._obey, wire.encode(order), context=self._context())

    def _obey(self, order: bytes) -> None:
        if not self.dead:
            self.control(order)

    def says(self, word: object) -> None:
        if not self.dead:
            self._virtual.call_soon(self._tell, word, context=contextvars.Context())

    def may_run(self) -> bool:
        return not self.dead

    # Threads

    def run_soon(self, work: Work) -> None:
        self._virtual.begin(work, self._context())

    run_first = run_soon

    def widen(self, slots: int) -> None:
        """There are as many strands as are needed."""

    # Calls

    def take(self, message: bytes, extra: Sequence[Any], answered: Callable[[Response], object]) -> None:
        """Takes a call. On the loop."""
        if not self.dead:
            self._virtual.create_task(self._answer_call(message, extra, answered), context=self._context())

    async def _answer_call(self, message: bytes, extra: Sequence[Any], answered: Callable[[Response], object]) -> None:
        response = await self.call(message, extra)
        if not self.dead:
            answered(response)

    async def _run(self, head: wire.Call, order: int, body: memoryview, extra: Sequence[Any], connection: Caller | None) -> Response:
        """A call of a bird with `async def` methods, whose mailbox is counted here."""
        life = self._lives.get(head.dot)
        if life is not None and self._taken >= self.boot.mailbox:
            life.refuse_from(head.caller, order)
            return FULL
        self._taken += 1
        try:
            return await super()._run(head, order, body, extra, connection)
        finally:
            self._taken -= 1

    # The end

    @property
    def _is_alone(self) -> bool:
        """Is this the process of one bird?"""
        return not self.host.startswith(LIGHT)

    def over(self, life: HostedLife) -> None:
        (Host if self._is_alone else LightHost).over(self, life)

    def _forget(self, dot: Dot) -> None:
        (Host if self._is_alone else LightHost)._forget(self, dot)

    def _end_process_in(self, seconds: float) -> None:
        if not self._leaving:
            self._leaving = True
            self._later(seconds, partial(self._exit, 0))

    def _later(self, seconds: float, do: Callable[[], object]) -> None:
        self._virtual.call_later(seconds, do, context=contextvars.Context())

    def _exit(self, code: int) -> None:
        if not self.dead:
            self._leave_process(code)

    def die(self) -> None:
        """As `kill -9`: nothing in it runs any more."""
        self.dead = True
        kill_tasks(self)
        for link in tuple(self.links):
            link.process_died()
