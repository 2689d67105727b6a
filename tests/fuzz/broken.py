"""Attacks by peers that hold the secret, and are broken. They may harm themselves, but neither the host or nest, nor anybody else."""

from __future__ import annotations

import itertools
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable

from flock_ray.core import wire
from flock_ray.core.connection import ANSWER, CALL, CONTROL, NOTE
from flock_ray.specs import Dot, Life
from tests.fuzz import promised
from tests.fuzz import transcripts as ts
from tests.fuzz.attacks import BROKEN, LATE, RARE, Target


@BROKEN()
def unknown_kind_or_too_large(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        limit = 4 << 20 if target.is_host else 1 << 30
        length, kind = rng.choice(((rng.getrandbits(20), rng.choice((0, 5, 6, 255))), (rng.randint(limit + 1, 2**32 - 1), CALL)))
        before = ts.frame(CONTROL, 1, wire.encode(wire.Withdraw("", 0))) if rng.random() < 0.5 and target.is_host else b""
        peer.send_cut(rng, before + ts.head(length, kind, rng.getrandbits(64)) + rng.randbytes(rng.choice((0, 10))))
        promised(peer.is_cut_off(), f"{target.name}: a frame of kind {kind} and {length} bytes is cut off")


@BROKEN()
def truncated(rng: random.Random, target: Target) -> None:
    """Leaves in the middle of a frame, sometimes of a long one."""
    with target.peer() as peer:
        length = rng.choice((1, 100, 70_000, 3_000_000) if target.is_host else (1, 100, 70_000, 1 << 30))
        peer.send(ts.head(length, rng.choice((CALL, CONTROL, NOTE)), rng.getrandbits(64)))
        peer.send(bytes(rng.randint(0, min(length, 2_000_000) - 1)))
        peer.leave(rng)


@BROKEN()
def garbage_calls(rng: random.Random, target: Target) -> None:
    """It may be cut off, and if not it is heard."""
    with target.peer() as peer:
        for _ in range(rng.randint(1, 4)):
            body = rng.choice((rng.randbytes(rng.randint(0, 60)), ts.garbage_pickle(rng), wire.encode(None, b"x" * 20)))
            if rng.random() < 0.5:
                packed = ts.garbage_pickle(rng)
                body = struct.pack("!I", len(packed)) + packed + rng.randbytes(rng.choice((0, 7, 8, 30)))
            peer.send_cut(rng, ts.frame(CALL, rng.getrandbits(64), body))
        if rng.random() < 0.3:
            peer.leave(rng)


@BROKEN()
def garbage_arguments(rng: random.Random, target: Target) -> None:
    """They concern who sent them, and are answered."""
    with target.peer() as peer:
        caller = f"garbage{rng.random()}"
        for order in range(rng.randint(1, 4)):
            garbage = ts.garbage_pickle(rng)
            number = rng.getrandbits(63)
            if target.is_host:
                peer.send(ts.frame(CALL, number, ts.call(caller, rng.choice(("echo", "count")), order, garbage)))
                said = peer.answer(number) is not None
                promised(said or peer.ended, f"{target.name}: arguments that cannot be read are answered, or their sender cut off")
                if peer.ended:
                    return
            else:
                peer.send(ts.frame(CALL, number, wire.encode(wire.ForNest(rng.choice(("ask", "read", "say"))), garbage)))


@BROKEN()
def answers(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        peer.send(ts.frame(ANSWER, rng.getrandbits(64), rng.choice((b"", wire.RESULT, rng.randbytes(40)))))
        promised(peer.is_cut_off(), f"{target.name}: a caller that answers is cut off")


@BROKEN()
def notes_to_a_nest(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        letters = rng.choice((pickle.dumps([]), pickle.dumps([(Life("x", 1), None)]), pickle.dumps(5), ts.garbage_pickle(rng)))
        if target.is_host:
            letters = wire.encode(wire.Withdraw("", 0))
        else:
            letters = wire.encode(wire.ForNest(rng.choice(("letters", "ask", "", "no such thing"))), letters)
        peer.send_cut(rng, ts.frame(NOTE, rng.getrandbits(64), letters))


@BROKEN()
def same_and_huge_numbers(rng: random.Random, target: Target) -> None:
    """Ids are the caller's own: every frame is answered under what it bore."""
    with target.peer() as peer:
        number = rng.choice((0, 1, 2**32, 2**63, 2**64 - 1))
        message = ts.call(f"same{rng.random()}", "echo", 0, ts.arguments(1)) if target.is_host else wire.encode(wire.ForNest("pid"))
        times = rng.randint(1, 5)
        peer.send_cut(rng, ts.frame(CALL, number, message) * times)
        for _ in range(times):
            promised(peer.answer(number), f"{target.name}: frames of one number are all answered")
        peer.works(rng)


@BROKEN(nest=False)
def things_that_are_not_there(rng: random.Random, target: Target) -> None:
    """Birds, methods, streams and calls; what is taken back before or after it came."""
    with target.peer() as peer:
        caller, order = f"lost{rng.randrange(20_000)}", rng.choice((0, 1, 2**63, 2**64 - 1))
        what: list[tuple[int, bytes]] = [
            (CONTROL, wire.encode(wire.Withdraw(caller, order, ts.DOT))),
            (CALL, ts.pull(caller, order, rng.choice((1, 2, 2**62)), rng.choice((0, 0, 0, 5)))),
            (CALL, ts.call(caller, "echo", 0, ts.arguments(1), dot=Dot(Life("elsewhere", 7), rng.getrandbits(40)))),
            (CALL, ts.call(caller, rng.choice(("nothing", "_private", "__init__", "", "closed", "count")), 0, ts.arguments())),
            (CALL, ts.call(caller, rng.choice(("echo", "nothing")), 0, ts.arguments(), stream=True)),
            (CALL, ts.call(caller, "fails", 0, ts.arguments(b"x"))),
            (CALL, ts.call(caller, "echo", 0, ts.arguments(1, 2, 3))),
        ]
        for kind, body in rng.choices(what, k=rng.randint(1, 5)):
            number = rng.getrandbits(63)
            peer.send_cut(rng, ts.frame(kind, number, body))
            promised(peer.answer(number) is not None, f"{target.name}: what is not there is answered")
        peer.works(rng)


@BROKEN(nest=False)
def casts(rng: random.Random, target: Target) -> None:
    """Runs of casts: the last is answered, with nothing."""
    with target.peer() as peer:
        caller, times = f"cast{rng.random()}", rng.randint(1, 40)
        said = [ts.call(caller, rng.choice(("echo", "fails", "nothing")), n, ts.arguments(n), cast=True) for n in range(times - 1)]
        said.append(ts.call(caller, "echo", times - 1, ts.arguments(1), cast=True))
        peer.send_cut(rng, b"".join(ts.frame(CALL, n, body) for n, body in enumerate(said)))
        if rng.random() < 0.7:
            promised(peer.answer(times - 1) is not None, f"{target.name}: the last cast of a run is answered")


@BROKEN(nest=False)
def streams(rng: random.Random, target: Target) -> None:
    """Opened, pulled too often or by another, taken back, and left open."""
    with target.peer() as peer:
        caller = f"stream{rng.random()}"
        peer.send(ts.frame(CALL, 1, ts.call(caller, "count", 0, ts.arguments(rng.choice((0, 3, 10**9))), stream=True)))
        promised(peer.answer(1), f"{target.name}: a stream's first item")
        for number in range(2, rng.randint(2, 12)):
            whose = (caller, rng.choice((0, 0, 0, 1)))
            items, at = rng.choice((1, 1, 3, 16, 64)), number - 2 if rng.random() < 0.8 else rng.choice((0, 1, 50))
            if rng.random() < 0.2:
                peer.send(ts.frame(CONTROL, number, wire.encode(wire.Withdraw(*whose, ts.DOT))))
            else:
                peer.send(ts.frame(CALL, number, ts.pull(*whose, items, at)))
            if rng.random() < 0.8:
                promised(peer.answer(number) is not None, f"{target.name}: a pull is answered")
        peer.leave(rng)


@BROKEN()
def spoiled_talk(rng: random.Random, target: Target) -> None:
    """What a good caller says after the proof, changed somewhere."""
    with target.peer() as peer:
        caller = f"spoiled{rng.randrange(1000)}"
        if target.is_host:
            said = [
                ts.frame(CALL, 1, ts.call(caller, "echo", 0, ts.arguments("x" * 10, 5.0))),
                ts.frame(CALL, 2, ts.call(caller, "count", 1, ts.arguments(3), stream=True)),
                ts.frame(CALL, 3, ts.pull(caller, 1, 2, 0)),
                ts.frame(CONTROL, 4, wire.encode(wire.Withdraw("", 0))),
                ts.frame(CALL, 5, ts.call(caller, "slow", 2, ts.arguments(3), cast=True)),
            ]
        else:
            said = [
                ts.frame(CALL, 1, wire.encode(wire.ForNest("read"), pickle.dumps(("notices",)))),
                ts.frame(NOTE, 0, wire.encode(wire.ForNest("letters"), pickle.dumps([]))),
                ts.frame(CALL, 2, wire.encode(wire.ForNest("say"), pickle.dumps(wire.HostUp("h", 1)))),
                ts.frame(CONTROL, 3, wire.encode(wire.ForNest("ready"))),
            ]
        rng.shuffle(said)
        part = b"".join(said[: rng.randint(1, len(said))])
        peer.send_cut(rng, ts.mutated(rng, part))
        if rng.random() < 0.5:
            peer.leave(rng)


@BROKEN(nest=False)
def gaps(rng: random.Random, target: Target) -> None:
    """Messages that come after one that never comes."""
    with target.peer() as peer:
        order = rng.choice((1, 5, 2**64 - 1))
        peer.send(ts.frame(CALL, 1, ts.call(f"gap{rng.random()}", "echo", order, ts.arguments(1))))
        promised(peer.answer(1), f"{target.name}: a message after a gap is answered")
        peer.works(rng)


@RARE()
def does_not_read(rng: random.Random, target: Target) -> None:
    """It is cut off when too much waits for it, and what it has not read is forgotten."""
    with target.peer() as peer:
        began = time.monotonic()
        for number in itertools.count():
            if target.is_host:
                body = ts.call(f"rude{rng.random()}", "echo", 0, ts.arguments(bytes(100_000)))
            else:
                body = wire.encode(wire.ForNest("read"), pickle.dumps(("notices",)))  # of 50 KB
            if not peer.send(ts.frame(CALL, number, body)):
                return
            peer.target.sent = peer.target.sent[:1]
            if number > 300:
                time.sleep(0.01)  # it comes to what was sent
            promised(target.clock.passed(began) < 2 * LATE, f"{target.name}: who does not read is cut off")


@RARE(nest=False)
def does_not_read_and_is_slow(rng: random.Random, target: Target) -> None:
    """Its long answers are ready when its slow method begins: another thread sends them, and finds that they are too many."""
    with target.peer() as peer:
        calls = [ts.call(f"unread{rng.random()}", "long", 0, ts.arguments(900_000)) for _ in range(rng.choice((1, 1, 2)))]
        calls.append(ts.call(f"unread{rng.random()}", "slow", 0, ts.arguments(1)))
        peer.send(b"".join(ts.frame(CALL, n, body) for n, body in enumerate(calls)))
        time.sleep(0.03)  # until the slow method has ended, or the sender has gone
    with target.peer() as peer:
        peer.works(rng)


@RARE(nest=False)
def full_mailbox(rng: random.Random, target: Target) -> None:
    """More calls at once than there is room for, from one who leaves before he is answered, or waits."""
    with target.peer() as peer, target.peer() as other:
        peer.send(ts.frame(CALL, 1, ts.call(f"slow{rng.random()}", "slow", 0, ts.arguments(1))))
        time.sleep(0.007)  # long enough for another thread to read
        caller, count = f"full{rng.random()}", rng.choice((100, 400))
        other.send(b"".join(ts.frame(CALL, n, ts.call(caller, "echo", n, ts.arguments(n))) for n in range(count)))
        if rng.random() < 0.5:
            for n in range(count):
                promised(other.answer(n), f"{target.name}: of {count} calls at once all are answered, or told that there is no room")
        else:
            other.leave(rng)


# Inputs that a known defect makes useless, or that would end the run


@RARE(nest=False)
def leaves_before_its_stream_begins(rng: random.Random, target: Target) -> None:
    with target.peer() as slow, target.peer() as peer:
        slow.send(ts.frame(CALL, 1, ts.call(f"slow{rng.random()}", "slow", 0, ts.arguments(1))))
        time.sleep(0.007)
        peer.send(ts.frame(CALL, 1, ts.call(f"early{rng.random()}", "count", 0, ts.arguments(10**9), stream=True)))
        peer.reset()
        slow.answer(1)


@RARE(nest=False)
def pull_without_end(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        caller = f"endless{rng.random()}"
        peer.send(ts.frame(CALL, 1, ts.call(caller, "count", 0, ts.arguments(10**9), stream=True)))
        peer.send(ts.frame(CALL, 2, ts.pull(caller, 0, 2**62, 0)))
        promised(peer.answer(1), f"{target.name}: a stream's first item")
    with target.peer() as peer:
        peer.works(rng)


@RARE(nest=False)
def pull_of_nothing(rng: random.Random, target: Target) -> None:
    """No items, fewer than none, or what is no number."""
    with target.peer() as peer:
        caller = f"nothing{rng.random()}"
        peer.send(ts.frame(CALL, 1, ts.call(caller, "count", 0, ts.arguments(3), stream=True)))
        promised(peer.answer(1), f"{target.name}: a stream's first item")
        peer.send(ts.frame(CALL, 2, ts.pull(caller, 0, rng.choice((0, -1, None, 1.5)), 0)))
    with target.peer() as peer:
        peer.works(rng)


class _Exits:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (sys.exit, ())


@RARE()
def no_exception(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        bodies = [ts.call(f"exit{rng.random()}", "echo", 0, pickle.dumps(((_Exits(),), {}))), wire.encode(_Exits())]
        peer.send(ts.frame(rng.choice((CALL, CONTROL)), 1, rng.choice(bodies)))
    with target.peer() as peer:
        peer.works(rng)


@RARE(nest=False)
def long_answers(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        peer.send(ts.frame(CALL, 1, ts.call(f"long{rng.random()}", "long", 0, ts.arguments(1_100_000))))
        promised(peer.answer(1), f"{target.name}: a long answer is told of")


@RARE()
def garbage_orders(rng: random.Random, target: Target) -> None:
    """Answered or cut off, but not left waiting."""
    with target.peer() as peer:
        peer.send(ts.frame(CONTROL, 1, rng.choice((b"", b"\0" * 8, rng.randbytes(20), wire.encode(None)[:5]))))
        data = peer.recv()
        promised(data is not None, f"{target.name}: an order that cannot be read is answered, or its sender cut off")


@RARE(nest=False)
def orders_for_others(rng: random.Random, target: Target) -> None:
    with target.peer() as peer:
        for number in range(100):
            order = wire.EndOrder(Dot(Life("elsewhere", rng.getrandbits(40)), 1), 1, "x", False, 1.0)
            peer.send(ts.frame(CONTROL, number, wire.encode(order)))
            promised(peer.answer(number) is not None, f"{target.name}: an order is answered")


def fill(target: Target) -> None:
    """Fills what a host keeps up to a bound, so that it does not look like growth later."""
    with target.peer() as peer:
        for begin in range(0, 11_000, 100):
            calls = (ts.frame(CALL, n, ts.call(f"fill{n}", "echo", 0, ts.arguments(n))) for n in range(begin, begin + 100))
            peer.send(b"".join(calls))
            takes = (ts.frame(CONTROL, 20_000 + n, wire.encode(wire.Withdraw(f"fill{n}", 5, ts.DOT))) for n in range(begin, begin + 100))
            peer.send(b"".join(takes))
            promised(peer.answer(begin + 99) and peer.answer(20_099 + begin) is not None, "the warm-up is answered")
            peer.forget_answers()
            peer.target.sent.clear()
