"""What a host promises, in one process: a fake nest takes its words, Ray is not started."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from ray import cloudpickle

from flock_ray.core.wire import (
    Answer,
    Call,
    EndOrder,
    ForgetOrder,
    HatchOrder,
    HostReport,
    HostUp,
    LeaveOrder,
    LifeCrashed,
    LifeEnded,
    LifeExited,
    LifeRunning,
    RaiseOrder,
    ReportOrder,
    Welcome,
    Withdraw,
    Words,
    decode,
    encode,
)
from flock_ray.runtime import host as host_module
from flock_ray.runtime import inside, tether
from flock_ray.runtime.host import Host, HostBoot, name_records
from flock_ray.runtime.life import describe, is_async, load_class
from flock_ray.runtime.life_async import AsyncHost, AsyncLife
from flock_ray.runtime.life_sync import SyncHost, SyncLife
from flock_ray.runtime.mailbox import LoopOrder, ThreadOrder, Turns
from flock_ray.runtime.payload import pack, unpack
from flock_ray.runtime.tether import NestAwayError
from flock_ray.runtime.timers import Scheduler
from flock_ray.specs import Dot, Life, Options, Spec, Stamp

NEST = Life("node", 2)
DOT = Dot(Life("node", 1), 7)


def until(true, what, seconds=5.0):
    """Waits for a condition; says what was expected when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.005)


class FakeNest:
    """Takes words as a nest does; `away` makes it unreachable, `welcomes` adopts."""

    def __init__(self):
        self.words = []
        self.away = False
        self.welcomes = True
        self.process = os.getpid()
        self.nobody_else = False

    def say(self, word, timeout):
        if self.away:
            raise NestAwayError
        word = pickle.loads(word)
        self.words += word.words if isinstance(word, Words) else [word]
        return pickle.dumps(Welcome(NEST)) if isinstance(word, HostReport) and self.welcomes else None

    def pid(self, timeout):
        if self.away:
            raise NestAwayError
        return self.process

    def alone(self, timeout):
        if self.away:
            raise NestAwayError
        return self.nobody_else

    def heard(self, *kinds):
        return [word for word in list(self.words) if isinstance(word, kinds)]


class Ended:
    """Stands for the end of the process."""

    def __init__(self):
        self.codes = []

    def __call__(self, code):
        self.codes.append(code)


class Bench:
    """A host with its nest, and the caller's side of calls."""

    def __init__(self, directory, **boot):
        self.nest = FakeNest()
        self.ended = Ended()
        given = {"nest_grace": 10.0, "nest_pid": os.getpid(), "nest": Life("node", 1), **boot}
        self.boot = HostBoot("h1", "default", "life", directory=str(directory), **given)
        self.host = Host(self.boot, self.nest, "node", None, self.ended)
        self.counts = {}

    def order(self, cls, *args, state=None, has_state=False, name="tweety", **options):
        spec = Spec("m", "C", "digest", pickle.dumps((args, {})), Options(**options), None, Stamp(0, 0), "r")
        return HatchOrder("default", name, DOT, 1, spec, cloudpickle.dumps(cls), 0, 0, state, has_state)

    def hatch(self, cls, *args, **kwargs):
        self.host.accept(self.order(cls, *args, **kwargs), SyncLife).hatch()
        return self

    async def hatch_async(self, cls, *args, **kwargs):
        await self.host.accept(self.order(cls, *args, **kwargs), AsyncLife).hatch()
        return self

    def message(self, method, *args, caller="me", cast=False, order=None, stream=False, **kwargs):
        if order is None:
            order = self.counts[caller] = self.counts.get(caller, -1) + 1
        body, extra = pack((args, kwargs), what="arguments")
        return Call(caller, DOT, method, (), cast, stream), order, memoryview(body), extra

    def call(self, method, *args, **kwargs):
        return read(self.host.life.call(*self.message(method, *args, **kwargs)))

    async def acall(self, method, *args, **kwargs):
        return read(await self.host.life.call(*self.message(method, *args, **kwargs)))

    def begin(self, method, *args, **kwargs):
        """A call in a thread of its own: the thread, and the list its answer will be in."""
        message, answers = self.message(method, *args, **kwargs), []
        thread = threading.Thread(target=lambda: answers.append(read(self.host.life.call(*message))), daemon=True)
        thread.start()
        return thread, answers

    def control(self, head):
        return self.host.control(encode(head))

    def hears(self, *kinds):
        until(lambda: self.nest.heard(*kinds), lambda: f"{kinds}, heard {self.nest.words}")
        return self.nest.heard(*kinds)[-1]


