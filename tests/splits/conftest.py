"""One network of four hosts for a module. Where it cannot be made, these tests are skipped with the reason; in CI they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.splits.hosts import Network
from tests.support.namespaces import why_not


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    reason = why_not()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    net = Network(Path(f"/tmp/fr{os.getpid()}"), tmp_path_factory.mktemp("logs"))
    try:
        yield net
    finally:
        net.close()
