"""Places on one machine with networks, processes and file systems of their own, joined by a switch. Needs root and Linux.

    switch:  br0 ---- p1 ... p4        a split moves some of the ports to br1, or br2
                      |      |
    places:         eth0    eth0       10.77.0.1 ... 10.77.0.4

No namespace here has a name, so none can be left behind: they live as long as the first process of a place, which ends when its stdin is
closed, however this process ends. With it the kernel ends all other processes of the place; its temp folders are a tmpfs of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("unshare", "nsenter", "ip", "nft")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
FIRST = """
import os, signal, subprocess, sys
for folder in sys.argv[1:]:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # it inherits orphans, and waits for none
print("up", flush=True)
os.read(0, 1)
"""


def why_not() -> str:
    """Why no hosts can be made here; empty if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
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
    """The namespaces of one host, or of the switch, and their first process.

    Args:
        folders: where it has a tmpfs of its own.
    """

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

    def run(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(self.command(*command), capture_output=True, text=True, check=False, input=stdin)
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


class Switch(Place):
    """What joins the networks of places; ports can be moved from one bridge to another."""

    def __init__(self, *bridges: str) -> None:
        super().__init__()
        for bridge in bridges:
            self.run("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0")
            self.run("ip", "link", "set", bridge, "up")

    def plug(self, place: Place, number: int) -> None:
        """Gives a place the address 10.77.0.`number`, on br0."""
        port = f"p{number}"
        # The switch has this machine's processes in its /proc no more: its own network is entered only.
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "--net", "ip", "link", "add", port]
            + ["type", "veth", "peer", "name", "eth0", "netns", str(place.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.move(number, "br0")
        place.run("ip", "addr", "add", f"{address(number)}/24", "dev", "eth0")
        place.run("ip", "link", "set", "eth0", "up")
        place.run("ip", "route", "add", "default", "dev", "eth0")  # Ray finds out its address by a route to anywhere

    def move(self, number: int, bridge: str) -> None:
        self.run("ip", "link", "set", f"p{number}", "master", bridge, "up")


def address(number: int) -> str:
    return f"10.77.0.{number}"
