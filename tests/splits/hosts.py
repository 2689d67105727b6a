"""Four hosts on one machine whose network can be split: each runs Ray and a driver. Needs root and Linux."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.support.namespaces import Place, Switch, address
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
BOOT = 180.0  # seconds, on a machine that has other things to do
ANSWER = 60.0
PORTS = ("--metrics-export-port=8081", "--dashboard-agent-grpc-port=8082", "--runtime-env-agent-port=8083")  # else agents have 15 s
SURVIVES = {  # how Ray is run where splits have to be survived (RAY_FACTS)
    "RAY_health_check_failure_threshold": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "150",  # this machine has other things to do, and Ray gives up after 30
    "RAY_agent_register_timeout_ms": "150000",
    "RAY_worker_register_timeout_seconds": "150",
}


class DriverError(Exception):
    """What a driver was asked has raised: `kind` is the name of the error's type."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Host(Place):
    """One host: its Ray, and a driver that does what it is told.

    Args:
        number: its address is 10.77.0.`number`; the first is the head.
        temp: where its temp folder is mounted: a short path, for Unix sockets lie in it.
        logs: an empty folder of this machine.
    """

    def __init__(self, number: int, temp: Path, logs: Path) -> None:
        super().__init__(temp, Path("/dev/shm"))
        self.number, self.ip = number, address(number)
        self.node = ""
        self._temp, self._logs = temp, logs
        self._ray_log = logs / f"ray{number}"
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        return f"h{self.number}"

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "FLOCK_RAY_"))}
        return {**kept, **SURVIVES, "PYTHONPATH": str(ROOT), "FLOCK_RAY_SPLIT_TEMP": str(self._temp)}

    def start_ray(self) -> None:
        where = ["--head", "--port=6379", "--include-dashboard=false"] if self.number == 1 else ["--address=10.77.0.1:6379"]
        more = [
            f"--node-ip-address={self.ip}",
            "--num-cpus=2",
            "--object-store-memory=80000000",
            f"--temp-dir={self._temp}",
            "--block",
            *PORTS,
        ]
        with self._ray_log.open("w") as log:
            self._ray = self._start("-c", "from ray.scripts.scripts import main; main()", "start", *where, *more, stdout=log, stderr=log)

    def has_ray(self) -> bool:
        """Has its Ray started?"""
        said = self._ray_log.read_text()
        if self._ray.poll() is not None:
            last = self.run("sh", "-c", f"tail -n 20 {self._temp}/session_2*/logs/raylet.*")
            raise AssertionError(f"Ray on {self} has ended: {said[-2000:]}\n{last}")
        return "Ray runtime started" in said

    def start_driver(self) -> None:
        log = (self._logs / f"driver{self.number}").open("w")
        with log:
            driver = self._start("-m", "tests.splits.driver", self.ip, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._stdin = driver.stdin
        threading.Thread(target=self._read, args=(driver.stdout,), daemon=True).start()

    def _start(self, *command: str, **pipes: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(sys.executable, *command), cwd=ROOT, env=self.environment(), text=True, start_new_session=True, **pipes
        )
        self._processes.append(process)
        return process

    def _read(self, answers: Iterable[str]) -> None:
        for line in answers:
            said = json.loads(line)
            future = self._asked.pop(said["id"])
            if "error" in said:
                future.set_exception(DriverError(said["error"], said["text"]))
            else:
                future.set_result(said["value"])
        for future in list(self._asked.values()):
            future.set_exception(DriverError("Ended", f"the driver of {self} has ended; see {self._logs}"))

    def begin(self, what: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Tells the driver to do something; several things at a time go on side by side."""
        number = next(self._numbers)
        future = self._asked[number] = Future()
        assert self._stdin is not None
        self._stdin.write(json.dumps({"id": number, "do": what, "args": args, "kwargs": kwargs}) + "\n")
        self._stdin.flush()
        return future

    def do(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """The same, and waits for what comes of it."""
        return self.begin(what, *args, **kwargs).result(ANSWER)

    def rule(self, hook: str, *what: str) -> None:
        """Has nftables drop some packets of this host (`hook`: "input" or "output")."""
        chain = f"add chain inet f c {{ type filter hook {hook} priority 0; }}"
        self.run("nft", f"add table inet f; {chain}; add rule inet f c {' '.join(what)}")

    def no_rules(self) -> None:
        self.run("nft", "flush ruleset")

    def close(self) -> None:
        super().close()
        for process in self._processes:  # nsenter, which ends with what it waits for
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


class Network:
    """A switch and four hosts, with Ray and a driver on each."""

    def __init__(self, temp: Path, logs: Path) -> None:
        self.temp = temp
        temp.mkdir(mode=0o700)
        self._places: list[Place] = []
        try:
            self.switch: Switch = self._keep(Switch("br0", "br1", "br2"))
            self.hosts = [self._plug(number, logs) for number in range(1, 5)]
            for host in self.hosts:  # one after the other: each has some seconds of CPU to do until it must have answered
                host.start_ray()
                eventually(host.has_ray, f"Ray runs on {host}", BOOT)
                host.start_driver()
            for host, begun in [(host, host.begin("join", len(self.hosts))) for host in self.hosts]:
                host.node = begun.result(BOOT)
        except BaseException:
            self.close()
            raise

    def _keep(self, place: Any) -> Any:
        self._places.append(place)
        return place

    def _plug(self, number: int, logs: Path) -> Host:
        host: Host = self._keep(Host(number, self.temp, logs))
        self.switch.plug(host, number)
        return host

    def cut_off(self, *hosts: Host, bridge: str = "br1") -> float:
        """These hosts hear only each other, and who is on the same bridge. Returns when."""
        for host in hosts:
            self.switch.move(host.number, bridge)
        return time.monotonic()

    def heal(self) -> float:
        for host in self.hosts:
            self.switch.move(host.number, "br0")
            host.no_rules()
        return time.monotonic()

    def close(self) -> None:
        for place in reversed(self._places):
            place.close()
        with contextlib.suppress(FileNotFoundError):
            self.temp.rmdir()  # what was in it was each host's own
