"""What is special about light birds and batches, in one process: a real host of many, a real client, a real socket between them."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from contextlib import contextmanager
from functools import partial

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flock_ray import errors
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.core.wire import HatchOrder, LifeCrashed, LifeEnded, LifeRunning, Orders, encode
from flock_ray.runtime import inside, listener
from flock_ray.runtime.batches import Batch, Caller, Request
from flock_ray.runtime.mailbox import Arrivals
from flock_ray.runtime.recorder import PLACES, Recorded, Recorder, suspects
from flock_ray.specs import Dot, Life, Options, Route, Spec, Stamp
from tests.support.oneprocess import DOT, Pair

FOREVER = float("inf")


def until(true, what, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.002)  # between looks


class Counter:
    """Counts, and can be held up."""

    go = threading.Event()

    def __init__(self, n=0):
        self.n = n

    def add(self, k=1):
        self.n += k
        return self.n

    def hold(self):
        self.go.wait(10)
        return self.n

    def boom(self):
        raise ValueError("boom")

    def long(self):
        return b"x" * 2_000_000

    def who(self):
        return inside.me().name

    def crash(self):
        inside.leave("of its own accord")

    def hand_over(self):
        return self.n


class Noted:
    """Tells that it was made."""

    made: list = []

    def __init__(self):
        self.made.append(1)


class Empty:
    """As light as can be."""


class Friend:
    """Calls others."""

    client = None

    def ask(self, other, method):
        return self.client.call(other, None, method, (), {}, 10.0, False)


class Waiter:
    """Has `async def` methods."""

    async def soon(self, value):
        await asyncio.sleep(0.01)
        return value


class Many(Pair):
    """A host of light birds named by numbers from 0 on."""

    light = True

    def __init__(self, folder, cls=Counter, birds=50, wire="unix", **kwargs):
        super().__init__(folder, wire, cls, **kwargs)
        self.hatch(cls, range(birds))
        self.wire = wire

    def hatch(self, cls, names, born=1, **kwargs):
        is_async = self.hatch_only(cls, names, born, **kwargs)
        wanted = {self.dot(n) for n in names}
        until(lambda: wanted <= {word.dot for word in list(self.nest.words) if isinstance(word, LifeRunning | LifeCrashed)}, "they run")
        for n in names:
            route = Route(n, self.dot(n), born, "node", "light:h", self.host.address, is_async)
            self.world.routes[n] = route
            self.world.hosts["light:h"] = self.link
            self.client.learn(route, self.link)

    def hatch_only(self, cls, names, born=1, start_timeout=None, **kwargs):
        """Has lives begun, and returns."""
        code = cloudpickle.dumps(cls)
        is_async = any(asyncio.iscoroutinefunction(getattr(cls, name)) for name in dir(cls))
        options = Options(light=True, start_timeout=start_timeout)
        brought = '{"async": true}' if is_async else '{"async": false}'
        spec = Spec("m", cls.__qualname__, cls.__qualname__, pickle.dumps(((), kwargs)), options, brought, Stamp(0, 0), "r")
        orders = [HatchOrder("default", n, self.dot(n), born, spec, code, 0, 0, None, False) for n in names]
        for chunk in wire.chunks(orders):
            self.host.control(encode(Orders(chunk)))
        return is_async

    @staticmethod
    def dot(n):
        return Dot(DOT.life, 1000 + n)

    def many(self, requests, timeout=10.0, retry=False, cast=False, caller=None):
        """The outcomes of a batch, with its errors in their places."""
        batch = Batch(
            self.client,
            [Request(name, None, method, tuple(args), {}) for name, method, *args in requests],
            FOREVER if timeout is None else time.monotonic() + timeout,
            retry,
            cast,
            lambda _: None,
            caller,
        )
        return batch.run()

    def frames(self):
        """How many frames have been sent to the host."""
        return self.link._next

    def lives(self):
        return self.host._lives


@pytest.fixture
def many(tmp_path):
    made = Many(tmp_path)
    Counter.go.clear()
    yield made
    Counter.go.set()
    made.close()


# The wire


BODIES = st.binary(max_size=30)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**64 - 1), BODIES)))
def test_calls_come_out_as_they_went_in(calls):
    head = wire.CallMany("c", (DOT.life,) * 4, ("a", "b", "c", "d"))
    shared = [(life, method, counter, calls[0][3]) for life, method, counter, _ in calls]
    for rows in (calls, shared):
        read, _, body = wire.decode_call(wire.encode_calls(head, rows))
        assert read == head
        assert [(*row[:3], bytes(row[3])) for row in wire.decode_calls(body)] == rows


def test_arguments_shared_by_calls_travel_once():
    head = wire.CallMany("c", (DOT.life,), ("a",))
    body = b"x" * 1000
    assert len(wire.encode_calls(head, [(0, 0, n, body) for n in range(100)])) < 3_000


def test_calls_that_are_cut_short_are_refused():
    head = wire.CallMany("c", (), ())
    _, _, whole = wire.decode_call(wire.encode_calls(head, [(0, 0, 1, b"abc"), (0, 0, 2, b"defg")]))
    assert len(list(wire.decode_calls(whole))) == 2
    for length in range(len(whole)):
        with pytest.raises((ValueError, struct.error)):
            list(wire.decode_calls(whole[:length]))


@given(st.binary(max_size=60))
def test_whatever_comes_is_read_or_refused(body):
    try:
        calls = list(wire.decode_calls(memoryview(body)))
    except (ValueError, struct.error):
        return
    assert sum(len(arguments) for *_, arguments in calls) <= len(body) * max(1, len(calls))


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.one_of(BODIES.map(lambda body: wire.RESULT + body), BODIES))))
def test_answers_come_out_as_they_went_in(answers):
    message = wire.encode_answers(answers)
    assert wire.count_items(message) == len(answers)
    read = [(place, (wire.RESULT if plain else b"") + bytes(body)) for place, body, plain in wire.decode_answers(message)]
    assert read == answers


def test_orders_to_hatch_are_sent_in_parts():
    spec = Spec("m", "C", "d", b"x" * 300_000, Options(), None, Stamp(0, 0), "r")
    order = HatchOrder("default", "a", DOT, 1, spec, b"", 0, 0, None, False)
    assert [len(chunk) for chunk in wire.chunks([order] * 7)] == [3, 3, 1]
    small = order._replace(spec=spec._replace(args=b""))
    assert [len(chunk) for chunk in wire.chunks([small] * 1200)] == [500, 500, 200]
    assert list(wire.chunks([])) == []
    large = small._replace(code=b"c" * 600_000, spec=spec._replace(args=b"x" * 250_000))
    assert [len(chunk) for chunk in wire.chunks([large] * 4)] == [1, 1, 1, 1], "each part has the code"
    other = small._replace(code=b"d" * 600_000)
    assert [len(chunk) for chunk in wire.chunks([other, other, large])] == [2, 1]


# Arrivals


@given(st.permutations(range(8)))
def test_whatever_order_messages_come_in_they_line_up_in_their_callers(order):
    arrivals, mine, others = Arrivals(), [], []
    for place, number in enumerate(order):
        mine += arrivals.come("c", number, number)
        others += arrivals.come("another", place, place)
    assert mine == others == list(range(8))
    assert not arrivals._early


def test_what_does_not_come_is_given_up():
    arrivals = Arrivals()
    assert arrivals.come("c", 0, "0") == ("0",)
    assert arrivals.come("c", 2, "2") == () == arrivals.come("c", 3, "3")
    assert arrivals.give_up("c", 7) == ()
    assert list(arrivals.give_up("c", 2)) == ["2", "3"]
    assert arrivals.give_up("c", 3) == ()
    assert arrivals.come("c", 1, "late") == ("late",)
    assert arrivals.come("c", 4, "4") == ("4",)


# Who is to blame


def test_what_ran_when_a_process_was_killed_is_on_record(tmp_path):
    script = f"""
        import os, signal, threading
        from flock_ray.runtime.recorder import Recorder
        from flock_ray.specs import Dot, Life
        recorder = Recorder({str(tmp_path)!r}, os.getpid())
        life = Life("node", 77)
        recorder.note(Dot(life, 1))
        recorder.clear()
        there = threading.Event()
        threading.Thread(target=lambda: (recorder.note(Dot(life, 2)), there.set(), threading.Event().wait()), daemon=True).start()
        there.wait()
        recorder.note(Dot(life, 3))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    assert process.wait() == -9
    assert suspects(tmp_path, process.pid) == {(2, 77), (3, 77)}


