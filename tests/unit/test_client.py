"""The caller's side of C1 to C5, without Ray: retries, redirects, order, timeouts, cycles, errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import pickle
import threading
import time

import pytest

from flock_ray import errors
from flock_ray.config import Config
from flock_ray.core import events as ev
from flock_ray.core import wire
from flock_ray.runtime import inside, lanes
from flock_ray.runtime.client import DEFAULT, Client, culprit
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.replies import Down
from flock_ray.specs import Dot, Life, Options, Spec, Stamp
from tests.support.fakelinks import World

COURIER = Courier()
SPEC = Spec("module", "Class", "digest", b"", Options(), None, Stamp(0, 0), "request")


def until(condition, what="it is so", seconds=5.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.002)  # between looks at the condition
    return value


class Caller:
    """A client and its world."""

    def __init__(self, **config):
        self.world = World(**config)
        self.client = Client("default", self.world, COURIER)

    def call(self, *args, name="a", method="echo", timeout=DEFAULT, retry=False, **kwargs):
        return self.client.call(name, None, method, args, kwargs, timeout, retry)

    def future(self, *args, name="a", method="echo", timeout=DEFAULT, retry=False, **kwargs):
        return self.client.future(name, None, method, args, kwargs, timeout, retry)

    async def aio(self, *args, name="a", method="echo", timeout=DEFAULT, retry=False, **kwargs):
        return await self.client.aio(name, None, method, args, kwargs, timeout, retry)

    def cast(self, *args, name="a", method="echo", **kwargs):
        self.client.cast(name, None, method, args, kwargs)

    def warm(self, name="a", host="host:1", **route):
        """A bird that was called just now."""
        there = self.world.put(name, host, **route)
        assert self.call("warm", name=name) == "warm"
        there.got.clear()
        there.used_at = float("inf")  # fresh for the whole test, however slow
        return there


@pytest.fixture
def caller():
    return Caller(call_timeout=5.0)


def fresh(host):
    """The route to this host needs no look before it is used."""
    host.used_at = float("inf")
    return host


# Routes


def test_a_call_goes_straight_to_the_host_once_the_route_is_known(caller):
    host = caller.warm()
    asked = len(caller.world.the_nest.asked)
    assert [caller.call(n) for n in range(5)] == [0, 1, 2, 3, 4]
    assert len(caller.world.the_nest.asked) == asked
    assert host.controls == []


def test_a_call_waits_for_a_bird_that_does_not_run_yet(caller):
    future = caller.future("x")
    until(lambda: any(isinstance(event, ev.Locate) for event in caller.world.the_nest.asked))
    assert not future.done()
    caller.world.put("a", "host:1")
    assert future.result(5) == "x"


def test_a_call_turned_away_follows_the_bird(caller):
    old = caller.warm()
    old.moved = True
    new = caller.world.put("a", "host:2")
    assert caller.call("x") == "x"
    assert old.args == new.args == ["x"]
    located = caller.world.the_nest.asked[-1]
    assert located.avoid.host == "host:1"


def test_an_old_route_is_tried_before_a_message_is_risked_on_it(caller):
    host = caller.warm()
    host.used_at = time.monotonic() - 1.0
    assert caller.call("x") == "x"
    assert host.controls == [wire.Withdraw("", 0)]
    assert caller.call("y") == "y"
    assert len(host.controls) == 1


def test_a_host_that_died_while_nobody_called_costs_the_next_caller_nothing(caller):
    old = caller.warm()
    old.used_at = time.monotonic() - 1.0
    old.gone = True
    new = caller.world.put("a", "host:2")
    assert caller.call("x") == "x"
    assert (old.got, new.args) == ([], ["x"])


def test_a_host_known_to_be_dead_gets_nothing_even_on_a_fresh_route(caller):
    old = caller.warm()
    old.gone = True
    caller.world.put("a", "host:2")
    assert caller.call("x") == "x"
    assert old.got == []


def test_a_host_too_busy_for_a_ping_gets_the_call_all_the_same(caller, monkeypatch):
    monkeypatch.setattr(lanes, "PING_SECONDS", 0.05)
    host = caller.warm()
    host.used_at, host.deaf = time.monotonic() - 1.0, True
    assert caller.call("x") == "x"


def test_a_host_that_is_cut_off_gets_nothing_once_the_nest_knows_better(caller, monkeypatch):
    """A caller on one side of a split went on calling the other side by Ray, and waited in vain until the heal."""
    monkeypatch.setattr(lanes, "PING_SECONDS", 0.05)
    host = caller.warm()
    host.used_at, host.deaf, host.holds = time.monotonic() - 1.0, True, True
    with pytest.raises(errors.CallTimeout):
        caller.call("lost", timeout=0.3)
    new = caller.world.put("a", "host:2")
    host.used_at = time.monotonic() - 1.0
    assert caller.call("x", timeout=5) == "x"
    assert new.args == ["x"]


def test_a_bird_that_comes_back_to_its_old_host_is_found_there(caller, monkeypatch):
    monkeypatch.setattr(lanes, "AVOID_SECONDS", 0.1)
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.got[0].moved()
    host.holds = False
    assert future.result(5) == "x"


def test_other_threads_use_the_route_too(caller):
    caller.warm()
    asked = len(caller.world.the_nest.asked)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(caller.call, range(8))) == list(range(8))
    assert len(caller.world.the_nest.asked) == asked


# Order (C2)


def test_messages_of_one_thread_are_numbered_in_their_order(caller):
    host = caller.warm()
    host.holds = True
    for n in range(3):
        caller.cast(n)
    caller.future(3)
    heads = [message.head for message in host.got]
    orders = [message.order for message in host.got]
    assert host.args == [0, 1, 2, 3]
    assert orders == list(range(orders[0], orders[0] + 4))
    assert len({head.caller for head in heads}) == 1
    assert [head.cast for head in heads] == [True, True, True, False]


def test_messages_turned_away_are_sent_again_in_order_before_newer_ones(caller):
    old = caller.warm()
    old.holds = True
    for n in range(5):
        caller.cast(n)
    old.got[0].result(None)
    old.got[1].result(None)
    for message in old.got[2:]:
        message.moved()
    later = caller.future(5)  # queues behind them, or is turned away as well
    if len(old.got) > 5:
        old.got[5].moved()
    caller.cast(6)
    for message in old.got[6:]:
        message.moved()
    new = fresh(caller.world.put("a", "host:2"))
    assert later.result(5) == 5
    assert caller.call(7) == 7
    assert new.args == [2, 3, 4, 5, 6, 7]
    assert [message.order for message in new.got] == list(range(6))
    assert len({message.head.caller for message in new.got}) == 1
    assert new.got[0].head.caller != old.got[0].head.caller


def test_nothing_is_sent_again_while_an_earlier_message_may_still_run(caller):
    old = caller.warm()
    old.holds = True
    running, refused = caller.future("slow"), caller.future("next")
    new = caller.world.put("a", "host:2")
    old.got[1].moved()
    until(lambda: refused._message.lane._closed or not refused._arm(), "the lane is closed")
    threading.Event().wait(0.1)  # time in which it could be sent by mistake
    assert new.got == []
    old.got[0].result("done")
    assert (running.result(5), refused.result(5)) == ("done", "next")


def test_what_nobody_waits_for_any_more_keeps_nothing_from_a_better_way(caller, monkeypatch):
    """A call by Ray was not answered long after a split; its caller had given up, and all later calls waited behind it."""
    monkeypatch.setattr(lanes, "LOOK", 0.05)
    old = caller.warm()
    old.holds = True
    stuck = caller.future("stuck", timeout=0.5)
    until(lambda: old.args == ["stuck"])
    old.retire()
    new = caller.world.put("a", "host:2")
    later = caller.future("later", timeout=5)
    with pytest.raises(errors.CallTimeout):
        stuck.result()
    assert later.result() == "later"
    assert new.args == ["later"]


def test_casts_that_were_turned_away_follow_the_bird_though_nobody_waits(caller):
    old = caller.warm()
    old.holds = True
    for n in range(3):
        caller.cast(n)
    new = caller.world.put("a", "host:2")
    for message in old.got:
        message.moved()
    until(lambda: new.args == [0, 1, 2], "all casts are with the new host")


def test_casts_that_waited_for_a_route_are_watched_too(caller):
    caller.cast(0)
    host = caller.world.put("somebody else", "host:1")
    host.holds = True
    caller.world.put("a", "host:1")
    until(lambda: host.args == [0])
    host.moved = True
    new = caller.world.put("a", "host:2")
    host.got[0].moved()
    until(lambda: new.args == [0], "the cast follows the bird")


def test_a_cast_does_not_wait_for_a_route(caller):
    began = time.monotonic()
    for n in range(10):
        caller.cast(n)
    assert time.monotonic() - began < 1.0
    host = caller.world.put("a", "host:1")
    until(lambda: host.args == list(range(10)), "all casts have arrived in order")


def test_a_call_comes_after_the_casts_that_wait_for_a_route(caller):
    for n in range(3):
        caller.cast(n)
    threading.Timer(0.05, lambda: caller.world.put("a", "host:1")).start()
    assert caller.call(3) == 3
    assert caller.world.hosts["host:1"].args == [0, 1, 2, 3]


def test_order_holds_while_a_bird_moves_again_and_again(caller):
    host = caller.warm()
    seen, hosts = [], [host]
    stop = threading.Event()

    def move():
        n = 1
        while not stop.is_set():
            n += 1
            hosts[-1].moved = True
            hosts.append(caller.world.put("a", f"host:{n}"))
            time.sleep(0.005)  # the pace of moves, not a wait for anything

    mover = threading.Thread(target=move)
    mover.start()
    futures = []
    for n in range(300):
        if n % 3:
            futures.append((n, caller.future(n, timeout=30)))
        else:
            caller.cast(n)
        time.sleep(0.0005)  # so that sending lasts for many moves
    for n, future in futures:
        assert future.result(30) == n
    stop.set()
    mover.join()
    for one in hosts:
        seen += [message.args[0] for message in one.got if b"moved" not in message.reply.outcome.message]
    until(lambda: caller.client.flush(0.1) or all(lane.idle for lane in caller.client._lanes))
    assert seen[1:] == list(range(300)) if seen[0] == "warm" else seen == list(range(300))


def test_methods_of_one_bird_are_one_caller_whatever_their_threads(caller):
    host = caller.warm()
    life = FakeLife("me")
    for _ in range(3):
        run_inside(life, lambda: caller.call("x"), in_thread=True)
    assert len({message.head.caller for message in host.got}) == 1
    caller.call("y")
    assert host.got[-1].head.caller != host.got[0].head.caller


def test_the_send_window_is_limited(caller):
    caller.client.asks._config = Config(send_window=10)
    host = caller.warm()
    host.holds = True
    for n in range(10):
        caller.cast(n)
    with pytest.raises(errors.MailboxFull, match="'a'"):
        caller.cast(10)
    host.got[-1].result(None)
    until(lambda: not caller.client._here.lanes["a"]._sent, "the casts are known to have begun")
    caller.cast(11)


def test_an_answer_tells_of_all_casts_before_it(caller):
    host = caller.warm()
    host.holds = True
    for n in range(5):
        caller.cast(n)
    host.holds = False
    assert caller.call("x") == "x"
    assert caller.client._here.lanes["a"].idle


# At most once (C2)


def test_a_call_whose_host_goes_away_may_have_run(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.gone = True
    host.got[0].down()
    new = caller.world.put("a", "host:2")
    with pytest.raises(errors.BirdUnavailable, match="'a'") as caught:
        future.result(5)
    assert caught.value.name == "a"
    assert isinstance(caught.value.__cause__, Down)
    assert new.got == []
    assert caller.call("y") == "y"


def test_with_retry_it_is_sent_again(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x", retry=True)
    host.gone = True
    host.got[0].down()
    caller.world.put("a", "host:2")
    assert future.result(5) == "x"


def test_what_certainly_did_not_run_is_sent_again(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.gone = True
    host.got[0].down(ran=False)
    caller.world.put("a", "host:2")
    assert future.result(5) == "x"


def test_what_came_after_a_refusal_did_not_run(caller):
    host = caller.warm()
    host.holds = True
    first, second, third = caller.future(1), caller.future(2), caller.future(3)
    host.gone = True
    host.got[0].down()
    host.got[1].moved()
    host.got[2].down()
    caller.world.put("a", "host:2")
    with pytest.raises(errors.BirdUnavailable):
        first.result(5)
    assert (second.result(5), third.result(5)) == (2, 3)


def test_a_cast_whose_host_goes_away_is_gone(caller):
    host = caller.warm()
    host.holds = True
    caller.cast("x")
    host.gone = True
    host.got[0].down()
    new = caller.world.put("a", "host:2")
    assert caller.call("y") == "y"
    assert new.args == ["y"]


def test_a_future_that_has_begun_and_lost_its_host_is_unavailable(caller):
    host = caller.warm()
    host.holds = True
    slow, quick = caller.future("slow"), caller.future("quick")
    host.got[1].result("quick")
    assert quick.result(5) == "quick"
    host.gone = True
    host.got[0].down()
    caller.world.put("a", "host:2")
    with pytest.raises(errors.BirdUnavailable):
        slow.result(5)


def test_a_host_that_cannot_be_reached_for_a_while_is_tried_again(caller):
    host = caller.warm()
    host.used_at = 0.0
    failures = [Down("unavailable", ran=True)] * 2
    control = host.control

    def flaky(data):
        reply = control(data)
        if failures:
            reply.outcome = failures.pop()
        return reply

    host.control = flaky
    assert caller.call("x") == "x"
    assert host.args == ["x"]


# Timeouts (C5)


def test_a_call_without_an_answer_times_out_and_is_withdrawn(caller):
    host = caller.warm()
    host.holds = True
    with pytest.raises(errors.CallTimeout, match=r"0\.05 s") as caught:
        caller.call("x", timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.name == "a"
    assert host.controls == [host.got[0].withdrawn]
    host.holds = False
    assert caller.call("y") == "y"


def test_a_bird_that_does_not_run_in_time_times_out_with_its_last_error(caller):
    caller.world.last_error = "Traceback: no egg"
    with pytest.raises(errors.CallTimeout, match="not running in time") as caught:
        caller.call("x", timeout=0.1)
    assert "no egg" in str(caught.value.__cause__)


def test_a_shorter_timeout_behind_a_longer_one_is_kept(caller):
    caller.cast("x")
    began = time.monotonic()
    until(lambda: caller.world.the_nest.asked, "the cast's route was asked for")
    with pytest.raises(errors.CallTimeout, match="not running in time"):
        caller.call("y", timeout=0.1)
    assert time.monotonic() - began < 2.0
    host = caller.world.put("a", "host:1")
    until(lambda: host.args == ["x"], "the cast, which still had time, is delivered")


def test_the_default_timeout_is_the_flocks(caller):
    impatient = Caller(call_timeout=0.1)
    with pytest.raises(errors.CallTimeout):
        impatient.call("x")
    with pytest.raises(errors.CallTimeout):
        Caller(call_timeout=0.1).future("x").result()
    with pytest.raises(errors.CallTimeout):
        asyncio.run(Caller(call_timeout=0.1).aio("x"))


def test_none_waits_for_ever():
    patient = Caller(call_timeout=0.05)
    threading.Timer(0.3, lambda: patient.world.put("a", "host:1")).start()
    assert patient.call("x", timeout=None) == "x"


def test_a_timed_out_message_is_not_sent_again(caller):
    old = caller.warm()
    old.holds = True
    with pytest.raises(errors.CallTimeout):
        caller.call("x", timeout=0.05)
    old.got[0].moved()
    new = caller.world.put("a", "host:2")
    old.moved = True
    assert caller.call("y") == "y"
    assert new.args == ["y"]


# Errors


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (ev.Refused("BirdNotFound", "no nest knows 'a'", "a"), errors.BirdNotFound),
        (ev.Refused("BirdCrashed", "'a' has failed", "a", "Traceback: no egg"), errors.BirdCrashed),
    ],
)
def test_what_the_nest_refuses_is_raised(caller, refusal, kind):
    caller.world.refusals["a"] = refusal
    with pytest.raises(kind, match="'a'") as caught:
        caller.call("x")
    assert caught.value.name == "a"
    if refusal.detail:
        assert "no egg" in str(caught.value)
        assert "no egg" in str(caught.value.__cause__)
    caller.cast("x")  # says nothing
    del caller.world.refusals["a"]
    caller.world.put("a", "host:1")
    assert caller.call("x") == "x"


def test_what_a_method_raised_has_its_type_and_the_remote_traceback(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.got[0].answer(wire.Answer("raised", "Traceback: line 7"), pickle.dumps(KeyError("k")))
    for _ in range(2):
        with pytest.raises(KeyError, match="k") as caught:
            future.result(5)
        assert isinstance(caught.value.__cause__, errors.RemoteError)
        assert "line 7" in str(caught.value.__cause__)
    assert isinstance(future.exception(), KeyError)


def test_what_cannot_be_unpickled_is_a_remote_error(caller):
    host = caller.warm()
    host.holds = True
    first, second = caller.future("x"), caller.future("x")
    host.got[0].answer(wire.Answer("raised", "Traceback: OddError"), b"\x80\x05cno.such\nOddError\n.")
    host.got[1].answer(wire.Answer("result"), b"\x80\x05cno.such\nThing\n.")
    with pytest.raises(errors.RemoteError, match="OddError"):
        first.result(5)
    with pytest.raises(errors.RemoteError, match="result of 'echo'"):
        second.result(5)


@pytest.mark.parametrize(
    ("error", "kind"), [("AttributeError", AttributeError), ("MailboxFull", errors.MailboxFull), ("TypeError", TypeError)]
)
def test_what_the_host_refuses_is_raised(caller, error, kind):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.got[0].answer(wire.Answer("refused", "the reason", error))
    with pytest.raises(kind, match="the reason"):
        future.result(5)


def test_an_argument_that_did_not_come_is_raised_as_ray_says(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    host.got[0].reply.set(ZeroDivisionError("in the task of an argument"))
    with pytest.raises(ZeroDivisionError):
        future.result(5)
    host.holds = False
    assert caller.call("y") == "y"


def test_an_argument_that_cannot_be_pickled_is_named(caller):
    with pytest.raises(TypeError, match="positional argument 2.*lock.*'a'"):
        caller.call(1, threading.Lock())
    with pytest.raises(TypeError, match="argument 'key'"):
        caller.cast(1, key=threading.Lock())
    assert culprit((1, 2), {"a": 3}, lambda one: None) == "the whole of the arguments"


# Inside birds (C4)


class FakeLife:
    def __init__(self, name):
        self.flock, self.name, self.incarnation, self.node_id = "default", name, 1, "node"

    def waiting(self):
        return contextlib.nullcontext()


def run_inside(life, what, chain=(), is_async=False, in_thread=False):
    def go():
        token = inside.current.set(inside.Inside(life, (*chain, ("default", life.name)), is_async))
        try:
            return what()
        finally:
            inside.current.reset(token)

    if not in_thread:
        return go()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(go).result(5)


def test_a_call_carries_its_chain_and_a_cast_does_not(caller):
    host = caller.warm()
    run_inside(FakeLife("b"), lambda: caller.call("x"), chain=(("default", "c"),))
    run_inside(FakeLife("b"), lambda: caller.cast("x"))
    assert host.got[0].head.chain == (("default", "c"), ("default", "b"))
    assert host.got[1].head.chain == ()


@pytest.mark.parametrize("warm", [True, False])
def test_a_bird_called_back_in_its_own_chain_is_refused_before_anything_is_sent(caller, warm):
    host = caller.warm() if warm else caller.world.put("a", "host:1")
    with pytest.raises(errors.CallCycle, match="'a' -> 'b' -> 'a'") as caught:
        run_inside(FakeLife("b"), lambda: caller.call("x"), chain=(("default", "a"),))
    assert caught.value.name == "a"
    with pytest.raises(errors.CallCycle, match="'a' -> 'a'"):
        run_inside(FakeLife("a"), lambda: caller.call("x"))
    assert host.got == []
    run_inside(FakeLife("a"), lambda: caller.cast("x"))
    until(lambda: host.args == ["x"], "a bird may cast to itself")


def test_a_bird_that_waits_for_its_own_future_is_refused(caller):
    host = caller.warm()
    host.holds = True
    with pytest.raises(errors.CallCycle):
        run_inside(FakeLife("a"), lambda: caller.future("x").result())


def test_an_async_bird_admits_being_called_back(caller):
    caller.warm(is_async=True)
    assert run_inside(FakeLife("a"), lambda: caller.call("x")) == "x"


def test_a_sync_call_in_an_async_method_is_refused_and_names_aio(caller):
    caller.warm()

    async def method():
        with pytest.raises(RuntimeError, match=r"aio"):
            caller.call("x")
        future = caller.future("x")
        with pytest.raises(RuntimeError, match="await"):
            future.result()
        return await caller.aio("y")

    assert run_inside(FakeLife("b"), lambda: asyncio.run(method()), is_async=True) == "y"


def test_a_notebooks_main_thread_may_call_beside_its_running_loop(caller):
    caller.warm()

    async def cell():
        return caller.call("x")

    assert asyncio.run(cell()) == "x"


# Futures and coroutines


def test_a_future_gives_up_waiting_but_not_the_call(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    with pytest.raises(TimeoutError):
        future.result(0.02)
    assert not future.done()
    host.got[0].result("late")
    assert future.result(5) == "late"
    assert future.done()


def test_a_future_is_told_of_by_callback_wait_and_as_completed(caller):
    host = caller.warm()
    host.holds = True
    futures = [caller.future(n) for n in range(3)]
    called = []
    futures[0].add_done_callback(called.append)
    threading.Timer(0.02, host.got[1].result, ["b"]).start()
    assert next(concurrent.futures.as_completed(futures, 5)) is futures[1]
    host.got[0].result("a")
    host.got[2].result("c")
    done, _ = concurrent.futures.wait(futures, 5)
    assert len(done) == 3
    until(lambda: called == [futures[0]], "the callback was called")


def test_a_callback_may_call_birds(caller):
    caller.warm()
    results = []
    caller.future("x").add_done_callback(lambda future: results.append((future.result(), caller.call("y"))))
    until(lambda: results == [("x", "y")])


def test_a_cancelled_future_takes_the_call_back(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x")
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(5)
    assert host.controls == [host.got[0].withdrawn]
    host.got[0].result("late")  # nobody minds


def test_a_future_that_waits_for_a_route_can_be_cancelled(caller):
    future = caller.future("x")
    assert future.cancel()
    host = caller.world.put("a", "host:1")
    assert caller.call("y") == "y"
    assert host.args == ["y"]


def test_a_future_times_out_for_those_who_wait_by_callback(caller):
    host = caller.warm()
    host.holds = True
    future = caller.future("x", timeout=0.05)
    concurrent.futures.wait([future], 5)
    assert isinstance(future.exception(0), errors.CallTimeout)


def test_aio_gathers_and_waits_for_a_route(caller):
    async def go():
        calls = asyncio.gather(*[caller.aio(n) for n in range(20)])
        await asyncio.sleep(0.02)
        caller.world.put("a", "host:1")
        return await calls

    assert asyncio.run(go()) == list(range(20))
    assert caller.world.hosts["host:1"].args == list(range(20))


def test_cancelling_aio_takes_the_call_back(caller):
    host = caller.warm()
    host.holds = True

    async def go():
        task = asyncio.ensure_future(caller.aio("x"))
        while not host.got:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert host.controls == [host.got[0].withdrawn]


def test_aio_times_out(caller):
    host = caller.warm()
    host.holds = True
    with pytest.raises(errors.CallTimeout):
        asyncio.run(caller.aio("x", timeout=0.05))


# The nest


def test_a_nest_that_is_down_is_asked_again_under_the_same_id(caller):
    nest = caller.world.the_nest
    nest.failures = [Down("unavailable", ran=True), Down("unavailable", ran=True)]
    COURIER.run(caller.client.asks.stop("a", None, time.monotonic() + 5))
    assert len(nest.asked) == 3
    assert len({event.request for event in nest.asked}) == 1


def test_ones_own_writes_are_named_in_what_one_asks(caller):
    asks = caller.client.asks
    assert COURIER.run(asks.start("a", SPEC, b"", 1, time.monotonic() + 5)).dot == caller.world.dot
    COURIER.run(asks.stop("a", None, time.monotonic() + 5))
    assert caller.world.the_nest.asked[-1].after == caller.world.dot
    other = Dot(Life("elsewhere", 2), 7)
    COURIER.run(asks.stop("a", other, time.monotonic() + 5))
    assert caller.world.the_nest.asked[-1].after == other


def test_the_end_waits_for_casts_to_be_delivered(caller):
    host = caller.warm()
    host.holds = True
    caller.cast("x")
    began = time.monotonic()
    caller.client.flush(0.1)
    assert 0.1 <= time.monotonic() - began < 1.0
    threading.Timer(0.05, host.got[0].result, [None]).start()
    caller.client.flush(5.0)
    assert all(lane.idle for lane in caller.client._lanes)


def test_an_old_future_that_is_asked_for_on_a_new_way_disturbs_nobody_there(caller):
    """It was put among the new way's messages, in the place of another, whose answer nobody took then: its waiter span for ever."""
    old = caller.warm()
    old.holds = True
    olds = [caller.future(n) for n in range(3)]
    sent = old.got[-3:]
    sent[-1].result("last")
    until(lambda: olds[0]._message.begun, "the newest answer tells that those before it have begun")
    old.gone = True
    new = caller.world.put("a", "host:2")
    new.holds = True
    news = [caller.future(n) for n in range(3)]
    until(lambda: len(new.got) == 3, "they are sent on the new way")
    sent[0].result("old")
    assert olds[0].result(5) == "old"
    for message in new.got:
        message.result("new")
    assert [future.result(5) for future in news] == ["new"] * 3
    sent[1].down()
    with pytest.raises(errors.BirdUnavailable, match="may or may not have run"):
        olds[1].result(5)


def test_a_call_that_has_begun_is_withdrawn_too_when_nobody_waits_any_more(caller):
    """A later answer had made its lane forget it: then a running `async def` method was not cancelled (C5)."""
    host = caller.warm()
    host.holds = True
    first, second = caller.future(1), caller.future(2)
    host.got[-1].result(None)
    until(lambda: first._message.begun and second.done(), "the second is answered, so the first has begun")
    assert first.cancel()
    assert host.got[0].withdrawn in host.controls


def test_what_a_callback_raises_is_logged(caller, caplog):
    caller.warm()
    caller.future(1).add_done_callback(lambda _: 1 / 0)
    until(lambda: "ZeroDivisionError" in caplog.text, "it is logged")
