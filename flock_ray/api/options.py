"""How a bird is to be run: checks what users give and merges it.

Rules kept here: every option is checked where it is written, by `TypeError`; `options()` goes before `@defaults`, and that before
`@ray.remote`. A class decorated by `@ray.remote` is used as the class it was; what Ray's decorator can say and flock_ray cannot do is
refused with what to use instead, never ignored. Ray itself is not imported: its actor classes are known by their metadata.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast, get_origin

from flock_ray.config import check_known
from flock_ray.specs import Options

AnyClass = TypeVar("AnyClass")

_DEFAULTS = "__flock_ray_defaults__"
_SELECTOR = re.compile(r"!?(in\([^()]+\)|[^!()]+)")
_KNOWN = [*Options._fields, "runtime_env"]

_CHOICES = {
    "restart": ("transient", "permanent", "temporary"),
    "on_error": ("reply", "crash"),
    "if_exists": ("error", "ok"),
    "ack": ("local", "peer"),
}
_INSTEAD = {
    "name": "the name is start's first argument",
    "namespace": 'a flock is the namespace: Flock("other").start(...)',
    "lifetime": "every bird lives until it is stopped, whoever started it",
    "get_if_exists": 'use flock_ray.options(if_exists="ok")',
    "max_restarts": "Ray counts other restarts than flock_ray; use flock_ray.options(max_restarts=...) or restart=...",
    "max_task_retries": "use bird.method.options(retry=True) where a call may run twice",
    "retry_exceptions": "use bird.method.options(retry=True) where a call may run twice",
    "scheduling_strategy": "the flock places its birds; use resources, label_selector or num_cpus to say where one can run",
    "placement_group": "the flock places its birds; use resources, label_selector or num_cpus to say where one can run",
    "concurrency_groups": "use flock_ray.options(max_concurrency=...) or async def methods",
    "max_pending_calls": "a bird's mailbox has a limit of its own; drop it",
    "object_store_memory": "Ray ignores it; drop it",
}
_REMOTE_TOO = (
    "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "label_selector", "runtime_env", "max_concurrency",
)  # fmt: skip
_IGNORED = ("enable_task_events", "allow_out_of_order_execution", "_metadata", "_labels", "enable_tensor_transport")


def check(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks options as given to `options()` or `@defaults` and brings them to the form `Options` has.

    Raises:
        TypeError: an option is unknown, or its value impossible; the message names it and what to use instead.
    """
    for key in given:
        if key in _INSTEAD and key not in _KNOWN:
            raise TypeError(f"{key!r} is no option of a bird: {_INSTEAD[key]}")
    check_known("option of a bird", dict(given), _KNOWN)
    return {key: _checked(key, value) for key, value in given.items()}


def _checked(key: str, value: Any) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            _refuse(key, value, "one of " + ", ".join(repr(choice) for choice in _CHOICES[key]))
    elif key in ("light", "moves"):
        if not isinstance(value, bool):
            _refuse(key, value, "True or False")
    elif key in ("max_restarts", "max_concurrency"):
        least = 0 if key == "max_restarts" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _refuse(key, value, f"a whole number of at least {least}")
    elif key in ("resources", "label_selector"):
        return _pairs(key, value)
    elif key == "accelerator_type":
        if value is not None and not isinstance(value, str):
            _refuse(key, value, "a str")
    elif key == "runtime_env":
        if value is not None and not isinstance(value, Mapping):
            _refuse(key, value, "a dict")
    else:
        return _number(key, value)
    return value


def _number(key: str, value: Any) -> float | None:
    if value is None and key == "start_timeout":
        return None
    positive = key in ("start_timeout", "stop_timeout", "healthy_after")
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not (value > 0 if positive else value >= 0) or value == float("inf"):
        _refuse(key, value, f"a finite number {'above' if positive else 'of at least'} 0")
    if key.startswith(("num_", "resources")) and round(value, 4) != value:
        _refuse(key, value, "a multiple of 0.0001, as fine as Ray counts")
    return float(value)


