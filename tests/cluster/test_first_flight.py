"""The public API on a real cluster of three raylets: every way to start, call, cast, ask and stop."""

from __future__ import annotations

import asyncio
import pickle

import pytest
import ray

import flock_ray
from tests.cluster import birds
from tests.support.waiting import eventually


def test_start_call_cast_stop(flyground, name):
    bird = flock_ray.start(name, birds.Counter, 10)
    assert flock_ray.call(name, "add", 5) == 15
    assert flock_ray.cast(name, "add", 5) is None
    assert flock_ray.call(bird, birds.Counter.add, 5) == 25
    flock_ray.stop(name)
    assert not flock_ray.alive(name)
    with pytest.raises(flock_ray.BirdNotFound, match=name):
        flock_ray.call(name, "add")


def test_the_handle_calls_casts_and_gives_futures(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    assert bird.add(5) == 5
    bird.add.cast(5)
    assert bird.add.future(5).result(30) == 15
    assert bird.add.options(timeout=60, retry=True)(5) == 20

    async def ask() -> int:
        return await bird.add.aio(5)

    assert asyncio.run(ask()) == 25
    copy = pickle.loads(pickle.dumps(bird))
    assert copy == bird
    assert copy.get() == 25
    assert bird.name == name
    assert "add" in dir(bird)


def test_messages_of_one_caller_are_begun_in_order(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    for _ in range(50):
        bird.add.cast(1)
    assert bird.get() == 50
    assert [future.result(30) for future in [bird.add.future(1) for _ in range(50)]] == list(range(51, 101))


@pytest.mark.parametrize(
    ("cls", "args", "method", "result"),
    [
        (birds.Slotted, (4,), "double", 8),
        (birds.Box[str], ("hi",), "get", "hi"),
        (birds.Decorated, (), "get", 7),
        (birds.Async, (), "sync", "sync"),
    ],
    ids=["slots", "generic", "ray.remote", "async"],
)
def test_classes_are_used_unchanged(flyground, name, cls, args, method, result):
    flock_ray.start(name, cls, *args)
    assert flock_ray.call(name, method) == result


def test_a_class_in_a_closure_takes_along_what_it_closes_over(flyground, name):
    factor = 6

    class Inner:
        def times(self, k: int) -> int:
            return factor * k

    flock_ray.start(name, Inner)
    assert flock_ray.call(name, "times", 7) == 42


def test_async_methods_interleave(flyground, name):
    bird = flock_ray.start(name, birds.Async)
    futures = [bird.nap.future(0.3) for _ in range(5)]
    assert max(future.result(30) for future in futures) == 5


def test_it_works_the_same_from_a_task_an_actor_and_a_bird(flyground, name):
    flock_ray.start(name, birds.Counter, 1)

    @ray.remote(num_cpus=0)
    def task() -> int:
        flock_ray.start(name + "/task", birds.Counter, 5)
        flock_ray.stop(name + "/task")
        return flock_ray.call(name, "add", 1)

    @ray.remote(num_cpus=0)
    class Actor:
        def ask(self) -> int:
            return flock_ray.call(name, "add", 1)

    assert ray.get(task.remote()) == 2
    actor = Actor.remote()
    assert ray.get(actor.ask.remote()) == 3
    flock_ray.start(name + "/caller", birds.Caller)
    assert flock_ray.call(name + "/caller", "call", name, "add", 1) == 4
    flock_ray.call(name + "/caller", "start", name + "/child")
    assert flock_ray.call(name + "/child", "get") == 3
    for child in ("/caller", "/child"):
        flock_ray.stop(name + child)


def test_a_call_from_another_node_right_after_the_start_finds_the_bird(flyground, name):
    """10 of 10; in Flock 6 of 10 did not (RAY_FACTS)."""

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def ask(i: int) -> int:
        return flock_ray.call(f"{name}/{i}", "get", timeout=60)

    for i in range(5):
        flock_ray.start(f"{name}/{i}", birds.Counter, i)
    assert ray.get([ask.remote(i) for i in range(5)]) == list(range(5))
    for i in range(5):
        flock_ray.stop(f"{name}/{i}")


@pytest.mark.own_process("what it says of one")
def test_what_the_flock_knows(flyground, name):
    flock_ray.start((name, 1), birds.Counter)
    flock_ray.start((name, 2), birds.Counter)
    flock_ray.wait([(name, 1), (name, 2)], timeout=60)
    info = flock_ray.info((name, 1))
    assert (info.state, info.restarts, info.light) == ("running", 0, False)
    assert flock_ray.where((name, 1)) == info.node_id == flock_ray.call((name, 1), "where")
    assert {bird.name for bird in flock_ray.birds(prefix=(name,), state="running")} == {(name, 1), (name, 2)}
    assert flock_ray.bird((name, 1)).get() == 0
    assert flock_ray.count() >= 2
    nests = flock_ray.nests()
    assert sum(nest.share for nest in nests) == pytest.approx(1.0)
    assert info.node_id in {nest.node_id for nest in nests}
    for i in (1, 2):
        flock_ray.stop((name, i))
    with pytest.raises(flock_ray.BirdNotFound):
        flock_ray.where((name, 1))


def test_if_exists_and_a_taken_name(flyground, name):
    first = flock_ray.start(name, birds.Counter, 1)
    with pytest.raises(flock_ray.BirdExists, match=name):
        flock_ray.start(name, birds.Counter, 1)
    assert flock_ray.options(if_exists="ok").start(name, birds.Counter, 1) == first
    with pytest.raises(flock_ray.BirdExists):
        flock_ray.options(if_exists="ok").start(name, birds.Counter, 2)


def test_a_start_acknowledged_by_a_peer(flyground, name):
    assert flock_ray.options(ack="peer").start(name, birds.Counter, 3).get() == 3


def test_timers_are_messages_to_oneself(flyground, name):
    flock_ray.start(name, birds.Ticker)
    eventually(lambda: flock_ray.call(name, "seen") > 104, "ticks and one of a hundred")


def test_leaving_answers_and_frees_the_name(flyground, name):
    flock_ray.start(name, birds.Counter)
    assert flock_ray.call(name, "retire") == "bye"
    flock_ray.wait(name, "gone", timeout=30)
    assert not flock_ray.alive(name)


def test_restart_gives_a_new_life_in_place(flyground, name):
    bird = flock_ray.start(name, birds.Counter, 5)
    assert bird.add(1) == 6
    before = flock_ray.info(name)
    flock_ray.restart(name)
    eventually(lambda: flock_ray.info(name).incarnation > before.incarnation and flock_ray.info(name).state == "running", "a new life")
    assert bird.get() == 5
    assert flock_ray.info(name).node_id == before.node_id


def test_stop_runs_on_stop(flyground, name, tmp_path):
    path = tmp_path / "witness"
    flock_ray.start(name, birds.Witness, str(path))
    flock_ray.wait(name, timeout=60)
    flock_ray.stop(name)
    eventually(lambda: path.read_text().splitlines() == ["init", "on_stop stopped"], "init, then on_stop")


def test_large_arguments_results_and_object_refs(flyground, name):
    numpy = pytest.importorskip("numpy")
    big = numpy.arange(1_000_000)

    class Store:
        def keep(self, value):
            self.value = value
            return int(value.sum())

        def give(self):
            return self.value

    bird = flock_ray.start(name, Store)
    assert bird.keep(big) == int(big.sum())
    assert (bird.give() == big).all()
    assert bird.keep(ray.put(big)) == int(big.sum())


def test_names_of_every_kind(flyground):
    import uuid

    for own in ("é/ü 1", 12345, b"\x00bytes", uuid.UUID(int=5), ("room", 1, (b"x", "y"))):
        flock_ray.start(own, birds.Counter, 2)
        assert flock_ray.call(own, "get") == 2
        flock_ray.stop(own)
