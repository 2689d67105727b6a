"""A process that is forked from a caller or a host: it takes nothing from them, and hides nothing of their end."""

from __future__ import annotations

import os
import socket
import time

import pytest

from flock_ray import errors
from tests.support.oneprocess import Pair


class Sleeper:
    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"

    def count(self, n):
        yield from range(n)

    def add(self, a, b):
        return a + b


def in_a_child(work, *, stays=0.0):
    """What `work` returns, or the name of what it raises, in a forked child; `None` if it says nothing within 10 s."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                said = str(work())
            except BaseException as error:
                said = type(error).__name__
            theirs.sendall(said.encode())
            time.sleep(stays)
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(10)
    try:
        return ours.recv(100).decode(), pid
    except TimeoutError:
        return None, pid
    finally:
        ours.close()


@pytest.fixture(params=["unix", "tcp"])
def pair(request, tmp_path):
    pair = Pair(tmp_path, request.param, Sleeper)
    yield pair
    pair.close()


def test_a_child_takes_no_answer_from_its_parent(pair):
    future = pair.future("sleep", 0.5)
    stream = pair.stream("count", 3)

    def steal():
        with pytest.raises(RuntimeError, match="forked"):
            future.result(5)
        with pytest.raises(RuntimeError, match="forked"):
            next(stream)
        return "refused"

    said, pid = in_a_child(steal)
    assert said == "refused"
    assert future.result(5) == "slept"
    assert list(stream) == [0, 1, 2]
    assert [pair.call("add", n, 1) for n in range(100)] == list(range(1, 101))
    os.waitpid(pid, 0)


def test_a_child_does_not_hide_that_the_host_has_gone(pair):
    assert pair.call("add", 1, 1) == 2
    said, pid = in_a_child(lambda: "up", stays=5.0)
    assert said == "up"
    waiting = pair.future("sleep", 30, timeout=60)
    time.sleep(0.1)
    began = time.monotonic()
    pair.break_connections()
    with pytest.raises(errors.BirdUnavailable):
        waiting.result(10)
    assert time.monotonic() - began < 2
    os.kill(pid, 9)
    os.waitpid(pid, 0)
