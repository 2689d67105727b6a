"""What a call costs over flock_ray's own frames, and over the libraries that could carry it instead.

    python benchmarks/transports.py [--json FILE] [--rounds N] [--only NAME]

The same call of a method, a pickle of about 150 bytes, goes from one process to another and its answer comes back, over

  own frames   `SocketLink` and `Listener`: Unix socket, TCP, and TCP with TLS; both sides prove that they hold the secret
  pyzmq        DEALER and ROUTER, without and with CURVE (which proves the server only: to prove the caller takes an authenticator more)
  pynng        Req contexts and Rep, resending switched off; TLS with certificates of both sides

where the method runs on the thread that reads. These are compared:

  set-up       from nothing to the first answer, with all proofs
  round trip   one call at a time, median and p99
  in flight    calls a second with 1,000 in flight
  told         how soon a caller that waits for an answer is told that the server was killed (`kill -9`). To promise that a call runs at
               most once, and still to fail soon, a caller has to know this of each call. ZeroMQ reconnects behind the caller's back, and
               only its monitor, beside the call, tells of the loss of the connection.

The claim, and why there is a wire of our own: its round trip and its rate are the best of all, with proofs, and it tells within
milliseconds. All ways take turns within each round, in alternating order; medians of the rounds are reported. All answers are checked.
"""

from __future__ import annotations

import argparse
import json
import pickle
import threading
import time
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from typing import Any

from children import Child, child
from rounds import p99
from wires import PATIENCE, TRANSPORTS, Gone, Keys, Transport, Zmq, call_of, new_keys, usable

SET_UPS = 10  # of each way and round
TRIPS = 500
BURST = 1_000  # in flight at once
BURSTS = 5
DEATHS = 3  # rounds in which servers are killed: to be told never takes long
KILLED_AFTER = 0.2  # seconds: it waits by then; what `PATIENCE` leaves is 5 s


def serve(pipe: Pipe, name: str, keys: Keys) -> None:
    """What a server's process runs."""
    next(each for each in TRANSPORTS if each.name == name).serve(keys, pipe.send)


def check(n: int, answer: bytes) -> None:
    if pickle.loads(answer) != n + 1:
        raise SystemExit(f"add({n}) was answered by {pickle.loads(answer)!r}")


