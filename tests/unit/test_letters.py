"""Letters between nests as bytes."""

from __future__ import annotations

import pickle

import pytest

from flock_ray.core import letters
from flock_ray.core import messages as msg
from flock_ray.core.replica import Replica
from flock_ray.specs import Dot, Life, Options, Spec, Stamp

A, B, C = (Life(node, 1) for node in "abc")


def news() -> msg.News:
    replica = Replica()
    spec = Spec("birds", "Bird", "code", b"args", Options(), None, Stamp(1, 0), "request")
    return msg.News(replica.update_of([replica.add("tweety", Dot(A, 1), spec, b"class")]), ("request",))


def sent(*envelopes: tuple[Life, msg.Envelope], me: Life = B) -> list[msg.Envelope]:
    return [envelope for part in letters.pack(envelopes, letters.Bodies()) for envelope, _ in letters.unpack(part, me)]


def test_letters_come_as_they_were_sent_and_in_order():
    ask = msg.Envelope(A, 3, False, msg.BarrierAsk(3), relayed_by=C)
    envelopes = [msg.Envelope(A, 3, True, news()), ask, msg.Envelope(A, 4, True, msg.Relay(C, ask))]
    assert sent(*((B, envelope) for envelope in envelopes)) == envelopes


def test_letters_to_an_earlier_life_are_nobodys():
    envelope = msg.Envelope(A, 3, True, msg.BarrierAsk(3))
    assert sent((B, envelope), (Life("b", 2), envelope), me=Life("b", 2)) == [envelope]


def test_a_body_for_many_is_pickled_once():
    class Counted:
        times = 0

        def __reduce__(self):
            Counted.times += 1
            return (str, ("body",))

    bodies, body = letters.Bodies(), Counted()
    for to in (A, B, C):
        (packed,) = letters.pack([(to, msg.Envelope(A, 1, True, body))], bodies)  # type: ignore[arg-type]
        assert [envelope.body for envelope, _ in letters.unpack(packed, to)] == ["body"]
    assert Counted.times == 1


def test_what_is_much_comes_in_parts(monkeypatch):
    monkeypatch.setattr(letters, "TOGETHER", 1_000)
    envelopes = [(B, msg.Envelope(A, 1, True, msg.CodeAnswer({"code": bytes(400)}))) for _ in range(7)]
    parts = list(letters.pack(envelopes, letters.Bodies()))
    assert len(parts) == 4, "two bodies in each, and one in the last"
    assert len([envelope for part in parts for envelope, _ in letters.unpack(part, B)]) == 7


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        pickle.dumps(5),
        pickle.dumps([5]),
        pickle.dumps([(tuple(B), tuple(A), 1, True, None)]),
        pickle.dumps([(tuple(B), tuple(A), 1, True, None, b"no pickle")]),
        pickle.dumps([(tuple(B), tuple(A), 1, True, None, pickle.dumps(news())[:-20])]),
    ],
)
def test_what_are_no_letters_is_refused(data):
    with pytest.raises(ValueError, match="letter|unpack"):
        list(letters.unpack(data, B))


def test_a_letterbox_gives_letters_in_order_some_at_a_time():
    box = letters.Letterbox(B, pytest.fail)
    assert not box
    for first in range(0, 300, 100):
        for part in letters.pack([(B, msg.Envelope(A, n, True, f"body {n}")) for n in range(first, first + 100)], letters.Bodies()):
            box.add(part)
    taken = []
    while box:
        some = box.take()
        assert len(some) <= letters.AT_ONCE
        taken += some
    assert [envelope.number for envelope in taken] == list(range(300))


def test_long_letters_are_taken_one_by_one():
    box = letters.Letterbox(B, pytest.fail)
    long = "x" * 2 * letters.SHORT
    for part in letters.pack([(B, msg.Envelope(A, n, True, long)) for n in range(3)], letters.Bodies()):
        box.add(part)
    assert [len(box.take()) for _ in range(3)] == [1, 1, 1]


def test_what_cannot_be_read_costs_its_own_part_and_no_other():
    errors = []
    box = letters.Letterbox(B, errors.append)
    (good,) = letters.pack([(B, msg.Envelope(A, 1, True, "good"))], letters.Bodies())
    for part in (good, b"no letters", good):
        box.add(part)
    taken = []
    while box:
        taken += box.take()
    assert [envelope.body for envelope in taken] == ["good", "good"] and [type(error) for error in errors] == [ValueError]
