"""Coverage-guided fuzzing of the protocol: a `Connection` gets bytes, and is compared with one written down a second time, without cuts.

    python -m tests.fuzz.protocol --seconds 300 --seed 1
    python -m tests.fuzz.protocol --input 00ff12     # one input again

An input is a small program (see `Program`): what is sent to which side, how it is spoiled, and how it is cut. The guide is atheris (`pip
install atheris`); where that is missing, inputs are drawn blindly.

Held against every input:
- nothing but `ProtocolError` is raised; after one, the connection never opens again and says nothing but that;
- no frame comes out before the other side has proved the secret, and none of it reaches `pickle.loads` through `wire`;
- frames come out as they were put in, in order, however they were cut; before a break perhaps fewer, never others;
- a handshake is answered by the right bytes or by none;
- between reads the buffer holds at most a frame of the limit's size, or what came with one read.
At the end: the memory is as it was after the warm-up, but for `SLACK`.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["flock_ray.core.connection", "flock_ray.core.wire"]):
        from flock_ray.core import connection, wire
else:
    from flock_ray.core import connection, wire

from flock_ray.core.connection import CALL, MAX_BODY, Connection, ProtocolError
from tests.fuzz import Violation, promised
from tests.fuzz import transcripts as ts
from tests.fuzz.model import MINE, Model

WARM_UP = 0.1  # of the time; then the corpus, the heads kept by `wire` and the allocator's pools have mostly been filled
SLACK = 8 << 20  # bytes: the fuzzer's own corpus grows on
THEIRS = b"t" * 32  # the nonce of the other side
LIMITS = (0, 1, 40, 300, 5000, MAX_BODY)


class Program:
    """An input, read from its front. What is missing is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)

    def byte(self, below: int = 256) -> int:
        self._at += 1
        return self._data[self._at - 1] % below if self._at <= len(self._data) else 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size).ljust(size, b"\0"))

    def bytes(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part


class Side:
    """One side: the real one and the model, which get the same bytes."""

    def __init__(self, listens: bool, limit: int) -> None:
        self.real = Connection(ts.SECRET, ts.LIFE, MINE, listens=listens, limit=limit)
        self.model = Model(listens, limit)
        self.limit = limit
        self.frames: list[tuple[int, int, bytes]] = []
        self.replies = b""
        self.broke = False
        if not listens:
            promised(self.real.greeting() == ts.hello(MINE), "the greeting is a hello")

    def receive(self, data: bytes, reused: bool = False) -> None:
        """Gives it bytes; with `reused` in a buffer that is written over afterwards, as `sockets.py` does."""
        self.model.feed(data)
        buffer = bytearray(data)
        given = memoryview(buffer) if reused else data
        try:
            found, reply = self.real.receive(given)
            promised(not self.broke, "a broken connection stays broken")
        except ProtocolError:
            self._broken(data)
            return
        promised(self.model.proved or not found, "a frame before the proof")
        promised(self.real.open or not found, "a frame of a connection that is not open")
        for kind, number, body in found:
            self.frames.append((kind, number, bytes(body)))
            _consume(self, kind, body)
        self.replies += reply
        buffer[:] = b"\xaa" * len(buffer)
        held = len(self.real._buffer)
        promised(
            held <= max(self.limit + ts.HEAD, ts.CHALLENGE, len(data)), f"{held:,} bytes are kept: limit {self.limit:,}, read {len(data):,}"
        )

    def _broken(self, data: bytes) -> None:
        self.broke = True
        promised(not self.real.open, "a broken connection is not open")
        held = len(self.real._buffer)
        promised(held <= self.limit + ts.HEAD + len(data), f"a broken connection keeps {held:,} bytes")

    def settle(self) -> None:
        """All was sent: compares."""
        for _ in range(3):  # a part of the handshake for each read
            if not self.broke:
                self.receive(b"")
        model = self.model
        promised(self.broke == model.broken, f"broken: {self.broke}, and should be: {model.broken}")
        promised(self.real.open == (model.proved and not model.broken), f"open: {self.real.open}, proved: {model.proved}")
        if self.broke:
            promised(self.frames == model.frames[: len(self.frames)], "frames before the break are those that were sent")
            promised(self.replies in (b"", model.reply), "the handshake's answer")
        else:
            promised(self.frames == model.frames, f"{len(self.frames)} frames came out of {len(model.frames)}, or others")
            promised(self.replies == model.reply, "the handshake's answer")


# What would unpickle it

_now: list[Side] = []  # whose frame is being read


def _noted_loads(data: bytes | memoryview, *args: object, **kwargs: object) -> object:
    """Instead of `pickle.loads`: notes who asks, and makes something of the kind without running anything."""
    promised(_now and _now[-1].model.proved, "a pickle was read before the proof")
    made = (wire.Call("c", ts.DOT, "m"), wire.Pull("c", 1, 1), wire.Withdraw("c", 1, ts.DOT), None)
    return made[bytes(data[:1] or b"\0")[0] % len(made)]


def _consume(side: Side, kind: int, body: memoryview) -> None:
    """Reads a frame as hosts and nests do. They take any `Exception` for a message that cannot be read."""
    _now.append(side)
    try:
        if kind == CALL:
            wire.decode_call(body)
        else:
            wire.decode(body)
    except (TypeError, struct.error, pickle.UnpicklingError):
        pass  # what is short, or no message of a caller
    finally:
        _now.pop()
    promised(len(wire._heads) <= wire.HEADS, "heads are kept without bound")


# Inputs


def one_input(data: bytes) -> None:
    program = Program(data)
    match program.byte(3):
        case 0:
            _bytes_at(program, listens=True)
        case 1:
            _bytes_at(program, listens=False)
        case 2:
            _both(program)


def _bytes_at(program: Program, listens: bool) -> None:
    """One side gets a stream that is put together, spoiled and cut."""
    limit = LIMITS[program.byte(len(LIMITS))]
    side = Side(listens, limit)
    stream = bytearray()
    if program.byte(4):  # mostly it gets past the handshake
        _hand(stream, program, listens)
        _prove(stream, listens)
    for _ in range(program.byte(16)):
        if program.over:
            break
        _PARTS[program.byte(len(_PARTS))](stream, program, listens, limit)
    _send(side, program, bytes(stream))
    side.settle()
    for _ in range(3):
        side.receive(program.bytes(program.byte(90)))
    side.settle()


def _send(side: Side, program: Program, stream: bytes) -> None:
    reused, step = bool(program.byte(2)), program.byte(5)
    at = broken = 0
    while at < len(stream) and broken < 3:
        size = (len(stream), 1 + program.byte(), 1 + program.byte(4), 1 + program.number(2), ts.HELLO)[step]
        size = max(size, len(stream) // 400)  # a long stream byte by byte says no more
        side.receive(stream[at : at + size], reused)
        at += size
        broken += side.broke


def _hand(stream: bytearray, program: Program, listens: bool) -> None:
    stream += ts.hello(program.bytes(2).ljust(32, b"t")) if listens else ts.challenge(ts.hello(MINE), THEIRS)


def _prove(stream: bytearray, listens: bool) -> None:
    if listens:
        stream += ts.proof(b"caller", bytes(stream[: ts.HELLO]), MINE)


def _right_frame(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    body = program.bytes(program.byte())[:limit]
    stream += ts.frame(1 + program.byte(4), program.number(8), body)


def _message(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    body = wire.encode_call(struct.pack("!I", program.byte(12)) + program.bytes(program.byte(20)), program.number(8), program.bytes(4))
    stream += ts.frame(CALL, program.number(8), body[:limit])


def _largest_frame(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    if limit <= 5000:
        stream += ts.frame(1 + program.byte(4), 2**64 - 1, bytes(limit))


def _too_large(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    stream += ts.head(min(limit + 1 + program.number(program.byte(5)), 2**32 - 1), 1 + program.byte(4), program.number(8))


def _any_head(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    stream += ts.head(program.number(program.byte(5)), program.byte(), program.number(8)) + program.bytes(program.byte(40))


def _truncated(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    whole = ts.frame(1 + program.byte(4), program.number(8), program.bytes(program.byte(60))[:limit])
    stream += whole[: program.byte(len(whole) + 1)]


def _noise(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    stream += program.bytes(program.byte(120))


def _hello_again(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    _hand(stream, program, listens)


def _proof_again(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    _prove(stream, listens)


def _wrong_proof(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    """Of another connection, another side, another secret, or the other side's own thrown back."""
    hello = bytes(stream[: ts.HELLO])
    stream += (
        ts.proof(b"caller", hello, THEIRS),
        ts.proof(b"listener", hello, MINE),
        ts.proof(b"caller", hello, MINE, b"x" * 32),
        ts.challenge(hello, MINE)[-ts.PROOF :],
        ts.challenge(ts.hello(THEIRS), THEIRS),
        ts.challenge(ts.hello(MINE), THEIRS, b"x" * 32),
    )[program.byte(6)]


def _another_hello(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    stream += ts.hello(THEIRS, ("another", ts.LIFE)[program.byte(2)], version=program.byte(3), role=program.byte(3))


def _spoil(stream: bytearray, program: Program, listens: bool, limit: int) -> None:
    if not stream:
        return
    at = program.number(2) % len(stream)
    match program.byte(5):
        case 0:
            stream[at] = program.byte()
        case 1:
            stream[at] ^= 1 << program.byte(8)
        case 2:
            del stream[at : at + 1 + program.byte(40)]
        case 3:
            stream[at:at] = stream[at : at + 1 + program.byte(40)]
        case 4:
            del stream[at:]


_PARTS = (
    _right_frame, _message, _largest_frame, _too_large, _any_head, _truncated, _noise, _hello_again, _proof_again, _wrong_proof,
    _another_hello, _spoil, _spoil,
)  # fmt: skip


def _both(program: Program) -> None:
    """Two real sides, a way between them that cuts but changes nothing, and frames both ways."""
    limit = LIMITS[program.byte(5)]
    sides = [Connection(ts.SECRET, ts.LIFE, nonce, listens=n == 1, limit=limit) for n, nonce in enumerate((MINE, THEIRS))]
    way = [bytearray(), bytearray(sides[0].greeting())]  # to each side
    sent: list[list[tuple[int, int, bytes]]] = [[], []]
    got: list[list[tuple[int, int, bytes]]] = [[], []]

    def pass_on(to: int, size: int) -> None:
        data = bytes(way[to][:size])
        del way[to][:size]
        found, reply = sides[to].receive(data)
        way[1 - to] += reply
        got[to] += [(kind, number, bytes(body)) for kind, number, body in found]
        promised(len(sides[to]._buffer) <= max(limit + ts.HEAD, ts.CHALLENGE, len(data)), "the buffer is bounded")

    while not program.over:
        to = program.byte(2)
        if sides[1 - to].open:
            made = (1 + program.byte(4), program.number(2), program.bytes(program.byte())[:limit])
            sent[to].append(made)
            way[to] += connection.frame(*made, limit)
        pass_on(to, program.byte() if program.byte(2) else 1 + program.number(2))
    while any(way):
        for to in (0, 1):
            pass_on(to, len(way[to]))
    promised(sides[0].open and sides[1].open, "both sides are open")
    promised(got == sent, "frames arrive whole and in order")


# The run


class Run:
    """Counts inputs, looks at the clock, and says how it went."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._seed = seed
        self._begin = time.monotonic()
        self._warm = self._begin + seconds * WARM_UP
        self._end = self._begin + seconds
        self._inputs = 0
        self._memory = 0

    def take(self, data: bytes) -> None:
        self._inputs += 1
        try:
            one_input(data)
        except BaseException as error:
            print(f"VIOLATION after {self._inputs:,} inputs: {type(error).__name__}: {error}", flush=True)
            print(f"python -m tests.fuzz.protocol --input {data.hex()}   # seed {self._seed}", flush=True)
            if not isinstance(error, Violation):
                sys.excepthook(type(error), error, error.__traceback__)
            self._leave(1)
        if self._inputs % 256 == 0:
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if not self._memory and now > self._warm:
            self._memory = memory()
        if now < self._end:
            return
        grown = memory() - self._memory
        print(f"protocol: {self._inputs:,} inputs in {now - self._begin:.0f} s, seed {self._seed}, {'guided' if atheris else 'blind'}")
        print(f"memory: {self._memory >> 10:,} KB after the warm-up, {memory() >> 10:,} KB now; {SLACK >> 10:,} KB more are allowed")
        print("checked:" + __doc__.partition("Held against every input:")[2].rstrip(), flush=True)
        if grown > SLACK:
            print(f"VIOLATION: the memory grew by {grown >> 10:,} KB", flush=True)
        self._leave(int(grown > SLACK))

    def _leave(self, code: int) -> None:
        sys.stderr.flush()
        os._exit(code)  # the guide has no other end but a crash


def memory() -> int:
    """Bytes that are resident."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=bytes.fromhex, help="run this one input")
    given = parser.parse_args()
    pickle.loads = _noted_loads
    if given.input is not None:
        one_input(given.input)
        return
    run, rng = Run(given.seconds, given.seed), random.Random(given.seed)
    if atheris is None:
        print("atheris is not installed: inputs are drawn blindly", flush=True)
        while True:
            run.take(rng.randbytes(rng.choice((8, 40, 200, 1000))))
    with tempfile.TemporaryDirectory() as folder:
        for n in range(60):
            Path(folder, f"{n}").write_bytes(bytes([n % 3, n % 6]) + rng.randbytes(rng.choice((8, 40, 200, 1000))))
        atheris.Setup([sys.argv[0], f"-seed={given.seed}", "-max_len=2000", "-timeout=20", folder], run.take)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
