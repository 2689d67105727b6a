"""Names found by arcs are those that the ring gives when it is asked for each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.core.arcs import CIRCLE, LEAF_SHIFT, Arc, Leaves, difference, inside, intersection
from flock_ray.core.ring import ring_from
from flock_ray.specs import name_hash

laws = settings(deadline=None)

NAMES = [f"bird-{number}" for number in range(2_000)]
weights = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0, 1, 7, 160, 320]), max_size=5).map(
    lambda d: tuple(sorted(d.items()))
)

#: Bounds near those of leaves, for there it is decided name by name.
bounds = st.lists(
    st.builds(
        lambda leaf, off: max(0, min(CIRCLE, (leaf << LEAF_SHIFT) + off)), st.integers(0, 1 << 15), st.sampled_from([-1, 0, 1, 1 << 30])
    ),
    unique=True,
    max_size=12,
)


def arcs_of(chosen: Sequence[int]) -> list[Arc]:
    """Disjoint arcs between every other pair of bounds."""
    ordered = sorted(chosen)
    return list(zip(ordered[::2], ordered[1::2], strict=False))


def leaves_of(names: Sequence[str]) -> Leaves[str]:
    leaves: Leaves[str] = Leaves(name_hash)
    for name in names:
        leaves.add(name)
    return leaves


@given(weights, weights, st.sampled_from([0, 1, 30, 2_000]))
@laws
def test_the_names_a_nest_gains_by_arcs_are_those_the_ring_gives_when_asked_for_each(old, new, count):
    before, after, names = ring_from(old), ring_from(new), NAMES[:count]
    leaves = leaves_of(names)
    for node in "abcde":
        gained = leaves.within(difference(after.arcs(node), before.arcs(node)))
        assert sorted(gained) == sorted(name for name in names if after.owner(name) == node != before.owner(name))
        kept = leaves.within(intersection(after.arcs(node), before.arcs(node)))
        assert sorted(kept) == sorted(name for name in names if after.owner(name) == node == before.owner(name))


@given(weights)
@laws
def test_the_arcs_of_all_nodes_are_the_circle(given_weights):
    ring = ring_from(given_weights)
    arcs = sorted(arc for node in ring.weights for arc in ring.arcs(node))
    if arcs:
        assert arcs[0][0] == 0 and arcs[-1][1] == CIRCLE
        assert all(left[1] == right[0] for left, right in zip(arcs, arcs[1:], strict=False))


@given(bounds, bounds, st.lists(st.integers(0, CIRCLE - 1), max_size=5))
@laws
def test_arcs_are_sets_of_positions(some, others, positions):
    a, b = arcs_of(some), arcs_of(others)
    edges = [edge + off for edge in (*some, *others) for off in (-1, 0, 1) if 0 <= edge + off < CIRCLE]
    in_a, in_b = inside(a), inside(b)
    minus, both = inside(difference(a, b)), inside(intersection(a, b))
    for position in (*edges, *positions):
        assert in_a(position) == any(begin <= position < end for begin, end in a)
        assert minus(position) == (in_a(position) and not in_b(position))
        assert both(position) == (in_a(position) and in_b(position))


@given(bounds, st.sampled_from([1, 50, 2_000]))
@laws
def test_names_within_arcs_are_found_once_each_by_leaf_and_by_name(chosen, count):
    arcs, names = arcs_of(chosen), NAMES[:count]
    found = leaves_of(names).within(arcs)
    assert sorted(found) == sorted(name for name in names if any(begin <= name_hash(name) < end for begin, end in arcs))


def test_a_removed_name_is_found_no_more_and_leaves_nothing():
    leaves = leaves_of(NAMES)
    for name in random.Random(3).sample(NAMES, len(NAMES)):
        leaves.remove(name)
    assert len(leaves) == 0
    assert leaves.within([(0, CIRCLE)]) == []