def test_where_there_is_no_record_nobody_is_to_blame(tmp_path):
    assert suspects(tmp_path, 1) == frozenset()


def test_a_coroutine_is_on_record_while_it_runs_and_not_while_it_waits(tmp_path):
    recorder = Recorder(tmp_path, 5)
    seen = []

    async def work():
        seen.append(suspects(tmp_path, 5))
        await asyncio.sleep(0.01)
        seen.append(suspects(tmp_path, 5))
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main():
        task = asyncio.ensure_future(wrapped())
        await asyncio.sleep(0.001)
        seen.append(suspects(tmp_path, 5))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def wrapped():
        return await Recorded(recorder, Dot(Life("n", 9), 4), work())

    asyncio.run(main())
    assert seen == [{(4, 9)}, frozenset(), {(4, 9)}, "cancelled"]


# Many in one process


def test_each_knows_who_it_is_and_they_share_a_class_and_nothing_else(many):
    assert many.many([(n, "who") for n in range(50)]) == list(range(50))
    assert many.many([(n, "add", n) for n in range(50)]) == list(range(50))
    assert len({type(life.bird) for life in many.lives().values()}) == 1


def test_a_bird_that_blocks_holds_up_nobody(many):
    holding = [many.client.future(n, None, "hold", (), {}, 10.0, False) for n in range(8)]
    for n in range(8, 50):
        assert many.client.call(n, None, "add", (), {}, 1.0, False) == 1
    waits = many.client.future(3, None, "add", (), {}, 10.0, False)
    assert many.many([(n, "add") for n in range(8, 50)]) == [2] * 42
    assert not waits.done()
    Counter.go.set()
    assert [one.result(5) for one in holding] == [0] * 8
    assert waits.result(5) == 1


