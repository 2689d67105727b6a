"""One connection, between a caller, a host or a nest and whom it calls, without its socket: bytes in, frames out, in the manner of h11.

  caller                                             listener
  hello: magic, version, role, nonce, flock life  ->
                                                  <- challenge: magic, version, nonce, proof
  proof, and frames at once                       ->
                                                  <- frames

A proof is HMAC-SHA256, under the flock's secret, over the prover's part, both nonces, the role and the flock's life: nobody who lacks the
secret is heard, a proof of one connection is good for no other, and nothing is unpickled before it. All parts of the handshake have fixed
sizes. A frame is

    4 bytes: length of the body | 1 byte: kind | 8 bytes: id | body

in network byte order. An `ANSWER` has the id of the `CALL` or `CONTROL` it answers; a `NOTE` is not answered. The body is a message of
`core/wire.py`.

Rules kept here: a frame is at most `MAX_BODY` bytes long, for what is longer travels by Ray's object store, and between nests `NEST_BODY`;
after a `ProtocolError` the connection is over.
"""

from __future__ import annotations

import enum
import hmac
import struct
from hashlib import sha256

MAGIC = b"flck"
VERSION = 1
NONCE = 32
PROOF = 32
LIFE = 16
MAX_BODY = 4 << 20
NEST_BODY = 1 << 30  # what a nest tells another at once: a replica's part, at most
LONGEST = 1_000_000  # bytes of a message that its sender puts into a frame; Ray's object store is quicker with longer ones

CALL, CONTROL, ANSWER, NOTE = 1, 2, 3, 4

_HELLO = struct.Struct(f"!4sBB{NONCE}s{LIFE}s")
_CHALLENGE = struct.Struct(f"!4sB{NONCE}s{PROOF}s")
_HEAD = struct.Struct("!IBQ")
HEAD = _HEAD.size
_CALLER = 1  # the one role there is: who calls


class ProtocolError(Exception):  # it says what is so, and ends a connection; callers get `BirdUnavailable`
    """The other side does not speak this protocol, lacks the secret, or sent what is too large."""


Frame = tuple[int, int, memoryview]  # kind, id, body; a named tuple takes a microsecond more to make, a third of what a frame costs


class _Stage(enum.Enum):
    HELLO = enum.auto()
    CHALLENGE = enum.auto()
    PROOF = enum.auto()
    OPEN = enum.auto()
    BROKEN = enum.auto()


def frame(kind: int, number: int, body: bytes, limit: int = MAX_BODY) -> bytes:
    """The bytes of a frame.

    Raises:
        ValueError: the body is longer than the limit.
    """
    if len(body) > limit:
        raise ValueError(f"a frame of {len(body):,} bytes is above the limit of {limit:,}")
    return _HEAD.pack(len(body), kind, number) + body


