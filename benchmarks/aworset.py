"""What the set costs: one start in small and large sets, the memory of a name, and a comparison by digests.

    python benchmarks/aworset.py [--json] [--largest N] [--rounds N]

Claims measured (DESIGN S3): what one start costs and sends does not depend on the number of names (target: within 1.3x of a
set of 100), a name takes at most 1.2 KB, and d differences are found and mended for O(d) bytes.

Sizes take turns within each round, in changing order, and medians are reported, so that a noisy neighbour on the machine hits
all of them alike. The garbage collector stays on, as in a nest; its pauses are not in the medians, so the longest start is
reported beside.
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
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from flock_ray.core.aworset import ROOT
from flock_ray.core.replica import Replica, Update
from flock_ray.specs import Dot, Life, Options, Spec, Stamp, Status

PEERS = [Life(f"{number:056x}", 1_700_000_000 + number) for number in range(1, 9)]  # as Ray's node ids: 56 hexadecimal digits
STARTS_A_ROUND = 300
CODE = bytes(range(250)) * 6  # a pickled class of 1,500 bytes: every start sends it along


def spec_of(number: int) -> Spec:
    """A spec as a program gives it: some arguments of its own, everything else as most birds have it."""
    return Spec(
        module="warehouse.sensors",
        qualname="Thermometer",
        code="d3b07384d113edec49eaa6238ad5ff00",
        args=pickle.dumps(((f"device-{number:07d}", number), {"interval": 0.5})),
        options=Options(),
        runtime_env='{"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip", "pip": ["numpy==2.1"]}',
        stamp=Stamp(1_700_000_000_000_000_000 + number, number % 3),
        request_id=f"{number:032x}",
    )


def status_of(number: int, life: Life) -> Status:
    return Status(1, life, 1000 + number, "running", host=f"flock_ray:default:host:{number:016x}")


def name_of(number: int) -> str:
    return f"sensors/floor-{number % 12}/{number:07d}"


def filled(names: int) -> Replica:
    """A replica as a peer has it: each start and each status came in a message of its own, so nothing is shared by birth."""
    replica, origin = Replica(), Replica()
    for number in range(names):
        life = PEERS[number % len(PEERS)]
        name, dot = name_of(number), Dot(life, number // len(PEERS) + 1)
        added = origin.add(name, dot, spec_of(number), None)
        replica.join(pickle.loads(pickle.dumps(origin.update_of([added]))))
        stated = origin.set_status(name, dot, status_of(number, life))
        assert stated is not None
        replica.join(pickle.loads(pickle.dumps(origin.update_of([stated]))))
        origin.remove(name, [dot])  # the origin stays small: only the peer is measured
    return replica


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(names: int) -> tuple[Replica, dict[str, Any]]:
    """The memory of one name, as growth of the resident set.

    Not tracemalloc: it counts what Python asked for, and so leaves out what the allocator rounds up and cannot give back, which
    the machine has to have too. It must be the first measurement of the process, or it would find freed memory to reuse.
    """
    gc.collect()
    before = resident()
    replica = filled(names)
    gc.collect()
    grown = resident() - before
    return replica, {"names": names, "bytes_per_name": round(grown / names, 1), "target": 1200}


class Starter:
    """Starts and stops birds in one replica, and keeps the time and the bytes of each start."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.size = len(replica)
        self.life = Life("f" * 56, 1_800_000_000)
        self.counter = 0
        self.times: list[float] = []
        self.bytes: list[int] = []

    def round(self) -> tuple[float, float]:
        """Returns the medians of microseconds and of bytes."""
        times, sizes = [], []
        for _ in range(STARTS_A_ROUND):
            self.counter += 1
            name, dot = f"new/{self.counter:07d}", Dot(self.life, self.counter)
            spec = spec_of(self.counter)
            begin = time.perf_counter()
            change = self.replica.add(name, dot, spec, CODE)
            message = pickle.dumps(self.replica.update_of([change]))
            times.append((time.perf_counter() - begin) * 1e6)
            sizes.append(len(message))
            self.replica.remove(name, [dot])
        self.times += times
        self.bytes += sizes
        return median(times), median(sizes)