def test_more_birds_wait_for_others_than_there_are_threads(tmp_path):
    made = Many(tmp_path, Friend, birds=40, threads=1)
    try:
        assert made.host.boot.threads == 1
        made.hatch(Counter, [90])
        Friend.client = made.client
        made.host._classes["Friend"].cls.client = made.client
        asked = [made.client.future(n, None, "ask", (90, "add"), {}, 10.0, False) for n in range(40)]
        assert sorted(one.result(10) for one in asked) == list(range(1, 41))
    finally:
        made.close()


def test_a_life_that_crashes_or_is_stopped_leaves_its_neighbours_alone(many):
    with pytest.raises(errors.FlockError):
        many.client.call(3, None, "crash", (), {}, 1.0, False)
        many.client.call(3, None, "add", (), {}, 0.3, False)
    until(lambda: any(isinstance(word, LifeCrashed) and word.dot == many.dot(3) for word in list(many.nest.words)), "the nest hears of it")
    many.host.control(encode(wire.EndOrder(many.dot(4), 1, "moved", True, 5.0)))
    until(lambda: any(isinstance(word, LifeEnded) and word.handed_over for word in list(many.nest.words)), "it hands over")
    assert many.dot(3) not in many.lives()
    assert many.lives()[many.dot(4)].has_record
    assert many.many([(5, "add")]) == [1]
    assert many.codes == []
    many.hatch(Counter, [4], born=2)  # back, while what it handed over is kept
    assert [life.dot for life in many.host._kept.values()] == [many.dot(4)]
    many.host.control(encode(wire.ForgetOrder(many.dot(4))))
    assert not many.host._kept
    assert many.many([(4, "add")]) == [1]


def test_all_end_at_once_and_an_empty_host_leaves(many):
    many.host.control(encode(wire.EndAllOrder("shutdown", 5.0)))
    until(lambda: not many.lives(), "they have ended")
    until(lambda: sum(isinstance(word, LifeEnded) for word in list(many.nest.words)) == 51, "the nest hears of all")
    many.host.control(encode(wire.LeaveOrder()))
    until(lambda: many.codes == [0], "it leaves")


