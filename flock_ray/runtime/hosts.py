"""The nest's side of its hosts: which process a life is hatched in, what becomes of it, and those of an earlier life of the nest.

A bird has a process of its own, or, if it is light, shares one with others: as many for each runtime_env as the node has CPUs. When such
a process dies, the birds whose code ran in it at that moment have crashed, and the others are merely hatched again. One that does not
return when it is to end takes its process along: before that its neighbours are moved out (H3).

What a host says comes through `word`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.runtime.cluster import FlockLife
from flock_ray.runtime.processes import LIGHT, InThread, Kind, Process, Processes, end_unknown
from flock_ray.runtime.recorder import suspects
from flock_ray.runtime.tether import started
from flock_ray.specs import BirdStack, Dot, Life, Name, Options

CROWD = 64  # light birds in each process there is before another is started: half a second of CPU for fewer is a waste
EMPTY = 60.0  # seconds until a process for light birds that holds none ends
ANSWERS = 3.0  # seconds a process has to say what a bird in it does
SOON = 60.0  # seconds within which deaths of processes for light birds count together


@dataclass(slots=True, eq=False)
class Held:
    """A life in a process."""

    process: Process
    name: Name
    dot: Dot
    born: int
    over: bool = False  # it has ended, and its host keeps at most a record or an exit
    deadline: asyncio.TimerHandle | None = None
    killed_for: str = ""


class Hosts:
    """All lives that a nest has in processes.

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
        tell: Callable[..., None],
        refused: Callable[[str, str, int], object],
    ) -> None:
        self._record = record
        self._tell = tell
        self._refused = refused
        self._processes = Processes(record, node, nest, in_thread, self._ended)
        self._directory = self._processes.directory
        self._lives: dict[tuple[Dot, int], Held] = {}
        self._kept: dict[Dot, list[Held]] = {}  # those that are over
        self._light: dict[str, list[Process]] = {}  # by runtime_env
        self._deaths: list[float] = []  # of processes for light birds, lately
        self._light_hosts = record.config.light_hosts or 1
        self._reports: dict[str, wire.HostReport] = {}
        self._expected: set[str] = set()
        self._reported = asyncio.Event()
        self.adopting = True
        self.ran = self.raised = 0  # methods that hosts have run and that have raised, in this life of the nest

    def begin(self, life: Life, cpus: float) -> None:
        """This is the nest's life, on a node with so many CPUs."""
        self._processes.life = life
        self._light_hosts = self._record.config.light_hosts or max(1, int(cpus))

    def begin_spares(self) -> None:
        self._processes.begin_spares()

    # Orders

    def hatch(self, effect: do.Hatch) -> None:
        spec, brought = effect.spec, effect.spec.brought
        kind, options = Kind.of(spec), spec.options
        order = wire.HatchOrder(
            self._record.flock, effect.name, effect.dot, effect.born, spec, effect.code, effect.restarts, effect.crashes,
            effect.state, effect.has_state, brought.get("job", ""), tuple(brought.get("path", ())),
        )  # fmt: skip
        process = self._light_host(kind) if kind.light else self._processes.spare_for(kind, options)
        given = process is not None
        if process is None:
            process = self._processes.new(kind, options, order)
        self._hold(process, effect.name, effect.dot, effect.born)
        if given:
            self._processes.order(process, order)

    def _hold(self, process: Process, name: Name, dot: Dot, born: int) -> Held:
        held = self._lives[dot, born] = Held(process, name, dot, born)
        process.lives += 1
        process.alive += 1
        return held

    def _light_host(self, kind: Kind) -> Process:
        """The one with the fewest birds; or another, while there are not enough and all are crowded."""
        hosts = self._light[kind.env] = [one for one in self._light.get(kind.env, ()) if self._takes_more(one)]
        if len(hosts) < self._light_hosts and all(one.lives >= CROWD for one in hosts):
            hosts.append(self._processes.new(kind, Options(), None))
        return min(hosts, key=lambda one: one.lives)

    def _takes_more(self, process: Process) -> bool:
        return not process.condemned and not process.killed_for and self._processes.get(process.host) is process

    def end(self, effect: do.EndLife) -> None:
        held = self._lives.get((effect.dot, effect.born))
        if held is None:
            self._tell(wire.LifeEnded(effect.dot, effect.born))
            return
        order = wire.EndOrder(effect.dot, effect.born, effect.reason, effect.keep, effect.timeout)
        text = f"it did not end within stop_timeout={effect.timeout:g} s"
        held.deadline = asyncio.get_running_loop().call_later(effect.timeout, self._end_process_of, held, text)
        if self._take_back(held):
            self._tell(wire.LifeEnded(effect.dot, effect.born))
        elif held.process.pid or held.process.kind.light:
            self._processes.order(held.process, order)
        else:  # nothing of it runs yet
            self._processes.kill(held.process, "it was ended before its process was there")

    def _take_back(self, held: Held) -> bool:
        """Takes back the order to hatch a light bird, if its host has not been given it."""
        if held.process.unsent.pop((held.dot, held.born), None) is None:
            return False
        self._over(held)
        self._drop(held)
        return True

    def kill(self, effect: do.Kill) -> None:
        held = self._lives.get((effect.dot, effect.born))
        if held is not None:
            self._end_process_of(held, effect.error)

    def _end_process_of(self, held: Held, why: str) -> None:
        """Ends a life by ending its process; of a light bird after its neighbours have left."""
        process = held.process
        if held.over or held.killed_for:
            return
        held.killed_for = why
        process.stuck += 1
        if self._take_back(held):
            self._tell(wire.LifeCrashed(held.dot, held.born, why))
        elif not process.condemned and process.alive > process.stuck:
            process.condemned = True
            neighbours = [one for one in self._lives.values() if one.process is process and not one.over and not one.killed_for]
            self._tell(ev.Evacuate(tuple((one.dot, one.born) for one in neighbours)))
        else:
            process.condemned = True
            self._end_if_deserted(process)

    def _end_if_deserted(self, process: Process) -> None:
        """None is left in it that could leave: it is killed for those that do not."""
        if process.condemned and process.stuck and process.alive <= process.stuck:
            stuck = (one for one in self._lives.values() if one.process is process and not one.over)
            self._processes.kill(process, next((one.killed_for for one in stuck if one.killed_for), "a bird in it did not return"))

    async def stack(self, dot: Dot, born: int) -> BirdStack | str:
        """What a life does, as its process says; or why that cannot be said."""
        held = self._lives.get((dot, born))
        handle = held.process.handle if held is not None else None
        if held is None or handle is None:
            return "its process is just being started" if held is not None else "its process has ended"
        try:
            answer: bytes = await asyncio.wait_for(handle.control.remote(wire.encode(wire.StackOrder(dot))), ANSWERS)
        except TimeoutError:
            return f"its process (pid {held.process.pid or 'not known yet'}) has not answered within {ANSWERS:g} s"
        except ray.exceptions.RayError:
            return "its process has just ended"
        found: BirdStack | None = pickle.loads(answer)
        return found if found is not None else "its process has not begun it yet"

    def raise_incarnation(self, effect: do.Raise) -> None:
        held = self._lives.get((effect.dot, effect.born))
        if held is not None:
            self._processes.order(held.process, wire.RaiseOrder(effect.dot, effect.born, effect.incarnation))

    def forget(self, dot: Dot) -> None:
        for held in self._kept.pop(dot, ()):
            self._processes.order(held.process, wire.ForgetOrder(dot))
            if held.process.kind.light:
                self._drop(held)
            else:
                self._processes.kill_later(held.process, "its life was over and it did not end")

    async def end_all(self, reason: str, timeout: float) -> None:
        """Ends every life in good order, and every process within the timeout (seconds)."""
        self._processes.drop_spares()
        for held in self._lives.values():
            if not held.process.kind.light:
                self._processes.order(held.process, wire.EndOrder(held.dot, held.born, reason, False, timeout))
        for process in self._processes.all():
            if process.kind.light:
                for held in [held for key, held in self._lives.items() if key in process.unsent]:
                    self._take_back(held)
                self._processes.order(process, wire.EndAllOrder(reason, timeout))
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while (alive := self._with_lives()) and loop.time() < end:
            await asyncio.sleep(0.02)
        await self._processes.end_all(reason, lambda process: process not in alive)

    def _with_lives(self) -> set[Process]:
        return {held.process for held in self._lives.values() if not held.over}

    def clear_up(self) -> None:
        """The flock's life is over: nothing of it is to be found here any more."""
        self._processes.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # another node of this machine still has something in it
            self._directory.parent.rmdir()

    # What hosts say

    def word(self, word: object) -> None:
        """Takes what a host says."""
        words = word.words if isinstance(word, wire.Words) else (word,)
        events = [event for event in map(self._take, words) if event is not None]
        if events:
            self._tell(*events)

    def _note_ran(self, word: wire.Ran) -> None:
        """Of a host that an earlier life of the nest has started, the first word only says where it stands."""
        process = self._processes.get(word.host)
        if process is not None:
            before, process.ran = process.ran or word, word
            self.ran += word.ran - before.ran
            self.raised += word.raised - before.raised

    def _take(self, word: object) -> ev.Event | None:
        """Takes one word, and says what of it is an event. Unknown hosts are of nobody's making any more, and are ended."""
        if isinstance(word, wire.HostUp):
            process = self._processes.get(word.host)
            if process is None:
                end_unknown(word.pid)
            elif not process.pid:
                self._processes.watch(process, word.pid)
        elif isinstance(word, wire.HostReport):
            self._reports[word.host] = word
            if self.adopting and self._expected <= set(self._reports):
                self._reported.set()
            elif not self.adopting and self._processes.get(word.host) is None:
                end_unknown(word.pid)
        elif isinstance(word, wire.Ran):
            self._note_ran(word)
        elif isinstance(word, wire.Refused):
            self._refused(word.host, word.why, word.times)
        elif isinstance(word, wire.LifeBegins | wire.LifeRunning):
            return word
        elif isinstance(word, wire.LifeCrashed | wire.LifeExited | wire.LifeEnded):
            self._ended_of_itself(word)
            return word
        return None

    def _ended_of_itself(self, word: wire.LifeCrashed | wire.LifeExited | wire.LifeEnded) -> None:
        held = self._lives.get((word.dot, word.born))
        if held is None or held.over:
            return
        process = held.process
        self._over(held)
        if isinstance(word, wire.LifeCrashed) or (isinstance(word, wire.LifeEnded) and not word.handed_over):
            if process.kind.light:
                self._drop(held)
            else:
                self._processes.kill_later(process, "its life was over and it did not end")
        self._end_if_deserted(process)

    def _over(self, held: Held) -> None:
        held.over = True
        held.process.alive -= 1
        held.process.stuck -= bool(held.killed_for)
        if held.deadline is not None:
            held.deadline.cancel()
        self._kept.setdefault(held.dot, []).append(held)

    def _drop(self, held: Held) -> None:
        """Its process keeps nothing of it."""
        if self._lives.pop((held.dot, held.born), None) is None:
            return
        kept = [one for one in self._kept.pop(held.dot, ()) if one is not held]
        if kept:
            self._kept[held.dot] = kept
        held.process.lives -= 1
        self._end_if_deserted(held.process)
        if not held.process.lives and held.process.kind.light:
            asyncio.get_running_loop().call_later(EMPTY, self._end_if_empty, held.process)

    def _end_if_empty(self, process: Process) -> None:
        if not process.lives and self._takes_more(process):
            process.condemned = True
            self._processes.dismiss(process, "it has held no birds for a while, and did not end")

    def _ended(self, process: Process, why: str) -> None:
        """A process is gone, with all it held."""
        shared = process.kind.light and process.ready  # one that never came up is what these birds have asked for
        guilty = suspects(self._directory, process.pid) if shared else frozenset()
        pause = self._pause_after_death() if shared and not process.condemned else 0.0
        events: list[ev.Event] = []
        for held in [held for held in self._lives.values() if held.process is process]:
            was_over = held.over
            if not was_over:
                self._over(held)
            self._drop(held)
            if was_over:
                continue
            if not shared or held.killed_for or (held.dot.counter, held.dot.life.number) in guilty:
                events.append(wire.LifeCrashed(held.dot, held.born, held.killed_for or why))
            else:
                events.append(ev.LifeLost(held.dot, held.born, f"the process that it shared ended: {why}", pause))
        if events:
            self._tell(*events)

    def _pause_after_death(self) -> float:
        """Seconds to wait before birds are hatched again whose process has died: none at first, more when that happens again and again."""
        now = asyncio.get_running_loop().time()
        self._deaths = [*(at for at in self._deaths if now - at < SOON), now]
        allowed, config = self._light_hosts, self._record.config
        again = len(self._deaths) - allowed
        return min(config.backoff_initial * 2.0 ** min(again, 64), config.backoff_max) if again > 0 else 0.0

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
                    end_unknown(found[host])
        self.adopting = False
        adopted, exits, crashes = [], [], []
        for report in list(self._reports.values()):
            kind = _kind_of(report)
            process = await self._processes.adopt(report, kind)
            if kind.light:
                self._light.setdefault(kind.env, []).append(process)
            for life in report.lives:
                held = self._hold(process, life.name, life.dot, life.born)
                if life.state not in ("starting", "running"):
                    self._over(held)
                if life.state == "released" and life.record is None:  # it has ended, and keeps nothing
                    if kind.light:
                        self._drop(held)
                    continue
                if life.state == "exited":
                    exits.append((life.name, life.dot))
                else:
                    adopted.append(_adopted(report, life))
                if life.state == "crashed":
                    crashes.append(wire.LifeCrashed(life.dot, life.born, life.error))
            self._processes.watch(process, report.pid)
        return adopted, exits, crashes


def _adopted(report: wire.HostReport, life: wire.LifeReport) -> ev.Adopted:
    running = life.state != "starting"
    return ev.Adopted(
        life.name, life.dot, life.spec, life.code, life.incarnation, life.born, report.host,
        life.restarts, life.crashes, running, life.record, report.address,
    )  # fmt: skip


def _kind_of(report: wire.HostReport) -> Kind:
    kinds = [Kind.of(life.spec) for life in report.lives[:1]]
    return kinds[0] if kinds else Kind("", light=report.host.startswith(LIGHT))


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
