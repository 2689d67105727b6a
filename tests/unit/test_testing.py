"""`flock_ray.testing`: birds in one process and in virtual time, with the real API, core and birds' code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import flock_ray
from flock_ray.api.coroutines import AioFlock
from flock_ray.runtime import client
from flock_ray.testing import Flock


class Counter:
    def __init__(self, start=0):
        self.n = start

    def inc(self, k=1):
        self.n += k
        return self.n

    def node(self):
        return flock_ray.me().node_id

    def fail(self):
        raise ValueError("no")

    def items(self, upto):
        yield from range(upto)

    def leave(self, reason="normal"):
        flock_ray.leave(reason, reply="bye")

    def sleepless(self):
        raise SystemExit("out")


class Mover(Counter):
    stopped: list = []

    def hand_over(self):
        return self.n

    def take_over(self, n):
        self.n = n

    def on_stop(self, reason):
        self.stopped.append((flock_ray.me().name, reason))


class Caller:
    def ask(self, name, method, *args):
        return flock_ray.call(name, method, *args)

    def start(self, name):
        return flock_ray.start(name, Counter).inc()

    def ask_twice(self, name):
        first, second = (flock_ray.bird(name).inc.future() for _ in range(2))
        return first.result(), second.result()


class Async:
    def __init__(self):
        self.seen = []

    async def ask(self, name, method, *args):
        return await flock_ray.aio.call(name, method, *args)

    async def nap(self, seconds):
        await asyncio.sleep(seconds)
        self.seen.append(seconds)
        return seconds

    async def together(self, *seconds):
        return await asyncio.gather(*(self.nap(each) for each in seconds))

    async def letters(self, text):
        for letter in text:
            await asyncio.sleep(1)
            yield letter

    async def look(self):
        return self.seen

    async def wrong(self, name):
        return flock_ray.call(name, "inc")

    async def wrong_start(self):
        flock_ray.start("other", Counter)

    async def in_thread(self, name):
        return await asyncio.to_thread(flock_ray.call, name, "inc")

    async def connect(self):
        await asyncio.open_connection("localhost", 1)


class Clock:
    def __init__(self):
        self.ticks, self.told = 0, []
        flock_ray.send_every(1.0, "tick")

    def tick(self):
        self.ticks += 1

    def later(self, seconds, what):
        self.timer = flock_ray.send_after(seconds, self.tell, what)

    def tell(self, what):
        self.told.append(what)

    def cancel(self):
        self.timer.cancel()

    def seen(self):
        return self.ticks, self.told


def wait_until(flock, condition, seconds=60.0):
    until = flock.now + seconds
    while not condition():
        assert flock.now < until, f"not so within {seconds:g} s of virtual time"
        flock.advance(0.1)


# What a user does


def test_a_bird_is_started_called_and_crashed(flock):
    flock.start("a", Counter)
    assert flock.call("a", "inc") == 1
    assert flock_ray.call("a", Counter.inc, 4) == 5
    flock.crash("a")
    assert flock.call("a", "inc") == 1
    info = flock.info("a")
    assert (info.state, info.restarts, info.incarnation, info.node_id in flock.nodes) == ("running", 1, 2, True)
    assert "killed by the test" in info.last_error


def test_all_ways_to_call(flock):
    bird = flock_ray.start("a", Counter, 10)
    assert bird.inc() == 11
    bird.inc.cast()
    assert bird.inc.future().result() == 13
    assert bird.inc.options(timeout=5, retry=True)(7) == 20
    assert asyncio.run(bird.inc.aio()) == 21
    assert list(bird.items.stream(40)) == list(range(40))
    assert flock.call_many([("a", "inc"), ("a", "inc", (2,))]) == [22, 24]
    flock.cast_many([("a", "inc")])
    assert flock.ask_all("inc", 0) == {"a": 25}
    assert flock.birds(of=Counter, state="running")[0].name == "a"
    assert flock.count() == 1
    assert len(flock.nests()) == 3
    assert flock.alive("a")
    flock.stop(bird)
    flock.wait("a", "gone")
    assert not flock.alive("a")
    with pytest.raises(flock_ray.BirdNotFound):
        flock.call("a", "inc")


def test_errors_are_those_of_the_real_flock(flock):
    flock.start("a", Counter)
    with pytest.raises(ValueError, match="no") as raised:
        flock.call("a", "fail")
    assert isinstance(raised.value.__cause__, flock_ray.RemoteError)
    with pytest.raises(flock_ray.BirdExists):
        flock.start("a", Counter)
    with pytest.raises(AttributeError, match="did you mean 'inc'"):
        flock.call("a", "ink")
    with pytest.raises(TypeError, match="generator"):
        flock.call("a", "items", 3)
    with pytest.raises(flock_ray.BirdNotFound):
        flock.where("nobody")
    with pytest.raises(TypeError):
        flock.start(True, Counter)
    with pytest.raises(TypeError, match="lightt"):
        flock.options(lightt=True)


def test_timers_run_in_virtual_time(flock):
    began = time.monotonic()
    clock = flock.start("c", Clock)
    clock.later(3600.5, "an hour later")
    flock.advance(3600)
    ticks, told = clock.seen()
    assert ticks in (3599, 3600)
    assert told == []
    flock.advance(1)
    assert clock.seen()[1] == ["an hour later"]
    clock.later(5, "never")
    clock.cancel()
    flock.advance(10)
    assert clock.seen()[1] == ["an hour later"]
    assert time.monotonic() - began < 60


def test_a_timer_dies_with_its_life(flock):
    clock = flock.start("c", Clock)
    clock.later(5, "of the life before")
    flock.crash(clock)
    flock.advance(20)
    assert clock.seen()[1] == []
    assert clock.seen()[0] > 0


def test_restarts_back_off_and_end_in_failure(flock):
    flock.options(max_restarts=3).start("a", Counter)
    pauses = []
    for _ in range(3):
        flock.wait("a")
        flock.crash("a")
        began = flock.now
        flock.wait("a")
        pauses.append(flock.now - began)
    assert 0.04 < pauses[0] < 0.2 < pauses[2] < 0.6
    flock.crash("a")
    with pytest.raises(flock_ray.BirdCrashed):
        flock.call("a", "inc")
    assert flock.info("a").state == "failed"
    flock.restart("a")
    assert flock.call("a", "inc") == 1


def test_on_error_crash_and_leave(flock):
    bird = flock.options(on_error="crash").start("a", Counter)
    bird.inc()
    with pytest.raises(ValueError, match="no"):
        bird.fail()
    assert bird.inc() == 1
    with pytest.raises(flock_ray.RemoteError, match="SystemExit"):
        bird.sleepless()
    assert bird.inc() == 1
    assert bird.leave("no more of this") == "bye"
    flock.advance(1)
    assert "no more of this" in flock.info("a").last_error
    assert bird.leave() == "bye"
    flock.wait("a", "gone")


def test_a_move_hands_over(flock):
    Mover.stopped.clear()
    bird = flock.start("m", Mover, 5)
    for _ in range(3):
        bird.inc()
        there = next(node for node in flock.nodes if node != flock.where(bird))
        flock.move(bird, to=there)
        assert flock.where(bird) == there == bird.node()
    assert bird.inc() == 9
    assert Mover.stopped == [("m", "moved")] * 3
    flock.stop(bird)
    flock.wait(bird, "gone")
    assert Mover.stopped[3:] == [("m", "stopped")]


def test_a_node_that_dies_loses_its_birds_to_the_others(flock):
    birds = flock.options(light=True).start_many([(n, Counter) for n in range(30)])
    flock.wait(birds)
    assert {flock.where(bird) for bird in birds} == set(flock.nodes)
    dead = next(node for node in flock.nodes if flock.where(birds[0]) == node)
    flock.kill_node(dead)
    assert flock.call_many([(n, "inc") for n in range(30)]) == [1] * 30
    assert {flock.where(bird) for bird in birds} == set(flock.nodes)
    assert dead not in flock.nodes
    new = flock.add_node()
    wait_until(flock, lambda: any(flock.where(bird) == new for bird in birds))
    assert len(flock.nests()) == 3


def test_both_sides_of_a_split_have_the_bird_and_one_is_left(flock):
    one, two, three = flock.nodes
    bird = flock.start("m", Mover)
    flock.move(bird, to=three)
    flock.advance(1)
    flock.split([one, two], [three])
    wait_until(flock, lambda: len(flock.lives("m")) == 2)
    with flock.on(three):
        assert flock.call("m", "inc", 10) == 10
        assert flock.where("m") == three
    assert flock.call("m", "inc") == 1
    assert flock.where("m") != three
    flock.heal()
    wait_until(flock, lambda: len(flock.lives("m")) == 1)
    assert flock.call("m", "node") == flock.where("m")


def test_a_moved_bird_is_found_again_when_its_node_dies(flock):
    """Its name left the core's table then, and nobody looked at it; and nests that had not heard of the bird asked each other for ever."""
    one, two, three = flock.nodes
    bird = flock.start("m", Mover)
    for node in (two, three):
        flock.move(bird, to=node)
    flock.stop(bird)
    flock.wait(bird, "gone")
    flock.start("m", Mover)
    assert flock.call("m", "node") == three
    flock.kill_node(three)
    assert flock.call("m", "node") in (one, two)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_every_bird_runs_once_in_the_end(seed):
    rng = random.Random(seed)
    with Flock(nodes=rng.randint(2, 4), seed=seed) as flock:
        for number in range(50):
            names = range(number)
            try:
                _happen(flock, rng, number, rng.choice(names) if names else 0)
            except (flock_ray.FlockError, AttributeError, ValueError):
                continue  # what is asked for is often impossible
        flock.heal()
        flock.advance(30)
        for bird in flock.birds():
            flock.wait(bird.name)
            assert flock.lives(bird.name) == [(flock.where(bird.name), "running")]
        assert flock.count() > 1


