"""What goes over a connection, made without the code under test, and what becomes of it on a bad way. Bytes only, no sockets.

The handshake is written down here a second time, after the head of `core/connection.py`: no input finds what both have wrong alike.
"""

from __future__ import annotations

import hmac
import pickle
import random
import struct

from flock_ray.core import wire
from flock_ray.core.connection import CALL, CONTROL
from flock_ray.specs import Dot, Life

SECRET, LIFE = b"s" * 32, "0123456789ab"  # as `tests.support.oneprocess` has them
DOT = Dot(Life("node", 1), 1)
UNPROVED = b"sent without the secret"  # in every pickle that a stranger sends: who unpickles it has let him in
HELLO, CHALLENGE, PROOF, HEAD = 54, 69, 32, 13  # bytes


def hello(nonce: bytes, life: str = LIFE, magic: bytes = b"flck", version: int = 1, role: int = 1) -> bytes:
    return struct.pack("!4sBB32s16s", magic, version, role, nonce, life.encode())


def proof(part: bytes, hello: bytes, listeners_nonce: bytes, secret: bytes = SECRET) -> bytes:
    return hmac.new(secret, part + b"\0" + hello + listeners_nonce, "sha256").digest()


def challenge(hello: bytes, nonce: bytes, secret: bytes = SECRET) -> bytes:
    return struct.pack("!4sB32s", b"flck", 1, nonce) + proof(b"listener", hello, nonce, secret)


def head(length: int, kind: int, number: int) -> bytes:
    return struct.pack("!IBQ", length, kind, number)


def frame(kind: int, number: int, body: bytes) -> bytes:
    return head(len(body), kind, number) + body


# Messages


def call(caller: str, method: str, order: int, body: bytes, *, dot: Dot = DOT, cast: bool = False, stream: bool = False) -> bytes:
    return wire.encode_call(wire.encode(wire.Call(caller, dot, method, (), cast, stream)), order, body)


def pull(caller: str, order: int, items: object, number: int) -> bytes:
    return wire.encode_call(wire.encode(wire.Pull(caller, order, items)), number, b"")


def arguments(*args: object) -> bytes:
    return pickle.dumps((args, {}), 5)


def strangers_frames(rng: random.Random) -> bytes:
    """Frames of one who has not proved himself, each with a pickle that tells."""
    who = UNPROVED.decode()
    messages = [
        (CALL, call(who, "echo", 0, arguments(UNPROVED))),
        (CALL, wire.encode(wire.ForNest(who), pickle.dumps(UNPROVED))),
        (CONTROL, wire.encode(wire.Withdraw(who, 0, DOT))),
        (CONTROL, pickle.dumps(UNPROVED)),
    ]
    return b"".join(frame(kind, rng.getrandbits(64), body) for kind, body in rng.choices(messages, k=rng.randint(1, 3)))


def garbage_pickle(rng: random.Random) -> bytes:
    """Not quite a pickle."""
    real = rng.choice(
        [
            arguments(1, "a", b"b", None, 2.5, [1, {2: 3}]),
            pickle.dumps(wire.Call("c", DOT, "echo"), 5),
            pickle.dumps(wire.Answer("result"), 5),
            pickle.dumps(list(range(40)), 0),
            b"\x80\x05\x95" + rng.randbytes(8),
            b"cno.such.module\nthing\n.",
            b"",
            b".",
        ]
    )
    return mutated(rng, real) if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 200))


# A bad way

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 4 << 20, (4 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF)


def mutated(rng: random.Random, data: bytes, times: int | None = None) -> bytes:
    """Changes bytes, leaves some out, repeats some, puts some in, cuts the end off."""
    out = bytearray(data)
    for _ in range(times if times is not None else rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            out += rng.randbytes(4)
        at = rng.randrange(len(out))
        end = min(len(out), at + rng.choice((1, 2, 4, 16, 64)))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end]
            case 4:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 13, 32, 100)))
            case 5:
                out[at : at + 4] = struct.pack("!I", rng.choice(_EDGES))
            case 6:
                del out[at:]
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in parts: all at once, at a few places, or one by one."""
    places = rng.choice((0, 0, 1, 3, 8, min(len(data), 60)))
    cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(places))})
    return [data[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]
