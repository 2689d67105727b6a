"""Which birds' code a host of light birds was running when it died: a few bytes of a shared file, written before each method.

What is written into a mapped file is there also after the process was killed. So the nest can tell the bird that takes its host down
from its neighbours, which only happened to be there.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any, Generic, TypeVar

from flock_ray.specs import Dot

T = TypeVar("T")

PLACES = 4_096  # threads at a time whose work is recorded; what further ones run is not
_ENTRY = struct.Struct("!QQ")  # counter of the dot, and number of its nest's life; no dot has the counter 0
_NOTHING = bytes(_ENTRY.size)


def recorder_path(directory: str | Path, pid: int) -> Path:
    return Path(directory, f"{pid}.running")


class _Place:
    """A thread's place in the file; free for another when the thread, and so what it keeps for itself, has gone."""

    __slots__ = ("_free", "at")

    def __init__(self, at: int, free: list[int]) -> None:
        self.at = at
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.at)


class Recorder:
    """Written by a host. Each thread has a place of its own in the file."""

    def __init__(self, directory: str | Path, pid: int) -> None:
        path = recorder_path(directory, pid)
        path.write_bytes(bytes(_ENTRY.size * PLACES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._lock = threading.Lock()
        self._free = list(range(0, PLACES * _ENTRY.size, _ENTRY.size))[::-1]
        self._mine = threading.local()

    def note(self, dot: Dot) -> None:
        """The code of this bird runs in this thread from now on."""
        self._mine.dot = dot
        _ENTRY.pack_into(self._map, self._place(), dot.counter, dot.life.number & 0xFFFFFFFFFFFFFFFF)

    def clear(self) -> None:
        """No bird's code runs in this thread any more."""
        self._mine.dot = None
        place = self._place()
        self._map[place : place + _ENTRY.size] = _NOTHING

    def noted(self) -> Dot | None:
        """Whose code runs in this thread."""
        return getattr(self._mine, "dot", None)

    def _place(self) -> int:
        try:
            return self._mine.place.at  # type: ignore[no-any-return]  # as set below
        except AttributeError:
            with self._lock:
                # The last one is for all further threads.
                place = _Place(self._free.pop(), self._free) if len(self._free) > 1 else _Place(self._free[0], [])
            self._mine.place = place
            return place.at


def suspects(directory: str | Path, pid: int) -> frozenset[tuple[int, int]]:
    """Whose code ran when the process ended, as (counter of the dot, number of its nest's life)."""
    try:
        recorded = recorder_path(directory, pid).read_bytes()
    except OSError:
        return frozenset()
    whole = recorded[: len(recorded) // _ENTRY.size * _ENTRY.size]
    return frozenset((counter, number) for counter, number in _ENTRY.iter_unpack(whole) if counter)


class Recorded(Generic[T]):
    """A coroutine of a bird, each step of which is recorded."""

    def __init__(self, recorder: Recorder, dot: Dot, work: Coroutine[Any, Any, T]) -> None:
        self._recorder, self._dot, self.work = recorder, dot, work

    def __await__(self) -> Generator[Any, Any, T]:
        value, error = None, None
        while True:
            self._recorder.note(self._dot)
            try:
                waits_for = self.work.send(value) if error is None else self.work.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]  # of its coroutine
            finally:
                self._recorder.clear()
            try:
                value, error = (yield waits_for), None
            except GeneratorExit:
                self.work.close()
                raise
            except BaseException as thrown:  # into the coroutine, as a cancellation
                value, error = None, thrown
