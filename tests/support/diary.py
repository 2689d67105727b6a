"""A bird that notes in a file that it lives, and what is read from these files. On one machine all clocks are the same."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import flock_ray

EVERY = 0.05  # seconds between notes
TOUCH = 0.15  # an overlap up to this is one of notes, not of lives


class Diary:
    """Notes that it lives, and where."""

    def __init__(self, path, tag=""):
        self.path, self.tag, self.life = path, tag, uuid.uuid4().hex[:8]
        self.node = flock_ray.me().node_id
        self.note()
        flock_ray.send_every(EVERY, "note")

    def note(self):
        with open(self.path, "a") as file:
            file.write(f"{time.monotonic()} {self.life} {os.getpid()} {self.node} {self.tag}\n")

    def who(self):
        return [self.node, self.tag]

    def pid(self):
        return os.getpid()


@dataclass
class Life:
    """One life of a bird, as its notes have it."""

    pid: int
    node: str
    tag: str
    first: float
    last: float


def lives(path: Path) -> list[Life]:
    """In the order in which they began."""
    found: dict[str, Life] = {}
    for line in path.read_text().splitlines():
        when, life, pid, node, *tag = line.split()
        found.setdefault(life, Life(int(pid), node, " ".join(tag), float(when), float(when))).last = float(when)
    return sorted(found.values(), key=lambda life: life.first)


def now(path: Path, within: float = 1.0) -> list[Life]:
    """The lives that have just noted something."""
    least = time.monotonic() - within
    return [life for life in lives(path) if life.last >= least] if path.exists() else []


def _overlaps(path: Path) -> list[tuple[float, float]]:
    """For how many seconds two lives ran at the same time, and until when."""
    those = lives(path)
    pairs = [(new.first, min(old.last, new.last)) for at, old in enumerate(those) for new in those[at + 1 :]]
    return [(until - since, until) for since, until in pairs if until > since]


def overlap(path: Path) -> float:
    """The longest time, in seconds, for which two lives ran at the same time."""
    return max((seconds for seconds, _ in _overlaps(path)), default=0.0)


def twice_until(path: Path) -> float:
    """When two lives last ran at the same time; 0 if never."""
    return max((until for seconds, until in _overlaps(path) if seconds > TOUCH), default=0.0)
