"""The nest's side of its hosts: starts their processes, passes orders on, sees them die, and finds those of an earlier life of the nest.

A host's death is seen through a pidfd, in a millisecond and without a pending call (V1). What a host says comes through `word`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import signal
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.actor import ActorHandle

from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.core.connection import CONTROL
from flock_ray.runtime import cluster
from flock_ray.runtime.cluster import FlockLife
from flock_ray.runtime.host import HostBoot
from flock_ray.runtime.listener import socket_path
from flock_ray.runtime.peers import Wires
from flock_ray.runtime.tether import started
from flock_ray.specs import Dot, Life, Name, Options, Spec

InThread = Callable[..., Awaitable[Any]]
FILL = 1.0  # seconds until a spare that was taken is replaced: its bird starts first
KINDS = 4  # of spares that are kept
FAREWELL = 15.0  # seconds within which a host that keeps nothing ends by itself, or is killed


def surroundings(spec: Spec) -> dict[str, Any]:
    """What the starter of a bird brought along: `env` (its runtime_env), `job`, `path`, and `async`."""
    return dict(json.loads(spec.runtime_env)) if spec.runtime_env else {}


class Kind(NamedTuple):
    """What a spare must be like to be a bird's host: its process cannot become another."""

    env: str  # the runtime_env, as Ray serialises it
    is_async: bool

    @classmethod
    def of(cls, spec: Spec) -> Kind:
        brought = surroundings(spec)
        return cls(str(brought.get("env") or ""), bool(brought.get("async")))


@dataclass(slots=True)
class Process:
    """A host's process as its nest knows it; without a dot it is a spare."""

    host: str
    dot: Dot | None = None
    born: int = 0
    handle: ActorHandle[Any] | None = None
    pid: int = 0
    pidfd: int = -1
    over: bool = False  # it has reported the end of its life, and keeps at most a record or an exit
    killed_for: str = ""
    deadline: asyncio.TimerHandle | None = None


