"""The errors: one tree, each picklable with its name, cause and notes, each a kind of the built-in exception it means."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import uuid

import pytest

from flock_ray import errors
from flock_ray.errors import BirdNotFound, CallTimeout, FlockError

ALL = [getattr(errors, name) for name in errors.__all__]


def test_every_error_of_the_file_is_public_and_in_the_tree() -> None:
    classes = {each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, BaseException)}
    assert classes == set(ALL)
    assert all(issubclass(each, FlockError) for each in classes)
    assert errors.__all__ == sorted(errors.__all__)


def test_errors_that_mean_what_a_built_in_one_means_are_of_its_kind() -> None:
    kinds = (LookupError, TimeoutError, RuntimeError, ValueError, OSError)
    found = {each.__name__: [kind.__name__ for kind in kinds if issubclass(each, kind)] for each in ALL}
    assert {name: of for name, of in found.items() if of} == {
        "BirdNotFound": ["LookupError"],
        "CallTimeout": ["TimeoutError", "OSError"],
    }
    with pytest.raises(LookupError):
        raise BirdNotFound("no", "tweety")
    with pytest.raises(TimeoutError):
        raise CallTimeout("no", "tweety")


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_when_it_occurs(kind: type[FlockError]) -> None:
    assert kind.__doc__
    assert kind is FlockError or kind.__doc__ != FlockError.__doc__


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", [None, "tweety", 7, ("room", uuid.UUID(int=1)), b"\x00"], ids=repr)
def test_every_error_has_its_message_and_the_name_of_the_bird(kind: type[FlockError], name: object) -> None:
    error = kind("what happened", name)
    assert str(error) == "what happened" and error.args == ("what happened",)
    assert error.name == name
    assert kind("what happened").name is None and kind("what happened", name=name).name == name


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_comes_back_from_a_pickle_with_its_name_cause_and_notes(kind: type[FlockError], protocol: int) -> None:
    error = kind("what happened", ("room", 7))
    inner = CallTimeout("before", "robin")
    inner.__cause__ = KeyError("the first")
    error.__cause__ = inner
    add_note = getattr(error, "add_note", None)  # Python 3.11
    if add_note is not None:
        add_note("one")
        add_note("two")
    again = error
    for _ in range(2):  # an error may travel from the host over a nest to the caller
        again = pickle.loads(pickle.dumps(again, protocol))
        assert type(again) is kind
        assert str(again) == "what happened" and again.name == ("room", 7) and again.args == error.args
        cause = again.__cause__
        assert isinstance(cause, CallTimeout) and cause.name == "robin" and again.__suppress_context__
        assert isinstance(cause.__cause__, KeyError) and cause.__cause__.args == ("the first",)
        assert getattr(again, "__notes__", []) == (["one", "two"] if sys.version_info >= (3, 11) else [])


@pytest.mark.parametrize("kind", ALL)
def test_an_error_without_cause_or_notes_gets_none(kind: type[FlockError]) -> None:
    for again in (pickle.loads(pickle.dumps(kind("what happened", "tweety"))), copy.copy(kind("what happened", "tweety"))):
        assert again.name == "tweety" and again.__cause__ is None and not again.__suppress_context__
        assert not hasattr(again, "__notes__")


def test_an_error_raised_from_another_keeps_it_over_the_wire() -> None:
    try:
        try:
            raise ZeroDivisionError("division by zero")
        except ZeroDivisionError as inner:
            raise CallTimeout("tweety did not answer within 1 s", "tweety") from inner
    except CallTimeout as error:
        again = pickle.loads(pickle.dumps(error))
    assert isinstance(again.__cause__, ZeroDivisionError) and str(again.__cause__) == "division by zero"
