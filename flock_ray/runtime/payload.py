"""How what users pass and return travels: a pickle, and beside it what Ray has to carry itself.

    pack(value, what=...) -> (body, extra)        unpack(body, extra) -> value

`body` goes into the message (`core/wire.py`); the items of `extra` are passed as further arguments of the Ray call, or returned in a
tuple behind the message, as they are:

    handle.call.remote(encode(head, body), *extra)              # a call
    return encode(head, body) if not extra else (encode(head, body), *extra)      # an answer

Rules kept here:

- Ray counts every reference. An `ObjectRef` or `ActorHandle` pickled outside Ray's own serialiser is pinned for good (measured), so
  each travels in `extra`. A top-level `ObjectRef` argument of a call travels bare, and Ray resolves it to its value before the
  message is delivered, as in a Ray actor call; any other travels in a list of its own, and so stays a reference.
- Buffers of `OUT_OF_BAND` bytes and more (numpy arrays and whatever else gives pickle 5 a buffer) travel in `extra`: they are not
  copied into the pickle, and come out of Ray's object store without a copy, read-only.
- Values made of built-in types alone, most of what is ever sent, are pickled in C (about 1 us). All others go through Ray's
  cloudpickle, for plain pickle would name classes and functions of `__main__` that the other side does not have.

`extra` is: the buffers in the order in which the pickle wants them, then the references, last one first; reference i is `extra[-1 - i]`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle

OUT_OF_BAND = 100_000  # bytes: Ray's own `max_direct_call_object_size`; what is smaller would be copied by Ray anyway

_ATOMS = frozenset({int, float, bool, str, bytes, type(None)})
_MODULE = __name__


class _NotPlainError(Exception):
    """There is more in the value than built-in types."""


class _Plain(pickle.Pickler):
    """The C pickler; it calls `reducer_override` for everything but exact built-in types."""

    def reducer_override(self, thing: Any) -> Any:  # noqa: ARG002  # whatever it is
        raise _NotPlainError


class _TopLevel:
    """Stands for a top-level reference of a call, whose value the receiver gets in its place."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return (_value_at, (self.index,))


class _Full(cloudpickle.CloudPickler):
    """Ray's cloudpickle (which has no types); references are put aside."""

    def __init__(self, file: io.BytesIO, refs: list[Any], out_of_band: bool = True) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self._keep_in_band if out_of_band else None)  # type: ignore[no-untyped-call]  # Ray has no types here
        self._refs = refs

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            large = buffer.raw().nbytes >= OUT_OF_BAND
        except BufferError:  # not contiguous
            return True
        if large:
            self.buffers.append(buffer)
        return not large

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, ray.ObjectRef | ActorHandle):
            self._refs.append([thing])
            return (_first_at, (len(self._refs) - 1,))
        return super().reducer_override(thing)  # type: ignore[no-untyped-call]  # Ray has no types here


class _Load(pickle.Unpickler):
    """Unpickles what came with `extra`. The two placeholders below are looked up here instead of in this module."""

    def __init__(self, body: bytes | memoryview, extra: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(body), buffers=extra)
        self._placeholders = {"_value_at": lambda index: extra[-1 - index], "_first_at": lambda index: extra[-1 - index][0]}

    def find_class(self, module: str, name: str) -> Any:
        if module == _MODULE and name in self._placeholders:
            return self._placeholders[name]
        return super().find_class(module, name)


def _value_at(index: int) -> Any:  # noqa: ARG001  # what pickles hold
    raise pickle.UnpicklingError("a reference came without its extra arguments: use flock_ray.runtime.payload.unpack")


def _first_at(index: int) -> Any:  # noqa: ARG001  # what pickles hold
    raise pickle.UnpicklingError("a reference came without its extra arguments: use flock_ray.runtime.payload.unpack")


def pack(value: Any, *, what: str, call: bool = True) -> tuple[bytes, Sequence[Any]]:
    """Pickles a value for one Ray call or answer.

    Args:
        value: with `call`, the tuple `(args, kwargs)`; else anything.
        what: what the value is, for the error: `"the arguments of 'tweety'.add"`.
        call: top-level references in args and kwargs are resolved by Ray. False for results.

    Returns:
        The body, and what has to travel beside it, mostly nothing.

    Raises:
        TypeError: the value cannot be pickled; the cause says why.
    """
    body = _dump_atoms(value) if call else None
    if body is None:
        body = pack_plain(value)
    return (body, ()) if body is not None else _pack_fully(value, what, call)


def pack_alone(value: Any, *, what: str) -> bytes:
    """Pickles a value that nothing can travel beside: arguments of `start`, a state handed over.

    Raises:
        TypeError: the value cannot be pickled, or has an `ObjectRef` or `ActorHandle` in it.
    """
    body = pack_plain(value)
    if body is not None:
        return body
    file = io.BytesIO()
    refs: list[Any] = []
    try:
        _Full(file, refs, out_of_band=False).dump(value)  # type: ignore[no-untyped-call]  # Ray has no types here
    except Exception as error:
        raise TypeError(f"cannot pickle {what}: {type(error).__name__}: {error}") from error
    if refs:
        kind = type(refs[0][0]).__name__
        raise TypeError(f"{what} must not have an {kind} in it: it may be needed when its owner is gone. Pass it in a method call instead")
    return file.getvalue()


def unpack(body: bytes | memoryview, extra: Sequence[Any] = ()) -> Any:
    """The value again, from a body and what came beside it. Large buffers are read-only views."""
    if not extra:
        return pickle.loads(body)
    return _Load(body, extra).load()


def _dump_atoms(value: tuple[tuple[Any, ...], dict[str, Any]]) -> bytes | None:
    """`(args, kwargs)` if no argument has parts: half of what a look into parts costs."""
    args, kwargs = value
    for arg in args:
        if type(arg) not in _ATOMS:
            return None
    for arg in kwargs.values():
        if type(arg) not in _ATOMS:
            return None
    return pickle.dumps(value, 5)


def pack_plain(value: Any) -> bytes | None:
    """Pickles a value that is made of built-in types alone; `None` if it is not."""
    if type(value) in _ATOMS:
        return pickle.dumps(value, 5)
    file = io.BytesIO()
    try:
        _Plain(file, protocol=5).dump(value)
    except Exception:  # whatever stopped the quick way, the full one says what is wrong
        return None
    return file.getvalue()


def _pack_fully(value: Any, what: str, call: bool) -> tuple[bytes, Sequence[Any]]:
    file = io.BytesIO()
    refs: list[Any] = []
    try:
        if call:
            value = _put_aside_top_level(value, refs)
        pickler = _Full(file, refs)
        pickler.dump(value)  # type: ignore[no-untyped-call]  # Ray has no types here
    except Exception as error:
        raise TypeError(f"cannot pickle {what}: {type(error).__name__}: {error}") from error
    return file.getvalue(), [*pickler.buffers, *reversed(refs)]


def _put_aside_top_level(value: Any, refs: list[Any]) -> Any:
    """`(args, kwargs)` with a placeholder for each reference that is an argument itself."""

    def aside(thing: Any) -> Any:
        if not isinstance(thing, ray.ObjectRef):
            return thing
        refs.append(thing)
        return _TopLevel(len(refs) - 1)

    args, kwargs = value
    return tuple(map(aside, args)), {key: aside(thing) for key, thing in kwargs.items()}
