"""Records as columns: what is read is what was written, and what is no such thing is refused."""

from __future__ import annotations

import pickle
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.core.aworset import Context, Delta, Hashes, Part, Prefix
from flock_ray.core.records import Record, pack, unpack
from flock_ray.core.replica import Content, Update
from flock_ray.specs import Dot, Life, Options, Spec, Stamp, Status

laws = settings(deadline=None)

lives = st.builds(Life, st.sampled_from(["a", "b" * 56]), st.integers(1, 1 << 62))
dots = st.builds(Dot, lives, st.integers(1, 1 << 40))
texts = st.sampled_from(["", "x", "grüße", "flock:host:1"])
options = st.builds(
    lambda light, cpus, resources: Options(light=light, num_cpus=cpus, resources=resources),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([(), (("r", 1.0),)]),
)
specs = st.builds(
    Spec, texts, texts, texts, st.binary(max_size=9), options, st.none() | texts, st.builds(Stamp, st.integers(0), st.integers(0)), texts
)
statuses = st.builds(
    Status, st.integers(0, 1 << 40), lives, st.integers(0, 1 << 40), texts, texts, st.integers(0, 9), st.integers(0, 9), texts, texts, texts
)
records = st.builds(Record, specs, st.none() | statuses)
names = st.recursive(
    st.text(max_size=3) | st.integers() | st.binary(max_size=3) | st.builds(uuid.UUID, int=st.integers(0, 9)), st.tuples, max_leaves=3
)
entries = st.dictionaries(names, st.dictionaries(dots, records, max_size=3).map(lambda pairs: tuple(pairs.items())), max_size=6)


@given(entries, st.lists(dots, max_size=3))
@laws
def test_columns_are_read_as_they_were_written(given_entries, gone):
    read, lost = unpack(pickle.loads(pickle.dumps(pack(given_entries, gone))))
    assert read == given_entries and list(read) == list(given_entries)
    assert lost == gone
    for pairs in read.values():
        for dot, record in pairs:
            kinds = (type(dot), type(dot.life), type(record), type(record.spec), type(record.spec.stamp), type(record.spec.options))
            assert kinds == (Dot, Life, Record, Spec, Stamp, Options)
            assert record.status is None or (type(record.status), type(record.status.life)) == (Status, Life)


@given(entries, st.sets(dots, max_size=3))
@laws
def test_updates_and_contents_are_pickled_as_they_are(given_entries, gone):
    context = gone | {dot for pairs in given_entries.values() for dot, _ in pairs}
    update = Update(Delta(given_entries, context), {"digest": b"code"})
    assert pickle.loads(pickle.dumps(update)) == update
    content = Content(Part((3, 4), ("name",), given_entries, Context({}, context)), {"digest": b"code"})
    assert pickle.loads(pickle.dumps(content)) == content


@given(st.dictionaries(st.builds(Prefix, st.integers(0, 3), st.integers(0, 0)), st.integers(0, (1 << 64) - 1)))
@laws
def test_hashes_are_pickled_as_they_are(hashes):
    hashes = {**hashes, Prefix(3, 32_767): 5, Prefix(1, 31): 7}
    read = pickle.loads(pickle.dumps(Hashes(hashes)))
    assert read == hashes and all(type(prefix) is Prefix for prefix in read)


def spec(number: int) -> Spec:
    return Spec("birds", "Bird", "code", b"args", Options(), None, Stamp(1_800_000_000_000_000_000 + number, 0), f"{number:032x}")


def some_columns() -> list[object]:
    life = Life("a", 1)
    status = Status(1, life, 2, "running")
    return list(pack({f"bird-{n}": ((Dot(life, n), Record(spec(n), status if n % 2 else None)),) for n in range(1, 5)}, [Dot(life, 9)]))


DAMAGES = [(column, damage) for column in range(16) for damage in ("missing", "empty", "short", "wild")]


@pytest.mark.parametrize(("column", "damage"), [each for each in DAMAGES if each != (15, "short")])  # one removal less is a good message
def test_columns_that_do_not_fit_together_are_refused(column, damage):
    columns = some_columns()
    whole = columns[column]
    if damage == "missing":
        del columns[column]
    elif damage == "empty":
        columns[column] = None
    elif isinstance(whole, int):
        columns[column] = whole - 1 if damage == "short" else "wild one"
    else:
        columns[column] = whole[:-1] if damage == "short" else [*whole[:-1], None, None]  # type: ignore[index]
    with pytest.raises(ValueError, match="no columns"):
        unpack(tuple(columns))


def test_a_name_of_many_takes_few_bytes():
    """Most of a record is what it has in common with others: that is sent once."""
    life = Life("a" * 56, 1)
    status = Status(1, life, 2, "running", "flock_ray:default:host:0000000000000001", address="10.0.0.1:4711 x")
    many = {f"bird-{n}": ((Dot(life, n), Record(spec(n), status)),) for n in range(1_000)}
    assert len(pickle.dumps(pack(many))) < 100 * len(many)
    assert len(pickle.dumps(many["bird-1"])) > 400, "as it would be otherwise"
