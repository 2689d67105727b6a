"""`flock-ray` as people and scripts run it: a process for each command, on a real cluster, its output a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import flock_ray
from tests.cluster.birds import Async, Counter, Unborn
from tests.cluster.conftest import eventually

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("flock-ray")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "flock_ray.cli"]


class Shell:
    """Runs `flock-ray`."""

    def __init__(self, address: str) -> None:
        self._environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def __call__(self, *words: str, code: int = 0, **environment: str) -> str:
        """What it says on standard output; where it fails, its one sentence on standard error."""
        done = subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=self._environment | environment
        )
        assert done.returncode == code, (words, done)
        if code:
            assert not done.stdout
            assert done.stderr.startswith("flock-ray: ") and done.stderr.count("\n") == 1, done.stderr
            return done.stderr.removeprefix("flock-ray: ").strip()
        assert not done.stderr, "nothing of Ray's"
        return done.stdout

    def json(self, *words: str) -> object:
        return json.loads(self(*words, "--json"))

    def rows(self, *words: str) -> list[list[str]]:
        return [line.split("\t") for line in self(*words).splitlines()]


@pytest.fixture(scope="module")
def shell(flyground):
    return Shell(flyground.cluster.address)


def test_a_bird_is_started_looked_at_called_and_stopped(shell, flyground):
    assert "runs on node" in shell("start", '("room", 7)', "tests.cluster.birds:Counter", "5", "-o", "light=true")
    ((name, state, node, life, restarts, cls, _),) = shell.rows("birds", "--like", '("room"*')
    assert (name, state, life, restarts, cls) == ("""'("room", 7)'""", "running", "1", "0", "Counter")
    assert shell("call", '("room", 7)', "add", "-2").strip() == "3"
    assert shell.json("call", '("room", 7)', "add", "k=10") == {"name": '("room", 7)', "method": "add", "result": 13}
    shell("cast", '("room", 7)', "add", "1")
    assert flock_ray.call(("room", 7), "get") == 14
    info = shell.json("info", '("room", 7)')
    assert (info["state"], info["light"], info["class_name"]) == ("running", True, "tests.cluster.birds.Counter")
    assert info["node_id"].startswith(node)
    told = shell.json("explain", '("room", 7)')
    assert told["owner"] == told["told_by"] == info["node_id"], "the owner was asked, wherever this command has joined"
    assert len(told["candidates"]) == 3 and told["candidates"][0]["holds"] == "running"
    assert "is gone" in shell("stop", '("room", 7)')
    assert not flock_ray.alive(("room", 7))


def test_what_birds_prints_can_be_pasted_into_a_shell(shell, flyground):
    names = ["it's; $HOME `x`\t!", 42, "42", ("a", (b"\x00", -1)), "-x"]
    flock_ray.options(light=True).start_many([(name, Counter) for name in names])
    flock_ray.wait(set(names))
    printed = [row[0] for row in shell.rows("birds") if row[5] == "Counter"]
    assert len(printed) == len(names)
    environment = shell._environment | {"FLOCK_RAY": " ".join(COMMAND)}
    for text in printed[:2] + printed[-1:]:  # the others are read back in tests/unit/test_cli.py
        done = subprocess.run(
            ["bash", "-c", f"$FLOCK_RAY info {text}"], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, check=False
        )
        assert f"name\t{text}\n" in done.stdout, done
    flock_ray.stop_many(names)


def test_a_flock_and_its_nests_are_shown(shell, flyground):
    assert shell.json("status") | {"birds": 0, "states": {}} == {"flock": "default", "nests": 3, "birds": 0, "states": {}}
    rows = shell.rows("nests")
    assert sorted(row[0] for row in rows) == sorted(node["NodeID"][:8] for node in ray.nodes())
    (first, *_) = shell.json("top")["nests"]
    assert first["birds"] >= 0 and first["calls_per_s"] is not None


@pytest.mark.parametrize("kind", ["sync", "async", "light", "light async"])
def test_stack_says_what_a_bird_does_and_what_waits(shell, flyground, kind):
    cls, method = (Async, "nap") if "async" in kind else (Counter, "sleep")
    bird = flock_ray.options(light="light" in kind).start(f"busy {kind}", cls)
    flock_ray.wait(bird, timeout=60)
    flock_ray.cast(bird, method, 600)
    flock_ray.cast(bird, method, 600)
    stack = eventually(lambda: (found := flock_ray.stack(bird)).running and found, "its method is seen")
    assert stack.running[0].method == method
    assert f"in {method}" in stack.running[0].stack and "flock_ray/runtime" not in stack.running[0].stack
    waits = 0 if "async" in kind else 1
    eventually(lambda: flock_ray.stack(bird).queue == waits, "what waits is counted")
    said = shell.json("stack", f"busy {kind}")
    assert said["running"][0]["method"] == method and said["queue"] == waits
    assert said["running"][0]["seconds"] > 0
    flock_ray.options(stop_timeout=0.1)
    flock_ray.stop(bird)


def test_a_pending_and_a_failed_bird_are_explained(shell, flyground):
    flock_ray.options(num_cpus=64).start("too big", Counter)
    eventually(lambda: flock_ray.info("too big").state == "pending", "it fits nowhere")
    text = shell("explain", "too big")
    assert "no node can give that" in text and "CPU 2 of 64" in text
    flock_ray.stop("too big")
    flock_ray.options(light=True, max_restarts=0).start("unborn", Unborn)
    eventually(lambda: flock_ray.info("unborn").state == "failed", "it has failed")
    assert "max_restarts=0" in shell("explain", "unborn")
    assert "no egg" in shell("call", "unborn", "get", code=1)
    assert "RuntimeError: no egg" in shell("info", "unborn")
    rows = shell.rows("events")
    assert ["BirdFailed", "unborn"] in [row[3:5] for row in rows], rows[-20:]
    assert "failed" in shell("stack", "unborn", code=1)
    flock_ray.stop("unborn")


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["info", "nobody"], 1, "knows a bird 'nobody'"),
        (["explain", "nobody"], 1, "knows a bird 'nobody'"),
        (["stack", "nobody"], 1, "knows a bird 'nobody'"),
        (["stop", "nobody"], 1, "knows a bird 'nobody'"),
        (["restart", "nobody"], 1, "knows a bird 'nobody'"),
        (["cast", "nobody", "add"], 1, "knows a bird 'nobody'"),
        (["info", "(7"], 2, "begins as a literal"),
        (["start", "x", "tests.cluster.birds"], 2, "no MODULE:CLASS"),
        (["start", "x", "tests.cluster.nobird:X"], 2, "cannot be imported"),
        (["call", "x", "add", "hello"], 2, """'"hello"'"""),
        (["start", "x", "tests.cluster.birds:Counter", "-o", "wings=2"], 1, "wings"),
        (["init", "spares=-1"], 1, "spares"),
        (["status", "--flock", "nowhere"], 3, "flock-ray init --flock nowhere"),
        (["start", "x", "tests.cluster.birds:Counter", "--flock", "nowhere"], 3, "no flock 'nowhere'"),
        (["status", "--address", "127.0.0.1:1"], 3, "ray start --head"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_sentence(shell, flyground, words, code, said):
    assert said in shell(*words, code=code)
    assert flock_ray.Flock("nowhere") != flock_ray.Flock()


def test_a_method_that_raises_is_said_and_a_reader_that_leaves_is_none_of_our_business(shell, flyground):
    flock_ray.wait(flock_ray.options(light=True).start("raises", Counter), timeout=60)
    assert shell("call", "raises", "boom", '"bang"', code=1) == "the method raised ValueError: bang"
    assert "no method 'fly'" in shell("call", "raises", "fly", code=1)
    piped = subprocess.run(
        f"{' '.join(COMMAND)} events | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=shell._environment,
        check=False,
    )
    assert piped.stdout.count("\n") == 1 and not piped.stderr
    flock_ray.stop("raises")


def test_events_are_followed(shell, flyground):
    process = subprocess.Popen([*COMMAND, "events", "-f", "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=shell._environment)
    try:
        flock_ray.options(light=True).start("followed", Counter)
        told = (json.loads(line) for line in process.stdout)
        assert any(one.get("name") == "followed" and one["kind"] == "BirdRunning" for one in told), "it has ended without telling"
    finally:
        process.kill()
        process.wait()
    flock_ray.stop("followed")
