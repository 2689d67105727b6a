"""Chaos on a real local cluster: callers count what they are told, birds count what they do, and processes of every kind are killed.

Birds, hosts of light birds, nests and raylets are killed; raylets are stopped for five seconds with all their workers; nodes join; with
Redis the head's control service (GCS) is killed, and is back seconds later. It ends with tables, and with status 1 if a promise was
broken: a name was lost, a call that reported success did not run exactly once, one that failed ran more than once, or two lives of a
name ran at a time where H4 does not allow it. Run it by `scripts/chaos [--minutes 3] [--seed 1]`; Ctrl-C cleans up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

import flock_ray
from flock_ray.core.board import UNREAD
from flock_ray.notices import NestJoined, NestLeft
from flock_ray.runtime import cluster as ray_cluster
from tests.support.callers import Callers
from tests.support.diary import EVERY, Audit, Diary, Life, overlaps, runs
from tests.support.head import NO_REDIS, Head, free_port, has_redis, redis_server

WORKERS = 3  # nodes beside the head's, which stays: without it Ray starts nothing
BIRDS = 30
CALLERS = 4
PACE_OF_CALLS = 0.02  # seconds between two calls of each
PACE = 5.0  # seconds between two faults, on average
STOPPED = 5.0  # seconds for which a raylet is stopped
HEADLESS = (2.0, 8.0)  # seconds, from and to, without a GCS
PATIENCE = 20.0  # seconds of a caller
CALM = 120.0  # seconds in which everything has to be well after the last fault

console = Console(highlight=False, soft_wrap=True)


class Ground:
    """The cluster, and the faults that can be done to it."""

    def __init__(self, rng: random.Random, redis: str) -> None:
        self.rng = rng
        self._deck: list[str] = []
        self.done: Counter[str] = Counter()
        self.verdicts: dict[tuple[str, str], float] = {}  # on which node which node's nest was declared dead, and when that was first seen
        self._stopped: list[tuple[float, list[psutil.Process]]] = []
        self._has_redis, self._headless_until = bool(redis), 0.0
        if redis:
            os.environ["RAY_REDIS_ADDRESS"] = redis
        node = {"num_cpus": 2, "include_dashboard": False, "gcs_server_port": free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.head = Head(self.cluster)
        self.workers = [self.cluster.add_node(num_cpus=2) for _ in range(WORKERS)]
        ray.init(self.cluster.address, log_to_driver=False, logging_level="critical")

    # What there is

    def _nests(self) -> dict[str, Any]:
        life = ray_cluster.flock_life("default").life  # type: ignore[union-attr]  # it runs
        return {nest.node_id: ray_cluster.nest_handle(life, nest.node_id) for nest in flock_ray.nests()}

    def look(self) -> None:
        """Notes which nests have declared which dead. Their handles are found by the head."""
        if not self.head.is_up:
            return
        query = pickle.dumps(("notices", UNREAD, (NestJoined, NestLeft)))
        for node, handle in self._nests().items():
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                joined: dict[str, int] = {}
                for notice in pickle.loads(ray.get(handle.read.remote(query), timeout=2)).notices:
                    if isinstance(notice, NestJoined):
                        joined[notice.life.node] = notice.life.number
                    elif (
                        isinstance(notice, NestLeft) and joined.get(notice.life.node, 0) <= notice.life.number
                    ):  # else its next life is there
                        self.verdicts.setdefault((node, notice.life.node), time.monotonic())

    def _actors(self, kind: str) -> list[int]:
        """The processes of such actors, by the name that Ray gives them. They are children of our raylets."""
        return [process.pid for process in psutil.Process().children(recursive=True) if process.name().startswith(f"ray::{kind}")]

    # Faults

    def bird(self) -> bool:
        return self._kill_one_of(self._actors("HostActor"))

    def light_host(self) -> bool:
        return self._kill_one_of(self._actors("LightHostActor"))

    def nest(self) -> bool:
        return self._kill_one_of(self._actors("NestActor"))

    def gcs(self) -> bool:
        if not self._has_redis or not self.head.is_up:
            return False
        self.head.kill()
        self._headless_until = time.monotonic() + self.rng.uniform(*HEADLESS)
        return True

    def raylet(self) -> bool:
        if len(self.workers) < 2 or not self.head.is_up:
            return False
        node = self.workers.pop(self.rng.randrange(len(self.workers)))
        self.cluster.remove_node(node, allow_graceful=False)
        return True

    def stop_raylet(self) -> bool:
        if self._stopped or not self.workers:
            return False
        node = self.rng.choice(self.workers)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self._stopped.append((time.monotonic() + STOPPED, processes))
        return True

    def join(self) -> bool:
        if len(self.workers) >= WORKERS or not self.head.is_up:
            return False
        self.workers.append(self.cluster.add_node(num_cpus=2))
        return True

    def _kill_one_of(self, pids: list[int]) -> bool:
        return bool(pids) and self._kill(self.rng.choice(pids))

    def _kill(self, pid: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def resume(self, now: float) -> None:
        """Lets go on what has been stopped, or away, for long enough."""
        if not self.head.is_up and now >= self._headless_until:
            self.head.restart()
        for until, processes in list(self._stopped):
            if now >= until:
                self._stopped.remove((until, processes))
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()

    FAULTS: ClassVar = {"bird": 3, "light_host": 2, "nest": 3, "raylet": 1, "stop_raylet": 2, "join": 1, "gcs": 1}

    def fault(self) -> bool:
        """Does the next that is possible now, of a shuffled deck of all: none is left out for long. Returns whether there was one."""
        kind = next((kind for kind in self._deck if getattr(self, kind)()), None)
        if kind is None:  # none is left, or none that is possible now
            self._deck = [kind for kind, weight in self.FAULTS.items() for _ in range(weight)]
            self.rng.shuffle(self._deck)
            return False
        self._deck.remove(kind)
        self.done[kind] += 1
        console.print(f"{time.strftime('%X')} {kind}")
        return True

    def close(self) -> None:
        self.resume(float("inf"))
        try:
            if ray.is_initialized():
                with contextlib.suppress(flock_ray.FlockNotRunning):  # it did not come so far
                    flock_ray.destroy()
        finally:
            ray.shutdown()
            self.cluster.shutdown()


def chaos(minutes: float, seed: int, folder: Path) -> bool:
    """Returns whether every promise was kept."""
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        stack.callback(end_children)
        if not has_redis():
            console.print(f"{NO_REDIS}, so the head stays")
        ground = Ground(rng, stack.enter_context(redis_server()) if has_redis() else "")
        stack.callback(ground.close)
        flock_ray.init()
        wait_for("a nest on every node", lambda: len(flock_ray.nests()) == WORKERS + 1)
        names = [f"bird-{number}" for number in range(BIRDS)]
        for number, name in enumerate(names):
            starter = flock_ray.options(light=number % 2 == 0, ack="peer", max_restarts=1_000_000, stop_timeout=5.0)
            starter.start(name, Diary, str(folder / name))
        flock_ray.wait(names, timeout=CALM)
        console.print(f"{BIRDS} birds run on {WORKERS + 1} nodes; {minutes:g} minutes of faults begin, with seed {seed}")
        callers = Callers([names] * CALLERS, "run", tickets=True, timeout=PATIENCE, pace=PACE_OF_CALLS)
        stack.callback(callers.end)
        end, next_fault, next_look = time.monotonic() + 60 * minutes, 0.0, 0.0
        while (now := time.monotonic()) < end:
            ground.resume(now)
            if now >= next_fault and ground.fault():
                next_fault = time.monotonic() + rng.expovariate(1 / PACE)
            if now >= next_look:
                ground.look()
                next_look = time.monotonic() + 1.0
            time.sleep(0.05)
        ground.resume(float("inf"))
        console.print("the faults are over")
        lost = wait_until_well(names)
        wait_for("a nest on every node", lambda: len(flock_ray.nests()) == len(ground.workers) + 1)
        ground.look()
        callers.end()
        time.sleep(2 * EVERY)
        return report(ground, callers, lost, folder)


def end_children() -> None:
    """What Ray has not ended."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for(what: str, condition: Any, deadline: float = CALM) -> None:
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {deadline:g} s: {what}")
        time.sleep(0.1)


