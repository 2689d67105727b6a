"""What connections cost: one process that listens, and a thousand callers connected to it.

    python benchmarks/connections.py [--json FILE] [--rounds N] [--connections N] [--callers N]

A host, with the `Listener` of a bird's process and a method that returns at once, is a process of its own. Processes of callers hold the
connections, each a `SocketLink`, over Unix sockets and over TCP in turn, and with a new host and new callers for each. Measured, without
a target:

  set-up       of one connection with the proofs of both sides, alone: median
  memory       of a connection that has been used, at the host and at the caller: what their processes have grown by (RSS)
  one more     latency of one more caller, which calls one at a time: alone, and beside all connections while these are idle
  all call     calls a second in sum, when in each process of callers each connection in turn makes a call, for a second

What should hold: an idle connection costs nothing but memory, so that one more caller is not slower beside a thousand; and what a host
needs for one is a few kilobytes. Ways take turns within each round, in alternating order; medians of the rounds are reported. All
answers are checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import psutil
from children import Child, child
from rounds import p99

from flock_ray.core.connection import CALL
from flock_ray.runtime.listener import Caller, Listener
from flock_ray.runtime.replies import Urgency
from flock_ray.runtime.sockets import SocketLink

SECRET, LIFE = b"s" * 32, "0123456789ab"
WAYS = {"Unix": True, "TCP": False}
SET_UPS = 200  # of each way and round, one after another
TRIPS = 2_000
WARM_UP = 50  # connections or calls, before the clock starts
SPELL = 1.0  # seconds that all callers call
RELEASE = 0.2  # seconds ahead of their common start, for the order to reach them
PATIENCE = 30.0  # seconds for one answer
MESSAGE = b"." * 150
SPARE_FILES = 200  # of a process, besides its connections


# Processes


def host(pipe: Pipe, folder: str) -> None:
    """A host: tells its address, and then listens until it is ended."""

    def call(caller: Caller, number: int, message: memoryview) -> bytes:
        del caller, number
        return bytes(message)

    path = Path(folder, "host.sock")
    listener = Listener(SECRET, LIFE, path, "127.0.0.1", None, 1, 100_000, call, lambda _: b"full", lambda _: b"")
    listener.start()
    pipe.send(listener.address)
    while True:
        pipe.recv()
        gc.collect()
        pipe.send(psutil.Process().memory_info().rss)


def callers(pipe: Pipe, address: str, folder: str, connections: int) -> None:
    """Connects, uses each connection once, and tells bytes for each of them; then calls from a moment on whenever it is told one."""
    warm = [connected(address, folder) for _ in range(WARM_UP)]
    for link in warm:
        used(link)
    warm.clear()
    before = _own_memory()
    links = [connected(address, folder) for _ in range(connections)]
    for link in links:
        used(link)
    pipe.send((_own_memory() - before) / connections)
    while True:
        begin = pipe.recv()
        calls = 0
        time.sleep(max(0.0, begin - time.time()))
        while time.time() - begin < SPELL:
            for link in links:
                used(link)
            calls += connections
        pipe.send(calls / (time.time() - begin))


def connected(address: str, folder: str) -> SocketLink:
    return SocketLink(SECRET, LIFE, address, Path(folder))


def used(link: SocketLink) -> None:
    """One call."""
    answer = link.transmit(CALL, MESSAGE, Urgency.NOW).get(PATIENCE).message
    if answer != MESSAGE:
        raise SystemExit(f"an echo of {len(MESSAGE)} bytes came back as {bytes(answer)!r}")


def _own_memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def may_open(files: int) -> None:
    """Lets this process, and those it starts, have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < files:
        raise SystemExit(
            f"{files:,} files have to be open at a time, and the limit is {hard:,}: raise it (ulimit -Hn), or take fewer connections"
        )
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


# Measuring


def set_ups(address: str, folder: str) -> list[float]:
    times = []
    for _ in range(WARM_UP + SET_UPS):
        begin = time.perf_counter()
        link = connected(address, folder)
        times.append(time.perf_counter() - begin)
        del link  # which closes it
    return times[WARM_UP:]


def trips(link: SocketLink) -> list[float]:
    times = []
    for _ in range(WARM_UP + TRIPS):
        begin = time.perf_counter()
        used(link)
        times.append(time.perf_counter() - begin)
    return times[WARM_UP:]


def memory_of(listening: Child) -> int:
    listening.pipe.send("")
    return listening.heard()


def one_way(local: bool, connections: int, processes: int) -> dict[str, float]:
    """All figures of one way, of a new host and new callers."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="flock_ray_"))
        listening = stack.enter_context(child(host, folder))
        address = listening.heard()
        if not local:
            address = address.partition(" ")[0]
        made = median(set_ups(address, folder))
        link = connected(address, folder)
        alone = trips(link)
        before = memory_of(listening)
        share = connections // processes
        crowd = [stack.enter_context(child(callers, address, folder, share)) for _ in range(processes)]
        of_caller = [each.heard() for each in crowd]
        of_host = (memory_of(listening) - before) / (share * processes)
        beside = trips(link)
        begin = time.time() + RELEASE
        for each in crowd:
            each.pipe.send(begin)
        rates = [each.heard() for each in crowd]
    return {
        "set_up_s": made,
        "host_bytes": of_host,
        "caller_bytes": median(of_caller),
        "alone_s": median(alone),
        "alone_p99_s": p99(alone),
        "beside_s": median(beside),
        "beside_p99_s": p99(beside),
        "calls_a_second": sum(rates),
    }


def measure(rounds: int, connections: int, processes: int) -> dict[str, Any]:
    may_open(connections + SPARE_FILES)
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 else reversed(WAYS):
            figures[way].append(one_way(WAYS[way], connections, processes))
    medians = {way: {name: median(each[name] for each in rows) for name in rows[0]} for way, rows in figures.items()}
    return {"connections": connections, "processes_of_callers": processes, "medians": medians, "rounds": figures}


def show(result: dict[str, Any]) -> None:
    print(f"{result['connections']:,} connections of {result['processes_of_callers']} processes to one:")
    print(f"{'':<6}{'set-up':>10}{'host':>10}{'caller':>10}{'one, alone':>24}{'one more':>24}{'all call':>12}")
    for way, row in result["medians"].items():
        memory = f"{row['host_bytes'] / 1024:7.1f} KB{row['caller_bytes'] / 1024:7.1f} KB"
        alone, beside = (f"{row[f'{who}_s'] * 1e6:7.0f} us (p99 {row[f'{who}_p99_s'] * 1e6:5.0f})" for who in ("alone", "beside"))
        print(f"{way:<6}{row['set_up_s'] * 1e6:7.0f} us{memory}{alone:>24}{beside:>24}{row['calls_a_second']:10,.0f}/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--callers", type=int, default=4, metavar="N", help="processes of callers (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=1_000, metavar="N", help="of them all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="at least 1 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1 or options.callers < 1 or options.connections % options.callers or not options.connections:
        parser.error("it takes a round, and a share of the connections for each process of callers, all of the same size")
    result = measure(options.rounds, options.connections, options.callers)
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
