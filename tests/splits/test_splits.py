"""The promises of DESIGN's table for a split and after it (H4, P3), on four hosts with networks of their own.

Each bird notes every 50 ms that it lives, so that two lives of a name are seen for as long as they overlap.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

from flock_ray.core.ring import ring_from
from tests.splits.hosts import DriverError
from tests.support.diary import Audit, now, runs, twice_until
from tests.support.waiting import eventually

BOOT = 60.0  # seconds for a flock
SIDES = 25.0  # until all birds answer on both sides of a split: a death is seen in 2 s, a lonely nest takes 9 (Lifeguard)
AFTER = 10.0  # after a heal: each name runs once (H4)


def on_all(hosts, what, *args, **kwargs):
    """What each host's driver says, asked at the same time."""
    asked = [host.begin(what, *args, **kwargs) for host in hosts]
    return [future.result(BOOT) for future in asked]


def owner_of(weights):
    ring = ring_from(tuple(sorted((node, weight) for node, weight in weights)))
    return ring.owner


class FlockOf:
    """A flock, seen from all hosts, and the birds whose lives are noted."""

    def __init__(self, network, name, folder, **settings):
        self.network, self.name, self.folder = network, name, folder
        folder.mkdir()
        for future in [host.begin("init", name, **settings) for host in network.hosts]:
            future.result(BOOT)
        eventually(self.is_whole, "a whole view everywhere", BOOT)
        self.weights = network.hosts[0].do("nests", name)
        self.tags = {}

    def is_whole(self):
        nodes = {host.node for host in self.network.hosts}
        return all({node for node, _ in seen} == nodes for seen in on_all(self.network.hosts, "nests", self.name))

    def path(self, name):
        return self.folder / name.replace("/", "-")

    def start(self, host, name, tag="first", light=True):
        self.tags[name] = tag
        host.do("start", self.name, name, str(self.path(name)), tag, light)

    def named(self, prefix, wanted):
        """A name that belongs to the first of these hosts, and with only some of them there to the one that is named beside.

        Args:
            wanted: pairs of hosts, and the owner when only these are there.
        """
        owners = [(owner_of([w for w in self.weights if w[0] in {h.node for h in hosts}]), host.node) for hosts, host in wanted]
        return next(name for n in range(10_000) if (name := f"{prefix}{n}") not in self.tags and all(of(name) == to for of, to in owners))

    def has_spares(self):
        """Are there on each host: one for light birds, one of a bird of its own, and a spare? Those whose life is over end in seconds."""
        return all(count == 3 for count in on_all(self.network.hosts, "processes", self.name))

    def replicas(self):
        return on_all(self.network.hosts, "birds", self.name)

    def is_one(self, names):
        """Do all nests say the same, and does each of these names run, and no other?"""
        if not self.is_whole():
            return False
        first, *others = self.replicas()
        return all(other == first for other in others) and {b["name"]: b["state"] for b in first} == dict.fromkeys(names, "running")

    def once(self, names):
        return all(len(now(self.path(name), 0.5)) == 1 for name in names)

    def heals(self, names, gone=()):
        """Heals the network, and checks that 10 s later all is as if there had been no split. Returns when it was healed."""
        healed = self.network.heal()
        try:
            eventually(lambda: self.is_one(names) and self.once(names), "one life of each, replicas equal", AFTER)
        except AssertionError as error:
            lines = [f"{host}: {bird}" for host, seen in zip(self.network.hosts, self.replicas(), strict=True) for bird in seen]
            running = {name: now(self.path(name)) for name in [*names, *gone]}
            raise AssertionError("\n".join([str(error), str(self.is_whole()), str(running), *lines])) from None
        equal = time.monotonic() - healed
        time.sleep(max(0.0, healed + AFTER + 3 - time.monotonic()))  # two lives would be seen now
        overlaps = {name: max(0.0, twice_until(self.path(name)) - healed) for name in self.tags if self.path(name).exists()}
        last = max(overlaps.values())
        print(f"after the heal: the same everywhere after {equal:.1f} s, the last second life ended after {last:.1f} s")
        assert last < AFTER, overlaps
        assert self.is_one(names)
        assert not any(now(self.path(name)) for name in gone)
        return healed

    def ran_at_most_once(self, fates):
        audit = Audit(fates, runs(self.folder.iterdir()))
        assert not audit.not_once, "of these callers heard of success"
        assert not audit.twice, "of these callers heard of a failure"

    def conflicts(self, name):
        return [
            text
            for seen in on_all(self.network.hosts, "notices", self.name)
            for kind, of, text in seen
            if (kind, of) == ("NameConflict", name)
        ]

    def left(self):
        return [[text for kind, _, text in seen if kind == "NestLeft"] for seen in on_all(self.network.hosts, "notices", self.name)]

    def answers_on(self, *sides, within=SIDES):
        """Waits until all birds answer on all hosts, from birds of that side. Prints how long it took."""
        began = time.monotonic()
        names = list(self.tags)
        asked = [(side, host, host.begin("answer", self.name, names, began + within)) for side in sides for host in side]
        for side, host, future in asked:
            for name, answer in future.result(within + 30).items():
                assert not isinstance(answer, str), f"{host}, {name}: {answer}"
                assert answer[0] in {each.node for each in side}, f"{host} reached {name} on the other side"
        return time.monotonic() - began


