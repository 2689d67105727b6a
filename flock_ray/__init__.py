"""Named, stateful actors on Ray that survive the loss of their node.

The functions are documented where they are defined: most of them are methods of `Flock`, applied to the current flock.

Names are loaded when they are first used: a host is a new process, and what its bird does not use costs it nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flock_ray import notices
    from flock_ray.api.bird import Bird, Method
    from flock_ray.api.flock import (
        Flock,
        aio,
        alive,
        ask_all,
        bird,
        birds,
        call,
        call_many,
        cast,
        cast_many,
        count,
        defaults,
        destroy,
        events,
        explain,
        info,
        init,
        nests,
        options,
        restart,
        shutdown,
        stack,
        start,
        start_many,
        stop,
        stop_many,
        stream,
        wait,
        where,
    )
    from flock_ray.config import Config
    from flock_ray.errors import (
        BirdCrashed,
        BirdExists,
        BirdNotFound,
        BirdUnavailable,
        CallCycle,
        CallTimeout,
        FlockError,
        FlockNotRunning,
        MailboxFull,
        RemoteError,
    )
    from flock_ray.runtime.feed import Feed
    from flock_ray.runtime.inside import Me, Timer, leave, me, send_after, send_every
    from flock_ray.runtime.streams import Stream
    from flock_ray.specs import BirdInfo, BirdStack, Candidate, Explanation, NestInfo, Running

__all__ = [
    "Bird",
    "BirdCrashed",
    "BirdExists",
    "BirdInfo",
    "BirdNotFound",
    "BirdStack",
    "BirdUnavailable",
    "CallCycle",
    "CallTimeout",
    "Candidate",
    "Config",
    "Explanation",
    "Feed",
    "Flock",
    "FlockError",
    "FlockNotRunning",
    "MailboxFull",
    "Me",
    "Method",
    "NestInfo",
    "RemoteError",
    "Running",
    "Stream",
    "Timer",
    "aio",
    "alive",
    "ask_all",
    "bird",
    "birds",
    "call",
    "call_many",
    "cast",
    "cast_many",
    "count",
    "defaults",
    "destroy",
    "events",
    "explain",
    "info",
    "init",
    "leave",
    "me",
    "nests",
    "notices",
    "options",
    "restart",
    "send_after",
    "send_every",
    "shutdown",
    "stack",
    "start",
    "start_many",
    "stop",
    "stop_many",
    "stream",
    "wait",
    "where",
]

_HOMES = (  # where the names above are, the cheaper first
    "flock_ray.errors",
    "flock_ray.specs",
    "flock_ray.config",
    "flock_ray.runtime.inside",
    "flock_ray.runtime.streams",
    "flock_ray.api.bird",
    "flock_ray.runtime.feed",
    "flock_ray.api.flock",
)


def __getattr__(name: str) -> object:
    if name == "notices":
        return import_module("flock_ray.notices")
    if name in __all__:
        for home in map(import_module, _HOMES):
            if name in vars(home):
                globals()[name] = vars(home)[name]
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
