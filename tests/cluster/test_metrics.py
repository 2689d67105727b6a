"""Metrics as Prometheus sees them: read from the endpoints that Ray has on each node."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator

import psutil
import pytest
import ray

import flock_ray
from flock_ray import notices
from tests.cluster import birds
from tests.cluster.test_promises import nest_pid
from tests.support.waiting import eventually

SAMPLE = re.compile(r"^ray_(flock_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
TAG = re.compile(r'(\w+)="([^"]*)"')
DEADLINE = 90.0


@pytest.fixture(scope="module", autouse=True)
def _soon() -> Iterator[None]:
    """Ray gathers each second instead of every ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        yield


def scraped(flock="default"):
    """The latest values of a flock by metric, each with its tags: as a Prometheus server would find them on the nodes."""
    found = defaultdict(list)
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    text = answer.read().decode()
            except OSError:
                continue  # it died just now, and Ray does not know yet
            for name, tags, value in SAMPLE.findall(text):
                named = dict(TAG.findall(tags))
                if named.get("flock") == flock:
                    found[name].append((named, float(value)))
    return found


def total(name, **tags):
    return sum(value for named, value in scraped()[name] if tags.items() <= named.items())


@pytest.fixture
def flock_of_twelve(flyground, name):
    names = [f"{name}/{i}" for i in range(12)]
    flock_ray.options(light=True).start_many([(own, birds.Counter) for own in names])
    flock_ray.wait(names, timeout=60)
    yield names
    flock_ray.stop_many(names)


def test_birds_are_counted_by_state_and_each_by_one_nest(flyground, flock_of_twelve):
    node_of = {nest.node_id: nest.birds for nest in flock_ray.nests()}
    eventually(lambda: total("flock_birds", state="running") == 12, "all birds run", DEADLINE)
    running = {tags["node"]: value for tags, value in scraped()["flock_birds"] if tags["state"] == "running"}
    assert running == node_of
    eventually(lambda: total("flock_nest_load_share") == pytest.approx(1.0), "the shares are those of one whole", DEADLINE)
    shares = {tags["node"]: value for tags, value in scraped()["flock_nest_load_share"]}
    assert shares == pytest.approx({node: count / 12 for node, count in node_of.items()})


def test_crashes_restarts_and_a_bird_that_failed(flyground, name):
    before = {metric: total(f"{metric}_total") for metric in ("flock_bird_crashes", "flock_bird_restarts")}
    flock_ray.start(name, birds.Counter)
    with pytest.raises(flock_ray.FlockError):
        flock_ray.call(name, "die", timeout=60)
    flock_ray.wait(name, timeout=60)
    for metric, count in before.items():
        eventually(lambda metric=metric, count=count: total(f"{metric}_total") >= count + 1, metric, DEADLINE)
    other = f"{name}/hopeless"
    flock_ray.options(max_restarts=1).start(other, birds.Counter, "no", "such", "arguments")
    eventually(lambda: total("flock_birds", state="failed") == 1, "it has failed", DEADLINE)
    flock_ray.stop(other)


def test_calls_are_counted_and_their_times_are_in_a_histogram_by_path(flyground, name):
    bird = flock_ray.start(name, birds.Counter)
    bird.get()
    path = flock_ray.info(name).path
    before = total("flock_calls_total", path=path)
    for _ in range(500):
        bird.get()
    eventually(lambda: total("flock_calls_total", path=path) >= before + 500, "all calls are counted", DEADLINE)
    times = scraped()
    (count,) = {value for tags, value in times["flock_call_seconds_count"] if tags["path"] == path} or {0}
    seconds = sum(value for tags, value in times["flock_call_seconds_sum"] if tags["path"] == path)
    buckets = {tags["le"]: value for tags, value in times["flock_call_seconds_bucket"] if tags["path"] == path}
    assert 0 < count <= total("flock_calls_total", path=path), "of some of the calls"
    assert buckets["+Inf"] == count
    assert buckets["5.0"] > 0
    assert 1e-6 < seconds / count < 5.0


def test_moves_and_what_nests_send_each_other(flyground, flock_of_twelve):
    eventually(lambda: all(value > 0 for _, value in scraped()["flock_sync_bytes_total"]), "nests speak", DEADLINE)
    node = flyground.add()
    eventually(lambda: any(nest.node_id == node.node_id and nest.birds for nest in flock_ray.nests()), "the newcomer has birds")
    eventually(lambda: total("flock_bird_moves_total", node=node.node_id) >= 1, "they have moved there", DEADLINE)
    others = {nest.node_id for nest in flock_ray.nests()} - {node.node_id}
    flyground.crash(node)
    eventually(lambda: {nest.node_id for nest in flock_ray.nests()} == others, "it is gone")
    eventually(lambda: sum(total("flock_bird_moves_total", node=other) for other in others) >= 1, "they have moved back", DEADLINE)
    eventually(lambda: total("flock_birds") == len(flock_of_twelve), "each bird is counted once", DEADLINE)


def test_a_suspicion_is_counted_by_who_has_it(flyground):
    here = ray.get_runtime_context().get_node_id()
    node = next(nest.node_id for nest in flock_ray.nests() if nest.node_id != here)
    process = psutil.Process(nest_pid(node))
    suspicions = flock_ray.events(since=time.time(), kinds=notices.NestSuspected)
    process.suspend()
    try:
        suspicion = next(suspicions)
    finally:
        process.resume()
    assert isinstance(suspicion, notices.NestSuspected) and suspicion.life.node == node
    eventually(lambda: total("flock_nest_suspicions_total", node=suspicion.node_id) >= 1, "it is counted", DEADLINE)


def test_a_flock_may_go_without(flyground, name):
    other = flock_ray.Flock("other")
    other.init(metrics=False)
    bird = other.start(name, birds.Counter)
    bird.get()
    mine = flock_ray.start(name, birds.Counter)
    mine.get()
    before = total("flock_calls_total")
    mine.get()
    eventually(lambda: total("flock_calls_total") > before, "calls of this flock are counted", DEADLINE)
    assert not scraped("other")
    other.destroy()
