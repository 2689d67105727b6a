"""The journal on the node's disk: what a nest writes down for its next life (V2). What is in it, `core/journal.py` says.

SQLite keeps it whole when the nest is killed in the middle of a write. Nothing is synced to the disk itself: a machine that loses its power
has lost its raylet and its birds too, and its node comes back as another.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger("flock_ray.nest")

FILE = "journal"
PATIENCE = 5.0  # seconds for which the nest's life before, which is just ending, may still have it
LEAST = 4_000_000  # bytes, below which it is not worth while to write all there is anew
LONGEST = 3  # times as long as all there is it may become
A_FEW = 16  # pieces that are deleted at a time: a megabyte, in some ms

_TABLES = """
CREATE TABLE IF NOT EXISTS pieces (number INTEGER PRIMARY KEY AUTOINCREMENT, piece BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS life (number INTEGER NOT NULL, seen REAL NOT NULL);
"""
_OLDEST = "DELETE FROM pieces WHERE number IN (SELECT number FROM pieces WHERE number <= ? ORDER BY number LIMIT ?)"


def open_journal(folder: Path) -> Journal:
    """The journal in a folder; one that is damaged is begun anew.

    Raises:
        sqlite3.Error, OSError: there can be none.
    """
    try:
        return Journal(folder)
    except sqlite3.OperationalError:  # the disk, or who has it
        raise
    except sqlite3.DatabaseError as error:
        logger.error("the journal of this node is damaged (%s) and begun anew; what no other nest knows is lost", error)
        for path in folder.glob(f"{FILE}*"):
            path.unlink()
        return Journal(folder)


class Journal:
    """One nest's journal. All methods may raise `sqlite3.Error`: the disk is full, or gone.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / FILE, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = OFF"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        self._db.executescript(_TABLES)
        self._size = int(self._db.execute("SELECT coalesce(sum(length(piece)), 0) FROM pieces").fetchone()[0])
        self._size_of_all = 0  # there is, when it was last written anew
        self._is_replaced = False

    def before(self) -> tuple[int, float] | None:
        """The number of the last life that wrote here, and how many seconds ago that was seen to live; `None`: this is the first."""
        row = self._db.execute("SELECT number, seen FROM life").fetchone()
        return None if row is None else (int(row[0]), max(0.0, time.time() - float(row[1])))

    def pieces(self) -> tuple[bytes, ...]:
        """What was written, in the order in which it is to be read."""
        return tuple(bytes(piece) for (piece,) in self._db.execute("SELECT piece FROM pieces ORDER BY number"))

    def clear(self) -> None:
        """Forgets what lives before have written."""
        self._db.execute("DELETE FROM pieces")
        self._size = 0

    def lives(self, number: int) -> None:
        """This life of the nest is alive now."""
        self._db.execute("BEGIN")
        self._db.execute("DELETE FROM life")
        self._db.execute("INSERT INTO life VALUES (?, ?)", (number, time.time()))
        self._db.execute("COMMIT")

    def write(self, piece: bytes) -> None:
        """Adds a piece. When this returns, the end of this process does not undo it."""
        self._db.execute("INSERT INTO pieces (piece) VALUES (?)", (piece,))
        self._size += len(piece)

    @property
    def is_long(self) -> bool:
        """Is it time to write all there is anew?"""
        return not self._is_replaced and self._size > max(LEAST, LONGEST * self._size_of_all)

    def replace(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Writes all there is anew, a piece in each step, and then deletes what was there before, in steps.

        Args:
            pieces: of the copy; each is taken when it is written.
        """
        self._is_replaced = True
        try:
            (last,) = self._db.execute("SELECT coalesce(max(number), 0) FROM pieces").fetchone()
            size = 0
            for piece in pieces:
                self.write(piece)
                size += len(piece)
                yield
            self._size_of_all = size
            while self._db.execute(_OLDEST, (last, A_FEW)).rowcount:
                yield
            self._size = int(self._db.execute("SELECT coalesce(sum(length(piece)), 0) FROM pieces").fetchone()[0])
        finally:
            self._is_replaced = False

    def close(self) -> None:
        self._db.close()
