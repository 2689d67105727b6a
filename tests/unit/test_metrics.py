"""What is given to Ray: exact counts of calls, the times of some of them, and nothing on the path of a call."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from flock_ray.config import Config
from flock_ray.notices import BirdCrashed, BirdMoved, BirdRestarted, BirdRunning, NestSuspected
from flock_ray.runtime import metrics
from flock_ray.runtime.metrics import METRICS, SAMPLES, CallMetrics, NestMetrics
from flock_ray.specs import Dot, Life

ME, PEER = Life("a", 1), Life("b", 1)


class Kept:
    """Stands for each of Ray's metrics, and keeps what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, list[tuple]] = {}

    def metric(self, name: str):
        assert name in METRICS
        given = self.given.setdefault(name, [])
        take = lambda value, tags=None: given.append((value, *(tags or {}).values()))  # noqa: E731
        return SimpleNamespace(inc=take, set=take, observe=take)


@pytest.fixture
def kept(monkeypatch):
    kept = Kept()
    monkeypatch.setattr(metrics._Given, "metric", lambda self, name: kept.metric(name))
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.cluster, "is_ray_client", lambda: False)
    return kept


def calls(posted: list, config: Config | None = None) -> CallMetrics:
    return CallMetrics("default", SimpleNamespace(known_config=config), SimpleNamespace(post=posted.append))


def test_every_call_is_counted_and_some_of_their_times_are_given(kept):
    posted: list = []
    noted = calls(posted)
    for _ in range(3 * SAMPLES):
        noted.note("unix", 0.00004)
    noted.note("tcp", 0.001)
    assert len(posted) == 1, "the courier is woken once a second"
    noted._give()
    assert sorted(kept.given["flock_calls"]) == [(1, "tcp"), (3 * SAMPLES, "unix")]
    assert kept.given["flock_call_seconds"] == [(0.00004, "unix")] * SAMPLES
    noted.note("unix", 0.00004)
    assert len(posted) == 2
    noted._give()
    assert kept.given["flock_calls"][-1] == (1, "unix"), "nothing is given twice"


def test_a_flock_without_metrics_gives_none_and_wakes_nobody_again(kept):
    posted: list = []
    noted = calls(posted, Config(metrics=False))
    noted.note("unix", 0.00004)
    noted._give()
    for _ in range(10 * SAMPLES):
        noted.note("unix", 0.00004)
    assert not kept.given
    assert len(posted) == 1
    assert len(noted._times) == SAMPLES, "and it does not grow"


def test_a_nest_gives_what_it_has_noticed_once_and_each_state_always(kept):
    nest = NestMetrics("default", "a")
    of_bird = ("x", Dot(ME, 1), 1)
    for notice in (BirdCrashed(ME, *of_bird), BirdRestarted(ME, *of_bird), BirdRestarted(ME, *of_bird), BirdRunning(ME, *of_bird)):
        nest.noticed(notice)
    nest.noticed(BirdMoved(ME, *of_bird, "b"))
    nest.noticed(NestSuspected(ME, PEER))
    nest.sent(100)
    nest.sent(20)
    nest.give(Counter(running=3), 0.25)
    counted = {name: given for name, given in kept.given.items() if METRICS[name].kind == "Counter"}
    assert counted == {
        "flock_bird_crashes": [(1,)],
        "flock_bird_restarts": [(2,)],
        "flock_bird_moves": [(1,)],
        "flock_nest_suspicions": [(1,)],
        "flock_sync_bytes": [(120,)],
    }
    assert {state: value for value, state in kept.given["flock_birds"]} == {
        **dict.fromkeys(metrics.STATES, 0),
        "running": 3,
    }, "one that is no more is 0"
    assert kept.given["flock_nest_load_share"] == [(0.25,)]
    nest.give(Counter(), 0.0)
    assert all(len(kept.given[name]) == 1 for name in counted)
