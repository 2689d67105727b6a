"""How names and values are written on a command line, and read back.

A name is written as itself where that is a plain text, else as a Python literal with double quotes:

    tweety      the str "tweety"          "42"          the str "42"
    42          the int 42                ("room", 7)   a tuple
    (-5)        a negative int            b"\\x00key"    bytes
                                          UUID("12345678-1234-5678-1234-567812345678")

What begins as a literal does (a quote, a bracket, `b"`, `UUID(`, or all digits) has to be one; everything else is a str as it stands.
`name_of(text_of(name)) == name` for every name. `pasted` quotes that for a shell, so that what is printed can be pasted after a command.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import uuid
from collections.abc import Sequence
from typing import Any

from flock_ray.specs import Name

_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_LITERAL = ("(", '"', "'", 'b"', "b'", "UUID(")
_LONG = 4_000  # digits: longer ints Python refuses to read or write in decimal
_KEYWORD = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class BadText(ValueError):
    """A text on the command line that means nothing; says how it has to be written."""


def text_of(name: Name) -> str:
    """A name as it is written on a command line."""
    if isinstance(name, str) and _is_plain(name):
        return name
    return f"({name})" if isinstance(name, int) and name < 0 and name.bit_length() < _LONG else _literal(name)


def pasted(name: Name) -> str:
    """The same, quoted for a shell where it needs to be."""
    return shlex.quote(text_of(name))


def _is_plain(text: str) -> bool:
    literal = text.startswith((*_LITERAL, "-")) or _INT.fullmatch(text)
    return bool(text) and text.isprintable() and text.strip() == text and not literal


def _literal(name: Name) -> str:
    if isinstance(name, str):
        return _quoted(name)
    if isinstance(name, bytes):
        return "b" + _quoted(name.decode("latin-1"), ascii_only=True)
    if isinstance(name, uuid.UUID):
        return f'UUID("{name}")'
    if isinstance(name, int):
        return str(name) if name.bit_length() < _LONG else f"({name:#x})"
    return f"({', '.join(map(_literal, name))}{',' * (len(name) == 1)})"


def _quoted(text: str, ascii_only: bool = False) -> str:
    def one(char: str) -> str:
        if char in '"\\':
            return "\\" + char
        return char if char.isprintable() and (char.isascii() or not ascii_only) else char.encode("unicode_escape").decode()

    return f'"{"".join(map(one, text))}"'


def name_of(text: str) -> Name:
    """The name that a text stands for.

    Raises:
        BadText: it is empty, or begins as a literal does and is none; says how a name is written.
    """
    if not text:
        raise BadText("a name must not be empty; the empty text itself is written '\"\"'")
    if not (text.startswith(_LITERAL) or _INT.fullmatch(text)):
        return text
    try:
        return _name_in(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        again = shlex.quote(_quoted(text))
        raise BadText(f"the name {text} begins as a literal and is none; if it is meant as text, write {again}") from error


def _name_in(node: ast.expr) -> Name:
    match node:
        case ast.Constant(value=value) if type(value) in (str, int, bytes):
            return value  # type: ignore[return-value]  # of these types, as just looked at
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) is int:
            return -value
        case ast.Tuple(elts=parts):
            return tuple(map(_name_in, parts))
        case ast.Call(func=ast.Name(id="UUID"), args=[ast.Constant(value=str(value))], keywords=[]):
            return uuid.UUID(value)
    raise ValueError("no literal of a name")


def values_of(texts: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a method or class: JSON values, by position, or as `key=VALUE`.

    Raises:
        BadText: one is no JSON value; says which, and how a text is written.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        keyword = _KEYWORD.fullmatch(text)
        if keyword is None:
            if kwargs:
                raise BadText(f"the argument {text} comes after a key=VALUE; put it before")
            args.append(_value_of(text))
        elif keyword[1] in kwargs:
            raise BadText(f"{keyword[1]}= is given twice; leave one out")
        else:
            kwargs[keyword[1]] = _value_of(keyword[2])
    return tuple(args), kwargs


def _value_of(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise BadText(f"{text} is no JSON value; a text is written {shlex.quote(json.dumps(text))}") from error


def _no_constant(text: str) -> None:
    raise ValueError(text)


def to_json(value: Any) -> str:
    """A value as JSON, in one line; what JSON does not know as its `repr`."""
    try:
        return json.dumps(value, default=repr, ensure_ascii=False)
    except (TypeError, ValueError):  # a dict with keys of other types, or one that contains itself
        return json.dumps(repr(value), ensure_ascii=False)