def measure_starts(replicas: list[Replica], rounds: int) -> list[dict[str, Any]]:
    """One start in each of the sets; ratios are to the first, taken round by round."""
    starters = [Starter(replica) for replica in replicas]
    results: list[list[tuple[float, float]]] = []
    order = list(range(len(starters)))
    shuffle = random.Random(1)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        found = {index: starters[index].round() for index in order}
        if number:  # the first round warms up
            results.append([found[index] for index in range(len(starters))])
    return [
        {
            "names": starter.size,
            "microseconds": round(median(result[index][0] for result in results), 2),
            "bytes": median(result[index][1] for result in results),
            "time_ratio": round(median(result[index][0] / result[0][0] for result in results), 3),
            "bytes_ratio": round(median(result[index][1] / result[0][1] for result in results), 3),
            "longest_microseconds": round(max(starter.times), 1),
        }
        for index, starter in enumerate(starters)
    ]


def measure_comparison(names: int, differences: int) -> dict[str, Any]:
    """Two replicas that differ in some names are brought together; every message is pickled and counted."""
    a, b = filled(names), Replica()
    b.join_part(pickle.loads(pickle.dumps(a.birds.whole())))
    b.birds.merge_context(a.birds.context.copy())
    for number in range(differences):
        name, dot = name_of(number), Dot(PEERS[number % len(PEERS)], number // len(PEERS) + 1)
        if number % 3 == 0:
            a.remove(name, [dot])
        elif number % 3 == 1:
            b.set_status(name, dot, Status(2, PEERS[0], number, "restarting"))
        else:
            b.add(f"lost/{number}", Dot(Life("e" * 56, 1), number), spec_of(number), None)
    sent = messages = hashes = entries = 0

    def send(message: Any) -> Any:
        nonlocal sent, messages
        wire = pickle.dumps(message)
        sent, messages = sent + len(wire), messages + 1
        return pickle.loads(wire)

    begin = time.perf_counter()
    asked = {ROOT: a.birds.digest()}
    while asked:
        hashes += len(asked)
        children, leaves = b.birds.descend(send(asked))
        hashes += len(children)
        children, part = send((children, b.birds.part(leaves=leaves) if leaves else None))
        if part is not None:
            entries += len(part.entries)
            a.join_part(part)
            news = a.birds.delta_against(part)
            entries += len(news.entries)
            b.join(send(Update(news)))
        asked = {prefix: a.birds.digest(prefix) for prefix in a.birds.differing(children)}
    seconds = time.perf_counter() - begin
    assert a.birds.digest() == b.birds.digest()
    assert dict(a.birds.items()) == dict(b.birds.items())
    return {
        "names": names,
        "differences": differences,
        "bytes": sent,
        "messages": messages,
        "hashes": hashes,
        "names_sent": entries,
        "milliseconds": round(seconds * 1e3, 2),
        "whole_bytes": len(pickle.dumps(a.birds.whole())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--largest", type=int, default=1_000_000, metavar="N", help="names in the largest set (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help=f"rounds of {STARTS_A_ROUND} starts in each set")
    options = parser.parse_args()

    large, memory = measure_memory(options.largest)
    starts = measure_starts([filled(100), filled(10_000), large], options.rounds)
    del large
    comparison = measure_comparison(min(100_000, options.largest), 10)
    if options.json:
        print(json.dumps({"starts": starts, "memory": memory, "comparison": comparison}))
        return
    print("one start (add, delta, pickle):")
    for row in starts:
        print(
            f"  {row['names']:>9,} names: {row['microseconds']:7.2f} us ({row['time_ratio']:.2f}x), {row['bytes']:.0f} bytes"
            f" ({row['bytes_ratio']:.2f}x); the longest took {row['longest_microseconds'] / 1e3:.1f} ms"
        )
    print(f"memory: {memory['bytes_per_name']:.0f} bytes a name at {memory['names']:,} names (target: {memory['target']:,})")
    print(
        f"{comparison['differences']} differences in {comparison['names']:,} names: {comparison['bytes']:,} bytes in"
        f" {comparison['messages']} messages, {comparison['hashes']} hashes and {comparison['names_sent']} names,"
        f" {comparison['milliseconds']} ms (all of it would be {comparison['whole_bytes']:,} bytes)"
    )


if __name__ == "__main__":
    main()