def _happen(flock, rng, number, name):
    nodes = flock.nodes
    rng.shuffle(nodes)
    what = rng.choice(["start", "start", "call", "call", "cast", "crash", "split", "heal", "kill", "add", "move", "advance", "ask", "many"])
    if what == "start" or number < 8:
        flock.options(light=rng.random() < 0.5, max_restarts=50).start(number, rng.choice([Counter, Mover, Caller, Async, Clock]))
    elif what == "call":
        flock.call(name, rng.choice(["inc", "look", "seen"]), timeout=rng.choice([1, 5]))
    elif what == "cast":
        flock.cast(name, "inc")
    elif what == "crash":
        flock.crash(name)
    elif what == "split":
        flock.split(nodes[: rng.randint(0, len(nodes))])
    elif what == "heal":
        flock.heal()
    elif what == "kill":
        flock.kill_node(nodes[0])
    elif what == "add" and len(nodes) < 5:
        flock.add_node()
    elif what == "move" and flock.alive(name) and flock.lives(name):
        flock.heal()
        flock.move(name, to=nodes[0])
    elif what == "ask":
        flock.call(name, "ask", rng.randrange(number), "inc", timeout=5)
    elif what == "many":
        flock.call_many([(n, "inc") for n in range(number)], timeout=2, return_exceptions=True)
    else:
        flock.advance(rng.choice([0, 0.1, 1, 10]))