class Connection:
    """One side of a connection.

    Args:
        secret, life: the flock's.
        nonce: `NONCE` random bytes, never used before.
        listens: is this the side that was connected to?
        limit: bytes of the longest body it takes.
    """

    def __init__(self, secret: bytes, life: str, nonce: bytes, *, listens: bool, limit: int = MAX_BODY) -> None:
        if len(nonce) != NONCE:
            raise ValueError(f"a nonce has {NONCE} bytes, not {len(nonce)}")
        self._secret = secret
        self._life = life.encode().ljust(LIFE, b"\0")[:LIFE]
        self._nonce = nonce
        self._limit = limit
        self._stage = _Stage.HELLO if listens else _Stage.CHALLENGE
        self._hello = b""
        self._buffer = bytearray()
        self._needed = 0  # bytes in the buffer before another look is worth its while

    @property
    def open(self) -> bool:
        """Has the other side proved that it holds the secret?"""
        return self._stage is _Stage.OPEN

    def greeting(self) -> bytes:
        """What a caller sends first."""
        self._hello = _HELLO.pack(MAGIC, VERSION, _CALLER, self._nonce, self._life)
        return self._hello

    def receive(self, data: bytes | memoryview) -> tuple[list[Frame], bytes]:
        """Takes bytes in, however they were cut.

        Returns:
            The frames that are complete now, and what is to be sent for the handshake's sake. Bodies are views of `data`.

        Raises:
            ProtocolError: the connection has to be closed.
        """
        buffer = self._buffer
        if not buffer and self._stage is _Stage.OPEN:
            return self._frames(data), b""
        if self._stage is _Stage.BROKEN:
            raise ProtocolError("the connection is broken")
        buffer += data
        if len(buffer) < self._needed:
            return [], b""
        self._needed = 0
        reply = b""
        if self._stage is not _Stage.OPEN:
            try:
                reply = self._shake_hands()
            except ProtocolError:
                self._stage = _Stage.BROKEN
                buffer.clear()
                raise
        if self._stage is not _Stage.OPEN or not buffer:
            return [], reply
        rest = bytes(buffer)
        buffer.clear()
        return self._frames(rest), reply

    def _frames(self, data: bytes | memoryview) -> list[Frame]:
        """Cuts frames off; what is left of `data` goes to the buffer."""
        found: list[Frame] = []
        at, end = 0, len(data)
        view = memoryview(data)
        unpack, limit = _HEAD.unpack_from, self._limit
        while end - at >= HEAD:
            length, kind, number = unpack(view, at)
            if length > limit or not CALL <= kind <= NOTE:
                self._stage = _Stage.BROKEN
                raise ProtocolError(f"a frame of kind {kind} and {length:,} bytes")
            begin = at + HEAD
            if end - begin < length:
                self._needed = HEAD + length
                break
            at = begin + length
            found.append((kind, number, view[begin:at]))
        if at < end:
            self._buffer += view[at:]
        return found

    def _shake_hands(self) -> bytes:
        if self._stage is _Stage.HELLO:
            return self._take_hello()
        if self._stage is _Stage.CHALLENGE:
            return self._take_challenge()
        if len(self._buffer) >= PROOF:
            self._check(self._cut(PROOF), self._proof(b"caller", self._nonce))
            self._stage = _Stage.OPEN
        return b""

    def _take_hello(self) -> bytes:
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise ProtocolError("no hello of flock_ray")
        if len(self._buffer) < _HELLO.size:
            return b""
        self._hello = self._cut(_HELLO.size)
        _, version, role, _, life = _HELLO.unpack(self._hello)
        if version != VERSION:
            raise ProtocolError(f"version {version} of the protocol, not {VERSION}")
        if role != _CALLER:
            raise ProtocolError(f"role {role} is unknown")
        if life != self._life:
            raise ProtocolError("another life of a flock is meant")
        self._stage = _Stage.PROOF
        return _CHALLENGE.pack(MAGIC, VERSION, self._nonce, self._proof(b"listener", self._nonce))

    def _take_challenge(self) -> bytes:
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise ProtocolError("no challenge of flock_ray")
        if len(self._buffer) < _CHALLENGE.size:
            return b""
        _, version, nonce, proof = _CHALLENGE.unpack(self._cut(_CHALLENGE.size))
        if version != VERSION:
            raise ProtocolError(f"version {version} of the protocol, not {VERSION}")
        self._check(proof, self._proof(b"listener", nonce))
        self._stage = _Stage.OPEN
        return self._proof(b"caller", nonce)

    def _cut(self, size: int) -> bytes:
        part = bytes(self._buffer[:size])
        del self._buffer[:size]
        return part

    def _proof(self, part: bytes, listeners_nonce: bytes) -> bytes:
        return hmac.digest(self._secret, part + b"\0" + self._hello + listeners_nonce, sha256().name)

    def _check(self, given: bytes, right: bytes) -> None:
        if not hmac.compare_digest(given, right):
            raise ProtocolError("a wrong proof: the other side does not hold this flock's secret")
