"""What callers, hosts and nests say to each other, as bytes.

A message is a pickled head, which the receiver can read without touching what users wrote, followed by the pickle of the users' part:

    4 bytes: length of the head | head | body

The head of a `Call` says which bird is meant, from whom it comes, and which method; its body is

    8 bytes: place in that caller's order | pickle of (args, kwargs)

Whoever turns a call away has not unpickled its arguments. The head of a caller's calls of one method is the same again and again, so
both sides keep it: to pickle it takes 5 us and to unpickle it 10, a third of what a call costs without it (measured). Nests and hosts
exchange heads without a body.

Heads are named tuples: a host is a new process, and a dataclass costs it half a millisecond, five times a named tuple (measured).
"""

from __future__ import annotations

import itertools
import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flock_ray.specs import Dot, Life, Name, Spec

if TYPE_CHECKING:
    from flock_ray.core.messages import Released

HEADS = 4_096  # heads of calls that a host keeps
ORDERS = 500  # to a host of light birds, at a time
LONG_ORDERS = 1_000_000  # bytes of arguments and states in them
LONG_HEAD = 1_024  # bytes; those of longer chains are not kept

_LENGTH = struct.Struct("!I")
_ORDER = struct.Struct("!Q")
_ROW = struct.Struct("!HHQI")
_SAME = 0xFFFFFFFF  # for a length: the body is that of the call before
_PLAIN = 0x80000000  # added to a length: a result, whose head is left out
_heads: dict[bytes, Call | Pull | CallMany] = {}


def encode(head: object, body: bytes = b"") -> bytes:
    packed = pickle.dumps(head, protocol=5)
    return b"".join((_LENGTH.pack(len(packed)), packed, body))


