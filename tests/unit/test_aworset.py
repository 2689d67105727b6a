"""The laws of the set, against a naive model that keeps a tombstone for everything it removed.

The model is what the set must not be (it grows for ever) and what it must look like: a set of adds, a set of removed dots, the
highest value of each dot. The set has to agree with it after every step, whatever is lost, duplicated or reordered.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flock_ray.core.arcs import LEAF_BITS
from flock_ray.core.aworset import DEPTH, FANOUT_BITS, ROOT, AWORSet, Change, Context, Delta, Part, Prefix
from flock_ray.specs import Dot, Life, name_hash

KEYS = [f"bird-{number}" for number in range(8)]
LIVES = [Life(node, 1) for node in "abc"]

Replica = AWORSet[str, int]

#: No deadline: a slow machine breaks no law.
laws = settings(deadline=None)


def new_set() -> Replica:
    """A set whose values are numbers of which the highest is kept."""
    return AWORSet(name_hash, max, lambda value: b"%d" % value)


def same_entries(a: Replica, b: Replica) -> bool:
    return {key: dict(pairs) for key, pairs in a.items()} == {key: dict(pairs) for key, pairs in b.items()}


def clone(of: Replica) -> Replica:
    copy = new_set()
    copy.join_part(of.whole())
    copy.merge_context(of.context)
    return copy


def joined(*replicas: Replica) -> Replica:
    """The full join, whole contexts included."""
    result = new_set()
    for each in replicas:
        whole = each.whole()
        result.join_part(whole)
        # The whole state covers all keys, so its context has been applied to all entries and may be taken over.
        result.merge_context(whole.context)
    return result


def synchronise(asker: Replica, answerer: Replica) -> tuple[int, int]:
    """The comparison of digests as nests do it, one step a message.

    Returns:
        How many hashes and how many keys were sent.
    """
    hashes = keys = 0
    asked = {ROOT: asker.digest()}
    while asked:
        children, leaves = answerer.descend(asked)
        hashes += len(asked) + len(children)
        if leaves:
            part = answerer.part(leaves=leaves)
            news = asker.delta_against(part)
            asker.join_part(part)
            answerer.join(news)
            keys += len(part.entries) + len(news.entries)
        asked = {prefix: asker.digest(prefix) for prefix in asker.differing(children)}
    return hashes, keys


def recomputed(replica: Replica) -> Replica:
    """The same entries put into a new set one by one, in another order."""
    fresh = new_set()
    for key, pairs in reversed(list(replica.items())):
        for dot, value in reversed(pairs):
            fresh.add(key, dot, value)
    return fresh


# States for the laws: three replicas that have seen some of each other's deltas.


@dataclass
class Step:
    replica: int
    kind: str
    key: str
    value: int
    heard_by: tuple[int, ...]


steps = st.lists(
    st.builds(
        Step,
        replica=st.integers(0, 2),
        kind=st.sampled_from(["add", "add", "remove", "update"]),
        key=st.sampled_from(KEYS),
        value=st.integers(0, 9),
        heard_by=st.lists(st.integers(0, 2), max_size=2).map(tuple),
    ),
    max_size=25,
)


def played(history: Iterable[Step]) -> tuple[list[Replica], list[Delta[str, int]]]:
    """Replicas after a history in which each delta was heard by some only, and all the deltas."""
    replicas, deltas = [new_set() for _ in LIVES], []
    for step in history:
        here = replicas[step.replica]
        change = perform(here, LIVES[step.replica], step.kind, step.key, step.value)
        if change is None:
            continue
        delta = here.delta_of([change])
        deltas.append(delta)
        for other in step.heard_by:
            replicas[other].join(delta)
    return replicas, deltas


def perform(here: Replica, life: Life, kind: str, key: str, value: int) -> Change[str, int] | None:
    if kind == "add":
        return here.add(key, Dot(life, here.context.top(life) + 1), value)
    dots = [dot for dot, _ in here.get(key)]
    if not dots:
        return None
    return here.remove(key, dots) if kind == "remove" else here.update(key, dots[0], value)


@given(steps)
@laws
def test_join_is_commutative(history: list[Step]) -> None:
    (a, b, _), _ = played(history)
    left, right = joined(a, b), joined(b, a)
    assert same_entries(left, right)
    assert left.context == right.context
    assert left.digest() == right.digest()


@given(steps)
@laws
def test_join_is_associative(history: list[Step]) -> None:
    (a, b, c), _ = played(history)
    left, right = joined(joined(a, b), c), joined(a, joined(b, c))
    assert same_entries(left, right)
    assert left.context == right.context
    assert left.digest() == right.digest()


@given(steps)
@laws
def test_join_is_idempotent(history: list[Step]) -> None:
    (a, b, _), _ = played(history)
    once = joined(a, b)
    twice = joined(once, b, a, once)
    assert same_entries(once, twice)
    assert once.context == twice.context
    assert once.join_part(b.whole()) == []


#: One adds, another hears it and removes it; and seed 2 loses both deltas.
REMOVED_UNHEARD = [Step(1, "add", "bird-0", 0, (0,)), Step(0, "remove", "bird-0", 0, ())]


@given(steps, st.randoms(use_true_random=False))
@example(REMOVED_UNHEARD, random.Random(2))
@laws
def test_deltas_lost_doubled_and_in_any_order_then_a_full_sync_equal_the_full_join(history: list[Step], rng: random.Random) -> None:
    replicas, deltas = played(history)
    full = joined(*replicas)
    late = new_set()
    noise = [delta for delta in deltas for _ in range(rng.choice([0, 1, 1, 2]))]
    rng.shuffle(noise)
    for delta in noise:
        late.join(delta)
    for each in replicas:
        synchronise(late, each)
        # Without it, what this one removed and the next one still has would come back: no entry and no delta told of it.
        late.merge_context(each.context)
    assert same_entries(late, full)
    assert late.digest() == full.digest()


@given(steps, st.randoms(use_true_random=False))
@laws
def test_all_deltas_in_any_order_equal_the_full_join(history: list[Step], rng: random.Random) -> None:
    replicas, deltas = played(history)
    late = new_set()
    rng.shuffle(deltas)
    for delta in deltas:
        late.join(delta)
    assert same_entries(late, joined(*replicas))
    assert late.context == joined(*replicas).context


@given(steps)
@laws
def test_equal_entries_are_equal_root_digests(history: list[Step]) -> None:
    replicas, _ = played(history)
    for a in replicas:
        for b in replicas:
            assert same_entries(a, b) == (a.digest() == b.digest())


@given(steps)
@laws
def test_the_digest_tree_kept_incrementally_is_the_one_made_from_scratch(history: list[Step]) -> None:
    for replica in played(history)[0]:
        check_tree(replica)


def check_tree(replica: Replica) -> None:
    fresh = recomputed(replica)
    assert fresh.digest() == replica.digest() and fresh._levels == replica._levels
    # Each inner hash is made of its children, or a descent would lose its way.
    for level in range(DEPTH):
        for number in {name_hash(key) >> (64 - FANOUT_BITS * level) for key in replica} if level else {0}:
            prefix, xor = Prefix(level, number), 0
            for child in prefix.children():
                xor ^= replica.digest(child)
            assert xor == replica.digest(prefix)
    held = {leaf: sorted(replica._leaves.keys(leaf)) for leaf in replica._leaves}
    assert held == {leaf: sorted(fresh._leaves.keys(leaf)) for leaf in fresh._leaves}, "leaves list exactly the keys that are there"


def test_the_digest_of_an_emptied_set_is_that_of_a_new_one() -> None:
    replica = new_set()
    dots = [Dot(LIVES[0], counter) for counter in range(1, 50)]
    for dot in dots:
        replica.add(KEYS[dot.counter % 8], dot, 0)
    for key in KEYS:
        replica.remove(key, dots)
    assert replica._levels == new_set()._levels
    assert not len(replica._leaves) and not len(replica)


# Add and remove


def test_an_add_wins_over_a_concurrent_remove() -> None:
    a, b = new_set(), new_set()
    first = a.delta_of([a.add("tweety", Dot(LIVES[0], 1), 1)])
    b.join(first)
    removed = b.delta_of([b.remove("tweety", [Dot(LIVES[0], 1)])])
    added = a.delta_of([a.add("tweety", Dot(LIVES[0], 2), 2)])
    a.join(removed)
    b.join(added)
    assert a.get("tweety") == b.get("tweety") == ((Dot(LIVES[0], 2), 2),)


def test_a_remove_that_overtakes_its_add_wins() -> None:
    a, b = new_set(), new_set()
    dot = Dot(LIVES[0], 1)
    added = a.delta_of([a.add("tweety", dot, 1)])
    removed = a.delta_of([a.remove("tweety", [dot])])
    b.join(removed)
    b.join(added)
    assert "tweety" not in b
    assert dot in b.context


def test_an_add_leaves_the_other_dots_of_its_key_alone() -> None:
    a = new_set()
    a.add("tweety", Dot(LIVES[0], 1), 1)
    change = a.add("tweety", Dot(LIVES[1], 1), 2)
    assert change.before == ((Dot(LIVES[0], 1), 1),)
    assert change.after == a.get("tweety") == ((Dot(LIVES[0], 1), 1), (Dot(LIVES[1], 1), 2))


def test_a_dot_is_used_once() -> None:
    a = new_set()
    a.add("tweety", Dot(LIVES[0], 1), 1)
    with pytest.raises(ValueError, match="used before"):
        a.add("robin", Dot(LIVES[0], 1), 1)
    assert "robin" not in a


def test_removing_what_is_not_there_changes_nothing() -> None:
    a = new_set()
    a.add("tweety", Dot(LIVES[0], 1), 1)
    before = a.digest()
    change = a.remove("tweety", [Dot(LIVES[1], 7)])
    assert change.before == change.after and a.digest() == before
    assert a.delta_of([change]) == Delta()
    assert Dot(LIVES[1], 7) not in a.context, "an add of it that is still under way must not be refused"


def test_updating_what_is_not_there_changes_nothing() -> None:
    a = new_set()
    change = a.update("tweety", Dot(LIVES[0], 1), 1)
    assert change.after == () and "tweety" not in a and a.digest() == new_set().digest()
    assert a.delta_of([change]) == Delta()


def test_an_update_does_not_bring_back_what_was_removed() -> None:
    a, b = new_set(), new_set()
    dot = Dot(LIVES[0], 1)
    b.join(a.delta_of([a.add("tweety", dot, 1)]))
    news = a.delta_of([a.update("tweety", dot, 5)])
    b.remove("tweety", [dot])
    assert b.join(news) == []
    assert "tweety" not in b


def test_an_update_that_overtakes_its_add_brings_the_entry() -> None:
    a, b = new_set(), new_set()
    dot = Dot(LIVES[0], 1)
    added = a.delta_of([a.add("tweety", dot, 1)])
    updated = a.delta_of([a.update("tweety", dot, 5)])
    b.join(updated)
    b.join(added)
    assert b.get("tweety") == ((dot, 5),)


def test_a_delta_of_an_add_and_its_removal_adds_nothing() -> None:
    """Found here: the entry stayed in the delta, so a bird started and stopped in one step came to life on all other nests."""
    a, b = new_set(), new_set()
    dot = Dot(LIVES[0], 1)
    changes = [a.add("tweety", dot, 1), a.update("tweety", dot, 3), a.remove("tweety", [dot])]
    delta = a.delta_of(changes)
    assert delta.entries == {"tweety": ()} and delta.context == {dot}
    b.join(delta)
    assert "tweety" not in b and dot in b.context


@given(steps)
@laws
def test_one_delta_of_many_changes_equals_their_deltas_one_by_one(history: list[Step]) -> None:
    a, by_one, at_once = new_set(), new_set(), new_set()
    changes = []
    for step in history:
        change = perform(a, LIVES[0], step.kind, step.key, step.value)
        if change is not None:
            changes.append(change)
            by_one.join(a.delta_of([change]))
    at_once.join(a.delta_of(changes))
    assert same_entries(by_one, at_once) and same_entries(a, at_once)
    assert by_one.context == at_once.context == a.context


def test_what_one_add_sends_does_not_depend_on_the_size_of_the_set() -> None:
    sizes = []
    for names in (0, 3_000):
        a = new_set()
        for number in range(1, names + 1):
            a.add(f"old/{number}", Dot(LIVES[1], number), 0)
        sizes.append(len(pickle.dumps(a.delta_of([a.add("tweety", Dot(LIVES[0], 1), 1)]))))
    assert sizes[0] == sizes[1]


# Comparison by digests


@given(steps)
@laws
def test_a_comparison_finds_every_difference_and_leaves_both_equal_to_the_join(history: list[Step]) -> None:
    (a, b, _), _ = played(history)
    expected = joined(a, b)
    synchronise(a, b)
    assert same_entries(a, expected)
    assert same_entries(b, expected)
    assert a.digest() == b.digest() == expected.digest()


@given(steps)
@laws
def test_a_comparison_of_equals_sends_one_hash(history: list[Step]) -> None:
    (a, _, _), _ = played(history)
    assert synchronise(a, clone(a)) == (1, 0)


@given(steps, st.sets(st.sampled_from(KEYS)))
@laws
def test_a_part_touches_only_the_keys_it_covers(history: list[Step], chosen: set[str]) -> None:
    (a, b, _), _ = played(history)
    expected = joined(a, b)
    leaves = {name_hash(key) >> (64 - LEAF_BITS) for key in chosen}
    before = dict(b.items())
    part = a.part(leaves=leaves)
    changed = {change.key for change in b.join_part(part)}
    for key in KEYS:
        if name_hash(key) >> (64 - LEAF_BITS) in leaves:
            assert dict(b.get(key)) == dict(expected.get(key))
        else:
            assert b.get(key) == before.get(key, ()) and key not in changed


def test_a_part_deletes_nothing_outside_the_leaves_compared() -> None:
    """Its context covers dots of other keys: were it taken as a whole, those the sender removed or never listed would go."""
    a, b = new_set(), new_set()
    for number, key in enumerate(KEYS, 1):
        b.join(a.delta_of([a.add(key, Dot(LIVES[0], number), 0)]))
    a.remove(KEYS[0], [Dot(LIVES[0], 1)])
    a.remove(KEYS[1], [Dot(LIVES[0], 2)])
    b.join_part(a.part(keys=[KEYS[0]]))
    assert sorted(b) == sorted(KEYS[1:]), "only the key covered was removed"
    fresh = new_set()
    fresh.join_part(a.part(keys=[KEYS[2]]))
    fresh.join(a.delta_of([Change(KEYS[3], (), a.get(KEYS[3]))]))
    assert KEYS[3] in fresh, "a part's context must not make later adds look removed"


def test_a_late_part_does_not_remove_what_came_after_it() -> None:
    a, b = new_set(), new_set()
    late = a.part(leaves=range(1 << LEAF_BITS))
    for number, key in enumerate(KEYS, 1):
        b.join(a.delta_of([a.add(key, Dot(LIVES[0], number), 0)]))
    b.join_part(late)
    assert sorted(b) == sorted(KEYS)


def test_a_part_is_of_one_instant() -> None:
    a = new_set()
    a.add(KEYS[0], Dot(LIVES[0], 1), 0)
    part = a.part(keys=KEYS)
    a.add(KEYS[1], Dot(LIVES[0], 2), 0)
    assert Dot(LIVES[0], 2) not in part.context


def test_what_is_pushed_back_is_exact() -> None:
    a, b = new_set(), new_set()
    ours, theirs, gone = Dot(LIVES[0], 1), Dot(LIVES[1], 1), Dot(LIVES[1], 2)
    a.add("tweety", ours, 1)
    b.add("tweety", theirs, 1)
    a.join(b.delta_of([b.add("robin", gone, 1)]))
    a.remove("robin", [gone])
    a.add("wren", Dot(LIVES[0], 2), 1)
    a.join(b.delta_of([b.add("owl", Dot(LIVES[1], 3), 1)]))
    b.remove("owl", [Dot(LIVES[1], 3)])
    news = a.delta_against(b.part(keys=["tweety", "robin", "owl"]))  # it need not be told of what it removed itself
    assert news.entries == {"tweety": ((ours, 1),), "robin": ()} and news.context == {ours, gone}


def test_ten_differences_among_20_000_names_exchange_a_few_hundred_hashes() -> None:
    names, differences = 20_000, 10
    a = new_set()
    for number in range(1, names + 1):
        a.add(f"bird/{number}", Dot(LIVES[0], number), 0)
    b = clone(a)
    for number in range(differences):
        if number % 3 == 0:
            a.remove(f"bird/{number * 7 + 1}", [Dot(LIVES[0], number * 7 + 1)])
        elif number % 3 == 1:
            b.add(f"new/{number}", Dot(LIVES[1], number), 0)
        else:
            b.update(f"bird/{number * 7 + 1}", Dot(LIVES[0], number * 7 + 1), 1)
    hashes, keys = synchronise(a, b)
    assert same_entries(a, b) and a.digest() == b.digest()
    each = 1 << FANOUT_BITS
    # A difference costs the 32 children of each inner node above it, and those that differ once more, as the question.
    assert hashes <= differences * DEPTH * (each + 1) + 1
    per_leaf = 8  # 0.6 names a leaf: the largest of these ten has far less
    assert keys <= differences * per_leaf
    assert synchronise(a, b) == (1, 0)


# Whole contexts


@given(steps)
@laws
def test_a_whole_context_taken_over_after_equal_digests_removes_no_live_entry(history: list[Step]) -> None:
    (a, b, c), _ = played(history)
    synchronise(a, b)
    assert a.digest() == b.digest()
    live = {key: dict(pairs) for key, pairs in a.items()}
    a.merge_context(b.context.copy())
    b.merge_context(a.context.copy())
    assert a.context == b.context
    synchronise(a, b)
    a.join_part(b.whole())
    b.join_part(a.whole())
    assert {key: dict(pairs) for key, pairs in a.items()} == live
    # And nothing is lost to a third that has not seen all of it.
    expected = joined(a, b, c)
    synchronise(c, a)
    assert same_entries(c, expected)


def test_a_whole_context_keeps_late_adds_of_what_was_removed_out() -> None:
    a, b = new_set(), new_set()
    dot = Dot(LIVES[0], 1)
    late = a.delta_of([a.add("tweety", dot, 1)])
    a.remove("tweety", [dot])
    assert a.digest() == b.digest()
    b.merge_context(a.context)
    b.join(late)
    assert "tweety" not in b


def test_a_part_behind_a_gap_does_not_grow_with_what_came_after() -> None:
    """Found here: one lost add that was removed again kept every later dot in the cloud, and the cloud in every part, until the
    replicas happened to be equal: 20,000 starts made a part of 60 KB.
    """
    a, b = new_set(), new_set()
    lost = Dot(LIVES[0], 1)
    a.add("lost", lost, 0)
    a.remove("lost", [lost])
    sizes = []
    for counter in range(2, 5_000):
        dot = Dot(LIVES[0], counter)
        b.join(a.delta_of([a.add("busy", dot, 0), a.remove("busy", [dot])]))
        if counter in (1_000, 4_999):
            sizes.append(len(pickle.dumps(b.part(keys=["busy"]))))
    assert lost not in b.context and Dot(LIVES[0], 4_999) in b.context
    assert sizes[1] <= sizes[0] + 8
    assert a.digest() == b.digest()
    b.merge_context(a.context)
    assert b.context == a.context and not b.context.cloud


# The context alone


stretches = st.builds(
    lambda life, first, length: [Dot(life, counter) for counter in range(first, first + length)],
    st.sampled_from(LIVES),
    st.integers(1, 30),
    st.integers(1, 9),
)
#: Some come alone and some in a row, in any order.
dots_lists = st.lists(stretches).map(lambda lists: [dot for each in lists for dot in each])


def seen(context: Context) -> set[Dot]:
    return {dot for life in LIVES for dot in (Dot(life, counter) for counter in range(1, 42)) if dot in context}


@given(dots_lists)
@laws
def test_a_context_has_the_dots_it_was_given_and_no_others(given_dots: list[Dot]) -> None:
    context = Context()
    for number, dot in enumerate(given_dots):
        context.add(dot)
        assert seen(context) == set(given_dots[: number + 1])
    assert context.lives() == {dot.life for dot in given_dots}
    for life in LIVES:
        assert context.top(life) == max((dot.counter for dot in given_dots if dot.life == life), default=0)


@given(dots_lists, dots_lists)
@laws
def test_a_merged_context_is_the_union_whatever_the_order(some: list[Dot], others: list[Dot]) -> None:
    one, two, all_at_once = Context({}, some), Context({}, others), Context({}, others + some)
    merged = one.copy()
    merged.merge(two)
    other_way = two.copy()
    other_way.merge(one)
    assert merged == other_way == all_at_once
    assert merged.fingerprint() == other_way.fingerprint() == all_at_once.fingerprint()
    assert seen(merged) == set(some) | set(others)
    assert seen(one) == set(some) and seen(two) == set(others), "the sources are left as they were"


@given(dots_lists, dots_lists)
@laws
def test_fingerprints_of_contexts_are_equal_only_if_they_are(some: list[Dot], others: list[Dot]) -> None:
    one, two = Context({}, some), Context({}, others)
    assert (one.fingerprint() == two.fingerprint()) == (one == two) == (set(some) == set(others))


@given(st.permutations(range(1, 20)))
@laws
def test_a_context_compacts(counters: list[int]) -> None:
    context = Context({}, [Dot(LIVES[0], counter) for counter in counters])
    assert context.cloud == {}
    assert context.vector == {LIVES[0]: 19}


@given(st.sets(st.integers(2, 60)))
@laws
def test_the_cloud_is_kept_as_few_runs_as_possible(counters: set[int]) -> None:
    context = Context({}, [Dot(LIVES[0], counter) for counter in counters])
    runs = context.cloud.get(LIVES[0], [])
    assert [counter for first, last in runs for counter in range(first, last + 1)] == sorted(counters)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(runs))


def test_a_forgotten_life_is_as_if_never_seen() -> None:
    context = Context({LIVES[0]: 3, LIVES[1]: 1}, [Dot(LIVES[0], 5)])
    context.forget(LIVES[0])
    assert context == Context({LIVES[1]: 1})
    assert Dot(LIVES[0], 1) not in context


def test_a_copy_of_a_context_shares_nothing() -> None:
    context = Context({LIVES[0]: 1}, [Dot(LIVES[0], 5)])
    copy = context.copy()
    copy.add(Dot(LIVES[0], 6))
    copy.add(Dot(LIVES[1], 1))
    assert context == Context({LIVES[0]: 1}, [Dot(LIVES[0], 5)])


# The model


@dataclass
class Model:
    """What a replica knows, with tombstones."""

    adds: dict[Dot, str] = field(default_factory=dict)
    removed: set[Dot] = field(default_factory=set)
    values: dict[Dot, int] = field(default_factory=dict)

    def learn(self, adds: dict[Dot, str], removed: set[Dot], values: dict[Dot, int]) -> None:
        self.adds.update(adds)
        self.removed |= removed
        for dot, value in values.items():
            self.values[dot] = max(value, self.values.get(dot, value))

    def entries(self) -> dict[str, dict[Dot, int]]:
        entries: dict[str, dict[Dot, int]] = {}
        for dot, key in self.adds.items():
            if dot not in self.removed:
                entries.setdefault(key, {})[dot] = self.values[dot]
        return entries

    def of_key(self, key: str) -> dict[Dot, int]:
        return self.entries().get(key, {})


@dataclass
class Message:
    """A delta under way, and what it tells the model."""

    delta: Delta[str, int]
    adds: dict[Dot, str]
    removed: set[Dot]
    values: dict[Dot, int]


members = st.integers(0, 2)
FATES = ["once", "once", "again", "lost"]
SOME = [slice(None), slice(1), slice(1, None)]
few_keys = st.sampled_from(KEYS[:3])  # few, so that the replicas often speak of the same


class Flock(RuleBasedStateMachine):
    """Three replicas with models beside them, and a network that loses, doubles and reorders."""

    @initialize()
    def start(self) -> None:
        self.sets = [new_set() for _ in range(3)]
        self.models = [Model() for _ in range(3)]
        self.lives = list(LIVES)
        self.counters = [0, 0, 0]
        self.network: list[tuple[int, Message]] = []
        self.parts: list[tuple[int, Part[str, int], Model]] = []

    def tell(self, sender: int, changes: list[Change[str, int]], adds: dict[Dot, str], removed: set[Dot], values: dict[Dot, int]) -> None:
        message = Message(self.sets[sender].delta_of(changes), adds, removed, values)
        self.network += [(receiver, message) for receiver in range(3) if receiver != sender]

    def receive(self, receiver: int, message: Message) -> None:
        model, before = self.models[receiver], self.models[receiver].entries()
        changes = self.sets[receiver].join(message.delta)
        model.learn(message.adds, message.removed, message.values)
        self.check_changes(receiver, changes, before)

    def check_changes(self, replica: int, changes: list[Change[str, int]], before: dict[str, dict[Dot, int]]) -> None:
        after = self.models[replica].entries()
        told = {change.key: (dict(change.before), dict(change.after)) for change in changes}
        expected = {key: (before.get(key, {}), after.get(key, {})) for key in KEYS if before.get(key) != after.get(key)}
        assert told == expected, "exactly what changed is returned"

    @rule(replica=members, key=few_keys, value=st.integers(0, 9))
    def add(self, replica: int, key: str, value: int) -> None:
        self.counters[replica] += 1
        dot = Dot(self.lives[replica], self.counters[replica])
        change = self.sets[replica].add(key, dot, value)
        self.models[replica].learn({dot: key}, set(), {dot: value})
        self.tell(replica, [change], {dot: key}, set(), {dot: value})

    @rule(replica=members, key=few_keys, which=st.sampled_from(SOME))
    def remove(self, replica: int, key: str, which: slice) -> None:
        dots = set(sorted(self.models[replica].of_key(key))[which])
        change = self.sets[replica].remove(key, dots)
        self.models[replica].learn({}, dots, {})
        self.tell(replica, [change], {}, dots, {})

    @rule(replica=members, key=few_keys, value=st.integers(0, 9))
    def update(self, replica: int, key: str, value: int) -> None:
        here = self.models[replica].of_key(key)
        if not here:
            return
        dot = min(here)
        change = self.sets[replica].update(key, dot, value)
        if value > here[dot]:
            self.models[replica].learn({}, set(), {dot: value})
            self.tell(replica, [change], {dot: key}, set(), {dot: value})

    @rule(replica=members, key=few_keys, value=st.integers(0, 9))
    def replace_in_one_delta(self, replica: int, key: str, value: int) -> None:
        """`stop` and `start` of a name, told at once."""
        gone = set(self.models[replica].of_key(key))
        self.counters[replica] += 1
        dot = Dot(self.lives[replica], self.counters[replica])
        changes = [self.sets[replica].remove(key, gone), self.sets[replica].add(key, dot, value)]
        self.models[replica].learn({dot: key}, gone, {dot: value})
        self.tell(replica, changes, {dot: key}, gone, {dot: value})

    @precondition(lambda self: self.network)
    @rule(at=st.integers(0, 99), fate=st.sampled_from(FATES))
    def deliver(self, at: int, fate: str) -> None:
        index = at % len(self.network)
        receiver, message = self.network[index] if fate == "again" else self.network.pop(index)
        if fate != "lost":
            self.receive(receiver, message)

    @rule(sender=members, receiver=members, keys=st.sets(few_keys, min_size=1))
    def send_a_part(self, sender: int, receiver: int, keys: set[str]) -> None:
        model = self.models[sender]
        snapshot = Model(dict(model.adds), set(model.removed), dict(model.values))
        self.parts.append((receiver, self.sets[sender].part(keys=keys), snapshot))

    @precondition(lambda self: self.parts)
    @rule(at=st.integers(0, 99))
    def deliver_a_part(self, at: int) -> None:
        receiver, part, theirs = self.parts[at % len(self.parts)]
        mine, before = self.models[receiver], self.models[receiver].entries()
        self.check_news(receiver, self.sets[receiver].delta_against(part), part, theirs)
        changes = self.sets[receiver].join_part(part)
        adds = {dot: key for dot, key in theirs.adds.items() if key in part.keys and dot not in theirs.removed}
        # A removal reaches only what is here: of dots never seen here a part does not speak.
        removed = {dot for dot in theirs.removed if mine.adds.get(dot) in part.keys}
        mine.learn(adds, removed, {dot: theirs.values[dot] for dot in adds})
        self.check_changes(receiver, changes, before)

    def check_news(self, here: int, delta: Delta[str, int], part: Part[str, int], theirs: Model) -> None:
        """What is pushed back brings the part's sender to the join of both for the part's keys, and speaks of nothing else."""
        assert set(delta.entries) <= set(part.keys)
        mine = self.models[here]
        for key in part.keys:
            live = {dot for dot in {**mine.of_key(key), **theirs.of_key(key)} if dot not in mine.removed | theirs.removed}
            there = dict(part.entries.get(key, ()))
            told = dict(delta.entries.get(key, ()))
            after = {dot: value for dot, value in there.items() if dot not in delta.context}
            after.update({dot: max(value, there.get(dot, value)) for dot, value in told.items()})
            expected = {dot: max(model.values[dot] for model in (mine, theirs) if dot in model.adds) for dot in live}
            assert after == expected

    @rule(asker=members, answerer=members)
    def synchronise(self, asker: int, answerer: int) -> None:
        if asker == answerer:
            return
        a, b = self.models[asker], self.models[answerer]
        synchronise(self.sets[asker], self.sets[answerer])
        live = {dot: key for dot, key in {**a.adds, **b.adds}.items() if dot not in a.removed | b.removed}
        values = {dot: max(model.values[dot] for model in (a, b) if dot in model.adds) for dot in live}
        gone_a, gone_b = b.removed & set(a.adds), a.removed & set(b.adds)
        a.learn(live, gone_a, values)
        b.learn(live, gone_b, values)
        assert self.sets[asker].digest() == self.sets[answerer].digest()

    @rule(receiver=members, sender=members)
    def take_the_whole_context_if_equal(self, receiver: int, sender: int) -> None:
        if self.sets[receiver].digest() == self.sets[sender].digest():
            self.sets[receiver].merge_context(self.sets[sender].context.copy())
            self.models[receiver].learn({}, self.models[sender].removed, {})

    @rule(replica=members, journal=st.booleans())
    def restart(self, replica: int, journal: bool) -> None:
        """A nest's next life: a new replica id, with or without what its journal kept."""
        self.lives[replica] = Life(self.lives[replica].node, self.lives[replica].number + 1)
        self.counters[replica] = 0
        if journal:
            self.sets[replica] = clone(self.sets[replica])
        else:
            self.sets[replica], self.models[replica] = new_set(), Model()

    @invariant()
    def every_replica_is_as_its_model(self) -> None:
        for replica, model in zip(self.sets, self.models, strict=True):
            assert {key: dict(pairs) for key, pairs in replica.items()} == model.entries()
            for dot in model.adds:
                assert dot in replica.context
            for dot in model.removed:
                assert dot in replica.context

    @invariant()
    def equal_entries_are_equal_digests(self) -> None:
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (self.models[a].entries() == self.models[b].entries()) == (self.sets[a].digest() == self.sets[b].digest())

    def teardown(self) -> None:
        if not hasattr(self, "sets"):
            return
        for replica in self.sets:
            check_tree(replica)
        removed = set[Dot]().union(*(model.removed for model in self.models))
        everything = Model()
        for model in self.models:
            everything.learn(model.adds, removed, model.values)
        for asker, answerer in ((0, 1), (1, 2), (0, 2), (0, 1)):
            synchronise(self.sets[asker], self.sets[answerer])
        for replica in self.sets:
            assert {key: dict(pairs) for key, pairs in replica.items()} == everything.entries()
            assert dict(replica.items()) == dict(self.sets[0].items()), "equal replicas list the dots of a key in the same order"