def read(answer):
    """An answer as (kind, what), where what is a result, an exception, or the `Answer` itself."""
    message, *extra = answer if isinstance(answer, tuple) else (answer,)
    if not message:
        return None
    head, body = decode(message)
    return (head.kind, unpack(body, extra)) if len(body) else (head.kind, head)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "hosts")


class Counter:
    seen: list = []

    def __init__(self, start=0):
        self.n = start
        self.lines = []

    def add(self, k=1):
        self.n += k
        return self.n

    def boom(self, text="bad"):
        raise ValueError(text)

    def quit(self):
        raise SystemExit(3)

    def lock(self):
        return threading.Lock()

    def strange(self):
        raise StrangeError("a", "b")

    def numbers(self):
        yield 1

    def wait(self, begun, go):
        GATES[begun].set()
        GATES[go].wait(5)
        return "waited"

    def note(self, line):
        self.lines.append(line)

    def read(self):
        return self.lines

    def me(self):
        return inside.me(), inside.current_flock(), inside.current_chain(), inside.in_async_method()

    def later(self, seconds, method, *args):
        inside.send_after(seconds, method, *args)

    def every(self, seconds, method, *args):
        self.timer = inside.send_every(seconds, method, *args)

    def cancel(self):
        self.timer.cancel()

    def go(self, reason):
        inside.leave(reason, "ciao")

    def _private(self):
        self.lines.append("private")


class Parting(Counter):
    def on_stop(self, reason):
        ENDS.append(reason)

    def hand_over(self):
        return self.n

    def take_over(self, n):
        self.n = n


class StrangeError(Exception):
    def __init__(self, a, b):
        super().__init__(a)


GATES: dict = {}
ENDS: list = []


@pytest.fixture(autouse=True)
def fresh():
    GATES.clear()
    GATES.update({name: threading.Event() for name in ("begun", "go", "begun2", "go2")})
    ENDS.clear()


# Beginning


def test_a_host_says_that_it_is_up_and_then_that_its_bird_runs(bench):
    bench.hatch(Counter)
    bench.hears(LifeRunning)
    assert bench.nest.words == [HostUp("h1", os.getpid()), LifeRunning(DOT, 1, "h1")]


def test_a_host_is_found_by_a_file_with_its_pid_and_start_time_until_it_ends(bench):
    (path,) = os.scandir(bench.boot.directory)
    assert path.name == f"{os.getpid()}.json"
    assert os.stat(bench.boot.directory).st_mode & 0o077 == 0
    with open(path) as file:
        assert json.load(file) == {"pid": os.getpid(), "started": tether.started(os.getpid()), "host": "h1"}
    bench.host._exit(0)
    assert os.listdir(bench.boot.directory) == []


@pytest.fixture
def spare(bench):
    """A host that waits for a bird, on a thread as Ray's."""
    bench.host = SyncHost(bench.boot, bench.nest, "node", None, bench.ended)
    threading.Thread(target=bench.host.hatch, args=(b"",), daemon=True).start()
    return bench


def test_a_spare_runs_the_bird_that_it_is_told_to(spare):
    assert pickle.loads(spare.control(ReportOrder())) == HostUp("h1", os.getpid()), "it holds nothing"
    spare.control(spare.order(Counter))
    spare.hears(LifeRunning)
    assert spare.call("add") == ("result", 1)
    spare.control(spare.order(Parting))
    assert spare.call("add") == ("result", 2), "and no other"


def test_a_spare_that_is_not_wanted_ends(spare):
    spare.control(LeaveOrder())
    until(lambda: spare.ended.codes == [0], "the process ends")
    spare.control(spare.order(Counter))
    assert spare.host.life is None


def test_a_spare_for_birds_with_async_methods_runs_one(bench):
    async def main():
        host = bench.host = AsyncHost(bench.boot, bench.nest, "node", None, bench.ended)
        hatching = asyncio.create_task(host.hatch(b""))
        await asyncio.sleep(0.05)
        assert not hatching.done()
        bench.control(bench.order(Swift))
        await asyncio.wait_for(hatching, 5)
        assert (await bench.acall("note", "a"))[0] == "result"

    asyncio.run(main())


def test_an_init_that_raises_is_a_crash_whose_text_ends_with_type_and_message(bench):
    class Bad:
        def __init__(self):
            raise ValueError("no luck")

    bench.hatch(Bad)
    crash = bench.hears(LifeCrashed)
    assert crash.error.startswith("Traceback") and crash.error.splitlines()[-1] == "ValueError: no luck"
    assert "runtime/life" not in crash.error
    until(lambda: bench.ended.codes, "the process ends")


