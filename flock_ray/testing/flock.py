"""`Flock` for tests: all that `flock_ray.Flock` does, in one process and in virtual time, and what happens to a cluster on demand."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from flock_ray.api import flock as api
from flock_ray.api.bird import Bird
from flock_ray.config import Config
from flock_ray.errors import BirdNotFound
from flock_ray.runtime import client
from flock_ray.specs import Name
from flock_ray.testing.links import Here
from flock_ray.testing.node import KILLED, Node
from flock_ray.testing.steady import Id
from flock_ray.testing.world import World

R = TypeVar("R")

SETTLED = 60.0  # virtual seconds in which a bird has to move
TOLD = 0.02  # virtual seconds until all nests have heard of a crash, and less than any backoff
LOOK = 0.05  # virtual seconds between looks whether it has


class Flock(api.Flock):
    """A flock for tests: `with Flock() as flock: ...`, or the pytest fixture `flock`.

    It has the same functions as `flock_ray.Flock`. While it is open, those of `flock_ray` and all handles work on it, too, also in birds.
    The test is a process on one of its nodes, the first at the beginning. The real core decides here; Ray, sockets, processes and time are
    replaced. Time stands still while code runs, and passes, without being waited for, when the test waits: in a call, or by `advance`.

    Args:
        nodes: how many it has.
        seed: of all that is left to chance. The same seed gives the same run.
        name: of the flock.
        cpus: of each node.
        config: settings, as `flock_ray.init` takes them. `sync_interval` is 30 s here, for there is little to be mended.
    """

    __test__ = False  # pytest is not to collect it

    def __init__(self, nodes: int = 3, *, seed: int = 0, name: str = "default", cpus: float = 1.0, **config: Any) -> None:
        super().__init__(name)
        if not isinstance(nodes, int) or nodes < 1:
            raise ValueError(f"nodes must be at least 1, not {nodes!r}")
        Config().with_settings(**config)
        self._first = (nodes, cpus)
        self._world_of = (seed, {"sync_interval": 30.0, **config})
        self._world: World | None = None

    def __enter__(self) -> Flock:
        if self._world is not None:
            raise RuntimeError("this flock is open already")
        if isinstance(client.current_process(), Here):
            raise RuntimeError("another flock of flock_ray.testing is open; close it first")
        world = self._world = World(*self._world_of)
        world.loop.start()
        self._before = client.exchange(Here(world)), api._Given.flock
        api._Given.flock = self.name
        nodes, cpus = self._first
        for _ in range(nodes):
            self.add_node(cpus)
        return self

    def __exit__(self, *failure: object) -> None:
        world, self._world = self._open, None
        try:
            world.loop.end()
        finally:
            process, api._Given.flock = self._before
            client.exchange(process)

    @property
    def _open(self) -> World:
        if self._world is None:
            raise RuntimeError("this flock is not open: use it as `with Flock() as flock:`, or the pytest fixture `flock`")
        return self._world

    def _on_loop(self, work: Callable[[], R]) -> R:
        """Does something to the world, which runs on its own thread."""

        async def do() -> R:
            return work()

        return self._open.loop.wait_for(do())  # type: ignore[no-any-return]  # what `work` returns

    # Time

    @property
    def now(self) -> float:
        """Virtual seconds since the flock was opened."""
        return self._open.loop.time()

    def advance(self, seconds: float) -> None:
        """Lets virtual time pass: timers, restarts, moves and whatever else is due happens.

        Args:
            seconds: 0 or more; 0 lets happen what is due now.

        Raises:
            ValueError: `seconds` is negative, or no finite number.
        """
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds must be a finite number of at least 0, not {seconds!r}")
        self._open.loop.sleep(seconds)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine in virtual time, as `asyncio.run` does in real time: `asyncio.sleep` takes no time."""
        return self._open.loop.wait_for(work, None)  # type: ignore[no-any-return]  # what the coroutine returns

    # What happens to birds

    def crash(self, name: Name | Bird[Any]) -> None:
        """Kills the process in which a bird runs, as `kill -9` does. It is restarted as `restart`, `max_restarts` and the backoff say.

        A light bird takes its process along: it has crashed, and its neighbours are hatched again.

        Raises:
            BirdNotFound: no life of it has begun: `wait` for it first.
        """
        plain = self.bird(name).name
        if not self._on_loop(lambda: self._open.crash(self.name, plain, KILLED)):
            raise BirdNotFound(f"no life of bird {plain!r} runs that could crash; wait for it first", plain)
        self.advance(TOLD)

    def move(self, name: Name | Bird[Any], to: str) -> None:
        """Moves a bird to a node, with `hand_over` and `take_over`, and returns when it runs there.

        Its name belongs there from then on, while the node is up, also if it is stopped and started again.

        Args:
            to: the node's id.

        Raises:
            BirdNotFound: nobody knows it.
            ValueError: there is no such node, it is down, or the bird has `moves=False`.
            RuntimeError: it does not run there in a minute of virtual time: a split or its state keeps it.
        """
        plain, node, world = self.bird(name).name, self._node(to), self._open
        self.info(plain)  # raises if it is unknown
        nest = world.node_here().nests[self.name]
        winner = nest.registry.replica.winner(plain)
        if not node.is_up:
            raise ValueError(f"node {to!r} is down: nothing can be moved there")
        if winner is not None and not winner[1].spec.options.moves:
            raise ValueError(f"bird {plain!r} was started with moves=False: it stays where it is")
        self._on_loop(lambda: world.pin(self.name, plain, node.id))
        until = self.now + SETTLED
        while not any(at == node.id and state == "running" for at, state in self.lives(plain)):
            if self.now >= until:
                raise RuntimeError(f"bird {plain!r} did not move to {to!r} in {SETTLED:g} s: its lives are {self.lives(plain)}")
            self.advance(LOOK)

    def lives(self, name: Name | Bird[Any]) -> list[tuple[str, str]]:
        """Where lives of a bird really are, whatever nests know of it: node and state (`"starting"`, `"running"`, `"ending"`) of each.

        In a split there may be one on each side.
        """
        plain = self.bird(name).name
        return [(str(nest.life.node), life.state.value) for nest, _, life in self._open.running(self.name, plain)]

    # What happens to nodes

    @property
    def nodes(self) -> list[str]:
        """The ids of the nodes that are up."""
        return [str(node.id) for node in self._open.living()]

    def add_node(self, cpus: float = 1.0, *, resources: Mapping[str, float] | None = None, labels: Mapping[str, str] | None = None) -> str:
        """A node joins the cluster; birds move to it as to any other.

        Args:
            cpus: its weight on the ring, and what `num_cpus` is taken of.
            resources: `GPU`, `memory` (bytes) and whatever else birds ask for.
            labels: for `label_selector`.

        Returns:
            Its id.
        """
        world = self._open
        return str(self._on_loop(lambda: world.add_node(cpus, resources or {}, labels or {})).id)

    def kill_node(self, node: str) -> None:
        """A node dies with all that runs on it. If the test ran there, it goes on on another.

        Raises:
            ValueError: there is no such node, it is down, or it is the last.
        """
        gone = self._node(node)
        if not gone.is_up:
            raise ValueError(f"node {node!r} is down already")
        if self.nodes == [node]:
            raise ValueError(f"node {node!r} is the last one that is up: the test itself has to run somewhere")
        self._on_loop(lambda: self._open.kill_node(gone))

    def split(self, *groups: Iterable[str]) -> None:
        """Splits the network: nodes of different groups do not reach each other. The test is on the side of its own node, see `on`.

        Args:
            groups: node ids; nodes that are in none are a group of their own.

        Raises:
            ValueError: a node is unknown, or in two groups.
        """
        sides: dict[str, int] = {}
        for side, group in enumerate(groups, 1):
            if isinstance(group, str):
                raise ValueError(f"a group is a list of node ids, not {group!r}: flock.split([{group!r}], [...])")
            for node in group:
                if sides.setdefault(self._node(node).id, side) != side:
                    raise ValueError(f"node {node!r} is in two groups")
        self._on_loop(lambda: self._open.split(sides))

    def heal(self) -> None:
        """Makes the network whole again."""
        self._on_loop(lambda: self._open.split({}))

    @contextmanager
    def on(self, node: str) -> Iterator[None]:
        """Has the test run on this node: `with flock.on(node): flock.call(...)` sees the flock from there.

        Raises:
            ValueError: there is no such node, or it is down.
        """
        there, world = self._node(node), self._open
        if not there.is_up:
            raise ValueError(f"node {node!r} is down: nothing runs there")
        before, world.home = world.home, there
        try:
            yield
        finally:
            world.home = before

    def _node(self, node: str) -> Node:
        found = self._open.nodes.get(Id(node))
        if found is None:
            raise ValueError(f"there is no node {node!r}: those that are up are {', '.join(self.nodes)}")
        return found

    def __repr__(self) -> str:
        return f"flock_ray.testing.Flock({self.name!r})"
