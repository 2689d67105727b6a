"""Ray as others have it set up: reached by Ray Client, and encrypted. In processes of their own: both are chosen before Ray is loaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address

from tests.cluster.conftest import WIRE
from tests.support import certificates

pytestmark = pytest.mark.skipif(WIRE == "ray", reason="these choose the way of calls themselves, and run once: with sockets")

ROOT = Path(__file__).resolve().parents[2]

BIRD = """
class Counter:
    def __init__(self):
        self.n = 0

    def add(self, k=1):
        self.n += k
        return self.n

    def count(self, n):
        yield from range(n)

    def size(self, thing):
        return len(thing)
"""

USE = (
    BIRD
    + """
bird = flock_ray.start("a", Counter)
assert bird.add(2) == 2
assert [future.result() for future in [bird.add.future(1) for _ in range(20)]] == list(range(3, 23))
for _ in range(20):
    bird.add.cast(1)
assert bird.add(0) == 42
assert list(bird.count.stream(50)) == list(range(50))
assert bird.size(bytes(2_000_000)) == 2_000_000
assert flock_ray.info("a").path == PATH, flock_ray.info("a")
assert flock_ray.count() == 1 and len(flock_ray.nests()) == NODES
flock_ray.stop("a")
flock_ray.wait("a", "gone")
flock_ray.destroy()
print("all is well")
"""
)


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout


def test_a_driver_by_ray_client_takes_rays_path(monkeypatch):
    """It is not on the cluster's network: everything works, by Ray's calls."""
    # Ray's proxy forks a server for each client, and gRPC's handlers of forks may abort the child before it is one (grpc/grpc#43055).
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "ray_client_server_port": port})
    try:
        begin = f"""
import ray, flock_ray
for left in (2, 1, 0):
    try:
        ray.init("ray://127.0.0.1:{port}", runtime_env={{"env_vars": {{"PYTHONPATH": {str(ROOT)!r}}}}}, log_to_driver=False)
        break
    except RuntimeError as error:  # nothing of ours has run there yet
        if not left or "Starting Ray client server failed" not in str(error):
            raise
NODES, PATH = 1, "ray"
flock_ray.init()
"""
        run(begin + USE)
    finally:
        cluster.shutdown()


def test_where_ray_is_encrypted_so_are_calls_between_machines(tmp_path):
    """Two raylets that are reached by TCP only: the Unix sockets of birds are taken away, as they are on another machine."""
    tls = certificates.make(tmp_path / "tls", "127.0.0.1", "localhost", str(get_node_ip_address()))
    program = f"""
import time
from pathlib import Path
import ray, flock_ray
from ray.cluster_utils import Cluster
from flock_ray.runtime import sockets, tls, cluster as of_ray
from flock_ray.runtime.client import client_of

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
cluster.add_node(num_cpus=1)
try:
    ray.init(cluster.address, log_to_driver=False)
    NODES, PATH = 2, "tcp"
    flock_ray.init()
    while len(flock_ray.nests()) < 2:
        time.sleep(0.1)  # between looks
    own = sockets._connect
    sockets._connect = lambda address, folder, context: own(address, folder if "nest" in address else Path("nowhere"), context)
    encrypted = []
    wrap = tls.Encrypted.__init__
    tls.Encrypted.__init__ = lambda self, sock: (encrypted.append(sock.version()), wrap(self, sock))[1]
{USE.replace(chr(10), chr(10) + "    ")}
    assert encrypted
finally:
    ray.shutdown()
    cluster.shutdown()
"""
    run(program, **tls)
