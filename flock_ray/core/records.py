"""One record, and many records as columns: how the content of a replica travels between nests.

A pickled record is 600 bytes, most of them names of classes and fields, and takes 15 us to read. As columns it is half of that and
2 us (measured): what records have in common (class and options; host and state) is written once, all else is lists of plain
values, and they are read straight into objects that share what they have in common. So a name takes 1.0 KB in a replica and not 2.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

from flock_ray.core.aworset import Pairs, life_hash
from flock_ray.specs import Dot, Life, Name, Options, Spec, Stamp, Status

T = TypeVar("T")

_ORDER = struct.Struct("<QQQ")
_NONE = -1  # in place of the number of a situation: no status


class Record(NamedTuple):
    """What is known of one dot."""

    spec: Spec
    status: Status | None = None

    def join(self, other: Record) -> Record:
        """The later status wins; specs of one dot are equal."""
        mine, theirs = self[1], other[1]
        if theirs is None or (mine is not None and mine[:3] >= theirs[:3]):  # the first three fields are the order
            return self
        return Record(self[0], theirs)

    def fingerprint(self) -> bytes:
        """The order of the status: by it two statuses of a dot are told apart."""
        status = self[1]
        return b"" if status is None else _ORDER.pack(status[0], life_hash(status[1]), status[2])


@lru_cache(maxsize=4096)
def common(value: T) -> T:
    """The first value that was equal to this one. Bounded, for lives and classes come and go; a miss costs memory only."""
    return value


def shared(spec: Spec) -> Spec:
    """The same with its common parts shared with other specs: what comes in messages has copies of its own of everything."""
    module, qualname, code, args, options, runtime_env, stamp, request_id = spec
    module, qualname, code, options, runtime_env = common((module, qualname, code, options, runtime_env))
    return Spec(module, qualname, code, args, options, runtime_env, stamp, request_id)


Columns: TypeAlias = tuple[Any, ...]


class _Table(dict[Any, int]):
    """Numbers values in the order in which they come."""

    def __missing__(self, value: Any) -> int:
        number = self[value] = len(self)
        return number


def pack(entries: Mapping[Name, Pairs[Record]], gone: Iterable[Dot] = ()) -> Columns:
    """Entries, and dots that have none any more, as plain values."""
    lives, kinds, situations = _Table(), _Table(), _Table()
    life_of: list[int] = []
    counters: list[int] = []
    kind_of: list[int] = []
    arguments: list[bytes] = []
    walls: list[int] = []
    logicals: list[int] = []
    requests: list[str] = []
    situation_of: list[int] = []
    incarnations: list[int] = []
    sequences: list[int] = []
    for pairs in entries.values():
        for (life, counter), (spec, status) in pairs:
            module, qualname, code, args, options, runtime_env, stamp, request_id = spec
            life_of.append(lives[life])
            counters.append(counter)
            kind_of.append(kinds[module, qualname, code, options, runtime_env])
            arguments.append(args)
            walls.append(stamp[0])
            logicals.append(stamp[1])
            requests.append(request_id)
            if status is None:
                situation_of.append(_NONE)
            else:
                incarnation, holder, sequence, *situation = status
                situation_of.append(situations[holder, *situation])
                incarnations.append(incarnation)
                sequences.append(sequence)
    lost = [(lives[life], counter) for life, counter in gone]
    return (
        tuple(entries),
        _unless(1, [len(pairs) for pairs in entries.values()]),
        [tuple(life) for life in lives],
        _unless(0, life_of),
        counters,
        [(module, qualname, code, tuple(options), env) for module, qualname, code, options, env in kinds],
        _unless(0, kind_of),
        arguments,
        walls,
        _unless(0, logicals),
        requests,
        [(tuple(holder), *situation) for holder, *situation in situations],
        _unless(0, situation_of),
        _unless(1, incarnations),
        sequences,
        lost,
    )


def _unless(usual: int, column: list[int]) -> list[int] | int:
    """A column that has the same value everywhere, as the number of its rows below zero."""
    return -len(column) if column.count(usual) == len(column) else column


def _all(usual: int, column: list[int] | int) -> Sequence[int]:
    return [usual] * -column if isinstance(column, int) else column


def unpack(columns: Columns) -> tuple[dict[Name, Pairs[Record]], list[Dot]]:
    """What was packed, as new objects that share what they have in common with all others.

    Raises:
        ValueError: these are no columns.
    """
    try:
        return _unpack(*columns)
    except (TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        raise ValueError(f"these are no columns of records: {error}") from error


def _unpack(
    names: Any, counts: Any, lives: Any, life_of: Any, counters: Any, kinds: Any, kind_of: Any, arguments: Any, walls: Any,
    logicals: Any, requests: Any, situations: Any, situation_of: Any, incarnations: Any, sequences: Any, lost: Any,
) -> tuple[dict[Name, Pairs[Record]], list[Dot]]:  # fmt: skip
    make = tuple.__new__  # of named tuples, half the time of their own constructors
    lives = [common(Life(*life)) for life in lives]
    kinds = [common((module, qualname, code, Options(*options), env)) for module, qualname, code, options, env in kinds]
    situations = [
        (common(Life(*holder)), common(state), common(host), restarts, crashes, error, reason, common(address))
        for holder, state, host, restarts, crashes, error, reason, address in situations
    ]
    statuses = zip(_all(1, incarnations), sequences, strict=True)
    situated = _all(0, situation_of)
    pairs: list[tuple[Dot, Record]] = []
    rows = zip(
        _all(0, life_of), counters, _all(0, kind_of), arguments, walls, _all(0, logicals), requests, situated, strict=True,
    )  # fmt: skip
    for life, counter, kind, args, wall, logical, request_id, situation in rows:
        module, qualname, code, options, env = kinds[kind]
        spec = make(Spec, (module, qualname, code, args, options, env, make(Stamp, (wall, logical)), request_id))
        status = None
        if situation != _NONE:
            incarnation, sequence = next(statuses)
            holder, state, host, restarts, crashes, error, reason, address = situations[situation]
            status = make(Status, (incarnation, holder, sequence, state, host, restarts, crashes, error, reason, address))
        pairs.append((make(Dot, (lives[life], counter)), make(Record, (spec, status))))
    if next(statuses, None) is not None:
        raise ValueError("there are more statuses than records")
    gone = [Dot(lives[life], counter) for life, counter in lost]
    if isinstance(counts, int) and -counts == len(names) == len(pairs):
        return {name: (pair,) for name, pair in zip(names, pairs, strict=True)}, gone
    entries, at = {}, 0
    for name, count in zip(names, _all(1, counts), strict=True):
        entries[name] = tuple(pairs[at : at + count])
        at += count
    if at != len(pairs) or len(entries) != len(names):
        raise ValueError("the names do not account for the records")
    return entries, gone
