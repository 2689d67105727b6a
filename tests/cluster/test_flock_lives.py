"""Flocks beside each other and one after the other; what their birds take along from who started them (V3, V4)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import ray

import flock_ray
from flock_ray.core.ring import ring_from
from tests.cluster import birds
from tests.cluster.conftest import init_whole
from tests.support.waiting import eventually


def test_two_flocks_do_not_see_each_other(flyground, name):
    other = flock_ray.Flock("other")
    init_whole(other)
    try:
        flock_ray.start(name, birds.Counter, 1)
        other.start(name, birds.Counter, 2)
        assert (flock_ray.call(name, "get"), other.call(name, "get")) == (1, 2)
        flock_ray.stop(name)
        assert other.call(name, "get") == 2
    finally:
        other.destroy()
    with pytest.raises(flock_ray.FlockNotRunning):
        other.call(name, "get")


def test_destroy_ends_every_bird_and_the_next_init_is_a_new_life(flyground, tmp_path):
    path = tmp_path / "witness"
    flock = flock_ray.Flock("short")
    init_whole(flock)
    flock.start("w", birds.Witness, str(path))
    flock.wait("w", timeout=60)
    flock.destroy()
    assert path.read_text().splitlines() == ["init", "on_stop shutdown"]
    flock.init()
    assert flock.count() == 0
    flock.destroy()


def test_a_start_while_destroy_runs_is_refused(flyground, tmp_path):
    flock = flock_ray.Flock("ending")
    init_whole(flock)
    flock.start("slow", birds.SlowToStop, str(tmp_path / "stopping"))
    flock.wait("slow", timeout=60)
    ending = threading.Thread(target=flock.destroy)
    ending.start()
    eventually((tmp_path / "stopping").exists, "the flock is ending")
    with pytest.raises(flock_ray.FlockNotRunning, match="being destroyed"):
        flock_ray.Flock("ending").start("late", birds.Counter)
    ending.join(60)
    assert not ending.is_alive()


def test_nests_come_to_nodes_that_join_later(flyground):
    before = len(flock_ray.nests())
    node = flyground.add()
    try:
        eventually(lambda: len(flock_ray.nests()) == before + 1, "a nest on the new node")
    finally:
        flyground.crash(node)
        eventually(lambda: len(flock_ray.nests()) == before, "it is gone again")


def run_driver(text: str, cwd: str, *arguments: str, **env: str) -> str:
    """A driver of its own, in another folder, as a user has it."""
    path = os.path.join(cwd, "driver.py")
    with open(path, "w") as file:
        file.write(textwrap.dedent(text))
    command = [sys.executable, path, *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SONGS = """
import os
class Song:
    def line(self):
        return os.environ["SONG"]
    def pid(self):
        return os.getpid()
    def where(self):
        import flock_ray
        return flock_ray.me().node_id
