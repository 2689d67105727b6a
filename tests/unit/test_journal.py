"""The journal: what a nest's next life reads is what the life before had, wherever that one was stopped."""

from __future__ import annotations

import random
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.core import journal
from flock_ray.core.aworset import Context, Delta
from flock_ray.core.replica import Replica, Update
from flock_ray.runtime.journal import FILE, Journal, open_journal
from flock_ray.specs import Dot, Life, NodeRecord, Options, Spec, Stamp, Status

ME, OTHER = Life("a", 1), Life("b", 1)
VIEW = frozenset([ME, OTHER])


def spec(n=0, code="c"):
    return Spec("m", "C", code, b"%d" % n, Options(), None, Stamp(n, 0), f"r{n}")


def restored(pieces):
    replica = Replica()
    reader = journal.Reader(replica)
    for piece in pieces:
        reader.read(piece)
    reader.end()
    return replica, reader.view


def same(a, b):
    return dict(a.birds.items()) == dict(b.birds.items()) and a.birds.context == b.birds.context and a.code == b.code and a.nodes == b.nodes


class Story:
    """Two replicas; what the first one does is written, and now and then copied in steps."""

    def __init__(self, rng):
        self.rng = rng
        self.mine, self.theirs = Replica(), Replica()
        self.tops = {ME: 0, OTHER: 0}
        self.late = []
        self.pieces = []
        self.copying, self.outdated = None, 0

    def act(self):
        rng = self.rng
        who, life = rng.choice([(self.mine, ME), (self.theirs, OTHER)])
        name = f"bird-{rng.randrange(4)}"
        kind = rng.choice(["add", "add", "remove", "status", "tell", "sync", "late", "exit", "node"])
        changes = []
        if kind == "add":
            self.tops[life] += 1
            number = rng.randrange(3)
            changes.append(who.add(name, Dot(life, self.tops[life]), spec(self.tops[life], f"code{number}"), b"body %d" % number))
        elif kind == "remove" and who.records(name):
            changes.append(who.remove(name, [dot for dot, _ in who.records(name)]))
        elif kind == "status" and who.records(name):
            dot, record = who.records(name)[0]
            incarnation = record.status.incarnation + 1 if record.status else 1
            changes.append(who.set_status(name, dot, Status(incarnation, life, 1, "running")))
        elif kind == "exit":
            known = [(name, dot) for name in who for dot, _ in who.records(name)] or [("unknown", Dot(OTHER, 900 + rng.randrange(9)))]
            changes.append(who.exited(*rng.choice(known)))
        elif kind == "node":
            who.learn([NodeRecord(Life(rng.choice("xyz"), 1), 1.0, ())])
        elif kind == "sync":
            self.mine.join_content(self.theirs.content(leaves=range(1 << 15)))
            self.theirs.join_content(self.mine.content(leaves=range(1 << 15)))
            self.mine.merge_context(self.theirs.birds.context)
            self.theirs.merge_context(self.mine.birds.context)
        elif kind == "late" and self.late:
            self.mine.join(rng.choice(self.late))
        changes = [change for change in changes if change is not None]
        if changes and who is self.theirs:
            self.late.append(self.theirs.update_of(changes))
        self.write()

    def write(self):
        entries = self.mine.unwritten()
        if entries:
            self.pieces.append(journal.pack(entries))
        if self.copying is None and self.rng.random() < 0.2:
            self.copying, self.outdated = journal.copy(self.mine, lambda: VIEW), len(self.pieces)
        elif self.copying is not None:
            piece = next(self.copying, None)
            if piece is not None:
                self.pieces.append(piece)
            else:
                deleted = self.rng.randint(0, self.outdated)
                del self.pieces[:deleted]
                self.outdated -= deleted
                self.copying = self.copying if self.outdated else None