def wait_until_well(names: list[str]) -> list[str]:
    """The names that do not answer `CALM` seconds after the last fault."""
    lost, end = names, time.monotonic() + CALM
    while lost and time.monotonic() < end:
        answers = flock_ray.call_many([(name, "run", (f"well.{name}",)) for name in lost], timeout=10, return_exceptions=True)
        lost = [name for name, answer in zip(lost, answers, strict=True) if isinstance(answer, BaseException)]
    return lost


def report(ground: Ground, told: Callers, lost: list[str], folder: Path) -> bool:
    """Says what happened."""
    audit = Audit(told.fates, runs(folder.iterdir()))
    doubles = [(path.name, *double) for path in folder.iterdir() for double in overlaps(path)]
    allowed = [double for double in doubles if is_allowed(ground, *double[1:3])]
    longest = max((double[3] for double in doubles), default=0.0)
    silence, silent, until = max(
        ((later - earlier, name, later) for name, times in told.answered.items() for earlier, later in pairwise(sorted(times))),
        default=(0.0, "none", time.monotonic()),
    )
    since = time.strftime("%X", time.localtime(time.time() - (time.monotonic() - until) - silence))
    for title, rows in (("faults", sorted(ground.done.items())), ("calls", sorted(told.outcomes.items()))):
        table = Table(title=title, show_header=False)
        for key, count in rows:
            table.add_row(key, str(count))
        console.print(table)
    table = Table(title="promises", show_header=False)
    table.add_row("names lost", f"{len(lost)} {' '.join(lost)}")
    table.add_row("calls that reported success and did not run exactly once", str(len(audit.not_once)))
    table.add_row("calls that failed and ran more than once", str(len(audit.twice)))
    table.add_row("second lives of a name: in all, allowed by H4, the longest", f"{len(doubles)}, {len(allowed)}, {longest:.2f} s")
    table.add_row("longest time for which a name did not answer", f"{silence:.1f} s ({silent}, from {since})")
    console.print(table)
    for name, one, other, seconds in doubles:
        console.print(f"{name} ran on {one.node[:8]} and on {other.node[:8]} for {seconds:.2f} s")
    kept = not lost and not audit.not_once and not audit.twice and len(allowed) == len(doubles)
    console.print("every promise was kept" if kept else "A PROMISE WAS BROKEN")
    return kept


def is_allowed(ground: Ground, one: Life, other: Life) -> bool:
    """Had the nest of one life's node declared the other's dead before the second began, while it lived? (H4)"""
    pairs = ((one.node, other.node), (other.node, one.node))
    return any(ground.verdicts.get(pair, float("inf")) < other.first + 1.0 for pair in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="flock_ray_chaos"))
    try:
        return 0 if chaos(given.minutes, given.seed, folder) else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
