"""The registry at 100,000 names and more: what a start costs, what a lost node costs, and what a name takes, in the pure core.

    python benchmarks/registry.py [--json FILE] [--names N] [--largest N] [--rounds N]

Claims measured (each with its target):

- a start costs the nest that owns the bird 35 us, from the accepted start to the published "running", and each other nest 10 us;
- after the death of one of four nodes each other nest decides who takes its birds, and hatches its share, within 0.5 s of CPU, in steps
  of less than 100 ms;
- no message has more than `RECORDS` names, and one is taken in within 30 ms;
- a single start takes, and sends, in a flock of `--names` what it does in one of 100 (1.3x; the same bytes);
- a name takes 1.2 KB; two replicas of `--largest` names that differ in 10 agree after less than 100 KB.

Four registries in this process send each other letters as nests do, packed; birds start at the nest that owns them, in batches, and
their hosts answer after the batch. Times are CPU seconds of the process, the garbage collector treated as a nest treats it. Rounds of
what is compared take turns; medians are reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import events as ev
from flock_ray.core import letters, wire
from flock_ray.core import messages as msg
from flock_ray.core.registry import BURST, Registry
from flock_ray.core.replica import RECORDS, Content, Replica
from flock_ray.core.sync import Sync
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, Stamp, Status

T = TypeVar("T")

LIVES = [Life(f"{number:056x}", 1_700_000_000 + number) for number in range(1, 5)]  # as Ray's node ids: 56 hexadecimal digits
BATCH = 500  # starts, and answers of hosts, that a nest takes in at once
FROZEN = 5_000  # written names, after which the collector is told to leave alone what there is, as in `runtime/nest.py`
CODE = bytes(range(250)) * 6  # a pickled class of 1,500 bytes
OUTLOOK = msg.Outlook(frozenset(LIVES), (), (), True)


def spec_of(number: int) -> Spec:
    """A light bird as a program starts it: some arguments of its own, everything else as most birds have it."""
    return Spec(
        module="warehouse.sensors",
        qualname="Thermometer",
        code="d3b07384d113edec49eaa6238ad5ff00",
        args=pickle.dumps(((f"device-{number:07d}", number), {"interval": 0.5})),
        options=Options(light=True),
        runtime_env='{"env": "{}", "job": "01000000", "path": ["/home/user/warehouse"]}',
        stamp=Stamp(1_700_000_000_000_000_000 + number, number % 3),
        request_id=f"{number:032x}",
    )


def name_of(number: int) -> str:
    return f"sensors/floor-{number % 12}/{number:07d}"


class Costs:
    """CPU seconds by what they were spent on, and the longest step of each."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.longest: dict[str, float] = {}

    def of(self, what: str, work: Callable[[], T]) -> T:
        begin = time.process_time()
        result = work()
        self.spent(what, time.process_time() - begin)
        return result

    def spent(self, what: str, seconds: float) -> None:
        self.total[what] += seconds
        self.longest[what] = max(self.longest.get(what, 0.0), seconds)


