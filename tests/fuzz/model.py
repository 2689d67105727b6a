"""What should come of the bytes that a connection gets, by a second and slower reading of the protocol that knows no cuts."""

from __future__ import annotations

import struct

from tests.fuzz import transcripts as ts

MINE = b"m" * 32  # the nonce of the side that is modelled


class Model:
    """What should come of a stream, of which nothing is cut: the whole of it is looked at again each time."""

    def __init__(self, listens: bool, limit: int) -> None:
        self._listens, self._limit = listens, limit
        self.stream = bytearray()
        self.proved = False
        self.broken = False
        self.reply = b""
        self.frames: list[tuple[int, int, bytes]] = []
        self._at = 0

    def feed(self, data: bytes) -> None:
        self.stream += data
        if not self.proved and not self.broken:
            self._at = self._listener() if self._listens else self._caller()
        while self.proved and not self.broken and len(self.stream) - self._at >= ts.HEAD:
            length, kind, number = struct.unpack_from("!IBQ", self.stream, self._at)
            if kind not in (1, 2, 3, 4) or length > self._limit:
                self.broken = True
            elif len(self.stream) - self._at - ts.HEAD < length:
                return
            else:
                begin = self._at + ts.HEAD
                self._at = begin + length
                self.frames.append((kind, number, bytes(self.stream[begin : self._at])))

    def _listener(self) -> int:
        stream = bytes(self.stream)
        if stream[:4] != b"flck"[: len(stream)]:
            self.broken = True
        elif len(stream) >= ts.HELLO:
            hello = stream[: ts.HELLO]
            if hello != ts.hello(hello[6:38]):
                self.broken = True
                return 0
            self.reply = ts.challenge(hello, MINE)
            given = stream[ts.HELLO : ts.HELLO + ts.PROOF]
            if len(given) == ts.PROOF:
                self.proved = given == ts.proof(b"caller", hello, MINE)
                self.broken = not self.proved
        return ts.HELLO + ts.PROOF

    def _caller(self) -> int:
        stream, hello = bytes(self.stream), ts.hello(MINE)
        if stream[:4] != b"flck"[: len(stream)]:
            self.broken = True
        elif len(stream) >= ts.CHALLENGE:
            nonce = stream[5:37]
            self.proved = stream[: ts.CHALLENGE] == ts.challenge(hello, nonce)
            self.broken = not self.proved
            if self.proved:
                self.reply = ts.proof(b"caller", hello, nonce)
        return ts.CHALLENGE
