"""A host says what a bird does without disturbing it: `StackOrder`, for birds of all kinds, in one process."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time

import pytest

from flock_ray.core.wire import StackOrder, encode
from flock_ray.specs import Dot, Life
from tests.support.oneprocess import DOT, Pair


class LightPair(Pair):
    light = True


class Blocker:
    def block(self, gate):
        self.wait_here(gate)

    def wait_here(self, gate):
        GATES[gate].wait(30)

    def fail(self):
        raise ValueError("boom")


class AsyncBlocker:
    async def block(self, gate):
        await self.wait_here(gate)

    async def wait_here(self, gate):
        while not GATES[gate].is_set():
            await asyncio.sleep(0.01)

    async def block_loop(self, gate):
        GATES[gate].wait(30)


GATES: dict[str, threading.Event] = {}


def stack(pair, dot=DOT):
    return pickle.loads(pair.host.control(encode(StackOrder(dot))))


def eventually(look):
    end = time.monotonic() + 20
    while not (found := look()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
    return found


@pytest.fixture
def gate(request):
    name = request.node.name
    GATES[name] = threading.Event()
    yield name
    GATES[name].set()


@pytest.mark.parametrize("kind", [Pair, LightPair], ids=["own", "light"])
@pytest.mark.parametrize("method, cls", [("block", Blocker), ("block", AsyncBlocker), ("block_loop", AsyncBlocker)])
def test_the_stack_of_a_method_that_blocks_or_waits_is_its_own_code_alone(tmp_path, gate, kind, method, cls):
    pair = kind(tmp_path, "unix", cls, is_async=cls is AsyncBlocker)
    try:
        future = pair.future(method, gate)
        (one,) = eventually(lambda: stack(pair).running)
        assert (one.method, one.waiting) == (method, ())
        found = eventually(lambda: [r for r in stack(pair).running if f"in {'wait_here' if method == 'block' else method}" in r.stack])
        assert "flock_ray/runtime" not in found[0].stack and f"in {method}" in found[0].stack
        assert found[0].seconds >= one.seconds > 0
        GATES[gate].set()
        future.result(10)
        eventually(lambda: not stack(pair).running)
        assert stack(pair).queue == 0 and stack(pair).state == "running"
    finally:
        GATES[gate].set()
        pair.close()


@pytest.mark.parametrize("kind", [Pair, LightPair], ids=["own", "light"])
def test_messages_that_wait_for_their_turn_are_counted(tmp_path, gate, kind):
    pair = kind(tmp_path, "unix", Blocker)
    try:
        futures = [pair.future("block", gate) for _ in range(4)]
        eventually(lambda: stack(pair).queue == 3 and stack(pair).running)
        GATES[gate].set()
        [future.result(10) for future in futures]
        eventually(lambda: stack(pair).queue == 0)
        assert pair.host.ran == 4 and pair.host.raised == 0
    finally:
        GATES[gate].set()
        pair.close()


def test_calls_that_an_async_bird_has_no_room_for_are_counted(tmp_path, gate):
    pair = Pair(tmp_path, "unix", AsyncBlocker, is_async=True, slots=2)
    try:
        futures = [pair.future("block", gate) for _ in range(5)]
        eventually(lambda: stack(pair).queue == 3 and len(stack(pair).running) == 2)
        GATES[gate].set()
        [future.result(10) for future in futures]
        assert stack(pair).queue == 0
    finally:
        GATES[gate].set()
        pair.close()


def test_what_raises_is_counted_and_another_bird_is_not_here(tmp_path):
    pair = Pair(tmp_path, "unix", Blocker)
    try:
        with pytest.raises(ValueError, match="boom"):
            pair.call("fail")
        assert (pair.host.ran, pair.host.raised) == (1, 1)
        assert stack(pair, Dot(Life("elsewhere", 1), 1)) is None
    finally:
        pair.close()
