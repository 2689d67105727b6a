"""Ray's cluster launcher, for real: `ray up`, `ray submit`, `ray exec` and `ray down` of scripts/cluster-local.yaml, as it is.

Three hosts and a desk, each with a network, processes and temp folders of its own (tests/support/namespaces.py): `ray up` runs `ray stop`,
which ends every Ray that it can see. The hosts have an sshd, rsync and a Python with Ray; flock_ray comes to them by the launcher. There is
no package index where they are, so what flock_ray depends on is there before. Run it by `scripts/launcher-demo`; Ctrl-C cleans up.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tests.support.namespaces import PATH, Place, Switch, address, why_not
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = "scripts/cluster-local.yaml"
HOSTS = (1, 2, 3)
DESK = 9  # where the launcher is run
HOME = "/tmp/home"
NEEDS = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
PROFILE = """
export PATH=$HOME/python/bin:$PATH
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_raylet_start_wait_time_s=150 RAY_agent_register_timeout_ms=150000 RAY_worker_register_timeout_seconds=150  # a slow machine
"""
PIP = """
[global]
disable-pip-version-check = true
[install]
no-index = true
# this is pip's way to say yes
no-build-isolation = false
"""
SSHD = f"""
HostKey {HOME}/.ssh/host
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
console = Console(highlight=False, soft_wrap=True)


class Broken(Exception):
    """What the demo is to show is not so."""


def missing() -> str:
    """Why the demo cannot be run here; empty if it can."""
    packages = {package for tool, package in NEEDS.items() if shutil.which(tool, path=PATH) is None}
    if packages:
        return f"the hosts need {', '.join(sorted(packages))}: apt-get install {' '.join(sorted(packages))}"
    return why_not()