@pytest.fixture(scope="module")
def flock(network, tmp_path_factory):
    """Twelve birds, three of each host; of these two are light and one has a process of its own. With a spare on each host."""
    flock = FlockOf(network, "default", tmp_path_factory.mktemp("birds") / "default", spares=1)
    every = network.hosts
    h1, h2, h3, h4 = every
    left, right = [h1, h2], [h3, h4]
    for i, host in enumerate(every):
        for _ in range(2):
            flock.start(host, flock.named("light", [(every, host)]))
        # Without the others each side's two spares take over one bird each: no host needs two.
        other = (right, right[i]) if host in left else (left, left[i - 2])
        flock.start(host, flock.named("own", [(every, host), other]), light=False)
    eventually(lambda: flock.is_one(flock.tags), "all run", BOOT)
    flock.answers_on(every)
    return flock


@pytest.fixture(autouse=True)
def healed(network):
    """Whatever becomes of a test, the next one has a whole network."""
    yield
    network.heal()


def split(network, *cut):
    rest = [host for host in network.hosts if host not in cut]
    print(f"\n{rest} | {list(cut)}")
    return network.cut_off(*cut), rest, list(cut)


def lives_through_a_split(network, flock, seconds):
    """What is promised of a split in two halves and the heal: each step is a row of the table of promises."""
    h1, h2, h3, h4 = network.hosts
    known = list(flock.tags)
    eventually(flock.has_spares, "a spare on each host", BOOT)
    for host in network.hosts:
        host.do("begin_calls", "default", known, False)
    at, left, right = split(network, h3, h4)
    took = flock.answers_on(left, right)
    print(f"all {len(known)} birds answer on both sides after {took:.1f} s")

    stopped, removed = [name for name in known if name.startswith("light")][:2]
    for host, tag, other in ((h2, "only-left", h3), (h3, "only-right", h2)):
        began = time.monotonic()
        flock.start(host, tag, tag)
        assert host.do("answer", "default", [tag], began + 10)[tag] == [now(flock.path(tag))[0].node, tag]
        print(f"{tag} answers after {time.monotonic() - began:.2f} s")
        assert not other.do("alive", "default", tag)
        with pytest.raises(DriverError, match="BirdNotFound"):
            other.do("call", "default", tag, "who", 5)
    told = len(flock.conflicts("both"))  # of an earlier split
    flock.start(h1, "both", "earlier")
    h4.do("start", "default", "both", str(flock.path("both")), "later", True)
    assert [host.do("call", "default", "both", "who", 10)[1] for host in (h1, h2, h3, h4)] == ["earlier", "earlier", "later", "later"]

    h1.do("stop", "default", stopped)
    h1.do("stop", "default", removed)
    h4.do("stop", "default", removed)
    h4.do("start", "default", removed, str(flock.path(removed)), "again", True)
    flock.tags[removed] = "again"
    nodes = {host.node for host in right}
    for name in (stopped, removed):
        eventually(
            lambda name=name: {life.node for life in now(flock.path(name))} <= nodes and len(now(flock.path(name))) == 1,
            f"{name} lives on one side only",
            10,
        )
        assert not h2.do("alive", "default", name)
    if seconds > time.monotonic() - at:
        time.sleep(at + seconds - time.monotonic())
    for name in set(known) - {stopped, removed}:
        assert len(now(flock.path(name))) == 2, f"{name} runs once per side"
    remain = [name for name in flock.tags if name != stopped]
    flock.heals(remain, gone=[stopped])
    del flock.tags[stopped]
    took = flock.answers_on(network.hosts, within=AFTER)
    told = [count for host in network.hosts for count in host.do("end_calls")]
    flock.ran_at_most_once({ticket: fate for count in told for ticket, fate in count["fates"].items()})
    print(f"all through it: {sum((Counter(count['outcomes']) for count in told), Counter())}")
    tags = [host.do("answer", "default", ["both", removed], 0) for host in network.hosts]
    assert all((found["both"][1], found[removed][1]) == ("earlier", "again") for found in tags), tags
    assert len(flock.conflicts("both")) == told + 1, flock.conflicts("both")
    for name in ("only-left", "only-right", "both"):
        h2.do("stop", "default", name)
        del flock.tags[name]
    flock.start(h1, stopped)
    eventually(lambda: flock.is_one(flock.tags), "as before", 30)


def test_both_sides_of_a_split_go_on_and_after_the_heal_each_name_runs_once(network, flock):
    lives_through_a_split(network, flock, 40)