class Cluster:
    """Four nests that hear each other, on a clock that goes on as they work."""

    def __init__(self, lives: Iterable[Life] = LIVES) -> None:
        self.now = 0.0
        self.nests = {life: Registry(life, Config(), random.Random(life.number).random) for life in lives}
        self.costs = Costs()
        self.bytes: list[int] = []
        self.most_names = 0
        self.hatched: dict[Life, list[do.Hatch]] = defaultdict(list)
        self.kept: list[tuple[Life, msg.Envelope]] | None = None  # all but the barrier, while it is a list
        self._mail: list[tuple[Life, bytes]] = []
        self._frozen = 0
        for life in self.nests:
            self.take(life, [ev.Booted(NodeRecord(life, 2.0)), ev.NodesListed(frozenset(each.node for each in self.nests))], "boot")
        for life in self.nests:
            self.take(life, [ev.MemberAlive(other) for other in self.nests if other != life], "boot")
        self.settle(5.0)
        assert all(nest.membership.ready and len(nest.membership.view) == len(self.nests) for nest in self.nests.values())
        self.costs = Costs()

    def take(self, life: Life, events: list[ev.Event], what: str) -> None:
        """Hands events to a nest and sends what comes of it."""
        nest, begin = self.nests[life], time.process_time()
        outbox: dict[Life, list[tuple[Life, msg.Envelope]]] = defaultdict(list)
        for effect in nest.handle_all(events, self.now):
            if isinstance(effect, do.Send):
                outbox[effect.to].append((effect.to, effect.envelope))
            elif isinstance(effect, do.Hatch):
                self.hatched[life].append(effect)
        bodies = letters.Bodies()
        sent = [(to, packed) for to, envelopes in outbox.items() for packed in letters.pack(envelopes, bodies)]
        spent = time.process_time() - begin
        self.costs.spent(what, spent)
        self.now += spent
        self._mail += sent
        self.bytes += [len(packed) for _, packed in sent]
        news = [env.body.update for envelopes in outbox.values() for _, env in envelopes if isinstance(env.body, msg.News)]
        self.most_names = max([self.most_names, *(len(update.delta.entries) for update in news)])
        writes = sum(nest.replica.birds.writes for nest in self.nests.values())
        if abs(writes - self._frozen) >= FROZEN:
            self._frozen = writes
            self.costs.of("collector", gc.collect)
            gc.freeze()

    def deliver(self, what: str = "peer") -> None:
        while self._mail:
            mail, self._mail = self._mail, []
            self.now += 0.001
            for to, packed in mail:
                if to not in self.nests:
                    continue
                reading = letters.unpack(packed, to)
                while (letter := self.costs.of(what, partial(next, reading, None))) is not None:
                    envelope = letter[0]
                    if self.kept is not None and not isinstance(envelope.body, msg.BarrierAsk | msg.BarrierAnswer):
                        self.kept.append((to, envelope))
                    else:
                        self.take(to, [ev.Received(envelope)], what)

    def tick(self, what: str = "owner") -> None:
        for life, nest in self.nests.items():
            while nest.wake_at() <= self.now:
                self.take(life, [ev.Tick()], what)
        self.deliver()

    def settle(self, seconds: float, what: str = "boot") -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            self.tick(what)
            self.deliver(what)

    def run(self, life: Life, what: str = "owner") -> None:
        """The hosts of a nest answer: its birds run."""
        begun = self.hatched.pop(life, [])
        for first in range(0, len(begun), BATCH):
            some = begun[first : first + BATCH]
            running = [wire.LifeRunning(each.dot, each.born, f"host-{each.dot.counter % 16}", "10.0.0.1:4711 x") for each in some]
            self.take(life, list(running), what)

    def start(self, first: int, count: int) -> None:
        placement = next(iter(self.nests.values())).membership.placement
        batches: dict[Life, list[ev.Event]] = defaultdict(list)
        for number in range(first, first + count):
            name = name_of(number)
            owner = placement.owner(name)
            assert owner is not None
            batch = batches[owner]
            batch.append(ev.Start(f"r{number}", name, spec_of(number), CODE, 1_800_000_000_000_000_000 + number))
            if len(batch) >= BATCH:
                self._start(owner, batches.pop(owner))
        for owner, batch in batches.items():
            self._start(owner, batch)
        self.now += BURST  # what was gathered is told
        self.tick()

    def _start(self, owner: Life, batch: list[ev.Event]) -> None:
        self.take(owner, batch, "owner")
        self.now += 0.005
        self.run(owner)
        self.tick()


