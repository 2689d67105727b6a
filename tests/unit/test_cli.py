"""The command line without a cluster: names and values are read as they are written, answers fit 80 columns and pipes."""

from __future__ import annotations

import io
import json
import shlex
import tomllib
import uuid
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flock_ray import errors, notices
from flock_ray.cli import commands, top
from flock_ray.cli.render import Answer, Facts, Line, Table, bar, lines_of, show
from flock_ray.cli.text import BadText, name_of, pasted, text_of, to_json, values_of
from flock_ray.specs import BirdInfo, BirdStack, Candidate, Dot, Explanation, Life, NestInfo, Running

ROOT = Path(__file__).parents[2]
NODE = "0123456789abcdef" * 3 + "01234567"
SIMPLE = st.text(st.characters()) | st.integers() | st.binary() | st.uuids()
NAMES = st.recursive(SIMPLE, lambda parts: st.lists(parts, max_size=3).map(tuple), max_leaves=6)


# Names


@given(NAMES)
@example("42")
@example(10**5_000)
@example(-(10**5_000))
@example((-5, ("",)))
@example("\ud800")
@example("(draft)")
@example("b'x")
def test_what_is_printed_can_be_pasted(name):
    text = text_of(name)
    read = name_of(text)
    assert (read, type(read)) == (name, type(name))
    assert "\n" not in text and "\t" not in text and text.isprintable() and not text.startswith("-")
    assert shlex.split(pasted(name)) == [text]


@pytest.mark.parametrize(
    "text, name",
    [
        ("tweety", "tweety"),
        ("room:7", "room:7"),
        ("42", 42),
        ("-5", -5),
        ("007", "007"),
        ('"42"', "42"),
        ("('room', 7)", ("room", 7)),
        ('b"\\x00"', b"\x00"),
        ('UUID("12345678-1234-5678-1234-567812345678")', uuid.UUID("12345678-1234-5678-1234-567812345678")),
    ],
)
def test_names_are_read_as_documented(text, name):
    assert name_of(text) == name and type(name_of(text)) is type(name)


@pytest.mark.parametrize("text", ["", "(7", "(True,)", "(1.5,)", '"a', "(f(),)", "(-'a',)", 'UUID("x")', "(" * 1_000, "9" * 5_000])
def test_what_is_no_name_is_refused_with_what_to_write(text):
    with pytest.raises(BadText, match="name"):
        name_of(text)


# Values


def test_values_are_json_by_position_or_keyword():
    assert values_of(["5", '"a"', "[1, null]", "k=2", 'text="x=y"']) == ((5, "a", [1, None]), {"k": 2, "text": "x=y"})


@pytest.mark.parametrize("texts", [["hello"], ["k=hello"], ["NaN"], ["k=1", "2"], ["k=1", "k=2"], [""]])
def test_a_value_that_is_none_is_named(texts):
    with pytest.raises(BadText):
        values_of(texts)


def test_results_that_json_does_not_know_are_their_repr():
    assert json.loads(to_json({"a": (1, b"x")})) == {"a": [1, "b'x'"]}
    loop = []
    loop.append(loop)
    assert isinstance(json.loads(to_json(loop)), str)
    assert json.loads(to_json({(1, 2): 3})) == "{(1, 2): 3}"


# Answers


TABLE = Table(("name", "state", "note"), [("'a b'", "running", "x" * 100), ("ünï漢字", "failed", "line\nbreak\tand tab")])


def printed(answer, terminal, as_json=False):
    file = io.StringIO()
    show(answer, Console(file=file, force_terminal=terminal, width=80, color_system=None, highlight=False), as_json)
    return file.getvalue()


def test_a_table_fits_80_columns_and_is_aligned():
    lines = lines_of(TABLE, 80)
    assert max(map(cell_len, lines)) <= 80
    assert lines[1].endswith("…")
    assert {cell_len(line[: line.index(word)]) for line, word in zip(lines, ("state", "running", "failed"), strict=True)} == {9}


def test_a_pipe_gets_whole_cells_between_tabs_and_no_titles_or_colours():
    assert printed(Answer(None, [TABLE]), False).splitlines() == [
        "'a b'\trunning\t" + "x" * 100,
        "ünï漢字\tfailed\tline break and tab",
    ]


def test_a_long_name_is_never_cut():
    name = "n" * 100
    assert name in lines_of(Table(("name", "note"), [(name, "y" * 50)]), 80)[1]


def test_a_text_of_several_lines_is_below_its_label():
    assert lines_of(Facts([("state", "failed"), ("error", "Traceback\n  boom")]), 80) == [
        "state  failed",
        "error",
        "    Traceback",
        "      boom",
    ]
    assert lines_of(Facts([("state", "failed")]), None) == ["state\tfailed"]


