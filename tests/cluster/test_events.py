"""`events()` on real raylets: one stream of what all nests notice, also of nests that come and go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest

import flock_ray
from flock_ray import notices
from tests.cluster import birds
from tests.cluster.test_promises import owners
from tests.support.waiting import eventually


class Hopeless:
    def __init__(self) -> None:
        raise ValueError("no wings")


class Reading:
    """Reads a feed on a thread, until it is over."""

    def __init__(self, **given):
        self.seen = []
        self.error = None
        self.feed = flock_ray.events(**given)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            for notice in self.feed:
                self.seen.append(notice)
        except Exception as error:
            self.error = error

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.feed.close()
        self._thread.join(30)
        assert not self._thread.is_alive(), "to close it ends who reads it"
        assert self.error is None

    def of(self, name):
        return [notice for notice in self.seen if isinstance(notice, notices.BirdNotice) and notice.name == name]

    def kinds_of(self, name):
        return [type(notice) for notice in self.of(name)]

    def nests(self, kind, node):
        """Who has told this of the nest of a node."""
        return {notice.node_id for notice in self.seen if isinstance(notice, kind) and notice.life.node == node}

    def is_in_order(self):
        """Nothing came twice, and each nest's in its order."""
        of_birds = Counter(notice for notice in self.seen if isinstance(notice, notices.BirdNotice))
        assert max(of_birds.values()) == 1, of_birds.most_common(3)
        for by in {notice.by for notice in self.seen}:
            times = [notice.time for notice in self.seen if notice.by == by]
            assert times == sorted(times)
        return True


def one_of_each_node(name):
    """A name for each node, that it owns."""
    found = {}
    for own, node in owners([f"{name}/{i}" for i in range(200)]).items():
        found.setdefault(node, own)
    return found


def test_the_lives_of_birds_on_all_nodes_are_told_in_order(flyground, name):
    names = one_of_each_node(name)
    assert len(names) == 3
    began = time.time()
    with Reading(since=began) as reading:
        for own in names.values():
            flock_ray.start(own, birds.Counter)
            assert flock_ray.call(own, "get", timeout=60) == 0
            with pytest.raises(flock_ray.FlockError):
                flock_ray.call(own, "die")
            assert flock_ray.call(own, "get", timeout=60) == 0
            flock_ray.restart(own)
            eventually(lambda own=own: flock_ray.info(own).incarnation == 3, "its next life")
            flock_ray.wait(own, timeout=60)
            flock_ray.stop(own)
        lives = [notices.BirdStarted, notices.BirdRunning, notices.BirdCrashed, notices.BirdRestarted, notices.BirdRunning]
        lives += [notices.BirdRestarted, notices.BirdRunning, notices.BirdStopped]
        for node, own in names.items():
            eventually(lambda own=own: len(reading.kinds_of(own)) == len(lives), f"all of {own}")
            assert Counter(reading.kinds_of(own)) == Counter(lives)
            there = [notice for notice in reading.of(own) if not isinstance(notice, notices.BirdStarted)]
            assert [type(notice) for notice in there] == lives[1:]
            assert {notice.node_id for notice in there} == {node}
            assert [notice.incarnation for notice in there] == [1, 1, 2, 2, 3, 3, 3]
        assert reading.is_in_order()
        assert all(began <= notice.time <= time.time() for notice in reading.seen)
    again = [notice for notice in flock_ray.events(follow=False, since=began) if getattr(notice, "name", None) in names.values()]
    assert sorted(again, key=repr) == sorted((n for n in reading.seen if getattr(n, "name", None) in names.values()), key=repr)
    assert [notice.time for notice in again] == sorted(notice.time for notice in again), "what is past comes by its time"


def test_a_bird_that_fails_is_told_with_its_error(flyground, name):
    with Reading(since=time.time(), kinds=(notices.BirdCrashed, notices.BirdFailed)) as reading:
        flock_ray.options(max_restarts=1).start(name, Hopeless)
        eventually(lambda: notices.BirdFailed in reading.kinds_of(name), "it has failed")
        assert reading.kinds_of(name) == [notices.BirdCrashed, notices.BirdCrashed, notices.BirdFailed]
        assert all("no wings" in notice.error for notice in reading.seen if isinstance(notice, notices.BirdCrashed | notices.BirdFailed))


def test_an_event_loop_reads_it_too(flyground, name):
    async def read():
        flock_ray.start(name, birds.Counter)
        found = []
        async for notice in flock_ray.aio.events(kinds=notices.BirdNotice):
            if isinstance(notice, notices.BirdNotice) and notice.name == name:
                found.append(type(notice))
            if notices.BirdRunning in found:
                break
        return found

    assert asyncio.run(asyncio.wait_for(read(), 60)) == [notices.BirdStarted, notices.BirdRunning]


def test_what_is_no_kind_of_notice_is_refused(flyground):
    with pytest.raises(TypeError, match="kinds must be"):
        flock_ray.events(kinds=birds.Counter)


def test_nests_that_come_and_go_are_followed_and_each_move_is_told_once(flyground, name):
    names = [f"{name}/{i}" for i in range(60)]
    with Reading(since=time.time()) as reading:
        flock_ray.options(light=True).start_many([(own, birds.Counter) for own in names])
        flock_ray.wait(names, timeout=120)
        before = {info.name: info.node_id for info in flock_ray.birds(prefix=f"{name}/")}
        node = flyground.add()
        others = {nest.node_id for nest in flock_ray.nests()} - {node.node_id}
        eventually(lambda: reading.nests(notices.NestJoined, node.node_id) == others, "all nests have told that it has joined")
        eventually(lambda: reading.nests(notices.NestReady, node.node_id) == {node.node_id}, "and its own nest that it acts")

        def moved():
            return [notice for notice in reading.seen if isinstance(notice, notices.BirdMoved) and notice.name in names]

        there = {own for own, owner in owners(names).items() if owner == node.node_id}
        assert there, "of sixty names it has some"
        eventually(lambda: {notice.name for notice in moved()} == there, f"{there} have moved to it")
        assert [(notice.node_id, notice.source) for notice in moved()] == [(node.node_id, before[notice.name]) for notice in moved()]
        flock_ray.wait(names, timeout=60)
        flyground.crash(node)
        eventually(lambda: reading.nests(notices.NestLeft, node.node_id) >= others, "all nests have told that it has left")
        eventually(lambda: {notice.name for notice in moved() if notice.source == node.node_id} == there, f"{there} have moved from it")
        assert len(moved()) == 2 * len(there), "each move is told once"
        assert reading.is_in_order()
    flock_ray.stop_many(names)


def test_who_reads_learns_of_the_end_of_the_flock(flyground):
    other = flock_ray.Flock("other")
    other.init()
    feed = other.events()
    assert isinstance(next(feed), notices.Notice)
    other.destroy()
    with pytest.raises(flock_ray.FlockNotRunning):
        for _ in feed:
            pass