def decode(message: bytes | memoryview) -> tuple[Any, memoryview]:
    """The head of a message, and its body as it is."""
    view = memoryview(message)
    (length,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + length
    return pickle.loads(view[_LENGTH.size : end]), view[end:]


def encode_call(head: bytes, order: int, body: bytes) -> bytes:
    """A call, from its head as `encode` gives it."""
    return b"".join((head, _ORDER.pack(order), body))


def decode_call(message: bytes | memoryview) -> tuple[Any, int, memoryview]:
    """A `Call` with its place in its caller's order and its pickled arguments; or a `Pull` with its place among those of its stream."""
    view = memoryview(message)
    (length,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + length
    packed = bytes(view[_LENGTH.size : end])
    head = _heads.get(packed)
    if head is None:
        head = pickle.loads(packed)
        if type(head) not in (Call, Pull, CallMany):
            raise TypeError(f"{type(head).__name__} is nothing that a caller sends")
        if len(_heads) >= HEADS:
            _heads.clear()
        if length <= LONG_HEAD and type(head) is not CallMany:  # of which each has a caller of its own
            _heads[packed] = head
    (order,) = _ORDER.unpack_from(view, end)
    return head, order, view[end + _ORDER.size :]


# Callers to hosts


class Call(NamedTuple):
    """The head of a call, a cast, or the call of a generator method whose items are wanted.

    A caller's messages to one life are counted from 0: they begin in this order (C2), and by it a `Withdraw` names one.

    Args:
        caller: the calling thread (or event loop) of a process, and its connection, unique in the cluster.
        chain: the birds whose methods wait for this call, outermost first, as (flock, name) (C4).
        cast: no answer is wanted. Its host answers to a run of casts by one empty answer to the last that has begun.
        stream: the items of a generator method are wanted, of which this call and each `Pull` bring one; else a result.
    """

    caller: str
    dot: Dot
    method: str
    chain: tuple[tuple[str, Name], ...] = ()
    cast: bool = False
    stream: bool = False


class Pull(NamedTuple):
    """Wants more items of the stream that this call has opened, each answered as that call; over Ray one, for a call has one answer there.
    A stream's pulls are counted from 0 and begin in this order, as calls do. A `Withdraw` of the call closes the stream.
    """

    caller: str
    order: int
    items: int


class CallMany(NamedTuple):
    """The head of calls of many birds of one host, at most one of each; its body has the rest, see `encode_calls`. Each is answered as a
    `Call` is, several in one `"answers"` as it comes, and named by a `Withdraw` with its place among them.

    Args:
        lives, methods: what the calls refer to.
        others: as `Call`.
    """

    caller: str
    lives: tuple[Life, ...]
    methods: tuple[str, ...]
    chain: tuple[tuple[str, Name], ...] = ()
    cast: bool = False


def encode_calls(head: CallMany, calls: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    """Calls, each as (which of `lives`, which of `methods`, the dot's counter, its pickled arguments). The body is

    4 bytes: how many | for each 2 bytes: life, 2 bytes: method, 8 bytes: counter, 4 bytes: length of its arguments | all arguments

    with arguments that are the same object as those before left out.
    """
    rows, bodies = [_LENGTH.pack(len(calls))], []
    before = None
    for life, method, counter, body in calls:
        if body is before:
            rows.append(_ROW.pack(life, method, counter, _SAME))
        else:
            rows.append(_ROW.pack(life, method, counter, len(body)))
            bodies.append(body)
            before = body
    return encode_call(encode(head), 0, b"".join((*rows, *bodies)))


def decode_calls(body: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """What `encode_calls` was given.

    Raises:
        ValueError: it says more than there is.
    """
    (count,) = _LENGTH.unpack_from(body)
    at = _LENGTH.size + count * _ROW.size
    if at > len(body):
        raise ValueError(f"{count} calls do not fit into {len(body)} bytes")
    before = body[at:at]
    for life, method, counter, length in _ROW.iter_unpack(body[_LENGTH.size : at]):
        if length != _SAME:
            if at + length > len(body):
                raise ValueError("the arguments of a call are cut short")
            before = body[at : at + length]
            at += length
        yield life, method, counter, before


class Answer(NamedTuple):
    """The head of an answer. `kind` says what the body is:

    - `"result"`: the pickled result.
    - `"raised"`: the pickled exception, its remote traceback in `text`.
    - `"refused"`: nothing was run, `error` names the class of `flock_ray.errors` (or built-in) to raise with `text`.
    - `"parcel"`: the answer is too long for a socket, or Ray has to carry it: fetch it from the host's actor under the id in `text`.
    - `"item"`: the next pickled item of a stream; `"items"`: the next ones, see `encode_items`; `"end"`: there are no more; `"later"`: this
      pull brings no more, for others wait.
    - `"answers"`: to some of a `CallMany`, see `encode_answers`.
    - `"moved"`: nothing was run: the bird is not here (any more), ask for its route again and resend.
    - `"full"`: nothing was run: the bird's mailbox is full, resend in a while.
    """

    kind: str
    text: str = ""
    error: str = ""


ITEM = encode(Answer("item"))
ITEMS = encode(Answer("items"))
ANSWERS = encode(Answer("answers"))
END = encode(Answer("end"))
LATER = encode(Answer("later"))
RESULT = encode(Answer("result"))  # how nearly all answers begin; to unpickle it costs 2.7 us each time (measured)


def encode_items(answers: Sequence[bytes]) -> bytes:
    """Answers to one `Pull`, each an `"item"`, as one `"items"`; its body is

    4 bytes: how many | 4 bytes for each: its length | the pickled items
    """
    items = [answer[len(ITEM) :] for answer in answers]
    return b"".join((ITEMS, _LENGTH.pack(len(items)), *[_LENGTH.pack(len(item)) for item in items], *items))


def count_items(answer: bytes) -> int:
    """How many items an answer to a `Pull` brings, of those that the pull asked for, or how many answers to a `CallMany`; one that brings
    none takes the place of one.
    """
    for several in (ITEMS, ANSWERS):
        if answer.startswith(several):
            (count,) = _LENGTH.unpack_from(answer, len(several))
            return int(count)
    return 1


def decode_items(answer: bytes) -> list[memoryview]:
    """The pickled items of an `"item"` or `"items"`; of any other answer, none."""
    if answer.startswith(ITEM):
        return [memoryview(answer)[len(ITEM) :]]
    if not answer.startswith(ITEMS):
        return []
    view = memoryview(answer)[len(ITEMS) :]
    (count,) = _LENGTH.unpack_from(view)
    lengths = struct.unpack_from(f"!{count}I", view, _LENGTH.size)
    ends = itertools.accumulate(lengths, initial=_LENGTH.size * (count + 1))
    return [view[begin:end] for begin, end in itertools.pairwise(ends)]


def encode_answers(answers: Sequence[tuple[int, bytes]]) -> bytes:
    """Answers to calls of a `CallMany`, each with the call's place; a cast is answered by nothing. The body is

    4 bytes: how many | 4 bytes for each: its place | 4 bytes for each: its length | the answers

    with the head left out where it says "result".
    """
    lengths, bodies = [], []
    for _, answer in answers:
        if answer.startswith(RESULT):
            bodies.append(answer[len(RESULT) :])
            lengths.append(len(bodies[-1]) | _PLAIN)
        else:
            bodies.append(answer)
            lengths.append(len(answer))
    count = len(answers)
    places = struct.pack(f"!{count}I", *[place for place, _ in answers])
    return b"".join((ANSWERS, _LENGTH.pack(count), places, struct.pack(f"!{count}I", *lengths), *bodies))


def decode_answers(message: bytes) -> list[tuple[int, memoryview, bool]]:
    """The answers in an `"answers"`, each with its call's place, and whether it is a mere pickled result, without a head."""
    view = memoryview(message)[len(ANSWERS) :]
    (count,) = _LENGTH.unpack_from(view)
    places = struct.unpack_from(f"!{count}I", view, _LENGTH.size)
    lengths = struct.unpack_from(f"!{count}I", view, _LENGTH.size * (count + 1))
    at = _LENGTH.size * (2 * count + 1)
    found = []
    for place, length in zip(places, lengths, strict=True):
        end = at + (length & ~_PLAIN)
        found.append((place, view[at:end], length >= _PLAIN))
        at = end
    return found


class Withdraw(NamedTuple):
    """Take a call that has not begun out of the mailbox; cancel it if it is a running `async def` (C5); close the stream that
    it has opened. Without a caller: a ping.
    """

    caller: str
    order: int
    dot: Dot | None = None


# Nests to hosts


class HatchOrder(NamedTuple):
    """Begin a life; answered by the event `LifeRunning` or `LifeCrashed`.

    Args:
        job_id: the job, in hex, to whose driver the bird's output goes; empty: to every driver.
        sys_path: the starter's, to import the bird's class from.
    """

    flock: str
    name: Name
    dot: Dot
    born: int
    spec: Spec
    code: bytes
    restarts: int
    crashes: int
    state: bytes | None
    has_state: bool
    job_id: str = ""
    sys_path: tuple[str, ...] = ()


class Orders(NamedTuple):
    """Orders to a host of light birds, in order."""

    orders: tuple[Any, ...]


def chunks(orders: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Parts of a long list of orders that are sent one by one: a host reads none of its callers' messages while it reads one."""
    chunk: list[Any] = []
    size, code = 0, None
    for order in orders:
        length = _length(order, code)
        if chunk and (len(chunk) >= ORDERS or size + length > LONG_ORDERS):
            yield tuple(chunk)
            chunk, size, code, length = [], 0, None, _length(order, None)
        chunk.append(order)
        size += length
        code = order.code if isinstance(order, HatchOrder) else code
    if chunk:
        yield tuple(chunk)


def _length(order: Any, code: bytes | None) -> int:
    """Bytes of what may be long in an order, where a code goes with it already."""
    if not isinstance(order, HatchOrder):
        return 0
    return len(order.spec.args) + len(order.state or b"") + (len(order.code) if order.code is not code else 0)


class LeaveOrder(NamedTuple):
    """A host that holds nothing is not wanted any more."""


class EndAllOrder(NamedTuple):
    """End all lives in good order; each is answered as an `EndOrder` is."""

    reason: str
    timeout: float


class EndOrder(NamedTuple):
    """End a life in good order: the running method ends, later messages are answered "moved", `on_stop(reason)` is run, and with
    `keep` also `hand_over`, whose pickled result the host keeps until `ForgetOrder`. Answered by the event `LifeEnded`.
    """

    dot: Dot
    born: int
    reason: str
    keep: bool
    timeout: float


class RaiseOrder(NamedTuple):
    dot: Dot
    born: int
    incarnation: int


class ForgetOrder(NamedTuple):
    """A record or exit of this dot is not needed any more: the host may end."""

    dot: Dot


class ReportOrder(NamedTuple):
    """Say what you hold: answered with a `HostReport`."""


class StackOrder(NamedTuple):
    """Say what this bird does: answered with a `BirdStack`, or `None` if its life is not here."""

    dot: Dot


# Callers, hosts and nests to nests


class ForNest(NamedTuple):
    """The head of what a nest is told; the body is pickled. `what` is `"ask"`, `"read"` or `"routes"` (callers), `"say"` or `"pid"`
    (hosts), `"ready"`, or `"letters"`, a note of another nest.
    """

    what: str


# Hosts to nests


class LifeReport(NamedTuple):
    """What a host holds of a dot: a life, a record, or an exit."""

    name: Name
    dot: Dot
    spec: Spec
    code: bytes
    born: int
    incarnation: int
    restarts: int
    crashes: int
    state: str  # "starting", "running", "released", "exited", "crashed"
    record: Released | None = None
    error: str = ""


class HostReport(NamedTuple):
    """What a host holds: of light birds many, else at most one."""

    host: str
    address: str
    pid: int
    lives: tuple[LifeReport, ...]


class Words(NamedTuple):
    """What a host says at once, in order."""

    words: tuple[object, ...]


class HostUp(NamedTuple):
    """A host's process is there."""

    host: str
    pid: int


class Ran(NamedTuple):
    """How many methods a host has run since it began, and how many of them have raised."""

    host: str
    ran: int
    raised: int


class LifeBegins(NamedTuple):
    """The `__init__` of a bird with a `start_timeout` begins. One with a process of its own is given that time from its order on."""

    dot: Dot
    born: int


class LifeRunning(NamedTuple):
    """A life's `__init__` has returned. `born` is its incarnation when it was hatched, and tells lives of a dot apart.

    `address` is where its host listens: `ip:port name`, with the name of its Unix socket; empty if it is called by Ray only.
    """

    dot: Dot
    born: int
    host: str
    address: str = ""


class LifeCrashed(NamedTuple):
    """A life ended of itself: `__init__` raised, it crashed, its process died (and if it shared it, while its code ran)."""

    dot: Dot
    born: int
    error: str


class LifeExited(NamedTuple):
    """A life left in good order (`leave("normal")`)."""

    dot: Dot
    born: int


class LifeEnded(NamedTuple):
    """The answer to `EndLife`: its process is gone, or only keeps the record."""

    dot: Dot
    born: int
    state: bytes | None = None
    handed_over: bool = False


class Refused(NamedTuple):
    """Connections to a host were turned away: how many since it was said last, and why."""

    host: str
    why: str
    times: int


class Welcome(NamedTuple):
    """A nest's answer to a host's report: this life of the nest has adopted it."""

    nest: Life
