"""The head's control service (GCS) with its state in a real Redis, so that it can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.support.waiting import eventually

NO_REDIS = "there is no redis-server (Debian: apt-get install redis-server)"


def has_redis() -> bool:
    return shutil.which("redis-server") is not None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A Redis that keeps nothing on disk; yields `host:port`. Ray takes it from `RAY_REDIS_ADDRESS` when a head starts."""
    with tempfile.TemporaryDirectory(prefix="flock_ray_redis_") as folder:
        port = free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder) as process:
            try:
                eventually(lambda: process.poll() is not None or _answers(port), "Redis listens")
                assert process.poll() is None, "Redis has ended"
                yield f"127.0.0.1:{port}"
            finally:
                process.kill()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


class Head:
    """The GCS of a `ray.cluster_utils.Cluster`, whose port is fixed (`gcs_server_port`): everything reconnects to the address it knows."""

    def __init__(self, cluster: Any) -> None:
        self._node = cluster.head_node

    @property
    def is_up(self) -> bool:
        return "gcs_server" in self._node.all_processes

    def kill(self) -> None:
        (gcs,) = self._node.all_processes["gcs_server"]
        os.kill(gcs.process.pid, signal.SIGKILL)
        gcs.process.wait(10)
        self._node.kill_gcs_server(check_alive=False)  # it notes that there is none

    def restart(self) -> None:
        self._node.start_gcs_server()