@pytest.mark.flock(nodes=2, context_horizon=100.0)
def test_a_side_that_was_away_for_too_long_joins_as_new(flock):
    one, two = flock.nodes
    flock.start("a", Counter)
    flock.advance(1)
    flock.split([one], [two])
    flock.advance(80)
    assert len(flock.lives("a")) == 2
    flock.heal()
    flock.advance(30)
    assert sorted(nest.node_id for nest in flock.nests()) == [one, two]
    assert len(flock.lives("a")) == 1
    assert {nest.address[-1] for nest in flock.nests()} == {"1", "2"}, "one of the two has another life"


# Birds among themselves


def test_birds_call_birds(flock):
    flock.start("a", Counter)
    flock.start("caller", Caller)
    flock.start("async", Async)
    assert flock.call("caller", "ask", "a", "inc") == 1
    assert flock.call("async", "ask", "a", "inc") == 2
    assert flock.call("caller", "ask", "async", "ask", "a", "inc") == 3
    assert flock.call("caller", "ask_twice", "a") == (4, 5)
    assert flock.call("caller", "start", "b") == 1
    assert flock.call("async", "in_thread", "a") == 6
    with pytest.raises(ValueError, match="no"):
        flock.call("caller", "ask", "a", "fail")


def test_a_cycle_is_refused(flock):
    flock.start("x", Caller)
    flock.start("y", Caller)
    with pytest.raises(flock_ray.CallCycle, match="'x' -> 'y' -> 'x'"):
        flock.call("x", "ask", "y", "ask", "x", "ask", "y")
    flock.start("async", Async)
    flock.start("a", Counter)
    assert flock.call("async", "ask", "x", "ask", "async", "ask", "a", "inc") == 1


