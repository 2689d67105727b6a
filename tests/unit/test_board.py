"""The notices of a nest as its readers see them: each once, in its nest's order, by time, and what was dropped is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flock_ray.core import board
from flock_ray.core.board import UNREAD, Board, Cursor, Page, Reader
from flock_ray.notices import BirdCrashed, BirdNotice, BirdStarted, Missed, NestReady, Notice
from flock_ray.specs import Dot, Life

HERE, NEXT = Life("here", 1), Life("here", 2)


def started(n: int, by: Life = HERE) -> BirdStarted:
    return BirdStarted(by, n, Dot(by, n), 0)


def board_with(count: int, by: Life = HERE) -> Board:
    made = Board(by)
    for n in range(1, count + 1):
        made.add(started(n, by), float(n))
    return made


def names(notices) -> list[object]:
    return [getattr(notice, "name", type(notice).__name__) for notice in notices]


def read_all(reader: Reader, boards: dict[str, Board], kinds=Notice, since: float = 0.0) -> list[Notice]:
    read: list[Notice] = []
    while not reader.done:
        for node, one in boards.items():
            cursor = reader.wants(node)
            if reader.is_behind(node) and cursor is not None:
                reader.take(node, one.read(cursor, kinds, since))
        read += reader.gather()
    return read


def test_a_cursor_goes_on_where_it_was_and_nothing_comes_twice(monkeypatch):
    monkeypatch.setattr(board, "PAGE", 3)
    made, cursor, pages = board_with(7), UNREAD, []
    while not pages or pages[-1].more:
        pages.append(made.read(cursor, Notice, 0.0))
        cursor = pages[-1].cursor
    assert [names(page.notices) for page in pages] == [[1, 2, 3], [4, 5, 6], [7]]
    assert made.read(cursor, Notice, 0.0) == Page(Cursor(HERE, 7), (), 0, False)
    made.add(started(8), 8.0)
    assert names(made.read(cursor, Notice, 0.0).notices) == [8]


def test_a_board_is_bounded_and_who_comes_too_late_is_told_how_much_he_missed(monkeypatch):
    monkeypatch.setattr(board, "KEPT", 5)
    made = board_with(3)
    cursor = made.read(UNREAD, Notice, 0.0).cursor
    for n in range(4, 20):
        made.add(started(n), float(n))
    page = made.read(cursor, Notice, 0.0)
    assert (names(page.notices), page.missed) == ([15, 16, 17, 18, 19], 11)
    assert made.read(UNREAD, Notice, 0.0).missed == 0  # who has just come has missed nothing


def test_long_errors_are_bounded_together(monkeypatch):
    monkeypatch.setattr(board, "ERRORS", 1_000)
    made = Board(HERE)
    for n in range(1, 10):
        made.add(BirdCrashed(HERE, n, Dot(HERE, n), 1, "x" * 400), float(n))
        made.add(started(n), float(n))
    kept = made.read(UNREAD, Notice, 0.0).notices
    assert sum(len(getattr(notice, "error", "")) for notice in kept) <= 1_000
    made.add(BirdCrashed(HERE, "long", Dot(HERE, 1), 1, "x" * 5_000), 10.0)
    assert names(made.read(UNREAD, Notice, 0.0).notices) == ["long"]


def test_the_next_life_of_a_nest_is_read_from_its_beginning():
    page = board_with(3, NEXT).read(Cursor(HERE, 40), Notice, 0.0)
    assert (names(page.notices), page.missed, page.cursor) == ([1, 2, 3], 0, Cursor(NEXT, 3))


def test_a_clock_that_is_set_back_stands_still():
    made = board_with(3)
    made.add(started(4), 1.0)
    assert [notice.time for notice in made.read(UNREAD, Notice, 0.0).notices] == [1.0, 2.0, 3.0, 3.0]


def test_only_the_kinds_and_the_time_that_were_asked_for_come():
    made = board_with(5)
    made.add(NestReady(HERE, HERE), 6.0)
    assert names(made.read(UNREAD, (NestReady,), 0.0).notices) == ["NestReady"]
    assert names(made.read(UNREAD, BirdNotice, 4.0).notices) == [4, 5]
    assert made.read(UNREAD, BirdCrashed, 0.0) == Page(Cursor(HERE, 6), (), 0, False)  # looked at all the same


@given(st.lists(st.lists(st.integers(0, 20), max_size=12), min_size=1, max_size=4), st.integers(1, 4))
def test_all_that_was_before_comes_once_by_time_and_in_each_nests_order(times, page):
    boards = {}
    for nest, own in enumerate(times):
        by = Life(f"n{nest}", 1)
        boards[by.node] = Board(by)
        for n, time in enumerate(own):
            boards[by.node].add(started(n, by), float(time))
    reader = Reader()
    for node in boards:
        reader.follow(node)
    before, board.PAGE = board.PAGE, page
    try:
        read = read_all(reader, boards)
    finally:
        board.PAGE = before
    assert [notice.time for notice in read] == sorted(notice.time for notice in read)
    for nest, own in enumerate(times):
        assert names(notice for notice in read if notice.node_id == f"n{nest}") == list(range(len(own)))


def test_a_nest_that_has_not_answered_keeps_the_others_waiting_until_it_counts_as_silent():
    reader = Reader()
    reader.follow("here")
    reader.follow("there")
    reader.take("here", board_with(2).read(UNREAD, Notice, 0.0))
    assert list(reader.gather()) == []
    reader.silent("there")
    assert names(reader.gather()) == [1, 2]
    reader.take("there", board_with(1, Life("there", 1)).read(UNREAD, Notice, 0.0))  # it is heard again: late, and not lost
    assert names(reader.gather()) == [1]


def test_who_reads_slowly_is_not_sent_more():
    reader = Reader()
    reader.follow("here")
    reader.take("here", board_with(2).read(UNREAD, Notice, 0.0))
    assert reader.wants("here") is None
    assert names(reader.gather()) == [1, 2]
    assert reader.wants("here") == Cursor(HERE, 2)


def test_what_was_missed_comes_in_its_place(monkeypatch):
    monkeypatch.setattr(board, "KEPT", 2)
    reader, made = Reader(), board_with(1)
    reader.follow("here")
    reader.take("here", made.read(UNREAD, Notice, 0.0))
    for n in range(2, 6):
        made.add(started(n), float(n))
    reader.take("here", made.read(Cursor(HERE, 1), Notice, 0.0))
    read = list(reader.gather())
    assert names(read) == [1, "Missed", 4, 5]
    assert isinstance(read[1], Missed) and (read[1].count, read[1].node_id, read[1].time) == (2, "here", 4.0)


def test_a_nest_that_is_given_up_is_named():
    reader = Reader()
    reader.follow("there")
    reader.give_up("there")
    (missed,) = reader.gather()
    assert isinstance(missed, Missed) and (missed.node_id, missed.count) == ("there", None)
    assert reader.done