def test_the_report_to_a_nests_next_life_has_all_of_them(many):
    report = pickle.loads(many.host.control(encode(wire.ReportOrder())))
    assert {life.dot for life in report.lives} == {DOT, *(many.dot(n) for n in range(50))}


def test_an_empty_bird_costs_less_than_two_and_a_half_kilobytes(tmp_path):
    made = Many(tmp_path, Empty, birds=10)
    try:
        gc.collect()
        tracemalloc.start()
        for begin in range(100, 2_100, 500):
            made.hatch(Empty, range(begin, begin + 500))
        made.client._ways.clear()
        made.world.routes.clear()
        made.nest.words.clear()
        gc.collect()
        cost = tracemalloc.get_traced_memory()[0] / 2_000
        tracemalloc.stop()
        assert cost < 2_500, f"{cost:.0f} bytes"
    finally:
        made.close()


# Batches


def test_calls_of_many_birds_go_in_a_few_frames(many):
    before = many.frames()
    assert many.many([(n, "add") for n in range(50)]) == [1] * 50
    assert many.frames() - before == 1


def test_what_fails_has_its_place(many):
    wrong = many.many([(0, "add"), (1, "boom"), (2, "nothing"), (3, "_private"), (4, "add", "text")])
    assert wrong[0] == 1
    assert [type(error) for error in wrong[1:]] == [ValueError, AttributeError, AttributeError, TypeError]


def test_a_bird_called_more_than_once_is_called_in_order(many):
    assert many.many([(7, "add") for _ in range(100)] + [(8, "add")]) == [*range(1, 101), 1]


def test_what_was_sent_before_a_batch_begins_before_it(many):
    for k in range(1, 30):
        many.client.cast(9, None, "add", (), {})
        assert many.many([(9, "add"), (10, "add")]) == [2 * k, k]


def test_a_busy_bird_answers_when_it_is_its_turn(many):
    held = many.client.future(0, None, "hold", (), {}, 10.0, False)
    until(lambda: many.lives()[many.dot(0)]._turns.busy, "it is held up")
    threading.Timer(0.2, Counter.go.set).start()
    assert many.many([(n, "add") for n in range(50)]) == [1] * 50
    assert held.result(5) == 0


def test_birds_after_one_that_blocks_are_not_held_up(many):
    """Its thread is held up in the middle of the batch; another goes on with the rest."""
    got = []
    batch = threading.Thread(target=lambda: got.extend(many.many([(n, "hold" if n == 5 else "add") for n in range(50)])))
    batch.start()
    until(lambda: all(many.lives()[many.dot(n)].bird.n == 1 for n in range(50) if n != 5), "all others have run")
    Counter.go.set()
    batch.join(5)
    assert got == [0 if n == 5 else 1 for n in range(50)]


def test_a_batch_that_is_late_says_so_of_those_that_have_not_answered(many):
    outcomes = many.many([(0, "add"), (1, "hold"), (2, "add")], timeout=0.3)
    assert outcomes[0] == outcomes[2] == 1
    assert isinstance(outcomes[1], errors.CallTimeout)
    late = many.many([(1, "add")], timeout=0.2)
    assert isinstance(late[0], errors.CallTimeout)
    until(lambda: len(many.lives()[many.dot(1)]._withdrawn) == 2, "the host was told")
    Counter.go.set()
    assert many.client.call(1, None, "add", (), {}, 5.0, False) == 1, "the one that was late was taken out of the mailbox"


def test_long_results_and_long_arguments_come_too(many):
    assert [len(one) for one in many.many([(0, "long"), (1, "long")])] == [2_000_000] * 2
    assert many.many([(2, "add", 10**30_000)]) == [10**30_000]


def test_birds_with_async_methods_are_called_together(tmp_path):
    made = Many(tmp_path, Waiter, is_async=True)
    try:
        began = time.monotonic()
        assert made.many([(n, "soon", n) for n in range(50)]) == list(range(50))
        assert time.monotonic() - began < 0.4, "side by side"
    finally:
        made.close()


def test_casts_of_many(many):
    assert many.many([(n, "add") for n in range(50)], cast=True) == [None] * 50
    assert many.many([(n, "add") for n in range(50)]) == [2] * 50
    assert many.many([(n, "boom") for n in range(50)], cast=True) == [None] * 50