def test_a_system_exit_in_init_is_a_crash_too(bench):
    class Bad:
        def __init__(self):
            sys.exit(2)

    assert bench.hatch(Bad).hears(LifeCrashed).error.splitlines()[-1] == "SystemExit: 2"


def test_a_state_handed_over_is_taken_over_after_init(bench):
    bench.hatch(Parting, 3, state=pickle.dumps(41), has_state=True)
    assert bench.call("add") == ("result", 42)


def test_a_state_without_take_over_is_a_crash_that_says_so(bench):
    bench.hatch(Counter, state=pickle.dumps(41), has_state=True)
    assert "no take_over" in bench.hears(LifeCrashed).error


def test_a_class_that_ray_has_decorated_is_unwrapped():
    import ray

    class Plain:
        def add(self):
            return 1

    assert load_class(cloudpickle.dumps(ray.remote(Plain))).__mro__[1:] == (object,)


def test_a_class_with_async_methods_is_known_and_refused_by_the_sync_host(bench):
    class Swift:
        async def fly(self): ...

    assert is_async(Swift) and not is_async(Counter)
    assert "AsyncHostActor" in bench.hatch(Swift).hears(LifeCrashed).error


# Calls


def test_calls_run_and_keep_state(bench):
    bench.hatch(Counter, 10)
    assert bench.call("add", 5) == ("result", 15)
    assert bench.call("add", k=5) == ("result", 20)


def test_a_bird_lives_on_when_a_method_raises_and_the_caller_gets_the_exception(bench):
    bench.hatch(Counter)
    kind, error = bench.call("boom", "bad")
    assert kind == "raised" and isinstance(error, ValueError) and error.args == ("bad",)
    assert bench.call("add") == ("result", 1)


