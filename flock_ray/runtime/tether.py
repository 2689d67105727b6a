"""What ties a host to its node: the raylet, whose end is its own, and the nest, without which it runs on for `nest_grace` at most (M5).

Rules kept here: nothing of a bird runs without `Tether.check`, which looks at the clock anew after a pause of the process
(SIGSTOP, suspend) before it says yes; the time of a nest's death is never taken to be later than the last moment in which it was
seen alive; the host's words reach its nest in order, each at least once; a nest has adopted the host only when one and the same
process said its pid before and after its Welcome.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from flock_ray.core.wire import HostReport, Welcome, Words
from flock_ray.specs import Life

log = logging.getLogger("flock_ray.host")

MARGIN = 0.8  # of `nest_grace`: birds end before a peer may hatch them. Less ends them sooner than need be; 1 leaves no margin
FRESH = 1.0  # seconds: how old the knowledge that the nest lives may be when something begins. Less costs more system calls
LOOK = 0.5  # seconds between looks while all is well; below FRESH, so that a call on a running process never has to look itself
RETRY = 0.25  # seconds until a nest that did not answer is tried again
TOGETHER = 300  # words at a time: what a nest does for one is short, and it must not be held up for long
ANSWER = 10.0  # seconds a nest may take to answer before the word is sent again
PULSE = 2.0  # seconds between questions to the nest whether it lives. Less costs a nest with many hosts CPU
PATIENCE = 1.0  # seconds for the answer
DEAF = 0.5  # of `nest_grace`, in questions without an answer: then the nest is ended, in time for its next life to be back (M6)


def clock() -> float:
    """Seconds that go on while the machine is suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def started(pid: int) -> int:
    """When a process began, in ticks since the machine's boot: with the pid it names a process for ever. 0 where it cannot be had."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # the name in parentheses may itself hold spaces and parentheses


def pid_path(directory: str | Path, pid: int) -> Path:
    """The file that says that a host has this pid."""
    return Path(directory, f"{pid}.json")


class PidFile:
    """`<pid>.json` in the session's folder while the host lives: a nest's next life finds its hosts by it (V2)."""

    def __init__(self, directory: str, host: str) -> None:
        self._path = pid_path(directory, os.getpid())
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps({"pid": os.getpid(), "started": started(os.getpid()), "host": host}))
        draft.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class Watched:
    """A process whose end is to be noticed: by a pidfd, which nothing can reuse; where there is none, by psutil."""

    def __init__(self, pid: int) -> None:
        self.fd: int | None = None
        self._process: psutil.Process | None = None
        try:
            if hasattr(os, "pidfd_open"):
                self.fd = os.pidfd_open(pid)
            else:
                self._process = psutil.Process(pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass  # it is gone already: alive() says so
        except OSError:  # a kernel or sandbox without pidfds
            with suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)

    def alive(self) -> bool:
        if self.fd is not None:
            return not _ended([self.fd], 0)
        if self._process is None:
            return False
        with suppress(psutil.Error):
            return bool(self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE)
        return False

    def end(self) -> None:
        """Kills it."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):  # it is gone already
            if self.fd is not None:
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
            elif self._process is not None:
                self._process.kill()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _ended(fds: list[int], seconds: float) -> bool:
    """Waits until a process of these pidfds has ended, `seconds` at most."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Tether:
    """Watches raylet and nest, and ends the process when it must not run on.

    Args:
        nest_pid: the nest that created this host.
        raylet_pid: the node's raylet; `None` where there is none.
        grace: `nest_grace`, seconds.
        end: ends the process at once; called from any thread.
        orphaned: called when the nest has been found dead.
        nobody_else: asks the nest whether the flock is on this node only, so that nobody can have hatched the birds elsewhere while this
            process was stopped, and its nest with it.
    """

    def __init__(
        self,
        nest_pid: int,
        raylet_pid: int | None,
        grace: float,
        end: Callable[[str], object],
        orphaned: Callable[[], object],
        nobody_else: Callable[[], bool] = lambda: False,
    ) -> None:
        self._patience = grace * MARGIN
        self._nobody_else = nobody_else
        self._end = end
        self._orphaned = orphaned
        self._lock = threading.Lock()
        self._nest = Watched(nest_pid)
        self._raylet = Watched(raylet_pid) if raylet_pid is not None else None
        self._seen = clock()  # when the nest was last seen alive
        self._good_until = self._seen  # until then nobody has to look
        self._since: float | None = None  # when the nest died, at the earliest
        self._over = False

    def start(self) -> None:
        threading.Thread(target=self._watch, name="flock_ray tether", daemon=True).start()

    @property
    def adopted(self) -> bool:
        return self._since is None

    def check(self) -> bool:
        """May something run now? False: this process is over."""
        if clock() < self._good_until:
            return True
        return self._look()

    def end_nest(self) -> None:
        """Ends a nest that does not answer, and nothing else: its pid may be another process's by now, its pidfd may not."""
        with self._lock:
            if self._since is None:
                self._nest.end()

    def adopt(self, pid: int) -> None:
        """A nest's new life has this host now; past the deadline that is too late, for a peer may have hatched the bird."""
        if not self._look():
            return
        nest = Watched(pid)
        with self._lock:
            old, self._nest = self._nest, nest
            old.close()
            self._seen, self._since = clock(), None
        self._look()

    def _look(self) -> bool:
        with self._lock:
            now = clock()
            if self._since is None and self._nest.alive():
                self._over = self._over or (now - self._seen > self._patience and not self._nobody_else())
                self._seen, self._good_until = now, 0.0 if self._over else now + FRESH  # until the process has ended nothing runs
            elif self._since is None:
                self._since, self._good_until = self._seen, 0.0
                self._nest.close()
                threading.Thread(target=self._orphaned, name="flock_ray orphaned", daemon=True).start()
            if self._since is not None and now - self._since > self._patience:
                self._over = True
            over = self._over
        if over:
            self._end(f"no nest for {self._patience:.1f} s, or stopped for as long")
        return not over

    def _watch(self) -> None:
        while not self._over:
            self._wait()
            if self._raylet is not None and not self._raylet.alive():
                self._over = True
                self._end("the raylet has ended")
                return
            self._look()

    def _wait(self) -> None:
        """Until the raylet or the nest ends, or it is time to look at the clock."""
        nest, raylet = self._nest.fd, self._raylet.fd if self._raylet is not None else None
        fds = [fd for fd in (nest, raylet) if fd is not None]
        seconds = LOOK if self.adopted else LOOK / 10
        if fds:
            _ended(fds, seconds)
        else:
            time.sleep(seconds)