class Bench:
    """One transport: its server, a client that stays, and what was measured."""

    def __init__(self, transport: Transport, keys: Keys, server: Child) -> None:
        self.transport = transport
        self._keys = keys
        self._address = server.heard()
        self._client = transport.connect(keys, self._address)
        self.set_ups: list[list[float]] = []
        self.trips: list[list[float]] = []
        self.rates: list[float] = []
        self.told: list[float | None] = []
        self.told_beside: list[float | None] = []

    def round(self, number: int) -> None:
        self.set_ups.append([self._set_up() for _ in range(SET_UPS)])
        self.trips.append([self._trip(n) for n in range(TRIPS + TRIPS // 5)][TRIPS // 5 :])  # the first ones warm up
        self.rates.append(self._rate())
        if number < DEATHS:
            self._die()

    def forget(self) -> None:
        """The first round warms up."""
        for figures in (self.set_ups, self.trips, self.rates, self.told, self.told_beside):
            figures.clear()

    def close(self) -> None:
        self._client.close()

    def _set_up(self) -> float:
        begin = time.perf_counter()
        with closing(self.transport.connect(self._keys, self._address)) as client:
            check(1, client.ask(call_of(1), True)())
            return time.perf_counter() - begin

    def _trip(self, n: int) -> float:
        begin = time.perf_counter()
        answer = self._client.ask(call_of(n), True)()
        value = pickle.loads(answer)
        taken = time.perf_counter() - begin
        if value != n + 1:
            raise SystemExit(f"add({n}) was answered by {value!r}")
        return taken

    def _rate(self) -> float:
        begin = time.perf_counter()
        for _ in range(BURSTS):
            waits = [self._client.ask(call_of(n), False) for n in range(BURST)]
            for n, wait in enumerate(waits):
                check(n, wait())
        return BURSTS * BURST / (time.perf_counter() - begin)

    def _die(self) -> None:
        """Kills a server of its own while a caller waits for an answer."""
        killed: list[float] = []
        beside: list[float] = []
        with child(serve, self.transport.name, self._keys) as server, closing(self.transport.connect(self._keys, server.heard())) as client:
            check(1, client.ask(call_of(1), True)())
            client.on_gone(lambda: beside.append(time.perf_counter()))

            def kill() -> None:
                killed.append(time.perf_counter())
                server.process.kill()

            killer = threading.Timer(KILLED_AFTER, kill)
            wait = client.ask(call_of(1, "hold"), True)
            killer.start()
            told: list[float] = []
            with suppress(TimeoutError):
                try:
                    wait()
                except Gone:
                    told.append(time.perf_counter())
            killer.join()
        self.told.append(told[0] - killed[0] if told else None)
        self.told_beside.append(beside[0] - killed[0] if beside else None)

    def result(self) -> dict[str, Any]:
        return {
            "transport": self.transport.name,
            "set_up_ms": median(median(each) for each in self.set_ups) * 1e3,
            "trip_us": median(median(each) for each in self.trips) * 1e6,
            "trip_p99_us": p99([one for each in self.trips for one in each]) * 1e6,
            "in_flight_a_second": median(self.rates),
            "told_ms": _middle(self.told),
            "told_beside_ms": _middle(self.told_beside),
            "rounds": {
                "set_up_s": self.set_ups,
                "trip_median_s": [median(each) for each in self.trips],
                "in_flight_a_second": self.rates,
                "told_s": self.told,
                "told_beside_s": self.told_beside,
            },
        }


def _middle(seconds: list[float | None]) -> float | None:
    """Milliseconds; `None` if it was not so each time."""
    return None if None in seconds or not seconds else median(seconds) * 1e3


def measure(rounds: int, only: str) -> list[dict[str, Any]]:
    with new_keys() as keys, ExitStack() as stack:
        chosen = [each for each in usable(only) if not (isinstance(each, Zmq) and each.curve and keys.server is None)]
        if not chosen:
            raise SystemExit(f"no transport has {only!r} in its name: they are {', '.join(repr(each.name) for each in TRANSPORTS)}")
        servers = [(each, stack.enter_context(child(serve, each.name, keys))) for each in chosen]
        benches = [Bench(each, keys, server) for each, server in servers]
        for bench in benches:
            stack.callback(bench.close)
            bench.round(DEATHS)
            bench.forget()
        for number in range(rounds):
            for bench in benches if number % 2 else reversed(benches):
                bench.round(number)
        return [bench.result() for bench in benches]


def show(results: list[dict[str, Any]]) -> None:
    print(f"{'':<28}{'set-up':>10}{'round trip':>12}{'p99':>10}{'in flight':>13}   told of a kill -9")
    for row in results:
        told = f"{row['told_ms']:.1f} ms" if row["told_ms"] is not None else f"never within {PATIENCE - KILLED_AFTER:.0f} s"
        if row["told_ms"] is None and row["told_beside_ms"] is not None:
            told += f"; beside the call {row['told_beside_ms']:.1f} ms"
        times = f"{row['set_up_ms']:7.2f} ms{row['trip_us']:9,.0f} us{row['trip_p99_us']:7,.0f} us"
        print(f"{row['transport']:<28}{times}{row['in_flight_a_second']:11,.0f}/s   {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures, round by round, to this file")
    parser.add_argument("--only", default="", metavar="NAME", help="only the transports with this in their names")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="at least 1 (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("there is nothing to see without a round")
    results = measure(options.rounds, options.only)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps({"rounds": options.rounds, "transports": results}))


if __name__ == "__main__":
    main()
