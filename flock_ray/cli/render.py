"""How answers look: on a terminal fitted to its width, in a pipe a line a row with tabs, or as JSON.

Rules kept here: a name is never cut, for it is to be copied; the last column of a table is cut where a terminal is too narrow, in a pipe
nothing is; what goes to a pipe has no colours, and no text of a bird's can break its lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

GAP = "  "
STYLES = {
    "running": "green", "starting": "cyan", "moving": "cyan", "restarting": "yellow", "pending": "yellow", "failed": "bold red",
    "warning": "yellow", "error": "bold red",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows under titles. Cells are plain texts."""

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Facts:
    """What is known of one thing, as (label, text); a text of several lines goes below its label."""

    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Line:
    """One row of many that come one by one: its cells in a pipe, and what people get to see of it."""

    cells: tuple[str, ...]
    brief: str


View = Table | Facts | Line | str


@dataclass(frozen=True)
class Answer:
    """What a command answers: `data` for `--json`, `view` for people and pipes."""

    data: Any
    view: Sequence[View]


def one_line(text: str) -> str:
    """A text of whatever origin as a cell."""
    return " ".join(text.split())


def lines_of(view: View, width: int | None) -> list[str]:
    """A view as lines.

    Args:
        width: of the terminal in columns; `None`: it is a pipe.
    """
    if isinstance(view, Table):
        return _piped(view) if width is None else _aligned(view, width)
    if isinstance(view, Line):
        return [view.brief if width is not None else "\t".join(view.cells)]
    if isinstance(view, Facts):
        return list(_facts(view, width))
    return view.splitlines()


def _piped(table: Table) -> list[str]:
    return ["\t".join(map(one_line, row)) for row in table.rows]


def _aligned(table: Table, width: int) -> list[str]:
    rows = [tuple(map(one_line, row)) for row in table.rows]
    widths = [max(cell_len(row[column]) for row in (table.titles, *rows)) for column in range(len(table.titles))]
    lines = []
    for row in (table.titles, *rows):
        *cells, last = row
        start = "".join(set_cell_size(cell, size) + GAP for cell, size in zip(cells, widths, strict=False))
        lines.append((start + _cut(last, width - cell_len(start))).rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 1 else ""


def _facts(view: Facts, width: int | None) -> Iterable[str]:
    size = max(len(label) for label, _ in view.facts)
    for label, text in view.facts:
        first, *rest = text.splitlines() or [""]
        start = f"{label}\t" if width is None else label.ljust(size) + GAP
        if rest:
            yield start.rstrip(" ")
            yield from (f"    {line}" for line in (first, *rest))
        else:
            yield (start + first).rstrip()


def show(answer: Answer, console: Console, as_json: bool) -> None:
    """Prints an answer."""
    if as_json:
        console.file.write(json.dumps(answer.data, ensure_ascii=False, default=repr) + "\n")
        return
    width = console.width if console.is_terminal else None
    for view in answer.view:
        for number, line in enumerate(lines_of(view, width)):
            if width is None:
                console.file.write(line + "\n")  # rich would make spaces of the tabs
            else:
                console.print(_styled(line, number == 0 and isinstance(view, Table)), soft_wrap=True)
    console.file.flush()


def _styled(line: str, title: bool) -> Text:
    text = Text(line, style="bold" if title else "")
    for word, style in STYLES.items():
        text.highlight_regex(rf"(?<!\S){word}(?!\S)", style)
    return text


def bar(share: float, width: int) -> str:
    """A load from 0 to 1 as a bar."""
    filled = round(max(0.0, min(share, 1.0)) * width)
    return "█" * filled + "·" * (width - filled)
