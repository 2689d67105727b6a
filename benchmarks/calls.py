"""What a call of a bird costs beside a call of a bare Ray actor and of an xoscar actor: latency, and rates of many kinds.

    python benchmarks/calls.py [--json FILE] [--rounds N] [--nodes N] [--only NAME]

Every trial does one thing in several ways: a bare Ray actor first, an xoscar actor in another process (if xoscar is installed; where it
has such a thing), a bird over sockets, and a bird of a second flock in the same cluster with `wire="ray"`. Claims measured, all of the
bird over sockets and against the same class in a bare actor on the same node, where nothing else is said:

  one call at a time, one argument    median <= 0.08x, and <= 0.25x xoscar's, and below 70 us; p99 <= 0.3x
  1,000 calls in flight               >= 12x the rate: by futures, and by coroutines on asyncio's own loop and on uvloop
  1,000 casts, and a call after them  >= 20x the rate
  8 callers, each with a bird         >= 8x the rate in sum: one call at a time, and 100 in flight
  a stream of 10,000 small items      >= 10x the items a second
  a numpy array of 100 MB             >= 0.95x the rate
  without arguments; after a pause    no target

All ways take turns within each round, in alternating order, and ratios are taken round by round, so that a noisy neighbour on the
machine hits all of them alike; medians and quartiles of the rounds are reported. Every way is warmed up by one call first: a route
that rested is looked at before it is used, and what that costs is measured by itself ("after a pause"). All results are checked: a
call that got lost, ran twice, or came out of order ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import local  # first: it sets Ray's environment up
import numpy as np
import ray
from counters import NAME, Counter, Tally, bare_actor
from crowd import CALLERS, IN_FLIGHT, Crowd
from oscar import Oscar, event_loops, local_oscar
from rounds import BY_RAY, FLOCK, RAY, XOSCAR, Run, Target, Trial, Way, show

import flock_ray

CALLS = 300  # one after another, in each way and round
BURST = 1_000  # in flight at once
BURSTS = 3  # in each way and round; a burst is short beside the pauses of the garbage collector, which stays on, and of the machine
PAUSE = 0.5  # seconds; above `lanes.FRESH`
ITEMS = 10_000  # of a stream
ITEMS_BY_RAY = 1_000  # the same where a flock's calls go by Ray: it would take most of the round
LARGE = 12_500_000  # float64, 100 MB
LARGE_CALLS = 3


@dataclass(frozen=True)
class Sides:
    """Who is called, and what each has counted."""

    actor: Any
    actors: Tally
    birds: dict[str, tuple[Any, Tally]]  # by side
    oscar: Oscar | None
    oscars: Tally
    loops: dict[str, asyncio.Runner]  # by name


def one_by_one(once: Callable[[], int], tally: Tally | None = None) -> Run:
    def run() -> list[float]:
        answers, times = [once()], []
        for _ in range(CALLS):
            begin = time.perf_counter()
            answer = once()
            times.append(time.perf_counter() - begin)
            answers.append(answer)
        if tally is not None:
            tally.expect(answers)
        return times

    return run


def awaited_one_by_one(loop: asyncio.Runner, once: Callable[[], Awaitable[int]], tally: Tally | None = None) -> Run:
    async def calls() -> list[float]:
        answers, times = [await once()], []
        for _ in range(CALLS):
            begin = time.perf_counter()
            answer = await once()
            times.append(time.perf_counter() - begin)
            answers.append(answer)
        if tally is not None:
            tally.expect(answers)
        return times

    return lambda: loop.run(calls())


def in_flight(burst: Callable[[], list[int]], warm_up: Callable[[], int], tally: Tally, bursts: int = BURSTS) -> Run:
    def run() -> list[float]:
        tally.expect([warm_up()])
        times = []
        for _ in range(bursts):
            begin = time.perf_counter()
            answers = burst()
            times.append((time.perf_counter() - begin) / BURST)
            tally.expect(answers)
        return times

    return run


def gathered(loop: asyncio.Runner, once: Callable[[], Awaitable[int]], tally: Tally, bursts: int = BURSTS) -> Run:
    async def calls() -> list[float]:
        tally.expect([await once()])
        times = []
        for _ in range(bursts):
            begin = time.perf_counter()
            answers = await asyncio.gather(*[once() for _ in range(BURST)])
            times.append((time.perf_counter() - begin) / BURST)
            tally.expect(answers)
        return times

    return lambda: loop.run(calls())


def cast_away(cast: Callable[[], object], last: Callable[[], int], tally: Tally, bursts: int = BURSTS) -> Run:
    def run() -> list[float]:
        tally.expect([last()])
        times = []
        for _ in range(bursts):
            begin = time.perf_counter()
            for _ in range(BURST):
                cast()
            answer = last()
            times.append((time.perf_counter() - begin) / (BURST + 1))
            tally.expect([answer], quiet=BURST)
        return times

    return run


def told(oscar: Oscar, tally: Tally) -> Run:
    async def casts() -> list[float]:
        tally.expect([await oscar.actor.add(1)])
        times = []
        for _ in range(BURSTS):
            begin = time.perf_counter()
            for _ in range(BURST):
                await oscar.actor.add.tell(1)
            answer = await oscar.actor.add(1)
            times.append((time.perf_counter() - begin) / (BURST + 1))
            tally.expect([answer], quiet=BURST)
        return times

    return lambda: oscar.loop.run(casts())


def after_pause(what: Callable[[], list[int]], tally: Tally) -> Run:
    def run() -> list[float]:
        time.sleep(PAUSE)
        begin = time.perf_counter()
        answers = what()
        taken = time.perf_counter() - begin
        tally.expect(answers)
        return [taken / len(answers)]

    return run


def streamed(read: Callable[[int], Iterable[int]], warm_up: Callable[[], object], items: int = ITEMS) -> Run:
    def run() -> list[float]:
        warm_up()
        begin = time.perf_counter()
        got = list(read(items))
        taken = time.perf_counter() - begin
        if got != list(range(items)):
            raise SystemExit(f"a stream of {items:,} items brought {len(got):,}: {got[:3]} ... {got[-3:]}")
        return [taken / items]

    return run


def large(once: Callable[[np.ndarray], int]) -> Run:
    array = np.ones(LARGE)

    def run() -> list[float]:
        times = []
        for _ in range(LARGE_CALLS + 1):
            begin = time.perf_counter()
            size = once(array)
            times.append(time.perf_counter() - begin)
            if size != LARGE:
                raise SystemExit(f"an array of {LARGE:,} numbers arrived as one of {size:,}")
        return times[1:]

    return run


# Trials


def latency_trials(sides: Sides) -> list[Trial]:
    actor, mine, oscar = sides.actor, sides.actors, sides.oscar

    def ray_add() -> int:
        return ray.get(actor.add.remote(1))

    with_argument = [Way(RAY, "ray.get(actor.add.remote(1))", one_by_one(ray_add, mine))]
    without = [Way(RAY, "ray.get(actor.get.remote())", one_by_one(lambda: ray.get(actor.get.remote())))]
    first = [Way(RAY, "ray.get(actor.add.remote(1))", after_pause(lambda: [ray_add()], mine))]
    if oscar is not None:
        add, get = oscar.actor.add, oscar.actor.get
        with_argument.append(Way(XOSCAR, "await actor.add(1)", awaited_one_by_one(oscar.loop, lambda: add(1), sides.oscars)))
        without.append(Way(XOSCAR, "await actor.get()", awaited_one_by_one(oscar.loop, get)))
    by_name = one_by_one(lambda: flock_ray.call(NAME, "add", 1), sides.birds[FLOCK][1])
    with_argument.append(Way(FLOCK, 'flock_ray.call(name, "add", 1)', by_name))
    for side, (bird, tally) in sides.birds.items():
        with_argument.append(Way(side, "bird.add(1)", one_by_one(lambda bird=bird: bird.add(1), tally)))
        without.append(Way(side, "bird.get()", one_by_one(bird.get)))
        first.append(Way(side, "bird.add(1)", after_pause(lambda bird=bird: [bird.add(1)], tally)))
    targets = (Target(0.08, "median"), Target(0.25, "median", XOSCAR), Target(70.0, "median", None), Target(0.3, "p99"))
    return [
        Trial("one call at a time, one argument", with_argument, targets),
        Trial("one call at a time, without arguments", without),
        Trial("the first call after a pause", first),
    ]


def rate_trials(sides: Sides) -> list[Trial]:
    actor, mine, oscar = sides.actor, sides.actors, sides.oscar

    def ray_add() -> int:
        return ray.get(actor.add.remote(1))

    def ray_burst() -> list[int]:
        return ray.get([actor.add.remote(1) for _ in range(BURST)])

    many = [Way(RAY, "ray.get([actor.add.remote(1), ...])", in_flight(ray_burst, ray_add, mine))]
    casts = [Way(RAY, "actor.add.remote(1), refs dropped", cast_away(lambda: actor.add.remote(1), ray_add, mine))]
    first = [Way(RAY, "ray.get([actor.add.remote(1), ...])", after_pause(ray_burst, mine))]
    if oscar is not None:
        many.append(Way(XOSCAR, "gather(actor.add(1), ...)", gathered(oscar.loop, lambda: oscar.actor.add(1), sides.oscars)))
        casts.append(Way(XOSCAR, "actor.add.tell(1)", told(oscar, sides.oscars)))
    for side, (bird, tally) in sides.birds.items():

        def add(bird: Any = bird) -> int:
            return bird.add(1)

        def burst(bird: Any = bird) -> list[int]:
            return [future.result() for future in [bird.add.future(1) for _ in range(BURST)]]

        bursts = BURSTS if side == FLOCK else 1  # by Ray each takes long
        many.append(Way(side, "bird.add.future(1), .result()", in_flight(burst, add, tally, bursts)))
        for name, loop in sides.loops.items():
            run = gathered(loop, lambda bird=bird: bird.add.aio(1), tally, bursts)
            many.append(Way(side, f"gather(bird.add.aio(1), ...), {name}", run))
        casts.append(Way(side, "bird.add.cast(1)", cast_away(lambda bird=bird: bird.add.cast(1), add, tally, bursts)))
        first.append(Way(side, "bird.add.future(1), .result()", after_pause(burst, tally)))
    return [
        Trial(f"{BURST:,} calls in flight", many, (Target(12.0, "rate"),), is_rate=True),
        Trial(f"{BURST:,} casts, and a call after them", casts, (Target(20.0, "rate"),), is_rate=True),
        Trial(f"{BURST:,} calls in flight after a pause", first, is_rate=True),
    ]


def crowd_trials(crowd: Crowd, flocks: Iterable[str]) -> list[Trial]:
    found = []
    for number in (1, IN_FLIGHT):
        texts = ("actor.add.remote(1)", "bird.add(1)") if number == 1 else ("actor.add.remote(1), ray.get(refs)", "bird.add.future(1)")
        ways = [Way(side, texts[side != RAY], crowd.run(side, number)) for side in [RAY, *flocks]]
        what = "one call at a time" if number == 1 else f"{number} in flight of each"
        found.append(Trial(f"{CALLERS} callers, in sum, {what}", ways, (Target(8.0, "rate"),), is_rate=True))
    return found


def bulk_trials(sides: Sides) -> list[Trial]:
    actor, oscar = sides.actor, sides.oscar

    def ray_stream(items: int) -> Iterator[int]:
        return (ray.get(ref) for ref in actor.upto.options(num_returns="streaming").remote(items))

    streams = [Way(RAY, 'num_returns="streaming", ray.get(ref)', streamed(ray_stream, lambda: ray.get(actor.get.remote())))]
    arrays = [Way(RAY, "ray.get(actor.size.remote(array))", large(lambda array: ray.get(actor.size.remote(array))))]
    if oscar is not None:
        arrays.append(Way(XOSCAR, "await actor.size(array)", large(lambda array: oscar.loop.run(oscar.actor.size(array)))))
    for side, (bird, _) in sides.birds.items():
        items = ITEMS if side == FLOCK else ITEMS_BY_RAY
        streams.append(Way(side, f"bird.upto.stream({items:,})", streamed(bird.upto.stream, bird.get, items)))
        arrays.append(Way(side, "bird.size(array)", large(bird.size)))
    return [
        Trial(f"a stream of {ITEMS:,} small items", streams, (Target(10.0, "rate"),), is_rate=True),
        Trial("a numpy array of 100 MB as the argument", arrays, (Target(0.95, "rate"),), is_rate=True),
    ]


def measure(nodes: int, rounds: int, only: str) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        stack.enter_context(local.cluster(nodes))
        flocks = {
            FLOCK: stack.enter_context(local.flock(nodes)),
            BY_RAY: stack.enter_context(local.flock(nodes, "by-ray", wire="ray")),
        }
        loops = {name: stack.enter_context(asyncio.Runner(loop_factory=factory)) for name, factory in event_loops().items()}
        oscar = stack.enter_context(local_oscar(list(loops.values())[-1]))
        birds = {side: flock.start(NAME, Counter) for side, flock in flocks.items()}
        for side, flock in flocks.items():
            flock.wait(birds[side])
        tallied = {side: (bird, Tally(f"the bird of {side}")) for side, bird in birds.items()}
        actor = bare_actor(flocks[FLOCK], birds[FLOCK])
        sides = Sides(actor, Tally("the bare actor"), tallied, oscar, Tally("the xoscar actor"), loops)
        every = [*latency_trials(sides), *rate_trials(sides), *crowd_trials(Crowd(flocks), flocks), *bulk_trials(sides)]
        measured = [trial for trial in every if only in trial.name]
        if not measured:
            raise SystemExit(f"no trial has {only!r} in its name: they are {', '.join(repr(trial.name) for trial in every)}")
        for trial in measured:
            trial.round(0)
            trial.samples.clear()  # the first round warms up
        for number in range(rounds):
            for trial in measured:
                trial.round(number)
    return [trial.result() for trial in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="raylets of the local cluster (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="NAME", help="only the trials with this in their names")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 2 or options.nodes < 1:
        parser.error("the medians want at least 2 rounds, and the cluster a node")
    results = measure(options.nodes, options.rounds, options.only)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps({"nodes": options.nodes, "rounds": options.rounds, "trials": results}))


if __name__ == "__main__":
    main()
