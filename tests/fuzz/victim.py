"""The process that `tests/fuzz/listener.py` attacks: a real host with a bird, and a nest's door, each on a Unix socket and on TCP.

It notes what no peer can see: what is unpickled and on whose behalf, which connections, threads and files are left, how much memory it
has, and what was raised where. It is asked by lines on its standard input, and answers by lines of JSON.

With `--as-is` nothing is changed to live with known defects (`attacks.KNOWN`).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import gc
import json
import logging
import os
import pickle
import resource
import socket
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flock_ray.core import wire
from flock_ray.core.board import Cursor, Page
from flock_ray.core.connection import Connection
from flock_ray.runtime import life_sync, listener, mailbox, peers
from flock_ray.runtime.generators import Reading
from flock_ray.runtime.listener import Caller, Listener
from flock_ray.runtime.nest import Nest
from flock_ray.runtime.peers import Door, Wire
from flock_ray.specs import Life
from tests.fuzz import transcripts as ts
from tests.support.oneprocess import DOT, LIFE, SECRET, Pair

try:
    from uvloop import run  # as Ray's async actors do
except ImportError:
    from asyncio import run

PATIENCE = 1.0  # seconds, instead of 5: more of those who are slow
UNREAD = 1 << 19  # bytes, instead of 256 MB
CALLERS = 1_000  # instead of 100,000: what is remembered of callers is to be full after the warm-up
LEAVING = 64  # strangers more that are just being turned away
ROOM = 200  # calls in the mailbox
MEMORY = 256 << 20  # bytes of address space above what the process begins with: a broken pickle may ask for all there is

assert (SECRET, LIFE, DOT) == (ts.SECRET, ts.LIFE, ts.DOT)


class Bird:
    """What callers call."""

    def __init__(self) -> None:
        self.closed = 0

    def echo(self, x: Any) -> Any:
        return x

    def slow(self, x: Any) -> Any:
        time.sleep(0.02)
        return x

    def fails(self, *args: Any) -> None:
        raise ValueError(args)

    def long(self, size: int) -> bytes:
        return bytes(min(size, 3_000_000))

    def count(self, n: int) -> Any:
        try:
            yield from range(n)
        finally:
            self.closed += 1


class Watch:
    """Who has proved himself, whose bytes are in hand, and what is unpickled of them."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.unpickled: collections.Counter[str] = collections.Counter()
        self.raised: collections.Counter[str] = collections.Counter()
        self._hand: ContextVar[Connection | None] = ContextVar("hand", default=None)
        self._loads = pickle.loads

    def install(self) -> None:
        pickle.loads = self._noted
        watch, read, data_received, receive = self, Listener._read, Wire.data_received, Connection.receive

        def host_reads(self: Listener, caller: Caller) -> None:
            watch.of(caller.connection, read, self, caller)

        def nest_reads(self: Wire, data: bytes) -> None:
            watch.of(self._connection, data_received, self, data)

        def received(self: Connection, data: Any) -> Any:
            try:
                return receive(self, data)
            finally:
                if self.open:
                    self.proved = True  # it may be broken again when what it sent is run

        Listener._read, Wire.data_received, Connection.receive = host_reads, nest_reads, received
        threading.excepthook = lambda given: watch.violate(f"thread {given.thread}: {given.exc_type.__name__}: {given.exc_value}")
        logging.getLogger().handlers = [Log(self)]
        logging.getLogger().setLevel(logging.WARNING)

    def of(self, connection: Connection, work: Any, *args: Any) -> Any:
        """Runs it on behalf of a connection, as tasks that it begins are."""
        token = self._hand.set(connection)
        try:
            return work(*args)
        finally:
            self._hand.reset(token)

    def _noted(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        connection = self._hand.get()
        proved = connection is None or getattr(connection, "proved", False)
        self.unpickled["of nobody" if connection is None else "proved" if proved else "unproved"] += 1
        if not proved or ts.UNPROVED in bytes(data):
            self.violate(f"unpickled without the secret: {bytes(data)[:200]!r}")
        return self._loads(data, *args, **kwargs)

    def violate(self, what: str) -> None:
        if len(self.violations) < 20:
            self.violations.append(what)


class Log(logging.Handler):
    """Counts what is logged, and what was raised; keeps the first of each."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        where = ""
        if error is not None:
            trace, frames = error.__traceback__, []
            while trace is not None:
                code = trace.tb_frame.f_code
                frames.append(f"{Path(code.co_filename).stem}.{code.co_name}")
                trace = trace.tb_next
            where = f": {type(error).__name__} in {frames[-1]}"
        said = f"{record.name}: {str(record.msg)[:60]}{where}"
        if len(self._watch.raised) < 500 or said in self._watch.raised:
            self._watch.raised[said] += 1
        if said not in self._seen and len(self._seen) < 200:
            self._seen.add(said)
            print(self.format(record)[:3000], file=sys.stderr, flush=True)


class MallInfo(ctypes.Structure):
    """As `mallinfo2` of glibc has it."""

    _fields_ = [(f"field{n}", ctypes.c_size_t) for n in range(10)]  # `hblkhd` is the fifth, `uordblks` the eighth


def in_use() -> int:
    """Bytes that malloc has given out and not got back. What Python's own allocator holds comes on top."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.field7 + info.field4


class Ears(Nest):
    """A nest that only listens: its door and its answers are the real ones, behind them is nothing."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._booted, self._ready = asyncio.Event(), asyncio.Event()
        self._booted.set()
        self._ready.set()
        self._ending = True  # so it refuses what is asked
        self._record = SimpleNamespace(flock="default")
        self._registry = SimpleNamespace(me=Life("node", 1))
        self._hosts = SimpleNamespace(word=lambda word: None)
        self._board = SimpleNamespace(read=lambda *args: Page(Cursor(), ("x" * 50_000,), 0, False))
        self._tasks = set()
        self.refused = 0

    def turned_away(self, why: str, peer: str) -> None:
        self.refused += 1


class Victim:
    """The host, the door, and what is left of their connections."""

    def __init__(self, folder: Path, as_is: bool) -> None:
        self._folder, self._as_is = folder, as_is
        self.watch = Watch()
        self.watch.install()
        for module in (listener, peers):
            module.PATIENCE = PATIENCE
            module.UNREAD = UNREAD
        mailbox.CALLERS = CALLERS
        self._pair = Pair(folder, "unix", Bird, mailbox=ROOM)
        self._host = self._pair.host
        self._listener: Listener = self._host._listener
        call = self._listener._call
        self._listener._call = lambda caller, number, body: self.watch.of(caller.connection, call, caller, number, body)
        if not as_is:
            self._host.life._order._gap = life_sync.GAP = 0.005  # each gap in a caller's order holds up all others for a second
        there = threading.Event()
        threading.Thread(target=run, args=(self._nest(there),), name="nest", daemon=True).start()
        there.wait(10)

    async def _nest(self, there: threading.Event) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: self.watch.raised.update([f"event loop: {what.get('message')}"]))
        ears = Ears()
        self._door = Door(SECRET, LIFE, self._folder / "nest.sock", ears._heard, ears.turned_away)
        self._ears = ears
        self.door_address = await self._door.open("127.0.0.1", None, None)
        there.set()
        await asyncio.Event().wait()

    @property
    def host_address(self) -> str:
        return self._host.address

    def _crowd(self) -> int:
        """Connections from other machines, as it were, that have not proved themselves."""
        wires = sum(not one.open and getattr(one, "remote", True) for one in list(self._door._wires))
        callers = sum(one.stranger and one.socket.family != socket.AF_UNIX for one in list(self._listener._callers.values()))
        return max(wires, callers)

    def quick(self) -> dict[str, Any]:
        for _ in range(5):
            if self._crowd() <= listener.STRANGERS + LEAVING:
                break
            time.sleep(0.02)  # between looks
        else:
            self.watch.violate(f"{self._crowd()} strangers are let wait")
        return {"violations": self.watch.violations}

    def stats(self) -> dict[str, Any]:
        """What is here now. Memory in bytes, after all that is free was given back."""
        kept = len(wire._heads)
        wire._heads.clear()  # a cache: it fills up to its bound again and again
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        alive: collections.Counter[str] = collections.Counter()
        for one in gc.get_objects():
            if type(one) in (Caller, Connection, Wire, Reading):
                alive[type(one).__name__] += 1
        life, door = self._host.life, self._door
        return {
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "malloc": in_use(),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
            "callers": len(self._listener._callers),
            "host_strangers": self._listener._strangers,
            "wires": len(door._wires),
            "unproved_wires": sum(not one.open for one in list(door._wires)),
            "mailbox": len(self._listener._mailbox),
            "running": self._listener._running,
            "readings": len(self._host.readings._open),
            "parcels": len(self._host._parcels),
            "tasks": len(self._ears._tasks),
            "alive": dict(alive),
            "kept": {
                "heads": kept,
                "methods": len(life._loaded.allowed),
                "withdrawn": len(life._withdrawn or ()),
                "refused": len(life._refused or ()),
                "orders": len(life._order._order._next),
                "never": len(self._host._never),
            },
            "state": life.state.value,
            "turned_away": [self._listener.refused, self._ears.refused],
            "unpickled": dict(self.watch.unpickled),
            "violations": self.watch.violations,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--as-is", action="store_true")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a bird prints is not for the one who asks
    victim = Victim(given.folder, given.as_is)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    print(json.dumps({"host": victim.host_address, "door": victim.door_address, "pid": os.getpid()}), file=answers, flush=True)
    answered = {"stats": victim.stats, "quick": victim.quick, "raised": lambda: dict(victim.watch.raised.most_common(60))}
    for line in sys.stdin:
        print(json.dumps(answered[line.strip()]()), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
