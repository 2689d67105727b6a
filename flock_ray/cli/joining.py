"""How a command gets to its flock: it joins a Ray cluster that runs, says nothing of Ray's, and starts neither a cluster nor a flock.

0  fine
1  the flock said no, or the bird's method raised
2  the command was not given as it has to be
3  there is no such cluster, or no such flock on it
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flock_ray.errors import FlockNotRunning

if TYPE_CHECKING:
    from flock_ray.api.flock import Flock

FINE, REFUSED, USAGE, NOT_THERE, INTERRUPTED = 0, 1, 2, 3, 130


class Failure(Exception):
    """The end of a command: one sentence that says what to do, and the exit code."""

    def __init__(self, text: str, code: int = REFUSED) -> None:
        super().__init__(text)
        self.code = code


def join_cluster(address: str) -> None:
    """Joins a Ray cluster that runs.

    Args:
        address: as `ray.init` takes it; `auto`: the one on this machine.

    Raises:
        Failure: there is none, or it does not let this process in.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.simplefilter("ignore")  # Ray's, of what will once be otherwise
    if not address or address == "local":
        raise Failure("flock-ray joins a cluster and starts none; give the --address of one that runs, or none for the one here", USAGE)
    import ray  # here: it takes half a second, and help and completion have no use for it

    from flock_ray.runtime import cluster

    try:
        found = cluster.running_cluster(address)
        with _silence():
            ray.init(found, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # whatever Ray raises, of which nothing is to be shown but what it says first
        why = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        where = "" if address == "auto" else f" at {address}"
        text = f"no Ray cluster can be joined{where} ({why}); start one with `ray start --head`, or give the address of one with --address"
        raise Failure(text, NOT_THERE) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What is written to standard error below Python is dropped: Ray's core writes there, whatever level is asked for."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def ask(flock: Flock, *query: object) -> Any:
    """A question to the nest of this node (`Nest.read`)."""
    from flock_ray.runtime.client import client_of

    client = client_of(flock.name)
    return client.courier.run(client.asks.read(*query))


def check_flock(name: str) -> None:
    """Raises `Failure` unless such a flock runs on the cluster."""
    from flock_ray.api.flock import Flock

    try:
        Flock(name).count()
    except FlockNotRunning as error:
        hint = "" if name == "default" else f" --flock {name}"
        raise Failure(f"no flock {name!r} runs on this cluster; start one with `flock-ray init{hint}`", NOT_THERE) from error