def test_two_birds_that_wait_do_not_hold_each_other_up(flock):
    """One waits for a slow bird, another for the first: neither is below the other on one stack."""
    for name in ("x", "y"):
        flock.start(name, Caller)
    flock.start("async", Async)
    first = flock.bird("x").ask.future("async", "nap", 5)
    second = flock.bird("y").ask.future("async", "nap", 1)
    third = flock.bird("y").ask.future("async", "nap", 1)
    assert second.result() == 1
    assert not first.done()
    assert third.result() == 1
    assert first.result() == 5
    assert 5 <= flock.now < 7


def test_async_birds_interleave_in_virtual_time(flock):
    bird = flock.start("a", Async)
    flock.wait(bird)
    began = flock.now
    assert bird.together.options(timeout=None)(300, 100, 200) == [300, 100, 200]
    assert 300 <= flock.now - began < 301
    assert bird.look() == [100, 200, 300]


def test_async_streams(flock):
    bird = flock.start("a", Async)
    assert list(bird.letters.stream("abc")) == ["a", "b", "c"]

    async def read():
        return [letter async for letter in bird.letters.stream("def")]

    assert asyncio.run(read()) == ["d", "e", "f"]
    assert flock.run(read()) == ["d", "e", "f"]


# Processes


class Notes:
    """What is left of birds whose process was killed."""

    log: list = []

    def wait_and_note(self, name, seconds):
        flock_ray.call(name, "nap", seconds)
        self.log.append("went on")

    def note_every(self, seconds):
        flock_ray.send_every(seconds, "note")

    def note(self):
        self.log.append("tick")


class AsyncNotes:
    async def wait_and_note(self, seconds):
        await asyncio.sleep(seconds)
        Notes.log.append("went on")


def test_nothing_of_a_process_that_was_killed_goes_on(flock):
    Notes.log.clear()
    flock.start("slow", Async)
    waits, timed, naps = flock.start("waits", Notes), flock.start("timed", Notes), flock.start("naps", AsyncNotes)
    futures = [waits.wait_and_note.future("slow", 10), naps.wait_and_note.future(10)]
    timed.note_every(1)
    flock.advance(5.5)
    ticks = len(Notes.log)
    assert 4 <= ticks <= 6
    for bird in (waits, timed, naps):
        flock.crash(bird)
    for future in futures:
        with pytest.raises(flock_ray.BirdUnavailable, match="may or may not have run"):
            future.result()
    flock.advance(20)
    assert Notes.log == ["tick"] * ticks


def test_a_call_that_may_run_twice_is_sent_again(flock):
    bird = flock.start("a", Async)
    future = bird.nap.options(retry=True).future(5)
    flock.advance(1)
    flock.crash(bird)
    assert future.result() == 5


def test_light_birds_share_the_fate_of_their_process(flock):
    birds = flock.options(light=True).start_many([(n, Counter) for n in range(9)])
    flock.call_many([(bird, "inc") for bird in birds])
    node = flock.where(birds[0])
    neighbours = [bird for bird in birds[1:] if flock.where(bird) == node]
    assert neighbours
    flock.crash(birds[0])
    flock.wait(birds)
    flock.advance(1)
    assert "killed by the test" in flock.info(birds[0]).last_error
    assert all("the process that it shared ended" in flock.info(bird).last_error for bird in neighbours)
    fresh = {birds[0], *neighbours}
    assert flock.call_many([(bird, "inc") for bird in birds]) == [1 if bird in fresh else 2 for bird in birds]


