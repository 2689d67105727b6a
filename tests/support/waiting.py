"""Waiting for what is to become so, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], what: str, deadline: float = 60.0) -> Any:
    """Waits until a condition holds and returns its value; fails with the last value."""
    end, value = time.monotonic() + deadline, None
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)  # between looks at the condition
    raise AssertionError(f"not within {deadline:g} s: {what}; last seen {value!r}")
