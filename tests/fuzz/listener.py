"""Fuzzing of what listens: a real host and a nest's door in a process of their own, attacked over real sockets (`attacks.py`,
`strangers.py`, `broken.py`), by several threads at a time, while slow strangers come and go.

    python -m tests.fuzz.listener --seconds 300 --seed 1
    python -m tests.fuzz.listener --seed 1 --first 4711 --inputs 1     # one input again
    python -m tests.fuzz.listener --all                                # with the inputs that known defects leave out

Input n of a seed always does the same, so a violation is found again by its number, or by the inputs about it.

Held all the time:
- the process lives, and no thread of it has died;
- good callers, over the Unix socket and over TCP, of the host and of the nest, get right answers within `LATE` over one and the same
  connection, and whoever holds the secret gets in;
- nothing is unpickled on a connection that has not proved itself, and nothing that was sent over one;
- no more strangers are let wait than `runtime/listener.py` says;
- each attack gets what is due to it: it is cut off, or answered (each says which).
At the end, when all bad peers have gone:
- memory, threads and open files are as after the warm-up, but for `SLACK`;
- the connections of good callers are left, and no other, nor streams, tasks or calls of others.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import pickle
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flock_ray.core import wire
from flock_ray.core.connection import CALL
from flock_ray.runtime.client import Client
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.sockets import SocketLink
from flock_ray.runtime.ways import DirectLink
from flock_ray.specs import Route
from tests.fuzz import Violation, promised
from tests.fuzz import transcripts as ts
from tests.fuzz.attacks import BROKEN, KNOWN, LATE, RARE, STRANGE, Clock, Floods, Target
from tests.fuzz.broken import fill
from tests.fuzz.strangers import SlowLoris
from tests.support.fakelinks import World

SLACK = {"rss": 8 << 20, "malloc": 2 << 20, "threads": 2, "files": 4}  # bytes: pools with holes; more threads may read; files
WARM_UP = 0.2  # of the time
THREADS = 3  # that attack
HANGS = 60.0  # seconds without a word from the process
MEANWHILE = 30.0  # seconds between words of how it goes
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # gives back what is free, so that what is resident is in use
LEFT = ("callers", "host_strangers", "wires", "unproved_wires", "readings", "parcels", "alive")
BUSY = ("mailbox", "running", "tasks")  # one for each good caller at most, who calls on
RARELY = 0.02  # of the inputs are slow ones


class Host:
    """The process that is attacked."""

    def __init__(self, folder: Path, as_is: bool) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-m", "tests.fuzz.victim", str(folder), *(["--as-is"] if as_is else [])]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **ALLOCATOR}
            )
        addresses = self._answer()
        self.address: str = addresses["host"]
        self.door: str = addresses["door"]
        self.folder = folder

    def _answer(self) -> Any:
        there, _, _ = select.select([self.process.stdout], [], [], HANGS)
        line = self.process.stdout.readline() if there else ""
        promised(line, f"the process lives and answers (exit code {self.process.poll()}):\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def targets(self, clock: Clock) -> list[Target]:
        ip, _, port = self.address.split()[0].rpartition(":")
        door_ip, _, door_port = self.door.rpartition(":")
        addresses = {
            "host, Unix": self.folder / self.address.split()[1],
            "host, TCP": (ip, int(port)),
            "nest, Unix": self.folder / "nest.sock",
            "nest, TCP": (door_ip, int(door_port)),
        }
        floods = Floods()
        return [Target(name, address, clock, floods) for name, address in addresses.items()]


class Good:
    """A good caller: calls again and again, and compares.

    Args:
        ask: one request with a number; returns whether the answer is right.
        lost: has its connection broken?
    """

    def __init__(self, name: str, ask: Any, lost: Any, clock: Clock) -> None:
        self.name, self._ask, self._lost, self._clock = name, ask, lost, clock
        self.answers = 0
        self.longest = 0.0
        self.wrong = ""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self.wrong:
            began = time.monotonic()
            try:
                right = self._ask(self.answers)
            except BaseException as error:
                right = False
                self.wrong = f"{self.name}: {type(error).__name__}: {error}"
            took = time.monotonic() - began
            if not right:
                self.wrong = self.wrong or f"{self.name}: a wrong answer"
            elif self._lost():
                self.wrong = f"{self.name}: its connection broke"
            elif took > LATE and self._clock.passed(began) > LATE:
                self.wrong = f"{self.name}: its answer took {took:.2f} s"
            self.answers += 1
            self.longest = max(self.longest, took)
            time.sleep(0.01)  # between calls: it is a test of answers, not of speed


def good_callers(host: Host, clock: Clock) -> list[Good]:
    made = []
    courier = Courier()
    for local in (True, False):
        where = host.folder if local else host.folder / "nowhere"
        world = World()
        client = Client("default", world, courier)
        courier.run(client.asks.config())
        link = DirectLink(ts.SECRET, ts.LIFE, host.address, where, courier, _no_ray)
        route = Route("a", ts.DOT, 1, "node", "h", host.address)
        world.hosts["h"], world.routes["a"] = link, route
        client.learn(route, link)

        def echo(n: int, client: Client = client) -> bool:
            return client.call("a", None, "echo", (n,), {}, 5 * LATE, False) == n

        made.append(Good(f"a good caller over {link.path}", echo, link.lost, clock))
        door = SocketLink(ts.SECRET, ts.LIFE, f"{host.door} nest.sock", where)

        def pid(n: int, door: SocketLink = door) -> bool:
            return pickle.loads(door.transmit(CALL, wire.encode(wire.ForNest("pid"))).get(5 * LATE).message) == host.process.pid

        made.append(Good(f"a good caller of the nest over {door.path}", pid, door.lost, clock))
    return made


def _no_ray() -> Any:
    raise Violation("a good caller's message went by Ray")


class Run:
    """One run, from the first input to the verdict."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self._given = given
        clock = Clock()
        self._host = Host(folder, given.all)
        self._targets = self._host.targets(clock)
        self._good = good_callers(self._host, clock)
        self._loris = SlowLoris(given.seed, self._targets)
        self._last: collections.deque[str] = collections.deque(maxlen=4 * THREADS)
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds: collections.Counter[str] = collections.Counter()
        self._numbers = itertools.count(given.first)
        self._next = given.first
        self._until = 0.0
        self._failed: BaseException | None = None

    def run(self) -> int:
        given = self._given
        begin = time.monotonic()
        try:
            if given.inputs:
                self._attack(begin + 1e9, given.first + given.inputs)
                self._check()
                print(f"{given.inputs:,} inputs, and no violation")
                return 0
            for target in self._targets[:2]:
                fill(target)
            self._attack(begin + given.seconds * WARM_UP)
            before = self._quiet()
            self._say("after the warm-up", before)
            self._attack(begin + given.seconds)
            after = self._quiet(before)
            self._say("at the end", after)
            self._compare(before, after)
        except (Violation, OSError) as error:
            self._report(error)
            return 1
        self._summary(time.monotonic() - begin, before, after)
        return 0

    def _attack(self, until: float, end: int = 1 << 60) -> None:
        """All threads attack until then, or until that input."""
        self._until = until
        threads = [threading.Thread(target=self._inputs, args=(end,), daemon=True) for _ in range(THREADS)]
        self._loris.come()
        for thread in threads:
            thread.start()
        looked = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)  # between looks
            try:
                self._check()
            except Violation as error:
                self._failed = self._failed or error
            if time.monotonic() - looked > MEANWHILE:
                looked = time.monotonic()
                self._say("meanwhile", self._host.ask("stats"))
        self._loris.rest()
        if self._failed is not None:
            raise self._failed

    def _inputs(self, end: int) -> None:
        targets = [target.again() for target in self._targets]
        while self._failed is None and time.monotonic() < self._until:
            number = next(self._numbers)
            if number >= end:
                return
            self._next = max(self._next, number)
            self._one_input(number, targets)

    def _one_input(self, number: int, targets: list[Target]) -> None:
        given, rng = self._given, random.Random(f"{self._given.seed}.{number}")
        target = rng.choice(targets)
        kind = RARE if rng.random() < RARELY else rng.choice((STRANGE, BROKEN))
        attack = rng.choice(kind.on(target))
        name = attack.__name__
        if (given.only and name not in given.only) or (name in KNOWN and not given.all):
            return
        target.sent.clear()
        began = time.monotonic()
        try:
            attack(rng, target)
        except OSError as error:
            if not target.floods.since(began):  # one that fills the backlog holds up all who come
                self._failed = self._failed or Violation(f"{name} of {target.name}: {type(error).__name__}: {error}")
        except Exception as error:
            self._failed = self._failed or error
            self._last.append(f"THIS ONE: {number}: {name} of {target.name}")
        self._counts[name] += 1
        self._seconds[name] += time.monotonic() - began
        self._last.append(f"{number}: {name} of {target.name}: {b''.join(target.sent)[:1500].hex()}")

    def _check(self) -> None:
        promised(self._host.process.poll() is None, f"the process lives; it ended with {self._host.process.poll()}")
        for good in self._good:
            promised(not good.wrong, good.wrong)
        promised(not self._loris.violation, self._loris.violation)
        said = self._host.ask("quick")
        promised(not said["violations"], "; ".join(said["violations"]))

    def _quiet(self, like: dict[str, Any] | None = None) -> dict[str, Any]:
        """Waits until what bad peers left has gone; says what is there."""
        end = time.monotonic() + 5 * LATE
        while True:
            self._check()
            time.sleep(0.3)
            now = self._host.ask("stats")
            done = not self._loris.now and now["callers"] == 3 and now["wires"] == 2 and not now["host_strangers"] and not now["readings"]
            if time.monotonic() > end or (done and (like is None or all(now[key] == like[key] for key in LEFT))):
                return now

    def _compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        for key in LEFT:
            promised(after[key] == before[key], f"{key}: {before[key]} after the warm-up, {after[key]} at the end")
        promised((after["callers"], after["wires"]) == (3, 2), f"{after['callers']} and {after['wires']} connections are left, not 3 and 2")
        for key in BUSY:
            promised(after[key] <= len(self._good), f"{key}: {after[key]} at the end")
        for key, slack in SLACK.items():
            promised(after[key] <= before[key] + slack, f"{key}: {before[key]:,} after the warm-up, {after[key]:,} at the end")
        promised(after["state"] == "running", f"the bird is {after['state']}")

    def _say(self, when: str, stats: dict[str, Any]) -> None:
        print(
            f"{when}: input {self._next:,}, {json.dumps({key: value for key, value in stats.items() if key != 'violations'})}", flush=True
        )

    def _summary(self, seconds: float, before: dict[str, Any], after: dict[str, Any]) -> None:
        total = sum(self._counts.values()) + self._loris.inputs
        print(f"listener: {total:,} inputs in {seconds:.0f} s, seed {self._given.seed}")
        print(f"of these: {dict(self._counts.most_common())}, slow_loris: {self._loris.inputs}")
        print(f"ms of one: {self._costs()}")
        for key, what in {"rss": "resident", "malloc": "given out by malloc"}.items():
            print(f"memory, {what}: {before[key] >> 10:,} KB after the warm-up, {after[key] >> 10:,} KB at the end")
        for good in self._good:
            print(f"{good.name}: {good.answers:,} right answers, the latest after {good.longest:.2f} s")
        print(f"left out: {'nothing' if self._given.all else KNOWN}")
        print(f"what was raised or logged: {json.dumps(self._host.ask('raised'), indent=1)}")
        print("checked:" + __doc__.partition("Held all the time:")[2].rstrip(), flush=True)

    def _costs(self) -> dict[str, float]:
        return {name: round(self._seconds[name] / count * 1000, 1) for name, count in self._counts.most_common()}

    def _report(self, error: BaseException) -> None:
        given = self._given
        print(f"VIOLATION at input {self._next:,} of seed {given.seed}: {type(error).__name__}: {error}", flush=True)
        print(f"ms of one: {self._costs()}")
        print("the last inputs, and the bytes that they sent:\n  " + "\n  ".join(self._last))
        switch = " --all" if given.all else ""
        print(f"python -m tests.fuzz.listener --seed {given.seed} --first {max(0, self._next - 12)} --inputs 13{switch}")
        print("the end of the process's log:\n" + self._host.log.read_text()[-4000:], flush=True)

    def end(self) -> None:
        self._host.process.kill()
        self._host.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=0, help="so many inputs, and no look at what is left")
    parser.add_argument("--only", nargs="*", help="names of attacks")
    parser.add_argument("--all", action="store_true", help="leave nothing out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), given)
        try:
            code = run.run()
        finally:
            run.end()
    sys.exit(code)


if __name__ == "__main__":
    main()