def test_an_event_is_a_line():
    notice = notices.BirdCrashed(Life(NODE, 1), "a b", Dot(Life(NODE, 1), 1), 2, "Traceback\nValueError: boom", time=0.0)
    answer = commands.noticed(notice)
    (line,) = answer.view
    assert isinstance(line, Line)
    (piped,) = lines_of(line, None)
    assert piped.split("\t")[1:5] == ["warning", NODE[:8], "BirdCrashed", "'a b'"] and "boom" in piped
    assert "\t" not in lines_of(line, 80)[0]
    assert answer.data["name"] == "a b" and answer.data["kind"] == "BirdCrashed"


def test_answers_are_json_when_asked():
    assert json.loads(printed(Answer({"a": [1]}, [TABLE]), True, as_json=True)) == {"a": [1]}


def test_an_explanation_and_a_stack_are_shown():
    bird = BirdInfo("a", NODE, "running", 1, 0, "", "", False)
    told = Explanation(
        bird, NODE, (Candidate(NODE, 320, "running", ""), Candidate("f" * 56, 320, "", "has left CPU 0 of 1")), ("It is so.",), NODE
    )
    text = printed(Answer(None, commands.explained(told).view), True)
    assert "a is running.\nIt is so.\n" in text and "owns it" in text and "has left CPU 0 of 1" in text
    assert max(map(cell_len, text.splitlines())) <= 80
    stack = BirdStack(NODE, 7, "running", 3, (Running("add", 1.25, ("b", ("c", 1)), '  File "x.py", line 1, in add'),))
    answer = commands.stacked("a", stack)
    text = printed(answer, False)
    assert "queue\t3" in text and "add for 1.2 s, called by '(\"c\", 1)' <- b\n" in text and "in add" in text
    assert json.loads(printed(answer, False, as_json=True))["running"][0]["waiting"] == ["b", '("c", 1)']
    assert "No method is under way." in printed(commands.stacked("a", stack._replace(running=())), False)


def test_top_shows_rates_between_two_looks_in_80_columns():
    nests = (NestInfo(NODE, "a:1", 320, 30, 0.5), NestInfo("f" * 56, "b:1", 320, 10, 0.5))
    before = top.Look(10.0, nests, {"running": 40}, {NODE: (100, 1)}, {})
    now = top.Look(12.0, nests, {"running": 39, "failed": 1}, {NODE: (2_100, 3), "f" * 56: (7, 0)}, {NODE: {"moves": 2}})
    answer = top.answer_of("default", before, now)
    head, table = answer.view
    lines = [head, *lines_of(table, 80)]
    assert max(map(cell_len, lines)) <= 80 and "39 running, 1 failed" in head
    assert [table.rows[0][at] for at in (2, 3, 4, 5, 6)] == ["75 %", "30", "1000", "1", "2"]
    assert answer.data["nests"][0]["calls_per_s"] == 1000.0
    assert answer.data["nests"][1]["calls_per_s"] == 0.0, "what a nest counted before it was looked at is no rate"
    assert bar(0.5, 4) == "██··" and bar(2.0, 4) == "████"


# Commands


def fails(capsys, *words):
    code = commands.run(words)
    out, err = capsys.readouterr()
    assert not out and err.startswith("flock-ray: ") and err.count("\n") == 1
    return code, err


@pytest.mark.parametrize("words", [["fly"], ["info"], ["birds", "--state", "dead"], ["top", "-i", "0"], ["call", "a"], ["status", "--bad"]])
def test_usage_errors_are_one_sentence_and_say_where_help_is(capsys, words):
    code, err = fails(capsys, *words)
    assert code == 2 and "--help`" in err


def test_local_is_no_address_of_a_cluster(capsys):
    assert fails(capsys, "status", "--address", "local")[0] == 2


@pytest.mark.parametrize(
    "command", ["status", "nests", "birds", "info", "explain", "stack", "start", "call", "cast", "stop", "events", "top"]
)
def test_every_command_has_the_shared_options(capsys, command):
    assert commands.run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--address", "--flock", "--json", "RAY_ADDRESS", "FLOCK_RAY_FLOCK"))
    assert max(map(len, text.splitlines())) <= 80


def test_help_says_the_exit_codes_and_how_names_are_written(capsys):
    assert commands.run([]) == 0
    text = capsys.readouterr().out
    assert "Exit status: 0" in text and "UUID(" in text and "..." not in text.split("Commands:")[1].split("Exit status")[0]


def failed(error, cause=None):
    error.__cause__ = cause
    return commands.explained_failure(error)


def test_errors_have_their_exit_codes():
    assert failed(errors.FlockNotRunning("no flock"))[1] == 3
    assert failed(errors.BirdNotFound("no bird", "a"))[1] == 1
    assert failed(BadText("no name"))[1] == 2
    assert failed(errors.CallTimeout("late", "a"), errors.RemoteError("Traceback\nValueError: boom", "a")) == (
        "late (its last error: ValueError: boom)",
        1,
    )
    assert failed(ValueError("boom"), errors.RemoteError("Traceback", "a")) == ("the method raised ValueError: boom", 1)
    assert failed(KeyError("ours")) == ("KeyError: 'ours'", 1)


def test_the_console_script_is_the_way_in():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"flock-ray": f"{commands.__name__}:{commands.main.__name__}"}
