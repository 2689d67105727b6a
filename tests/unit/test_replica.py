"""The replica: which status is kept, which dot wins, when code goes, and the bookkeeping that placement reads."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.core.records import Record, shared
from flock_ray.core.replica import Replica, Update
from flock_ray.specs import Dot, Life, NodeRecord, Options, Spec, Stamp, Status

A, B, C = (Life(node, 1) for node in "abc")
NAMES = ["tweety", "robin", "wren"]


#: No deadline: a slow machine breaks no law.
laws = settings(deadline=None)


def spec(wall: int = 1, code: str = "code-1", options: Options | None = None) -> Spec:
    return Spec("birds", "Bird", code, b"args", options or Options(), None, Stamp(wall, 0), f"request-{wall}")


def status(incarnation: int = 1, life: Life = A, sequence: int = 1, state: str = "running") -> Status:
    return Status(incarnation, life, sequence, state)


def copied(update: Update) -> Update:
    """As another process gets it: nothing is the same object."""
    copy: Update = pickle.loads(pickle.dumps(update))
    return copy


# Status


def test_the_later_status_is_kept_in_whatever_order_they_come() -> None:
    later = [status(1, B, 5), status(1, C, 1), status(1, C, 2), status(2, A, 1), status(2, B, 0)]
    assert later == sorted(later, key=lambda each: each.order), "by incarnation, then nest life, then sequence"
    for seed in range(20):
        shuffled = random.Random(seed).sample(later, len(later))
        replica = Replica()
        replica.add("tweety", Dot(A, 1), spec(), None)
        for each in shuffled:
            replica.set_status("tweety", Dot(A, 1), each)
        record = replica.record("tweety", Dot(A, 1))
        assert record is not None and record.status == later[-1]


statuses = st.none() | st.builds(
    lambda incarnation, life, sequence: Status(incarnation, life, sequence, "running"),
    st.integers(0, 3),
    st.sampled_from([A, B, C]),
    st.integers(0, 3),
)


@given(statuses, statuses, statuses)
@laws
def test_the_join_of_records_is_a_join(one: Status | None, two: Status | None, three: Status | None) -> None:
    a, b, c = (Record(spec(), each) for each in (one, two, three))
    assert a.join(b) == b.join(a)
    assert a.join(b).join(c) == a.join(b.join(c))
    assert a.join(a) == a


def test_an_older_status_changes_nothing_and_sends_nothing() -> None:
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(), None)
    replica.set_status("tweety", Dot(A, 1), status(2))
    digest = replica.birds.digest()
    for old in (status(1, C, 9), status(2)):
        change = replica.set_status("tweety", Dot(A, 1), old)
        assert change is not None and change.before == change.after
        assert replica.birds.digest() == digest
        assert replica.update_of([change]) == Update()


def test_a_status_of_an_unknown_dot_is_no_change() -> None:
    replica = Replica()
    assert replica.set_status("tweety", Dot(A, 1), status()) is None
    replica.add("tweety", Dot(A, 1), spec(), None)
    replica.remove("tweety", [Dot(A, 1)])
    assert replica.set_status("tweety", Dot(A, 1), status()) is None
    assert "tweety" not in replica.birds


def test_a_status_goes_with_its_dot() -> None:
    """`failed` is cleared by stop and start: the new dot begins without a status."""
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(), None)
    replica.set_status("tweety", Dot(A, 1), status(state="failed"))
    replica.remove("tweety", [Dot(A, 1)])
    replica.add("tweety", Dot(A, 2), spec(2), None)
    assert replica.records("tweety") == ((Dot(A, 2), Record(spec(2))),)


def test_a_status_that_differs_shows_in_the_digest() -> None:
    a, b = Replica(), Replica()
    added = a.add("tweety", Dot(A, 1), spec(), None)
    b.join(a.update_of([added]))
    assert a.birds.digest() == b.birds.digest()
    a.set_status("tweety", Dot(A, 1), status())
    assert a.birds.digest() != b.birds.digest()
    b.join_part(a.birds.part(keys=["tweety"]))
    assert a.birds.digest() == b.birds.digest()
    assert b.record("tweety", Dot(A, 1)) == Record(spec(), status())


# The winner


def test_the_earliest_stamp_wins_then_the_lower_dot() -> None:
    entries = [(Dot(C, 1), spec(1)), (Dot(A, 9), spec(2)), (Dot(B, 1), spec(2)), (Dot(B, 2), spec(2))]
    for seed in range(10):
        replica = Replica()
        for dot, each in random.Random(seed).sample(entries, len(entries)):
            replica.add("tweety", dot, each, None)
        for dot, each in entries:
            winner = replica.winner("tweety")
            assert winner == (dot, Record(each))
            assert len(replica.records("tweety")) == len(entries) - entries.index((dot, each)), "losers are not pruned"
            replica.remove("tweety", [dot])
        assert replica.winner("tweety") is None


def test_two_starts_of_one_name_at_once_have_the_same_winner_everywhere() -> None:
    a, b = Replica(), Replica()
    from_a = a.update_of([a.add("tweety", Dot(A, 1), spec(7), None)])
    from_b = b.update_of([b.add("tweety", Dot(B, 1), spec(5), None)])
    a.join(copied(from_b))
    b.join(copied(from_a))
    assert a.winner("tweety") == b.winner("tweety") == (Dot(B, 1), Record(spec(5)))


# Code


def test_code_goes_with_its_last_spec() -> None:
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(1), b"class")
    replica.add("robin", Dot(A, 2), spec(2), None)
    replica.remove("tweety", [Dot(A, 1)])
    assert replica.code == {"code-1": b"class"}
    replica.remove("robin", [Dot(A, 2)])
    assert replica.code == {} and replica.missing_code() == []


def test_code_is_kept_while_a_losing_dot_uses_it() -> None:
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(1), b"class")
    replica.add("tweety", Dot(B, 1), spec(2), None)
    replica.remove("tweety", [Dot(A, 1)])
    assert replica.code == {"code-1": b"class"}


@pytest.mark.parametrize("order", [("tweety", "robin"), ("robin", "tweety")])
def test_code_stays_when_one_delta_removes_its_last_user_and_adds_another(order: tuple[str, str]) -> None:
    """Found here: the code was dropped at the removal, before the add of the same delta was counted, and its sender, who had
    sent it before, would not send it again.
    """
    there, here = Replica(), Replica()
    here.join(there.update_of([there.add("tweety", Dot(A, 1), spec(1), b"class")]))
    changes = {"robin": there.add("robin", Dot(A, 2), spec(2), None), "tweety": there.remove("tweety", [Dot(A, 1)])}
    here.join(Update(there.birds.delta_of([changes[name] for name in order])))
    assert here.code == {"code-1": b"class"} and here.missing_code() == []


def test_code_stays_when_one_part_removes_its_last_user_and_brings_another() -> None:
    for names in (("tweety", "robin"), ("robin", "tweety"), ("tweety", "tweety")):
        there, here = Replica(), Replica()
        here.join(there.update_of([there.add(names[0], Dot(A, 1), spec(1), b"class")]))
        there.add(names[1], Dot(A, 2), spec(2), None)
        there.remove(names[0], [Dot(A, 1)])
        here.join_part(there.birds.whole())
        assert here.code == {"code-1": b"class"}


def test_code_nobody_needs_is_not_kept() -> None:
    replica = Replica()
    replica.take_code({"code-1": b"class"})
    assert replica.code == {}
    there = Replica()
    started = there.update_of([there.add("tweety", Dot(A, 1), spec(1), b"class")])
    stopped = there.update_of([there.remove("tweety", [Dot(A, 1)])])
    replica.join(stopped)
    replica.join(started)
    assert replica.code == {} and replica.missing_code() == []


def test_code_that_a_spec_needs_and_nobody_sent_is_missing_until_it_comes() -> None:
    there, here = Replica(), Replica()
    there.add("tweety", Dot(A, 1), spec(1), b"class")
    here.join_part(there.birds.whole())
    assert here.missing_code() == ["code-1"]
    here.take_code({"code-1": b"class", "code-2": b"other"})
    assert here.missing_code() == [] and here.code == {"code-1": b"class"}


# What is told to others


def test_an_update_carries_its_changes_and_the_code_of_new_specs() -> None:
    replica = Replica()
    first = replica.add("tweety", Dot(A, 1), spec(1), b"class")
    second = replica.set_status("tweety", Dot(A, 1), status())
    assert second is not None
    update = replica.update_of([first, second])
    assert update.delta.entries == {"tweety": ((Dot(A, 1), Record(spec(1), status())),)}
    assert update.delta.context == {Dot(A, 1)}
    assert update.code == {"code-1": b"class"} and update.nodes == ()
    assert replica.update_of([second]).code == {}, "a status needs no code"


def test_one_dot_is_told_as_it_is_now_with_its_code() -> None:
    there, here = Replica(), Replica()
    there.add("tweety", Dot(A, 1), spec(1), b"class")
    there.set_status("tweety", Dot(A, 1), status())
    here.join(copied(there.update_for("tweety", Dot(A, 1))))
    assert here.record("tweety", Dot(A, 1)) == Record(spec(1), status()) and here.code == {"code-1": b"class"}
    assert there.update_for("tweety", Dot(A, 2)) == there.update_for("robin", Dot(A, 1)) == Update()


def test_content_brings_entries_and_code_and_what_is_pushed_back_does_too() -> None:
    there, here = Replica(), Replica()
    there.add("tweety", Dot(A, 1), spec(1), b"class")
    here.add("robin", Dot(B, 1), spec(2, "code-2"), b"other")
    content = pickle.loads(pickle.dumps(there.content(NAMES)))
    (back,) = here.updates_against(content.part)
    changes = here.join_content(content)
    assert [change.key for change in changes] == ["tweety"]
    there.join(copied(back))
    assert dict(here.birds.items()) == dict(there.birds.items())
    assert here.code == there.code == {"code-1": b"class", "code-2": b"other"}
    assert here.updates_against(there.content(NAMES).part) == [], "nothing is left to tell"


def test_an_exit_of_a_dot_not_known_yet_keeps_its_late_add_out() -> None:
    there, here = Replica(), Replica()
    added = there.update_of([there.add("tweety", Dot(A, 1), spec(1), None)])
    assert here.exited("tweety", Dot(A, 1)) is None
    assert here.join(added) == [] and "tweety" not in here.birds
    change = there.exited("tweety", Dot(A, 1))
    assert change is not None and change.after == () and "tweety" not in there.birds


def test_a_removal_is_told_by_its_dots_alone() -> None:
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(1), None)
    update = replica.update_of([replica.remove("tweety", [Dot(A, 1)])])
    assert update.delta.entries == {"tweety": ()} and update.delta.context == {Dot(A, 1)}


def test_what_messages_bring_shares_its_common_parts() -> None:
    """Each message has copies of its own of class, options and lives: 2.5 KB a name at a million names, 1.0 KB when shared."""
    there, here = Replica(), Replica()
    for number, name in enumerate(NAMES, 1):
        added = there.add(name, Dot(A, number), spec(number)._replace(runtime_env='{"pip": []}'), None)
        stated = there.set_status(name, Dot(A, number), status())
        assert stated is not None
        here.join(copied(there.update_of([added])))
        if number % 2:
            here.join(copied(there.update_of([stated])))
        else:
            here.join_content(pickle.loads(pickle.dumps(there.content([name]))))
    assert dict(here.birds.items()) == dict(there.birds.items())
    found = [(dot, record.spec, record.status) for name in NAMES for dot, record in here.records(name)]
    dot, first, state = found[0]
    assert state is not None
    for other_dot, other, other_state in found[1:]:
        assert other_state is not None
        assert other_dot.life is dot.life and other_state.life is state.life and other_state.state is state.state
        for part in ("module", "qualname", "code", "options", "runtime_env"):
            assert getattr(other, part) is getattr(first, part), part


def test_sharing_changes_no_value() -> None:
    for given_spec in (spec(3, options=Options(num_cpus=2))._replace(runtime_env="{}"), spec(3)):
        assert shared(given_spec) == given_spec


# Node records and forgetting


def test_node_records_are_facts_and_the_first_one_stays() -> None:
    replica = Replica()
    assert not replica.had_cpus
    replica.learn([NodeRecord(A, 0.0)])
    assert not replica.had_cpus
    replica.learn([NodeRecord(B, 2.0), NodeRecord(A, 4.0)])
    assert replica.had_cpus
    assert replica.nodes == {A: NodeRecord(A, 0.0), B: NodeRecord(B, 2.0)}


def test_an_update_brings_node_records() -> None:
    replica = Replica()
    assert replica.join(Update(nodes=(NodeRecord(A, 2.0),))) == []
    assert replica.nodes == {A: NodeRecord(A, 2.0)} and replica.had_cpus


def test_a_life_is_forgotten_only_when_no_entry_uses_it() -> None:
    replica = Replica()
    replica.learn([NodeRecord(A, 2.0)])
    replica.add("tweety", Dot(A, 1), spec(1), None)
    replica.add("tweety", Dot(B, 1), spec(2), None)
    assert not replica.forget(A)
    assert replica.knows(Dot(A, 1)) and A in replica.nodes
    replica.remove("tweety", [Dot(A, 1)])
    assert replica.forget(A)
    assert not replica.knows(Dot(A, 1)) and A not in replica.nodes
    assert replica.knows(Dot(B, 1)) and not replica.forget(B)
    assert replica.had_cpus, "that a node once had CPUs is not forgotten"


def test_a_shared_context_leaves_out_what_is_about_to_be_forgotten() -> None:
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(1), None)
    replica.add("robin", Dot(B, 1), spec(2), None)
    shared = replica.shareable_context([A])
    assert shared.lives() == {B}
    assert replica.birds.context.lives() == {A, B}, "its own context is left as it was"


# Bookkeeping


def test_the_latest_stamp_is_of_any_spec_ever_seen() -> None:
    there, here = Replica(), Replica()
    here.add("robin", Dot(B, 1), spec(3), None)
    here.join(there.update_of([there.add("tweety", Dot(A, 1), spec(9), None)]))
    assert here.latest_stamp == Stamp(9, 0)
    here.remove("tweety", [Dot(A, 1)])
    assert here.latest_stamp == Stamp(9, 0), "a new stamp must be later than those of removed specs too"


PLACED = Options(num_cpus=1.0)


def test_the_version_grows_when_what_is_placed_changes_and_only_then() -> None:
    replica = Replica()
    version = replica.version

    def grew() -> bool:
        nonlocal version
        before, version = version, replica.version
        return version > before

    replica.add("robin", Dot(A, 1), spec(1), None)
    replica.set_status("robin", Dot(A, 1), status())
    replica.remove("robin", [Dot(A, 1)])
    assert not grew(), "nothing with demands was touched"
    replica.add("tweety", Dot(A, 2), spec(2, options=PLACED), None)
    assert grew() and replica.placed == {Dot(A, 2): "tweety"}
    there = Replica()
    there.join(replica.update_for("tweety", Dot(A, 2)))
    stated = there.set_status("tweety", Dot(A, 2), status())
    assert stated is not None
    assert replica.join(there.update_of([stated])) and not grew(), "a status does not move a bird"
    replica.remove("tweety", [Dot(A, 2)])
    assert grew() and replica.placed == {}


def test_the_version_grows_when_a_dot_without_demands_makes_another_the_winner() -> None:
    """Found here: the table of placed names stayed as it was, so nests that joined in another order disagreed on the owner."""
    replica = Replica()
    replica.add("tweety", Dot(A, 1), spec(5, options=PLACED), None)
    version = replica.version
    replica.add("tweety", Dot(B, 1), spec(1), None)
    assert replica.version > version, "the earlier spec has no demands: the ring alone places it now"
    version = replica.version
    replica.remove("tweety", [Dot(B, 1)])
    assert replica.version > version


def check_bookkeeping(replica: Replica) -> None:
    """Counts anew from all entries."""
    entries = [(name, dot, record.spec) for name, pairs in replica.birds.items() for dot, record in pairs]
    assert replica.placed == {dot: name for name, dot, each in entries if each.options.placed}
    assert dict(replica._users) == counted(each.code for _, _, each in entries)
    assert dict(replica._adders) == counted(dot.life for _, dot, _ in entries)
    needed = {each.code for _, _, each in entries}
    assert set(replica.code) <= needed and set(replica.missing_code()) == needed - set(replica.code)


def counted(values: Iterable[object]) -> dict[object, int]:
    counts: dict[object, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


actions = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["add", "add", "remove", "status", "replace", "part"]),
        st.sampled_from(NAMES),
        st.sampled_from(["code-1", "code-2"]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=30,
)


@given(actions)
@laws
def test_the_bookkeeping_is_what_counting_anew_gives(history: Sequence[tuple[int, str, str, str, bool, bool]]) -> None:
    replicas, lives, clock = [Replica(), Replica()], [A, B], 0
    for who, kind, name, code, demands, told in history:
        here, there = replicas[who], replicas[1 - who]
        changes = []
        if kind == "part":
            there.join_part(here.birds.part(keys=NAMES))
        if kind in ("remove", "replace"):
            changes.append(here.remove(name, [dot for dot, _ in here.records(name)]))
        if kind in ("add", "replace"):
            clock += 1
            dot = Dot(lives[who], here.birds.context.top(lives[who]) + 1)
            body = code.encode() if here.code.get(code) is None else None
            changes.append(here.add(name, dot, spec(clock, code, PLACED if demands else None), body))
        if kind == "status" and here.records(name):
            clock += 1
            change = here.set_status(name, here.records(name)[0][0], status(sequence=clock))
            assert change is not None
            changes.append(change)
        if told:
            there.join(copied(here.update_of(changes)))
        for replica in replicas:
            check_bookkeeping(replica)