TestThreeReplicasAgreeWithTheModel = Flock.TestCase
TestThreeReplicasAgreeWithTheModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(200))
def test_three_replicas_agree_with_the_model_in_random_walks(seed: int) -> None:
    """The same steps drawn evenly. Hypothesis finds the shortest story of a fault, but seldom gets to a late, doubled part of a
    replica that has removed what is live here: 1 of 1,392 parts there, 24 of 862 here.
    """
    rng = random.Random(seed)
    flock = Flock()
    flock.start()
    for _ in range(80):
        one, other, key, value = rng.randrange(3), rng.randrange(3), rng.choice(KEYS[:3]), rng.randrange(10)
        at = rng.randrange(100)
        choice = rng.randrange(16)
        if choice < 2:
            flock.add(one, key, value)
        elif choice < 4:
            flock.remove(one, key, rng.choice(SOME))
        elif choice < 5:
            flock.update(one, key, value)
        elif choice < 6:
            flock.replace_in_one_delta(one, key, value)
        elif choice < 10 and flock.network:
            flock.deliver(at, rng.choice(FATES))
        elif choice < 11:
            flock.send_a_part(one, other, set(rng.sample(KEYS[:3], rng.randint(1, 3))))
        elif choice < 13 and flock.parts:
            flock.deliver_a_part(at)
        elif choice < 14:
            flock.synchronise(one, other)
        elif choice < 15:
            flock.take_the_whole_context_if_equal(one, other)
        elif rng.random() < 0.2:
            flock.restart(one, rng.random() < 0.5)
        flock.every_replica_is_as_its_model()
        flock.equal_entries_are_equal_digests()
    flock.teardown()