def test_what_has_moved_is_called_where_it_is(many):
    for n in range(5):
        many.host.control(encode(wire.EndOrder(many.dot(n), 1, "stopped", False, 5.0)))
    until(lambda: len(many.lives()) == 46, "they are gone")
    threading.Timer(0.2, lambda: many.hatch(Counter, range(5), born=2)).start()
    assert many.many([(n, "add") for n in range(50)]) == [1] * 50


def test_orders_are_obeyed_in_order_and_one_that_cannot_be_keeps_no_other_back(many):
    dot = many.dot(1)
    orders = (wire.RaiseOrder(dot, 1, 5), HatchOrder("default", "x", dot, 1, None, b"", 0, 0, None, False), wire.RaiseOrder(dot, 1, 9))
    many.host.control(encode(Orders(orders)))
    assert many.lives()[dot].incarnation == 9


def test_those_that_have_moved_to_another_host_are_called_there(many, tmp_path):
    other = Many(tmp_path / "other", birds=0)
    try:
        other.hatch(Counter, range(20), n=5, born=2)
        for n in range(20):
            many.host.control(encode(wire.EndOrder(many.dot(n), 1, "moved", False, 5.0)))
            route = Route(n, many.dot(n), 2, "node", "light:other", other.host.address)
            many.world.routes[n], many.world.hosts["light:other"] = route, other.link
        until(lambda: len(many.lives()) == 31, "they are gone")
        assert many.many([(n, "add") for n in range(50)], timeout=5.0) == [6] * 20 + [1] * 30
    finally:
        other.close()


def test_those_that_do_not_run_yet_are_waited_for_together(many):
    asked = []
    routes = many.world.the_nest.routes
    many.world.the_nest.routes = lambda query: asked.append(len(pickle.loads(query)[0])) or routes(query)
    threading.Timer(0.3, lambda: many.hatch(Counter, range(50, 90))).start()
    assert many.many([(n, "add") for n in range(90)]) == [1] * 90
    assert asked[0] == 40
    assert len(asked) < 20, "they are asked for in pauses that grow"
    assert not [event for event in many.world.the_nest.asked if isinstance(event, ev.Locate)]


def test_what_a_nest_says_of_those_that_do_not_run_is_what_their_calls_fail_with(many):
    many.world.refusals["nobody"] = ev.Refused("BirdNotFound", "no nest knows it", "nobody")
    many.world.refusals["broken"] = ev.Refused("BirdCrashed", "it has failed", "broken", "Traceback")
    began = time.monotonic()
    nobody, broken, late, well = many.many([("nobody", "add"), ("broken", "add"), ("late", "add"), (1, "add")], timeout=0.5)
    assert time.monotonic() - began < 3.0
    assert isinstance(nobody, errors.BirdNotFound) and isinstance(broken, errors.BirdCrashed)
    assert isinstance(late, errors.CallTimeout) and "does not run" in str(late)
    assert well == 1


def test_a_host_that_goes_away_in_the_middle(many):
    def go_away():
        until(lambda: many.lives()[many.dot(1)]._turns.busy, "it runs")
        many.break_connections()

    threading.Thread(target=go_away).start()
    outcomes = many.many([(1, "hold"), (2, "hold")], timeout=5.0)
    assert all(isinstance(one, errors.BirdUnavailable) for one in outcomes)


def test_over_ray_they_are_called_one_by_one(tmp_path):
    made = Many(tmp_path, wire="ray")
    try:
        assert made.many([(n, "add", n) for n in range(50)]) == list(range(50))
    finally:
        made.close()


def test_a_host_without_doors_runs_its_birds_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.oneprocess.SECRET", b"")
    made = Many(tmp_path, wire="ray", birds=5)
    try:
        assert made.host.address == ""
        assert made.many([(n, "add", n) for n in range(5)]) == list(range(5))
        assert not any(name.endswith(".sock") for name in os.listdir(tmp_path))
    finally:
        made.close()


