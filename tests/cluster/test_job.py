"""`ray job submit`, as docs/operations.md has it: a driver on the head, under a runtime_env of its own, through Ray's dashboard."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "ray job submit --address http://head.example:8265 --working-dir scripts -- python on_cluster.py --address auto --nodes 3 --birds 12"
)


@pytest.mark.own_process("it runs a script, which starts its birds itself")
def test_the_demo_runs_as_a_job() -> None:
    assert COMMAND in (ROOT / "docs" / "operations.md").read_text()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0},
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        assert cluster.head_node is not None
        command = COMMAND.replace("head.example:8265", cluster.head_node.address_info["webui_url"])
        assert command != COMMAND
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

        def submitted() -> subprocess.CompletedProcess[str] | None:
            job = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
            return None if "No available agent" in job.stderr + job.stdout else job

        job = eventually(submitted, "the dashboard has heard of the agent on its node", 120)
    finally:
        cluster.shutdown()
    said = job.stdout + job.stderr
    assert job.returncode == 0, said[-3000:]
    assert "12 birds answered" in said
    assert re.search(r"Everything was as the ring says\.", said)
    assert re.search(r"Job '\w+' succeeded", said)
