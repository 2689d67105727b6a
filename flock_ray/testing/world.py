"""The simulated cluster: nodes, the network between them, and the failure detector. All of it runs on the loop of virtual time."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from flock_ray.config import Config
from flock_ray.core import events as ev
from flock_ray.errors import FlockNotRunning
from flock_ray.runtime.cluster import FlockLife
from flock_ray.specs import Name, Route
from flock_ray.testing.links import LATENCY, HostLink
from flock_ray.testing.node import LocalHost, LocalNest, Node
from flock_ray.testing.virtual import VirtualLoop, here

DETECTS = 2.0  # seconds until nests give up one that they do not hear, as SWIM does
HEARS = 0.05  # seconds until they hear one that is there
LISTED = 1.0  # seconds until Ray's node table shows that a node is gone
BROKEN = 5.0  # seconds after which a connection across a split counts as broken, as TCP is told to


class World:
    """Nodes, and the flocks on them.

    Args:
        seed: of the network's jitter, and of the nests'.
        settings: of the flocks that begin here, unless `init` gives others.
    """

    def __init__(self, seed: int, settings: Mapping[str, Any]) -> None:
        self.loop = VirtualLoop()
        self.pins: defaultdict[str, dict[Name, str]] = defaultdict(dict)  # by flock: birds that the test has moved
        self.nodes: dict[str, Node] = {}
        self.home: Node | None = None  # where the test runs, if it has chosen
        self._rng = random.Random(seed)
        self._settings = dict(settings)
        self._flocks: dict[str, FlockLife] = {}
        self._sides: dict[str, int] = {}  # of a split
        self._links: list[HostLink] = []

    # Nodes

    def add_node(self, cpus: float, resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
        node = Node(self, len(self.nodes) + 1, cpus, resources, labels)
        self.nodes[node.id] = node
        for record in self._flocks.values():
            node.begin(record)
        self._network_changed()
        self._list_nodes()
        return node

    def kill_node(self, node: Node) -> None:
        listeners = [nest for nest in self._nests() if self.reaches(nest._place, node)]
        node.die()
        for nest in listeners:
            if nest._place is not node:
                nest.take(ev.ConnectionBroken(node.id))
        self._network_changed()
        self.loop.call_later(LISTED, self._list_nodes)

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    def node_here(self) -> Node:
        host = here.get()
        if isinstance(host, LocalHost):
            return host.node
        if self.home is not None and self.home.is_up:
            return self.home
        return self.living()[0]

    def starts_afresh(self, node: Node, flock: str) -> None:
        self.loop.call_later(1.0, self._begin_again, node, flock)

    def _begin_again(self, node: Node, flock: str) -> None:
        record = self._flocks.get(flock)
        if record is not None and node.is_up:
            node.begin(record)
            self._network_changed()
            self._list_nodes()

    def _nests(self) -> list[LocalNest]:
        return [nest for node in self.living() for nest in node.nests.values() if not nest._ending]

    def _list_nodes(self) -> None:
        listed = frozenset(node.id for node in self.living())
        for nest in self._nests():
            nest.take(ev.NodesListed(listed))

    # The network

    def draw(self) -> float:
        return self._rng.random()

    def split(self, sides: Mapping[str, int]) -> None:
        self._sides = dict(sides)
        self._network_changed()
        self.loop.call_later(BROKEN, self._break_links)

    def reaches(self, one: Node, other: Node) -> bool:
        """Do messages go from one node to the other? To a dead one they do, and are refused."""
        return self._sides.get(one.id, 0) == self._sides.get(other.id, 0)

    def connected(self, link: HostLink) -> None:
        self._links = [kept for kept in self._links if not kept.lost()]
        self._links.append(link)

    def _break_links(self) -> None:
        for link in self._links:
            if not link.lost() and not self.reaches(link.source, link.host.node):
                link.break_off("the network is split")

    def _network_changed(self) -> None:
        """The failure detectors notice, and what was held up arrives."""
        for link in self._links:
            if not link.lost() and self.reaches(link.source, link.host.node):
                link.healed()
        nests = self._nests()
        for one in nests:
            for other in nests:
                if one is not other and one._record == other._record and self._hear_each_other(one, other) and other.life not in one.heard:
                    self.loop.call_later(HEARS * (1 + self.draw()), self._hear, one, other)
            for node in self.nodes.values():
                for gone in one.heard:
                    if gone.node == node.id and not (node.is_up and self.reaches(one._place, node)):
                        self.loop.call_later(DETECTS * (1 + self.draw() / 4), self._miss, one, node)

    def _hear_each_other(self, one: LocalNest, other: LocalNest) -> bool:
        return not one._ending and not other._ending and self.reaches(one._place, other._place)

    def _hear(self, one: LocalNest, other: LocalNest) -> None:
        if self._hear_each_other(one, other) and other.life not in one.heard:
            one.heard.add(other.life)
            one.take(ev.MemberAlive(other.life))

    def _miss(self, one: LocalNest, node: Node) -> None:
        if node.is_up and self.reaches(one._place, node):
            return
        for life in sorted(one.heard):
            if life.node == node.id:
                one.heard.discard(life)
                one.take(ev.MemberDead(life))

    def post(self, source: Node, flock: str, node: str, packed: bytes) -> None:
        self.loop.call_later(LATENCY * (1 + self.draw()), self._deliver, source, flock, self.nodes[node], packed)

    def _deliver(self, source: Node, flock: str, target: Node, packed: bytes) -> None:
        nest = target.nests.get(flock)
        if target.is_up and nest is not None and not nest._ending and self.reaches(source, target):
            nest._take_letters(packed)

    def found(self, source: Node, node: str) -> ev.Found:
        target = self.nodes[node]
        return "silent" if not self.reaches(source, target) else "up" if target.is_up else "refused"

    # Flocks

    def config(self, flock: str) -> Config | None:
        record = self._flocks.get(flock)
        return None if record is None else record.config

    async def ensure(self, flock: str, settings: Mapping[str, Any]) -> Config:
        """Brings a flock up."""
        record = self._flocks.get(flock)
        if record is None:
            config = Config().with_settings(**{**self._settings, **settings})
            record = self._flocks[flock] = FlockLife(flock, f"{len(self._flocks):012x}", config, b"")
            contextvars.Context().run(self._begin, record)
            await self._until_whole(flock)
        for name, value in settings.items():
            running = getattr(record.config, name)
            if running != value:
                text = f"flock {flock!r} runs with {name}={running!r}, not {value!r}"
                raise ValueError(f"{text}; a flock's settings are fixed until destroy()")
        await self.node_here().nests[flock].ready()
        return record.config

    async def _until_whole(self, flock: str) -> None:
        """Waits until each nest of a new flock knows all others that it can reach."""
        nests = [node.nests[flock] for node in self.living()]
        for nest in nests:
            await nest.ready()
            reached = {other.life for other in nests if self.reaches(nest._place, other._place)}
            while not reached <= nest.registry.membership.view and not nest._ending:
                await asyncio.sleep(HEARS)

    def _begin(self, record: FlockLife) -> None:
        for node in self.living():
            node.begin(record)
        self._list_nodes()
        self._network_changed()

    async def destroy(self, flock: str) -> None:
        record = self._flocks.pop(flock, None)
        if record is None:
            raise FlockNotRunning(f"flock {flock!r} is not running; call flock_ray.init() or start a bird")
        nests = [nest for nest in self._nests() if nest._record.flock == flock]
        await asyncio.gather(*(nest.destroy() for nest in nests))
        for node in self.nodes.values():
            node.nests.pop(flock, None)

    def host_of(self, route: Route) -> LocalHost | None:
        """The process that a route leads to."""
        node = self.nodes.get(route.node)
        hosts = (nest.processes.hosts.get(route.host) for nest in (node.nests.values() if node is not None else ()))
        return next((host for host in hosts if host is not None), None)

    def running(self, flock: str, name: Name) -> list[tuple[LocalNest, str, Any]]:
        """Where lives of a bird are: the nest, the host, and the life."""
        return [
            (nest, host.host, life)
            for nest in self._nests()
            if nest._record.flock == flock
            for host in nest.processes.hosts.values()
            for life in host._lives.values()
            if life.name == name and life.state.value in ("starting", "running", "ending")
        ]

    def crash(self, flock: str, name: Name, why: str) -> bool:
        """Kills the processes in which a bird runs; False if there is none."""
        lives = self.running(flock, name)
        for nest, host, life in lives:
            nest.processes.crash(host, life.dot, why)
        return bool(lives)

    def pin(self, flock: str, name: Name, node: str) -> None:
        """Has a node own a name, as long as it is there."""
        self.pins[flock][name] = node
        for nest in self._nests():
            nest.pinned()
