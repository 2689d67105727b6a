"""Every setting of a flock in one place: default, unit, and what a change trades."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

_WHOLE = ("moves_in_flight", "max_birds", "send_window", "mailbox", "spares", "light_hosts", "light_threads", "start_argument_limit")
_CHOICES: dict[str, tuple[object, ...]] = {"minority": ("run", "pause"), "wire": ("auto", "ray"), "metrics": (True, False)}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of `flock_ray.init`. Times are in seconds. They are fixed for the flock's life and equal on all nests.

    Attributes:
        call_timeout: how long a call waits for its answer when it gives no `timeout`. Shorter finds trouble sooner and gives up
            on slow methods; `None` waits for ever.
        settle: how long a change of the view must last before birds move. Longer moves less in a burst of changes; shorter
            fails over sooner.
        moves_in_flight: how many running birds a nest pulls to itself at a time, or 16 times as many light ones. More moves faster and
            loads the node more.
        bootstrap_wait: how long a booting nest that hears no other waits before it acts alone. Longer is safer where the
            network comes up slowly; shorter boots sooner when the head node cannot say who else there is.
        nest_grace: how long birds go on without a nest on their node, and how long its peers wait for its next life. Longer
            survives slower restarts; shorter fails over sooner when a nest cannot come back. Ray restarts one in about 2 s.
        retry_interval: how long a request to another nest waits for its answer before it is sent again.
        sync_interval: how often a nest compares digests with one peer, with jitter. Shorter mends lost messages sooner.
        lookup_timeout: how long other nests are asked for a name unknown here before `BirdNotFound`.
        context_horizon: how long a dead nest's dots are remembered. A nest out of contact for half of it joins as new.
        probe_interval, probe_timeout: SWIM's. Shorter finds a death sooner and costs packets; too short invites false
            suspicion.
        join_interval: how often all addresses ever seen are joined anew, so that a long split heals by itself.
        backoff_initial, backoff_max: the pause before a crashed bird is hatched again doubles from one to the other, with
            jitter.
        minority: `"run"`: a side of a split with less than half of the last whole view hatches the other's birds too;
            `"pause"`: it goes on only with those it held. Availability against fewer second lives.
        max_birds: how many birds a nest admits; the rest is `pending`. `None`: no limit.
        min_free_memory: the fraction of a node's memory that must be free for its nest to admit birds. 0 admits always.
        wire: `"auto"`: calls go straight to the bird's process over sockets where these can be reached, else as Ray actor calls;
            `"ray"`: always as Ray actor calls, slower by far.
        ports: the first and last TCP port that nests and hosts may listen on, for clusters behind firewalls; a nest takes one on its
            node, and so does each bird with a process of its own. `None`: any.
        send_window: how many casts and futures of one caller to one bird may be unanswered before `MailboxFull`. More takes bigger
            bursts, and memory on both sides.
        mailbox: how many messages may wait for their turn at one bird. Past it a call waits for room within its timeout, and casts and
            futures raise `MailboxFull`. More takes bigger bursts, and memory of the bird's process. It counts what comes over sockets; over
            Ray only `send_window` bounds.
        spares: how many hosts a nest keeps started ahead for each kind of birds that it hatched lately (with and without `async def`
            methods, and by runtime_env). A bird takes one if it asks for no resources and leaves `max_concurrency` alone, and runs some
            10 ms later instead of a second. Each costs the memory of an empty process.
        light_hosts: how many processes a node has for light birds of one runtime_env. More use more CPUs, and memory; they are started as
            birds come. `None`: as many as it has CPUs.
        light_threads: how many light birds of a process may run a method at a time; those that wait for a call of theirs do not count, nor
            do `async def` methods. More lets more birds block, and costs memory; when all do, their neighbours wait.
        rest_after: when the nest of a node leaves it that has had no bird, and no request, for so long: Ray's autoscaler may then remove
            the node. Not on the head. It comes back when there are birds that fit on no other node. Shorter frees nodes sooner; longer
            keeps the load more even, for a node without a nest takes no birds. `None`: it stays, and the autoscaler removes no node.
        metrics: do nests and callers give metrics to Ray's Prometheus endpoints? Without, each process that calls saves some 20 series of
            Prometheus for each path that its calls take, and a nest looks at its names less.
        start_argument_limit: bytes of pickled arguments `start` takes: they are replicated to every node.
    """

    call_timeout: float | None = 30.0
    settle: float = 0.25
    moves_in_flight: int = 16
    bootstrap_wait: float = 5.0
    nest_grace: float = 10.0
    retry_interval: float = 0.5
    sync_interval: float = 2.0
    lookup_timeout: float = 5.0
    context_horizon: float = 7 * 86400.0
    probe_interval: float = 0.3
    probe_timeout: float = 0.15
    join_interval: float = 2.0
    backoff_initial: float = 0.1
    backoff_max: float = 5.0
    minority: str = "run"
    max_birds: int | None = None
    min_free_memory: float = 0.02
    wire: str = "auto"
    ports: tuple[int, int] | None = None
    send_window: int = 10_000
    mailbox: int = 100_000
    spares: int = 0
    light_hosts: int | None = None
    light_threads: int = 32
    rest_after: float | None = None
    metrics: bool = True
    start_argument_limit: int = 1_000_000

    def __post_init__(self) -> None:
        optional = {"call_timeout", "max_birds", "light_hosts", "rest_after"}
        may_be_zero = {"settle", "bootstrap_wait", "min_free_memory", "spares"}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in _CHOICES:
                choices = _CHOICES[setting.name]
                if type(value) is not type(choices[0]) or value not in choices:
                    raise ValueError(f"{setting.name} must be {' or '.join(map(repr, choices))}, not {value!r}")
            elif setting.name == "ports":
                _check_ports(value)
            elif value is None and setting.name in optional:
                continue
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{setting.name} must be a number, not {value!r}")
            elif not (value >= 0 if setting.name in may_be_zero else value > 0):
                least = "at least 0" if setting.name in may_be_zero else "more than 0"
                raise ValueError(f"{setting.name} must be {least}, not {value!r}")
        for setting_name in (
            "moves_in_flight",
            "max_birds",
            "send_window",
            "mailbox",
            "spares",
            "light_hosts",
            "light_threads",
            "start_argument_limit",
        ):
            value = getattr(self, setting_name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{setting_name} must be a whole number, not {value!r}")
        if self.min_free_memory >= 1:
            raise ValueError(f"min_free_memory is a fraction below 1, not {self.min_free_memory!r}")
        if self.backoff_max < self.backoff_initial:
            raise ValueError(f"backoff_max ({self.backoff_max}) must not be below backoff_initial ({self.backoff_initial})")

    def with_settings(self, **settings: Any) -> Config:
        """This configuration with some settings changed.

        Raises:
            TypeError: a setting is unknown; the message names it and the nearest known one.
            ValueError: a value is impossible.
        """
        check_known("setting of init", settings, [setting.name for setting in fields(self)])
        return replace(self, **settings)


def _check_ports(value: Any) -> None:
    if value is None:
        return
    whole = isinstance(value, tuple) and len(value) == 2 and all(type(port) is int for port in value)
    if not whole or not 1 <= value[0] <= value[1] <= 65535:
        raise ValueError(f"ports must be the first and the last of a range, (lo, hi) with 1 <= lo <= hi <= 65535, not {value!r}")


def check_known(kind: str, given: dict[str, Any], known: list[str]) -> None:
    """Refuses keywords that are not known, naming the first and what was probably meant."""
    for key in given:
        if key not in known:
            import difflib  # loaded when it is needed: a host is a new process

            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise TypeError(f"{key!r} is no {kind}{hint}")
