"""`scripts/simulate`: schedules by the thousand, for people and long runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from flock_ray.core import barrier
from scripts import simulate
from tests.support.sim import SCHEDULES

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.simulate"]


def test_schedules_are_spread_over_the_mixes_in_proportion():
    assert Counter(turn.mix for turn in simulate.plan(sum(SCHEDULES.values()), None, 0)) == SCHEDULES
    assert {(turn.mix, turn.seed) for turn in simulate.plan(3, "flap", 5)} == {("flap", 5), ("flap", 6), ("flap", 7)}


def test_a_few_schedules_in_two_processes():
    done = subprocess.run([*COMMAND, "--schedules", "12", "--jobs", "2"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 schedules in " in done.stdout and "a second: no violations" in done.stdout


def test_a_violation_is_told_with_how_to_replay_it_and_gives_status_1(monkeypatch, capsys):
    monkeypatch.setattr(barrier.Barrier, "permits", lambda self, name: True)
    assert simulate.main(["--schedules", "5", "--jobs", "1", "--mix", "moves"]) == 1
    told = capsys.readouterr().out
    replay = next(line for line in told.splitlines() if "replay: scripts/simulate " in line)
    assert simulate.main(replay.split("scripts/simulate ")[1].split()) == 1
    assert "VIOLATION Violation: I1" in capsys.readouterr().out


def test_a_core_that_raises_is_a_violation(monkeypatch, capsys):
    def permits(self, name):
        raise KeyError("lost")

    monkeypatch.setattr(barrier.Barrier, "permits", permits)
    assert simulate.main(["--schedules", "1", "--jobs", "1", "--mix", "calls"]) == 1
    assert "KeyError: 'lost'" in capsys.readouterr().out


def test_the_story_of_one_is_printed(capsys):
    assert simulate.main(["--schedules", "1", "--mix", "calls", "--story"]) == 0
    assert "boot n0" in capsys.readouterr().out


def test_ctrl_c_ends_it_and_its_processes():
    process = subprocess.Popen(
        [*COMMAND, "--schedules", "100000", "--jobs", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 60
    try:
        while sum(child.cpu_times().user > 1 for child in parent.children()) < 2:
            assert time.monotonic() < deadline, "its processes do not play"
            time.sleep(0.1)
        children = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Interrupted" in out
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
    finally:
        process.kill()


@pytest.mark.parametrize("bad", [["--schedules", "0"], ["--jobs", "0"], ["--mix", "none"]])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(SystemExit) as left:
        simulate.main(bad)
    assert left.value.code == 2