def test_a_bird_that_hangs_costs_only_its_own_call_wherever_the_others_are(many, tmp_path):
    other = Many(tmp_path / "other", birds=0)
    try:
        other.hatch(Counter, range(100, 140))
        for n in range(100, 140):
            route = Route(n, many.dot(n), 1, "node", "light:other", other.host.address)
            many.world.routes[n], many.world.hosts["light:other"] = route, other.link
            many.client.learn(route, other.link)
        outcomes = many.many([(0, "hold"), *((n, "add") for n in range(1, 50)), *((n, "add") for n in range(100, 140))], timeout=0.5)
        assert isinstance(outcomes[0], errors.CallTimeout)
        assert outcomes[1:] == [1] * 89
    finally:
        other.close()


def test_a_cast_to_a_busy_bird_is_waited_for_by_nobody(many):
    held = many.client.future(0, None, "hold", (), {}, 10.0, False)
    until(lambda: many.lives()[many.dot(0)]._turns.busy, "it is held up")
    began = time.monotonic()
    assert many.many([(n, "add") for n in range(50)], cast=True) == [None] * 50
    assert many.many([(n, "hold") for n in range(1, 10)], cast=True) == [None] * 9
    assert time.monotonic() - began < 2.0
    Counter.go.set()
    held.result(5)
    assert many.many([(n, "add") for n in range(50)]) == [2] * 50


def test_a_cast_to_a_bird_that_another_keeps_busy_waits_in_its_mailbox(many):
    other = threading.Thread(target=lambda: many.client.call(0, None, "hold", (), {}, 10.0, False))
    other.start()
    until(lambda: many.lives()[many.dot(0)]._turns.busy, "it is held up")
    assert many.many([(n, "add") for n in range(50)], cast=True) == [None] * 50
    until(lambda: many.lives()[many.dot(0)]._turns.waiting, "it waits there, and not with its caller")
    Counter.go.set()
    other.join(5)
    assert many.many([(n, "add") for n in range(50)]) == [2] * 50


def test_who_gives_a_batch_up_takes_back_what_has_not_begun(many):
    held = many.client.future(0, None, "hold", (), {}, 10.0, False)
    other = threading.Thread(target=lambda: many.client.call(1, None, "hold", (), {}, 10.0, False))
    other.start()
    until(lambda: all(many.lives()[many.dot(n)]._turns.busy for n in (0, 1)), "they are held up")
    caller = Caller(many.client.lanes_here(), threading.Event())
    threading.Timer(0.2, caller.gone.set).start()
    began = time.monotonic()
    outcomes = many.many([(0, "add", 5), (1, "add", 5), ("nowhere", "add"), (2, "add", 5)], timeout=None, caller=caller)
    assert time.monotonic() - began < 3.5
    assert all(isinstance(outcome, errors.CallTimeout) for outcome in outcomes[:3]) and outcomes[3] == 5
    until(lambda: all(many.lives()[many.dot(n)]._withdrawn for n in (0, 1)), "the host has been told")
    Counter.go.set()
    held.result(5), other.join(5)
    assert many.many([(n, "add") for n in range(3)]) == [1, 1, 6], "nothing of it has run since"


def test_threads_that_are_not_needed_any_more_end(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "UNNEEDED", 0.1)
    made = Many(tmp_path, threads=20)
    try:
        Counter.go.clear()
        holding = threading.Thread(target=lambda: made.many([(n, "hold") for n in range(20)]))
        holding.start()
        until(lambda: sum(made.lives()[made.dot(n)]._turns.busy for n in range(20)) == 20, "each has a thread")
        Counter.go.set()
        holding.join(5)
        until(lambda: made.host._listener._followers <= listener.FOLLOWERS, "they have ended")
        assert made.many([(n, "add") for n in range(50)]) == [1] * 50
    finally:
        made.close()


def test_a_bird_with_a_start_timeout_says_when_its_time_begins(tmp_path):
    made = Many(tmp_path, birds=0)
    try:
        made.hatch_only(Counter, [1], start_timeout=5.0)
        made.hatch_only(Counter, [2])

        def said(n):
            return [type(word) for word in list(made.nest.words) if getattr(word, "dot", None) == made.dot(n)]

        until(lambda: LifeRunning in said(1) and LifeRunning in said(2), "both run")
        assert (said(1), said(2)) == ([wire.LifeBegins, LifeRunning], [LifeRunning])
    finally:
        made.close()