def test_a_bird_that_does_not_end_is_killed_after_its_stop_timeout(flock):
    flock.start("slow", Async)
    bird = flock.options(stop_timeout=3).start("a", Caller)
    bird.ask.cast("slow", "nap", 1000)
    flock.advance(1)
    flock.stop(bird)
    flock.advance(2)
    assert len(flock.lives("a")) == 1
    flock.advance(2)
    assert flock.lives("a") == []


class Born:
    def __init__(self):
        flock_ray.call("slow", "nap", 1000, timeout=None)


def test_a_start_timeout_counts_as_a_crash(flock):
    flock.start("slow", Async)
    flock.options(start_timeout=2, max_restarts=1).start("a", Born)
    with pytest.raises(flock_ray.BirdCrashed, match="start_timeout=2"):
        flock.wait("a")


def test_several_methods_run_at_a_time_with_max_concurrency(flock):
    flock.start("slow", Async)
    bird = flock.options(max_concurrency=2).start("a", Caller)
    flock.wait([bird, "slow"])
    began = flock.now
    assert [future.result() for future in [bird.ask.future("slow", "nap", 5) for _ in range(4)]] == [5] * 4
    assert 10 <= flock.now - began < 10.5
    flock.stop(bird)
    flock.wait(bird, "gone")


@pytest.mark.flock(mailbox=3, send_window=5)
@pytest.mark.parametrize("kind", [Caller, Async])
def test_mailboxes_are_bounded(flock, kind):
    flock.start("slow", Async)
    bird = flock.start("a", kind)
    flock.wait([bird, "slow"])
    for _ in range(5):
        bird.ask.cast("slow", "nap", 50)
    with pytest.raises(flock_ray.MailboxFull):
        bird.ask.cast("slow", "nap", 50)
    if kind is Caller:
        with pytest.raises(flock_ray.MailboxFull, match="was full for 5 s"):
            bird.ask.options(timeout=5)("slow", "nap", 1)


def test_a_call_times_out_in_virtual_time(flock):
    bird = flock.start("a", Async)
    flock.wait(bird)
    with pytest.raises(flock_ray.CallTimeout):
        bird.nap.options(timeout=600)(601)
    assert 600 <= flock.now < 602
    with pytest.raises(flock_ray.CallTimeout):
        bird.nap(31)
    with pytest.raises(TimeoutError):
        bird.nap.future(20).result(timeout=10)


def test_placement_by_resources(flock):
    bird = flock.options(num_gpus=1).start("g", Counter)
    flock.advance(1)
    assert flock.info(bird).state == "pending"
    assert "GPU" in flock.info(bird).reason
    there = flock.add_node(resources={"GPU": 2})
    assert bird.node() == there
    other = flock.add_node(labels={"zone": "a"})
    assert flock.options(label_selector={"zone": "a"}).start("l", Counter).node() == other


# The flock


def test_flocks_do_not_see_each_other(flock):
    other = flock_ray.Flock("other")
    flock.start("a", Counter)
    other.init(call_timeout=3.0)
    other.start("a", Counter, 10)
    assert (flock.call("a", "inc"), other.call("a", "inc")) == (1, 11)
    other.destroy()
    with pytest.raises(flock_ray.FlockNotRunning):
        other.call("a", "inc")
    assert flock.call("a", "inc") == 2


def test_destroy_ends_every_bird_in_good_order(flock):
    Mover.stopped.clear()
    flock.start_many([(n, Mover) for n in range(3)])
    flock.wait([0, 1, 2])
    flock_ray.destroy()
    assert sorted(Mover.stopped) == [(n, "shutdown") for n in range(3)]
    with pytest.raises(flock_ray.FlockNotRunning):
        flock.count()
    flock.start(0, Mover)
    assert flock.call(0, "inc") == 1