@given(st.randoms(use_true_random=False), st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_what_is_read_is_what_there_was_whenever_the_nest_ends(rng, length):
    story = Story(rng)
    for _ in range(length):
        story.act()
        again, _ = restored(story.pieces)
        assert same(again, story.mine)


def test_a_removal_of_what_was_never_here_is_kept():
    replica = Replica()
    replica.join(Update(Delta({"late": ()}, {Dot(OTHER, 1)})))
    again, _ = restored([journal.pack(replica.unwritten())])
    late = Replica()
    late.add("late", Dot(OTHER, 1), spec(), b"")
    again.join(late.update_for("late", Dot(OTHER, 1)))
    assert len(again) == 0


def test_the_last_view_counts():
    assert restored([journal.pack([VIEW]), journal.pack([frozenset([ME])])])[1] == {ME}
    assert restored([])[1] == frozenset()


@pytest.mark.parametrize("piece", [b"", b"nonsense", journal.pack([])[:-1], b"\x80\x05K\x01.", b"\x80\x05K\x01\x85."])
def test_what_cannot_be_read_is_said(piece):
    with pytest.raises(journal.UnreadableError, match="piece of the journal"):
        journal.unpack(piece)


# On the disk


def test_it_is_there_for_the_next_life(tmp_path):
    first = Journal(tmp_path)
    assert first.before() is None
    assert first.pieces() == ()
    first.lives(7)
    first.write(b"one")
    first.write(b"two")
    first.close()
    second = Journal(tmp_path)
    number, seconds = second.before()
    assert number == 7
    assert 0 <= seconds < 60
    assert second.pieces() == (b"one", b"two")
    second.clear()
    assert second.pieces() == ()
    second.close()


def test_it_is_whole_after_every_step_of_being_written_anew(tmp_path):
    """Whoever is killed in the middle has either what was there, or that and some of the copy."""
    book = Journal(tmp_path)
    old = [b"old %d" % n for n in range(40)]
    for piece in old:
        book.write(piece)
    new = [b"new %d" % n for n in range(5)]
    seen = []
    for step, _ in enumerate(book.replace(new)):
        if step == 2:
            book.write(b"meanwhile")
        seen.append(book.pieces())
    assert seen[0] == (*old, b"new 0")
    assert all(set(new) <= set(pieces) or set(old) <= set(pieces) for pieces in seen)
    assert book.pieces() == (b"new 0", b"new 1", b"new 2", b"meanwhile", b"new 3", b"new 4")
    assert all(pieces[-1] == b"new 4" for pieces in seen[5:])
    book.close()


def test_it_is_written_anew_when_it_is_long(tmp_path):
    book = Journal(tmp_path)
    assert not book.is_long
    for _ in range(5):
        book.write(bytes(1_000_000))
    assert book.is_long
    steps = book.replace([bytes(1_000_000)] * 2)
    next(steps)
    assert not book.is_long, "it is being done"
    assert len(list(steps)) >= 1
    assert not book.is_long
    for _ in range(3):
        book.write(bytes(1_000_000))
    assert not book.is_long, "three times as long as all there is"
    for _ in range(2):
        book.write(bytes(1_000_000))
    assert book.is_long
    book.close()


def test_a_damaged_one_is_begun_anew(tmp_path, caplog):
    (tmp_path / FILE).write_bytes(b"this is no database, and was never one" * 100)
    book = open_journal(tmp_path)
    assert book.pieces() == ()
    assert "begun anew" in caplog.text
    book.close()


def test_one_life_has_it_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("flock_ray.runtime.journal.PATIENCE", 0.1)
    book = Journal(tmp_path)
    book.write(b"mine")
    with pytest.raises(sqlite3.OperationalError):
        open_journal(tmp_path)
    book.close()


def test_what_there_is_of_a_context_alone():
    assert journal.unpack(journal.pack([Context({ME: 3})])) == (Context({ME: 3}),)


def test_stories_are_worth_reading():
    """Copies are made, and things come late."""
    stories = [Story(random.Random(seed)) for seed in range(30)]
    for story in stories:
        for _ in range(60):
            story.act()
    assert any(story.late for story in stories)
    assert sum(len(story.pieces) < 30 for story in stories) > 3


def test_a_copy_ends_with_the_view_that_was_written_last():
    """A nest may have come while the copy was made: whoever reads it must know of that one (H4)."""
    views = [frozenset([ME]), VIEW]
    pieces = journal.copy(Replica(), lambda: views[-1])
    assert restored(list(pieces))[1] == VIEW
