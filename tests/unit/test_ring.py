"""Where names live: the ring (P1) is the same on every machine and moves no more than it must; placement (P2) is a function."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.core.replica import Replica
from flock_ray.core.ring import (
    POINTS_PER_CPU,
    POINTS_WITHOUT_CPUS,
    Placement,
    Ring,
    place,
    points,
    ring_from,
    ring_of,
)
from flock_ray.specs import Dot, Life, Name, NodeRecord, Options, Spec, Stamp

#: No deadline: a slow machine breaks no law.
laws = settings(deadline=None)

NAMES = [f"bird/{number}" for number in range(4_000)]

#: Pinned: a change of these moves every bird of every flock at an upgrade, and splits a flock of two versions.
GOLDEN: list[tuple[Name, str]] = [
    ("tweety", "cat"),
    ("", "dog"),
    ("Käuzchen 🐦", "dog"),
    (0, "cat"),
    (-1, "bee"),
    (1000000000000000000000000000000, "cat"),
    (b"", "cat"),
    (b"tweety", "dog"),
    (uuid.UUID("12345678-1234-5678-1234-567812345678"), "cat"),
    ((), "ant"),
    (("room", 7), "dog"),
    ((("a", "b"), "c"), "cat"),
    (("a", ("b", "c")), "cat"),
    (("user", uuid.UUID("00000000-0000-0000-0000-000000000001"), b"\x00\xff", -5), "cat"),
]


def nodes_of(cpus: Mapping[str, float]) -> dict[Life, NodeRecord]:
    return {Life(node, 1): NodeRecord(Life(node, 1), number) for node, number in cpus.items()}


def ring_with(cpus: Mapping[str, float]) -> Ring:
    records = nodes_of(cpus)
    return ring_of(records, records, any(cpus.values()))


def owners(ring: Ring) -> dict[str, str | None]:
    return {name: ring.owner(name) for name in NAMES}


def moved(before: Ring, after: Ring) -> dict[str, tuple[str | None, str | None]]:
    old, new = owners(before), owners(after)
    return {name: (old[name], new[name]) for name in NAMES if old[name] != new[name]}


# The ring


@pytest.mark.parametrize(("name", "node"), GOLDEN, ids=[repr(name) for name, _ in GOLDEN])
def test_owners_are_the_same_on_every_machine_and_version(name: Name, node: str) -> None:
    assert ring_with({"ant": 2, "bee": 2, "cat": 2, "dog": 4}).owner(name) == node


def test_the_points_of_a_node_are_a_function_of_its_own_cpus() -> None:
    table = {0: 0, 0.001: 1, 0.5: POINTS_PER_CPU // 2, 1: POINTS_PER_CPU, 2: 2 * POINTS_PER_CPU, 64: 64 * POINTS_PER_CPU}
    assert {cpus: points(cpus) for cpus in table} == table
    few, many = ring_with({"a": 2, "b": 4}), ring_with({"a": 2, "b": 4, "c": 64, "d": 0})
    assert {node: many.weights[node] for node in few.weights} == few.weights


@pytest.mark.parametrize("cpus", [1, 4, 32])
def test_a_change_of_one_weight_moves_nothing_between_two_others(cpus: float) -> None:
    before, after = ring_with({"a": 2, "b": 2, "c": 2, "d": 4}), ring_with({"a": 2, "b": 2, "c": cpus, "d": 4})
    changes = moved(before, after)
    assert changes
    to_c = cpus > 2
    assert all((new if to_c else old) == "c" for old, new in changes.values())


def test_a_join_moves_names_to_the_new_node_only() -> None:
    before, after = ring_with(dict.fromkeys("abc", 2)), ring_with(dict.fromkeys("abcd", 2))
    assert {new for _, new in moved(before, after).values()} == {"d"}


def test_a_leave_moves_only_what_the_node_had() -> None:
    before, after = ring_with(dict.fromkeys("abcd", 2)), ring_with(dict.fromkeys("abc", 2))
    assert {old for old, _ in moved(before, after).values()} == {"d"}


def test_a_join_moves_at_most_1_15_of_the_ideal_share() -> None:
    """With 80 points a CPU, one in fifty clusters of four nodes of 2 CPUs moved more: up to 1.21."""
    rng = random.Random(1)
    for _ in range(60):
        *old, new = (f"{rng.getrandbits(224):056x}" for _ in range(4))
        ring = ring_with(dict.fromkeys([*old, new], 2))
        assert ring.share(new) <= 1.15 / 4, f"{new} joined {old}"
    changes = moved(ring_with(dict.fromkeys(old, 2)), ring)
    assert len(changes) / len(NAMES) == pytest.approx(ring.share(new), abs=0.03), "shares are what names see"


def test_shares_follow_cpus_and_add_up_to_one() -> None:
    cpus = {"a": 2, "b": 4, "c": 16, "d": 0}
    ring = ring_with(cpus)
    assert sum(ring.share(node) for node in cpus) == pytest.approx(1)
    for node, number in cpus.items():
        assert ring.share(node) == pytest.approx(number / 22, rel=0.15)
    assert ring.share("nobody") == 0


def test_a_head_without_cpus_owns_nothing_and_comes_last() -> None:
    ring = ring_with({"head": 0, "a": 2, "b": 2})
    assert "head" not in owners(ring).values()
    assert {ring.owners(name)[-1] for name in NAMES[:50]} == {"head"}
    assert owners(ring) == owners(ring_with({"a": 2, "b": 2}))


def test_where_no_node_ever_had_cpus_all_weigh_the_same() -> None:
    records = nodes_of({"a": 0, "b": 0})
    ring = ring_of(records, records, had_cpus=False)
    assert ring.weights == {"a": POINTS_WITHOUT_CPUS, "b": POINTS_WITHOUT_CPUS}
    assert ring_of(records, records, had_cpus=True).weights == {"a": 0, "b": 0}, "those that had CPUs are gone for now"


def test_a_nest_whose_record_is_not_known_has_no_points() -> None:
    records = nodes_of({"a": 2})
    ring = ring_of([*records, Life("b", 1)], records, had_cpus=True)
    assert ring.weights == {"a": points(2), "b": 0}


def test_the_order_of_construction_does_not_matter() -> None:
    cpus = {"a": 2.0, "b": 4.0, "c": 0.0, "d": 1.0}
    records = nodes_of(cpus)
    for seed in range(5):
        shuffled = random.Random(seed).sample(sorted(records), len(records))
        ring = ring_of(shuffled, dict(reversed(records.items())), had_cpus=True)
        assert ring is ring_with(cpus), "equal rings are one object"
        fresh = Ring({life.node: points(cpus[life.node]) for life in shuffled})
        assert fresh == ring and hash(fresh) == hash(ring) and owners(fresh) == owners(ring)
    assert ring != ring_with({**cpus, "d": 2.0}) and ring != "a ring"
    assert ring_from(tuple(ring.weights.items())) is ring


def test_an_empty_ring_has_no_owner_and_raises_nothing() -> None:
    for ring in (Ring({}), Ring({"head": 0})):
        assert ring.owner("tweety") is None
        assert ring.owners("tweety") == list(ring.weights)
        assert ring.share("head") == 0


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from([0, 0.01, 1, 2, 8]), max_size=8), st.integers())
@laws
def test_the_preference_list_has_every_node_once_and_its_owner_first(cpus: dict[str, float], name: int) -> None:
    ring = Ring({node: points(number) for node, number in cpus.items()})
    preferences = ring.owners(name)
    assert sorted(preferences) == sorted(cpus)
    if any(cpus.values()):
        assert preferences[0] == ring.owner(name)
        assert [node for node in preferences if not cpus[node]] == preferences[sum(1 for n in cpus.values() if n) :]


def test_when_the_owner_leaves_the_next_preference_owns() -> None:
    cpus = dict.fromkeys("abcdef", 2.0)
    ring = ring_with(cpus)
    for name in NAMES[:200]:
        first, second, *_ = ring.owners(name)
        assert ring_with({node: number for node, number in cpus.items() if node != first}).owner(name) == second


# Placement by what nodes offer


def replica_with(birds: Iterable[tuple[Name, int, Options]], records: Iterable[NodeRecord], order: random.Random | None = None) -> Replica:
    """A replica with birds of (name, stamp, options); its dots do not depend on the order in which they come."""
    replica = Replica()
    entries = [(name, Dot(Life("starter", 1), number), wall, options) for number, (name, wall, options) in enumerate(birds, 1)]
    records = list(records)
    if order is not None:
        order.shuffle(entries)
        order.shuffle(records)
    for name, dot, wall, options in entries:
        replica.add(name, dot, Spec("birds", "Bird", "code", b"", options, None, Stamp(wall, 0), "request"), None)
    replica.learn(records)
    return replica


def placement_of(replica: Replica) -> Placement:
    return Placement(replica, frozenset(replica.nodes))


def node(name: str, cpus: float = 2.0, resources: Mapping[str, float] = {}, labels: Mapping[str, str] = {}) -> NodeRecord:
    return NodeRecord(Life(name, 1), cpus, tuple(sorted(resources.items())), tuple(sorted(labels.items())))


def owner_of(placement: Placement, name: Name) -> str | None:
    life = placement.owner(name)
    return None if life is None else life.node


def test_a_bird_without_demands_lives_where_the_ring_says() -> None:
    placement = placement_of(replica_with([("tweety", 1, Options())], [node("a"), node("b")]))
    assert placement.table() == {}
    assert owner_of(placement, "tweety") == placement.ring.owner("tweety")
    assert owner_of(placement, "not started") == placement.ring.owner("not started"), "names yet to come have owners too"
    assert placement.reason("tweety") == ""


def test_a_bird_with_demands_lives_on_the_first_preferred_node_that_fits() -> None:
    one_cpu = Options(num_cpus=1)
    birds = [(f"bird/{number}", number, one_cpu) for number in range(6)]
    placement = placement_of(replica_with(birds, [node("a"), node("b"), node("c")]))
    room = dict.fromkeys("abc", 2)
    for name, _, _ in birds:
        expected = next(each for each in placement.ring.owners(name) if room[each])
        room[expected] -= 1
        assert owner_of(placement, name) == expected
    assert not any(room.values())


def test_the_earlier_stamp_is_placed_first() -> None:
    whole = Options(num_cpus=2)
    for late_first in (False, True):
        birds = [("early", 1, whole), ("late", 2, whole)]
        placement = placement_of(replica_with(reversed(birds) if late_first else birds, [node("a", 2)]))
        assert owner_of(placement, "early") == "a"
        assert owner_of(placement, "late") is None
        assert placement.reason("early") == ""
        assert placement.reason("late") == "CPU: wants 2, the most that is free on one node is 0"


def test_equal_stamps_are_placed_by_dot() -> None:
    birds = [(f"bird/{number}", 1, Options(num_cpus=1)) for number in range(12)]
    placement = placement_of(replica_with(birds, [node("a", 2)]))
    assert [owner_of(placement, name) for name, _, _ in birds] == ["a", "a"] + [None] * 10


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(num_cpus=3), "CPU: wants 3, the most that is free on one node is 2"),
        (Options(num_gpus=0.5), "GPU: wants 0.5, the most that is free on one node is 0"),
        (Options(memory=2e9), "memory: wants 2e+09, the most that is free on one node is 1e+09"),
        (Options(resources=(("lidar", 1.0),)), "lidar: wants 1, the most that is free on one node is 0"),
        (Options(accelerator_type="H100"), "accelerator_type:H100: wants 0.001, the most that is free on one node is 0"),
        (
            Options(num_cpus=3, num_gpus=1),
            "CPU: wants 3, the most that is free on one node is 2; GPU: wants 1, the most that is free on one node is 0",
        ),
        (Options(label_selector=(("zone", "mars"),)), "no node has the labels {'zone': 'mars'}"),
        (Options(resources=(("camera", 1.0), ("lens", 1.0))), "no node has all of camera 1, lens 1 free at once"),
    ],
)
def test_what_fits_nowhere_is_pending_and_the_reason_names_what_lacks(options: Options, reason: str) -> None:
    records = [node("a", 2, {"memory": 1e9, "camera": 1}, {"zone": "earth"}), node("b", 2, {"lens": 1}, {"zone": "moon"})]
    placement = placement_of(replica_with([("tweety", 1, options)], records))
    assert placement.owner("tweety") is None
    assert placement.reason("tweety") == reason


def test_before_any_node_has_said_what_it_offers_the_reason_says_so() -> None:
    """Found here: it said that no node had the labels {}."""
    replica = replica_with([("tweety", 1, Options(num_cpus=1))], [])
    placement = Placement(replica, frozenset([Life("a", 1)]))
    assert placement.reason("tweety") == "no node of this view has said what it offers yet"
    assert placement.reason("a name without demands") == "no node of this view has CPUs"


def test_a_bird_that_fits_nowhere_does_not_keep_later_ones_out() -> None:
    placement = placement_of(replica_with([("big", 1, Options(num_cpus=9)), ("small", 2, Options(num_cpus=1))], [node("a")]))
    assert (owner_of(placement, "big"), owner_of(placement, "small")) == (None, "a")


def test_fractions_fill_a_node_to_the_brim() -> None:
    birds = [(f"bird/{number}", number, Options(num_cpus=0.1)) for number in range(21)]
    placement = placement_of(replica_with(birds, [node("a", 2)]))
    assert [owner_of(placement, name) for name, _, _ in birds] == ["a"] * 20 + [None]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("gold", {"a"}),
        ("!gold", {"b", "c"}),
        ("in(gold, silver)", {"a", "b"}),
        ("!in(gold,silver)", {"c"}),
        ("in(tin)", set()),
    ],
)
def test_label_selectors_choose_nodes_as_ray_does(selector: str, chosen: set[str]) -> None:
    records = [node("a", labels={"tier": "gold"}), node("b", labels={"tier": "silver"}), node("c")]
    options = Options(label_selector=(("tier", selector),))
    birds = [(f"bird/{number}", number, options) for number in range(40)]
    placement = placement_of(replica_with(birds, records))
    assert {owner_of(placement, name) or "nowhere" for name, _, _ in birds} == (chosen or {"nowhere"})


def test_all_labels_of_a_selector_have_to_match() -> None:
    records = [node("a", labels={"tier": "gold", "zone": "x"}), node("b", labels={"tier": "gold", "zone": "y"})]
    options = Options(label_selector=(("tier", "gold"), ("zone", "y")))
    placement = placement_of(replica_with([(number, number, options) for number in range(20)], records))
    assert {owner_of(placement, number) for number in range(20)} == {"b"}


def test_a_node_without_cpus_takes_what_only_it_offers() -> None:
    placement = placement_of(replica_with([("tweety", 1, Options(resources=(("disk", 1.0),)))], [node("a"), node("head", 0, {"disk": 1})]))
    assert owner_of(placement, "tweety") == "head"


def test_only_the_winning_dot_of_a_name_is_placed() -> None:
    replica = replica_with(
        [("tweety", 5, Options(num_cpus=2)), ("tweety", 3, Options(num_cpus=1)), ("robin", 6, Options(num_cpus=1))], [node("a")]
    )
    placement = placement_of(replica)
    assert (owner_of(placement, "tweety"), owner_of(placement, "robin")) == ("a", "a"), "1 CPU each: the loser takes nothing"


def test_the_table_follows_the_replica() -> None:
    replica = replica_with([("big", 2, Options(num_cpus=2))], [node("a")])
    placement = placement_of(replica)
    assert owner_of(placement, "big") == "a"
    early = Spec("birds", "Bird", "code", b"", Options(num_cpus=1), None, Stamp(1, 0), "request")
    replica.add("early", Dot(Life("late", 1), 1), early, None)
    assert (owner_of(placement, "early"), owner_of(placement, "big")) == ("a", None)
    replica.remove("early", [Dot(Life("late", 1), 1)])
    assert owner_of(placement, "big") == "a" and placement.reason("big") == ""


def test_a_name_whose_winner_loses_its_demands_leaves_the_table() -> None:
    """Found here: the winner changed from a spec with demands to one without, and the old table went on to place it."""
    replica = replica_with([("tweety", 5, Options(num_cpus=9))], [node("a")])
    placement = placement_of(replica)
    assert owner_of(placement, "tweety") is None
    winner = Spec("birds", "Bird", "code", b"", Options(), None, Stamp(1, 0), "request")
    replica.add("tweety", Dot(Life("late", 1), 1), winner, None)
    assert owner_of(placement, "tweety") == "a" and "tweety" not in placement.table()


options = st.builds(
    lambda **given: Options(**given),  # builds() would make up what is not given of a named tuple
    num_cpus=st.sampled_from([0, 0.5, 1, 3]),
    num_gpus=st.sampled_from([0, 0, 1]),
    label_selector=st.sampled_from([(), (("zone", "x"),), (("zone", "!x"),)]),
)
birds_lists = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5), options), max_size=25)
records_lists = st.lists(
    st.builds(
        node,
        st.sampled_from("abcde"),
        st.sampled_from([0, 1, 4]),
        st.sampled_from([{}, {"GPU": 1}]),
        st.sampled_from([{}, {"zone": "x"}]),
    ),
    max_size=5,
    unique_by=lambda record: record.life,
)


@given(birds_lists, records_lists, st.randoms(use_true_random=False))
@laws
def test_placement_is_a_function_of_replica_and_view_alone(
    birds: list[tuple[Name, int, Options]], records: list[NodeRecord], order: random.Random
) -> None:
    one, other = replica_with(birds, records), replica_with(birds, records, order)
    lives = [record.life for record in records]
    results = []
    for replica in (one, other):
        ring = ring_of(lives, replica.nodes, replica.had_cpus)
        results.append(place(ring, replica, {life.node: life for life in lives}))
        order.shuffle(lives)
    assert results[0] == results[1]


@given(birds_lists, records_lists)
@laws
def test_no_node_is_given_more_than_it_has(birds: list[tuple[Name, int, Options]], records: list[NodeRecord]) -> None:
    replica = replica_with(birds, records)
    placement = placement_of(replica)
    taken: dict[tuple[str, str], float] = {}
    for name, owner in placement.table().items():
        winner = replica.winner(name)
        assert winner is not None and winner[1].spec.options.placed
        assert (owner is None) == bool(placement.reason(name))
        if owner is None:
            continue
        for what, amount in winner[1].spec.options.demand:
            taken[owner, what] = taken.get((owner, what), 0) + amount
    offered = {
        (record.life.node, what): amount for record in records for what, amount in {"CPU": record.cpus, **dict(record.resources)}.items()
    }
    assert all(amount <= offered[key] + 1e-6 for key, amount in taken.items())


def test_a_demand_too_small_to_count_fits_where_there_is_none_of_it() -> None:
    """Found by hypothesis: it was then taken off what the node has, which raised."""
    placement = placement_of(replica_with([("tiny", 1, Options(memory=1e-29))], [node("a", 0, {}, {})]))
    assert placement.table() == {"tiny": "a"}
