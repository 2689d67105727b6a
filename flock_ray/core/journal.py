"""What a nest writes down for its next life (V2): every change of its replica, in pieces that are kept in the order in which they came.

An entry is an `Update` with exact dots, which may be joined in any order and as often as one likes; a whole context, which may be merged
where all that was live then has been joined, so when all updates have been; or a view, of which the last counts. So a copy of all there is
can be added in steps while the nest goes on writing, and when its last piece is written, what was there before its first may be deleted,
the oldest first.

Source: write-ahead logging with fuzzy checkpoints (Mohan et al., ARIES, 1992), to which joins need neither undo nor positions in the log.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from flock_ray.core.aworset import Context
from flock_ray.core.replica import Replica, Update, bounded
from flock_ray.specs import Life

#: A view is written as the set of its lives.
Entry: TypeAlias = Update | Context | frozenset[Life]


class UnreadableError(ValueError):
    """These bytes are no entries."""


def pack(entries: Iterable[Entry]) -> bytes:
    return pickle.dumps(tuple(entries), protocol=5)


def unpack(piece: bytes) -> tuple[Entry, ...]:
    """The entries of one piece.

    Raises:
        UnreadableError: another version has written it, or it was damaged. What it said is known to the other nests, or lost.
    """
    try:
        entries = pickle.loads(piece)
    except Exception as error:  # what a pickle raises may be anything
        raise UnreadableError(f"a piece of the journal cannot be read: {error}") from error
    if not isinstance(entries, tuple) or not all(isinstance(entry, Update | Context | frozenset) for entry in entries):
        raise UnreadableError("a piece of the journal has something else in it")
    return entries


def copy(replica: Replica, view: Callable[[], frozenset[Life]]) -> Iterator[bytes]:
    """All there is, some hundred names in a piece. What is deleted when it is written has to be older than the first piece.

    Args:
        view: the last one that was written, asked for when the copy's last piece is: another may have been adopted since the first.
    """
    context = replica.birds.context.copy()
    for leaves in bounded(sorted(replica.birds.leaves()), replica.size_of_leaf):
        yield pack([replica.update_within(leaves)])
    yield pack([Update(nodes=tuple(replica.nodes.values())), context, view()])


class Reader:
    """Takes over what a life before has written.

    Args:
        replica: into which it is joined.
    """

    def __init__(self, replica: Replica) -> None:
        self.view: frozenset[Life] = frozenset()
        self._replica = replica
        self._context = Context()

    def read(self, piece: bytes) -> None:
        """Joins a piece.

        Raises:
            UnreadableError: it cannot be read.
        """
        for entry in unpack(piece):
            if isinstance(entry, frozenset):
                self.view = entry
            elif isinstance(entry, Context):
                self._context.merge(entry)
            else:
                self._replica.join(entry)
        self._replica.unwritten()  # it is written already

    def end(self) -> None:
        """All has been read."""
        self._replica.merge_context(self._context)
        self._replica.unwritten()