def measure_starts(names: int) -> tuple[Cluster, dict[str, Any]]:
    """Starts all birds; what one costs its owner and each other nest, and what is sent of it."""
    cluster = Cluster()
    cluster.bytes.clear()
    cluster.start(0, names)
    for nest in cluster.nests.values():
        states = Counter(record.status.state if record.status else "" for _, pairs in nest.replica.birds.items() for _, record in pairs)
        assert states == {"running": names}, states
    costs = cluster.costs
    return cluster, {
        "names": names,
        "owner_microseconds": round(costs.total["owner"] / names * 1e6, 2),
        "owner_target": 35,
        "peer_microseconds": round(costs.total["peer"] / names / (len(LIVES) - 1) * 1e6, 2),
        "peer_target": 10,
        "collector_microseconds": round(costs.total["collector"] / names / len(LIVES) * 1e6, 2),
        "bytes_to_a_peer": round(sum(cluster.bytes) / names / (len(LIVES) - 1), 1),
        "most_names_in_a_message": cluster.most_names,
        "most_names_target": RECORDS,
        "longest_of_a_peer_ms": round(costs.longest["peer"] * 1e3, 1),
        "longest_of_a_peer_target_ms": 30,
    }


def measure_death(cluster: Cluster) -> dict[str, Any]:
    """One node dies: what each of the others has worked until its share is hatched; what it then takes in of what others tell of theirs;
    and the longest step.
    """
    names = len(next(iter(cluster.nests.values())).replica)
    dead = LIVES[0]
    lost = len(cluster.nests[dead].holds.lives)
    del cluster.nests[dead]
    cluster.costs, cluster.kept, begin = Costs(), [], cluster.now
    for life in list(cluster.nests):
        cluster.take(life, [ev.MemberDead(dead), ev.NodeProbed(dead, "refused")], "death")
    while sum(map(len, cluster.hatched.values())) < lost:
        assert cluster.now < begin + 30, "birds were not hatched again"
        cluster.settle(0.02, "death")
    costs = cluster.costs
    spent = sum(costs.total.values()) / len(cluster.nests)
    kept, cluster.kept = cluster.kept, None
    for life, envelope in kept:
        cluster.take(life, [ev.Received(envelope)], "news")
    hatched = {life: len(hatches) for life, hatches in cluster.hatched.items()}
    for life in list(cluster.nests):
        cluster.run(life)
    cluster.settle(0.1)
    return {
        "names": names,
        "hatched": sorted(hatched.values()),
        "cpu_seconds_a_nest": round(spent, 3),
        "target": 0.5,
        "news_seconds_a_nest": round(costs.total["news"] / len(cluster.nests), 3),
        "longest_ms": round(max(costs.longest.values()) * 1e3, 1),
        "longest_target_ms": 100,
    }