def test_the_remote_traceback_travels_with_the_exception(bench):
    bench.hatch(Counter)
    answer = bench.host.life.call(*bench.message("boom"))
    assert decode(answer)[0].text.splitlines()[-1] == "ValueError: bad"


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("ad", "AttributeError", "did you mean 'add'"),
        ("_private", "AttributeError", "private"),
        ("n", "AttributeError", "no method"),
        ("seen", "AttributeError", "no method"),
        ("numbers", "TypeError", "with stream instead"),
        ("lock", "TypeError", "'tweety'.lock"),
        ("strange", "RemoteError", "StrangeError: a"),
        ("quit", "RemoteError", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_called_or_answered_is_refused_with_a_reason(bench, method, error, says):
    bench.hatch(Counter)
    kind, answer = bench.call(method)
    assert (kind, answer.error) == ("refused", error)
    assert says in answer.text


def test_arguments_that_cannot_be_unpickled_are_refused(bench):
    bench.hatch(Counter)
    head, order, _, _ = bench.message("add")
    kind, answer = read(bench.host.life.call(head, order, memoryview(b"no pickle"), ()))
    assert (kind, answer.error) == ("refused", "RemoteError")
    assert "arguments of 'tweety'.add" in answer.text
    assert bench.call("add") == ("result", 1)


def test_a_cast_answers_nothing_and_its_error_is_logged_with_the_birds_name(bench, caplog):
    bench.hatch(Counter)
    assert bench.call("add", cast=True) is None
    with caplog.at_level(logging.ERROR, "flock_ray.bird"):
        assert bench.call("boom", cast=True) is None
    assert "tweety" in caplog.text and "ValueError: bad" in caplog.text


def test_with_on_error_crash_the_caller_is_answered_and_the_life_ends(bench):
    bench.hatch(Counter, on_error="crash")
    kind, error = bench.call("boom")
    assert kind == "raised" and isinstance(error, ValueError)
    assert bench.hears(LifeCrashed).error.splitlines()[-1] == "ValueError: bad"
    assert bench.call("add")[0] == "moved"
    until(lambda: bench.ended.codes == [0], "the process ends")


def test_a_system_exit_in_a_method_is_a_crash_and_does_not_end_the_caller(bench):
    bench.hatch(Counter)
    assert bench.call("quit")[0] == "refused"
    bench.hears(LifeCrashed)


def test_methods_run_one_at_a_time_and_in_the_order_of_arrival(bench):
    bench.hatch(Counter)
    first, _ = bench.begin("wait", "begun", "go")
    assert GATES["begun"].wait(5)
    later = []
    for i in range(5):
        later.append(bench.begin("note", i, caller=f"c{i}")[0])
        until(lambda i=i: bench.host.life._turns.waiting == i + 1, "it waits for its turn")
    assert bench.host.life.bird.lines == []
    GATES["go"].set()
    for thread in (first, *later):
        thread.join(5)
    assert bench.call("read") == ("result", [0, 1, 2, 3, 4])


def test_with_max_concurrency_methods_run_side_by_side(bench):
    bench.hatch(Counter, max_concurrency=2)
    first, answers = bench.begin("wait", "begun", "go", caller="a")
    assert GATES["begun"].wait(5)
    assert bench.call("add", caller="b") == ("result", 1)
    GATES["go"].set()
    first.join(5)
    assert answers == [("result", "waited")]


def test_a_withdrawn_call_is_not_run_when_its_turn_comes(bench):
    bench.hatch(Counter)
    first, _ = bench.begin("wait", "begun", "go")
    assert GATES["begun"].wait(5)
    second, answers = bench.begin("add", caller="other")
    bench.control(Withdraw("other", 0, DOT))
    GATES["go"].set()
    second.join(5)
    assert answers[0][1].error == "CallTimeout"
    assert bench.call("add") == ("result", 1)


# Inside


def test_a_bird_knows_who_it_is_and_who_waits_for_it(bench):
    bench.hatch(Counter)
    head, order, body, extra = bench.message("me")
    chained = Call(head.caller, DOT, "me", (("default", "asker"),))
    kind, (me, flock, chain, in_async) = read(bench.host.life.call(chained, order, body, extra))
    assert me == inside.Me("tweety", "node", 1) and flock == "default"
    assert chain == (("default", "asker"), ("default", "tweety")) and not in_async


def test_outside_a_bird_there_is_nobody_to_be():
    for ask in (inside.me, inside.leave, lambda: inside.send_after(1, "x")):
        with pytest.raises(RuntimeError, match="outside a bird"):
            ask()
    assert inside.current_chain() == () and inside.current_flock() is None


def test_raise_shows_in_me_and_in_the_report(bench):
    bench.hatch(Counter)
    bench.control(RaiseOrder(DOT, 1, 9))
    assert bench.call("me")[1][0].incarnation == 9
    (report,) = pickle.loads(bench.control(ReportOrder())).lives
    assert (report.born, report.incarnation, report.state) == (1, 9, "running")


def test_log_records_name_the_bird():
    old = logging.getLogRecordFactory()
    try:
        name_records()
        make = logging.getLogRecordFactory()
        assert make("x", 20, "f", 1, "m", (), None).bird is None
    finally:
        logging.setLogRecordFactory(old)


def test_messages_to_oneself_take_their_turn(bench):
    bench.hatch(Counter)
    bench.call("later", 0.0, "note", "timer")
    first, _ = bench.begin("wait", "begun", "go")
    GATES["go"].set()
    first.join(5)
    until(lambda: bench.call("read")[1] == ["timer"], "the message to itself is run")
    bench.call("later", 0.0, "_private")
    until(lambda: "private" in bench.call("read")[1], "a private method may be named")


def test_a_busy_bird_never_has_more_than_one_tick_waiting(bench):
    bench.hatch(Counter)
    bench.call("every", 0.01, "note", "tick")
    first, _ = bench.begin("wait", "begun", "go")
    assert GATES["begun"].wait(5)
    bench.host.life.bird.lines.clear()
    until(lambda: bench.host.life._turns.waiting, "a tick waits")
    time.sleep(0.1)  # ten ticks
    assert bench.host.life._turns.waiting == 1
    GATES["go"].set()
    first.join(5)
    bench.call("cancel")


def test_a_cancelled_timer_is_silent(bench):
    bench.hatch(Counter)
    bench.call("every", 0.3, "note", "tick")
    bench.call("cancel")
    time.sleep(0.5)
    assert bench.call("read") == ("result", [])


def test_a_timer_that_raises_follows_on_error(bench, caplog):
    bench.hatch(Counter, on_error="crash")
    with caplog.at_level(logging.ERROR, "flock_ray.bird"):
        bench.call("later", 0.0, "boom")
        assert "ValueError: bad" in bench.hears(LifeCrashed).error
    assert "tweety" in caplog.text


def test_a_timer_for_no_method_raises_at_once(bench):
    bench.hatch(Counter)
    kind, error = bench.call("later", 0.0, "nothing")
    assert kind == "raised" and isinstance(error, AttributeError)


def test_leaving_answers_the_caller_runs_on_stop_and_is_an_exit(bench):
    bench.hatch(Parting)
    assert bench.call("go", "normal") == ("result", "ciao")
    bench.hears(LifeExited)
    assert ENDS == ["normal"] and bench.call("add")[0] == "moved"
    assert pickle.loads(bench.control(ReportOrder())).lives[0].state == "exited"
    assert bench.ended.codes == []  # it waits for ForgetOrder


def test_leaving_for_another_reason_is_a_crash_with_that_text(bench):
    bench.hatch(Parting)
    assert bench.call("go", "tired") == ("result", "ciao")
    assert bench.hears(LifeCrashed).error == "tired" and ENDS == []


# The end


def test_an_orderly_end_waits_for_the_running_method_and_turns_the_waiting_away(bench):
    bench.hatch(Parting, 5)
    first, answers = bench.begin("wait", "begun", "go")
    assert GATES["begun"].wait(5)
    second, moved = bench.begin("add", caller="other")
    until(lambda: bench.host.life._turns.waiting, "the second call waits")
    bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
    assert ENDS == [] and bench.call("add")[0] == "moved"
    GATES["go"].set()
    for thread in (first, second):
        thread.join(5)
    assert answers == [("result", "waited")] and moved[0][0] == "moved"
    ended = bench.hears(LifeEnded)
    assert ended == LifeEnded(DOT, 1, ended.state, True) and pickle.loads(ended.state) == 5 and ENDS == ["moved"]


def test_without_keep_or_hand_over_nothing_is_kept(bench, monkeypatch):
    monkeypatch.setattr(host_module, "LINGER", 0.01)
    bench.hatch(Parting)
    bench.control(EndOrder(DOT, 1, "stopped", False, 30.0))
    assert bench.hears(LifeEnded) == LifeEnded(DOT, 1)
    until(lambda: bench.ended.codes == [0], "the process ends")


def test_a_record_is_kept_until_it_is_forgotten(bench, monkeypatch):
    monkeypatch.setattr(host_module, "LINGER", 0.01)
    bench.hatch(Parting, 5)
    bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
    bench.hears(LifeEnded)
    (report,) = pickle.loads(bench.control(ReportOrder())).lives
    assert report.state == "released" and pickle.loads(report.record.state) == 5 and report.record.life == Life("node", 1)
    assert bench.ended.codes == []
    bench.control(ForgetOrder(DOT))
    until(lambda: bench.ended.codes == [0], "the process ends")


def test_forgetting_what_another_host_kept_does_not_end_a_running_life(bench):
    bench.hatch(Counter)
    bench.control(ForgetOrder(DOT))
    assert bench.call("add") == ("result", 1) and not bench.host._leaving


def test_an_order_to_end_is_answered_each_time(bench):
    bench.hatch(Parting)
    for times in (1, 2, 3):
        bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
        until(lambda times=times: len(bench.nest.heard(LifeEnded)) == times, lambda: bench.nest.words)
    assert ENDS == ["moved"]


def test_a_life_ended_before_it_began_is_never_begun(bench):
    bench.control(EndOrder(DOT, 1, "stopped", False, 30.0))
    assert bench.hears(LifeEnded) == LifeEnded(DOT, 1)
    assert bench.host.accept(bench.order(Counter), SyncLife) is None


def test_an_on_stop_or_hand_over_that_raises_is_logged_and_nothing_is_handed_over(bench, caplog):
    class Clumsy(Counter):
        def on_stop(self, reason):
            raise ValueError("oops")

        hand_over = on_stop

    bench.hatch(Clumsy)
    with caplog.at_level(logging.ERROR, "flock_ray.bird"):
        bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
        assert bench.hears(LifeEnded) == LifeEnded(DOT, 1)
    assert "oops" in caplog.text


def test_timers_die_with_their_life(bench):
    bench.hatch(Parting)
    bench.call("every", 0.02, "note", "tick")
    bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
    bench.hears(LifeEnded)
    lines = list(bench.host.life.bird.lines)
    time.sleep(0.1)
    assert bench.host.life.bird.lines == lines


# The nest's death


@pytest.fixture
def nest_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_words_are_delivered_in_order_once_the_nest_answers_again(bench):
    until(lambda: bench.nest.words, "HostUp")
    bench.nest.away = True
    bench.hatch(Parting)
    bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
    time.sleep(0.3)
    bench.nest.away = False
    bench.hears(LifeEnded)
    assert [type(word) for word in bench.nest.words] == [HostUp, LifeRunning, LifeEnded]


def test_a_bird_outlives_its_nest_and_reports_to_the_next(tmp_path, nest_process):
    bench = Bench(tmp_path, nest_pid=nest_process.pid).hatch(Counter)
    bench.hears(LifeRunning)
    bench.nest.away = True
    nest_process.kill()
    until(lambda: not bench.host._tether.adopted, "the nest's death is seen", 1.0)
    assert bench.call("add") == ("result", 1)
    bench.nest.away = False
    report = bench.hears(HostReport)
    (life,) = report.lives
    assert (report.host, life.dot, life.state, life.code) == ("h1", DOT, "running", bench.order(Counter).code)
    until(lambda: bench.host._tether.adopted and bench.host.nest == NEST, "it is adopted")
    assert bench.call("add") == ("result", 2) and bench.ended.codes == []


def test_a_bird_that_no_nest_adopts_ends_before_the_grace_is_over(tmp_path, nest_process):
    bench = Bench(tmp_path, nest_pid=nest_process.pid, nest_grace=2.0).hatch(Counter)
    bench.nest.welcomes = False
    until(lambda: bench.nest.heard(LifeRunning), "it runs")
    killed = time.monotonic()
    nest_process.kill()
    until(lambda: bench.ended.codes, "the process ends", 2.0)
    assert bench.ended.codes[0] == 1 and time.monotonic() - killed < 2.0
    assert bench.nest.heard(HostReport)
    assert bench.call("add")[0] == "moved"


def test_after_a_pause_of_the_process_the_deadline_is_checked_before_anything_runs(tmp_path, nest_process, monkeypatch):
    bench = Bench(tmp_path, nest_pid=nest_process.pid, nest_grace=5.0).hatch(Counter)
    bench.nest.away = True
    nest_process.kill()
    nest_process.wait()
    real = tether.clock
    monkeypatch.setattr(tether, "clock", lambda: real() + 60.0)  # as after a SIGSTOP of a minute, before any thread has looked
    assert bench.call("add")[0] == "moved"
    assert bench.ended.codes[0] == 1


@pytest.mark.parametrize(("nobody_else", "away", "over"), [(False, False, True), (True, False, False), (True, True, True)])
def test_who_was_stopped_together_with_its_nest_goes_on_only_where_nobody_can_have_its_bird(
    tmp_path, nest_process, monkeypatch, nobody_else, away, over
):
    bench = Bench(tmp_path, nest_pid=nest_process.pid, nest_grace=5.0).hatch(Counter)
    bench.hears(LifeRunning)
    bench.nest.nobody_else, bench.nest.away = nobody_else, away
    real = tether.clock
    monkeypatch.setattr(tether, "clock", lambda: real() + 60.0)
    assert (bench.call("add")[0] == "moved") == over
    assert bool(bench.ended.codes) == over


def test_an_adoption_past_the_deadline_does_not_count(tmp_path, nest_process, monkeypatch):
    ended = []
    watch = tether.Tether(nest_process.pid, None, 5.0, ended.append, lambda: None)
    nest_process.kill()
    nest_process.wait()
    real = tether.clock
    monkeypatch.setattr(tether, "clock", lambda: real() + 60.0)
    watch.adopt(os.getpid())
    assert ended and not watch.check()


def test_an_empty_host_ends_with_its_nest(tmp_path, nest_process):
    bench = Bench(tmp_path, nest_pid=nest_process.pid)
    nest_process.kill()
    until(lambda: bench.ended.codes, "the process ends", 1.0)


def test_a_nest_that_dies_right_after_its_welcome_has_not_adopted(tmp_path, nest_process):
    bench = Bench(tmp_path, nest_pid=nest_process.pid).hatch(Counter)
    pids = iter((1, 2))
    bench.nest.pid = lambda timeout: next(pids, os.getpid())
    bench.hears(LifeRunning)
    nest_process.kill()
    until(lambda: bench.host._tether.adopted and bench.nest.heard(HostReport), "it is adopted")
    assert len(bench.nest.heard(HostReport)) == 2


def test_a_host_ends_at_once_with_its_raylet(tmp_path, nest_process):
    ended = []
    watch = tether.Tether(os.getpid(), nest_process.pid, 10.0, ended.append, lambda: None)
    watch.start()
    nest_process.kill()
    until(lambda: ended, "the process ends", 1.0)
    assert "raylet" in ended[0]


@pytest.fixture
def pulse(nest_process, monkeypatch):
    """Asks a nest that lives, five times until it is ended."""
    nest = FakeNest()
    monkeypatch.setattr(tether, "PATIENCE", 0.01)
    monkeypatch.setattr(tether, "PULSE", 0.01)
    watch = tether.Tether(nest_process.pid, None, 10.0, lambda why: None, lambda: None)
    return tether.Pulse(nest, watch, 0.1), nest, nest_process, watch


def test_a_nest_that_lives_and_does_not_answer_is_ended(pulse):
    beat, nest, process, watch = pulse
    nest.away = True
    for _ in range(4):
        beat.ask()
    assert process.poll() is None
    nest.away = False
    beat.ask()
    nest.away = True
    for _ in range(4):
        beat.ask()
    assert process.poll() is None, "it has answered meanwhile"
    beat.ask()
    assert process.wait(5) == -signal.SIGKILL
    until(lambda: not watch.check() or not watch.adopted, "its end is noticed")


def test_a_nest_that_has_died_is_not_asked(pulse):
    beat, nest, process, watch = pulse
    process.kill()
    process.wait()
    until(lambda: watch.check() and not watch.adopted, "its end is noticed", 5.0)
    asked = []
    nest.pid = asked.append
    for _ in range(10):
        beat.ask()
    assert not asked
    watch.end_nest()  # of a process that is gone: nothing happens


# Async birds


class Swift:
    def __init__(self):
        self.lines = []
        self.go = asyncio.Event()

    async def wait(self):
        self.lines.append("begun")
        await self.go.wait()
        return "waited", inside.in_async_method()

    def release(self):
        self.go.set()
        return inside.in_async_method()

    async def note(self, line):
        self.lines.append(line)

    def plain(self, line):
        self.lines.append(line)

    async def later(self):
        inside.send_after(0.0, self.note, "timer")

    async def sleep(self):
        try:
            await asyncio.sleep(30)
        finally:
            self.lines.append("cancelled")

    async def go_away(self):
        inside.leave("normal", "ciao")

    async def on_stop(self, reason):
        await asyncio.sleep(0)
        self.lines.append(reason)

    async def hand_over(self):
        return self.lines


async def soon(true, what):
    end = time.monotonic() + 5
    while not true():
        assert time.monotonic() < end, f"not within 5 s: {what}"
        await asyncio.sleep(0.005)


def test_async_methods_interleave(bench):
    async def main():
        await bench.hatch_async(Swift)
        waiting = asyncio.create_task(bench.acall("wait"))
        await soon(lambda: bench.host.life.bird.lines == ["begun"], "it begins")
        assert await bench.acall("release") == ("result", True), "a plain method is on the loop too"
        assert await waiting == ("result", ("waited", True))

    asyncio.run(main())


def test_async_calls_begin_in_their_callers_order_however_they_arrive(bench):
    async def main():
        await bench.hatch_async(Swift)
        orders = [5, 3, 0, 4, 1, 2, 7, 6]
        await asyncio.gather(*(bench.acall("note" if i % 2 else "plain", i, order=i) for i in orders))
        assert bench.host.life.bird.lines == sorted(orders)

    asyncio.run(main())


def test_a_missing_message_is_waited_for_only_so_long():
    async def main():
        order, begun = LoopOrder(gap=0.05), []

        async def one(i):
            await order.wait("me", i)
            begun.append(i)

        await asyncio.wait_for(asyncio.gather(one(3), one(2), one(5)), 5)
        assert begun == [2, 3, 5]

    asyncio.run(main())
    order, begun = ThreadOrder(gap=0.05), []
    threads = [threading.Thread(target=lambda i=i: order.wait("me", i, lambda: begun.append(i), lambda: False)) for i in (2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(begun) == [0, 2]


def test_withdrawing_a_running_async_call_cancels_it(bench):
    async def main():
        await bench.hatch_async(Swift)
        running = asyncio.create_task(bench.acall("sleep", caller="it"))
        await soon(lambda: bench.host.life._running, "it runs")
        bench.control(Withdraw("it", 0, DOT))
        kind, answer = await asyncio.wait_for(running, 5)
        assert (kind, answer.error) == ("refused", "CallTimeout")
        assert bench.host.life.bird.lines == ["cancelled"] and bench.host.life.state.value == "running"

    asyncio.run(main())


def test_an_async_birds_messages_to_itself_run_on_its_loop(bench):
    async def main():
        await bench.hatch_async(Swift)
        await bench.acall("later")
        await soon(lambda: bench.host.life.bird.lines == ["timer"], "the message to itself is run")

    asyncio.run(main())


def test_an_async_bird_ends_after_its_running_methods(bench):
    async def main():
        await bench.hatch_async(Swift)
        waiting = asyncio.create_task(bench.acall("wait"))
        await soon(lambda: bench.host.life._running, "it runs")
        bench.control(EndOrder(DOT, 1, "moved", True, 30.0))
        assert (await bench.acall("release"))[0] == "moved"
        bench.host.life.bird.go.set()
        assert (await waiting)[0] == "result"
        await soon(lambda: bench.nest.heard(LifeEnded), "it ends")
        assert pickle.loads(bench.nest.heard(LifeEnded)[0].state) == ["begun", "moved"]

    asyncio.run(main())


def test_an_async_bird_may_leave(bench):
    async def main():
        await bench.hatch_async(Swift)
        assert await bench.acall("go_away") == ("result", "ciao")
        await soon(lambda: bench.nest.heard(LifeExited), "it exits")
        assert bench.host.life.bird.lines == ["normal"]

    asyncio.run(main())


# Parts


def test_turns_are_given_in_the_order_of_asking():
    turns, got = Turns(), []
    turns.enter()
    for i in range(3):
        turns.enter_later(lambda i=i: got.append(i))
    assert got == []
    for i in range(3):
        turns.leave()
        assert got == list(range(i + 1))


def test_a_slow_delivery_of_one_timer_is_not_repeated_before_it_was_taken():
    scheduler, due = Scheduler(), []
    entry = scheduler.add(0.01, True, due.append)
    until(lambda: due, "it is due")
    time.sleep(0.05)
    assert due == [entry]
    entry.pending = False
    until(lambda: len(due) == 2, "it is due again")
    entry.cancelled = True


def test_large_buffers_travel_beside_the_message_and_arrive_without_a_copy():
    numpy = pytest.importorskip("numpy")
    big, small = numpy.zeros(100_000), numpy.zeros(3)
    body, extra = pack(((big, small), {}), what="arguments")
    assert len(extra) == 1 and len(body) < 1000
    (big_again, small_again), _ = unpack(body, extra)
    assert numpy.shares_memory(big, big_again) and (small_again == small).all()


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(TypeError, match=r"the arguments of 'tweety'.add: TypeError: cannot pickle '_thread.lock'"):
        pack(((threading.Lock(),), {}), what="the arguments of 'tweety'.add")


def test_a_description_ends_with_type_and_message():
    with pytest.raises(KeyError) as caught:
        {}["k"]
    assert describe(caught.value).splitlines()[-1] == "KeyError: 'k'"


def test_an_answer_is_one_message():
    assert decode(encode(Answer("moved")))[0] == Answer("moved")


class Ticking:
    def __init__(self):
        self.ticks = 0
        self.timer = inside.send_every(0.02, "tick")

    async def tick(self):
        self.ticks += 1

    async def count(self):
        return self.ticks

    async def take_over(self, state):
        await asyncio.sleep(0.1)

    @classmethod
    async def made(cls):
        return cls()


class Factory:
    @classmethod
    async def made(cls):
        return cls()


def test_timers_that_are_due_while_a_state_is_taken_over_are_not_lost(bench):
    async def main():
        await bench.hatch_async(Ticking, state=pickle.dumps(1), has_state=True)
        await soon(lambda: bench.host.life.bird.ticks > 2, "it ticks")
        bench.host.life.bird.timer.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_an_async_factory_makes_a_class_async_for_its_starter_and_its_host_alike():
    from flock_ray.api.starting import is_async as starters

    assert starters is is_async
    assert is_async(Factory)


def test_a_timer_of_many_years_does_not_stop_the_others():
    scheduler, came = Scheduler(), threading.Event()
    scheduler.add(1e12, False, lambda entry: None)
    scheduler.add(0.02, False, lambda entry: came.set())
    assert came.wait(5)


def test_nobody_waits_for_a_task_that_a_method_left_behind(bench):
    """It inherits the method's context, and was refused its calls as a cycle long after the method had ended."""

    class Leaver:
        async def begin(self):
            async def later():
                await asyncio.sleep(0.01)
                return inside.current_chain()

            self.task = asyncio.create_task(later())
            self.chain = inside.current_chain()

    async def main():
        await bench.hatch_async(Leaver)
        await bench.acall("begin")
        bird = bench.host.life.bird
        assert bird.chain
        assert await bird.task == ()

    asyncio.run(main())


@pytest.mark.parametrize("reason", [42, None, ValueError("x")])
def test_leave_takes_a_text(reason):
    with pytest.raises(TypeError, match="reason must be a str"):
        inside.leave(reason)


class Partial:
    def scale(self, by, value):
        return by * value

    double = functools.partialmethod(scale, 2)

    @functools.singledispatchmethod
    def kind(self, value):
        return "something"

    @kind.register
    def _(self, value: int):
        return "a number"


def test_methods_that_functools_makes_are_methods(bench):
    from flock_ray.api.options import methods

    assert {"scale", "double", "kind"} <= set(methods(Partial))
    bench.hatch(Partial)
    assert bench.call("double", 21) == ("result", 42)
    assert [bench.call("kind", value) for value in (1, "x")] == [("result", "a number"), ("result", "something")]
