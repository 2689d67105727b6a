"""Orders to the processes of hosts: of light birds those that come together go together, and in order."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest
import ray

from flock_ray.config import Config
from flock_ray.core import effects as do
from flock_ray.core import wire
from flock_ray.runtime import cluster, hosts
from flock_ray.runtime import processes as processes_module
from flock_ray.runtime.processes import Kind, Process, Processes
from flock_ray.specs import Dot, Life, Options, Spec, Stamp

ME = Life("a", 1)


def order(n: int) -> wire.HatchOrder:
    spec = Spec("m", "C", "d", b"", Options(light=True), None, Stamp(0, 0), "r")
    return wire.HatchOrder("default", f"bird-{n}", Dot(ME, n), 1, spec, b"class", 0, 0, None, False)


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "session_directory", lambda life: tmp_path)
    return SimpleNamespace(flock="default", life="0", secret=b"", config=Config())


def sent_by(processes, monkeypatch):
    """What is sent, one by one."""
    sent = []
    monkeypatch.setattr(processes, "_send", lambda process, order: sent.append(order))
    return sent


def test_orders_to_a_host_of_light_birds_go_together_and_in_order(record, monkeypatch):
    async def go():
        processes = Processes(record, "a", None, None, None)
        sent = sent_by(processes, monkeypatch)
        light = Process("light:1", Kind("", light=True), ready=True)
        orders = [
            order(1),
            wire.EndOrder(Dot(ME, 9), 1, "moved", True, 1.0),
            order(2),
            wire.ForgetOrder(Dot(ME, 8)),
            wire.ForgetOrder(Dot(ME, 8)),
        ]
        for one in orders:
            processes.order(light, one)
        assert not sent
        await asyncio.sleep(0)
        assert sent == [wire.Orders(tuple(orders))]
        processes.order(light, order(3))
        await asyncio.sleep(0)
        assert sent[1:] == [wire.Orders((order(3),))], "none goes twice"

    asyncio.run(go())


def test_orders_wait_until_the_process_is_there(record, monkeypatch):
    async def go():
        processes = Processes(record, "a", None, None, None)
        sent = sent_by(processes, monkeypatch)
        light = Process("light:1", Kind("", light=True))
        processes.order(light, order(1))
        await asyncio.sleep(0)
        assert not sent
        light.ready = True
        processes.flush(light)
        assert sent == [wire.Orders((order(1),))]
        processes.flush(light)
        assert len(sent) == 1

    asyncio.run(go())


def test_orders_to_a_host_of_one_bird_go_at_once(record, monkeypatch):
    processes = Processes(record, "a", None, None, None)
    sent = sent_by(processes, monkeypatch)
    processes.order(Process("host:1", Kind("")), order(1))
    assert sent == [order(1)]


def test_an_order_to_hatch_that_was_not_sent_is_taken_back(record, monkeypatch):
    async def go():
        told = []
        nest = hosts.Hosts(record, partial(Processes, record, "a", None, None), lambda *events: told.extend(events), None)
        light = Process("light:1", Kind("", light=True), ready=True)
        monkeypatch.setattr(nest, "_light_host", lambda kind: light)
        sent = sent_by(nest._processes, monkeypatch)
        for n in (1, 2):
            one = order(n)
            nest.hatch(do.Hatch(one.name, one.dot, one.born, one.spec, one.code, 0, 0, None, False))
        nest.end(do.EndLife(Dot(ME, 1), 1, "stopped", False, 5.0))
        await asyncio.sleep(0)
        assert told == [wire.LifeEnded(Dot(ME, 1), 1)]
        assert [[one.dot.counter for one in orders.orders] for orders in sent] == [[2]]
        nest.end(do.EndLife(Dot(ME, 2), 1, "stopped", False, 5.0))
        await asyncio.sleep(0)
        assert sent[1:] == [wire.Orders((wire.EndOrder(Dot(ME, 2), 1, "stopped", False, 5.0),))]

    asyncio.run(go())


def test_a_life_whose_process_ray_was_not_asked_for_yet_ends_at_once(record, monkeypatch):
    """On the side of a split without the head such a request waits for the heal; by then the bird ran elsewhere, and was not found."""

    async def go():
        told, asked, killed, heal = [], [], [], asyncio.Event()

        async def in_thread(work, *args):
            if getattr(work, "func", work) is cluster.start_host:
                await heal.wait()
                return SimpleNamespace(hatch=SimpleNamespace(remote=asked.append))
            return killed.append(work)

        nest = hosts.Hosts(record, partial(Processes, record, "a", None, in_thread), lambda *events: told.extend(events), None)
        one = order(1)
        own = one.spec._replace(options=Options())
        nest.hatch(do.Hatch(one.name, one.dot, one.born, own, one.code, 0, 0, None, False))
        await asyncio.sleep(0)
        nest.end(do.EndLife(one.dot, one.born, "moved", False, 5.0))
        assert [type(word) for word in told] == [wire.LifeCrashed]
        heal.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(killed) == 1 and not asked, "what comes of it late gets no order"

    asyncio.run(go())


def test_that_the_head_is_away_is_no_crash(record, monkeypatch):
    """Ray raises after a minute without a head. Each time counted as a crash: after a GCS was away for 130 s birds had two more."""
    tries, gone, given = [], [], []
    monkeypatch.setattr(processes_module, "AGAIN", 0.0)

    class Hatch:
        async def remote(self, order):
            given.append(order)

    def start_host(name, *_, again=False):
        tries.append((name, again))
        if len(tries) < 4:
            raise (ray.exceptions.GetTimeoutError if len(tries) == 1 else ray.exceptions.RpcError)("the head is away")
        return SimpleNamespace(hatch=Hatch())

    async def in_thread(work, *args):
        return work(*args)

    async def go(killed_for=""):
        processes = Processes(record, "a", None, in_thread, lambda process, why: gone.append(why))
        process = processes.new(Kind(""), Options(), order(1))
        process.killed_for = killed_for
        async with asyncio.timeout(10):
            while not process.ready and not gone:
                await asyncio.sleep(0)
        return process

    monkeypatch.setattr(cluster, "start_host", start_host)
    process = asyncio.run(go())
    assert tries == [(process.host, False), (process.host, True), (process.host, True), (process.host, True)], (
        "an earlier try may have come"
    )
    assert not gone
    assert len(given) == 1
    tries.clear()
    asyncio.run(go("its start took too long"))
    assert len(tries) == 1
    assert gone == ["its start took too long"]
