"""The registry actor of a node: hands events to the core and performs the effects. It decides nothing.

Everything runs on the actor's event loop but what asks the head node, which has a thread of its own: it may block for minutes while
the head cannot be reached, and the loop has to go on answering.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import random
import sqlite3
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
from ray.actor import ActorHandle

from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import journal, letters, readings, wire
from flock_ray.core import messages as msg
from flock_ray.core.board import UNREAD, Board, Cursor, Kinds, Page
from flock_ray.core.connection import ANSWER, NOTE
from flock_ray.core.explain import explain
from flock_ray.core.holds import Phase
from flock_ray.core.registry import Registry
from flock_ray.notices import ConnectionsRefused, Notice
from flock_ray.runtime import cluster
from flock_ray.runtime.hosts import Hosts
from flock_ray.runtime.journal import Journal, open_journal
from flock_ray.runtime.listener import NEST_SOCKET, Refusals
from flock_ray.runtime.loglines import LogLines
from flock_ray.runtime.members import Members
from flock_ray.runtime.metrics import EVERY, NAMES_A_SECOND, NestMetrics
from flock_ray.runtime.peers import Door, Wire, Wires, probe
from flock_ray.runtime.processes import Processes
from flock_ray.runtime.steps import Steps
from flock_ray.runtime.tether import MARGIN, clock
from flock_ray.runtime.tls import contexts
from flock_ray.specs import BirdStack, Dot, Explanation, Life, Name, brought

T = TypeVar("T")

logger = logging.getLogger("flock_ray.nest")

POLL = 1.0  # seconds between looks at Ray's node table, which costs it a millisecond
CONFIRM = 10.0  # seconds after which the failure detector knows, too, that a nest is gone whose node refused to be connected to
PROBE = 0.5  # seconds until a raylet that does not answer counts as cut off
SHARE_SETTLES = 1.0  # seconds: in a burst of changes the load is told once
FLUSH = 0.005  # seconds between messages to a peer: one costs 1 to 3 ms of CPU as a Ray call, so in a burst they are sent together
READING = 0.01  # seconds for which letters are read in a round
MANY = 64  # requests that are taken in together, and wait for a round of their own
PICKLED = 1_000  # birds in an answer that is pickled in a thread
WRITTEN = 5_000  # names, after which the garbage collector is told to leave alone what there is
LIVES = 60.0  # seconds between the notes in the journal that this nest is alive
LOOK = 1.0  # seconds between looks at the clock, and whether the journal is too long
OTHERS = 5.0  # seconds another nest has to answer a question that is passed on to it
TOGETHER = 0.02  # seconds for which notices are gathered for who waits for them
SHUTDOWN = 10.0  # seconds that birds have to end when the flock is destroyed


class Nest:
    """One life of a node's nest, on the event loop of its `actors.NestActor`.

    Args:
        record: the pickled `FlockLife`.
        node: the id of the node it is pinned to.
    """

    look = LOOK

    def __init__(self, record: bytes, node: str) -> None:
        self._record: cluster.FlockLife = pickle.loads(record)
        self._node = node
        self._config = self._record.config
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cluster")
        self._registry: Registry | None = None
        self._journal: Journal | None = None
        self._has_gaps = False  # does the journal lack something that could not be written?
        self._members: Members | None = None
        self._nodes: dict[str, cluster.Node] = {}
        self._peers: dict[str, ActorHandle[Any]] = {}
        self._finding: set[str] = set()
        self._outbox: dict[str, list[tuple[Life, msg.Envelope]]] = {}
        self._letterbox: letters.Letterbox | None = None
        self._replies: dict[str, Callable[[ev.Outcome], object]] = {}
        self._steps = Steps(self._loop)
        self._ticks = False  # does a tick wait for its round?
        self._seen = clock()  # when it last ran
        self._flushed = 0.0  # when, on the loop's clock
        self._flush_timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._booted = asyncio.Event()
        self._early: list[ev.Event] = []
        self._ready = asyncio.Event()
        self._ending = False
        self._rests = False
        self._log_lines = LogLines(logger)
        self._metrics = NestMetrics(self._record.flock, node)
        self._board: Board | None = None
        self._news: asyncio.Future[None] = self._loop.create_future()  # of the next notice
        self._frozen = 0  # names that had been written when the garbage collector was last told to leave all alone
        self._share: tuple[int, int] | None = None
        self._share_timer: asyncio.TimerHandle | None = None
        self._memory_low = False
        self._needed_at = self._loop.time()  # when it last had a bird, or a request
        self._pinned: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock: Callable[[], float] = time.monotonic
        self._door: Door | None = None
        self._refusals = Refusals(self._tell_refused)
        self._enter()

    def _enter(self) -> None:
        """Takes its place in Ray: its hosts, its connections, and all that runs by itself."""
        self._me = ray.get_runtime_context().current_actor
        tls = contexts()
        self._tls = tls[0] if tls is not None else None
        self._wires = Wires(self._record.secret, self._record.life, tls[1] if tls is not None else None, self._not_sent, self._broken)
        processes = partial(Processes, self._record, self._node, self._me, self._in_thread)
        self._hosts = Hosts(self._record, processes, self._handle, self._turned_away)
        # Young objects of a burst live on, so to look for garbage among each 700 of them is in vain; more would be a longer pause.
        gc.set_threshold(5_000, 5, 10)
        _freeze()
        _log_to_stderr()
        self._end_with_the_raylet()
        self._task(self._run())

    # The life of a nest

    async def _run(self) -> None:
        try:
            await self._boot()
        except Exception:
            logger.exception("the nest could not boot; Ray starts it again")
            os._exit(1)
        self._task(self._poll())
        self._task(self._join())
        self._task(self._keep_journal())
        if self._config.metrics:
            self._task(self._give_metrics())

    async def _boot(self) -> None:
        if not await self._still_wanted():
            return
        self._nodes = await self._in_thread(cluster.nodes)
        node = self._nodes.get(self._node)
        ip = node.ip if node is not None else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no types here
        door = await self._listen(ip) if self._config.wire == "auto" else ""  # first: the hosts to be adopted come by it
        before, pieces = await self._in_thread(self._open_journal)
        adopted, exits, crashes = await self._hosts.adopt(self._config.nest_grace * 0.6)
        known = [before, *[a.record.life.number for a in adopted if a.record is not None]]
        number = max(time.time_ns() // 1_000_000, max(known) + 1)
        life = Life(self._node, number)
        self._board = Board(life)
        self._hosts.begin(life, node.cpus if node is not None else 1)
        self._members = Members(life, self._record.life, self._record.secret, ip, door, self._config, self._handle)
        self._registry = Registry(life, self._config, random.Random().random)
        self._letterbox = letters.Letterbox(life, lambda error: logger.error("letters of another nest could not be read", exc_info=error))
        await self._members.start()
        mine = node if node is not None else cluster.Node(self._node, ip, 0, (), ())
        booted = ev.Booted(cluster.node_record(life, mine, self._members.address), tuple(adopted), tuple(exits), pieces)
        self._handle(booted)
        self._booted.set()
        early, self._early = self._early, []
        if early:
            self._handle(*early)
        for crash in crashes:
            self._handle(crash)
        self._hosts.begin_spares()
        await self._in_thread(cluster.put_address, self._record.life, self._node, self._members.address)
        await self._in_thread(cluster.drop_rest, self._record.life, self._node)
        logger.info("nest %s of flock %r is up, with %d adopted birds", life, self._record.flock, len(adopted))

    def _open_journal(self) -> tuple[int, tuple[bytes, ...]]:
        """Returns the number of the life before, and what it has written, unless others may have forgotten dots of it since."""
        try:
            self._journal = open_journal(cluster.session_directory(self._record.life))
            before = self._journal.before()
            if before is None:
                return 0, ()
            number, seconds = before
            if seconds > self._config.context_horizon / 2:
                logger.warning("the journal was left %.0f hours ago: this nest joins as new (S2)", seconds / 3600)
                self._journal.clear()
            return number, self._journal.pieces()
        except (sqlite3.Error, OSError) as error:
            logger.error("there is no journal: %s; what only this nest knows ends with it", error)
            self._journal = None
            return 0, ()

    async def _keep_journal(self) -> None:
        """Keeps the journal short, and closes its gaps: all there is is written anew, a piece in a round of the event loop."""
        lived = -LIVES
        while self._journal is not None and self._registry is not None:
            try:
                if time.monotonic() - lived >= LIVES:
                    lived = time.monotonic()
                    self._journal.lives(self._registry.me.number)
                if (self._has_gaps or self._journal.is_long) and not self._registry.booting:
                    self._has_gaps = False
                    for _ in self._journal.replace(self._registry.copy()):
                        await self._steps.turn()
            except sqlite3.Error as error:
                self._note_gap(error)
            await asyncio.sleep(LOOK)

    def _note_gap(self, error: sqlite3.Error) -> None:
        if not self._has_gaps:
            logger.error(
                "the journal cannot be written: %s; until it can, what only this nest knows ends with it: see that its disk has room", error
            )
        self._has_gaps = True

    async def _listen(self, ip: str) -> str:
        """Opens the doors for callers, hosts and other nests; where that fails they come by Ray. Returns `ip:port`."""
        record = self._record
        path = cluster.session_directory(record.life) / NEST_SOCKET
        self._door = Door(record.secret, record.life, path, self._heard, lambda why, _: self._refusals.add(why))
        try:
            address = await self._door.open(ip, record.config.ports, self._tls)
        except OSError as error:
            logger.warning("the nest is reached by this machine's Unix socket and by Ray only: %s", error)
            address = ""
        try:
            await self._in_thread(cluster.leave_record, record)
        except OSError as error:
            logger.warning("callers of this node need the head to find the nest: %s", error)
        return address

    def _end_with_the_raylet(self) -> None:
        """A worker outlives its raylet by half a minute, measured: a nest without a node would confuse its peers."""
        raylet = int(os.environ.get("RAY_RAYLET_PID", "0"))
        if raylet:
            self._raylet_fd = os.pidfd_open(raylet)
            self._loop.add_reader(self._raylet_fd, os._exit, 1)

    async def _still_wanted(self) -> bool:
        """A nest of a flock life that has ended starts nothing and ends itself (V4)."""
        current = await self._in_thread(cluster.flock_life, self._record.flock)
        if current is not None and current.life == self._record.life and not current.ending:
            return True
        if not self._ending:
            self._me.destroy.remote()
        return False

    async def _poll(self) -> None:
        while not self._ending:
            self._refusals.tell()
            try:
                if not await self._still_wanted():
                    return
                await self._look_around()
                if self._config.rest_after is not None and self._idle_for() >= self._config.rest_after:
                    self._rest()
            except (ray.exceptions.RayError, RuntimeError, OSError, ValueError, TimeoutError) as error:
                # The head cannot be reached, or a node went in the middle of it: birds go on, and the next look comes.
                logger.warning("the look at Ray's node table failed and is repeated: %s", error)
            await asyncio.sleep(POLL)

    async def _look_around(self) -> None:
        """Ray's node table: adds nests on new nodes, and tells the core who is gone (M1)."""
        nodes = await self._in_thread(cluster.nodes)
        resting = await self._resting()
        gone = set(self._nodes) - set(nodes)
        self._nodes = nodes
        self._handle(ev.NodesListed(frozenset(nodes) - set(resting)))
        for node in gone:
            self._peers.pop(node, None)
            await self._in_thread(cluster.drop_address, self._record.life, node)
            await self._in_thread(cluster.drop_rest, self._record.life, node)
        wakes = self._registry is not None and self._registry.lacks_nodes
        for node in nodes:
            if node != self._node and node not in self._peers and (wakes or node not in resting) and not self._ending:
                self._peers[node] = await self._in_thread(cluster.start_nest, self._record, node)
        low = psutil.virtual_memory().available < self._config.min_free_memory * psutil.virtual_memory().total
        if low != self._memory_low:
            self._memory_low = low
            self._handle(ev.MemoryLow(low))
        await self._keep_packages()

    async def _resting(self) -> dict[str, int]:
        """The nodes whose nests have left, which are dead to the others at once: there is nothing to wait for (M5)."""
        if self._config.rest_after is None:
            return {}
        resting: dict[str, int] = await self._in_thread(cluster.rests, self._record.life)
        for node, number in resting.items():
            self._peers.pop(node, None)
            self._handle(ev.NodeProbed(Life(node, number), "refused"))
        return resting

    def _idle_for(self) -> float:
        """Seconds for which this nest has had no bird and nobody has asked it for anything; 0 on the head, which no autoscaler removes."""
        node, registry = self._nodes.get(self._node), self._registry
        idle = registry is not None and registry.membership.ready and not any(registry.holds.names()) and not registry.lacks_nodes
        if node is None or node.is_head or not idle or self._replies:
            self._needed_at = self._loop.time()
        return self._loop.time() - self._needed_at

    def _rest(self) -> None:
        """Leaves a node without birds, so that Ray's autoscaler may remove it: an actor, whatever it asks for, keeps a node busy."""
        logger.info("nest %s has had no birds for %g s and leaves its node", self._node[:8], self._config.rest_after)
        self._ending = self._rests = True  # from here on it hatches nothing: the others may count it as dead
        self._me.destroy.remote()

    async def _join(self) -> None:
        """Tells the failure detector of every address there is, again and again (M2); of those it knows also while the head is silent."""
        asked: asyncio.Future[list[str]] | None = None
        while not self._ending and self._members is not None:
            asked = asked or asyncio.ensure_future(self._in_thread(cluster.addresses, self._record.life))
            known: list[str] = []
            await asyncio.wait({asked}, timeout=self._config.join_interval)
            if asked.done():
                answered, asked = asked, None
                try:
                    known = answered.result()
                except (ray.exceptions.RayError, RuntimeError, OSError, ValueError, TimeoutError) as error:
                    logger.warning("the nests' addresses cannot be read now: %s", error)
            await self._members.join(known)
            await asyncio.sleep(self._config.join_interval if self._ready.is_set() else 0.2)

    async def _keep_packages(self) -> None:
        """Renews the packages of the runtime_envs that birds were started under, while there are such birds (V3)."""
        registry = self._registry
        if registry is None:
            return
        now = time.monotonic()
        envs = {brought(runtime_env).get("env") for runtime_env in registry.replica.environments()}
        wanted = {env for env in envs if env and self._pinned.get(env, 0.0) <= now}
        if wanted:
            await self._in_thread(cluster.pin, sorted(wanted))
            self._pinned.update(dict.fromkeys(wanted, now + cluster.PIN_SECONDS / 3))

    # Events in, effects out

    def _handle(self, *events: ev.Event) -> None:
        if self._ending or not events:  # a flock that ends hatches nothing any more
            return
        registry = self._registry
        self._look_at_the_clock(registry)
        if registry is None or not (self._booted.is_set() or isinstance(events[0], ev.Booted)):
            self._early += events  # of hosts that are adopted, above all
            return
        for effect in registry.handle_all(events, self._clock()):
            getattr(self, f"_do_{type(effect).__name__}")(effect)
        if self._outbox and self._flush_timer is None:
            self._flush_timer = self._loop.call_at(self._flushed + FLUSH, self._steps.add, self._flush)
        if registry.membership.ready and not self._ready.is_set():
            self._ready.set()
        self._note_share(registry)
        if registry.replica.birds.writes - self._frozen >= WRITTEN:
            self._frozen = registry.replica.birds.writes
            self._steps.add(_freeze)
        if self._wake is not None:
            self._wake.cancel()
        delay = registry.wake_at() - self._clock()
        self._wake = self._loop.call_later(min(max(delay, 0.0), self.look), self._tick)

    def _look_at_the_clock(self, registry: Registry | None) -> None:
        """A nest that was stopped (SIGSTOP, suspend) for so long that others may have its birds now asks them, as a next life does (M5)."""
        now, before = clock(), self._seen
        self._seen = now
        stopped = now - before > self._config.nest_grace * MARGIN
        if stopped and registry is not None and registry.membership.whole != {self._node}:
            logger.error("this nest was stopped for %.1f s; Ray starts its next life, which asks the others first", now - before)
            _flush_all(logging.getLogger().handlers)
            os._exit(1)

    def _tick(self) -> None:
        """Has the registry look at what is due, in a round of its own; one that waits already does for all."""
        if not self._ticks:
            self._ticks = True
            self._steps.add(self._tick_now)

    def _tick_now(self) -> None:
        self._ticks = False
        self._handle(ev.Tick())

    def _do_Write(self, effect: do.Write) -> None:
        if self._journal is not None:
            try:
                self._journal.write(journal.pack(effect.entries))
            except sqlite3.Error as error:
                self._note_gap(error)

    def _do_Send(self, effect: do.Send) -> None:
        self._outbox.setdefault(effect.to.node, []).append((effect.to, effect.envelope))

    def _flush(self) -> None:
        """One message for each peer, whatever was brought forth since the last."""
        self._flushed, self._flush_timer = self._loop.time(), None
        outbox, self._outbox = self._outbox, {}
        bodies = letters.Bodies()
        for node, envelopes in outbox.items():
            for packed in letters.pack(envelopes, bodies):
                self._metrics.sent(len(packed))
                self._post(node, packed)

    def _post(self, node: str, packed: bytes) -> None:
        door = self._members.door(node) if self._members is not None else ""
        if door and self._wires.send(node, door, NOTE, wire.encode(wire.ForNest("letters"), packed)):
            return
        handle = self._peers.get(node)
        if handle is not None:
            handle.deliver.remote(packed)
        elif node not in self._finding:
            self._finding.add(node)
            self._task(self._find(node, packed))

    def _not_sent(self, node: str, body: bytes) -> None:
        """What could not be sent over a socket: letters of nests are lost, as on any network, and sent anew where they matter."""
        logger.debug("%d bytes for the nest of node %s could not be sent", len(body), node)

    def _broken(self, node: str) -> None:
        self._handle(ev.ConnectionBroken(node))

    async def _find(self, node: str, packed: bytes) -> None:
        try:
            self._peers[node] = handle = await self._in_thread(cluster.nest_handle, self._record.life, node)
            handle.deliver.remote(packed)
        except (ray.exceptions.RayError, RuntimeError, OSError, ValueError, TimeoutError):
            logger.debug("the nest of node %s cannot be found", node)  # its messages are lost, as on any network
        finally:
            self._finding.discard(node)

    def _do_Hatch(self, effect: do.Hatch) -> None:
        self._hosts.hatch(effect)

    def _do_EndLife(self, effect: do.EndLife) -> None:
        self._loop.call_soon(self._hosts.end, effect)  # not now: it may answer at once, in the middle of these effects

    def _do_Kill(self, effect: do.Kill) -> None:
        self._loop.call_soon(self._hosts.kill, effect)  # not now: as above

    def _do_Raise(self, effect: do.Raise) -> None:
        self._hosts.raise_incarnation(effect)

    def _do_Forget(self, effect: do.Forget) -> None:
        self._hosts.forget(effect.dot)

    def _do_StartAfresh(self, effect: do.StartAfresh) -> None:
        del effect
        if not self._ending:
            self._ending = True
            self._task(self._start_afresh())

    async def _start_afresh(self) -> None:
        logger.warning("this nest was out of contact for too long; it ends its birds and joins as new")
        await self._hosts.end_all("moved", SHUTDOWN)
        if self._journal is not None:
            self._journal.clear()
        _flush_all(logging.getLogger().handlers)
        os._exit(1)  # Ray starts its next life, which finds nothing to adopt

    def _do_ProbeNode(self, effect: do.ProbeNode) -> None:
        self._task(self._probe(effect.life))

    async def _probe(self, life: Life) -> None:
        """Does the raylet of a node accept connections? (M5)"""
        node = self._nodes.get(life.node)
        found = await probe(node.ip, node.raylet_port, PROBE) if node is not None else "silent"
        self._handle(ev.NodeProbed(life, found))
        if found == "refused" and self._members is not None:
            self._loop.call_later(CONFIRM, self._members.confirm, life)

    def _do_Demand(self, effect: do.Demand) -> None:
        bundles = [dict(bundle) for bundle in effect.bundles if bundle]  # labels alone cannot be asked for
        self._task(self._in_background(cluster.request_resources, bundles))

    def _do_Reply(self, effect: do.Reply) -> None:
        take = self._replies.pop(effect.request, None)
        if take is not None:
            take(effect.outcome)

    def _do_Emit(self, effect: do.Emit) -> None:
        assert self._board is not None  # there is one before there is a registry
        self._board.add(effect.notice, self._wall() / 1e9)
        self._log_lines.tell(effect.notice)
        self._metrics.noticed(effect.notice)
        if not self._news.done():
            self._news.set_result(None)

    async def _give_metrics(self) -> None:
        await self._ready.wait()
        registry = self._registry
        assert registry is not None
        while True:
            states = readings.own_states(registry, await self._tally(registry))
            names = len(registry.replica)
            try:
                self._metrics.give(states, len(registry.holds.lives) / names if names else 0.0)
            except Exception as error:  # whatever Ray raises: it is no reason to end a nest
                logger.warning("metrics could not be given to Ray: %s", error)
            await asyncio.sleep(max(EVERY, names / NAMES_A_SECOND))

    def _note_share(self, registry: Registry) -> None:
        """Tells this nest's share of the load when it changes, as Flock's nodes do."""
        share = (len(registry.holds.lives), len(registry.replica))
        if share != self._share and self._share_timer is None and self._ready.is_set():
            self._share_timer = self._loop.call_later(SHARE_SETTLES, self._tell_share)

    def _tell_share(self) -> None:
        self._share_timer = None
        if self._registry is not None:
            held, total = self._share = (len(self._registry.holds.lives), len(self._registry.replica))
            part = 100.0 * held / total if total else 0.0
            logger.info("nest %s has %.1f %% of the load (%d out of %d)", self._node[:8], part, held, total)

    # What others call

    def _heard(self, link: Wire, kind: int, number: int, body: bytes) -> None:
        """What came in by the door."""
        try:
            head, rest = wire.decode(body)
            if kind == NOTE:
                self._take_letters(rest)
            else:
                self._task(self._answer(link, number, _ANSWERED[head.what], bytes(rest)))
        except Exception:
            logger.exception("a message could not be read; its sender is cut off")
            link.end("its message could not be read")

    async def _answer(self, link: Wire, number: int, handler: Callable[..., Awaitable[bytes | None]], body: bytes) -> None:
        try:
            answer = await (handler(self, body) if body else handler(self))
        except Exception:
            logger.exception("a request could not be answered; who sent it is cut off")
            link.end("its request could not be answered")
        else:
            link.send(ANSWER, number, answer or b"")

    def _turned_away(self, where: str, why: str, count: int) -> None:
        if self._registry is not None:
            self._do_Emit(do.Emit(ConnectionsRefused(self._registry.me, where, why, count)))

    def _tell_refused(self, why: str, count: int) -> None:
        self._turned_away("nest", why, count)

    async def ask(self, request: bytes) -> bytes:
        """A client's request: a pickled event of `core/events.py`; the answer is a pickled outcome. May take as long as its timeout."""
        asked = pickle.loads(request)
        if isinstance(asked, tuple):
            outcomes = await self._outcomes(asked)
            plain = [one.dot if isinstance(one, ev.Accepted) and not one.existed else one for one in outcomes]
            return pickle.dumps(plain, protocol=5)
        if isinstance(asked, ev.Cancel):
            self._handle(asked)
            return pickle.dumps(ev.Done())
        return pickle.dumps((await self._outcomes((asked,)))[0])

    async def _outcomes(self, events: tuple[Any, ...]) -> list[ev.Outcome]:
        """How requests end, in order; of a start that was accepted anew, in many, just the dot."""
        self._needed_at = self._loop.time()
        await self._booted.wait()
        if len(events) > MANY or self._steps.busy:  # in the order in which they came
            await self._steps.turn()
        if self._ending:
            return [self._refused_at_the_end(event.name) for event in events]
        outcomes: list[Any] = [None] * len(events)
        left, done = len(events), self._loop.create_future()

        def take(place: int, outcome: ev.Outcome) -> None:
            nonlocal left
            outcomes[place] = outcome
            left -= 1
            if not left and not done.done():
                done.set_result(None)

        wall = self._wall()
        for place, event in enumerate(events):
            self._replies[event.request] = partial(take, place)
        self._handle(*[_stamped(event, wall) for event in events])
        if left:
            await done
        return outcomes

    def _wall(self) -> int:
        return time.time_ns()

    def _refused_at_the_end(self, name: Name) -> ev.Refused:
        text = f"flock {self._record.flock!r} is being destroyed; try again when that is done"
        return ev.Refused("FlockNotRunning", text, name)

    async def routes(self, query: bytes) -> bytes:
        """Where birds can be called, of many names: waits a while for those that do not run yet. Answers a `Routes`."""
        names, timeout, dots = pickle.loads(query)
        self._needed_at = self._loop.time()
        await self._ready.wait()
        registry = self._registry
        assert registry is not None
        until = self._loop.time() + timeout
        refused = await self._not_to_come(registry, names, timeout, dots)
        while True:
            await self._steps.turn()  # what many wait for comes for all of them at once
            places, rows = readings.routes(registry, names)
            missing = [place for place, row in enumerate(rows) if row is None and place not in refused]
            if not missing or self._loop.time() >= until:
                break
            await self._runs_soon(registry, names[missing[-1]], until)
        refused.update((place, registry.desk.too_late(names[place], "running")) for place in missing)
        return pickle.dumps(ev.Routes(tuple(places), tuple(rows), refused), protocol=5)

    async def _not_to_come(
        self, registry: Registry, names: Sequence[Name], timeout: float, dots: Mapping[int, Dot]
    ) -> dict[int, ev.Refused]:
        """What is to be said of those for which it is in vain to wait: they have failed, or no nest knows them.

        Other nests are asked for what is not known here, a name or a dot that the asker knows of (C3).
        """
        unknown = {place for place, dot in dots.items() if not registry.replica.knows(dot)}
        places = [place for place, name in enumerate(names) if place in unknown or not readings.is_expected(registry, name)]
        if not places:
            return {}
        seconds = max(timeout, 2 * self._config.lookup_timeout)  # so that the other nests have been asked before it is over
        asked = tuple(ev.Locate(uuid.uuid4().hex, names[place], "running", seconds, dots.get(place)) for place in places)
        outcomes = await self._outcomes(asked)
        return {place: outcome for place, outcome in zip(places, outcomes, strict=True) if isinstance(outcome, ev.Refused)}

    async def _covers(self, registry: Registry, dots: Iterable[Dot]) -> bool:
        """Waits until what another nest has accepted is known here: one's own writes are seen (C3)."""
        until = self._loop.time() + self._config.lookup_timeout
        while not all(map(registry.replica.knows, dots)):
            if self._loop.time() > until:
                return False
            await asyncio.sleep(0.01)
        return True

    async def _runs_soon(self, registry: Registry, name: Name, until: float) -> None:
        """Waits for one of many that were started together, the last, before all are looked at again."""
        while self._loop.time() < until and readings.routes(registry, [name])[1][0] is None:
            await asyncio.sleep(0.005)

    async def read(self, query: bytes) -> bytes:
        """A pickled question about birds or nests, answered from the replica."""
        kind, *rest = pickle.loads(query)
        if kind == "notices":
            return pickle.dumps(await self._noticed(*rest))
        self._needed_at = self._loop.time()
        await self._ready.wait()
        registry = self._registry
        assert registry is not None
        if kind == "info":
            answer: Any = readings.info(registry, *rest)
        elif kind == "birds":
            answer = [bird for birds in await self._stepwise(readings.birds(registry, *rest)) for bird in birds]
        elif kind == "names":
            answer = [name for names in await self._stepwise(readings.names(registry, *rest)) for name in names]
        elif kind == "count":
            answer = len(registry.replica)
        elif kind == "nests":
            answer = readings.nests(registry, await self._tally(registry))
        elif kind == "tally":
            answer = await self._tally(registry)
        elif kind == "alone":
            answer = registry.membership.whole == {self._node}
        elif kind == "covers":
            answer = await self._covers(registry, *rest)
        elif kind == "ring":
            ring, members = registry.membership.placement.ring, self._members
            answer = tuple(ring.weights.items()), {node: members.door(node) for node in ring.weights} if members is not None else {}
        elif kind == "ran":
            answer = await self._ran(registry, *rest)
        elif kind == "explain":
            answer = await self._explain(registry, *rest)
        elif kind == "stack":
            answer = await self._stack(registry, *rest)
        else:
            raise ValueError(f"{kind!r} is no question a nest answers")
        if isinstance(answer, list) and len(answer) > PICKLED:
            return await asyncio.to_thread(pickle.dumps, answer)  # a second for 100,000 birds: a thread leaves the loop its turns
        return pickle.dumps(answer)

    async def _tally(self, registry: Registry) -> readings.Tally:
        return sum(await self._stepwise(readings.tally(registry)), Counter())

    async def _ran(self, registry: Registry, passed_on: bool = False) -> dict[str, tuple[int, int]]:
        """How many methods have run on each node since its nest began, and how many have raised; of nodes whose nests answer."""
        mine = {self._node: (self._hosts.ran, self._hosts.raised)}
        others = [life.node for life in registry.membership.view if life.node != self._node and not passed_on]
        for said in await asyncio.gather(*(self._another(node, "ran", True) for node in others)):
            mine.update(said or {})
        return mine

    async def _explain(self, registry: Registry, name: Name, passed_on: bool = False) -> Explanation | None:
        """By the owner, if it can be asked: it knows whom it waits for."""
        told = explain(registry, name)
        if told is None or passed_on or told.owner in (None, self._node):
            return told
        return await self._another(str(told.owner), "explain", name, True) or told

    async def _stack(self, registry: Registry, name: Name, passed_on: bool = False) -> BirdStack | str | None:
        """By the nest that holds the bird, from its process. A text says why there is none."""
        bird = readings.info(registry, name)
        lives = [life for life in registry.holds.lives_of(name) if life.phase is not Phase.BACKOFF]
        if lives:
            return await self._hosts.stack(lives[0].dot, lives[0].born)
        if bird is None or passed_on or bird.state in ("pending", "failed", "restarting") or bird.node_id in (None, self._node):
            return None if bird is None else f"it is {bird.state}, so nothing of it runs"
        said: BirdStack | str | None = await self._another(str(bird.node_id), "stack", name, True)
        return said or f"the nest of node {bird.node_id} has not answered"

    async def _another(self, node: str, *query: object) -> Any:
        """What the nest of another node says; `None` if it does not in time."""
        handle = self._peers.get(node)
        if handle is None:
            return None
        try:
            return pickle.loads(await asyncio.wait_for(handle.read.remote(pickle.dumps(query, protocol=5)), OTHERS))
        except (ray.exceptions.RayError, TimeoutError):
            return None

    async def _noticed(self, cursor: Cursor = UNREAD, kinds: Kinds = Notice, since: float = 0.0, seconds: float = 0.0) -> Page:
        """What is on the board after a cursor; waits so long for something."""
        await self._booted.wait()
        board = self._board
        assert board is not None
        until = self._loop.time() + seconds
        while True:
            page = board.read(cursor, kinds, since)
            left = until - self._loop.time()
            if page.notices or page.missed or page.more or left <= 0:
                return page
            cursor = page.cursor
            if self._news.done():
                self._news = self._loop.create_future()
            await asyncio.wait({self._news}, timeout=left)
            await asyncio.sleep(TOGETHER)

    async def _stepwise(self, steps: Iterable[T]) -> list[T]:
        """All of them, and between two the loop is left to others."""
        done = []
        for step in steps:
            done.append(step)
            await asyncio.sleep(0)
        return done

    async def deliver(self, packed: bytes) -> None:
        """Letters of another nest."""
        self._take_letters(packed)

    def _take_letters(self, packed: bytes | memoryview) -> None:
        if self._letterbox is None:
            return
        if not self._letterbox:
            self._steps.add(partial(self._read_letters, self._letterbox))
        self._letterbox.add(packed)

    def _read_letters(self, letterbox: letters.Letterbox) -> None:
        """Reads letters in the order in which they came, and leaves the loop to others now and then: a burst brings many."""
        until = time.monotonic() + READING
        while letterbox:
            envelopes = letterbox.take()
            try:
                self._handle(*map(ev.Received, envelopes))
            except Exception:
                self._read_singly(envelopes)
            if letterbox and time.monotonic() >= until:
                self._steps.add(partial(self._read_letters, letterbox))
                return

    def _read_singly(self, envelopes: Iterable[msg.Envelope]) -> None:
        """One of them cannot be taken in. Some have been: letters may come twice, as on any network."""
        for envelope in envelopes:
            try:
                self._handle(ev.Received(envelope))
            except Exception:
                logger.exception("a message of nest %s could not be taken in", envelope.sender)

    async def host_says(self, word: bytes) -> bytes | None:
        said = pickle.loads(word)
        if isinstance(said, wire.Words):
            await self._steps.turn()
        self._hosts.word(said)
        if isinstance(said, wire.HostReport):
            await self._booted.wait()
            assert self._registry is not None
            return pickle.dumps(wire.Welcome(self._registry.me))
        return None

    async def pid(self) -> int:
        return os.getpid()

    async def packed_pid(self) -> bytes:
        return pickle.dumps(os.getpid())

    async def ready(self) -> None:
        """Returns when this nest has its view and acts."""
        await self._ready.wait()

    async def destroy(self) -> None:
        """Ends all birds of this node in good order, and then this nest for good; one that rests is started again when it is needed."""
        rests, self._rests = self._rests, False
        if self._ending and not rests:
            return
        self._ending = True
        for take in self._replies.values():
            take(self._refused_at_the_end(""))
        await self._hosts.end_all("shutdown", SHUTDOWN)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if rests and self._registry is not None:
            await self._in_thread(cluster.put_rest, self._record.life, self._node, self._registry.me.number)
        if self._members is not None:
            await self._members.close()
        await self._in_thread(cluster.drop_address, self._record.life, self._node)
        await self._in_thread(cluster.remove_record, self._record)
        self._wires.close()
        if self._door is not None:
            self._door.close()
        if self._journal is not None:
            self._journal.close()
        self._hosts.clear_up()
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]  # Ray has no types here

    # Small things

    def _in_thread(self, work: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        return self._loop.run_in_executor(self._thread, lambda: work(*args))

    async def _in_background(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            await self._in_thread(work, *args)
        except (ray.exceptions.RayError, RuntimeError, OSError, ValueError, TimeoutError) as error:
            logger.warning("Ray could not be asked now: %s", error)

    def _task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self._ending:
            # A nest with a broken part would look alive and not act: its next life adopts its hosts.
            logger.error("a part of the nest broke; Ray starts it again", exc_info=task.exception())
            _flush_all(logging.getLogger().handlers)
            os._exit(1)


def _stamped(event: Any, wall: int) -> Any:
    """A start with this nest's clock in it; any other request as it is."""
    return ev.Start(event.request, event.name, event.spec, event.code, wall) if isinstance(event, ev.Start) else event


_ANSWERED: dict[str, Callable[..., Awaitable[bytes | None]]] = {
    "ask": Nest.ask,
    "read": Nest.read,
    "routes": Nest.routes,
    "say": Nest.host_says,
    "pid": Nest.packed_pid,
    "ready": Nest.ready,
}


def _freeze() -> None:
    """Tells Python's garbage collector to leave alone what there is now.

    It would walk through all objects there are again and again: 10 for each name, a pause of 0.1 s at 100,000 names and of a second at a
    million, and a third of what a start costs (measured). A replica has no cycles, so it never finds anything there.
    """
    gc.collect()  # or what is garbage now would stay for ever; only what came since the last time is walked through: some ms
    gc.freeze()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("flock_ray")
    if not root.handlers:
        root.addHandler(handler)
        root.setLevel(logging.INFO)


def _flush_all(handlers: Iterable[logging.Handler]) -> None:
    for handler in handlers:
        handler.flush()
