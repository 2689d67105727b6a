"""Plays schedules of the simulator (tests/support/sim.py) in several processes, and says which violate an invariant.

Run it by `scripts/simulate --schedules 10000 --jobs 2`, which sets up all it needs. Status 1 if there was a violation. The story of a
seed is printed by `scripts/simulate --mix all --first 7 --schedules 1 --story`. Ctrl-C ends it, and its processes. With `--small-scope 60`
it tries all that can happen around two nests and one name, as deep as it comes in a minute (tests/support/scope.py).
"""

from __future__ import annotations

import argparse
import gc
import heapq
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.support import scope
from tests.support.sim import MIXES, SCHEDULES, World, tell


class Turn(NamedTuple):
    """A schedule to be played."""

    at: float  # among those of all mixes
    mix: str
    seed: int


class Played(NamedTuple):
    """What came of a turn: a violation, or nothing."""

    turn: Turn
    violation: str


def turns_of(mix: str, weight: int, first: int) -> Iterator[Turn]:
    return (Turn((i + 0.5) / weight, mix, first + i) for i in count())


def plan(schedules: int, mix: str | None, first: int) -> list[Turn]:
    """So many schedules, of all mixes in proportion (Webster's method: whatever their number, each mix has its rounded share)."""
    weights = {mix: 1} if mix is not None else SCHEDULES
    return list(islice(heapq.merge(*(turns_of(each, weight, first) for each, weight in weights.items())), schedules))


def play(turn: Turn) -> Played:
    try:
        World(MIXES[turn.mix], turn.seed).play()
    except Exception as error:  # a core that raises is wrong as well
        return Played(turn, f"{type(error).__name__}: {error}")
    return Played(turn, "")


def _collect_seldom() -> None:
    """A schedule makes millions of objects that go by themselves: to look for others all the time took a tenth of it."""
    gc.set_threshold(200_000, 20, 100)


def _work() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    _collect_seldom()


@contextmanager
def playing(turns: list[Turn], jobs: int) -> Iterator[Iterable[Played]]:
    """What comes of the turns, as it comes; when the block is left no process is."""
    if jobs == 1:
        _collect_seldom()
        yield map(play, turns)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _work) as pool:
        yield pool.imap_unordered(play, turns)


def simulate(turns: list[Turn], jobs: int, console: Console) -> int:
    """Plays them, with a bar on a terminal. Returns how many violations there were."""
    violations = done = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    began = time.monotonic()
    with playing(turns, jobs) as results, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("schedules", total=len(turns))
        for done, ((_, mix, seed), violation) in enumerate(results, 1):
            rate = done / (time.monotonic() - began)
            progress.update(task, advance=1, description=f"schedules, {rate:.1f} a second")
            if violation:
                violations += 1
                progress.console.print(f"mix {mix}, seed {seed}: {violation}", style="bold red", markup=False)
                progress.console.print(f"  replay: scripts/simulate --mix {mix} --first {seed} --schedules 1 --story", markup=False)
    took = time.monotonic() - began
    console.print(
        f"{done:,} schedules in {took:.1f} s, {done / took:.1f} a second: {violations or 'no'} violation{'s' * (violations != 1)}"
    )
    return violations


def small_scope(seconds: float, console: Console) -> int:
    """Says how far it came; an AssertionError is a violation, with the way to it. Returns how many there were."""

    def tell_depth(found: scope.Explored) -> None:
        console.print(
            f"depth {found.depth}: {found.states:,} states of {found.nodes:,} states of single nests, {found.tried:,} steps tried"
        )

    with scope.shallow():
        within = scope.Scope()
        try:
            roots = scope.runs(within, scope.FAULTS_IN_ALL, scope.LATE)
            scope.explore(within, roots, depth=1000, rest=1, seconds=seconds, told=tell_depth)
        except AssertionError as violation:
            console.print(str(violation), style="bold red", markup=False)
            return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=sum(SCHEDULES.values()), help="how many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--mix", choices=sorted(MIXES), help="only this mix of faults, not all in proportion")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed of each mix (%(default)s)")
    parser.add_argument("--story", action="store_true", help="print all that happens in each")
    parser.add_argument("--small-scope", type=float, metavar="SECONDS", help="of the CPU, for all that can happen around two nests")
    given = parser.parse_args(arguments)
    if given.schedules < 1 or given.jobs < 1:
        parser.error("at least one schedule and one process")
    console = Console(highlight=False, soft_wrap=True)
    if given.small_scope is not None:
        return small_scope(given.small_scope, console)
    turns = plan(given.schedules, given.mix, given.first)
    if given.story:
        stories = [tell(turn.mix, turn.seed) for turn in turns]
        for line in (line for story in stories for line in story):
            console.print(line, markup=False)
        return int(any("VIOLATION" in story[-1] for story in stories))
    try:
        return int(simulate(turns, given.jobs, console) > 0)
    except KeyboardInterrupt:
        console.print("Interrupted; every process is ended.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
