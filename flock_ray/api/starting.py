"""From a class and its arguments to a spec, which needs nothing of the process that made it.

Rules kept here: the class is pickled by Ray's cloudpickle: what the nodes can import goes by reference, what is defined in `__main__`,
a notebook or a closure by value; with it goes where its starter's modules come from (`Origin`: runtime_env, job, `sys.path`), for a
host has none of that by itself (V3). Arguments are replicated to every node: no ObjectRefs, and not too large (S5).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle
from ray.runtime_env import RuntimeEnv

from flock_ray.api.options import resolve
from flock_ray.runtime import payload
from flock_ray.runtime.client import culprit, origin_here
from flock_ray.runtime.life import is_async
from flock_ray.specs import Name, Spec, Stamp


def make_spec(
    name: Name, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any], limit: int
) -> tuple[Spec, bytes]:
    """What `start` asks the nest for.

    Args:
        given: checked options of this start.
        limit: bytes of pickled arguments allowed.

    Returns:
        The spec, its stamp still to be set by the nest; and the pickled class.

    Raises:
        TypeError: the class or an argument cannot be pickled, or an argument has an ObjectRef in it; names which. Or a light bird without
            `async def` methods asks for `max_concurrency`.
        ValueError: the arguments are too large; names the largest.
    """
    template, code = make_template(cls, given)
    return fill(template, name, args, kwargs, limit, uuid.uuid4().hex), code


def make_template(cls: object, given: Mapping[str, Any]) -> tuple[Spec, bytes]:
    """What the specs of all birds of a class have in common, and the pickled class. Raises as `make_spec`."""
    plain, options, runtime_env = resolve(cls, given)
    interleaves = is_async(plain)
    if options.light and options.max_concurrency > 1 and not interleaves:
        text = f"max_concurrency={options.max_concurrency} is for birds with async def methods, or with a process of their own"
        raise TypeError(f"{text}: a light {plain.__qualname__} runs one method at a time")
    code = _pickled_class(plain)
    origin = origin_here()
    surroundings = {
        "env": _merged(origin.runtime_env, runtime_env),
        "job": origin.job_id,
        "path": list(origin.sys_path),
        "async": interleaves,
    }
    spec = Spec(
        module=plain.__module__,
        qualname=plain.__qualname__,
        code=hashlib.sha256(code).hexdigest(),
        args=b"",
        options=options,
        runtime_env=json.dumps(surroundings, sort_keys=True),
        stamp=Stamp(0, 0),
        request_id="",
    )
    return spec, code


def fill(template: Spec, name: Name, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int, request_id: str) -> Spec:
    """The spec of one bird. Raises as `make_spec`."""
    return template._replace(args=_pickled_arguments(name, args, kwargs, limit), request_id=request_id)


def _pickled_class(cls: type) -> bytes:
    try:
        code: bytes = cloudpickle.dumps(cls)  # type: ignore[no-untyped-call]  # Ray has no types here
    except Exception as error:
        raise TypeError(f"class {cls.__qualname__} cannot be pickled ({type(error).__name__}: {error})") from error
    return code


def _pickled_arguments(name: Name, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int) -> bytes:
    try:
        packed = payload.pack_alone((args, kwargs), what="the arguments")
    except TypeError as error:
        which = culprit(args, kwargs, lambda one: payload.pack_alone(one, what=""))
        text = f"{which} of the start of bird {name!r} cannot be taken along: {error}"
        raise TypeError(text) from error.__cause__
    if len(packed) > limit:
        named = [(f"positional argument {at}", value) for at, value in enumerate(args, 1)]
        named += [(f"argument {key!r}", value) for key, value in kwargs.items()]
        size, which = max((len(payload.pack_alone(value, what=which)), which) for which, value in named)
        text = f"{which} of the start of bird {name!r} takes {size:,} bytes; all together may take {limit:,}, for every node keeps them"
        raise ValueError(f"{text}. Start without it, and pass ray.put(...) of it in a method call")
    return packed


def _merged(own: str | None, given: Mapping[str, Any] | None) -> str | None:
    """A runtime_env as Ray would merge it: the child's keys go before its parent's, `env_vars` are merged one by one."""
    if not given:
        return own
    try:
        child = dict(RuntimeEnv(**given))
    except ValueError as error:
        raise TypeError(f"runtime_env is impossible: {error}") from error
    for field in ("working_dir", "py_modules"):
        for path in [child[field]] if isinstance(child.get(field), str) else child.get(field) or ():
            if not isinstance(path, str) or "://" not in path:
                text = f"runtime_env[{field!r}] of a bird must be a URI, not {path!r}: Ray uploads a local path only for the whole job"
                raise TypeError(f"{text}; give it to ray.init(runtime_env=...)")
    parent = json.loads(own) if own else {}
    merged = {**parent, **child}
    if "env_vars" in parent and "env_vars" in child:
        merged["env_vars"] = {**parent["env_vars"], **child["env_vars"]}
    return json.dumps(merged, sort_keys=True)