"""


def test_birds_outlive_their_driver_and_keep_its_runtime_env_on_nodes_that_never_saw_it(flyground, name, tmp_path):
    """Module and variable are in the driver's runtime_env only. The driver ends, every host that used it is killed, so that Ray would
    delete the package; the cache of this machine is emptied, and a fresh node has to fetch it (V3)."""
    package, run = tmp_path / "package", tmp_path / "run"
    package.mkdir()
    run.mkdir()
    (package / "songs.py").write_text(SONGS)
    run_driver(
        """
        import sys, ray, flock_ray
        ray.init(sys.argv[1], runtime_env={"working_dir": sys.argv[3], "env_vars": {"SONG": "tweet"}}, log_to_driver=False)
        from songs import Song
        for i in range(8):
            flock_ray.start(f"{sys.argv[2]}/{i}", Song)
            assert flock_ray.call(f"{sys.argv[2]}/{i}", "line") == "tweet"
        """,
        str(run),
        flyground.cluster.address,
        name,
        str(package),
        PYTHONPATH=str(package),
        RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S="0",
    )
    names = [f"{name}/{i}" for i in range(8)]
    pids = {own: flock_ray.call(own, "pid") for own in names}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(flock_ray.info(own).restarts == 1 and flock_ray.info(own).state == "running" for own in names), "new lives")
    context = ray.get_runtime_context()
    cached = Path(context.get_temp_dir(), context.get_session_name(), "runtime_resources", "working_dir_files")
    assert list(cached.iterdir())
    for path in cached.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    node, moved = newcomer_that_owns_some(flyground, names)
    try:
        for own in moved:
            eventually(lambda own=own: flock_ray.where(own) == node.node_id and flock_ray.info(own).state == "running", "it has moved")
            assert flock_ray.call(own, "line", timeout=60) == "tweet"
            assert flock_ray.call(own, "where") == node.node_id
    finally:
        for own in names:
            flock_ray.stop(own)
        flyground.crash(node)
        eventually(lambda: len(flock_ray.nests()) == 3, "three nests again")


def newcomer_that_owns_some(flyground, names):
    """A node that joins, and which of the names its ring gives it. By chance that may be none: then another comes."""
    for _ in range(6):
        node = flyground.add()
        nests = eventually(lambda: len(nests := flock_ray.nests()) == 4 and nests, "a fourth nest")
        ring = ring_from(tuple(sorted((nest.node_id, nest.weight) for nest in nests)))
        moved = [own for own in names if ring.owner(own) == node.node_id]
        if moved:
            return node, moved
        flyground.crash(node)
        eventually(lambda: len(flock_ray.nests()) == 3, "the nests are three again")
    raise AssertionError(f"none of six nodes owned one of {names}")


def test_a_class_of_main_outlives_its_driver(flyground, name, tmp_path):
    out = run_driver(
        """
        import sys, ray, flock_ray
        ray.init(sys.argv[1])
        class Mine:
            def hello(self):
                print("I am singing")
                return "hello"
        flock_ray.start(sys.argv[2], Mine)
        assert flock_ray.call(sys.argv[2], "hello") == "hello"
        import time
        time.sleep(1.5)
        """,
        str(tmp_path),
        flyground.cluster.address,
        name,
    )
    assert flock_ray.call(name, "hello") == "hello"
    assert any(f"({name} " in line and "I am singing" in line for line in out.splitlines()), out


def test_before_ray_init_a_call_says_so(tmp_path):
    out = run_driver(
        """
        import flock_ray
        for work in (lambda: flock_ray.call("x", "y"), lambda: flock_ray.start("x", dict), flock_ray.init, flock_ray.nests):
            try:
                work()
            except flock_ray.FlockNotRunning as error:
                print(error)
        import ray
        assert not ray.is_initialized()
        """,
        str(tmp_path),
    )
    assert out.count("ray.init") == 4


def test_without_init_a_call_on_a_fresh_ray_says_so(flyground):
    with pytest.raises(flock_ray.FlockNotRunning, match="init"):
        flock_ray.Flock("never").call("x", "y")
    assert ray.is_initialized()


def test_casts_of_a_short_program_are_sent_at_its_end(flyground, name, tmp_path):
    """The route is not known yet when it ends: to find it takes threads, and those of concurrent.futures are gone by then."""
    flock_ray.start(name, birds.Counter)
    flock_ray.wait(name)
    program = """
    import sys, ray, flock_ray
    ray.init(sys.argv[1], log_to_driver=False)
    for _ in range(100):
        flock_ray.cast(sys.argv[2], "add", 1)
    """
    run_driver(program, str(tmp_path), flyground.cluster.address, name)
    eventually(lambda: flock_ray.call(name, "get") == 100, "all casts")
    flock_ray.stop(name)


def test_a_start_by_another_flocks_handle_is_in_that_flock(flyground, name):
    flock_ray.init("lake")
    lake = flock_ray.Flock("lake")
    try:
        bird = flock_ray.start(lake.bird(name), birds.Counter)
        assert bird.add(1) == 1
        assert lake.alive(name)
        assert not flock_ray.Flock("default").alive(name)
    finally:
        lake.destroy()
        flock_ray.init("default")
