"""A bird that notes in a file that it lives and what it ran, and what is read from these files. On one machine all clocks are the same."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flock_ray

EVERY = 0.05  # seconds between notes
TOUCH = 0.15  # an overlap up to this is one of notes, not of lives


class Diary:
    """Notes that it lives, and where, and each ticket that it was called with. Its count of calls goes with it when it moves."""

    def __init__(self, path: str, tag: str = "") -> None:
        self.node, self.tag = flock_ray.me().node_id, tag
        self.calls = 0
        self._who = f"{uuid.uuid4().hex[:8]} {os.getpid()} {self.node} {tag}"
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.beat()
        flock_ray.send_every(EVERY, "beat")

    def _note(self, what: str) -> None:
        os.write(self._file, f"{what} {time.monotonic():.6f} {self._who}\n".encode())

    def beat(self) -> None:
        self._note("beat")

    def run(self, ticket: str) -> int:
        self._note(f"run:{ticket}")
        self.calls += 1
        return self.calls

    def who(self) -> list[str]:
        return [self.node, self.tag]

    def pid(self) -> int:
        return os.getpid()

    def on_stop(self, reason: str) -> None:
        self._note(f"end:{reason}")
        os.close(self._file)

    def hand_over(self) -> int:
        return self.calls

    def take_over(self, calls: int) -> None:
        self.calls = calls


@dataclass
class Life:
    """One life of a bird, as its notes have it."""

    pid: int
    node: str
    tag: str
    first: float
    last: float


def _notes(path: Path) -> Iterator[list[str]]:
    """What, when, life, pid, node and tag of each note but one that its end has cut off."""
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield line.rstrip("\n").split(" ", 5)


def lives(path: Path) -> list[Life]:
    """In the order in which they began."""
    found: dict[str, Life] = {}
    for _, when, life, pid, node, tag in _notes(path):
        found.setdefault(life, Life(int(pid), node, tag, float(when), 0.0)).last = float(when)
    return sorted(found.values(), key=lambda life: life.first)


def runs(paths: Iterable[Path]) -> Counter[str]:
    """How often each ticket ran."""
    return Counter(what.removeprefix("run:") for path in paths for what, *_ in _notes(path) if what.startswith("run:"))


def now(path: Path, within: float = 1.0) -> list[Life]:
    """The lives that have just noted something."""
    least = time.monotonic() - within
    return [life for life in lives(path) if life.last >= least] if path.exists() else []


def overlaps(path: Path) -> list[tuple[Life, Life, float]]:
    """Two lives that ran at the same time, and for how many seconds."""
    those = lives(path)
    pairs = [(old, new, min(old.last, new.last) - new.first) for at, old in enumerate(those) for new in those[at + 1 :]]
    return [pair for pair in pairs if pair[2] > 0]


def overlap(path: Path) -> float:
    """The longest time, in seconds, for which two lives ran at the same time."""
    return max((seconds for *_, seconds in overlaps(path)), default=0.0)


def twice_until(path: Path) -> float:
    """When two lives last ran at the same time; 0 if never."""
    return max((min(old.last, new.last) for old, new, seconds in overlaps(path) if seconds > TOUCH), default=0.0)


class Audit:
    """What callers were told of their tickets, beside what the birds noted: at most once (C2).

    Args:
        fates: of each ticket: did its call report success?
        ran: how often each ticket ran.
    """

    def __init__(self, fates: dict[str, Any], ran: Counter[str]) -> None:
        self.not_once = [ticket for ticket, succeeded in fates.items() if succeeded and ran[ticket] != 1]
        self.twice = [ticket for ticket, succeeded in fates.items() if not succeeded and ran[ticket] > 1]
