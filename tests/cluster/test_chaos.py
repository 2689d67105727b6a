"""`scripts/chaos` for three minutes: every kind of fault, and every promise kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import NEEDS_REDIS

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {"bird", "light_host", "nest", "raylet", "stop_raylet", "join", "gcs"}


@NEEDS_REDIS
@pytest.mark.timeout(900)
def test_three_minutes_of_chaos_break_no_promise():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/chaos.py", "--minutes", "3", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=840)
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    assert "every promise was kept" in done.stdout
    assert set(re.findall(r"^\d\d:\d\d:\d\d (\w+)$", done.stdout, re.MULTILINE)) == FAULTS