def _pairs(key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(what, str) for what in value):
        _refuse(key, value, "a dict with str keys")
    for what, amount in value.items():
        if key == "label_selector":
            if not isinstance(amount, str):
                _refuse(f"{key}[{what!r}]", amount, "a str")
            elif not _SELECTOR.fullmatch(amount):
                _refuse(f"{key}[{what!r}]", amount, "'value', '!value', 'in(a,b)' or '!in(a,b)'")
        elif what in ("CPU", "GPU", "memory"):
            instead = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}[what]
            raise TypeError(f"resources[{what!r}] is given by the option {instead!r}")
        else:
            _number(f"{key}[{what!r}]", amount)
    return tuple(sorted((what, amount if key == "label_selector" else float(amount)) for what, amount in value.items()))


def _refuse(key: str, value: Any, wanted: str) -> None:
    raise TypeError(f"{key} must be {wanted}, not {value!r}")


def defaults(**given: Any) -> Callable[[AnyClass], AnyClass]:
    """Puts options on a class, for every bird started from it; a subclass has them too, and may give its own.

    Args:
        given: options as `flock_ray.options` takes them. They yield to `options()` and go before `@ray.remote`'s.

    Returns:
        A decorator that returns the class unchanged but for one private attribute. It goes above or below `@ray.remote`.

    Raises:
        TypeError: an option is unknown or impossible.
    """
    checked = check(given)

    def decorate(cls: AnyClass) -> AnyClass:
        plain = unwrap(cls)[0]
        setattr(plain, _DEFAULTS, {**getattr(plain, _DEFAULTS, {}), **checked})
        return cls

    return decorate


def unwrap(cls: object) -> tuple[type, dict[str, Any]]:
    """The class that a user wrote, and what `@ray.remote` says of it.

    Raises:
        TypeError: it is no class; or `@ray.remote` has an option that a bird cannot have.
    """
    alias_of = get_origin(cls)
    if isinstance(alias_of, type):
        cls = alias_of  # Box[str] is started as Box: at run time they are one
    if isinstance(cls, type):
        return getattr(cls, "__ray_actor_class__", cls), {}
    metadata = getattr(cls, "__ray_metadata__", None)
    modified = getattr(metadata, "modified_class", None)
    if not isinstance(modified, type):
        hint = ""
        if hasattr(cls, "remote") and not hasattr(cls, "__call__"):  # noqa: B004  # what Counter.options(...) gives has the one, not the other
            hint = "; give Ray's options by flock_ray.options(...)"
        raise TypeError(f"a bird is started from a class, not from {type(cls).__name__} {cls!r}{hint}")
    return getattr(modified, "__ray_actor_class__", modified), _from_remote(getattr(cls, "_default_options", {}), modified.__name__)


def _from_remote(given: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    taken = {}
    for key, value in given.items():
        if key in _IGNORED or value is None:
            continue
        if key not in _REMOTE_TOO:
            instead = _INSTEAD.get(key, "drop it, or use flock_ray.options(...)")
            raise TypeError(f"@ray.remote({key}=...) of class {class_name} is impossible for a bird: {instead}")
        taken[key] = _checked(key, value)
    return taken


def resolve(cls: object, given: Mapping[str, Any]) -> tuple[type, Options, Mapping[str, Any] | None]:
    """A class as the user wrote it, with the options its birds have.

    Args:
        cls: a class, or an actor class of Ray's.
        given: checked options of this start.

    Returns:
        The plain class; the options; the `runtime_env` asked for, or `None`.

    Raises:
        TypeError: what `cls` is, or what `@ray.remote` says, is impossible.
    """
    plain, remote = unwrap(cls)
    merged = {**remote, **getattr(plain, _DEFAULTS, {}), **given}
    runtime_env = merged.pop("runtime_env", None)
    options = Options(**merged)
    if options.light and options.demand:
        text = f"a light bird shares its process, and cannot ask for {', '.join(what for what, _ in options.demand)}"
        raise TypeError(f"{text}: leave light=True out, and it has a process of its own")
    return plain, options, cast("Mapping[str, Any] | None", runtime_env)


def methods(cls: type) -> Iterator[str]:
    """The names of a class's public methods."""
    for name in dir(cls):
        thing = inspect.getattr_static(cls, name, None)
        kinds = (staticmethod, classmethod, functools.partialmethod, functools.singledispatchmethod)
        if not name.startswith("_") and (callable(thing) or isinstance(thing, kinds)):
            yield name
