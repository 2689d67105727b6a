"""Letters: what a nest has for another at one time, as bytes.

A letter is an envelope with its receiver. Most of what is sent at once goes to all nests alike (news), so a body is pickled once for
all of them; what envelopes say is plain values; and a receiver reads the bodies one by one, so that between two of them it can do
something else. Bodies with content of the replica are pickled as columns (`core/records.py`).
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flock_ray.core.messages import Body, Envelope
from flock_ray.specs import Life

TOGETHER = 1_000_000  # bytes of bodies in one part, unless one body alone is longer
AT_ONCE, SHORT = 64, 20_000  # at most so many letters, or bytes of them and one more, are taken in at once


class Bodies:
    """Bodies that are being sent, pickled once each."""

    def __init__(self) -> None:
        self._packed: dict[int, tuple[Body, bytes]] = {}  # by identity, for which the body has to be kept

    def pack(self, body: Body) -> bytes:
        found = self._packed.get(id(body))
        if found is None:
            found = self._packed[id(body)] = body, pickle.dumps(body, protocol=5)
        return found[1]


def pack(letters: Iterable[tuple[Life, Envelope]], bodies: Bodies) -> Iterator[bytes]:
    """Letters to the nest of one node, a part of them at a time: what a socket carries at once is limited."""
    packed: list[tuple[Any, ...]] = []
    length = 0
    for to, envelope in letters:
        relayed_by = None if envelope.relayed_by is None else tuple(envelope.relayed_by)
        body = bodies.pack(envelope.body)
        if packed and length + len(body) > TOGETHER:
            yield pickle.dumps(packed, protocol=5)
            packed, length = [], 0
        packed.append((tuple(to), tuple(envelope.sender), envelope.number, envelope.accepts, relayed_by, body))
        length += len(body)
    if packed:
        yield pickle.dumps(packed, protocol=5)


def unpack(data: bytes | memoryview, me: Life) -> Iterator[tuple[Envelope, int]]:
    """The envelopes for this life of a nest, each read when its turn comes, and how long their bodies are (bytes).

    Those for an earlier life are nobody's.

    Raises:
        ValueError: these are no letters.
    """
    found = _read(data)
    if not isinstance(found, list):
        raise ValueError("these are no letters")
    for letter in found:
        try:
            to, sender, number, accepts, relayed_by, body = letter
            addressee, third = Life(*to), None if relayed_by is None else Life(*relayed_by)
            origin = Life(*sender)
        except TypeError as error:
            raise ValueError(f"this is no letter: {error}") from error
        if addressee == me:
            yield Envelope(origin, number, accepts, _read(body), third), len(body)


class Letterbox:
    """Letters that have come and are not read yet, in order.

    Args:
        me: whose it is.
        unreadable: is told why what follows in the same part cannot be read. It is lost, as on any network.
    """

    def __init__(self, me: Life, unreadable: Callable[[Exception], object]) -> None:
        self._me = me
        self._unreadable = unreadable
        self._parts: deque[Iterator[tuple[Envelope, int]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, packed: bytes | memoryview) -> None:
        self._parts.append(unpack(packed, self._me))

    def take(self) -> list[Envelope]:
        """Some that are short, or one: what follows of all of them is looked at once."""
        taken: list[Envelope] = []
        length = 0
        while self._parts and length < SHORT and len(taken) < AT_ONCE:
            try:
                envelope, size = next(self._parts[0])
            except StopIteration:
                self._parts.popleft()
            except Exception as error:  # what a pickle raises may be anything
                self._parts.popleft()
                self._unreadable(error)
            else:
                taken.append(envelope)
                length += size
        return taken


def _read(data: bytes | memoryview) -> Any:
    try:
        return pickle.loads(data)
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"these are no letters: {error}") from error
