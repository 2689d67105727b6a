"""The pytest plugin: a fixture `flock`, and a marker that says what it is like. Loads nothing until a test asks for it.

@pytest.mark.flock(nodes=5, seed=1, call_timeout=5.0)
def test_counter(flock): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flock_ray.testing import Flock


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flock(nodes=3, seed=0, **settings): what the fixture `flock` is like; see flock_ray.testing.Flock")


@pytest.fixture
def flock(request: pytest.FixtureRequest) -> Iterator[Flock]:
    """A `flock_ray.testing.Flock`: the API of flock_ray in this process, without Ray, in virtual time."""
    from flock_ray.testing import Flock

    marker = request.node.get_closest_marker("flock")
    with Flock(*marker.args, **marker.kwargs) if marker is not None else Flock() as opened:
        yield opened
