"""Ray's cluster launcher runs what scripts/cluster-local.yaml says, and of scripts/launcher-demo nothing is left, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.launcher_demo import CLUSTER, missing
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
WHOLE = 900  # seconds, on a machine that has other things to do


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The demo as its script starts it; its own temp folder is to be empty in the end."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200"}
    with (tmp_path.parent / "said").open("wb") as said:
        command = [sys.executable, "-m", "scripts.launcher_demo", "--birds", "6"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
    assert list(tmp_path.iterdir()) == []


def said(tmp_path: Path) -> str:
    return (tmp_path.parent / "said").read_text(errors="replace")


def test_the_launcher_brings_up_a_flock_and_takes_it_down(demo: subprocess.Popen[bytes], tmp_path: Path) -> None:
    status = demo.wait(WHOLE)
    text = said(tmp_path)
    assert status == 0, text[-3000:]
    for command in ("ray up -y", "ray submit", "ray exec", "ray down -y"):
        assert f"{command} {CLUSTER}" in text
    assert "6 birds answered" in text
    assert "Everything was as the ring says." in text
    assert "3 local.cluster.node" in text
    assert "The launcher did what the file says." in text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_ended_in_the_middle(demo: subprocess.Popen[bytes], tmp_path: Path, how: signal.Signals) -> None:
    eventually(lambda: "Setting up head node" in said(tmp_path) or demo.poll() is not None, "ray up is at work", 120)
    assert demo.poll() is None, said(tmp_path)[-3000:]
    started = psutil.Process(demo.pid).children(recursive=True)
    assert any("sshd" in process.name() for process in started)
    demo.send_signal(how)
    assert demo.wait(60) == (-how if how == signal.SIGKILL else 130)
    _, alive = psutil.wait_procs(started, 30)
    assert alive == []
    for left in tmp_path.iterdir():  # where each machine's own was mounted; only one that was killed leaves it, empty
        assert how == signal.SIGKILL
        left.rmdir()
