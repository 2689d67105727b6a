"""What a bird is, written down: which names are allowed, how they are encoded, and what makes two specs the same bird."""

from __future__ import annotations

import dataclasses
import enum
import pickle
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock_ray.specs import (
    BirdInfo,
    Dot,
    Life,
    Name,
    NestInfo,
    NodeRecord,
    Options,
    Route,
    Spec,
    Stamp,
    Status,
    check_name,
    encode_name,
    name_hash,
    stable_hash,
)

#: No deadline: a slow machine breaks no law.
laws = settings(deadline=None)


class Text(str):
    """A subclass of an allowed type."""


class Number(enum.IntEnum):
    ONE = 1


class Pair(tuple[str, str]):
    """A subclass of tuple, as every named tuple is."""


class Uuid(uuid.UUID):
    """A subclass of UUID."""


# Names


@pytest.mark.parametrize(
    "name",
    ["", "tweety", "\x00", "\ud800", 0, -1, 1 << 4000, b"", b"\xff", uuid.UUID(int=0), (), ("a",), ("a", (1, (b"", ())))],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_of_the_five_types_are_allowed(name: Name) -> None:
    check_name(name)
    assert isinstance(encode_name(name), bytes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, "NoneType"),
        (True, "bool"),
        (1.0, "float"),
        (1j, "complex"),
        (["a"], "list"),
        ({"a"}, "set"),
        (frozenset("a"), "frozenset"),
        ({"a": 1}, "dict"),
        (bytearray(b"a"), "bytearray"),
        (memoryview(b"a"), "memoryview"),
        (object(), "object"),
        (str, "type"),
        (Text("a"), "Text"),
        (Number.ONE, "Number"),
        (Pair(("a", "b")), "Pair"),
        (Life("a", 1), "Life"),
        (Uuid(int=1), "Uuid"),
        (("a", True), "bool"),
        (("a", ("b", (1, 2.5))), "float"),
        ((Text("a"),), "Text"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_a_type_error_that_names_the_type(name: object, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"^a bird's name must be a str, int, bytes, uuid\.UUID or a tuple of these, not {kind}: "):
        check_name(name)


names = st.recursive(
    st.text(st.characters(), max_size=4) | st.integers() | st.binary(max_size=4) | st.uuids(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
#: Few and alike, so that collisions would be found: digits, colons and the letters of the encoding itself.
alike = st.recursive(
    st.text("s1:", max_size=3) | st.integers(-11, 11) | st.binary(max_size=2).map(lambda b: b.replace(b"\x00", b"s")),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(names | alike, names | alike)
@laws
def test_different_names_have_different_encodings(one: Name, other: Name) -> None:
    assert (encode_name(one) == encode_name(other)) == (one == other)
    assert (name_hash(one) == name_hash(other)) == (one == other)


def decoded(data: bytes) -> Any:
    """The inverse of the encoding, which proves that it loses nothing."""
    kind, body = data[:1], data[1:]
    if kind == b"t":
        parts = []
        while body:
            length, _, rest = body.partition(b":")
            parts.append(decoded(rest[: int(length)]))
            body = rest[int(length) :]
        return tuple(parts)
    if kind == b"s":
        return body.decode("utf-8", "surrogatepass")
    if kind == b"i":
        return int(body, 16)
    return uuid.UUID(bytes=body) if kind == b"u" else body


@given(names | alike)
@laws
def test_an_encoded_name_can_be_read_back(name: Name) -> None:
    assert decoded(encode_name(name)) == name


@pytest.mark.parametrize(
    ("name", "encoded", "position"),
    [
        ("tweety", b"stweety", 0x2C813291893D205A),
        ("Käuzchen", b"sK\xc3\xa4uzchen", 0x24AB2E4A39779E0D),
        (255, b"iff", 0x2E0A1E9C60D13C53),
        (-255, b"i-ff", 0xFA8F7DE7002A1B64),
        (b"\x00", b"b\x00", 0x9362BB8AF3B13A92),
        (uuid.UUID(int=1), b"u" + bytes(15) + b"\x01", 0x06BAF46F84B6C506),
        ((), b"t", 0xCA73DCF5E072D4D6),
        (("room", 7), b"t5:sroom2:i7", 0x3245ED6C8441B72E),
        ((("a", "b"), "c"), b"t9:t2:sa2:sb2:sc", 0x3582C24008E2E968),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_encodings_and_hashes_are_the_same_on_every_machine_and_version(name: Name, encoded: bytes, position: int) -> None:
    assert encode_name(name) == encoded
    assert name_hash(name) == position


def test_an_integer_of_any_length_is_a_name() -> None:
    """Found here: in decimal, Python refuses to write more than 4,300 digits: a ValueError out of the middle of `start`."""
    assert encode_name(10**5000) != encode_name(10**5000 + 1)


def test_hashes_have_64_bits() -> None:
    hashes = [name_hash(number) for number in range(1000)]
    assert all(0 <= each < 1 << 64 for each in hashes) and max(hashes) > 1 << 63
    assert stable_hash(b"stweety") == name_hash("tweety")


# Lives, dots, stamps


def test_the_later_life_of_a_node_is_the_greater() -> None:
    assert Life("a", 1) < Life("a", 2) < Life("a", 10)
    assert str(Dot(Life("a", 2), 7)) == "a.2:7"
    assert Stamp(1, 9) < Stamp(2, 0) < Stamp(2, 1)


# Options


def test_most_birds_have_no_demands() -> None:
    assert Options().demand == () and not Options().placed


@pytest.mark.parametrize(
    ("options", "demand"),
    [
        (Options(num_cpus=0.5), (("CPU", 0.5),)),
        (Options(num_gpus=1, num_cpus=2), (("CPU", 2), ("GPU", 1))),
        (Options(memory=1e9), (("memory", 1e9),)),
        (Options(resources=(("lidar", 1.0), ("none", 0.0))), (("lidar", 1.0),)),
        (Options(accelerator_type="T4"), (("accelerator_type:T4", 0.001),)),
    ],
)
def test_demands_are_ray_resources_in_sorted_pairs(options: Options, demand: tuple[tuple[str, float], ...]) -> None:
    assert options.demand == demand and options.placed


def test_a_label_selector_alone_places_a_bird() -> None:
    options = Options(label_selector=(("zone", "x"),))
    assert options.placed and options.demand == ()


# Specs


SPEC = Spec("m", "C", "digest", b"args", Options(), '{"pip": []}', Stamp(1, 2), "request")


@pytest.mark.parametrize(
    "other",
    [
        SPEC._replace(code="another cloudpickle of the same class"),
        SPEC._replace(options=Options(light=True)),
        SPEC._replace(stamp=Stamp(9, 9), request_id="another"),
        SPEC._replace(runtime_env=None),
    ],
)
def test_specs_are_compared_by_class_and_arguments_only(other: Spec) -> None:
    assert SPEC.same_bird(other) and other.same_bird(SPEC) and other != SPEC


@pytest.mark.parametrize("other", [SPEC._replace(module="n"), SPEC._replace(qualname="D"), SPEC._replace(args=b"others")])
def test_another_class_or_other_arguments_are_another_bird(other: Spec) -> None:
    assert not SPEC.same_bird(other) and not other.same_bird(SPEC)


def test_a_spec_names_its_class() -> None:
    assert SPEC._replace(module="farm.birds", qualname="Hen.Chick").class_name == "farm.birds.Hen.Chick"


def test_statuses_are_ordered_by_incarnation_then_nest_life_then_sequence() -> None:
    a, b = Life("a", 2), Life("b", 1)
    ordered = [Status(1, a, 9, "failed"), Status(1, b, 0, "running"), Status(1, b, 1, "failed"), Status(2, a, 0, "starting")]
    shuffled = [ordered[index] for index in (2, 0, 3, 1)]
    assert sorted(shuffled, key=lambda status: status.order) == ordered


VALUES = [
    Life("a", 1),
    Dot(Life("a", 1), 2),
    Stamp(1, 2),
    Options(num_cpus=1),
    SPEC,
    Status(1, Life("a", 1), 3, "running"),
    NodeRecord(Life("a", 1), 2.0, (("GPU", 1.0),), (("zone", "x"),), "host:1"),
    Route("tweety", Dot(Life("a", 1), 2), 1, "a", "host"),
    BirdInfo("tweety", "a", "running", 1, 0, "", "", False, "m.C"),
    NestInfo("a", "host:1", 160, 3, 0.5),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_frozen_hashable_and_come_back_from_a_pickle(value: Any) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(value, protocol))
        assert copy == value and type(copy) is type(value) and hash(copy) == hash(value)
    field = dataclasses.fields(value)[0].name if dataclasses.is_dataclass(value) else value._fields[0]
    with pytest.raises(AttributeError):
        setattr(value, field, None)
    with pytest.raises((AttributeError, TypeError)):
        value.something_else = 1