def test_settings_are_those_of_init(flock):
    flock_ray.init(call_timeout=2.0)
    with pytest.raises(ValueError, match="runs with call_timeout=2.0"):
        flock_ray.init(call_timeout=3.0)
    with pytest.raises(TypeError, match="call_timeout"):
        flock_ray.init(call_timeouts=3.0)
    flock_ray.shutdown()


def test_without_a_start_there_is_no_flock(flock):
    with pytest.raises(flock_ray.FlockNotRunning):
        flock_ray.call("a", "inc")


def test_handles_are_picklable_and_stay_of_the_flock(flock):
    bird = flock.start("a", Counter)
    flock.start("caller", Caller)
    assert pickle.loads(pickle.dumps(bird)) == bird
    assert flock.call("caller", "ask", bird, "inc") == 1
    assert pickle.loads(pickle.dumps(flock)) == flock_ray.Flock("default")


@pytest.mark.flock(nodes=1)
def test_coroutines_of_the_test_run_in_virtual_time(flock):
    async def main():
        bird = await flock_ray.aio.start("a", Async)
        await flock_ray.aio.wait(bird)
        first, second = await asyncio.gather(bird.nap.aio(10), asyncio.sleep(5, "slept"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await bird.nap.aio(20)
        return first, second

    assert flock.run(main()) == (10, "slept")
    assert 13 <= flock.now < 14
    flock.run(asyncio.sleep(100_000))
    assert flock.now > 100_000


def test_a_loop_of_the_tests_own_waits_in_virtual_time(flock):
    async def main():
        birds = [await flock_ray.aio.start(n, Async) for n in range(3)]
        await flock_ray.aio.wait(birds)
        began = flock.now
        naps = await asyncio.gather(*(bird.nap.aio(10) for bird in birds))
        wrapped = await asyncio.wrap_future(birds[0].nap.future(1))
        many = await flock_ray.aio.call_many([(bird, "look") for bird in birds])
        return naps, wrapped, many, flock.now - began

    naps, wrapped, many, took = asyncio.run(main())
    assert (naps, wrapped, many) == ([10, 10, 10], 1, [[10, 1], [10], [10]])
    assert 11 <= took < 11.5


def test_a_batch_in_a_coroutine_of_a_bird(flock):
    flock.start_many([(n, Counter) for n in range(3)])

    class Batcher:
        async def all(self):
            return await flock_ray.aio.call_many([(n, "inc") for n in range(3)])

    assert flock.start("b", Batcher).all() == [1, 1, 1]


# What it cannot do


@pytest.mark.flock(nodes=1)
def test_what_it_does_not_have_says_so(flock):
    flock.start("a", Counter)
    bird = flock.start("async", Async)
    with pytest.raises(RuntimeError, match=r"await flock_ray\.aio"):
        bird.wrong("a")
    with pytest.raises(RuntimeError, match=r"await its namesake in flock_ray\.aio"):
        bird.wrong_start()
    with pytest.raises(RuntimeError, match="no sockets"):
        bird.connect()
    with pytest.raises(RuntimeError, match="real time"):
        concurrent.futures.wait([bird.nap.future(1)])
    raised = []

    def elsewhere():
        try:
            flock.call("a", "inc")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "one thread run at a time" in raised[0]
    with pytest.raises(RuntimeError, match="does not come"):
        bird.nap.options(timeout=None)(100_000)


def test_wrong_orders_say_what_is_wrong(flock):
    flock.start("a", Counter)
    flock.options(moves=False).start("fixed", Counter)
    one, two, three = flock.nodes
    for wrong, match in [
        (lambda: flock.kill_node("nowhere"), "no node 'nowhere'"),
        (lambda: flock.split([one], [one]), "two groups"),
        (lambda: flock.split(one, two), "a list of node ids"),
        (lambda: flock.move("fixed", to=one), "moves=False"),
        (lambda: flock.advance(-1), "at least 0"),
        (lambda: Flock(nodes=0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            wrong()
    with pytest.raises(flock_ray.BirdNotFound, match="no life"):
        flock.crash("nobody")
    with pytest.raises(flock_ray.BirdNotFound):
        flock.move("nobody", to=one)
    flock.kill_node(one)
    flock.kill_node(two)
    with pytest.raises(ValueError, match="the last one"):
        flock.kill_node(three)
    with pytest.raises(RuntimeError, match="is not open"):
        Flock().advance(1)
    with pytest.raises(RuntimeError, match="another flock"), Flock():
        pass


# The API


def test_its_functions_have_the_signatures_of_the_real_ones(flock):
    for real in (flock_ray.Flock, type(flock_ray.options())):
        for name, function in inspect.getmembers(real, callable):
            if not name.startswith("_"):
                mine = getattr(Flock, name) if real is flock_ray.Flock else getattr(type(flock.options()), name)
                assert inspect.signature(mine) == inspect.signature(function), name
    assert type(flock.aio) is AioFlock
    functions = {name for name in flock_ray.__all__ if inspect.isroutine(getattr(flock_ray, name))}
    inside = {"defaults", "me", "send_after", "send_every", "leave"}
    assert {name for name in functions - inside if not hasattr(flock, name)} == set()


def test_after_it_all_is_as_before():
    before, threads = client._process, threading.active_count()
    with Flock() as flock:
        flock.start("slow", Async)
        flock.start("a", Caller).ask.cast("slow", "nap", 100)
        flock.advance(1)
        assert client._process is not before
    assert client._process is before
    assert threading.active_count() == threads
    with pytest.raises(flock_ray.FlockNotRunning, match="Ray is not initialised"):
        flock_ray.call("a", "inc")


def test_what_outlives_its_flock_does_no_harm():
    with Flock(nodes=1) as flock:
        stream = flock.start("a", Counter).items.stream(100)
        assert next(stream) == 0
        future = flock.start("slow", Async).nap.future(5)
    del stream
    gc.collect()
    with pytest.raises(RuntimeError):
        future.result()
    with pytest.raises(RuntimeError, match="is not open"):
        flock.advance(1)


def test_a_test_that_is_interrupted_leaves_nothing_behind():
    """As by Ctrl-C, or by a time limit for tests."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    threads = threading.active_count()
    try:
        with pytest.raises(KeyboardInterrupt), Flock() as flock:
            flock.start("a", Clock)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            flock.advance(1e9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert threading.active_count() <= threads + 1  # a strand may wait for a turn that does not come
    with Flock() as flock:
        assert flock.start("a", Counter).inc() == 1


SCENARIO = """
import flock_ray, sys
from flock_ray.testing import Flock
class Bird:
    def __init__(self): print("born", flock_ray.me())
    def on_stop(self, reason): print("stops", flock_ray.me(), reason)
    def hand_over(self): return 1
    def take_over(self, state): print("takes over", flock_ray.me())
with Flock(nodes=3, seed=int(sys.argv[1])) as flock:
    flock.options(light=True).start_many([(f"bird {n}", Bird) for n in range(20)])
    flock.advance(2)
    one, two, three = flock.nodes
    flock.split([one, two], [three])
    flock.advance(5)
    flock.heal()
    flock.advance(5)
    flock.kill_node(two)
    flock.add_node()
    flock.advance(10)
    print(flock.now, [(bird.name, bird.node_id, bird.incarnation) for bird in flock.birds()])
"""


def test_the_same_seed_gives_the_same_run_in_every_process():
    def story(seed, hash_seed):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", SCENARIO, seed], capture_output=True, text=True, check=True, env=env, timeout=100)
        return done.stdout

    first = story("1", "1")
    assert "takes over" in first
    assert len(first.splitlines()) > 40
    assert story("1", "2") == first
    assert story("2", "1") != first


def test_the_plugin_loads_nothing_before_a_test_asks_for_it():
    code = "import sys, flock_ray.pytest_plugin; print([name for name in sys.modules if name.split('.')[0] == 'ray' or 'testing' in name])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "ray" not in [name.split(".")[0] for name in eval(loaded)]
    assert not [name for name in eval(loaded) if name.startswith("flock_ray.")]


def test_what_a_bird_does_is_not_said_wherever_it_is(flock):
    for number in range(4):
        flock.start(number, Counter)
        flock.wait(number)
        with pytest.raises(flock_ray.BirdUnavailable, match="a debugger shows them"):
            flock.stack(number)
