"""A Ray cluster on this machine whose worker nodes come and go by Ray's own autoscaler: its fake provider starts real raylets.

`ray.cluster_utils.AutoscalingCluster` does the same, but opens a file that Ray's wheel lacks, takes fixed ports, and runs `ray stop`,
which ends every Ray of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
IDLE_MINUTES = 0.1
BOOT = 180.0
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


class Provider(FakeMultiNodeProvider):
    """Its nodes' ids differ at the beginning, as real ones do: the folders of nests that share a machine are named after it."""

    def _next_hex_node_id(self) -> str:
        self._next_node_id += 1
        return f"{self._next_node_id:05d}" + "f" * 51


class Autoscaled:
    """A head without birds' resources, and up to three workers with one `perch` each.

    Args:
        version: of the autoscaler, 1 or 2.
        temp: a short path that is not there yet.
    """

    def __init__(self, version: int, temp: Path) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            self.address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        temp.mkdir()
        config, log = temp / "autoscaling.yaml", temp / "head.log"
        config.write_text(json.dumps(self._config()))
        environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        environment["PYTHONPATH"] = str(ROOT)  # for the provider, which the head imports
        environment |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD} if version == 2 else {}
        options = ["--num-cpus=1", "--include-dashboard=false", "--object-store-memory=80000000", f"--temp-dir={temp}", "--block"]
        port = self.address.rpartition(":")[2]
        start = ["-c", "from ray.scripts.scripts import main; main()", "start", "--head", f"--port={port}"]
        with log.open("w") as said:
            command = [sys.executable, *start, f"--autoscaling-config={config}", *options]
            self._head = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            eventually(lambda: "Ray runtime started" in log.read_text() or self._head.poll() is not None, "the head has started", BOOT)
            assert self._head.poll() is None, log.read_text()[-2000:]
            ray.init(self.address, namespace="test", log_to_driver=False)
        except BaseException:
            self.close()
            raise

    def _config(self) -> dict[str, Any]:
        provider = {
            "type": "external",  # not "fake_multinode", whose defaults the wheel lacks
            "module": f"{__name__}.{Provider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": self.address,
            "head_node_id": HEAD,
            "launch_multiple": True,
        }
        perch = {
            "resources": {"CPU": 1, "perch": 1, "object_store_memory": 80_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 3,
        }
        return {
            "cluster_name": "autoscaled",
            "max_workers": 3,
            "provider": provider,
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "perch": perch,
            },
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_MINUTES,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{each}_commands": [] for each in COMMANDS},
        }

    def workers(self) -> list[str]:
        """The ids of the nodes that the autoscaler has started."""
        return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != HEAD)

    def close(self) -> None:
        ray.shutdown()
        started = [self._head, *psutil.Process(self._head.pid).children(recursive=True)] if self._head.poll() is None else [self._head]
        self._head.terminate()
        _, alive = psutil.wait_procs(started[1:], timeout=20)
        for process in alive:
            process.kill()
        self._head.wait()
