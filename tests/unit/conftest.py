"""Unit tests start no Ray: `ray.init` and whatever would start a cluster by itself raise."""

from __future__ import annotations

import hypothesis
import pytest
import ray

hypothesis.settings.register_profile("busy", deadline=None)  # others have the CPUs too: how long one example takes says nothing
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test started Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray._private.worker, "init", refuse)
