"""TLS where Ray has it: with `RAY_USE_TLS`, TCP connections are encrypted with the certificates that Ray's own use, on both sides.

An `ssl` object must not be read and written at once, and knows no flags, so its sockets are wrapped to behave as plain ones do.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Mapping
from typing import Any

LONG = 1.0  # seconds of one blocking read, as the plain sockets of `sockets.py`


def contexts(environment: Mapping[str, str] = os.environ) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
    """The listener's and the caller's context; `None` where Ray runs without TLS.

    Raises:
        OSError: a file of `RAY_TLS_SERVER_CERT`, `RAY_TLS_SERVER_KEY` or `RAY_TLS_CA_CERT` cannot be used.
    """
    if environment.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    made = []
    for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH):
        context = ssl.create_default_context(purpose, cafile=environment["RAY_TLS_CA_CERT"])
        context.load_cert_chain(environment["RAY_TLS_SERVER_CERT"], environment["RAY_TLS_SERVER_KEY"])
        context.check_hostname = False  # nodes are known by address, and Ray's certificates need not name it: the authority counts
        context.verify_mode = ssl.CERT_REQUIRED
        made.append(context)
    return made[0], made[1]


class Encrypted:
    """An encrypted socket that takes the calls of a plain one. Its reads and writes exclude each other, and none waits but `recv_into`
    without flags, `LONG` at most.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lock = threading.Lock()
        self.family = sock.family

    def fileno(self) -> int:
        return self._sock.fileno()

    def recv(self, size: int) -> bytes:
        with self._lock:
            try:
                return self._sock.recv(size)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def recv_into(self, buffer: bytearray, size: int = 0, flags: int = 0) -> int:
        if not flags & socket.MSG_DONTWAIT:
            poll = select.poll()
            poll.register(self._sock.fileno(), select.POLLIN)
            poll.poll(LONG * 1000)
        with self._lock:
            try:
                return self._sock.recv_into(buffer, size or len(buffer))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def send(self, data: Any, flags: int = 0) -> int:
        del flags
        with self._lock:
            try:
                return self._sock.send(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)

    def close(self) -> None:
        self._sock.close()
