"""The bird of the tests on split networks, and what is read from the files it writes."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import flock_ray

EVERY = 0.05  # seconds between notes
TOUCH = 0.15  # an overlap up to this is one of notes, not of lives


class Diary:
    """Notes in a file that all hosts share that it lives, and where."""

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


class Life:
    """One life of a bird, as its notes have it; on one machine all clocks are the same."""

    def __init__(self, when, node, tag):
        self.first = self.last = when
        self.node, self.tag = node, tag

    def __repr__(self):
        return f"<{self.node[:6]} {self.tag} {self.first:.2f}-{self.last:.2f}>"


def lives(path: Path) -> list[Life]:
    found: dict[str, Life] = {}
    for line in path.read_text().splitlines():
        when, life, _pid, node, *tag = line.split()
        found.setdefault(life, Life(float(when), node, " ".join(tag))).last = float(when)
    return sorted(found.values(), key=lambda life: life.first)


def now(path: Path, within: float = 1.0) -> list[Life]:
    """The lives that have just noted something."""
    least = time.monotonic() - within
    return [life for life in lives(path) if life.last >= least] if path.exists() else []


def twice_until(path: Path) -> float:
    """When two lives last ran at the same time; 0 if never."""
    all_lives = lives(path)
    ends = [
        min(old.last, new.last)
        for at, old in enumerate(all_lives)
        for new in all_lives[at + 1 :]
        if min(old.last, new.last) - new.first > TOUCH
    ]
    return max(ends, default=0.0)