def measure_single_starts(sizes: list[Cluster], rounds: int) -> list[dict[str, Any]]:
    """One start after the other, in flocks of different sizes that take turns: CPU of all nests together, and bytes."""
    times: list[list[float]] = [[] for _ in sizes]
    lengths: list[list[int]] = [[] for _ in sizes]
    names = [len(next(iter(cluster.nests.values())).replica) for cluster in sizes]
    order = list(range(len(sizes)))
    shuffle = random.Random(1)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for index in order:
            cluster = sizes[index]
            spent, sent = [], []
            for one in range(100):
                cluster.settle(0.03)  # the last has been told, and nothing is gathered
                cluster.bytes.clear()
                cluster.costs = Costs()
                cluster.start(10_000_000 + number * 100 + one, 1)
                spent.append(sum(cluster.costs.total.values()))
                sent.append(sum(cluster.bytes))
            if number:
                times[index].append(median(spent))
                lengths[index].append(int(median(sent)))
    return [
        {
            "names": names[index],
            "microseconds": round(median(times[index]) * 1e6, 1),
            "bytes": median(lengths[index]),
            "time_ratio": round(median(mine / small for mine, small in zip(times[index], times[0], strict=True)), 3),
            "bytes_ratio": round(median(mine / small for mine, small in zip(lengths[index], lengths[0], strict=True)), 3),
            "target": 1.3,
        }
        for index in range(len(sizes))
    ]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def filled(names: int) -> Replica:
    """A replica as a peer has it: all came in messages, nothing is shared by birth."""
    replica, origin = Replica(), Replica()
    for first in range(0, names, RECORDS):
        changes = []
        for number in range(first, min(first + RECORDS, names)):
            life = LIVES[number % len(LIVES)]
            name, dot = name_of(number), Dot(life, number // len(LIVES) + 1)
            changes.append(origin.add(name, dot, spec_of(number), None))
            host = f"flock_ray:default:host:{number // 300:016x}"
            status = Status(1, life, 1000 + number, "running", host, address="10.0.0.1:4711 x")
            stated = origin.set_status(name, dot, status)
            assert stated is not None
            changes.append(stated)
        for update in origin.updates_of(changes):
            replica.join(pickle.loads(pickle.dumps(update)))
        for change in changes[::2]:
            origin.remove(change.key, [dot for dot, _ in change.after])
    return replica


def measure_memory(names: int) -> tuple[Replica, dict[str, Any]]:
    """The memory of one name, as growth of the resident set: what the allocator rounds up is memory too. Must come first."""
    gc.collect()
    before = resident()
    replica = filled(names)
    replica.birds.digest()
    gc.collect()
    grown = resident() - before
    return replica, {"names": names, "bytes_a_name": round(grown / names), "target": 1200, "megabytes": round(grown / 1e6)}


def measure_comparison(a: Replica, differences: int) -> dict[str, Any]:
    """Two replicas that differ in some names are brought together as nests do it; all messages both ways are counted, packed."""
    names, b = len(a), Replica()
    leaves = 1 << 15
    for first in range(0, leaves, 128):
        content: Content = pickle.loads(pickle.dumps(a.content(leaves=range(first, min(first + 128, leaves)))))
        b.join_content(content)
    b.birds.merge_context(a.birds.context.copy())
    shared: dict[Name, Dot] = {}
    for number in range(differences):
        name, dot = name_of(number), Dot(LIVES[number % len(LIVES)], number // len(LIVES) + 1)
        shared[name] = dot
        if number % 3 == 0:
            a.remove(name, [dot])
        elif number % 3 == 1:
            b.set_status(name, dot, Status(2, LIVES[0], number, "restarting"))
        else:
            b.add(f"lost/{number}", Dot(Life("e" * 56, 1), number // 3 + 1), spec_of(number), None)
    sent: list[int] = []

    def send(body: Any) -> Any:
        sent.append(len(pickle.dumps(body)))
        return pickle.loads(pickle.dumps(body))

    begin = time.process_time()
    asker, answerer = Sync(a, 1.0), Sync(b, 1.0)
    asker.begin(LIVES[1], 0)
    while LIVES[1] in asker.sessions:
        ask = send(asker.ask(LIVES[1], 0.0, (), OUTLOOK))
        progress = asker.proceed(LIVES[1], send(answerer.answer(ask, (), OUTLOOK)))
        assert progress is not None
        for update in progress.news:
            b.join(send(update))
    seconds = time.process_time() - begin
    assert a.birds.digest() == b.birds.digest()
    assert len(a) == len(b)
    return {
        "names": names,
        "differences": differences,
        "bytes": sum(sent),
        "target": 100_000,
        "messages": len(sent),
        "milliseconds": round(seconds * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file too")
    parser.add_argument("--names", type=int, default=100_000, metavar="N", help="birds in the flock (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=1_000_000, metavar="N", help="names in the largest replica (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of 100 single starts in each flock (default: %(default)s)")
    options = parser.parse_args()
    gc.set_threshold(5_000, 5, 10)  # as a nest sets it

    replica, memory = measure_memory(options.largest)
    gc.freeze()
    comparison = measure_comparison(replica, 10)
    del replica
    cluster, starts = measure_starts(options.names)
    small = Cluster()
    small.start(0, 100)
    singles = measure_single_starts([small, cluster], options.rounds)
    death = measure_death(cluster)
    results = {"memory": memory, "comparison": comparison, "starts": starts, "single_starts": singles, "death": death}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    for kind, rows in results.items():
        for row in rows if isinstance(rows, list) else [rows]:
            print(f"{kind:14}", ", ".join(f"{what} {value}" for what, value in row.items()))


if __name__ == "__main__":
    main()
