"""Connections on an event loop: a nest's ears, and its ways to other nests and to its hosts.

    callers, hosts, other nests --CALL, CONTROL, NOTE--> Door of a nest
    a nest --NOTE--> other nests        a nest --CONTROL--> its hosts

Rules kept here: who does not prove that it holds the flock's secret is not heard, and is cut off after `PATIENCE`; who does not read what
it asked for is cut off when `UNREAD` bytes wait for it; what one connection does, no other notices; nothing here waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

from flock_ray.core.connection import NEST_BODY, Connection, ProtocolError, frame
from flock_ray.core.events import Found
from flock_ray.runtime.listener import BACKLOG, NO_PROOF, PATH_LIMIT, PATIENCE, STRANGERS, UNREAD, bind, keep_alive

CONNECT = 2.0  # seconds for a connection; what is to be sent meanwhile waits
AGAIN = 1.0  # seconds before a nest that no socket reached is tried again

Heard = Callable[["Wire", int, int, bytes], object]  # connection, kind, id, body


class Wire(asyncio.Protocol):
    """One connection.

    Args:
        connection: its protocol.
        heard: takes what the other side says.
        ended: is told of the end, and why: empty if the other side just closed it.
        greets: is this the side that has connected?
        made: is told of the beginning.
    """

    def __init__(
        self,
        connection: Connection,
        heard: Heard,
        ended: Callable[[Wire, str], object],
        greets: bool,
        made: Callable[[Wire], object] | None = None,
    ) -> None:
        self._connection = connection
        self._heard = heard
        self._ended = ended
        self._greets = greets
        self._made = made
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None
        self.early: list[tuple[int, int, bytes]] = []  # what is to be sent once the proofs are made
        self._why = ""
        self.over = False
        self.remote = False  # it came over TCP
        self.peer = "this machine"  # where it comes from, for people

    @property
    def open(self) -> bool:
        return self._connection.open

    def send(self, kind: int, number: int, body: bytes) -> None:
        """Sends a frame as soon as it may; nothing once the other side has gone: uvloop raises where asyncio drops it."""
        if self.over:
            return
        if not self._connection.open or self._transport is None:
            self.early.append((kind, number, body))
            return
        self._transport.write(frame(kind, number, body, NEST_BODY))
        if self._transport.get_write_buffer_size() > UNREAD:
            self.end("it does not read what it asked for")

    def end(self, why: str) -> None:
        self._why = self._why or why
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            keep_alive(sock)
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            self.remote, self.peer = True, f"{name[0]}:{name[1]}"
        self._late = asyncio.get_running_loop().call_later(PATIENCE, self._check_proof)
        if self._made is not None:
            self._made(self)
        if self._greets:
            self._transport.write(self._connection.greeting())

    def _check_proof(self) -> None:
        if not self._connection.open:
            self.end("it did not prove itself in time")

    def data_received(self, data: bytes) -> None:
        try:
            frames, reply = self._connection.receive(data)
        except ProtocolError as error:
            self.end(str(error))
            return
        if reply and self._transport is not None:
            self._transport.write(reply)
        if self.early and self._connection.open:
            early, self.early = self.early, []
            for each in early:
                self.send(*each)
        for kind, number, body in frames:
            self._heard(self, kind, number, bytes(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        if self._late is not None:
            self._late.cancel()
        self._ended(self, self._why or (str(exc) if exc is not None else ""))


class Door:
    """A nest's ears, on its event loop.

    Args:
        secret, life: the flock's.
        path: of the Unix socket; not made if it is too long for the kernel.
        heard: takes what those say who are let in.
        refused: is told of each connection that was turned away: why, and where it came from.
    """

    def __init__(self, secret: bytes, life: str, path: Path, heard: Heard, refused: Callable[[str, str], object]) -> None:
        self._secret, self._life = secret, life
        self._path = path
        self._heard = heard
        self._refused = refused
        self._wires: set[Wire] = set()
        self._closed = False
        self._servers: list[asyncio.Server] = []

    async def open(self, ip: str, ports: tuple[int, int] | None, tls: ssl.SSLContext | None) -> str:
        """Opens the doors.

        Returns:
            `ip:port` of the TCP socket.

        Raises:
            OSError: no port of the range is free.
        """
        loop = asyncio.get_running_loop()
        if len(os.fsencode(self._path)) <= PATH_LIMIT:
            self._path.unlink(missing_ok=True)
            self._servers.append(await loop.create_unix_server(self._wire, str(self._path), backlog=BACKLOG))
        door = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(door, ip, ports)
        self._servers.append(
            await loop.create_server(
                self._wire, sock=door, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=PATIENCE if tls is not None else None
            )
        )
        return f"{ip}:{door.getsockname()[1]}"

    def close(self) -> None:
        self._closed = True
        for server in self._servers:
            server.close()
        for wire in tuple(self._wires):
            wire.end("")
        self._path.unlink(missing_ok=True)

    def _wire(self) -> Wire:
        connection = Connection(self._secret, self._life, os.urandom(32), listens=True, limit=NEST_BODY)
        return Wire(connection, self._heard, self._ended, False, self._made)

    def _made(self, wire: Wire) -> None:
        self._wires.add(wire)
        if wire.remote and sum(not each.open and each.remote for each in self._wires) > STRANGERS:
            wire.end("too many strangers knock at once")

    def _ended(self, wire: Wire, why: str) -> None:
        self._wires.discard(wire)
        if not wire.open and not self._closed:
            self._refused(why or NO_PROOF, wire.peer)


class Wires:
    """A nest's ways to others, by a key of its choice: made when there is something to say, and again after their end.

    Args:
        secret, life: the flock's.
        tls: for TCP.
        unsent: takes what could not be sent, because there was no way: its key and body.
        broken: is told the key of each way that has ended, or cannot be had.
    """

    def __init__(
        self,
        secret: bytes,
        life: str,
        tls: ssl.SSLContext | None,
        unsent: Callable[[str, bytes], object],
        broken: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._secret, self._life, self._tls = secret, life, tls
        self._unsent = unsent
        self._broken = broken
        self._wires: dict[str, Wire] = {}
        self._not_before: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, key: str, address: str | Path, kind: int, body: bytes) -> bool:
        """Sends a frame. False if there is no way now, and it has to go another.

        Args:
            address: `ip:port`, or the path of a Unix socket.
        """
        wire = self._wires.get(key)
        if wire is None or wire.over:
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before.get(key, 0.0):
                return False
            connection = Connection(self._secret, self._life, os.urandom(32), listens=False, limit=NEST_BODY)
            wire = self._wires[key] = Wire(connection, _ignore, lambda wire, _: self._ended(key, wire), True)
            task = loop.create_task(self._connect(key, address, wire))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        wire.send(kind, 0, body)
        return True

    async def _connect(self, key: str, address: str | Path, wire: Wire) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT):
                if isinstance(address, Path):
                    await loop.create_unix_connection(lambda: wire, str(address))
                else:
                    ip, _, port = address.rpartition(":")
                    name = "" if self._tls is not None else None
                    await loop.create_connection(lambda: wire, ip.strip("[]"), int(port), ssl=self._tls, server_hostname=name)
        except (OSError, TimeoutError):
            wire.over = True
            self._ended(key, wire)

    def _ended(self, key: str, wire: Wire) -> None:
        if not wire.open:  # there was none, or it was turned away
            self._not_before[key] = asyncio.get_running_loop().time() + AGAIN
            early, wire.early = wire.early, []
            for _, _, body in early:
                self._unsent(key, body)
        if self._wires.get(key) is wire:
            self._broken(key)

    def drop(self, key: str) -> None:
        """It is not needed any more."""
        wire = self._wires.pop(key, None)
        self._not_before.pop(key, None)
        if wire is not None:
            wire.end("")

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(KeyError):
            while self._wires:
                self._wires.popitem()[1].end("")


async def probe(ip: str, port: int, seconds: float) -> Found:
    """Does somebody listen there? `silent` if nothing is heard in time, or there is no way."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(ip, port), seconds)
    except ConnectionRefusedError:
        return "refused"
    except (OSError, TimeoutError):
        return "silent"
    writer.close()
    return "up"


def _ignore(wire: Wire, kind: int, number: int, body: bytes) -> None:
    """Orders are answered by events, and notes not at all."""
