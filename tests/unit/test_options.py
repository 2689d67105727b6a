"""Options: what is refused and what to use instead, and whose word counts."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

import pytest
import ray

import flock_ray
from flock_ray.api.options import check, defaults, methods, resolve, unwrap
from flock_ray.runtime.life import is_async
from flock_ray.specs import Options

T = TypeVar("T")


class Plain:
    limit = 3

    def __init__(self, n=0):
        self.n = n

    def add(self, k):
        return k

    @staticmethod
    def fixed():
        return 1

    @classmethod
    def made(cls):
        return cls()

    def _hidden(self):
        return None


class WithAsync(Plain):
    async def later(self):
        return None


class Generically(Generic[T]):
    def get(self) -> T: ...


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_restart": 3}, "'max_restart'.*'max_restarts'"),
        ({"colour": 3}, "'colour'"),
        ({"restart": "sometimes"}, "restart.*'transient'.*'sometimes'"),
        ({"on_error": "ignore"}, "on_error"),
        ({"if_exists": True}, "if_exists"),
        ({"ack": "all"}, "ack"),
        ({"moves": 1}, "moves.*True or False"),
        ({"light": 1}, "light.*True or False"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"max_restarts": 1.5}, "max_restarts"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"healthy_after": 0}, "healthy_after"),
        ({"start_timeout": 0}, "start_timeout"),
        ({"stop_timeout": None}, "stop_timeout"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_cpus": float("nan")}, "num_cpus"),
        ({"num_gpus": "1"}, "num_gpus"),
        ({"memory": float("inf")}, "memory"),
        ({"resources": [("a", 1)]}, "resources"),
        ({"resources": {"CPU": 1}}, "num_cpus"),
        ({"resources": {"pond": "deep"}}, "pond"),
        ({"label_selector": {"zone": 1}}, "zone"),
        ({"accelerator_type": 4}, "accelerator_type"),
        ({"runtime_env": "env.yaml"}, "runtime_env"),
        ({"name": "x"}, "'name'.*first argument"),
        ({"lifetime": "detached"}, "lifetime"),
        ({"scheduling_strategy": "SPREAD"}, "scheduling_strategy.*label_selector"),
        ({"namespace": "x"}, "namespace.*Flock"),
        ({"max_task_retries": 1}, "retry=True"),
    ],
)
def test_an_unknown_or_impossible_option_is_named(given, named):
    with pytest.raises(TypeError, match=named):
        check(given)
    with pytest.raises(TypeError, match=named):
        defaults(**given)


def test_every_option_of_a_spec_can_be_given():
    given = {
        "light": False, "restart": "permanent", "max_restarts": 0, "healthy_after": 1, "on_error": "crash", "if_exists": "ok",
        "ack": "peer", "moves": False, "start_timeout": 5,
        "stop_timeout": 1, "num_cpus": 0.5, "num_gpus": 1, "memory": 1e9, "resources": {"b": 1, "a": 2},
        "accelerator_type": "T4", "label_selector": {"zone": "a"}, "max_concurrency": 4,
    }  # fmt: skip
    _, options, env = resolve(Plain, check({**given, "runtime_env": {"env_vars": {"A": "1"}}}))
    assert options.resources == (("a", 2.0), ("b", 1.0))
    assert options.label_selector == (("zone", "a"),)
    assert (options.restart, options.num_cpus, options.start_timeout, options.max_concurrency) == ("permanent", 0.5, 5.0, 4)
    assert env == {"env_vars": {"A": "1"}}
    assert hash(options) == hash(resolve(Plain, check(given))[1])


def test_options_go_before_defaults_and_those_before_ray_remotes():
    @defaults(num_gpus=2, max_restarts=2)
    class Here:
        pass

    remote = ray.remote(num_cpus=1, num_gpus=1, memory=5)(Here)
    plain, options, _ = resolve(remote, check({"max_restarts": 3}))
    assert plain is Here
    assert options == Options(num_cpus=1.0, num_gpus=2.0, memory=5.0, max_restarts=3)


def test_defaults_go_above_or_below_ray_remote_and_are_inherited():
    class Base:
        pass

    remote = defaults(max_restarts=1)(ray.remote(Base))
    assert resolve(remote, {})[1].max_restarts == 1

    @defaults(moves=False)
    class Child(Base):
        pass

    assert (resolve(Child, {})[1].max_restarts, resolve(Child, {})[1].moves) == (1, False)
    assert resolve(Base, {})[1].moves is True


@pytest.mark.parametrize(
    ("remote", "named"),
    [
        ({"name": "x"}, "name.*first argument"),
        ({"lifetime": "detached"}, "lifetime.*lives until"),
        ({"max_restarts": 3}, r"max_restarts.*flock_ray\.options"),
        ({"scheduling_strategy": "SPREAD"}, "scheduling_strategy.*places"),
        ({"max_task_retries": 2}, "max_task_retries.*retry=True"),
        ({"concurrency_groups": {"io": 2}}, "concurrency_groups.*max_concurrency"),
    ],
)
def test_what_ray_remote_can_say_and_a_bird_cannot_have_is_refused(remote, named):
    cls = ray.remote(**remote)(Plain)
    with pytest.raises(TypeError, match=named):
        resolve(cls, {})


def test_a_class_is_unwrapped_from_ray_and_from_its_type_arguments():
    assert unwrap(Plain) == (Plain, {})
    assert unwrap(ray.remote(Plain))[0] is Plain
    assert unwrap(Generically[int])[0] is Generically
    assert unwrap(abc.ABC)[0] is abc.ABC


@pytest.mark.parametrize("thing", [Plain(), "Plain", len, None, 3])
def test_what_is_no_class_is_refused(thing):
    with pytest.raises(TypeError, match="class"):
        unwrap(thing)


def test_an_actor_class_with_ray_options_is_refused_with_what_to_use():
    with pytest.raises(TypeError, match=r"flock_ray\.options"):
        unwrap(ray.remote(Plain).options(num_cpus=1))


def test_a_class_with_an_async_method_is_async():
    assert not is_async(Plain)
    assert is_async(WithAsync)


def test_only_public_methods_are_methods():
    assert set(methods(WithAsync)) == {"add", "fixed", "made", "later"}


def test_options_are_checked_where_they_are_written():
    with pytest.raises(TypeError, match="max_restart"):
        flock_ray.options(max_restart=1)
    assert "if_exists='ok'" in repr(flock_ray.Flock("x").options(if_exists="ok"))