class Hosts:
    """All hosts of a nest.

    Args:
        in_thread: runs a blocking function of `cluster` in the nest's thread for it.
        tell: takes the events of lives.
        refused: takes which host turned connections away, why, and how many.
    """

    def __init__(
        self,
        record: FlockLife,
        node: str,
        nest: ActorHandle[Any],
        in_thread: InThread,
        tell: Callable[[ev.Event], None],
        refused: Callable[[str, str, int], object],
    ) -> None:
        self._record = record
        self._node = node
        self._nest = nest
        self._in_thread = in_thread
        self._tell = tell
        self._refused = refused
        self._wires = Wires(record.secret, record.life, None, self._order_by_ray)
        self._directory = cluster.session_directory(record.life)
        self._processes: dict[tuple[Dot, int], Process] = {}
        self._by_host: dict[str, Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeps_spares = record.config.spares > 0
        self._spares: dict[Kind, list[Process]] = {}  # by what birds were like lately, the latest last
        self._reports: dict[str, wire.HostReport] = {}
        self._expected: set[str] = set()
        self._reported = asyncio.Event()
        self.adopting = True
        self.life: Life | None = None  # of the nest, once it has one

    # Orders

    def hatch(self, effect: do.Hatch) -> None:
        kind, brought = Kind.of(effect.spec), surroundings(effect.spec)
        order = wire.HatchOrder(
            self._record.flock, effect.name, effect.dot, effect.born, effect.spec, effect.code, effect.restarts, effect.crashes,
            effect.state, effect.has_state, str(brought.get("job", "")), tuple(brought.get("path", ())),
        )  # fmt: skip
        spare = self._spare_for(kind, effect.spec.options)
        process = spare or self._new(kind)
        process.dot, process.born = effect.dot, effect.born
        self._processes[effect.dot, effect.born] = process
        if spare is not None:
            self._order(spare, order)
        else:
            self._task(self._start(process, kind, effect.spec.options, order))

    def _new(self, kind: Kind) -> Process:
        name = f"{'async:' if kind.is_async else ''}host:{self._record.life}:{self._node[:8]}:{uuid.uuid4().hex[:10]}"
        process = self._by_host[name] = Process(name)
        return process

    async def _start(self, process: Process, kind: Kind, options: Options, order: wire.HatchOrder | None) -> None:
        """Starts a host's process; without an order it waits for one."""
        boot = HostBoot(
            host=process.host,
            flock=self._record.flock,
            flock_life=self._record.life,
            nest_grace=self._record.config.nest_grace,
            directory=str(self._directory),
            nest_pid=os.getpid(),
            nest=self.life,
            mailbox=self._record.config.mailbox,
            secret=self._record.secret if self._record.config.wire == "auto" else b"",
            ports=self._record.config.ports,
        )
        try:
            process.handle = await self._in_thread(
                cluster.start_host, process.host, pickle.dumps(boot), self._nest, self._node, options, kind.is_async, kind.env
            )
            if process.killed_for:
                await self._in_thread(ray.kill, process.handle)
            await process.handle.hatch.remote(pickle.dumps(order) if order is not None else b"")
        except Exception as error:  # Ray's many, and what a user's options may do to it: the life has not begun, or may not go on unwatched
            if process.over:
                return
            if process.handle is None:
                self._died(process, str(error))
            else:
                self._kill(process, str(error))

    # Spares

    def begin_spares(self) -> None:
        """Has the first ones started, of the most common kind."""
        self._later_fill(Kind("", False))

    def _spare_for(self, kind: Kind, options: Options) -> Process | None:
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
                self._dismiss(spare)
        asyncio.get_running_loop().call_later(FILL, self._fill, kind)

    def _fill(self, kind: Kind) -> None:
        spares = self._spares.get(kind)
        while self._keeps_spares and spares is not None and len(spares) < self._record.config.spares and not self._is_memory_low():
            spare = self._new(kind)
            spares.append(spare)
            self._task(self._start(spare, kind, Options(), None))

    def _is_memory_low(self) -> bool:
        memory = psutil.virtual_memory()
        return bool(memory.available < self._record.config.min_free_memory * memory.total)

    def _dismiss(self, spare: Process) -> None:
        if spare.pid:
            self._order(spare, wire.LeaveOrder())
            asyncio.get_running_loop().call_later(FAREWELL, self._kill, spare, "it was a spare that is not wanted any more")
        else:
            self._kill(spare, "it was a spare that is not wanted any more")

    def end(self, effect: do.EndLife) -> None:
        process = self._processes.get((effect.dot, effect.born))
        if process is None:
            self._tell(wire.LifeEnded(effect.dot, effect.born))
            return
        order = wire.EndOrder(effect.dot, effect.born, effect.reason, effect.keep, effect.timeout)
        text = f"it did not end within stop_timeout={effect.timeout:g} s"
        process.deadline = asyncio.get_running_loop().call_later(effect.timeout, self._kill, process, text)
        if process.pid:
            self._order(process, order)
        else:  # nothing of it runs yet
            self._kill(process, "it was ended before its process was there")

    def kill(self, effect: do.Kill) -> None:
        process = self._processes.get((effect.dot, effect.born))
        if process is not None:
            self._kill(process, effect.error)

    def raise_incarnation(self, effect: do.Raise) -> None:
        process = self._processes.get((effect.dot, effect.born))
        if process is not None:
            self._order(process, wire.RaiseOrder(effect.dot, effect.born, effect.incarnation))

    def forget(self, dot: Dot) -> None:
        for process in [process for process in self._processes.values() if process.dot == dot and process.over]:
            self._order(process, wire.ForgetOrder(dot))
            asyncio.get_running_loop().call_later(FAREWELL, self._kill, process, "its life was over and it did not end")

    def _order(self, process: Process, order: object) -> None:
        packed, path = wire.encode(order), socket_path(self._directory, process.pid)
        if not (process.pid and path.exists() and self._wires.send(process.host, path, CONTROL, packed)):
            self._order_by_ray(process.host, packed)

    def _order_by_ray(self, host: str, order: bytes) -> None:
        """For hosts that listen not yet, or not at all."""
        process = self._by_host.get(host)
        if process is not None and process.handle is not None:
            process.handle.control.remote(order)

    def _kill(self, process: Process, why: str) -> None:
        if process.host not in self._by_host:
            return
        process.killed_for = process.killed_for or why
        if process.pidfd >= 0:
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        elif process.handle is not None:
            self._task(self._kill_unseen(process))

    async def _kill_unseen(self, process: Process) -> None:
        await self._in_thread(ray.kill, process.handle)
        self._died(process, "it was killed")

    async def end_all(self, reason: str, timeout: float) -> None:
        """Ends every life in good order, and every process within the timeout (seconds)."""
        self._keeps_spares = False
        for spare in [spare for spares in self._spares.values() for spare in spares]:
            self._dismiss(spare)
        self._spares.clear()
        for dot, born in list(self._processes):
            self._order(self._processes[dot, born], wire.EndOrder(dot, born, reason, False, timeout))
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while any(not process.over for process in self._processes.values()) and loop.time() < end:
            await asyncio.sleep(0.02)
        for process in list(self._processes.values()):
            if process.over and process.handle is not None:
                process.handle.__ray_terminate__.remote()  # in good order: Ray warns of processes that just die
            else:
                self._kill(process, reason)
        end = loop.time() + FAREWELL / 5
        while self._by_host and loop.time() < end:
            await asyncio.sleep(0.02)
        for process in list(self._by_host.values()):
            self._kill(process, reason)

    def clear_up(self) -> None:
        """The flock's life is over: nothing of it is to be found here any more."""
        self._wires.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # another node of this machine still has something in it
            self._directory.parent.rmdir()

    # What hosts say

    def word(self, word: object) -> None:
        """Takes what a host says. Unknown hosts are of nobody's making any more, and are ended."""
        if isinstance(word, wire.HostUp):
            process = self._by_host.get(word.host)
            if process is None:
                _end_unknown(word.pid)
            elif not process.pid:
                self._watch(process, word.pid)
        elif isinstance(word, wire.HostReport):
            self._reports[word.host] = word
            if self.adopting and self._expected <= set(self._reports):
                self._reported.set()
            elif not self.adopting and word.host not in self._by_host:
                _end_unknown(word.pid)
        elif isinstance(word, wire.Refused):
            self._refused(word.host, word.why, word.times)
        elif isinstance(word, wire.LifeRunning | wire.LifeCrashed | wire.LifeExited | wire.LifeEnded):
            self._ended_of_itself(word)
            self._tell(word)

    def _ended_of_itself(self, word: wire.LifeRunning | wire.LifeCrashed | wire.LifeExited | wire.LifeEnded) -> None:
        process = self._processes.get((word.dot, word.born))
        if process is None or isinstance(word, wire.LifeRunning):
            return
        process.over = True
        if process.deadline is not None:
            process.deadline.cancel()
        if isinstance(word, wire.LifeCrashed) or (isinstance(word, wire.LifeEnded) and not word.handed_over):
            asyncio.get_running_loop().call_later(FAREWELL, self._kill, process, "its life was over and it did not end")

    def _watch(self, process: Process, pid: int) -> None:
        process.pid = pid
        try:
            process.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._died(process, "its process died")
            return
        asyncio.get_running_loop().add_reader(process.pidfd, self._died, process, "its process died (killed, or out of memory?)")
        if process.killed_for:
            self._kill(process, process.killed_for)

    def _died(self, process: Process, text: str) -> None:
        if self._by_host.pop(process.host, None) is None:
            return
        self._wires.drop(process.host)
        if process.deadline is not None:
            process.deadline.cancel()
        if process.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
            socket_path(self._directory, process.pid).unlink(missing_ok=True)
        if process.dot is None:
            for spares in self._spares.values():
                if process in spares:
                    spares.remove(process)  # the next bird of its kind has another started: one that cannot start is not tried in a loop
            return
        del self._processes[process.dot, process.born]
        if not process.over:
            self._tell(wire.LifeCrashed(process.dot, process.born, process.killed_for or text))

    # Those of an earlier life of the nest (V2)

    async def adopt(self, patience: float) -> tuple[list[ev.Adopted], list[tuple[Name, Dot]], list[wire.LifeCrashed]]:
        """Waits until every host found on this node has said what it holds; one that does not is ended.

        Returns:
            What they hold, the birds that ended normally meanwhile, and those that crashed.
        """
        found = {host: pid for host, pid in map(_read_entry, self._directory.glob("*.json")) if pid}
        self._expected = set(found)
        if not self._expected <= set(self._reports):
            try:
                await asyncio.wait_for(self._reported.wait(), patience)
            except TimeoutError:
                for host in self._expected - set(self._reports):
                    _end_unknown(found[host])
        self.adopting = False
        adopted, exits, crashes = [], [], []
        for report in self._reports.values():
            process = Process(report.host, report.dot, report.born, over=report.state not in ("starting", "running"))
            process.handle = await self._in_thread(cluster.host_handle, report.host)
            self._processes[report.dot, report.born] = self._by_host[report.host] = process
            if report.state == "exited":
                exits.append((report.name, report.dot))
            else:
                adopted.append(_adopted(report))
            if report.state == "crashed":
                crashes.append(wire.LifeCrashed(report.dot, report.born, report.error))
            self._watch(process, report.pid)
        return adopted, exits, crashes

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _adopted(report: wire.HostReport) -> ev.Adopted:
    running = report.state != "starting"
    return ev.Adopted(
        report.name, report.dot, report.spec, report.code, report.incarnation, report.born, report.host,
        report.restarts, report.crashes, running, report.record, report.address,
    )  # fmt: skip


def _read_entry(path: Path) -> tuple[str, int]:
    """A host's name and pid from its file; pid 0 if that process is gone (its file is then removed)."""
    try:
        entry = json.loads(path.read_text())
        host, pid = str(entry["host"]), int(entry["pid"])
        if started(pid) == entry["started"] != 0:
            return host, pid
    except (OSError, ValueError, KeyError):
        pass  # half written, or just removed: its process is not one that runs a bird
    path.unlink(missing_ok=True)
    return "", 0


def _end_unknown(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()
