"""Hosts on one machine: each has its own network, processes and temp folder, and runs Ray and a driver. Needs root and Linux.

    switch:  br0 ---- p1 ... p4        a split moves some of the ports to br1, or br2
                      |      |
    hosts:          eth0    eth0       10.77.0.1 ... 10.77.0.4

No namespace here has a name, so none can be left behind: they live as long as the first process of a host, which ends when its stdin is
closed, however this process ends. With it the kernel ends all other processes of the host; its temp folder is a tmpfs of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("unshare", "nsenter", "ip", "nft")
BOOT = 180.0  # seconds, on a machine that has other things to do
ANSWER = 60.0
FIRST = """
import os, signal, subprocess, sys
for folder in sys.argv[1:]:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # it inherits orphans, and waits for none
print("up", flush=True)
os.read(0, 1)
"""
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


def why_not() -> str:
    """Why no hosts can be made here; empty if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None]
    if missing:
        return f"hosts on one machine need {', '.join(missing)} (util-linux, iproute2, nftables)"
    if os.geteuid() != 0:
        return "hosts on one machine need root: network namespaces are made"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"network namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Place:
    """The namespaces of one host, or of the switch, and their first process."""

    def __init__(self, *folders: Path) -> None:
        self._unshare = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            + [sys.executable, "-S", "-c", FIRST, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the test's
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "up\n", "a host's first process did not start"
        self.pid = int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()[0])

    def command(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.command(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Ends all its processes, and with them the namespaces."""
        for pipe in (self._unshare.stdin, self._unshare.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._unshare.wait(10)
        except subprocess.TimeoutExpired:
            self._unshare.kill()
            self._unshare.wait()


class Host(Place):
    """One host: its Ray, and a driver that does what it is told.

    Args:
        number: its address is 10.77.0.`number`; the first is the head.
        temp: where its temp folder is mounted: a short path, for Unix sockets lie in it.
        logs: an empty folder of this machine.
    """

    def __init__(self, number: int, temp: Path, logs: Path) -> None:
        super().__init__(temp, Path("/dev/shm"))
        self.number, self.ip = number, f"10.77.0.{number}"
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
        more = [f"--node-ip-address={self.ip}", "--num-cpus=2", "--object-store-memory=80000000", f"--temp-dir={self._temp}", "--block"]
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
            self.switch = self._keep(Place())
            for bridge in ("br0", "br1", "br2"):
                self.switch.run("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0")
                self.switch.run("ip", "link", "set", bridge, "up")
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
        port = f"p{number}"
        # The switch has this machine's processes in its /proc no more: its own network is entered only.
        done = subprocess.run(
            ["nsenter", "-t", str(self.switch.pid), "--net", "ip", "link", "add", port]
            + ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.switch.run("ip", "link", "set", port, "master", "br0", "up")
        host.run("ip", "addr", "add", f"{host.ip}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "route", "add", "default", "dev", "eth0")  # Ray finds out its address by a route to anywhere
        return host

    def cut_off(self, *hosts: Host, bridge: str = "br1") -> float:
        """These hosts hear only each other, and who is on the same bridge. Returns when."""
        for host in hosts:
            self.switch.run("ip", "link", "set", f"p{host.number}", "master", bridge)
        return time.monotonic()

    def heal(self) -> float:
        for host in self.hosts:
            self.switch.run("ip", "link", "set", f"p{host.number}", "master", "br0")
            host.no_rules()
        return time.monotonic()

    def close(self) -> None:
        for place in reversed(self._places):
            place.close()
        with contextlib.suppress(FileNotFoundError):
            self.temp.rmdir()  # what was in it was each host's own