class Machine(Place):
    """A machine with a home, an account `ray`, and a Python of its own that has what this one has, but for flock_ray."""

    def __init__(self, number: int, stage: Path) -> None:
        super().__init__(stage, Path("/dev/shm"), Path("/run"))
        self.address = address(number)
        for needed in {str(ROOT), sys.prefix, sys.base_prefix}:  # what of it lies in /tmp stays to be seen there
            if needed.startswith("/tmp/"):
                seen = stage / Path(needed).relative_to("/tmp")
                self.run("mkdir", "-p", str(seen))
                self.run("mount", "--bind", needed, str(seen))
        self.run("mount", "--rbind", str(stage), "/tmp")
        self.run("mkdir", "-p", "/run/sshd", f"{HOME}/.ssh", f"{HOME}/.config/pip")
        self.run("chmod", "700", f"{HOME}/.ssh")
        self.replace("/etc/passwd", f"ray:x:0:0::{HOME}:/bin/bash\n" + Path("/etc/passwd").read_text())
        self.replace("/etc/shadow", "ray:*:19000:0:99999:7:::\n" + Path("/etc/shadow").read_text())
        self.write(f"{HOME}/.bashrc", PROFILE)
        self.write(f"{HOME}/.bash_profile", ". ~/.bashrc\n")
        self.write(f"{HOME}/.config/pip/pip.conf", PIP)
        self._give_python()

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", f"cat > {path}", stdin=text)

    def replace(self, path: str, text: str) -> None:
        """Puts another file in the place of one of this machine, seen here only."""
        mine = f"/run/{Path(path).name}"
        self.write(mine, text)
        self.run("chmod", "600" if path == "/etc/shadow" else "644", mine)
        self.run("mount", "--bind", mine, path)

    def _give_python(self) -> None:
        python = f"{HOME}/python"
        self.run(sys.executable, "-m", "venv", "--without-pip", python)
        site = sysconfig.get_path("purelib", "venv", {"base": python})
        self.write(f"{site}/this_machine.pth", sysconfig.get_path("purelib"))
        self.write(f"{python}/bin/ray", f"#!{python}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
        self.run("chmod", "755", f"{python}/bin/ray")

    def shell(self, script: str) -> list[str]:
        """The command that runs a script as the user `ray` would, in a login shell."""
        clean = ["env", "-i", f"HOME={HOME}", "USER=ray", "LANG=C.UTF-8", f"PATH={PATH}", "bash", "--login", "-c"]
        return self.command(*clean, f"cd {ROOT} && {script}")

    def rays(self) -> list[str]:
        """The processes of Ray that run here."""
        lines = self.run("ps", "-eo", "args").splitlines()
        return [line for line in lines if "raylet/raylet" in line or "gcs_server" in line or line.startswith("ray::")]


class Show:
    """The four machines, and the launcher's commands."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._places: list[Place] = []
        self._sshds: list[subprocess.Popen[bytes]] = []
        self._running: subprocess.Popen[str] | None = None

    def open(self) -> None:
        switch = Switch("br0")
        self._places.append(switch)
        machines = []
        for number in (*HOSTS, DESK):
            machine = Machine(number, self._stage)
            self._places.append(machine)
            switch.plug(machine, number)
            machines.append(machine)
        *self.hosts, self.desk = machines
        self.desk.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/.ssh/id_ed25519")
        public = self.desk.run("cat", f"{HOME}/.ssh/id_ed25519.pub")
        for host in self.hosts:
            host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/.ssh/host")
            host.write(f"{HOME}/.ssh/authorized_keys", public)
            host.write("/run/sshd_config", SSHD)
            sshd = host.shell("exec $(command -v sshd) -D -e -f /run/sshd_config")
            self._sshds.append(subprocess.Popen(sshd, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))

    def launcher(self, command: str, deadline: float = 600.0) -> str:
        """Runs a command at the desk, shows what it says, and returns it."""
        console.rule(command)
        began = time.monotonic()
        process = self._running = subprocess.Popen(
            self.desk.shell(f"{command} 2>&1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            console.print(line.rstrip(), markup=False)
            if time.monotonic() - began > deadline:
                raise Broken(f"{command}: still at work after {deadline:g} s")
        if process.wait(60):
            raise Broken(f"{command}: ended with status {process.returncode}")
        console.print(f"took {time.monotonic() - began:.1f} s")
        return "".join(said)

    def close(self) -> None:
        for place in reversed(self._places):
            place.close()
        for process in (*self._sshds, *filter(None, [self._running])):  # nsenter, which ends with what it waits for
            process.wait(10)


@contextlib.contextmanager
def machines() -> Iterator[Show]:
    stage = Path(tempfile.mkdtemp(prefix="flock"))
    show = Show(stage)
    try:
        show.open()
        yield show
    finally:
        show.close()
        stage.rmdir()  # what was in it was each machine's own


def play(show: Show, birds: int) -> None:
    show.launcher(f"RAY_UP_enable_autoscaler_v2=0 ray up -y {CLUSTER}")
    said = show.launcher(f"ray submit {CLUSTER} scripts/on_cluster.py -- --address auto --nodes {len(HOSTS)} --birds {birds}")
    if "Everything was as the ring says." not in said:
        raise Broken("ray submit: the demo did not come to its end")
    said = show.launcher(f'ray exec {CLUSTER} "ray status"')
    if f"{len(HOSTS)} local.cluster.node" not in said:
        raise Broken("ray exec: ray status does not list the nodes")
    show.launcher(f"ray down -y {CLUSTER}")
    head, *workers = show.hosts
    eventually(lambda: not head.rays(), "ray down has ended Ray on the head", 60)
    left = sum(bool(worker.rays()) for worker in workers)
    console.print(f"ray down ended Ray on the head; on {left} of {len(workers)} other machines it runs on, waiting for a head")
    for worker in workers:
        show.launcher(f"ssh -o StrictHostKeyChecking=accept-new ray@{worker.address} 'bash --login -c \"ray stop\"'")
        eventually(lambda worker=worker: not worker.rays(), f"ray stop has ended Ray on {worker.address}", 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--birds", type=int, default=12, help="birds of the demo (at least 2)")
    given = parser.parse_args()
    if reason := missing():
        print(f"The demo cannot be run here: {reason}.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with machines() as show:
            play(show, given.birds)
    except (Broken, AssertionError) as broken:
        console.print(f"The demo failed: {broken}.", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started is ended.")
        return 130
    console.print("The launcher did what the file says.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