@contextmanager
def all_threads_held(folder, birds):
    """A host whose two threads are held up by birds 0 to 3, two of which run, and are let go at the end."""
    made = Many(folder, birds=birds, threads=2)
    try:
        Counter.go.clear()
        for n in range(4):
            made.client.cast(n, None, "hold", (), {})
        until(lambda: made.host._listener._running == 2, "all threads are taken")
        yield made
    finally:
        Counter.go.set()
        made.close()


def end_of(made, n):
    """Has a bird end, and hand over a count of 0; what its host says then."""
    made.host.control(encode(wire.EndOrder(made.dot(n), 1, "moved", True, 5.0)))
    return wire.LifeEnded(made.dot(n), 1, pickle.dumps(0, 5), True)


def test_a_bird_is_stopped_while_others_block_all_threads(tmp_path):
    with all_threads_held(tmp_path, birds=5) as made:
        ended = end_of(made, 4)
        until(lambda: ended in list(made.nest.words), "it has ended, and handed over")


def test_a_cast_that_was_taken_and_has_no_thread_does_not_keep_a_bird_from_its_end(tmp_path):
    made = Many(tmp_path, birds=6, threads=2)
    try:
        Counter.go.clear()
        assert made.many([(n, "hold") for n in range(6)], cast=True) == [None] * 6
        until(lambda: made.host._listener._running == 2, "all threads are taken")
        n = max(n for n in range(6) if made.lives()[made.dot(n)]._granted is not None)
        ended = end_of(made, n)
        until(lambda: made.lives()[made.dot(n)]._granted is None, "its cast is run, although all threads are still taken")
        Counter.go.set()
        until(lambda: ended in list(made.nest.words), "it has ended")
    finally:
        Counter.go.set()
        made.close()


def test_what_is_ended_while_it_waits_for_a_thread_never_begins(tmp_path):
    with all_threads_held(tmp_path, birds=4) as made:
        Noted.made.clear()
        made.hatch_only(Noted, range(10, 60))
        for n in range(10, 60):
            made.host.control(encode(wire.EndOrder(made.dot(n), 1, "stopped", False, 5.0)))
        until(lambda: sum(isinstance(word, LifeEnded) for word in list(made.nest.words)) == 50, "they have ended")
        assert not Noted.made


def test_threads_that_end_leave_their_place_to_others(tmp_path):
    recorder = Recorder(tmp_path, 1)
    for n in range(1, PLACES + 100):
        thread = threading.Thread(target=lambda n=n: (recorder.note(Dot(Life("a", 1), n)), recorder.clear()))
        thread.start()
        thread.join()
    recorder.note(Dot(Life("a", 1), 7))
    threading.Thread(target=lambda: (recorder.note(Dot(Life("a", 1), 8)), recorder.clear())).start()
    assert suspects(tmp_path, 1) == {(7, 1)}


def test_what_has_its_turn_and_no_thread_does_not_keep_a_bird_from_its_end(tmp_path):
    with all_threads_held(tmp_path, birds=5) as made:
        life, done = made.lives()[made.dot(4)], []
        for place in range(3):  # as a timer that is due
            life._turns.enter_later(partial(life._in_pool, lambda place=place: (done.append(place), life._turns.leave())))
        assert life._turns.busy and not done
        ended = end_of(made, 4)
        until(lambda: ended in list(made.nest.words), "it has ended, and handed over")
        assert done == [0, 1, 2], "each once, in order"


@pytest.mark.parametrize("cls", [Counter, Waiter])
def test_what_is_ended_before_it_has_begun_never_begins(tmp_path, cls):
    made = Many(tmp_path, cls, birds=0, is_async=cls is Waiter)
    try:
        for n in range(200):
            made.host.control(encode(wire.EndOrder(made.dot(n), 1, "stopped", False, 5.0)))
        made.hatch_only(cls, range(200))
        made.hatch(cls, [500])
        assert set(made.lives()) == {DOT, made.dot(500)}
        made.hatch_only(cls, range(600, 700))
        for n in range(600, 700):
            made.host.control(encode(wire.EndOrder(made.dot(n), 1, "stopped", False, 5.0)))
        until(lambda: set(made.lives()) == {DOT, made.dot(500)}, "those that had begun have ended")
    finally:
        made.close()
