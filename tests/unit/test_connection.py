"""The protocol of connections: whatever the bytes, and however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flock_ray.core import connection
from flock_ray.core.connection import ANSWER, CALL, CONTROL, MAX_BODY, Connection, ProtocolError, frame

SECRET, LIFE = b"s" * 32, "0123456789ab"


def pair(caller=SECRET, listener=SECRET, lives=(LIFE, LIFE)):
    return (
        Connection(caller, lives[0], b"c" * 32, listens=False),
        Connection(listener, lives[1], b"l" * 32, listens=True),
    )


def open_pair():
    caller, listener = pair()
    _, challenge = listener.receive(caller.greeting())
    _, proof = caller.receive(challenge)
    assert listener.receive(proof) == ([], b"")
    assert caller.open and listener.open
    return caller, listener


frames = st.tuples(st.sampled_from([CALL, CONTROL, ANSWER]), st.integers(0, 2**64 - 1), st.binary(max_size=200))


@given(st.lists(frames, max_size=8), st.data())
def test_frames_arrive_whole_and_in_order_however_they_are_cut(sent, data):
    caller, listener = pair()
    _, challenge = listener.receive(caller.greeting())
    _, proof = caller.receive(challenge)
    stream = proof + b"".join(frame(*each) for each in sent)
    got = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found, reply = listener.receive(stream[:cut])
        assert reply == b""
        got += [(kind, number, bytes(body)) for kind, number, body in found]
        stream = stream[cut:]
    assert got == sent


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=10))
def test_noise_is_refused_and_nothing_of_it_comes_through(noise, cuts):
    """Nothing is unpickled before the proof: no frame comes out of a connection that is not open."""
    _, listener = pair()
    at = 0
    try:
        for cut in [*cuts, len(noise)]:
            found, _ = listener.receive(noise[at : at + cut])
            at += cut
            assert found == []
    except ProtocolError:
        with pytest.raises(ProtocolError):
            listener.receive(b"more")
    assert not listener.open


def test_who_lacks_the_secret_is_not_heard():
    caller, listener = pair(caller=b"x" * 32)
    _, challenge = listener.receive(caller.greeting())
    with pytest.raises(ProtocolError, match="does not hold this flock's secret"):
        caller.receive(challenge)  # nor does the caller speak to a listener that lacks it
    with pytest.raises(ProtocolError, match="wrong proof"):
        listener.receive(caller._proof(b"caller", b"l" * 32) + frame(CALL, 1, b"run me"))
    assert not listener.open


def test_a_proof_is_good_for_one_connection_and_one_direction():
    caller, listener = pair()
    _, challenge = listener.receive(caller.greeting())
    proof = caller.receive(challenge)[1]
    again = Connection(SECRET, LIFE, b"m" * 32, listens=True)
    again.receive(caller.greeting())
    with pytest.raises(ProtocolError, match="wrong proof"):
        again.receive(proof)
    reflected = Connection(SECRET, LIFE, b"l" * 32, listens=True)
    reflected.receive(caller.greeting())
    with pytest.raises(ProtocolError, match="wrong proof"):
        reflected.receive(challenge[-32:])


@pytest.mark.parametrize(
    ("hello", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "no hello"),
        (b"flck\x02" + bytes(80), "version 2"),
        (b"flck\x01\x07" + bytes(80), "role 7"),
    ],
)
def test_strangers_are_told_apart(hello, text):
    _, listener = pair()
    with pytest.raises(ProtocolError, match=text):
        listener.receive(hello)


def test_another_life_of_the_flock_is_another_flock():
    caller, listener = pair(lives=(LIFE, "another life"))
    with pytest.raises(ProtocolError, match="another life"):
        listener.receive(caller.greeting())


@pytest.mark.parametrize(
    "head", [connection._HEAD.pack(MAX_BODY + 1, CALL, 1), connection._HEAD.pack(0, 0, 1), connection._HEAD.pack(0, 9, 1)]
)
def test_a_frame_that_is_too_large_or_of_no_kind_ends_the_connection(head):
    _, listener = open_pair()
    with pytest.raises(ProtocolError, match="a frame of kind"):
        listener.receive(head)
    with pytest.raises(ProtocolError):
        listener.receive(frame(CALL, 1, b""))


def test_a_body_above_the_limit_is_not_framed():
    with pytest.raises(ValueError, match="above the limit"):
        frame(CALL, 1, bytes(MAX_BODY + 1))


def test_nothing_is_kept_of_what_was_handed_out():
    _, listener = open_pair()
    for _ in range(3):
        listener.receive(frame(CALL, 1, bytes(1000))[:-1])
        (found,), _ = listener.receive(b"\0")
        assert len(found[2]) == 1000
    assert not listener._buffer
