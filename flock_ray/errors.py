"""Every error flock_ray raises: one tree, each picklable, each with the bird's name.

A class says when its error occurs and what the caller can do. All of them derive from `FlockError`; those that mean what a
built-in exception means derive from that one too.
"""

# they all are errors; their names say what happened

from __future__ import annotations

__all__ = [
    "BirdCrashed",
    "BirdExists",
    "BirdNotFound",
    "BirdUnavailable",
    "CallCycle",
    "CallTimeout",
    "FlockError",
    "FlockNotRunning",
    "MailboxFull",
    "RemoteError",
]


class FlockError(Exception):
    """The root of flock_ray's errors.

    Args:
        message: one sentence: what happened, and what to do.
        name: the name of the bird concerned; `None` where there is none.
    """

    def __init__(self, message: str, name: object = None) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with `args` alone and lose `name`.
        return (type(self), (*self.args, self.name), {"__cause__": self.__cause__, "__notes__": getattr(self, "__notes__", [])})

    def __setstate__(self, state: dict[str, object] | None) -> None:
        if state:
            cause = state.get("__cause__")
            if isinstance(cause, BaseException):
                self.__cause__ = cause
            for note in state.get("__notes__") or ():  # type: ignore[attr-defined]  # a list of str by the protocol above
                self.add_note(note)


class FlockNotRunning(FlockError):
    """Ray is not initialised in this process, the flock was never started, or it is being destroyed.

    Call `ray.init` and then `flock_ray.init` or `flock_ray.start`.
    """


class BirdNotFound(FlockError, LookupError):
    """No nest that could be asked knows the name. Start it, or look at `flock_ray.birds()`."""


class BirdExists(FlockError):
    """The name is taken. Stop it first, choose another, or start with `options(if_exists="ok")`."""


class CallTimeout(FlockError, TimeoutError):
    """No answer within the timeout; what was called may still run. Its cause is the bird's last error if it is restarting."""


class BirdUnavailable(FlockError):
    """The bird's host went away after the message was sent: the method may or may not have run.

    Call again if the method can be repeated, or say so with `bird.method.options(retry=True)`.
    """


class BirdCrashed(FlockError):
    """The bird crashed too often and is `failed`. Mend the cause, then `flock_ray.restart(name)` or stop and start it."""


class CallCycle(FlockError):
    """The call would wait for a bird that waits for this call. Use `cast`, or make the methods `async def`."""


class MailboxFull(FlockError):
    """The bird, or the sender's window to it, holds as many unprocessed messages as are allowed. Slow down, or retry later."""


class RemoteError(FlockError):
    """A method raised something that cannot be brought here with its own type; the text and remote traceback are kept."""
