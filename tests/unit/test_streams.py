"""Streams, back-pressure and order between a real client and a real host in one process: over a socket, and as over Ray."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import threading
import time

import numpy as np
import pytest

from flock_ray import errors
from flock_ray.core import wire
from flock_ray.core import wire as codec
from flock_ray.runtime import inside, life_async, life_sync
from flock_ray.runtime.mailbox import LoopOrder, ThreadOrder
from tests.support.oneprocess import DOT, Down, Pair


def until(true, what, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)  # between looks


@pytest.fixture(params=["own", "light"], autouse=True)
def hosting(request, monkeypatch):
    """Every promise here holds for birds with a process of their own and for light ones."""
    monkeypatch.setattr(Pair, "light", request.param == "light")
    return request.param


class Oops(Exception):
    """What birds raise."""


LOG: list = []
GO = threading.Event()


class Source:
    """A bird with generator methods."""

    def __init__(self):
        self.made = 0
        self.got = []

    def count(self, n, pause=0.0):
        LOG.append("begun")
        try:
            for i in range(n):
                self.made += 1
                yield i
                if pause:
                    time.sleep(pause)
        finally:
            LOG.append("closed")

    def grow(self):
        kept = []
        for i in range(3):
            kept.append(i)
            yield kept

    def fails(self, n):
        yield from range(n)
        raise Oops("no more")

    def strange(self):
        yield 1
        yield threading.Lock()

    def big(self):
        for i in range(3):
            yield np.full(300_000, i)

    def leaves(self):
        yield 1
        inside.leave("normal")

    def crashes(self):
        yield 1
        inside.leave("a crash")

    def so_far(self):
        return self.made

    def put(self, k):
        self.got.append(k)
        return k

    def everything(self):
        return self.got

    def hold(self):
        LOG.append("holds")
        GO.wait(10)


class AsyncSource:
    """The same with `async def`."""

    def __init__(self):
        self.made = 0
        self.got = []

    async def count(self, n, pause=0.0):
        LOG.append("begun")
        try:
            for i in range(n):
                self.made += 1
                yield i
                await asyncio.sleep(pause)
        finally:
            LOG.append("closed")

    def plain(self, n):
        yield from range(n)

    async def fails(self, n):
        for i in range(n):
            yield i
        raise Oops("no more")

    async def strange(self):
        yield 1
        yield threading.Lock()

    async def big(self):
        for i in range(3):
            yield np.full(300_000, i)

    async def grow(self):
        kept = []
        for i in range(3):
            kept.append(i)
            yield kept

    async def so_far(self):
        return self.made

    async def put(self, k):
        self.got.append(k)
        return k

    def everything(self):
        return self.got

    async def hold(self):
        LOG.append("holds")
        while not GO.is_set():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def fresh():
    LOG.clear()
    GO.clear()
    yield
    GO.set()


@pytest.fixture(params=["unix", "tcp", "ray"])
def way(request):
    return request.param


@pytest.fixture(params=[Source, AsyncSource], ids=["sync", "async"])
def pair(request, tmp_path, way):
    made = Pair(tmp_path, way, request.param, is_async=request.param is AsyncSource)
    yield made
    GO.set()
    made.close()


def is_async(pair):
    return pair.loop is not None


# Streams


def test_all_items_come_in_order(pair):
    assert list(pair.stream("count", 1000)) == list(range(1000))
    assert list(pair.stream("count", 0)) == []
    until(lambda: LOG.count("closed") == 2, "the generators have ended")


def test_all_items_come_to_a_coroutine(pair):
    async def read():
        return [item async for item in pair.stream("count", 1000)]

    assert asyncio.run(read()) == list(range(1000))


def test_a_plain_generator_of_an_async_bird_is_read_too(tmp_path, way):
    pair = Pair(tmp_path, way, AsyncSource, is_async=True)
    assert list(pair.stream("plain", 40)) == list(range(40))
    pair.close()


def test_at_most_a_window_is_made_ahead_of_who_reads(pair):
    stream = pair.stream("count", 1000)
    for read in range(100):
        assert next(stream) == read
        assert pair.call("so_far") <= read + 1 + 16
    time.sleep(0.05)
    assert pair.call("so_far") <= 100 + 16


def test_other_methods_run_between_items(pair):
    stream = pair.stream("count", 100)
    assert next(stream) == 0
    assert pair.call("put", 1) == 1
    assert list(stream) == list(range(1, 100))


def test_a_pull_is_cut_short_where_others_wait_and_no_item_is_lost(tmp_path):
    """Two readers and a caller on one bird, each item taking a while."""
    pair = Pair(tmp_path, "unix", Source)
    wrong, slow = [], []

    def read():
        got = list(pair.stream("count", 150, 0.002))
        if got != list(range(150)):
            wrong.append(got)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        began = time.monotonic()
        pair.call("put", 1)
        slow.append(time.monotonic() - began)
    assert not wrong
    assert sorted(slow)[len(slow) // 2] < 0.04, "a call waits for a few items of each stream, not for their windows"
    pair.close()


def test_slow_items_come_one_by_one(pair):
    began, times = time.monotonic(), []
    for _ in pair.stream("count", 5, 0.1):
        times.append(time.monotonic() - began)
    assert times[0] < 0.09
    assert times[-1] < 0.9


def test_closing_the_iterator_closes_the_generator(pair):
    stream = pair.stream("count", 10**9)
    assert next(stream) == 0
    assert LOG == ["begun"]
    stream.close()
    until(lambda: LOG == ["begun", "closed"], "it is closed")
    assert list(stream) == []
    stream.close()


def test_dropping_the_iterator_closes_the_generator(pair):
    stream = pair.stream("count", 10**9)
    assert next(stream) == 0
    del stream
    gc.collect()
    until(lambda: "closed" in LOG, "it is closed")


def test_a_stream_closed_before_its_first_item_leaves_nothing_open(pair):
    stream = pair.stream("count", 10**9)
    stream.close()
    assert pair.call("put", 1) == 1
    until(lambda: not pair.host.readings._open, "nothing is open")
    assert LOG in ([], ["begun", "closed"])


def test_cancelling_a_reader_closes_the_generator(pair):
    async def read():
        stream = pair.stream("count", 10**9, 0.5)
        assert await anext(stream) == 0
        await asyncio.wait_for(anext(stream), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(read())
    until(lambda: "closed" in LOG, "it is closed")


def test_what_a_generator_raised_comes_after_its_items(pair):
    for n in (0, 3, 8, 20):
        stream = pair.stream("fails", n)
        got = []
        with pytest.raises(Oops, match="no more") as caught:
            got.extend(stream)
            for item in stream:
                got.append(item)
        assert isinstance(caught.value.__cause__, errors.RemoteError)
        assert got == list(range(n)) or (got == [] and n)  # `extend` keeps nothing of what came before an error
        with pytest.raises(StopIteration):
            next(stream)
    got = []
    with pytest.raises(Oops):
        for item in pair.stream("fails", 20):
            got.append(item)
    assert got == list(range(20))


def test_an_item_that_cannot_be_pickled_is_the_end(pair):
    stream = pair.stream("strange")
    assert next(stream) == 1
    with pytest.raises(TypeError, match=r"an item of 'a'\.strange"):
        next(stream)


def test_items_are_copies_made_when_they_are_yielded(pair):
    assert list(pair.stream("grow")) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("items", [[b"one"], [b"", b"two", b"x" * 70_000], [b""] * 8])
def test_items_of_one_frame_are_what_was_put_into_it(items):
    answer = wire.encode_items([wire.ITEM + item for item in items])
    assert wire.count_items(answer) == len(items)
    assert [bytes(item) for item in wire.decode_items(answer)] == items


def test_other_answers_take_the_place_of_one_item():
    assert [wire.count_items(answer) for answer in (wire.ITEM + b"x", wire.END, wire.LATER, b"")] == [1, 1, 1, 1]
    assert [wire.decode_items(answer) for answer in (wire.END, wire.LATER, b"")] == [[], [], []]


def test_large_items_come_whole(pair):
    assert [int(item.sum()) for item in pair.stream("big")] == [0, 300_000, 600_000]


def test_a_call_of_a_generator_method_and_a_stream_of_another_are_refused(pair):
    with pytest.raises(TypeError, match="read it with stream"):
        pair.call("count", 1)
    with pytest.raises(TypeError, match="call it instead"):
        list(pair.stream("so_far"))
    with pytest.raises(AttributeError, match="no method 'nothing'"):
        list(pair.stream("nothing"))
    with pytest.raises(TypeError, match="argument"):
        list(pair.stream("count"))


def test_no_item_in_time_is_a_timeout_and_closes_it(pair):
    stream = pair.stream("count", 3, 0.5, timeout=0.15)
    assert next(stream) == 0
    with pytest.raises(errors.CallTimeout, match="no item of 'count'"):
        next(stream)
    until(lambda: "closed" in LOG, "it is closed")


def test_a_late_reader_still_gets_what_came(pair):
    stream = pair.stream("count", 3, timeout=0.2)
    time.sleep(0.3)
    assert list(stream) == [0, 1, 2]


def test_a_lost_connection_in_the_middle_is_unavailable_after_what_had_arrived(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    stream = pair.stream("count", 10**9)
    got = [next(stream)]
    time.sleep(0.1)
    pair.break_connections()
    with pytest.raises(errors.BirdUnavailable, match="call again for a new stream"):
        for item in stream:
            got.append(item)
    assert 8 <= len(got) <= 17
    assert got == list(range(len(got)))
    until(lambda: "closed" in LOG, "the caller has gone, so the generator is closed")
    pair.close()


def test_a_move_in_the_middle_is_unavailable_and_closes_the_generator(pair):
    stream = pair.stream("count", 10**9)
    assert next(stream) == 0
    pair.host.control(wire.encode(wire.EndOrder(DOT, 1, "moved", False, 5.0)))
    with pytest.raises(errors.BirdUnavailable):
        for _ in stream:
            pass
    until(lambda: "closed" in LOG, "it is closed")


def test_a_generator_may_end_its_bird(tmp_path, way):
    pair = Pair(tmp_path, way, Source)
    assert list(pair.stream("leaves")) == [1]
    until(lambda: pair.nest.words[-1].__class__ is wire.LifeExited, "it left in good order")
    pair.close()


def test_a_generator_that_crashes_its_bird_says_so_to_the_nest(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    stream = pair.stream("crashes")
    assert next(stream) == 1
    until(lambda: any(isinstance(word, wire.LifeCrashed) for word in pair.nest.words), "the nest hears of it")
    pair.close()


def test_streams_that_ray_carries_are_given_up_after_a_long_rest(tmp_path, monkeypatch):
    from flock_ray.runtime import generators

    pair = Pair(tmp_path, "ray", Source)
    first = pair.stream("count", 10**9)
    assert next(first) == 0
    monkeypatch.setattr(generators, "IDLE", 0.05)
    time.sleep(0.1)
    second = pair.stream("count", 5)
    assert list(second) == list(range(5))
    until(lambda: LOG.count("closed") == 2, "the first is given up")
    pair.close()


def test_sync_reading_in_an_async_method_is_refused(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    stream = pair.stream("count", 3)

    class Life:
        flock, name, incarnation, node_id = "default", "b", 1, "node"

    token = inside.current.set(inside.Inside(Life(), (("default", "b"),), True))
    try:

        async def method():
            next(stream)

        with pytest.raises(RuntimeError, match="async for"):
            asyncio.run(method())
    finally:
        inside.current.reset(token)
    pair.close()


# Back-pressure


def fill(pair, mailbox):
    """Makes the bird busy, and its mailbox full."""
    holding = pair.future("hold")
    until(lambda: "holds" in LOG, "it holds")
    return holding, [pair.future("put", n) for n in range(mailbox)]


@pytest.fixture
def small(tmp_path):
    made = Pair(tmp_path, "unix", Source, mailbox=5)
    yield made
    GO.set()
    made.close()


def test_a_full_mailbox_makes_calls_wait_and_casts_fail_at_once(small):
    holding, waiting = fill(small, 5)
    with pytest.raises(errors.MailboxFull, match="was full for 0.3 s"):
        small.call("put", "late", timeout=0.3)

    def cast_until_full():
        for n in range(1000):
            small.cast("put", f"cast {n}")
            time.sleep(0.002)

    with pytest.raises(errors.MailboxFull, match="mailbox of bird 'a' is full"):
        cast_until_full()
    GO.set()
    assert holding.result(5) is None
    assert [future.result(5) for future in waiting] == list(range(5))
    assert small.call("put", "now") == "now"
    got = small.call("everything")
    assert "late" not in got
    casts = [one for one in got if str(one).startswith("cast")]
    assert casts == [f"cast {n}" for n in range(len(casts))], "what was accepted ran, in order"


def test_a_call_past_the_bound_runs_as_soon_as_there_is_room(small):
    _, waiting = fill(small, 5)
    threading.Timer(0.2, GO.set).start()
    assert small.call("put", "patient", timeout=5) == "patient"
    assert [future.result(5) for future in waiting] == list(range(5))


def test_a_full_mailbox_keeps_each_callers_order(small):
    _, waiting = fill(small, 3)
    futures = []
    for n in range(50):
        try:
            futures.append(small.future("put", 100 + n))
        except errors.MailboxFull:
            break
    GO.set()
    assert [future.result(5) for future in waiting + futures] == [0, 1, 2, *range(100, 100 + len(futures))]
    assert small.call("everything") == [0, 1, 2, *range(100, 100 + len(futures))]


def test_many_coroutines_past_the_bound_all_get_through(tmp_path):
    pair = Pair(tmp_path, "unix", Source, mailbox=50)

    async def all_of_them():
        return await asyncio.gather(*(pair.aio("put", n) for n in range(2000)))

    assert asyncio.run(all_of_them()) == list(range(2000))
    assert pair.call("everything") == list(range(2000))
    pair.close()


def test_the_send_window_counts_what_is_not_answered(tmp_path):
    pair = Pair(tmp_path, "unix", Source, send_window=100)
    for n in range(5000):
        try:
            pair.cast("put", n)
        except errors.MailboxFull:
            until(lambda: pair.call("put", -1) == -1, "it answers")
            pair.cast("put", n)
    got = [one for one in pair.call("everything") if one >= 0]
    assert got == list(range(5000))
    pair.close()


# Order and bursts


def test_casts_futures_and_calls_of_one_caller_run_in_their_order(pair):
    futures = []
    for n in range(3000):
        if n % 3:
            pair.cast("put", n)
        else:
            futures.append(pair.future("put", n))
        if not n % 500:
            assert pair.call("put", "here") == "here"
    assert [future.result(5) for future in futures] == list(range(0, 3000, 3))
    assert [one for one in pair.call("everything") if one != "here"] == list(range(3000))


class Slow:
    """Takes its time."""

    def __init__(self):
        self.got = []

    def put(self, what, pause):
        self.got.append(int(what) if np.ndim(what) == 0 else len(what))
        time.sleep(pause)

    def everything(self):
        return self.got

    def count_on(self):
        LOG.append("begun")
        try:
            yield 1
            yield 2
        finally:
            LOG.append("let go")

    def slowly(self, n, pause):
        for i in range(n):
            time.sleep(pause)
            yield i

    def long_ones(self):
        LOG.append("begun")
        try:
            while True:
                yield "x" * 2_000_000
        finally:
            LOG.append("let go")


class AsyncSlow(Slow):
    async def put(self, what, pause):
        super().put(what, 0)
        await asyncio.sleep(pause)


@pytest.mark.parametrize("cls", [Slow, AsyncSlow])
def test_what_ray_carries_waits_for_what_a_socket_brought_however_long_that_takes(tmp_path, monkeypatch, cls):
    monkeypatch.setattr(life_sync, "ThreadOrder", functools.partial(ThreadOrder, 0.03))
    monkeypatch.setattr(life_async, "LoopOrder", functools.partial(LoopOrder, 0.03))
    pair = Pair(tmp_path, "unix", cls, is_async=cls is AsyncSlow, slots=2 if cls is AsyncSlow else 1)
    for n in range(40):
        pair.cast("put", n, 0.004)
    pair.call("put", np.zeros(200_000), 0)
    assert pair.call("everything") == [*range(40), 200_000]
    pair.close()


def test_methods_that_ray_brings_and_those_that_sockets_bring_share_the_birds_places(tmp_path):
    pair = Pair(tmp_path, "unix", AsyncSlow, is_async=True, slots=2)
    pair.cast("put", 1, 0.3)
    pair.cast("put", 2, 0.3)
    began = time.monotonic()
    pair.call("put", np.zeros(200_000), 0)
    assert time.monotonic() - began > 0.25
    pair.close()


@pytest.mark.parametrize(("wire", "pause"), [("unix", 0.02), ("ray", 0.06)])
def test_slow_items_come_in_order_also_where_threads_could_make_them_side_by_side(tmp_path, monkeypatch, wire, pause):
    monkeypatch.setattr(life_sync, "GAP", 0.04)
    pair = Pair(tmp_path, wire, Slow, slots=2)
    assert list(pair.stream("slowly", 24, pause)) == list(range(24))
    pair.close()


class Mirror:
    """Reads itself, while it holds one of its places."""

    async def ticks(self, n):
        for i in range(n):
            yield i

    async def one(self):
        return 1

    async def look(self, how):
        await asyncio.sleep(0.2)
        me = MIRRORS[-1]
        return [tick async for tick in me.stream("ticks", 3, timeout=5)] if how == "stream" else await me.aio("one", timeout=5)


MIRRORS = []


@pytest.mark.parametrize(("how", "seen"), [("stream", [0, 1, 2]), ("call", 1)])
def test_an_async_bird_whose_places_are_all_taken_admits_what_they_wait_for(tmp_path, how, seen):
    pair = Pair(tmp_path, "unix", Mirror, is_async=True, slots=2)
    MIRRORS.append(pair)
    assert [future.result(10) for future in [pair.future("look", how) for _ in range(2)]] == [seen, seen]
    MIRRORS.clear()
    pair.close()


def test_a_future_asked_again_and_again_is_still_told(tmp_path):
    pair = Pair(tmp_path, "unix", Slow)
    told = []
    pair.cast("put", 1, 1.5)
    future = pair.future("everything")
    future.add_done_callback(lambda future: told.append(future.result()))
    for _ in range(1_500):  # more than the stack is deep
        with pytest.raises(TimeoutError):
            future.result(timeout=0.0002)
    until(lambda: told == [[1]], "it is told", 10)
    assert pair.call("everything") == [1], "and the connection goes on"
    pair.close()


def test_a_stream_whose_long_item_cannot_be_fetched_is_closed(tmp_path):
    pair = Pair(tmp_path, "unix", Slow)
    pair.link.fetch = lambda parcel: Unreachable()
    with pytest.raises(errors.BirdUnavailable):
        next(pair.stream("long_ones"))
    until(lambda: "let go" in LOG, "its generator is closed")
    pair.close()


class Unreachable:
    done = True

    def get(self, timeout):
        raise Down("its actor cannot be reached", ran=True)


def test_casts_leave_nothing_behind(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    for n in range(2000):
        pair.cast("put", n)
    assert len(pair.call("everything")) == 2000
    assert not pair.link._replies
    lane = next(iter(pair.client._lanes))
    assert lane.idle
    for n in range(100):
        pair.cast("put", n)
    until(lambda: lane.idle and not pair.link._replies, "also when nobody calls afterwards")
    pair.close()


def test_threads_and_loops_share_a_connection(tmp_path, way):
    pair = Pair(tmp_path, way, Source)
    wrong = []

    def threads():
        for n in range(300):
            if pair.call("put", n) != n:
                wrong.append(n)

    def loops():
        async def go():
            for n in range(10):
                if await asyncio.gather(*(pair.aio("put", (n, k)) for k in range(50))) != [(n, k) for k in range(50)]:
                    wrong.append(n)

        asyncio.run(go())

    workers = [threading.Thread(target=one) for one in (threads, loops) * 3]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
    pair.close()


def test_a_connection_that_breaks_under_coroutines_tells_them_all(tmp_path):
    LOG.clear()
    pair = Pair(tmp_path, "tcp", Source)

    async def go():
        calls = [asyncio.ensure_future(pair.aio("hold")) for _ in range(20)]
        while "holds" not in LOG:
            await asyncio.sleep(0.01)
        pair.world.refusals["a"] = __import__("flock_ray.core.events", fromlist=["Refused"]).Refused("BirdNotFound", "it is gone", "a")
        pair.break_connections()
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(go())
    assert {type(one) for one in outcomes} <= {errors.BirdUnavailable, errors.BirdNotFound}
    assert any(isinstance(one, errors.BirdUnavailable) for one in outcomes)
    pair.close()


def test_a_caller_whose_loop_was_closed_reads_on_another(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    for n in range(5):
        assert asyncio.run(pair.aio("put", n)) == n
        assert pair.call("put", -n) == -n
    pair.close()


def test_aio_times_out_and_takes_its_call_back(pair):
    if is_async(pair):
        return  # its methods interleave: none waits for another
    holding = pair.future("hold")
    until(lambda: "holds" in LOG, "it holds")
    began = time.monotonic()
    with pytest.raises(errors.CallTimeout, match=r"within 0\.1 s"):
        asyncio.run(pair.aio("put", "late", timeout=0.1))
    assert time.monotonic() - began < 1.0
    until(lambda: pair.host.life._withdrawn, "it is taken back")
    GO.set()
    assert holding.result(5) is None
    assert "late" not in pair.call("everything")


# Moves


def move(pair, folder, wire, cls, is_async_bird, delay):
    """The bird of `pair` ends in good order, and another life of it takes over what it had; returns that."""
    time.sleep(delay)
    pair.host.control(codec.encode(codec.EndOrder(DOT, 1, "moved", True, 10.0)))
    until(lambda: any(isinstance(word, codec.LifeEnded) for word in pair.nest.words), "it has ended")
    (ended,) = [word for word in pair.nest.words if isinstance(word, codec.LifeEnded)]
    folder.mkdir()
    after = Pair(folder, wire, cls, is_async=is_async_bird, name="h2", state=ended.state)
    pair.also(after)
    return after


class Moving(Source):
    """Its state moves along."""

    def hand_over(self):
        return self.got

    def take_over(self, got):
        self.got = got


class AsyncMoving(AsyncSource):
    def hand_over(self):
        return self.got

    def take_over(self, got):
        self.got = got


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("cls", [Moving, AsyncMoving])
def test_nothing_is_lost_doubled_or_disordered_by_a_move(tmp_path, way, cls, delay):
    """C2: casts, of which few are answered, futures, and coroutines of several callers, over a move in the middle."""
    is_async_bird = cls is AsyncMoving
    pair = Pair(tmp_path / "1", way, cls, is_async=is_async_bird, call_timeout=20.0)
    count, wrong, sent = (1500 if way == "ray" else 4000), [], threading.Barrier(4)

    def threads(k):
        sent.wait()
        futures = []
        for n in range(count):
            try:
                if n % 4:
                    pair.cast("put", (k, n))
                else:
                    futures.append((n, pair.future("put", (k, n), timeout=20.0)))
            except errors.MailboxFull as error:
                wrong.append(error)
        wrong.extend((k, n, got) for n, future in futures if (got := future.result(20)) != (k, n))

    def loops(k):
        async def go():
            sent.wait()
            for n in range(0, count, 100):
                got = await asyncio.gather(*(pair.aio("put", (k, n + i), timeout=20.0) for i in range(100)))
                if got != [(k, n + i) for i in range(100)]:
                    wrong.append((k, n))

        asyncio.run(go())

    workers = [threading.Thread(target=work, args=(k,)) for k, work in enumerate((threads, threads, loops))]
    for worker in workers:
        worker.start()
    sent.wait()
    after = move(pair, tmp_path / "2", way, cls, is_async_bird, delay)
    for worker in workers:
        worker.join(40)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong, wrong[:3]
    until(lambda: all(lane.idle for lane in pair.client._lanes), "all is delivered")
    got = list(pair.call("everything"))
    for k in range(3):
        assert [n for who, n in got if who == k] == list(range(count)), f"caller {k}"
    pair.close()
    after.close()


# What a hostile reader found


class Topic:
    """Subscribers wait for ever, as long as nobody publishes."""

    def __init__(self):
        self.queues = []

    async def subscribe(self):
        queue = asyncio.Queue()
        self.queues.append(queue)
        LOG.append("begun")
        try:
            while True:
                yield await queue.get()
        finally:
            self.queues.remove(queue)
            LOG.append("closed")

    async def publish(self, what):
        for queue in self.queues:
            queue.put_nowait(what)
        return len(self.queues)

    async def on_stop(self, reason):
        LOG.append(reason)


@pytest.fixture
def topic(tmp_path):
    made = Pair(tmp_path, "unix", Topic, is_async=True, slots=2)
    yield made
    made.close()


def test_idle_subscribers_take_nobodys_place(topic):
    streams = [topic.stream("subscribe", timeout=None) for _ in range(10)]
    until(lambda: LOG.count("begun") == 10, "they listen")
    assert topic.call("publish", "news") == 10
    assert [next(stream) for stream in streams] == ["news"] * 10


def test_closing_a_stream_that_waits_ends_its_generator(topic):
    stream = topic.stream("subscribe")
    until(lambda: LOG == ["begun"], "it listens")
    topic.call("publish", "news")
    assert next(stream) == "news"
    stream.close()
    until(lambda: LOG == ["begun", "closed"], "it is closed though no item came")
    assert topic.call("publish", "more") == 0


def test_a_caller_that_goes_away_closes_a_stream_that_waits(topic):
    stream = topic.stream("subscribe")
    until(lambda: LOG == ["begun"], "it listens")
    topic.break_connections()
    until(lambda: "closed" in LOG, "it is closed")
    stream.close()


def test_a_stream_whose_caller_leaves_before_it_begins_is_closed(tmp_path):
    pair = Pair(tmp_path, "unix", Slow, is_async=False)
    pair.cast("put", 1, 0.3)
    stream = pair.stream("count_on")
    time.sleep(0.1)  # its call waits for its turn
    pair.break_connections()
    with pytest.raises(errors.BirdUnavailable):
        next(stream)
    until(lambda: "let go" in LOG, "its generator is dropped")
    assert not pair.host.readings._open
    pair.close()


def test_a_bird_ends_in_good_order_though_somebody_listens(topic):
    stream = topic.stream("subscribe")
    until(lambda: LOG == ["begun"], "it listens")
    topic.host.control(wire.encode(wire.EndOrder(DOT, 1, "stopped", False, 5.0)))
    until(lambda: LOG == ["begun", "closed", "stopped"], "its generators are closed, and then on_stop runs")
    with pytest.raises(errors.FlockError):
        next(stream)


def test_a_stream_of_a_bird_with_several_threads_is_made_by_one_at_a_time(tmp_path, way):
    pair = Pair(tmp_path, way, Source, slots=3)
    for _ in range(3):
        assert list(pair.stream("count", 40, 0.003)) == list(range(40))
    slow = pair.stream("count", 10**9, 0.02)
    assert next(slow) == 0
    slow.close()
    until(lambda: LOG.count("closed") == 4, "it is closed while it runs")
    pair.close()


def test_a_pull_has_room_in_a_full_mailbox(tmp_path):
    pair = Pair(tmp_path, "unix", Source, mailbox=1)
    stream = pair.stream("count", 200)
    assert next(stream) == 0
    holding = pair.future("hold")
    until(lambda: "holds" in LOG, "it holds")
    waiting = pair.future("put", 1)
    threading.Timer(0.1, GO.set).start()
    assert list(stream) == list(range(1, 200))
    assert holding.result(5) is None
    assert waiting.result(5) == 1
    pair.close()


@pytest.mark.parametrize("again", range(3))
def test_all_who_ask_a_future_are_told(tmp_path, again):
    pair = Pair(tmp_path, "unix", Source)
    holding, told, got = pair.future("hold"), threading.Event(), []
    until(lambda: "holds" in LOG, "it holds")
    future = pair.future("put", 7)
    future.add_done_callback(lambda _: told.set())
    askers = [threading.Thread(target=lambda: got.append(future.result(5))) for _ in range(4)]
    waiter = threading.Thread(target=lambda: got.append(len(concurrent.futures.wait([future], 5).done)))
    for thread in (*askers, waiter):
        thread.start()
    with pytest.raises(TimeoutError):
        future.result(0.05)
    began = time.monotonic()
    GO.set()
    for thread in (*askers, waiter):
        thread.join(5)
    assert sorted(got) == [1, 7, 7, 7, 7]
    assert told.wait(5)
    assert time.monotonic() - began < 0.8
    assert holding.result(5) is None
    pair.close()


def test_a_watched_future_can_be_cancelled(tmp_path):
    pair = Pair(tmp_path, "unix", Source)
    holding = pair.future("hold")
    future, told = pair.future("put", 1), []
    future.add_done_callback(lambda one: told.append(one.cancelled()))
    assert not future.done()
    assert future.cancel()
    assert future.cancel()
    until(lambda: told == [True], "it is told")
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(5)

    async def go():
        wrapped = asyncio.wrap_future(pair.future("put", 2))
        await asyncio.sleep(0.05)
        wrapped.cancel()
        await asyncio.sleep(0.05)
        return wrapped.cancelled()

    assert asyncio.run(go())
    GO.set()
    assert holding.result(5) is None
    assert pair.call("everything") == []
    pair.close()


def test_a_result_that_nobody_fetched_in_time_is_gone_and_its_method_does_not_run_again(tmp_path, monkeypatch):
    from flock_ray.runtime import host

    monkeypatch.setattr(host, "PARCELS_KEPT", 0.05)
    pair = Pair(tmp_path, "unix", Source)
    threads = threading.active_count()
    first = wire.decode(pair.host.framed(bytes(2_000_000)))[0]
    assert first.kind == "parcel"
    time.sleep(0.1)
    for _ in range(50):
        pair.host.framed(bytes(2_000_000))
    assert threading.active_count() <= threads, "what waits to be fetched costs no thread"
    answer = wire.decode(pair.host.fetch(first.text))[0]
    assert (answer.kind, answer.error) == ("refused", "BirdUnavailable"), "`moved` would have it run again"
    pair.close()


class Exits:
    """Ends whoever unpickles it."""

    def __reduce__(self):
        return (exit, (3,))


def test_arguments_that_raise_what_is_no_exception_harm_their_caller_only(pair):
    with pytest.raises(errors.RemoteError, match="cannot unpickle the arguments"):
        pair.call("put", Exits())
    assert pair.call("put", 1) == 1