class NestAwayError(Exception):
    """The nest does not answer now; it may have got the word."""


class ToNest(Protocol):
    """How words reach the nest."""

    def say(self, word: bytes, timeout: float) -> bytes | None:
        """Delivers a pickled word; raises `NestAwayError`."""

    def pid(self, timeout: float) -> int:
        """The nest's process; raises `NestAwayError`."""

    def alone(self, timeout: float) -> bool:
        """Is the flock on this node only? Raises `NestAwayError`."""


class Pulse:
    """Ends a nest that lives and does not answer (M6): its peers give it up, and its birds would run on beside those they hatch.

    What is counted is questions and not seconds: who was stopped himself, and wakes up late, has waited for one of them only.

    Args:
        grace: `nest_grace`, seconds.
        beat: is called each time it asks.
    """

    def __init__(self, link: ToNest, tether: Tether, grace: float, beat: Callable[[], object] = lambda: None) -> None:
        self._beat = beat
        self._link = link
        self._tether = tether
        self._most = max(2, round(DEAF * grace / PATIENCE))
        self._unanswered = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="flock_ray pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(PULSE if not self._unanswered else 0.0)
            self.ask()

    def ask(self) -> None:
        """Asks once."""
        self._beat()
        if not self._tether.adopted:  # it has died: that is the tether's business
            self._unanswered = 0
            time.sleep(PULSE)
            return
        asked = time.monotonic()
        try:
            self._link.pid(PATIENCE)
        except NestAwayError:
            self._unanswered += 1
            time.sleep(max(0.0, asked + PATIENCE - time.monotonic()))  # it may be that nobody listens
        else:
            self._unanswered = 0
        if self._unanswered >= self._most:
            log.error("the nest of this node has left %d questions unanswered, and is ended; Ray starts it again", self._unanswered)
            self._tether.end_nest()
            self._unanswered = 0


class Reporter:
    """Tells the nest what happened, in order, however long it takes; after the nest's death first what is held here.

    Args:
        report: what the host holds.
        tether: is told when a nest has adopted the host.
        welcomed: called with the nest's life then.
    """

    def __init__(self, link: ToNest, report: Callable[[], HostReport | None], tether: Tether, welcomed: Callable[[Life], object]) -> None:
        self._link = link
        self._report = report
        self._tether = tether
        self._welcomed = welcomed
        self._words: deque[object] = deque()
        self._changed = threading.Condition()

    def start(self) -> None:
        threading.Thread(target=self._run, name="flock_ray reporter", daemon=True).start()

    def say(self, word: object) -> None:
        """Has it delivered; returns at once."""
        with self._changed:
            self._words.append(word)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all is delivered, for ever if need be: the tether ends a process that finds no nest."""
        with self._changed:
            self._changed.wait_for(lambda: not self._words and self._tether.adopted)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._words or not self._tether.adopted)
            try:
                if not self._tether.adopted:
                    self._seek()
                else:
                    self._deliver()
            except NestAwayError:
                time.sleep(RETRY)

    def _deliver(self) -> None:
        with self._changed:
            words = tuple(itertools.islice(self._words, TOGETHER))
        try:
            self._link.say(pickle.dumps(words[0] if len(words) == 1 else Words(words)), ANSWER)
        except NestAwayError:
            raise
        except Exception:
            log.exception("the nest could not take %s", ", ".join({type(word).__name__ for word in words}))
        with self._changed:
            for _ in words:
                self._words.popleft()
            self._changed.notify_all()

    def _seek(self) -> None:
        report = self._report()
        before = self._link.pid(ANSWER)
        welcome = self._ask(report) if report is not None else None
        if not isinstance(welcome, Welcome) or self._link.pid(ANSWER) != before:
            raise NestAwayError  # it has not adopted us, or not this life of it
        self._tether.adopt(before)
        if not self._tether.adopted:
            raise NestAwayError  # it came too late, and this process is over
        self._welcomed(welcome.nest)
        self.wake()

    def _ask(self, report: HostReport) -> Any:
        try:
            answer = self._link.say(pickle.dumps(report), ANSWER)
        except NestAwayError:
            raise
        except Exception:
            log.exception("the nest could not take a report")
            return None
        return pickle.loads(answer) if answer else None
