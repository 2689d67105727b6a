"""Handles and flocks as values: what they show, when they are equal, that they travel."""

from __future__ import annotations

import copy
import pickle
import uuid

import pytest

import flock_ray
from flock_ray import Bird, Flock, Method
from flock_ray.specs import Dot, Life

DOT = Dot(Life("n", 1), 4)


def test_the_only_public_attribute_of_a_bird_is_its_name():
    bird = Bird("default", "tweety", DOT, ("add", "get"))
    assert bird.name == "tweety"
    assert dir(bird) == ["add", "get", "name"]
    assert [entry for entry in vars(Bird) if not entry.startswith("_")] == ["name"]


def test_birds_are_equal_by_flock_and_name():
    assert Bird("default", "a", DOT) == Bird("default", "a")
    assert hash(Bird("default", "a", DOT)) == hash(Bird("default", "a"))
    assert Bird("default", "a") != Bird("other", "a")
    assert Bird("default", "a") != Bird("default", b"a")
    assert Bird("default", "a") != "a"


@pytest.mark.parametrize("name", ["a", 3, b"x", uuid.UUID(int=5), ("a", (1, b"x"))])
def test_a_bird_travels_with_its_dot(name):
    bird = Bird("other", name, DOT, ("add",))
    for same in (pickle.loads(pickle.dumps(bird)), copy.copy(bird), copy.deepcopy(bird)):
        assert same == bird
        assert same._dot == DOT
        assert dir(same) == ["add", "name"]


def test_a_bird_shows_its_name_and_flock():
    assert repr(Bird("default", "a")) == "Bird('a')"
    assert repr(Bird("other", ("a", 1))) == "Bird(('a', 1), flock='other')"


@pytest.mark.parametrize("name", ["_x", "__len__", "__deepcopy__", "_repr_html_"])
def test_private_attributes_raise_locally(name):
    with pytest.raises(AttributeError, match=name):
        getattr(Bird("default", "a"), name)


def test_a_bird_takes_no_attributes():
    with pytest.raises(AttributeError):
        Bird("default", "a").colour = 3


def test_every_other_attribute_is_a_method():
    method = Bird("default", "a").add
    assert isinstance(method, Method)
    assert method.__name__ == "add"
    assert repr(method) == "<method 'add' of Bird('a')>"


def test_settings_of_a_call_are_checked():
    method = Bird("default", "a").add
    assert isinstance(method.options(timeout=None, retry=True).options(timeout=3), Method)
    with pytest.raises(TypeError, match="'timout'.*'timeout'"):
        method.options(timout=3)
    for timeout in (-1, "3", True, float("nan")):
        with pytest.raises(TypeError, match="timeout"):
            method.options(timeout=timeout)
    with pytest.raises(TypeError, match="retry"):
        method.options(retry=3)


def test_nothing_works_before_ray_is_initialised(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("Ray must not be initialised by itself")

    monkeypatch.setattr("ray.init", never)
    bird = Bird("default", "a")
    for act in (bird.add, bird.add.cast, bird.add.future, lambda: flock_ray.call("a", "add"), lambda: flock_ray.start("a", object)):
        with pytest.raises(flock_ray.FlockNotRunning, match=r"ray\.init"):
            act()
    for act in (flock_ray.count, flock_ray.nests, flock_ray.birds, flock_ray.destroy, flock_ray.init):
        with pytest.raises(flock_ray.FlockNotRunning):
            act()
    flock_ray.shutdown()


@pytest.mark.parametrize(("bad", "kind"), [(1.5, "float"), (True, "bool"), (("a", ["b"]), "list"), (None, "NoneType")])
def test_a_name_of_a_wrong_type_is_refused_by_its_type(bad, kind):
    for act in (flock_ray.bird, lambda name: flock_ray.start(name, object), lambda name: flock_ray.call(name, "x")):
        with pytest.raises(TypeError, match=kind):
            act(bad)


@pytest.mark.parametrize("method", [3, None, ["add"]])
def test_a_method_is_a_name_or_a_function(method, initialised):
    with pytest.raises(TypeError, match="method"):
        flock_ray.call("a", method)


def test_a_private_method_is_refused_locally(initialised):
    with pytest.raises(AttributeError, match="_hidden"):
        flock_ray.call("a", "_hidden")
    with pytest.raises(AttributeError, match="__init__"):
        flock_ray.cast("a", object.__init__)


@pytest.fixture
def initialised(monkeypatch):
    """A process in which Ray seems to be up; nothing may be sent."""
    monkeypatch.setattr("flock_ray.runtime.links.RayLinks.session", lambda self: "session")
    yield
    monkeypatch.setattr("flock_ray.runtime.client._process.clients", {})


def test_flocks_are_values():
    flock = Flock("pond")
    assert flock == Flock("pond") != Flock("lake")
    assert pickle.loads(pickle.dumps(flock)) == flock
    assert {flock: 1}[Flock("pond")] == 1
    assert repr(flock) == "Flock('pond')"
    assert repr(flock.aio) == "Flock('pond').aio"
    assert flock.bird("a") == Bird("pond", "a")
    for bad in ("", 3, None):
        with pytest.raises(TypeError, match="flock"):
            Flock(bad)


def test_the_current_flock_is_looked_up_at_each_call(monkeypatch):
    assert flock_ray.bird("a") == Bird("default", "a")
    monkeypatch.setenv("FLOCK_RAY_FLOCK", "pond")
    assert flock_ray.bird("a") == Bird("pond", "a")
    monkeypatch.setattr("flock_ray.api.flock._Given.flock", "lake")
    assert flock_ray.bird("a") == Bird("lake", "a")


def test_the_functions_of_the_package_travel():
    assert pickle.loads(pickle.dumps(flock_ray.call)) == flock_ray.call
    assert pickle.loads(pickle.dumps(flock_ray.aio)) is flock_ray.aio


def test_public_names_are_listed_once_and_documented():
    names = flock_ray.__all__
    assert len(names) == len(set(names))
    for name in names:
        thing = getattr(flock_ray, name)
        assert thing.__doc__, name
    for kind in (Flock, Bird, Method, type(flock_ray.aio)):
        for name, thing in vars(kind).items():
            if callable(thing) and not name.startswith("_"):
                assert thing.__doc__, (kind, name)
    sync = {name for name in vars(Flock) if not name.startswith("_")} - {"aio"}
    assert sync <= {name for name in dir(flock_ray.aio) if not name.startswith("_")}
