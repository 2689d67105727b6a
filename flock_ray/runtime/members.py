"""Who answers: kinship's members and events (SWIM with Lifeguard), turned into the core's. The only file that imports kinship.

A member is one life of a nest (M2). Its name is cut to what kinship allows, 64 bytes, and its tags carry the whole: node id and number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import kinship
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flock_ray.config import Config
from flock_ray.core.events import MemberAlive, MemberDead
from flock_ray.specs import Life

Heard = Callable[[MemberAlive | MemberDead], None]


def derive_key(secret: bytes, flock_life: str) -> bytes:
    """The members' key: HKDF (RFC 5869) of the flock's secret, bound to its life."""
    return HKDF(SHA256(), 32, salt=None, info=b"flock_ray/members/1/" + flock_life.encode()).derive(secret)


class Members:
    """This nest's member of the failure detector.

    Args:
        ip: the node's address; a free port is taken.
        door: where this nest listens, `ip:port`; empty if it is reached by Ray only.
        heard: is told what the core has to know.
    """

    def __init__(self, me: Life, flock_life: str, secret: bytes, ip: str, door: str, config: Config, heard: Heard) -> None:
        self._heard = heard
        self._me = me
        self._known: set[str] = set()
        host = f"[{ip}]" if ":" in ip else ip
        self._cluster = kinship.Cluster(
            kinship.Config.lan(
                name=f"{me.node[:24]}-{me.number:x}",
                bind=f"{host}:0",
                cluster=f"flock_ray-{flock_life}",
                keys=[derive_key(secret, flock_life)],
                meta={"node": me.node, "number": str(me.number), "door": door},
                probe_interval=config.probe_interval,
                probe_timeout=config.probe_timeout,
            )
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._doors: dict[str, tuple[int, str]] = {}  # by node: of its latest life

    @property
    def address(self) -> str:
        return str(self._cluster.local.addr)

    def door(self, node: str) -> str:
        """Where the nest of a node listens; empty if that is not known."""
        return self._doors.get(node, (0, ""))[1]

    async def start(self) -> None:
        await self._cluster.start()
        self._tasks = [asyncio.create_task(self._watch())]

    async def join(self, addresses: list[str]) -> None:
        """Joins whoever answers at these addresses, and all ever seen: so a long split heals by itself (M2)."""
        self._known.update(addresses)
        others = sorted(self._known - {self.address})
        if others:
            with suppress(kinship.JoinError):  # nobody answers now: the next round is due in `join_interval`
                await self._cluster.join(others)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._cluster.leave(0.5)
        await self._cluster.close()

    async def _watch(self) -> None:
        stream = self._cluster.events()
        self._resync()
        async for event in stream:
            if isinstance(event, kinship.EventsLost):
                self._resync()
            elif isinstance(event, kinship.MemberJoined | kinship.MemberRecovered):
                self._alive(event.member)
            elif isinstance(event, kinship.MemberDead | kinship.MemberLeft):
                # An orderly leave permits nothing by itself: the core asks whether the node is gone (M2, M5).
                self._tell(event.member, MemberDead)

    def _resync(self) -> None:
        for member in self._cluster.members():
            self._alive(member)

    def _alive(self, member: kinship.Member) -> None:
        self._known.add(str(member.addr))
        self._tell(member, MemberAlive)

    def confirm(self, life: Life) -> None:
        """Was it wrong that a nest is gone? It is told anew if it is heard: of what it goes on hearing the detector says nothing."""
        for member in self._cluster.members():
            is_it = (member.meta.get("node"), member.meta.get("number")) == (life.node, str(life.number))
            if is_it and member.state is kinship.State.ALIVE:  # one that is suspected is dead soon, or recovers
                self._alive(member)

    def _tell(self, member: kinship.Member, kind: type[MemberAlive] | type[MemberDead]) -> None:
        if "node" not in member.meta:
            return
        life = Life(member.meta["node"], int(member.meta["number"]))
        if life.number >= self._doors.get(life.node, (0, ""))[0]:
            self._doors[life.node] = (life.number, member.meta.get("door", ""))
        if life != self._me:
            self._heard(kind(life))
