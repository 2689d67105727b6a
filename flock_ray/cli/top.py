"""`flock-ray top`: nests with their load, and what happens in the flock, looked at again and again.

Calls and errors are counted by the processes of birds, who tell their nests every two seconds; moves, restarts and failures are events.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flock_ray.cli.joining import ask
from flock_ray.cli.render import Answer, Table, View, bar, lines_of, show
from flock_ray.notices import BirdCrashed, BirdFailed, BirdMoved, BirdRestarted

if TYPE_CHECKING:
    from flock_ray.api.flock import Flock
    from flock_ray.specs import NestInfo

BAR = 12  # columns
WATCHED = {BirdMoved: "moves", BirdRestarted: "restarts", BirdCrashed: "crashes", BirdFailed: "failed"}


@dataclass(frozen=True)
class Look:
    """What there was at one time: `ran` has the methods run and raised by node, `happened` the events since the watch began."""

    at: float
    nests: tuple[NestInfo, ...]
    states: dict[str, int]
    ran: dict[str, tuple[int, int]]
    happened: dict[str, dict[str, int]]


class Watch:
    """Looks, and counts events meanwhile."""

    def __init__(self, flock: Flock) -> None:
        self._flock = flock
        self._happened: dict[str, Counter[str]] = {}
        self.feed = flock.events(since=time.time(), kinds=tuple(WATCHED))
        threading.Thread(target=self._count, name="flock-ray events", daemon=True).start()

    def _count(self) -> None:
        for notice in self.feed:
            kind = WATCHED.get(type(notice))  # a `Missed` counts as nothing
            if kind is not None:
                self._happened.setdefault(notice.node_id, Counter())[kind] += 1

    def look(self) -> Look:
        states: Counter[str] = Counter()
        for (_, state), count in ask(self._flock, "tally").items():
            states[state] += count
        happened = {node: dict(counts) for node, counts in tuple(self._happened.items())}
        return Look(time.monotonic(), tuple(self._flock.nests()), dict(states), ask(self._flock, "ran"), happened)


def answer_of(flock: str, before: Look | None, now: Look) -> Answer:
    """What two looks show: rates are by the time between them; without one before there are none."""
    seconds = now.at - before.at if before is not None else 0.0
    total = sum(nest.birds for nest in now.nests)
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, Any]] = []
    for nest in now.nests:
        ran, raised = now.ran.get(nest.node_id, (0, 0))
        ran_before, raised_before = before.ran.get(nest.node_id, (ran, raised)) if before is not None else (ran, raised)
        calls = max(0, ran - ran_before) / seconds if seconds else None
        errors = max(0, raised - raised_before) / seconds if seconds else None
        load, happened = (nest.birds / total if total else 0.0), now.happened.get(nest.node_id, {})
        counts = [happened.get(kind, 0) for kind in WATCHED.values()]
        rates = ["-" if rate is None else f"{rate:.0f}" for rate in (calls, errors)]
        rows.append((nest.node_id[:8], bar(load, BAR), f"{100 * load:.0f} %", str(nest.birds), *rates, *map(str, counts)))
        data.append(asdict(nest) | {"calls_per_s": calls, "errors_per_s": errors} | dict(zip(WATCHED.values(), counts, strict=True)))
    states = ", ".join(f"{count} {state}" for state, count in sorted(now.states.items(), key=lambda pair: -pair[1])) or "none"
    titles = ("node", "load", "", "birds", "calls/s", "err/s", *WATCHED.values())
    views: list[View] = [f"flock {flock}: {len(now.nests)} nests, birds: {states}", Table(titles, rows)]
    return Answer({"flock": flock, "states": now.states, "nests": data}, views)


def watch(flock: Flock, interval: float, count: int | None, as_json: bool) -> None:
    """Shows looks until `count` have been shown; on a terminal each in place of the one before."""
    console, watched = Console(highlight=False), Watch(flock)
    live = console.is_terminal and not as_json
    left = count if count is not None else None if live else 1
    before: Look | None = watched.look()
    screen = Live(console=console, auto_refresh=False, screen=count is None) if live else None
    if screen is not None:
        screen.start()
    try:
        while left is None or left > 0:
            time.sleep(interval)
            now = watched.look()
            answer = answer_of(flock.name, before, now)
            if screen is not None:
                lines = [line for view in answer.view for line in lines_of(view, console.width)]
                screen.update(Group(*map(Text, lines)), refresh=True)
            else:
                show(Answer(answer.data, answer.view[1:]), console, as_json)
            before, left = now, left - 1 if left is not None else None
    finally:
        if screen is not None:
            screen.stop()
        watched.feed.close()
