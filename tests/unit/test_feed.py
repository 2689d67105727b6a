"""`events()` over nests that answer late, break and come back, without Ray: what they notice comes once, and who waits is not held up."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time

import pytest

import flock_ray
from flock_ray.core.board import UNREAD, Board
from flock_ray.errors import FlockNotRunning
from flock_ray.notices import BirdNotice, BirdStarted, Missed, NestReady, Notice
from flock_ray.runtime import feed as feeds
from flock_ray.runtime.client import Client
from flock_ray.runtime.courier import Courier
from flock_ray.runtime.feed import Feed
from flock_ray.runtime.replies import Down, Raw
from flock_ray.specs import Dot, Life
from tests.support.fakelinks import FakeReply, World


class BoardNest:
    """The nest of a node, of which only its board is there."""

    def __init__(self, node: str, number: int = 1) -> None:
        self.life = Life(node, number)
        self.board = Board(self.life)
        self.broken = False
        self.reads = 0
        self._waiting: list[tuple[FakeReply, tuple]] = []

    def lost(self) -> bool:
        return self.broken

    def notice(self, name: str, at: float) -> None:
        self.board.add(BirdStarted(self.life, name, Dot(self.life, 1), 0), at)
        waiting, self._waiting = self._waiting, []
        for reply, query in waiting:
            self._answer(reply, *query)

    def _answer(self, reply: FakeReply, cursor=UNREAD, kinds=Notice, since=0.0, seconds=0.0) -> None:
        page = self.board.read(cursor, kinds, since)
        if page.notices or page.missed or page.more or not seconds:
            reply.set(Raw(pickle.dumps(page)))
        else:
            self._waiting.append((reply, (page.cursor, kinds, since, seconds)))

    def break_down(self) -> None:
        self.broken = True
        waiting, self._waiting = self._waiting, []
        for reply, _ in waiting:
            reply.set(Down("gone", ran=True))

    def read(self, query: bytes) -> FakeReply:
        self.reads += 1
        reply = FakeReply()
        if self.broken:
            reply.set(Down("gone", ran=False))
        else:
            self._answer(reply, *pickle.loads(query)[1:])
        return reply


class Nests(World):
    """A flock whose nests have boards."""

    def __init__(self, *nodes: str) -> None:
        super().__init__()
        self.there: dict[str, BoardNest] = {}
        for node in nodes:
            self.put_nest(BoardNest(node))

    def put_nest(self, nest: BoardNest) -> BoardNest:
        self.there[nest.life.node] = nest
        self.the_nest.reads["ring"] = (tuple((node, 1) for node in self.there), {})
        return nest

    def nest_on(self, flock: str, node: str, door: str) -> BoardNest:
        if self.there[node].broken:
            raise Down("gone", ran=False)
        return self.there[node]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for what, seconds in (("LOOK", 0.05), ("AGAIN", 0.05), ("PATIENCE", 0.3)):
        monkeypatch.setattr(feeds, what, seconds)


def feed_of(nests: Nests, follow: bool = True, since: float = 0.0, kinds=Notice) -> Feed:
    return Feed(Client("default", nests, Courier()), follow, since, kinds)


def names(notices) -> list[str]:
    return [getattr(notice, "name", type(notice).__name__) for notice in notices]


def test_what_was_comes_by_time_and_what_follows_as_it_comes():
    nests = Nests("a", "b")
    for at, node in enumerate("abba", 1):
        nests.there[node].notice(f"{node}{at}", at)
    feed = feed_of(nests)
    assert names(next(feed) for _ in range(4)) == ["a1", "b2", "b3", "a4"]
    nests.there["b"].notice("b5", 5)
    assert next(feed).name == "b5"
    nests.there["a"].notice("a6", 6)
    assert next(feed).name == "a6"
    feed.close()
    assert list(feed) == []


def test_without_following_it_ends_and_says_which_nest_it_could_not_read():
    nests = Nests("a", "b")
    nests.there["a"].notice("a1", 1)
    nests.there["b"].break_down()
    read = list(feed_of(nests, follow=False))
    assert sorted(names(read)) == ["Missed", "a1"]
    assert [(notice.node_id, notice.count) for notice in read if isinstance(notice, Missed)] == [("b", None)]


def test_a_nest_that_breaks_down_holds_nobody_up_and_is_read_on_where_it_was():
    nests = Nests("a", "b")
    for node in "ab":
        nests.there[node].notice(f"{node}1", 1)
    feed = feed_of(nests)
    assert sorted(names(next(feed) for _ in range(2))) == ["a1", "b1"]
    nests.there["b"].break_down()
    nests.there["a"].notice("a2", 2)
    assert next(feed).name == "a2"
    nests.there["b"].notice("b3", 3)  # it lived, and only could not be reached
    nests.there["b"].broken = False
    assert next(feed).name == "b3"


def test_a_new_nest_and_the_next_life_of_another_are_read_from_their_beginning():
    nests = Nests("a")
    nests.there["a"].notice("a1", 1)
    feed = feed_of(nests)
    assert next(feed).name == "a1"
    nests.put_nest(BoardNest("b")).notice("b2", 2)
    assert next(feed).name == "b2"
    nests.there["a"].break_down()
    nests.put_nest(BoardNest("a", 2)).notice("a3", 3)
    found = next(feed)
    assert (found.name, found.by) == ("a3", Life("a", 2))


def test_who_reads_slowly_has_a_page_of_each_nest_and_no_more(monkeypatch):
    monkeypatch.setattr("flock_ray.core.board.PAGE", 3)
    nests = Nests("a")
    for n in range(10):
        nests.there["a"].notice(f"a{n}", n)
    feed = feed_of(nests)
    assert next(feed).name == "a0"
    assert nests.there["a"].reads == 1
    assert names(next(feed) for _ in range(9)) == [f"a{n}" for n in range(1, 10)]
    assert nests.there["a"].reads >= 4


def test_a_nest_without_what_was_asked_for_is_waited_for_without_being_asked_all_the_time():
    nests = Nests("a")
    nests.there["a"].board.add(NestReady(Life("a", 1), Life("a", 1)), 1.0)
    feed = feed_of(nests, kinds=BirdNotice)
    timer = threading.Timer(0.5, lambda: nests.there["a"].notice("a2", 2))
    timer.start()
    assert next(feed).name == "a2"
    assert nests.there["a"].reads <= 3
    timer.join()


def test_to_close_it_ends_who_waits_for_it():
    feed = feed_of(Nests("a"))
    timer = threading.Timer(0.3, feed.close)
    timer.start()
    began = time.monotonic()
    assert list(feed) == []
    assert time.monotonic() - began < 5.0
    timer.join()


def test_to_cancel_one_wait_loses_nothing():
    nests = Nests("a")
    feed = feed_of(nests)

    async def read():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(feed), 0.2)
        nests.there["a"].notice("a1", 1)
        return await asyncio.wait_for(anext(feed), 10)

    assert asyncio.run(read()).name == "a1"


def test_the_end_of_the_flock_is_raised(monkeypatch):
    nests = Nests("a")
    nests.there["a"].notice("a1", 1)
    feed = feed_of(nests)
    assert next(feed).name == "a1"

    async def gone(*query):
        raise FlockNotRunning("flock 'default' is not running")

    monkeypatch.setattr(feed._client.asks, "read", gone)
    with pytest.raises(FlockNotRunning):
        next(feed)


def test_only_classes_of_notices_are_kinds():
    for wrong in (int, "BirdStarted", (BirdStarted, int), BirdStarted(Life("a", 1), "a", Dot(Life("a", 1), 1), 0)):
        with pytest.raises(TypeError, match="kinds must be a class of flock_ray.notices"):
            flock_ray.Flock("x").events(kinds=wrong)
