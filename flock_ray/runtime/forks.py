"""What `fork` must not share: a child process has copies of its parent's sockets, and none of its threads.

What a child read from a connection its parent would lose, and a connection that it merely keeps open hides from the other side that the
parent has ended. So a child closes its copies at once, and `client_of` refuses to serve it: Ray does not work there either.
"""

from __future__ import annotations

import contextlib
import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_child(sock: socket.socket) -> None:
    """Has this socket closed in every process that is forked from this one."""
    _sockets.add(sock)


def _close() -> None:
    for sock in tuple(_sockets):
        with contextlib.suppress(OSError):
            sock.close()


os.register_at_fork(after_in_child=_close)
