"""Bad input, row by row of the issue's table: the exact exception, and what its message names."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import ray

import flock_ray
from tests.cluster import birds
from tests.support.waiting import eventually


@pytest.mark.parametrize(("bad", "kind"), [(1.5, "float"), (True, "bool"), (("a", ["b"]), "list"), (None, "NoneType")])
def test_a_name_of_a_wrong_type(flyground, bad, kind):
    with pytest.raises(TypeError, match=kind):
        flock_ray.start(bad, birds.Counter)
    with pytest.raises(TypeError, match=kind):
        flock_ray.call(bad, "get")


def test_start_arguments_that_cannot_travel(flyground, name):
    with pytest.raises(TypeError, match="argument 2"):
        flock_ray.start(name, birds.Caller, 1, threading.Lock())
    with pytest.raises((TypeError, ValueError), match="'box'"):
        flock_ray.start(name, birds.Counter, box=ray.put(1))
    with pytest.raises(ValueError, match="ray.put"):
        flock_ray.start(name, birds.Counter, b"x" * 2_000_000)
    assert not flock_ray.alive(name)


def test_call_arguments_and_results_that_cannot_travel(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    with pytest.raises(TypeError, match="argument 1"):
        bird.add(threading.Lock())
    with pytest.raises(TypeError, match="unpicklable"):
        bird.unpicklable()
    with pytest.raises(flock_ray.RemoteError, match="odd_error"):
        bird.odd_error()
    assert bird.add(1) == 1


def test_what_a_method_raises_comes_with_its_own_type_and_remote_traceback(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    with pytest.raises(ValueError, match="pow") as caught:
        bird.boom("pow")
    assert "in boom" in str(caught.value.__cause__)
    assert bird.get() == 0


def test_an_init_that_raises_fails_in_the_end(flyground, name):
    flock_ray.options(max_restarts=1).start(name, birds.Unborn)
    with pytest.raises(flock_ray.BirdCrashed, match="no egg"):
        flock_ray.wait(name, timeout=60)
    with pytest.raises(flock_ray.BirdCrashed, match="no egg"):
        flock_ray.call(name, "anything")
    info = flock_ray.info(name)
    assert info.state == "failed"
    assert "no egg" in info.last_error


def test_an_init_that_never_returns_is_ended_by_stop(flyground, name):
    flock_ray.options(stop_timeout=1.0).start(name, birds.Stuck)
    eventually(lambda: flock_ray.info(name).state == "starting", "it is starting")
    with pytest.raises(flock_ray.CallTimeout):
        flock_ray.call(name, "x", timeout=0.5)
    flock_ray.stop(name)
    flock_ray.wait(name, "gone", timeout=30)


def test_start_timeout_makes_it_a_crash(flyground, name):
    flock_ray.options(start_timeout=1.5, max_restarts=0, stop_timeout=1.0).start(name, birds.Stuck)
    with pytest.raises(flock_ray.BirdCrashed, match="start_timeout"):
        flock_ray.wait(name, timeout=60)


@pytest.mark.parametrize("method", ["nothing", "n", "_private"])
def test_what_is_no_public_method(flyground, name, method):
    flock_ray.start(name, birds.Counter)
    with pytest.raises(AttributeError, match=method):
        flock_ray.call(name, method)


def test_private_attributes_of_a_handle_raise_locally(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    with pytest.raises(AttributeError, match="_x"):
        bird._x


def test_a_bird_that_calls_itself(flyground, name):
    flock_ray.start(name, birds.Caller)
    with pytest.raises(flock_ray.CallCycle, match=name):
        flock_ray.call(name, "call", name, "echo")


def test_a_cycle_of_two(flyground, name):
    flock_ray.start(name, birds.Caller)
    flock_ray.start(name + "/b", birds.Caller)
    began = time.monotonic()
    with pytest.raises(flock_ray.CallCycle, match=name + "/b"):
        flock_ray.call(name, "call", name + "/b", "call", name, "echo")
    assert time.monotonic() - began < 20
    flock_ray.stop(name + "/b")


def test_a_sync_call_in_an_async_method(flyground, name):
    flock_ray.start(name, birds.Async)
    flock_ray.start(name + "/n", birds.Counter, 4)
    with pytest.raises(RuntimeError, match="aio"):
        flock_ray.call(name, "call_sync", name + "/n")
    assert flock_ray.call(name, "call_aio", name + "/n") == 4
    flock_ray.stop(name + "/n")


def test_a_notebooks_main_thread_may_call_beside_its_running_loop(flyground, name):
    flock_ray.start(name, birds.Counter, 4)

    async def cell() -> int:
        return flock_ray.call(name, "get")

    assert asyncio.run(cell()) == 4


def test_a_method_that_never_returns_is_ended_by_stop(flyground, name, tmp_path):
    path = tmp_path / "witness"
    flock_ray.options(stop_timeout=1.0).start(name, birds.Witness, str(path))
    future = flock_ray.bird(name).forever.future()
    flock_ray.start(name + "/other", birds.Counter)
    assert flock_ray.call(name + "/other", "add", 1) == 1
    began = time.monotonic()
    flock_ray.stop(name)
    with pytest.raises(flock_ray.FlockError):
        future.result(30)
    assert time.monotonic() - began < 10
    flock_ray.stop(name + "/other")


def test_init_again_with_other_settings(flyground):
    with pytest.raises(ValueError, match="settle"):
        flock_ray.init(settle=3.5)
    flock_ray.init()


def test_unknown_settings_and_options_are_named(flyground, name):
    with pytest.raises(TypeError, match="setle.*settle"):
        flock_ray.init(setle=1)
    with pytest.raises(TypeError, match="max_restart"):
        flock_ray.options(max_restart=1)
    with pytest.raises(TypeError, match="lifetime"):
        flock_ray.options(lifetime="detached")


@pytest.mark.own_process("it asks for resources")
def test_resources_that_no_node_has(flyground, name):
    flock_ray.options(resources={"unobtainium": 1}).start(name, birds.Counter)
    info = eventually(lambda: flock_ray.info(name), "it is known")
    assert info.state == "pending"
    assert "unobtainium" in info.reason
    with pytest.raises(flock_ray.CallTimeout, match="unobtainium"):
        flock_ray.call(name, "get", timeout=1)


def test_a_timeout_takes_a_call_that_has_not_begun_out_of_the_mailbox(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    assert bird.get() == 0
    slow = bird.sleep.future(2.0)
    with pytest.raises(flock_ray.CallTimeout):
        bird.add.options(timeout=0.3)(1)
    assert slow.result(30) == 2.0
    assert bird.get() == 0


def test_a_name_that_cannot_be_printed_is_a_name(flyground):
    """A lone surrogate is a legal str: its host could not label its output, crashed, and was left behind, once for each attempt."""
    flock_ray.start("\ud800", birds.Counter)
    assert flock_ray.call("\ud800", "add", 1) == 1
    flock_ray.stop("\ud800")


def test_equal_arguments_are_equal_however_they_are_pickled(flyground, name):
    """S5: what is pickled the same need not have the same bytes, so who starts compares."""
    one, other = "host-1", "".join(["host", "-1"])
    flock_ray.start(name, birds.Holder, one, again=one, more={"a": 1, "b": 2})
    again = flock_ray.options(if_exists="ok")
    assert again.start(name, birds.Holder, one, more={"b": 2, "a": 1}, again=other).name == name
    with pytest.raises(flock_ray.BirdExists, match="other arguments"):
        again.start(name, birds.Holder, "host-2", again=one, more={})
    with pytest.raises(flock_ray.BirdExists, match="another class"):
        again.start(name, birds.Counter)
    flock_ray.stop(name)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"num_cpus": 1e-6}, "multiple of 0.0001"),
        ({"label_selector": {"zone": "in("}}, "in\\(a,b\\)"),
        ({"runtime_env": {"working_dir": "."}}, "ray.init"),
    ],
)
def test_options_that_ray_would_refuse_are_refused_here(flyground, name, option, text):
    with pytest.raises(TypeError, match=text):
        flock_ray.options(**option).start(name, birds.Counter)
    assert not flock_ray.alive(name)
