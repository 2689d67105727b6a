"""Attacks by strangers: they lack the secret, or send their proof wrong. None is heard, and each is cut off."""

from __future__ import annotations

import contextlib
import random
import threading
import time

from tests.fuzz import promised
from tests.fuzz import transcripts as ts
from tests.fuzz.attacks import LATE, RARE, STRANGE, Peer, Target, readable


@STRANGE()
def noise(rng: random.Random, target: Target) -> None:
    with target.stranger() as peer:
        peer.send_cut(rng, rng.randbytes(rng.choice((1, 5, 54, 86, 200, 70_000))))
        peer.leave(rng)


@STRANGE()
def wrong_hello(rng: random.Random, target: Target) -> None:
    """It is cut off without a word."""
    wrong = rng.choice(
        [
            {"magic": rng.choice((b"flcx", b"GET ", b"\x16\x03\x01\x02", rng.randbytes(4)))},
            {"version": rng.choice((0, 2, 255))},
            {"role": rng.choice((0, 2, 255))},
            {"life": rng.choice(("", "another life", "0123456789ac", "0123456789abcdef"))},
        ]
    )
    with target.stranger() as peer:
        peer.send_cut(rng, ts.hello(rng.randbytes(32), **wrong))
        promised(peer.is_cut_off(), f"{target.name}: a hello with {wrong} is cut off")


@STRANGE()
def wrong_proof(rng: random.Random, target: Target) -> None:
    """What follows at once on a proof with another secret, another side's, one thrown back, or noise."""
    with target.stranger() as peer:
        hello = ts.hello(rng.randbytes(32))
        peer.send_cut(rng, hello)
        challenge = peer.challenge()
        nonce = challenge[5:37]
        proofs = (
            ts.proof(b"caller", hello, nonce, rng.choice((b"", b"x" * 32))),
            ts.proof(b"listener", hello, nonce),
            challenge[-ts.PROOF :],
            rng.randbytes(32),
            ts.proof(b"caller", ts.hello(rng.randbytes(32)), nonce),
            ts.mutated(rng, ts.proof(b"caller", hello, nonce), 1),
        )
        chosen = rng.choice(proofs)
        if chosen[: ts.PROOF] == ts.proof(b"caller", hello, nonce):
            return  # a change that changed nothing
        peer.send_cut(rng, chosen + ts.strangers_frames(rng))
        if len(chosen) >= ts.PROOF and rng.random() < 0.7:
            promised(peer.is_cut_off(), f"{target.name}: a wrong proof is cut off")


@STRANGE()
def replay(rng: random.Random, target: Target) -> None:
    """All that a good caller has said in another connection, a little changed or not at all."""
    with target.stranger() as good:
        hello = ts.hello(rng.randbytes(32))
        good.send(hello)
        nonce = good.challenge()[5:37]
        right = ts.proof(b"caller", hello, nonce)
        good.send(right[: rng.choice((0, 31))])
    said = hello + right + ts.strangers_frames(rng)
    if rng.random() < 0.7:
        said = ts.mutated(rng, said)
    with target.stranger() as peer:
        peer.send_cut(rng, said)
        peer.leave(rng)


@STRANGE()
def half_a_handshake(rng: random.Random, target: Target) -> None:
    with target.stranger() as peer:
        hello = ts.hello(rng.randbytes(32))
        peer.send(hello[: rng.choice((0, 1, 3, 4, 53, 54))])
        if rng.random() < 0.5:
            peer.send(hello)
            peer.send(rng.randbytes(rng.choice((0, 1, 31))))
        peer.leave(rng) if rng.random() < 0.8 else None


@STRANGE()
def frames_at_once(rng: random.Random, target: Target) -> None:
    with target.stranger() as peer:
        peer.send_cut(rng, rng.choice((b"", b"flck", ts.hello(rng.randbytes(32)))) + ts.strangers_frames(rng))
        peer.leave(rng)


class SlowLoris:
    """Connections that say a byte now and then, all the time: each is cut off, whatever it has said."""

    def __init__(self, seed: int, targets: list[Target]) -> None:
        self._rng = random.Random(f"{seed}.loris")
        self._targets = [target.again() for target in targets]
        self._may_come = threading.Event()
        self.violation = ""
        self.inputs = 0
        self.now = 0
        threading.Thread(target=self._run, daemon=True).start()

    def come(self) -> None:
        self._may_come.set()

    def rest(self) -> None:
        """Those who are there stay until they are cut off."""
        self._may_come.clear()

    def _run(self) -> None:
        try:
            self._come_and_go()
        except Exception as error:
            self.violation = f"a slow stranger: {type(error).__name__}: {error}"

    def _come_and_go(self) -> None:
        there: list[tuple[Peer, bytes, float]] = []
        while not self.violation:
            if self._may_come.is_set() and len(there) < 40:
                with contextlib.suppress(OSError):  # a flood has filled the backlog
                    said = ts.hello(self._rng.randbytes(32)) + self._rng.randbytes(31)
                    there.append((self._rng.choice(self._targets).stranger(), said, time.monotonic()))
                    self.inputs += 1
            for one in list(there):
                peer, said, came = one
                at = int((time.monotonic() - came) * 50)
                if at < len(said) and self._rng.random() < 0.5:
                    peer.send(said[at : at + 1])
                peer.target.sent.clear()
                if readable([peer]) and not peer.recv():
                    peer.close()
                    there.remove(one)
                elif peer.target.clock.passed(came) > 5 * LATE:
                    self.violation = f"{peer.target.name}: who says a byte now and then is not cut off within {5 * LATE} s"
            self.now = len(there)
            time.sleep(0.02)  # slow is what they are


@RARE()
def flood(rng: random.Random, target: Target) -> None:
    """More strangers than are let wait. Good callers who are in are served; who comes now may have to come again."""
    peers = []
    with target.floods:
        try:
            for n in range(rng.choice((50, 300, 600))):
                peer = target.stranger()
                peers.append(peer)
                if n % 3:
                    peer.send(rng.randbytes(200) if n % 3 == 1 else b"fl")
            if rng.random() < 0.3:
                time.sleep(0.3)  # long enough for `victim.py` to count them
        except OSError:
            pass  # the backlog is full
        finally:
            for peer in peers:
                peer.reset() if rng.random() < 0.5 else peer.close()
    target.peer().close()