def test_a_paused_minority_hatches_nothing_and_nobody_more_than_max_birds(network, tmp_path):
    hosts = network.hosts
    h1, h2, h3, h4 = hosts
    flock = FlockOf(network, "paused", tmp_path / "birds", minority="pause", max_birds=3)
    rest = hosts[:3]
    for host in rest:
        for _ in range(2):
            flock.start(host, flock.named("bird", [(hosts, host)]))
    alone = [flock.named(f"alone{n}-", [(hosts, h4), (rest, h1)]) for n in range(2)]  # h1 has room for one of the two
    for name in alone:
        flock.start(h4, name)
    eventually(lambda: flock.is_one(flock.tags), "all run", BOOT)

    def states(host):
        return {bird["name"]: (bird["state"], bird["node_id"], bird["reason"]) for bird in host.do("birds", "paused")}

    split(network, h4)
    began = time.monotonic()
    eventually(lambda: sum(states(h1)[name][:2] == ("running", h1.node) for name in alone) == 1, "one has moved", SIDES)
    crowded = [states(h2)[name] for name in alone if states(h2)[name][0] != "running"]
    assert [row[0] for row in crowded] == ["pending"] and "max_birds" in crowded[0][2], crowded
    theirs = [name for name in flock.tags if name not in alone]
    eventually(lambda: len(h4.do("nests", "paused")) == 1, "h4 sees that it is alone", SIDES)
    print(f"h4 is alone after {time.monotonic() - began:.1f} s")
    time.sleep(3)  # in which it would hatch them
    on_h4 = states(h4)
    assert all(on_h4[name][0] == "pending" and "minority is 'pause'" in on_h4[name][2] for name in theirs), on_h4
    assert all(on_h4[name][:2] == ("running", h4.node) for name in alone), on_h4
    assert not any(life.node == h4.node for name in theirs for life in now(flock.path(name)))
    flock.heals(list(flock.tags))


def test_nothing_is_lost_with_a_host_that_hears_and_is_not_heard(network, flock):
    _, _, h3, _ = network.hosts
    before = flock.left()
    for host in network.hosts:
        host.do("begin_calls", "default", list(flock.tags), False)
    h3.rule("output", "oifname", "eth0", "drop")
    time.sleep(15)
    given_up = [len(after) - len(earlier) for after, earlier in zip(flock.left(), before, strict=True)]
    print(f"\nh3 is not heard for 15 s; so many nests were given up by {network.hosts}: {given_up}")
    flock.heals(list(flock.tags))
    flock.answers_on(network.hosts, within=AFTER)
    for host in network.hosts:
        for count in host.do("end_calls"):
            flock.ran_at_most_once(count["fates"])


def test_a_host_that_loses_a_third_of_what_it_is_sent_is_not_given_up(network, flock):
    """Calls go on. TCP itself gives a connection up now and then; such a call fails as promised, unless it may be made twice."""
    _, h2, h3, _ = network.hosts
    eventually(lambda: flock.is_one(flock.tags), "all run", 30)
    before, names = flock.left(), sorted(flock.tags)
    for host in (h2, h3):
        host.do("begin_calls", "default", names[::2], False)
        host.do("begin_calls", "default", names[1::2], True)
    h3.rule("input", "iifname", "eth0", "numgen", "random", "mod", "100", "<", "30", "drop")
    time.sleep(60)
    left = flock.left()
    network.heal()
    for host in (h2, h3):
        for count, retry in zip(host.do("end_calls"), (False, True), strict=True):
            outcomes = count["outcomes"]
            print(f"\n{host}, retry={retry}: {count['told']}: {outcomes}", end="")
            assert count["calls"] > 100
            assert set(outcomes) <= {"answered", *(() if retry else ("BirdUnavailable",))}
            assert outcomes["answered"] > 0.99 * count["calls"]
            if not retry:
                flock.ran_at_most_once(count["fates"])
    assert left == before, "no nest was given up"
    assert flock.is_whole()


LONG = pytest.mark.skipif(os.environ.get("FLOCK_RAY_LONG") != "1", reason="takes minutes: FLOCK_RAY_LONG=1")


@LONG
@pytest.mark.timeout(600)
def test_a_split_of_five_minutes_heals_like_a_short_one(network, flock):
    lives_through_a_split(network, flock, int(os.environ.get("FLOCK_RAY_LONG_SECONDS", "300")))


@LONG
def test_hosts_that_do_not_reach_the_head_find_each_other_again(network, flock):
    """A nest's look for addresses waited for the head, and with it all joining; the detector's own tries become rare."""
    _, _, h3, h4 = network.hosts
    network.cut_off(h3)
    network.cut_off(h4, bridge="br2")
    eventually(lambda: [len(host.do("nests", "default")) for host in (h3, h4)] == [1, 1], "both are alone", SIDES)
    time.sleep(100)
    met = network.cut_off(h4)
    eventually(lambda: [len(host.do("nests", "default")) for host in (h3, h4)] == [2, 2], "they have found each other", AFTER)
    print(f"\nthey have found each other after {time.monotonic() - met:.1f} s")
    flock.heals(list(flock.tags))
