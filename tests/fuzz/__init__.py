"""Fuzzing of the protocol (`protocol.py`) and of what listens (`listener.py`). Run by hand, not collected by pytest."""

from __future__ import annotations


class Violation(Exception):
    """A promise was broken."""


def promised(true: object, what: str) -> None:
    if not true:
        raise Violation(what)
